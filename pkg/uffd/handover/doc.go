// SPDX-License-Identifier: Apache-2.0

// Package handover receives a userfaultfd and its memory mappings from a virtual machine monitor that co-operates, or
// sends them. It speaks Firecracker's protocol (docs/snapshotting/handling-page-faults-on-snapshot-resume.md in its
// repository): the monitor connects to our Unix stream socket and sends one message, a JSON array
//
//	[{"base_host_virt_addr": 140000000000000, "size": 1073741824, "offset": 0,
//	  "page_size": 4096, "page_size_kib": 4096}]
//
// with the descriptor as SCM_RIGHTS. All numbers are bytes, even page_size_kib: because of its misleading name,
// page_size replaced it. There is no reply.
//
// The peer is not trusted: its identity is checked before a byte is read, the message has a size limit, surplus
// descriptors are closed, and mappings that overlap, overflow or are not aligned are refused.
package handover
