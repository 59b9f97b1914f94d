// SPDX-License-Identifier: Apache-2.0

package metal

import (
	"errors"
	"testing"
)

func TestRegisters(t *testing.T) {
	const text = "CPU#0\r\nEAX=00000007 EBX=0000002a ECX=00000030 EDX=000003fd\r\n" +
		"ESI=00200000 EDI=00300000 EBP=02800000 ESP=00006f08\r\n" +
		"EIP=00007c85 EFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0\r\n"
	got, err := ParseRegisters(text)
	if want := (Registers{0x2a, 0x300000, 0x7c85}); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "EBX=1 EDI=2", "EBX=zz EDI=1 EIP=1"} {
		if got, err := ParseRegisters(bad); err == nil {
			t.Errorf("%q is taken for %+v", bad, got)
		}
	}
}

func TestMeets(t *testing.T) {
	const end, counting, writing, between = 0x2800000, nextPage + 5, nextLine + 9, nextPage - 3
	for _, c := range []struct {
		what string
		r    Result
		at   Registers
		ok   bool
	}{
		{"counting", Result{Pass: 7, Position: 0x300000}, Registers{7, 0x300000, counting}, true},
		{"counted, not gone on", Result{Pass: 7, Position: 0x301000}, Registers{7, 0x300000, counting}, true},
		{"first page", Result{Pass: 6, Position: end}, Registers{7, First, counting}, true},
		{"last page", Result{Pass: 7, Position: end}, Registers{7, end - pageSize, counting}, true},
		{"writing the line", Result{Pass: 7, Position: end}, Registers{7, 0x70000000, writing}, true},
		{"between passes", Result{Pass: 6, Position: end}, Registers{7, 0, between}, true},
		{"a page is lost", Result{Pass: 7, Position: 0x2ff000}, Registers{7, 0x300000, counting}, false},
		{"the tail is lost", Result{Pass: 7, Position: 0x300000}, Registers{7, 0x70000000, writing}, false},
		{"the pass is lost", Result{Pass: 6, Position: end}, Registers{7, 0x70000000, writing}, false},
		{"the tail is lost, and a part of the next pass done", Result{Pass: 8, Position: 0x300000},
			Registers{8, 0x400000, counting}, false},
		{"ahead", Result{Pass: 8, Position: end}, Registers{7, 0x300000, counting}, false},
	} {
		if err := c.r.Meets(c.at, end); (err == nil) != c.ok || err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
}
