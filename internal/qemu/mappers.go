// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/printable"
)

// A Mapper is another process that has a file of the VM's memory mapped: the back end of a vhost-user device, another
// VM, a program that looks into the VM. No userfaultfd of QEMU's makes it wait for a page that has not come, and what
// it touches there is a page of zeros from then on.
type Mapper struct {
	PID  int
	Name string // of the process, as the kernel has it
}

// String names it for operators.
func (m Mapper) String() string { return fmt.Sprintf("process %d (%s)", m.PID, printable.Line(m.Name)) }

// A mapping is who else maps which block.
type mapping struct {
	block  RAMBlock
	mapper Mapper
}

// CheckAlone refuses blocks whose file another process has mapped at this moment: a *RAMError each, joined. Memory that
// is QEMU's alone has no such file, and what QEMU cannot write to others may have.
func (vm *VM) CheckAlone(blocks []RAMBlock) error {
	found, _, err := vm.mappers(blocks)
	if err != nil {
		return err
	}
	var failed []error
	for _, m := range found {
		failed = append(failed, m.refusal())
	}
	return errors.Join(failed...)
}

func (m mapping) refusal() *RAMError {
	return &RAMError{
		m.block.ID,
		fmt.Sprintf("%v maps its file %s as well, as another VM or the back end of a vhost-user device does: "+
			"nothing makes that wait for pages that have not come", m.mapper, m.block.File),
		"end that process (a back end: unplug its device first); if it belongs to another VM, give this one another " +
			"mem-path, at the destination with --template",
	}
}

// mappers looks into the maps of all processes for files of shared blocks. unseen is how many processes it could not
// look into: whether they map one is not known.
//
// The kernel names a file in maps by its device and inode, whichever mount namespace the process is in and whether the
// file has a name (memfd, removed) or not.
func (vm *VM) mappers(blocks []RAMBlock) (found []mapping, unseen int, err error) {
	blocks = slices.DeleteFunc(slices.Clone(blocks), func(b RAMBlock) bool {
		return b.Private || b.ReadOnly || b.File == ""
	})
	if len(blocks) == 0 {
		return nil, 0, nil
	}
	keys, err := vm.mapKeys(blocks)
	if err != nil {
		return nil, 0, err
	}
	unseen, err = eachMaps(func(pid int, text []byte) {
		for i, b := range blocks {
			if pid != vm.Pid && mapsFile(text, keys[i]) && !sharesMemory(pid, vm.Pid) {
				found = append(found, mapping{b, Mapper{pid, nameOf(pid)}})
			}
		}
	})
	if err != nil {
		return nil, 0, err
	}
	return found, unseen, vm.Alive() // or it was another's memory, by the same number
}

// eachMaps calls look with the maps of each process. unseen is how many it could not look into, but for those that have
// ended.
func eachMaps(look func(pid int, text []byte)) (unseen int, err error) {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, dir := range processes {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		text, err := os.ReadFile(dir + "/maps")
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH): // it has ended
		case err != nil:
			unseen++
		default:
			look(pid, text)
		}
	}
	return unseen, nil
}

// mapKeys are the device and the inode of each block's file, as maps has them.
func (vm *VM) mapKeys(blocks []RAMBlock) ([][]byte, error) {
	ours, err := readMaps(vm.Pid)
	if err != nil {
		return nil, err
	}
	keys := make([][]byte, 0, len(blocks))
	for _, b := range blocks {
		m, found := mappedAt(ours, b.Addr)
		if !found {
			return nil, fmt.Errorf("RAM %q is not mapped at %#x any more", b.ID, b.Addr)
		}
		keys = append(keys, mapKey(m.major, m.minor, m.inode))
	}
	return keys, nil
}

// mapKey is a file as a line of maps has it.
func mapKey(major, minor uint32, inode uint64) []byte {
	return fmt.Appendf(nil, " %02x:%02x %d ", major, minor, inode)
}

// mapsFile says whether the text of a maps file has a mapping of the file with that key. Most have none, and a host has
// many: so the lines are not taken apart. A path may hold anything, also such a key, but stands behind the real one.
func mapsFile(text, key []byte) bool {
	for {
		at := bytes.Index(text, key)
		if at < 0 {
			return false
		}
		line := text[bytes.LastIndexByte(text[:at], '\n')+1 : at]
		if bytes.Count(line, []byte{' '}) == 2 { // addresses, permissions and offset are before it
			return true
		}
		text = text[at+1:]
	}
}

// sharesMemory says whether two processes have one address space, as one made by vfork(2) has its parent's until it
// runs a program: it maps nothing of its own, and what it touches is QEMU's fault.
func sharesMemory(a, b int) bool {
	const kcmpVM = 1 // linux/kcmp.h
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), kcmpVM, 0, 0, 0)
	return errno == 0 && order == 0
}

// nameOf is what a process calls itself (proc_pid_comm(5)); "?": it has ended.
func nameOf(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "?"
	}
	return strings.TrimSuffix(string(text), "\n")
}
