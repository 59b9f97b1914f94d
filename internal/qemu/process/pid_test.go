// SPDX-License-Identifier: Apache-2.0

package process_test

import (
	"os"
	"slices"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// TestProcessOf checks that thread numbers identify a QEMU only if it also has the UUID of the VM in question.
func TestProcessOf(t *testing.T) {
	const uuid = "9fe3ea4e-0c0c-4d3f-9a37-5a0c6e1f8d11"
	threads := func(vm *qemu.VM) (numbers []int) {
		var cpus []struct {
			Thread int `json:"thread-id"`
		}
		if err := vm.QMP.Do(qemutest.Context(t), "query-cpus-fast", nil, &cpus); err != nil {
			t.Fatal(err)
		}
		for _, cpu := range cpus {
			numbers = append(numbers, cpu.Thread)
		}
		return numbers
	}
	_, namedVM := qemutest.Start(t, "-smp", "2", "-uuid", uuid)
	_, plainVM := qemutest.Start(t, "-nodefaults")
	ofNamed, ofPlain := threads(namedVM), threads(plainVM)
	for _, test := range []struct {
		name    string
		threads []int
		uuid    string
		want    int
	}{
		{"by all threads and the UUID", ofNamed, uuid, namedVM.Pid},
		{"without a UUID", ofPlain, cmdline.NoUUID, plainVM.Pid},
		{"another VM of the same numbers", ofNamed, cmdline.NoUUID, 0},
		{"another UUID", ofPlain, uuid, 0},
		{"threads of two processes", append(ofNamed[:1:1], ofPlain...), uuid, 0},
		{"no thread", nil, uuid, 0},
		{"a process that is no QEMU", []int{os.Getppid()}, cmdline.NoUUID, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			if pid, found := process.OfThreads(test.threads, test.uuid); found != (test.want != 0) || found && pid != test.want {
				t.Errorf("process %d, found %v; want %d", pid, found, test.want)
			}
		})
	}
}

// TestFindRenamed: a QEMU that has given its process another name is found.
func TestFindRenamed(t *testing.T) {
	_, vm := qemutest.Start(t, "-name", "web,process=web1")
	if name := process.Name(vm.Pid); name != "web1" {
		t.Fatalf("the process is named %q", name)
	}
	found, err := process.Find()
	if err != nil {
		t.Log(err) // of processes of others
	}
	if !slices.ContainsFunc(found, func(f process.Found) bool { return f.PID == vm.Pid && f.Name == "web" }) {
		t.Errorf("found %+v, and not process %d", found, vm.Pid)
	}
}
