// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// TestLoadedVMDoesNotRunByItself checks that "cont" before the load does not start the VM. A QEMU that waits for a
// migration takes "cont" as "run the VM as soon as it is loaded" (autostart, qmp_cont in monitor/qmp-cmds.c). Another
// program may have sent it, for example a manager that goes through all VMs of a host.
func TestLoadedVMDoesNotRunByItself(t *testing.T) {
	source, destination, _ := twoVMs(t) // no disk: QEMU would refuse to run it without the disk's lock
	ctx := qemutest.Context(t)
	resumes := destination.QMP.Subscribe("RESUME")
	defer resumes.Close()
	if err := destination.QMP.Do(ctx, "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := load(t, destination, save(t, source, true)); err != nil {
		t.Fatal(err)
	}
	status, err := destination.Status(ctx)
	if err != nil || status != "paused" {
		t.Errorf("the destination is %q: %v", status, err)
	}
	if n := len(resumes.Events()); n != 0 {
		t.Errorf("it ran by itself, %d times", n)
	}
	if _, err := destination.Cont(ctx); err != nil {
		t.Error(err)
	}
}
