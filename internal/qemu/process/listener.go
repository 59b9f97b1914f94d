// SPDX-License-Identifier: Apache-2.0

package process

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/migrated-vm/migrated/internal/printable"
)

// Listeners returns the PIDs of the processes that have the Unix socket bound to the file path open. SO_PEERCRED would
// name only the one that began to listen, which may have passed the socket on and ended, as libvirt does. Processes
// that this one may not look into, or in another network namespace, are missing.
func Listeners(path string) (listeners []int, err error) {
	bound, err := boundSockets()
	if err != nil {
		return nil, err
	}
	pids, err := All()
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // the pattern is well-formed
		for _, link := range links {
			target, _ := os.Readlink(link) // one that is closed by now has no target
			if name, isBound := bound[target]; isBound && isFileOf(pid, name, path) {
				listeners = append(listeners, pid)
				break
			}
		}
	}
	return listeners, nil
}

// boundSockets returns the names of this network namespace's Unix sockets at which connections or datagrams arrive, by
// the target of their descriptors in /proc/PID/fd. A name is the text given to bind(2).
func boundSockets() (map[string]string, error) {
	const flagsField, typeField, inodeField, nameField = 3, 4, 6, 7
	const listens, datagrams = "00010000", "0002" // unix_seq_show in net/unix/af_unix.c
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, fmt.Errorf("list the Unix sockets: %w", err)
	}
	bound := make(map[string]string)
	for line := range strings.Lines(string(table)) {
		// The inode is padded with blanks. A name may have blanks as well.
		fields := strings.Fields(line)
		if len(fields) <= nameField || fields[flagsField] != listens && fields[typeField] != datagrams {
			continue
		}
		_, name, _ := strings.Cut(line, " "+fields[inodeField]+" ")
		bound["socket:["+fields[inodeField]+"]"] = strings.TrimSuffix(name, "\n")
	}
	return bound, nil
}

// isFileOf reports whether the file that the process pid calls name is the one that this process calls path.
func isFileOf(pid int, name, path string) bool {
	from := "cwd"
	if filepath.IsAbs(name) {
		from = "root"
	}
	theirs, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid), from, name))
	if err != nil {
		return false
	}
	ours, err := os.Stat(path)
	return err == nil && os.SameFile(ours, theirs)
}

// Describe names a process for operators, a QEMU with its VM.
func Describe(pid int) string {
	text := fmt.Sprintf("process %d (%s)", pid, printable.Line(Name(pid)))
	switch f, err := lookAt(pid); {
	case err != nil || f == nil:
		return text
	case f.Name == "":
		return text + ", which runs a VM without a name"
	default:
		return fmt.Sprintf("%s, which runs the VM %q", text, f.Name)
	}
}

// Name returns the name of a process (proc_pid_comm(5)), or "?" if it is not known, as that of one that has ended.
func Name(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "?"
	}
	return strings.TrimSuffix(string(text), "\n")
}
