// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"context"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// Send is the monitor's side: it sends mappings and a copy of u's descriptor over conn. The caller keeps u,
// and should keep it open: when the last copy closes, missing pages read as zeros. Make the handshake
// and register the mappings before Send.
func Send(ctx context.Context, conn *net.UnixConn, mappings []Mapping, u *uffd.UFFD) error {
	text, err := encode(mappings)
	if err != nil {
		return fmt.Errorf("send userfaultfd: %w", err)
	}
	if len(text) > maxMessage {
		return fmt.Errorf("send userfaultfd: %w: %d mappings make more than %d bytes", ErrInvalid, len(mappings), maxMessage)
	}
	defer interruptible(ctx, conn.SetWriteDeadline)()

	// The descriptor goes with the first byte. A stream socket may accept only a part of the text.
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
