// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
)

// probe asks the kernel something once. Only a conclusive answer is remembered: being out of
// descriptors today says nothing about the kernel.
type probe struct {
	mu     sync.Mutex
	known  bool
	answer Features
}

func (p *probe) get(ask func() (Features, error)) (Features, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known {
		return p.answer, nil
	}
	f, err := ask()
	if err != nil {
		return 0, fmt.Errorf("asking the kernel for its userfaultfd features: %w", err)
	}
	p.known, p.answer = true, f
	return f, nil
}

var kernelFeatures probe

// ProbeFeatures asks the running kernel for everything it offers, by a handshake on a descriptor made
// for the purpose. It needs no privilege.
func ProbeFeatures() (Features, error) { return kernelFeatures.get(askFeatures) }

// HaveFeatures is nil if the kernel has all of want, a *NotSupportedError naming those it lacks, or
// another error if the kernel could not be asked.
func HaveFeatures(want Features) error {
	have, err := ProbeFeatures()
	if err != nil {
		return err
	}
	if missing := want &^ have; missing != 0 {
		return notSupported(missing)
	}
	return nil
}

// askFeatures makes the handshake. UFFD_SECURE hides a feature, so without it where that is permitted:
// vm.unprivileged_userfaultfd=2 permits no other.
func askFeatures() (Features, error) {
	u, err := openAny(OpenOptions{ForkEvents: true})
	if errors.Is(err, fs.ErrPermission) {
		u, err = openAny(OpenOptions{})
	}
	if err != nil {
		return 0, err
	}
	defer u.Close()
	have, _, err := u.handshake(0)
	return have, err
}

// openAny opens a user-mode-only descriptor, which offers what any other does and is the one that every
// process may make; kernels before 5.11 do not have it, but did not restrict the other.
func openAny(o OpenOptions) (*UFFD, error) {
	o.UserModeOnly = true
	u, err := Open(o)
	if errors.Is(err, ErrNotSupported) {
		o.UserModeOnly = false
		u, err = Open(o)
	}
	return u, err
}
