// SPDX-License-Identifier: Apache-2.0

// Package handover receives a userfaultfd, and what it is about, from a virtual machine monitor that
// co-operates, and sends one. It speaks Firecracker's protocol (docs/snapshotting/handling-page-faults-on-snapshot-resume.md
// in its repository): the monitor connects to our Unix stream socket and sends one message, a JSON array
//
//	[{"base_host_virt_addr": 140000000000000, "size": 1073741824, "offset": 0,
//	  "page_size": 4096, "page_size_kib": 4096}]
//
// with the descriptor as SCM_RIGHTS. All numbers are bytes; page_size_kib, too, in spite of its name,
// which is why page_size replaced it. There is no reply.
//
// The peer is not trusted: who it is gets checked before a byte is read, the message is bounded, descriptors
// that do not belong are closed, and mappings that overlap, overflow or are not aligned are refused.
package handover
