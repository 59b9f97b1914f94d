// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
)

// mustPutBackSettings says whether QEMU still has the settings that Prepare changed. That happens if this daemon took
// the migration up and could not connect to QEMU's monitor, because another client holds it.
func (d *Destination) mustPutBackSettings() bool {
	return d.vm == nil && d.facts != nil && d.facts.Settings != nil && d.facts.QEMU.Alive()
}

// putBackLater puts QEMU's settings back when its monitor is free. The migration is over. Its files stay until then,
// in case this daemon ends first.
func (d *Destination) putBackLater() {
	facts := d.facts
	d.log.Warn("QEMU's monitor has another client: the settings are restored when it is free", "monitor", facts.QMP)
	go func() {
		const longest = 30 * time.Second
		for pause := time.Second / 2; ; pause = min(2*pause, longest) {
			if sleep(d.daemon, pause) != nil {
				return
			}
			vm, err := attachKept(d.daemon, facts)
			if err != nil && facts.QEMU.Alive() {
				continue
			}
			if err != nil {
				d.log.Info("QEMU has ended: there are no settings to put back", "error", err)
			} else {
				vm.PutBack(facts.Settings)
				if err := vm.Close(); err != nil {
					d.log.Warn("close QEMU's monitor", "error", err)
				}
				d.log.Info("QEMU's settings are put back")
			}
			d.retention.begin(d.Forget)
			d.Forget()
			return
		}
	}()
}

// attachKept tries once to connect to the QEMU that facts name.
func attachKept(ctx context.Context, facts *keptFactsV1) (*qemu.VM, error) {
	vm, err := attachSame(ctx, facts.QMP, facts.QEMU)
	if err != nil {
		return nil, fmt.Errorf("attach to the destination QEMU: %w", err)
	}
	return vm, nil
}
