// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hugeSize is the size of khugepaged's huge pages in bytes, on x86-64 and on arm64 with pages of 4 KiB.
const hugeSize = 2 << 20

// collapseRespects is the first Linux whose khugepaged skips a range of shared memory that is registered with
// ModeMissing and has a missing page: "mm/khugepaged: skip shmem with userfaultfd". Linux 6.1.192, of the long-term
// series, does not have it.
var collapseRespects = kernelVersion{6, 4}

var collapseFills probe[bool]

// CollapseFillsMissing reports whether khugepaged (and MADV_COLLAPSE) of this kernel fills missing pages of shared
// memory (tmpfs, memfd) with zeros, even if they are registered with ModeMissing. Such a page reads as zeros and gives
// no fault any more. khugepaged does this only where the tmpfs or
// /sys/kernel/mm/transparent_hugepage/shmem_enabled permit huge pages. Private anonymous memory is not affected, on
// any kernel.
//
// Linux 6.4 and newer do not do this. On an older kernel, which a distribution may have fixed, CollapseFillsMissing
// tries it: it has the kernel collapse 2 MiB of this process (MADV_COLLAPSE, Linux 6.1). If it cannot try that, or is
// refused, the answer is yes. The SELinux module of deploy/ refuses it: on a descriptor that the daemon makes for
// itself, it permits only UFFDIO_API.
func CollapseFillsMissing() (bool, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return false, fmt.Errorf("uname: %w", err)
	}
	v, versionErr := parseRelease(unix.ByteSliceToString(name.Release[:]))
	if versionErr == nil && !v.less(collapseRespects) {
		return false, nil
	}
	fills, err := collapseFills.get(askCollapse)
	switch {
	case err == nil:
		return fills, nil
	case versionErr != nil:
		return false, errors.Join(err, versionErr)
	}
	return true, nil
}

// parseRelease returns the version in a release of uname(2), such as "6.1.0-57-cloud-amd64".
func parseRelease(release string) (v kernelVersion, err error) {
	if _, err := fmt.Sscanf(release, "%d.%d", &v.major, &v.minor); err != nil {
		return v, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return v, nil
}

// askCollapse has the kernel collapse a registered range that has one page. An error means that there is no answer.
func askCollapse() (fills bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("trying what khugepaged does to missing pages: %w", err)
		}
	}()
	m, err := mapHuge()
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, m.unmap()) }()
	u, err := openAny(OpenOptions{})
	if err != nil {
		return false, err
	}
	defer u.Close()
	if _, _, err := u.handshake(0); err != nil {
		return false, err
	}
	r := Range{Start: uint64(uintptr(m.huge)), Len: hugeSize}
	if _, err := u.Register(r, ModeMissing); err != nil {
		return false, err
	}
	page := make([]byte, os.Getpagesize())
	if _, err := u.Copy(r.Start, page, 0); err != nil {
		return false, err
	}
	collapseErr := m.collapse()
	if collapseErr == nil {
		// A second page can be installed only if it is still missing.
		_, err := u.Copy(r.Start+uint64(len(page)), page, 0)
		if errors.Is(err, ErrExist) {
			return true, nil
		}
		return false, err
	}
	// The collapse failed. If the userfaultfd was the reason, it works without one.
	if err := u.Unregister(r); err != nil {
		return false, err
	}
	if err := m.collapse(); err != nil {
		return false, errors.Join(collapseErr, err)
	}
	return false, nil
}

// hugeMapping is shared memory for one huge page.
type hugeMapping struct {
	all  unsafe.Pointer // 2*hugeSize bytes, which contain huge
	huge unsafe.Pointer // hugeSize bytes, aligned to hugeSize
}

// mapHuge maps 2 MiB of shared memory at an address that is a multiple of that.
func mapHuge() (m hugeMapping, err error) {
	m.all, err = unix.MmapPtr(-1, 0, nil, 2*hugeSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return m, fmt.Errorf("mmap: %w", err)
	}
	m.huge = unsafe.Add(m.all, -uintptr(m.all)%hugeSize)
	const flags = unix.MAP_SHARED | unix.MAP_ANONYMOUS | unix.MAP_FIXED
	if _, err := unix.MmapPtr(-1, 0, m.huge, hugeSize, unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
		return m, errors.Join(fmt.Errorf("mmap: %w", err), m.unmap())
	}
	return m, nil
}

// collapse does immediately what khugepaged does in the background.
func (m hugeMapping) collapse() (err error) {
	for range 10 { // EAGAIN: a page is in use for a moment
		err = unix.Madvise(unsafe.Slice((*byte)(m.huge), hugeSize), unix.MADV_COLLAPSE)
		if !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("madvise(MADV_COLLAPSE): %w", err)
	}
	return nil
}

func (m hugeMapping) unmap() error { return unix.MunmapPtr(m.all, 2*hugeSize) }
