// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/rival"
)

// A contender moves the VM. move begins with starting the destination's QEMU and returns when all memory is there; the
// source's QEMU is stopped then and still exists.
type contender struct {
	name string
	move func(ctx context.Context, s *scene, from, to *lab.Host) error
}

// Names of contenders, and keys of the report.
const (
	ours        = "ours"
	qemuPreempt = "qemu_preempt"
)

var contenders = []contender{
	{ours, migrated},
	{"qemu", qemu(rival.Options{KeepSource: true})},
	{qemuPreempt, qemu(rival.Options{KeepSource: true, Preempt: true})},
}

// order is who moves the VM first, second and third in a round. QEMU's plain post-copy never comes right after
// postcopy-preempt: a VM that QEMU 7.2 moves on by the one after it arrived by the other is reset (seen
// each time, with nothing of ours at work).
func order(round int) []contender {
	if round%2 == 0 {
		return contenders
	}
	return []contender{contenders[2], contenders[0], contenders[1]}
}

// id is what the newest move is called where migrated does it.
func (s *scene) id() string { return fmt.Sprintf("bench-%d", s.moves) }

func migrated(ctx context.Context, s *scene, from, to *lab.Host) error {
	binary, err := lab.Binary()
	if err != nil {
		return err
	}
	_, err = from.Run(ctx, binary, "migrate", "--id", s.id(), "--vm", lab.QMPPath, "--to", to.DaemonAddr(), "--keep-source")
	return err
}

func qemu(o rival.Options) func(context.Context, *scene, *lab.Host, *lab.Host) error {
	return func(ctx context.Context, s *scene, from, to *lab.Host) error {
		_, err := rival.Migrate(ctx, from, to, s.vm, o)
		return err
	}
}

// end ends the QEMU that was left.
func (contender) end(ctx context.Context, from *lab.Host) error {
	client, err := from.QMP(ctx)
	if err != nil {
		return err
	}
	defer client.Disconnect() //nolint:errcheck // QEMU ends it first
	return client.Do(ctx, "quit", nil, nil)
}
