// SPDX-License-Identifier: Apache-2.0

// Package launch starts QEMUs. A QEMU outlives the daemon: it has a session of its own and gets no signal when its
// parent dies. Its output goes through a named pipe into a log of bounded size. The next daemon opens the pipe again
// (FollowOutputs).
//
//	daemon ── Starter (a socket) ──▶ "migrated start-qemus" ── fork, exec ──▶ QEMU
//	   ▲                                 its parent                            │ stdout, stderr
//	   └────────────────── pipe (fifo(7)), log ◀──────────────────────────────┘
//
// A confined daemon may start no program. A Starter does it instead: a second process of this program, which begins
// before the confinement. It checks again that the binary is allowed, and it calls the hook for an incoming libvirt
// domain.
//
// internal/qemu/cmdline makes the command line. qemu.Start launches a QEMU with this package and waits until it
// answers; internal/migration calls qemu.Start. internal/daemon and cmd/migrated hold the Starter, and follow and limit
// the logs.
package launch
