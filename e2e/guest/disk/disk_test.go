// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

// newSet makes two disks of so many blocks from files. They rest.
func newSet(t *testing.T, blocks int64) *Set {
	t.Helper()
	s := &Set{findings: make(chan Finding, maxPending)}
	for i, serial := range []string{"disk0", "disk1"} {
		f, err := os.OpenFile(filepath.Join(t.TempDir(), serial), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := f.Truncate(blocks * blockSize); err != nil {
			t.Fatal(err)
		}
		d, err := newDisk(s, serial, i, f, 0)
		if err != nil {
			t.Fatal(err)
		}
		s.disks = append(s.disks, d)
	}
	return s
}

// work runs n steps of every lane.
func (s *Set) work(n int) {
	for range n {
		for _, d := range s.disks {
			for _, l := range d.lanes {
				l.step()
			}
		}
	}
}

func TestWorkLeavesNoDamage(t *testing.T) {
	s := newSet(t, 300)
	s.work(2000)
	blocks, found := s.Verify()
	if blocks != 600 || found != 0 {
		t.Errorf("%d blocks, %d damaged", blocks, found)
	}
	for _, d := range s.Report() {
		if d.Writes < 1000 || d.Reads < 1000 || d.Flushes == 0 || d.Errors != 0 || d.Corruptions != 0 {
			t.Errorf("%+v", d)
		}
	}
	if f, ok := s.Finding(); ok {
		t.Errorf("%+v", f)
	}
}

// TestDamageIsFound damages one block in each way in which storage can.
func TestDamageIsFound(t *testing.T) {
	const block = 40
	at := func(d *disk, block int64) []byte {
		b := make([]byte, blockSize)
		if _, err := d.file.ReadAt(b, block*blockSize); err != nil {
			t.Fatal(err)
		}
		return b
	}
	for want, damage := range map[stamp.Kind]func(s *Set) []byte{
		stamp.Lost: func(*Set) []byte { return make([]byte, blockSize) },
		stamp.Stale: func(s *Set) []byte {
			l := s.disks[0].lanes[0]
			old := at(l.disk, block)
			l.write(block, l.generation(block)+1)
			return old
		},
		stamp.Misplaced: func(s *Set) []byte { return at(s.disks[1], block) },
		stamp.Bitflip: func(s *Set) []byte {
			b := at(s.disks[0], block)
			b[1000] ^= 4
			return b
		},
	} {
		t.Run(string(want), func(t *testing.T) {
			s := newSet(t, 300)
			s.work(2000)
			if _, err := s.disks[0].file.WriteAt(damage(s), block*blockSize); err != nil {
				t.Fatal(err)
			}
			if _, found := s.Verify(); found != 1 {
				t.Errorf("%d damaged blocks were found", found)
			}
			f, ok := s.Finding()
			if !ok || f.Disk != "disk0" || f.Damage.Page != block || f.Damage.Kind != want || f.Err != nil {
				t.Errorf("finding %+v, %v", f, ok)
			}
			if d := s.Report(); d[0].Corruptions != 1 || d[1].Corruptions != 0 {
				t.Errorf("%+v", d)
			}
			if _, found := s.Verify(); found != 0 {
				t.Error("it is counted again")
			}
		})
	}
}

// TestTableIsChecked: the guest's table of its disks is in memory that moves, so it is checked as well.
func TestTableIsChecked(t *testing.T) {
	s := newSet(t, 300)
	s.work(2000)
	d := s.disks[1]
	d.table[7] = 0
	d.table.Set(200, uint32(d.table.Sum(200, 201))-1) // as if it and its block went back
	if _, found := s.Verify(); found < 2 || d.corruptions.Load() < 2 {
		t.Errorf("%d found, %d corruptions", found, d.corruptions.Load())
	}
}

func TestFailedRequestIsCounted(t *testing.T) {
	s := newSet(t, 300)
	s.work(2000)
	d := s.disks[0]
	if err := d.file.Truncate(100 * blockSize); err != nil {
		t.Fatal(err)
	}
	if _, found := s.Verify(); found == 0 || d.errs.Load() == 0 || d.corruptions.Load() != 0 {
		t.Errorf("%d found, %d errors, %d corruptions", found, d.errs.Load(), d.corruptions.Load())
	}
	if f, ok := s.Finding(); !ok || f.Err == nil {
		t.Errorf("finding %+v, %v", f, ok)
	}
}
