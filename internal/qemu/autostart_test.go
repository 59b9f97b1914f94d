// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"testing"
)

// A QEMU that waits for a VM takes "cont" for the wish to run it as soon as it has loaded (autostart, qmp_cont in
// monitor/qmp-cmds.c). Somebody else may have given it: a manager that goes through all VMs of a host, say.
func TestLoadedVMDoesNotRunByItself(t *testing.T) {
	source, destination, _ := twoVMs(t) // the lock of a disk would refuse it
	ctx := testContext(t)
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
