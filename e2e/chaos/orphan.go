// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// saidWithin is how long both hosts may take to say that memory is lost. One hears it from the other.
const saidWithin = 30 * time.Second

// memoryLost reports whether the destination shows that memory of its VM is lost permanently.
func memoryLost(destination *migratedv1.Migration) bool {
	return destination.GetState() == migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED &&
		strings.Contains(destination.GetError().GetMessage(), "QEMU has ended")
}

// endLostVM does what "migrated status" tells the operator of a VM whose source QEMU was killed. It fails unless both
// hosts say that.
func (j *journey) endLostVM(ctx context.Context) (end string, err error) {
	if j.machine.exists(j.from) {
		return "", errors.New("the destination says that the source's QEMU has ended, but it has not")
	}
	for _, h := range []*lab.Host{j.to, j.from} {
		if err := j.says(ctx, h, "QEMU has ended", "end the VM"); err != nil {
			return "", err
		}
	}
	if !j.machine.copies.runs(j.to) {
		return "", errors.New("the destination QEMU does not run the VM, though nobody has stopped it")
	}
	if err := j.machine.kill(ctx, j.to); err != nil {
		return "", err
	}
	j.note("ended the VM at the destination, as status says")
	for _, h := range []*lab.Host{j.to, j.from} {
		over := func() bool {
			m, err := j.view(ctx, h)
			return err == nil && migration.Terminal(m.GetState())
		}
		if !await(ctx, saidWithin, over) {
			return "", fmt.Errorf("the VM has ended, but not its migration on host %s", h.Name)
		}
	}
	said, err := j.from.Migrated(ctx, "status", j.id)
	if err != nil {
		return "", err
	}
	if printed.MatchString(said) {
		return "", fmt.Errorf("neither QEMU is there, and yet the source says:\n%s", said)
	}
	return endOrphaned, nil
}

// says waits until "migrated status" prints all of the words on a host.
func (j *journey) says(ctx context.Context, h *lab.Host, words ...string) error {
	var said string
	var err error
	if !await(ctx, saidWithin, func() bool {
		if said, err = h.Migrated(ctx, "status", j.id); err != nil {
			return false
		}
		for _, word := range words {
			if !strings.Contains(said, word) {
				return false
			}
		}
		return true
	}) {
		return errors.Join(fmt.Errorf("status on host %s does not say %q:\n%s", h.Name, words, said), err)
	}
	return nil
}
