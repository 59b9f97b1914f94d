// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// A page that has not come may be there all the same; UFFDIO_COPY then says EEXIST. Another process has the RAM file
// mapped and has touched the page. That process gets a page of zeros at once, and no userfaultfd of QEMU's sees it. The
// page is in the file from then on, and the VM would find it.
//
// So shared memory whose file is known is registered for minor faults, too (UFFD_FEATURE_MINOR_SHMEM, of Linux 5.14).
// The kernel then maps nothing into the VM but what the engine lets it. The engine does so by UFFDIO_COPY, which maps
// at once and costs no minor fault, or by UFFDIO_CONTINUE:
//
//	page in the file   mapped in the process   state        a touch raises
//	no                 no                      not present  a fault on a missing page, as ever
//	by another         no                      not present  a minor fault, dealt with as the one above; when the content
//	                                                        comes: EEXIST, it is written to the file, UFFDIO_CONTINUE
//	by another         no                      zero         a minor fault; UFFDIO_ZEROPAGE: EEXIST, UFFDIO_CONTINUE
//	ours               yes                     present      nothing
//	ours               no, the kernel took it  present      a minor fault: UFFDIO_CONTINUE, for what is around it as well
//	                   away (it swaps, or made
//	                   a huge page of it)
//
// So the VM never reads the zeros that the other process made. The other process may read zeros, because it looks at
// memory that has not come. What it writes there is overwritten. Where the VM's page is zero, what it writes stays, as
// it would in memory that has come.
//
// For private memory, a file that is not known, and Linux before 5.14, that is not possible. There the page keeps what
// is in it. It is counted in Stats.PagesUnexplained, and the VM may be corrupt.

// occupied deals with EEXIST for pages at addr that, as far as the engine knows, have never been there. The caller has
// their content to install. When occupied returns nil, the page has that content or keeps its own.
//
// If the process gives a page up at this moment, the page stays the caller's (revoked). So nobody maps it, and no
// thread writes to it, before occupied is done.
func (e *Engine) occupied(record *uffd.CopyRecord, b *block, addr uint64, content []byte) error {
	there := uffd.Range{Start: addr, Len: uint64(len(content))}
	e.at("exists", b.first+(addr-b.Addr)>>b.shift)
	if b.minor {
		at, err := e.pagemap.Next(addr, addr+there.Len)
		if err != nil {
			return fmt.Errorf("page at %#x of RAM block %s: ask whether it is mapped: %w", addr-b.Addr, b.ID, err)
		}
		if at >= addr+there.Len { // none of the page is there: the VM has not seen it
			return e.replace(record, b, there, content)
		}
	}
	e.unexplained()
	return b.UFFD.Wake(there)
}

// replace writes the content over a page that another process has made, and maps the page.
func (e *Engine) replace(record *uffd.CopyRecord, b *block, there uffd.Range, content []byte) error {
	if err := writeFile(b, there.Start, content); err != nil {
		return fmt.Errorf("page at %#x of RAM block %s, which another process has touched: write it: %w",
			there.Start-b.Addr, b.ID, err)
	}
	// From here on it is there, also for the next daemon: the VM may write to it as soon as it is mapped.
	record.Landed(there.Len)
	e.at("written", b.first+(there.Start-b.Addr)>>b.shift)
	err := e.keep(b, there)
	if err == nil {
		e.counters.touched.Add(1)
	}
	return err
}

// keep leaves a page as it is and wakes its threads. A page that is only in the file is mapped, or they would fault
// again. uffd.ErrAgain: try again.
func (e *Engine) keep(b *block, there uffd.Range) error {
	if !b.minor {
		return b.UFFD.Wake(there)
	}
	_, err := b.UFFD.Continue(there, 0)
	switch {
	case errors.Is(err, uffd.ErrExist): // it is mapped
		return b.UFFD.Wake(there)
	case errors.Is(err, uffd.ErrFault): // the other process has taken it away again
		return uffd.ErrAgain
	}
	return err
}

// remap maps a page that is there and that the kernel took away, and the pages behind it, as far as they are there. The
// kernel takes away many pages at a time.
func (e *Engine) remap(b *block, p uint64) error {
	n, most := uint64(1), max(1, uint64(remapBytes)>>b.shift)
	for n < most && p+n < b.end() && e.pages.get(p+n) == present {
		n++
	}
	done, err := b.UFFD.Continue(uffd.Range{Start: b.addr(p), Len: n << b.shift}, 0)
	if err == nil || done > 0 {
		return nil
	}
	return e.refill(b, p)
}

// unexplained counts a page that was there before its content came. It does not count a page that an earlier engine may
// have installed without being able to say so.
func (e *Engine) unexplained() {
	if e.pages.unsure.Add(-1) < 0 {
		e.counters.unexplained.Add(1)
	}
}

// writeFile writes to the file behind addr. It does not write through the process, whose mapping would fault.
func writeFile(b *block, addr uint64, content []byte) error {
	fd, offset := int(b.File.Fd()), b.FileOffset+int64(addr-b.Addr)
	for done := 0; done < len(content); {
		n, err := unix.Pwrite(fd, content[done:], offset+int64(done))
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EINVAL) && done == 0: // hugetlbfs has no write(2)
			return writeMapped(fd, offset, content)
		case err != nil:
			return err
		}
		done += max(0, n)
	}
	return nil
}

func writeMapped(fd int, offset int64, content []byte) error {
	memory, err := unix.Mmap(fd, offset, len(content), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(memory, content)
	return unix.Munmap(memory)
}
