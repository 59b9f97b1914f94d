// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// Handover is what a monitor handed over. The receiver owns UFFD.
type Handover struct {
	Mappings []Mapping // as sent: at least one, without overlaps
	UFFD     *uffd.UFFD
	Peer     unix.Ucred // the process that connected
}

// Receive reads the one message from conn. conn stays open, and the caller's. The monitor has already made the
// userfaultfd's handshake and registered its memory. Receive makes the userfaultfd non-blocking, for
// all processes that share it. It cannot find out whether it was made with UFFD_SECURE: UFFD.Supervision is
// at most Labelled.
//
// Nothing proves that the mappings or the descriptor belong to the peer's own memory: allow only
// peers that may have any faults answered. The error is ErrPeerRefused, ErrInvalid, the
// context's, or that of the socket. After an error no descriptor stays open.
func Receive(ctx context.Context, conn *net.UnixConn, allowed PeerPolicy) (*Handover, error) {
	h, err := receive(ctx, conn, allowed)
	if err != nil {
		return nil, fmt.Errorf("receive userfaultfd: %w", err)
	}
	return h, nil
}

func receive(ctx context.Context, conn *net.UnixConn, allowed PeerPolicy) (*Handover, error) {
	peer, err := allowed.check(conn)
	if err != nil {
		return nil, err
	}
	defer interruptible(ctx, conn.SetReadDeadline)()

	var got rights
	defer got.close()
	var message frame
	piece, control := make([]byte, 4096), make([]byte, unix.CmsgSpace(scmMaxFD*4))
	for done := false; !done; {
		// The net package asks for MSG_CMSG_CLOEXEC.
		n, controlLen, flags, _, err := conn.ReadMsgUnix(piece, control)
		if rightsErr := got.add(control[:controlLen], flags); rightsErr != nil {
			return nil, rightsErr
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err == nil && n == 0 {
			err = io.EOF
		}
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%w: it ends after %d bytes: %w", ErrInvalid, len(message.text), io.ErrUnexpectedEOF)
		}
		if err != nil {
			return nil, err
		}
		if done, err = message.add(piece[:n]); err != nil {
			return nil, err
		}
	}

	mappings, err := decode(message.text)
	if err != nil {
		return nil, err
	}
	fd, err := got.take()
	if err != nil {
		return nil, err
	}
	return &Handover{Mappings: mappings, UFFD: uffd.FromFD(fd), Peer: peer}, nil
}

// interruptible makes the connection's reads or writes fail when ctx ends. undo takes that back.
func interruptible(ctx context.Context, setDeadline func(time.Time) error) (undo func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = setDeadline(time.Unix(1, 0)) // long past
	})
	return func() {
		if !stop() {
			<-done
			_ = setDeadline(time.Time{})
		}
	}
}
