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
	if len(cpus) != 0 {
		if pid, found := processOf(cpus[0].Thread); found { // not the listener
			return pid, nil
		}
	}
	return 0, fmt.Errorf("cannot tell which process is the QEMU behind %s: its listener, process %d, has not QEMU's threads; "+
		"run the daemon in the PID namespace of QEMU, or one above it", client.Path(), listener)
}

// processOf finds the QEMU that has the thread, if that counts processes as we do.
func processOf(thread int) (pid int, found bool) {
	status, err := readStatus(thread)
	pid, _ = strconv.Atoi(status["Tgid"])
	return pid, err == nil && pid != 0 && pid != os.Getpid() && looksLikeQEMU(pid)
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
