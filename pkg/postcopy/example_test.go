// SPDX-License-Identifier: Apache-2.0

package postcopy_test

import (
	"context"

	"google.golang.org/grpc/credentials"

	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// fill fills the memory of a process, on which u is registered, from the source at address, while the process runs.
// Package examples/process has the whole program, with the process and the source.
func fill(
	ctx context.Context, u *uffd.UFFD, memory uffd.Range, address string, creds credentials.TransportCredentials,
) error {
	open := func(bulk bool) (*pagelane.Client, error) {
		conn, err := pagelane.Dial(ctx, address, creds, nil)
		if err != nil {
			return nil, err
		}
		return pagelane.Open(ctx, conn, pagewire.Call{ID: "a-move", Token: "a-secret", Bulk: bulk}.Metadata())
	}
	engine, err := postcopy.New(postcopy.Options{Workers: 1, Blocks: []postcopy.Block{{
		ID: "memory", Addr: memory.Start, Size: memory.Len, PageSize: 4096, UFFD: u, Private: true,
	}}})
	if err != nil {
		return err
	}
	demand, err := open(false)
	if err != nil {
		return err
	}
	bulk, err := open(true)
	if err != nil {
		return err
	}
	engine.StartSweep() // without the sweep, only pages that are touched come
	return engine.Run(ctx, []postcopy.Lane{demand}, bulk, nil)
}

// The memory of a process comes while the process runs.
func ExampleEngine_Run() {
	_ = fill
}
