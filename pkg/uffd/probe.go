// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// probe asks the kernel something once. It remembers only a conclusive answer: a lack of
// descriptors, for example, says nothing about the kernel.
type probe[A any] struct {
	mu     sync.Mutex
	known  bool
	answer A
}

func (p *probe[A]) get(ask func() (A, error)) (A, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known {
		return p.answer, nil
	}
	answer, err := ask()
	if err != nil {
		var none A
		return none, err
	}
	p.known, p.answer = true, answer
	return answer, nil
}

var kernelFeatures probe[Features]

// ProbeFeatures returns all features that the running kernel offers. It makes a handshake on a descriptor of its
// own, once. It needs no privilege.
func ProbeFeatures() (Features, error) { return kernelFeatures.get(askFeatures) }

// HaveFeatures returns nil if the kernel has all of want, a *NotSupportedError that names those it lacks, or
// another error if the kernel could not be asked.
func HaveFeatures(want Features) error {
	have, err := ProbeFeatures()
	if err != nil {
		return err
	}
	if missing := want &^ have; missing != 0 {
		return featureTable.notSupported(missing)
	}
	return nil
}

// askFeatures makes the handshake. UFFD_SECURE hides FeatureEventFork, so askFeatures first tries a descriptor without
// that flag. vm.unprivileged_userfaultfd=2 permits only descriptors with it.
func askFeatures() (have Features, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("asking the kernel for its userfaultfd features: %w", err)
		}
	}()
	u, err := openAny(OpenOptions{ForkEvents: true})
	if errors.Is(err, fs.ErrPermission) {
		u, err = openAny(OpenOptions{})
	}
	if err != nil {
		return 0, err
	}
	defer u.Close()
	have, _, err = u.handshake(0)
	return have, err
}

// openAny opens a user-mode-only descriptor. It offers the same features as any other, and every process may
// make it. Kernels before 5.11 do not have that mode, but do not restrict other descriptors.
func openAny(o OpenOptions) (*UFFD, error) {
	o.UserModeOnly = true
	u, err := Open(o)
	if errors.Is(err, ErrNotSupported) {
		o.UserModeOnly = false
		u, err = Open(o)
	}
	return u, err
}

// AsksSecure reports whether Open asks for UFFD_SECURE on this kernel. No released Linux has the flag, and a later one
// may give its number to another flag. So AsksSecure makes a descriptor with it. The answer is yes if that descriptor
// offers no fork events, which is what UFFD_SECURE means, or if this process may not make one and cannot find out.
func AsksSecure() bool { return secureKernel() }

var secureKernel = sync.OnceValue(func() bool { return isSecureFlag(sysUserfaultfd) })

// isSecureFlag calls ask to make a descriptor with UFFD_SECURE, and looks at the features that it offers.
func isSecureFlag(ask func(flags uintptr) (int, unix.Errno)) bool {
	fd, errno := ask(unix.O_CLOEXEC | abi.UFFD_USER_MODE_ONLY | abi.UFFD_SECURE)
	switch errno {
	case 0:
	case unix.EINVAL: // no such flag, or one that cannot be combined with these as UFFD_SECURE can
		return false
	default: // the kernel checks permission before flags
		return true
	}
	u := FromFD(fd)
	defer u.Close()
	have, _, err := u.handshake(0)
	return err == nil && have&FeatureEventFork == 0
}
