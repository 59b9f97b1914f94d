// SPDX-License-Identifier: Apache-2.0

// Package qmp talks to QEMU over the QEMU Machine Protocol, on a Unix socket.
//
// # Why not the monitor of go-qemu
//
// Client is an implementation of its own because a switchover needs what SocketMonitor of
// github.com/digitalocean/go-qemu lacks: commands that carry ids and obey a context, errors with QEMU's error class,
// replies of any size, events that never block a reply, and descriptors sent along with a command.
//
// Client.Typed runs go-qemu's generated commands over a Client. The product uses it for replies that are the same in
// all versions of QEMU (query-kvm, query-uuid, query-hotpluggable-cpus). The other replies are decoded from Client.Do:
// go-qemu's schema is that of QEMU 2.11, which has no query-cpus-fast and no query-jobs, and fails on what newer
// versions answer to query-migrate-capabilities and query-named-block-nodes.
//
// # How it works
//
// One goroutine reads. A reply goes to the caller that sent the command with its id; an event goes to every
// subscription that asked for it. The reader never waits for a receiver: a subscription whose buffer is full loses
// events, and counts them.
//
// The protocol is described in QEMU's docs/interop/qmp-spec.txt, its commands in qapi/*.json.
package qmp
