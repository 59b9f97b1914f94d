// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
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
	if a.OOMScoreAdj, err = oomScoreAdj(strconv.Itoa(vm.Pid)); err != nil {
		return a, fmt.Errorf("OOM score of QEMU: %w", err)
	}
	umask, err := strconv.ParseUint(status["Umask"], 8, 32)
	if err != nil {
		return a, fmt.Errorf("umask of QEMU: %w", err)
	}
	a.Umask = uint32(umask)
	return a, nil
}

// attributesLock is held while this process has other attributes, which a child has from it.
var attributesLock sync.Mutex

// during calls start while this process has them. It has no right to the process of a QEMU in a domain of SELinux's.
func (a *Attributes) during(start func() error) (err error) {
	if a == nil {
		return start()
	}
	attributesLock.Lock()
	defer attributesLock.Unlock()
	own, err := oomScoreAdj("self")
	if err != nil {
		return fmt.Errorf("this process' OOM score: %w", err)
	}
	if own != a.OOMScoreAdj {
		defer func() { err = errors.Join(err, setOOMScoreAdj(own)) }()
		if err := setOOMScoreAdj(a.OOMScoreAdj); err != nil {
			return fmt.Errorf("give QEMU the source's OOM score, %d: %w; below %d that takes CAP_SYS_RESOURCE, which "+
				"deploy/more-privileges.conf gives the daemon", a.OOMScoreAdj, err, own)
		}
	}
	defer unix.Umask(unix.Umask(int(a.Umask)))
	return start()
}

const oomPath = "/proc/%s/oom_score_adj"

func oomScoreAdj(process string) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf(oomPath, process))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

func setOOMScoreAdj(score int) error {
	return os.WriteFile(fmt.Sprintf(oomPath, "self"), []byte(strconv.Itoa(score)), 0)
}
