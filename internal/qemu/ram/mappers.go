// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// A mapper is another process that maps a file of the VM's memory: the back end of a vhost-user device, another VM, or
// a program that inspects the VM. QEMU's userfaultfd does not make it wait for a missing page. A missing page that it
// touches becomes a page of zeros and stays one.
type mapper struct {
	pid  int
	name string // of the process, from the kernel
}

// String names the process for operators.
func (m mapper) String() string { return fmt.Sprintf("process %d (%s)", m.pid, printable.Line(m.name)) }

// CheckAlone refuses blocks whose file another process maps at this moment. The error contains an *Error per block and
// process, joined. It ignores private memory, which no other process maps, and memory that QEMU cannot write to, which
// others may map.
func (mem *Memory) CheckAlone(blocks []Block) error {
	refused, _, err := mem.Mapped(blocks)
	if err != nil {
		return err
	}
	var failed []error
	for _, r := range refused {
		failed = append(failed, r)
	}
	return errors.Join(failed...)
}

func (m mapper) refusal(b Block) *Error {
	return &Error{
		b.ID,
		fmt.Sprintf("%v maps its file %s as well, as another VM or the back end of a vhost-user device does: "+
			"that process does not wait for pages that have not arrived", m, b.File),
		"end that process (a back end: unplug its device first); if it belongs to another VM, give this one another " +
			"mem-path, at the destination with --template",
	}
}

// Mapped searches the maps of all processes for the files of shared blocks. refused has one error per block and other
// process that maps it. unseen is the number of processes whose maps could not be read: they may map one, too.
//
// In maps the kernel identifies a file by device and inode. So it does not matter in which mount namespace the process
// is, nor whether the file has a name (memfd, removed).
func (mem *Memory) Mapped(blocks []Block) (refused []*Error, unseen int, err error) {
	blocks = slices.DeleteFunc(slices.Clone(blocks), func(b Block) bool {
		return b.Private || b.ReadOnly || b.File == ""
	})
	if len(blocks) == 0 {
		return nil, 0, nil
	}
	keys, err := mem.mapKeys(blocks)
	if err != nil {
		return nil, 0, err
	}
	unseen, err = eachMaps(func(pid int, text []byte) {
		for i, b := range blocks {
			if pid != mem.process.PID() && mapsFile(text, keys[i]) && !sharesMemory(pid, mem.process.PID()) {
				refused = append(refused, mapper{pid, process.Name(pid)}.refusal(b))
			}
		}
	})
	if err != nil {
		return nil, 0, err
	}
	return refused, unseen, mem.process.Alive() // else the maps may be of a process that reused the PID
}

// eachMaps calls look with the maps of each process. unseen counts the processes whose maps this process may not read.
// Any other failure is an error, for example that no descriptor is left.
func eachMaps(look func(pid int, text []byte)) (unseen int, err error) {
	pids, err := process.All()
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH): // it has ended
		case errors.Is(err, fs.ErrPermission):
			unseen++
		case err != nil:
			return unseen, fmt.Errorf("memory that process %d maps: %w", pid, err)
		default:
			look(pid, text)
		}
	}
	return unseen, nil
}

// mapKeys returns the key of each block's file; see mapKey.
func (mem *Memory) mapKeys(blocks []Block) ([][]byte, error) {
	ours, err := process.ReadMaps(mem.process.PID())
	if err != nil {
		return nil, err
	}
	keys := make([][]byte, 0, len(blocks))
	for _, b := range blocks {
		m, found := ours.At(b.Addr)
		if !found {
			return nil, fmt.Errorf("RAM %q is not mapped at %#x any more", b.ID, b.Addr)
		}
		keys = append(keys, mapKey(m.Major, m.Minor, m.Inode))
	}
	return keys, nil
}

// mapKey returns device and inode of a file as a line of maps contains them.
func mapKey(major, minor uint32, inode uint64) []byte {
	return fmt.Appendf(nil, " %02x:%02x %d ", major, minor, inode)
}

// mapsFile reports whether text, the content of a maps file, has a mapping of the file with that key. A host has many
// processes, and most of them do not map the file, so mapsFile does not parse every line. A path may contain text like
// a key, but it comes after the real one.
func mapsFile(text, key []byte) bool {
	for {
		at := bytes.Index(text, key)
		if at < 0 {
			return false
		}
		line := text[bytes.LastIndexByte(text[:at], '\n')+1 : at]
		if bytes.Count(line, []byte{' '}) == 2 { // addresses, permissions and offset precede the key
			return true
		}
		text = text[at+1:]
	}
}

// sharesMemory reports whether two processes have one address space. A child made by vfork(2) shares its parent's until
// it executes a program. Such a child maps nothing of its own, and its page faults are QEMU's.
func sharesMemory(a, b int) bool {
	const kcmpVM = 1 // linux/kcmp.h
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), kcmpVM, 0, 0, 0)
	return errno == 0 && order == 0
}
