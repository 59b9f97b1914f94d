// SPDX-License-Identifier: Apache-2.0

// Command guest is PID 1 of a kernel with transparent huge pages. It registers memory with a userfaultfd, installs some
// of its pages, lets khugepaged scan it, and reports what has become of a page that was not installed:
//
//	RESULT name missing    a thread that reads it waits, and finds what the userfaultfd gives it
//	RESULT name filled     a thread that reads it finds zeros, and the userfaultfd is not told
//	DONE
//
// Memory whose userfaultfd is closed shows that khugepaged does make huge pages of memory with holes.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/hugepages"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

const (
	hugeSize = 2 << 20
	pageSize = 4096
	size     = 2 * hugeSize // of each memory: one huge page with half of its pages, and one with a single page
	half     = hugeSize / 2
	single   = hugeSize + 7*pageSize

	settings = "/sys/kernel/mm/transparent_hugepage/"
)

// looked are pages that are not installed, and that a guest would read next.
var looked = []uint64{half, hugeSize - pageSize, hugeSize, size - pageSize}

func main() {
	err := run()
	if err != nil {
		fmt.Println("LOG failed:", err)
	} else {
		fmt.Println("DONE")
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // it does not return
}

func run() error {
	err := errors.Join(unix.Mount("proc", "/proc", "proc", 0, ""), unix.Mount("sysfs", "/sys", "sysfs", 0, ""))
	for file, value := range map[string]string{
		"enabled":                          "always",
		"khugepaged/scan_sleep_millisecs":  "10",
		"khugepaged/alloc_sleep_millisecs": "10",
		"khugepaged/max_ptes_none":         "511", // the default
		"khugepaged/pages_to_scan":         "100000",
	} {
		err = errors.Join(err, set(file, value))
	}
	if err != nil {
		return err
	}
	// khugepaged scans only processes that had suitable memory while it ran.
	known := &memory{name: "anonymous"}
	at, err := known.mapIt()
	if err != nil {
		return err
	}
	clear(unsafe.Slice((*byte)(at), size))
	for _, huge := range []string{"always", "within_size", "advise", "never"} {
		dir := "/tmpfs-" + huge
		if err := errors.Join(os.Mkdir(dir, 0o755), unix.Mount("tmpfs", dir, "tmpfs", 0, "huge="+huge)); err != nil {
			return err
		}
	}
	for _, setting := range []string{"never", "always", "within_size", "advise", "deny", "force"} {
		if err := group(setting); err != nil {
			return fmt.Errorf("shmem_enabled=%s: %w", setting, err)
		}
	}
	return probes()
}

// probes reports what this project's program finds out about the kernel, with and without huge pages permitted.
func probes() error {
	for _, setting := range []string{"never", "advise"} {
		if err := set("shmem_enabled", setting); err != nil {
			return err
		}
		fills, err := uffd.CollapseFillsMissing()
		if err != nil {
			return err
		}
		fmt.Printf("RESULT probe-%s %v\n", setting, fills)
	}
	return nil
}

// A memory is memory of which khugepaged may make huge pages.
type memory struct {
	name    string
	file    *os.File // nil: private anonymous memory
	private bool
	advice  int
	other   bool // another mapping of the file, without advice
	plain   bool // its userfaultfd is closed before khugepaged looks

	start uint64
	pages []byte
	u     *uffd.UFFD
}

// group tries all kinds of memory under one setting of shmem_enabled.
func group(setting string) error {
	if err := set("shmem_enabled", setting); err != nil {
		return err
	}
	memories := []*memory{
		{name: "memfd-plain", plain: true},
		{name: "memfd"},
		{name: "memfd-advised", advice: unix.MADV_HUGEPAGE},
	}
	switch setting {
	case "never":
		for _, huge := range []string{"always", "within_size", "advise", "never"} {
			memories = append(memories,
				&memory{name: "tmpfs-" + huge + "-plain", plain: true},
				&memory{name: "tmpfs-" + huge},
				&memory{name: "tmpfs-" + huge + "-advised", advice: unix.MADV_HUGEPAGE},
				&memory{name: "tmpfs-" + huge + "-private", private: true})
		}
		memories = append(memories,
			&memory{name: "anonymous-plain", plain: true},
			&memory{name: "anonymous"},
			&memory{name: "anonymous-advised", advice: unix.MADV_HUGEPAGE},
			&memory{name: "tmpfs-always-refused", advice: unix.MADV_NOHUGEPAGE},
			&memory{name: "tmpfs-always-refused-other", advice: unix.MADV_NOHUGEPAGE, other: true})
	case "deny", "force":
		memories = append(memories, &memory{name: "tmpfs-always"}, &memory{name: "tmpfs-never"})
	}
	// All memory is prepared before khugepaged scans any of it.
	if err := set("enabled", "never"); err != nil {
		return err
	}
	for _, m := range memories {
		if err := m.make(); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
	}
	if err := set("enabled", "always"); err != nil {
		return err
	}
	if err := scanned(); err != nil {
		return err
	}
	for _, m := range memories {
		outcome, err := m.look()
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		permitted := ""
		if m.file != nil && !m.private {
			is, err := hugepages.Permitted(os.Getpid(), m.start)
			if err != nil {
				return fmt.Errorf("%s: %w", m.name, err)
			}
			permitted = fmt.Sprintf(" permitted=%t", is)
		}
		fmt.Printf("RESULT %s-%s %s%s\n", setting, m.name, outcome, permitted)
		if err := m.end(); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
	}
	return nil
}

// make maps the memory, registers it and installs pages.
func (m *memory) make() (err error) {
	kind, _, _ := strings.Cut(m.name, "-")
	switch kind {
	case "memfd":
		var fd int
		if fd, err = unix.MemfdCreate(m.name, 0); err == nil {
			m.file = os.NewFile(uintptr(fd), m.name)
		}
	case "tmpfs":
		dir := "/" + strings.Join(strings.Split(m.name, "-")[:2], "-")
		m.file, err = os.Create(filepath.Join(dir, m.name))
	}
	if err != nil {
		return err
	}
	at, err := m.mapIt()
	if err != nil {
		return err
	}
	m.start, m.pages = uint64(uintptr(at)), unsafe.Slice((*byte)(at), size)
	if m.advice != 0 {
		if err := unix.Madvise(m.pages, m.advice); err != nil {
			return fmt.Errorf("madvise: %w", err)
		}
	}
	if m.u, err = uffd.Open(uffd.OpenOptions{NonBlocking: true}); err != nil {
		return err
	}
	if _, _, err := m.u.API(0); err != nil {
		return err
	}
	if _, err := m.u.Register(uffd.Range{Start: m.start, Len: size}, uffd.ModeMissing); err != nil {
		return err
	}
	for at := uint64(0); at < half; at += pageSize {
		if _, err := m.u.Copy(m.start+at, page(1), 0); err != nil {
			return err
		}
	}
	if _, err := m.u.Copy(m.start+single, page(1), 0); err != nil {
		return err
	}
	if m.plain {
		err = m.u.Close()
	}
	if m.other {
		_, err = m.mapIt()
	}
	return err
}

// mapIt maps the memory at an address that is aligned to huge pages.
func (m *memory) mapIt() (unsafe.Pointer, error) {
	all, err := unix.MmapPtr(-1, 0, nil, size+hugeSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	at := unsafe.Add(all, -uintptr(all)%hugeSize)
	flags, fd := unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1
	if m.file != nil {
		if err := m.file.Truncate(size); err != nil {
			return nil, err
		}
		flags, fd = unix.MAP_SHARED, int(m.file.Fd())
		if m.private {
			flags = unix.MAP_PRIVATE
		}
	}
	return unix.MmapPtr(fd, 0, at, size, unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_FIXED)
}

// end unmaps the memory, so that the next scan is about other memory.
func (m *memory) end() error {
	err := unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(m.pages)), size)
	err = errors.Join(err, m.u.Close())
	if m.file != nil {
		err = errors.Join(err, m.file.Truncate(0), m.file.Close())
	}
	return err
}

// look returns what has become of the pages that were not installed. All of them must be alike.
func (m *memory) look() (outcome string, err error) {
	for _, at := range looked {
		if m.plain {
			outcome, err = m.resident(at, outcome)
		} else {
			outcome, err = m.touch(at, outcome)
		}
		if err != nil {
			return "", fmt.Errorf("page at %#x: %w", at, err)
		}
	}
	return outcome, nil
}

// resident returns whether a page is there, without touching it.
func (m *memory) resident(at uint64, before string) (string, error) {
	var vec [1]byte
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(m.start+at), pageSize, uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		return "", errno
	}
	return alike(before, map[bool]string{true: "filled", false: "missing"}[vec[0]&1 != 0])
}

func alike(before, outcome string) (string, error) {
	if before != "" && before != outcome {
		return "", fmt.Errorf("this page is %s, one before was %s", outcome, before)
	}
	return outcome, nil
}

// touch makes the kernel read a byte of a page, as for a program's system call. To the kernel this is a fault like any
// other.
func (m *memory) touch(at uint64, before string) (string, error) {
	var data, done [2]int // pipes; one becomes readable before the kernel has read what is written to it
	if err := errors.Join(unix.Pipe(data[:]), unix.Pipe(done[:])); err != nil {
		return "", err
	}
	written := make(chan error, 1)
	go func() {
		_, err := unix.Write(data[1], m.pages[at:at+1])
		written <- errors.Join(err, unix.Close(data[1]), unix.Close(done[1]))
	}()
	fds := []unix.PollFd{{Fd: int32(done[0]), Events: unix.POLLIN}, {Fd: int32(m.u.FD()), Events: unix.POLLIN}}
	if err := poll(fds); err != nil {
		return "", err
	}
	outcome, want := "filled", byte(0)
	if fds[1].Revents != 0 { // the thread waits
		outcome, want = "missing", 2
		events := uffd.NewEventBuffer(1)
		if _, err := m.u.Read(events); err != nil {
			return "", err
		}
		if e := events.At(0); e.Kind != uffd.EventPagefault || e.Pagefault.Addr != m.start+at {
			return "", fmt.Errorf("event %v at %#x", e.Kind, e.Pagefault.Addr-m.start)
		}
		if _, err := m.u.Copy(m.start+at, page(2), 0); err != nil {
			return "", err
		}
	}
	if err := <-written; err != nil {
		return "", err
	}
	var got [1]byte
	if _, err := unix.Read(data[0], got[:]); err != nil {
		return "", err
	}
	if err := errors.Join(unix.Close(data[0]), unix.Close(done[0])); err != nil {
		return "", err
	}
	if got[0] != want {
		return "", fmt.Errorf("it is %s and reads %d, want %d", outcome, got[0], want)
	}
	return alike(before, outcome)
}

func poll(fds []unix.PollFd) error {
	for {
		_, err := unix.Poll(fds, -1)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// page returns the content of a page.
func page(b byte) []byte {
	p := make([]byte, pageSize)
	for i := range p {
		p[i] = b
	}
	return p
}

// scanned returns once khugepaged has scanned everything. The present scan may have passed new memory already, and the
// next one may skip a page that is in use for a moment, so it waits for four.
func scanned() error {
	from, err := scans()
	for now := from; err == nil && now < from+4; now, err = scans() {
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

func scans() (int, error) {
	text, err := os.ReadFile(settings + "khugepaged/full_scans")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

func set(file, value string) error { return os.WriteFile(settings+file, []byte(value), 0) }
