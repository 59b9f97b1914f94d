// SPDX-License-Identifier: Apache-2.0

// Package pagesrv serves the RAM of stopped VMs, page by page, on the source host.
//
// In the way of one page fault it is step 3, the page server's reply:
//
//	1 event read ─► 2 claim, lane request ─► [3 page server reply] ─► 4 receive ─► 5 UFFDIO_COPY
//
// What happens to a request here (lane.go), all in the lane's one goroutine:
//
//	Recv    ─► check the ranges ─► VM stopped? (once) ─┐
//	  ▲                                                ▼
//	  │        ┌────────────────────────────► begin ─► find a hole, or pread(2) ─► end
//	  │        │ more to read                              │ into a leased frame
//	  │        │                                           ▼
//	  └── Send    ◄─ pack? ◄─ reply is full, or request done ◄─ sort pages: zero or data
//
// This path allocates no memory of its own and takes no lock, except for a bulk reply under a limit of the host
// (shared.go) and a request beyond the quota (quota.go). The pages of a reply are read to right behind the message's
// header, see pkg/pagewire, and are sent from there.
//
// # Packing
//
// The pages of a reply are packed (S2, or Zstd for bulk) where that costs less than it saves. Both are measured, never
// configured. Each lane measures how long packing takes and how much it shrinks pages (pays.go). What a byte costs on
// the network is measured for all lanes of an export together (link.go), by how long the bulk lane waits. On a fast
// network only pages that pack very well are packed, because copying bytes through two kernels also takes time. On a
// slow network almost everything is packed. Memory that does not pack costs a small sample now and then (pack.go).
//
// # Only memory of a stopped VM
//
// Pages of a running VM would be a mixture of moments. So an export asks whether the VM is stopped before its first
// page, and Revoke has to be called before the VM is continued. A lane looks after each read whether the export is
// withdrawn, and then sends nothing of it. Withdraw, which has to be called before the RAM is closed, also waits until
// no read is under way. A read announces itself before it looks whether the export is withdrawn, and Withdraw marks the
// export before it looks for announced reads, so one always sees the other:
//
//	lane                                        Withdraw
//	reading = true                              withdrawn = true (Revoke)
//	withdrawn? ── yes ► refuse                  reading? ── yes ► wait for the lane to say idle
//	pread
//	reading = false
//	withdrawn? ── yes ► say idle, drop it
//
// # Why pread and no mapping
//
// RAM is read with pread(2), never mapped. A mapping would save a copy only if gRPC got the mapped memory itself, and
// then nobody could tell when the last read of it is over. Copying out of a mapping causes page faults. Measured on
// tmpfs (BenchmarkReadRAM), pread of data takes as long as a fresh mapping, give or take a fifth. For holes it is 5 to
// 8 times faster in pieces of 4 KiB and 25 to 50 times in pieces of 512 KiB: a read fault on a hole makes tmpfs
// allocate the page, and hugetlbfs take a huge page from the pool. pread allocates nothing for a hole, and where the
// file was truncated it returns an error, not SIGBUS.
package pagesrv
