// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"fmt"

	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// findQEMU sets m.pid to QEMU's process.
func (m *monitor) findQEMU(processOf Finder) error {
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := m.ask("query-cpus-fast", &cpus); err != nil {
		return err
	}
	var threads []int
	for _, cpu := range cpus {
		threads = append(threads, cpu.Thread)
	}
	pid, found := processOf(threads, formatUUID(m.domain.id.UUID))
	if !found {
		return fmt.Errorf("no QEMU of this UUID has the threads %v, as this daemon counts them; "+
			"run the daemon in the PID namespace of QEMU", threads)
	}
	m.pid = pid
	return nil
}

// closeProcess closes m.process.
func (m *monitor) closeProcess() error {
	if m.process == nil {
		return nil
	}
	return m.process.Close()
}

// checkProcess returns inject.ErrProcessGone if QEMU has ended. Another process may have its PID then, and libvirt may
// have started the domain anew: what is meant for this QEMU must not reach either.
func (m *monitor) checkProcess() error {
	if m.process != nil && m.process.Ended() {
		return fmt.Errorf("QEMU, process %d: %w", m.pid, inject.ErrProcessGone)
	}
	return nil
}
