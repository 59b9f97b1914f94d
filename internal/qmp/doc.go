// SPDX-License-Identifier: Apache-2.0

// Package qmp talks to QEMU over the QEMU Machine Protocol, on a Unix socket.
//
// A Client implements Monitor of github.com/digitalocean/go-qemu/qmp, so that everything written for
// go-qemu runs on it. It is an implementation of its own because a switchover needs what go-qemu's lacks:
// commands that carry ids and obey a context, errors with QEMU's error class, replies of any size, events
// that never block a reply, and descriptors sent along with a command.
//
// One goroutine reads. A reply goes to whoever sent the command with its id; an event goes to every
// subscription that asked for it. Neither ever waits for its receiver, so a slow one can only lose events
// of its own, which its subscription counts.
//
// The protocol is described in QEMU's docs/interop/qmp-spec.txt, its commands in qapi/*.json.
package qmp
