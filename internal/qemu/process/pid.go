// SPDX-License-Identifier: Apache-2.0

package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// Behind returns the PID of the QEMU that answers at a QMP connection.
//
// The kernel names the process that listens at the socket. Another process may have opened the socket and passed it to
// QEMU, as libvirt does. So Behind accepts the listener only if it has the threads that QEMU reports for its vCPUs.
func Behind(ctx context.Context, client *qmp.Client) (int, error) {
	listener := client.PeerPID()
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := client.Do(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return 0, err
	}
	if listener != 0 && (len(cpus) == 0 || hasThread(listener, cpus[0].Thread)) {
		return listener, nil
	}
	vm, err := client.Typed(ctx).QueryUUID()
	if err != nil {
		return 0, err
	}
	var threads []int
	for _, cpu := range cpus {
		threads = append(threads, cpu.Thread)
	}
	if pid, found := OfThreads(threads, vm.UUID); found { // another process than the listener
		return pid, nil
	}
	return 0, fmt.Errorf("cannot tell which process is the QEMU behind %s: "+
		"its listener, process %d, lacks QEMU's threads; run the daemon in the PID namespace of QEMU, or one above it",
		client.Path(), listener)
}

// OfThreads finds the QEMU that has all these threads and that UUID on its command line. It works only if QEMU numbers
// processes as this process does: in another PID namespace the same numbers may belong to another VM, which is why the
// UUID must match.
func OfThreads(threads []int, uuid string) (pid int, found bool) {
	for _, thread := range threads {
		status, err := Status(thread)
		process, _ := strconv.Atoi(status["Tgid"])
		if err != nil || process == 0 || found && process != pid {
			return 0, false
		}
		pid, found = process, true
	}
	maybe, err := looksLikeQEMU(pid)
	return pid, found && pid != os.Getpid() && err == nil && maybe && strings.EqualFold(uuidOf(pid), uuid)
}

// uuidOf returns the UUID on the command line of a QEMU.
func uuidOf(pid int) string {
	args, _ := readArgs(pid) // readArgs returns none for a process that has ended
	return cmdline.UUID(args)
}

// hasThread reports whether a thread of pid has the number tid in the PID namespace of that process.
func hasThread(pid, tid int) bool {
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", pid, tid)); err == nil {
		return true
	}
	statuses, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid)) // the pattern is well-formed
	for _, path := range statuses {
		status, err := parseStatus(path)
		if err != nil {
			continue // the thread ended
		}
		numbers := strings.Fields(status["NSpid"]) // innermost namespace last
		if len(numbers) > 1 && numbers[len(numbers)-1] == strconv.Itoa(tid) {
			return true
		}
	}
	return false
}

// looksLikeQEMU says whether a process has the name of a QEMU, or was started by one. With -name process=, QEMU changes
// its name, but not argv[0]. One whose name or arguments this process may not read is none that it could move: under
// SELinux that is most of the host's services.
func looksLikeQEMU(pid int) (bool, error) {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	// libvirt makes QEMU name its threads after the guest, but the first thread keeps its name.
	if strings.HasPrefix(string(name), "qemu") || strings.HasPrefix(string(name), "kvm") {
		return true, err
	}
	var args []string
	if err == nil {
		args, err = readArgs(pid)
	}
	if errors.Is(err, fs.ErrPermission) {
		return false, nil
	}
	return len(args) > 0 && isProgram(filepath.Base(args[0])), err
}
