// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// TestEnding: a QEMU with -no-shutdown that is killed says how its VM had ended before, but not if the VM went on
// since.
func TestEnding(t *testing.T) {
	firmware := filepath.Join(t.TempDir(), "firmware")
	if err := os.WriteFile(firmware, bytes.Repeat([]byte{0xf4}, 64<<10), 0o644); err != nil { // it halts at once
		t.Fatal(err)
	}
	powered := &qemu.Ending{Guest: true, Reason: "guest-shutdown"}
	for name, c := range map[string]struct {
		steps []step
		want  *qemu.Ending
	}{
		"killed while it runs":               {nil, nil},
		"the guest powered off":              {[]step{powerOff}, powered},
		"it was reset since":                 {[]step{powerOff, reset}, nil},
		"it runs again, as after a reboot":   {[]step{powerOff, reset, resume}, nil},
		"it was stopped often before":        {[]step{stopOften, powerOff}, powered},
		"it ran again, and powered off anew": {[]step{powerOff, reset, resume, powerOff}, powered},
	} {
		t.Run(name, func(t *testing.T) {
			p, vm := qemutest.Start(t, "-no-shutdown", "-bios", firmware)
			for _, do := range c.steps {
				do(t, vm)
			}
			if err := p.Kill(qemutest.Context(t)); err != nil {
				t.Fatal(err)
			}
			<-vm.QMP.Done()
			got := vm.Ending()
			if (got == nil) != (c.want == nil) || got != nil && *got != *c.want {
				t.Errorf("it ended by %+v, want %+v", got, c.want)
			}
		})
	}
}

// A step is something that happens to a VM.
type step func(*testing.T, *qemu.VM)

// powerOff powers the VM off as its guest would: it enables the chipset's ACPI registers, as firmware does, and enters
// the state S5. It returns when the VM has stopped.
func powerOff(t *testing.T, vm *qemu.VM) {
	t.Helper()
	ctx := qemutest.Context(t)
	for _, line := range []string{
		"o /w 0xcf8 0x8000f840", "o /w 0xcfc 0x601", // PMBASE of the ICH9's LPC bridge
		"o /w 0xcf8 0x8000f844", "o /b 0xcfc 0x80", // ACPI_CNTL: ACPI_EN
		"o /h 0x604 0x2000", // PM1a_CNT: SLP_EN and S5
	} {
		if said, err := vm.QMP.HMP(ctx, line); err != nil || said != "" {
			t.Fatalf("%s: %q, %v", line, said, err)
		}
	}
	for state := ""; state != "shutdown"; {
		var err error
		if state, err = vm.Status(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

func reset(t *testing.T, vm *qemu.VM) {
	t.Helper()
	events := vm.QMP.Subscribe("RESET")
	defer events.Close()
	if err := vm.QMP.Do(qemutest.Context(t), "system_reset", nil, nil); err != nil {
		t.Fatal(err)
	}
	<-events.Events() // QEMU resets later than it answers
}

// stopOften stops and continues the VM more often than a subscription keeps events that nobody reads.
func stopOften(t *testing.T, vm *qemu.VM) {
	t.Helper()
	for range 300 {
		if err := vm.QMP.Do(qemutest.Context(t), "stop", nil, nil); err != nil {
			t.Fatal(err)
		}
		resume(t, vm)
	}
}

func resume(t *testing.T, vm *qemu.VM) {
	t.Helper()
	if err := vm.QMP.Do(qemutest.Context(t), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
}
