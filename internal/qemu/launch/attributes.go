// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// attributesLock is held while this process has changed attributes. Its children inherit them.
var attributesLock sync.Mutex

// withAttributes calls start while this process has the attributes a, which start's child inherits. When a is nil, it
// changes nothing. The attributes are not set on the running QEMU, because this process has no right to change a QEMU
// in an SELinux domain.
func withAttributes(a *process.Attributes, start func() error) (err error) {
	if a == nil {
		return start()
	}
	attributesLock.Lock()
	defer attributesLock.Unlock()
	own, err := process.OOMScoreAdj("self")
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

func setOOMScoreAdj(score int) error {
	return os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(score)), 0)
}
