// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

var opAPI = newOperation("UFFDIO_API")

// ErrForkRefused says that FeatureEventFork was wanted of a descriptor made with UFFD_SECURE. The kernel
// then would say ErrInvalid.
var ErrForkRefused = errors.New("userfaultfd: UFFD_SECURE refuses UFFD_FEATURE_EVENT_FORK (see OpenOptions.ForkEvents)")

// API makes the handshake that every descriptor needs once, and enables the features in want. available is
// what the kernel has to offer altogether, not what was enabled; ioctls has bit n set if ioctl number n
// (abi Nr_UFFDIO_*) works on the descriptor itself.
//
// The error is a *NotSupportedError if the kernel lacks a wanted feature. Continue with a
// new descriptor then: older kernels take a failed handshake for the one that there may be. ErrPermission
// means that FeatureEventFork was wanted without CAP_SYS_PTRACE, ErrForkRefused that the descriptor cannot have it.
// ErrInvalid means that the handshake was made before (or that somebody else made the descriptor with
// UFFD_SECURE, and FeatureEventFork was wanted).
func (u *UFFD) API(want Features) (available Features, ioctls uint64, err error) {
	if want&FeatureEventFork != 0 && u.secure.Load() {
		return 0, 0, ErrForkRefused
	}
	available, ioctls, err = u.handshake(want)
	switch {
	case err == nil && available&eventsTogether == FeatureEventRemove:
		u.secure.Store(true)
	case errors.Is(err, ErrInvalid):
		// Either a feature is missing or this is the second handshake: a fresh descriptor tells.
		if haveErr := HaveFeatures(want); errors.Is(haveErr, ErrNotSupported) {
			return 0, 0, haveErr
		} else if haveErr != nil {
			return 0, 0, errors.Join(err, haveErr)
		}
		if want&FeatureEventFork != 0 {
			return 0, 0, fmt.Errorf("%w; the kernel has all of these features, so the handshake was made before, "+
				"or the descriptor was made with UFFD_SECURE, which refuses UFFD_FEATURE_EVENT_FORK", err)
		}
		return 0, 0, fmt.Errorf("%w; the kernel has all of these features, so the handshake was made before", err)
	case errors.Is(err, ErrPermission):
		return 0, 0, fmt.Errorf("%w: UFFD_FEATURE_EVENT_FORK needs CAP_SYS_PTRACE", err)
	}
	return available, ioctls, err
}

// eventsTogether came with the same release. A descriptor that offers the one and not the other hides it.
const eventsTogether = FeatureEventFork | FeatureEventRemove

// handshake is UFFDIO_API and nothing more.
func (u *UFFD) handshake(want Features) (available Features, ioctls uint64, err error) {
	if !u.acquire() {
		return 0, 0, opAPI.closed
	}
	defer u.release()
	arg := abi.UffdioApi{Api: abi.UFFD_API, Features: uint64(want)}
	if errno := ioctl(u.fd, abi.UFFDIO_API, &arg); errno != 0 {
		return 0, 0, opAPI.err(errno)
	}
	return Features(arg.Features), arg.Ioctls, nil
}
