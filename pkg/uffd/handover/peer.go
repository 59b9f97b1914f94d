// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"golang.org/x/sys/unix"
)

// ErrPeerRefused says that the connection came from a process the policy does not allow.
var ErrPeerRefused = errors.New("peer is not allowed to hand over a userfaultfd")

// PeerPolicy says who may hand over a descriptor. Its zero value allows nobody.
type PeerPolicy struct {
	// UIDs are the effective user ids allowed, as this process's user namespace numbers them.
	UIDs []uint32

	// PIDs, if not empty, are the only processes allowed, and must be of such a user as well.
	PIDs []int32
}

// check asks the kernel who made the connection (SO_PEERCRED, unix(7)): the process and its ids at the time of
// connect(2). Its number may have been given to another process since, if it has exited.
func (p PeerPolicy) check(conn *net.UnixConn) (unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return unix.Ucred{}, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return unix.Ucred{}, err
	}
	if credErr != nil {
		return unix.Ucred{}, fmt.Errorf("SO_PEERCRED: %w", credErr)
	}
	if !slices.Contains(p.UIDs, cred.Uid) || len(p.PIDs) > 0 && !slices.Contains(p.PIDs, cred.Pid) {
		return *cred, fmt.Errorf("%w: process %d of user %d; allowed are users %v, processes %v",
			ErrPeerRefused, cred.Pid, cred.Uid, p.UIDs, p.PIDs)
	}
	return *cred, nil
}
