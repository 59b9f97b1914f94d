// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"context"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// Send is the monitor's side: it sends mappings and a copy of u's descriptor over conn. u stays the
// caller's, and should stay open: when the last copy closes, missing pages read as zeros. Make the handshake
// and register the mappings before.
func Send(ctx context.Context, conn *net.UnixConn, mappings []Mapping, u *uffd.UFFD) error {
	text, err := encode(mappings)
	if err != nil {
		return fmt.Errorf("send userfaultfd: %w", err)
	}
	if len(text) > MaxMessage {
		return fmt.Errorf("send userfaultfd: %w: %d mappings make more than %d bytes", ErrInvalid, len(mappings), MaxMessage)
	}
	defer interruptible(ctx, conn.SetWriteDeadline)()

	// The descriptor travels with the first byte; a stream socket may take less than all of the text.
	n, _, err := conn.WriteMsgUnix(text, unix.UnixRights(u.FD()), nil)
	if err == nil && n < len(text) {
		_, err = conn.Write(text[n:])
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("send userfaultfd: %w", err)
	}
	return nil
}
