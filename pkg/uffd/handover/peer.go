// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"golang.org/x/sys/unix"
)

// ErrPeerRefused says that the connection came from a process that the policy does not allow.
var ErrPeerRefused = errors.New("peer is not allowed to hand over a userfaultfd")

// PeerPolicy says which processes may hand over a descriptor. Its zero value allows none.
type PeerPolicy struct {
	// UIDs are the allowed effective user ids, as numbered in this process's user namespace.
	UIDs []uint32

	// PIDs, if not empty, are the only allowed processes. Each must have an allowed user, too.
	PIDs []int32
}

// check asks the kernel which process made the connection (SO_PEERCRED, unix(7)): its number and ids at the time of
// connect(2). If that process has exited, the number may belong to another process now.
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
