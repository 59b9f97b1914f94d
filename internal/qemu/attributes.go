// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Attributes are what a process has from whoever started it, and what a QEMU cannot be told on its command line. Those
// of the source's are given to the destination's. The niceness and the CPUs that it may use are not: they are about
// the one host.
type Attributes struct {
	OOMScoreAdj int    // proc_pid_oom_score_adj(5)
	Umask       uint32 // of the sockets and files that QEMU makes
}

// attributes reads those of the QEMU process.
func (vm *VM) attributes(status map[string]string) (a Attributes, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", vm.Pid))
	if err == nil {
		a.OOMScoreAdj, err = strconv.Atoi(strings.TrimSpace(string(text)))
	}
	if err != nil {
		return a, fmt.Errorf("OOM score of QEMU: %w", err)
	}
	umask, err := strconv.ParseUint(status["Umask"], 8, 32)
	if err != nil {
		return a, fmt.Errorf("umask of QEMU: %w", err)
	}
	a.Umask = uint32(umask)
	return a, nil
}

// umaskLock is held while this process has another umask, which a child has from it.
var umaskLock sync.Mutex

// withUmask calls start with another umask.
func (a *Attributes) withUmask(start func() error) error {
	if a == nil {
		return start()
	}
	umaskLock.Lock()
	defer umaskLock.Unlock()
	defer unix.Umask(unix.Umask(int(a.Umask)))
	return start()
}

// give gives the others to a process that has just been started.
func (a *Attributes) give(pid int) error {
	if a == nil {
		return nil
	}
	path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	if err := os.WriteFile(path, []byte(strconv.Itoa(a.OOMScoreAdj)), 0); err != nil {
		return fmt.Errorf("give QEMU the source's OOM score %d: %w", a.OOMScoreAdj, err)
	}
	return nil
}
