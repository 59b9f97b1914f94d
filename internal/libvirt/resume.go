// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// resume answers a client's cont. libvirt continues the VM where it takes it for a paused one, because it does more
// than to send cont: it takes the leases of the images (virtlockd, sanlock), and sets up the network devices of a
// domain that was started paused (qemuProcessStartCPUs of libvirt). libvirt continues no other domain, such as one
// whose guest has suspended itself. QEMU's own cont is sent then.
func (m *monitor) resume(c command) (answer, error) {
	state, _, err := m.domain.DomainGetState(m.domain.id, 0)
	if err != nil || golibvirt.DomainState(state) != golibvirt.DomainPaused {
		return m.pass(c)
	}
	if err := m.checkProcess(); err != nil {
		return answer{}, err
	}
	if err := m.domain.checkRun(); err != nil {
		return answer{}, err
	}
	err = m.domain.DomainResume(m.domain.id)
	var refused golibvirt.Error
	switch {
	case err == nil:
		return done, nil
	case !errors.As(err, &refused):
		return answer{}, err
	}
	// It is a refusal only if QEMU still answers. libvirt also fails when it loses its monitor, and QEMU may have got the
	// command then.
	var status runStatus
	if lost := m.ask("query-status", &status); lost != nil {
		return answer{}, errors.Join(err, lost)
	}
	if status.Running {
		return done, nil
	}
	return refusal(err), nil
}
