// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestReserve(t *testing.T) {
	page := uint64(os.Getpagesize())
	r, err := reserveFor([]ram.Block{
		{ID: "promised", Size: 8 << 20, PageSize: page, Populated: true}, {ID: "not", Size: 1 << 40, PageSize: page},
		{ID: "huge", Size: 1 << 40, PageSize: 2 << 20, Populated: true},
	}, availableMemory)
	if err != nil {
		t.Fatal(err)
	}
	held := func() int64 {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Fstat(int(r.file.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	for _, c := range []struct{ keep, want int64 }{{1 << 40, 8 << 20}, {5 << 20, 5 << 20}, {6 << 20, 5 << 20}, {0, 0}} {
		if err := r.shrink(uint64(c.keep)); err != nil || held() != c.want {
			t.Errorf("keep %d: %d bytes are held, want %d; %v", c.keep, held(), c.want, err)
		}
	}
	if err := errors.Join(r.release(), r.release(), r.shrink(0)); err != nil {
		t.Error(err)
	}
}

// Nothing is reserved for a VM that was promised nothing. Memory that the host does not have is never taken: the
// kernel would end other processes for it.
func TestReserveIsRefused(t *testing.T) {
	page := uint64(os.Getpagesize())
	asked := 0
	available := func() (uint64, error) {
		asked++
		return 300 << 20, nil // until the second step
	}
	r, err := reserveFor([]ram.Block{{ID: "a", Size: 1 << 30, PageSize: page}}, available)
	if err != nil || r.file != nil || asked != 0 {
		t.Errorf("%v, %v", r, err)
	}
	promised := []ram.Block{{ID: "a", Size: 100 << 20, PageSize: page, Populated: true}}
	if _, err = reserveFor(promised, available); !errors.Is(err, errNoReserve) || Remedy(err) == "" || asked != 1 {
		t.Errorf("more than there is: %v", err)
	}
	dwindles := func() (uint64, error) {
		if asked++; asked == 2 {
			return 400 << 20, nil
		}
		return 200 << 20, nil
	}
	if _, err = reserveFor(promised, dwindles); !errors.Is(err, errNoReserve) || asked != 3 {
		t.Errorf("less than there was: %v", err)
	}
	machine := &migratedv1.SourceMachine{RamBlocks: []*migratedv1.RamBlock{
		{Id: "a", Size: 100 << 20, PageSize: page, Populated: true}, {Id: "b", Size: 1 << 40, PageSize: page},
	}}
	if err := checkPromise(machine, available); !errors.Is(err, errNoReserve) {
		t.Errorf("a QEMU is started that takes more than there is: %v", err)
	}
	if err := checkPromise(machine, func() (uint64, error) { return 400 << 20, nil }); err != nil {
		t.Error(err)
	}
}
