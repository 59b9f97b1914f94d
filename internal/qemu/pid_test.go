// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"os"
	"testing"
)

// TestProcessOf: the numbers of threads say which process QEMU is only where it is the VM that was asked.
func TestProcessOf(t *testing.T) {
	const uuid = "9fe3ea4e-0c0c-4d3f-9a37-5a0c6e1f8d11"
	threads := func(vm *VM) (numbers []int) {
		var cpus []struct {
			Thread int `json:"thread-id"`
		}
		if err := vm.QMP.Do(testContext(t), "query-cpus-fast", nil, &cpus); err != nil {
			t.Fatal(err)
		}
		for _, cpu := range cpus {
			numbers = append(numbers, cpu.Thread)
		}
		return numbers
	}
	_, namedVM := start(t, "-smp", "2", "-uuid", uuid)
	_, plainVM := start(t, "-nodefaults")
	ofNamed, ofPlain := threads(namedVM), threads(plainVM)
	for _, test := range []struct {
		name    string
		threads []int
		uuid    string
		want    int
	}{
		{"by all threads and the UUID", ofNamed, uuid, namedVM.Pid},
		{"without a UUID", ofPlain, noUUID, plainVM.Pid},
		{"another VM of the same numbers", ofNamed, noUUID, 0},
		{"another UUID", ofPlain, uuid, 0},
		{"threads of two processes", append(ofNamed[:1:1], ofPlain...), uuid, 0},
		{"no thread", nil, uuid, 0},
		{"a process that is no QEMU", []int{os.Getppid()}, noUUID, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			if pid, found := processOf(test.threads, test.uuid); found != (test.want != 0) || found && pid != test.want {
				t.Errorf("process %d, found %v; want %d", pid, found, test.want)
			}
		})
	}
}
