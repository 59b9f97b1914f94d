// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

var opAPI = newOperation("UFFDIO_API")

// ErrForkRefused says that FeatureEventFork was wanted on a descriptor made with UFFD_SECURE. The kernel
// would answer ErrInvalid.
var ErrForkRefused = errors.New("userfaultfd: UFFD_SECURE refuses UFFD_FEATURE_EVENT_FORK (see OpenOptions.ForkEvents)")

// API makes the handshake that every descriptor needs once, and enables the features in want. available is
// everything that the kernel offers, not what was enabled. ioctls has bit n set if ioctl number n
// (abi Nr_UFFDIO_*) works on the descriptor itself.
//
// The error is a *NotSupportedError if the kernel lacks a wanted feature. Continue with a new descriptor
// then: on older kernels a failed handshake counts, and a second one is refused. ErrPermission means that
// FeatureEventFork was wanted without CAP_SYS_PTRACE. ErrForkRefused means that this descriptor cannot have it.
// ErrInvalid means that the handshake was made before, or that FeatureEventFork was wanted and somebody else
// made the descriptor with UFFD_SECURE.
func (u *UFFD) API(want Features) (available Features, ioctls uint64, err error) {
	if want&FeatureEventFork != 0 && u.secure.Load() {
		return 0, 0, ErrForkRefused
	}
	available, ioctls, err = u.handshake(want)
	switch {
	case err == nil && available&eventsTogether == FeatureEventRemove:
		u.secure.Store(true)
	case errors.Is(err, ErrInvalid):
		// Either a feature is missing or this is the second handshake. HaveFeatures asks on a new descriptor.
		if haveErr := HaveFeatures(want); errors.Is(haveErr, ErrNotSupported) {
			return 0, 0, haveErr
		} else if haveErr != nil {
			return 0, 0, errors.Join(err, haveErr)
		}
		if want&(FeatureRWP|FeatureRWPAsync) == FeatureRWPAsync {
			return 0, 0, fmt.Errorf("%w: UFFD_FEATURE_RWP_ASYNC goes only with UFFD_FEATURE_RWP", err)
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

// eventsTogether are two features of the same release, Linux 4.11. A descriptor that offers REMOVE but not FORK was
// made with UFFD_SECURE, which hides FORK.
const eventsTogether = FeatureEventFork | FeatureEventRemove

// handshake makes UFFDIO_API and interprets nothing.
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
