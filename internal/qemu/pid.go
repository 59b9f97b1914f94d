// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// findPid finds the process of the QEMU that answers.
//
// The kernel names the process that listens at the socket. Whoever starts QEMU may listen and hand the
// socket over (libvirt does), so that process must have the threads that QEMU calls its vCPUs.
func findPid(ctx context.Context, client *qmp.Client) (int, error) {
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
	var name struct {
		UUID string `json:"UUID"`
	}
	if err := client.Do(ctx, "query-uuid", nil, &name); err != nil {
		return 0, err
	}
	var threads []int
	for _, cpu := range cpus {
		threads = append(threads, cpu.Thread)
	}
	if pid, found := processOf(threads, name.UUID); found { // not the listener
		return pid, nil
	}
	return 0, fmt.Errorf("cannot tell which process is the QEMU behind %s: its listener, process %d, has not QEMU's threads; "+
		"run the daemon in the PID namespace of QEMU, or one above it", client.Path(), listener)
}

// noUUID is that of a VM which was given none.
const noUUID = "00000000-0000-0000-0000-000000000000"

// processOf finds the QEMU that has all these threads and was given that UUID, if it counts processes as we do: in
// another PID namespace the same numbers may be those of another VM.
func processOf(threads []int, uuid string) (pid int, found bool) {
	for _, thread := range threads {
		status, err := readStatus(thread)
		process, _ := strconv.Atoi(status["Tgid"])
		if err != nil || process == 0 || found && process != pid {
			return 0, false
		}
		pid, found = process, true
	}
	return pid, found && pid != os.Getpid() && looksLikeQEMU(pid) && strings.EqualFold(uuidOf(pid), uuid)
}

// uuidOf is the UUID on the command line of a QEMU.
func uuidOf(pid int) string {
	args, _ := readArgs(pid) // a process that has ended has none
	for i, arg := range args[:max(0, len(args)-1)] {
		if arg == "-uuid" || arg == "--uuid" {
			return args[i+1]
		}
	}
	return noUUID
}

// hasThread tells whether a thread of pid has the number tid in the PID namespace of that process.
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

func looksLikeQEMU(pid int) bool {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	// libvirt makes QEMU name its threads after the guest, but not its first.
	return err == nil && (strings.HasPrefix(string(name), "qemu") || strings.HasPrefix(string(name), "kvm"))
}
