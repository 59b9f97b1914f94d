// SPDX-License-Identifier: Apache-2.0

package handover_test

import (
	"context"
	"fmt"
	"net"
	"os"

	"github.com/migrated-vm/migrated/pkg/uffd/handover"
)

// accept receives the userfaultfd of the next monitor that connects, if it is a process of this user. Program
// examples/snapshot shows what comes next.
func accept(ctx context.Context, listener *net.UnixListener) (*handover.Handover, error) {
	conn, err := listener.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	vm, err := handover.Receive(ctx, conn, handover.PeerPolicy{UIDs: []uint32{uint32(os.Geteuid())}})
	if err != nil {
		return nil, err
	}
	for _, m := range vm.Mappings {
		fmt.Printf("%d bytes at %#x are at %#x of the snapshot\n", m.Size, m.BaseHostVirtAddr, m.Offset)
	}
	return vm, nil // the caller must close its UFFD
}

// The example shows how a page fault handler begins.
func ExampleReceive() {
	_ = accept
}
