// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"encoding/json"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/libvirt/libvirttest"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// TestQuitLeavesALaterRun: a QEMU of libvirt's ended, and its operator started the domain anew. Quit of the first one
// succeeds, and neither libvirt nor the QEMU that has the domain's UUID now is told anything. Quit does not depend on
// libvirt's number of the run.
func TestQuitLeavesALaterRun(t *testing.T) {
	for name, startAnew := range map[string]func(*libvirttest.Daemon){
		"another number": (*libvirttest.Daemon).StartAnew, "the same number": func(*libvirttest.Daemon) {},
	} {
		t.Run(name, func(t *testing.T) { quitOfAnEarlierRun(t, startAnew) })
	}
}

func quitOfAnEarlierRun(t *testing.T, startAnew func(*libvirttest.Daemon)) {
	t.Helper()
	uuid := [16]byte{0x9f, 15: 0x11}
	_, behind := qemutest.Start(t, "-uuid", "9f000000-0000-0000-0000-000000000011")
	daemon := libvirttest.Start(t, libvirttest.Domain{
		Name: "db", UUID: uuid, Number: 3, Persistent: true, XML: "<domain/>",
	})
	var later atomic.Bool
	daemon.Monitor(func(text string) string {
		if later.Load() {
			t.Errorf("the later run got %s", text)
			return `{"return": {}}`
		}
		var c struct {
			Execute   string `json:"execute"`
			Arguments any    `json:"arguments"`
		}
		var result json.RawMessage
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Error(err)
		} else if err := behind.QMP.Do(t.Context(), c.Execute, c.Arguments, &result); err != nil {
			t.Errorf("%s: %v", c.Execute, err)
		}
		return `{"return": ` + string(result) + `}`
	})
	vm, err := qemu.Attach(qemutest.Context(t), daemon.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close() // QEMU has ended
	if err := unix.Kill(vm.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := vm.WaitExit(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	later.Store(true)
	startAnew(daemon)
	if err := vm.Quit(qemutest.Context(t)); err != nil {
		t.Error(err)
	}
	if called := daemon.Called(); len(called) > 0 {
		t.Errorf("libvirt was asked to %v", called)
	}
	daemon.TellStopped()
}
