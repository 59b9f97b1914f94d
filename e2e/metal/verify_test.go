// SPDX-License-Identifier: Apache-2.0

package metal

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

const ramMiB = 40

// counted returns RAM as the guest leaves it when it is stopped at position in pass.
func counted(t *testing.T, pass, position uint32) []byte {
	t.Helper()
	end, err := End(ramMiB)
	if err != nil {
		t.Fatal(err)
	}
	ram := make([]byte, ramMiB<<20)
	for a := uint32(First); a < end; a += pageSize {
		n := pass
		if a >= position {
			n--
		}
		if n == 0 {
			continue
		}
		slot := a + a/pageSize%512*8
		binary.LittleEndian.PutUint32(ram[slot:], n)
		binary.LittleEndian.PutUint32(ram[slot+4:], a^name)
	}
	// What the BIOS leaves does not count.
	ram[0x7c00], ram[len(ram)-1] = 0xfa, 1
	return ram
}

// check verifies ram as two backends, as with two NUMA nodes.
func check(t *testing.T, ram []byte) (Result, error) {
	t.Helper()
	dir := t.TempDir()
	low, high := filepath.Join(dir, "low"), filepath.Join(dir, "high")
	half := len(ram) / 2
	if err := errors.Join(os.WriteFile(low, ram[:half], 0o600), os.WriteFile(high, ram[half:], 0o600)); err != nil {
		t.Fatal(err)
	}
	return Verify(low, high)
}

func TestVerifyAcceptsEveryPosition(t *testing.T) {
	end, _ := End(ramMiB)
	for _, pass := range []uint32{1, 2, 70000} {
		for _, position := range []uint32{First + pageSize, 0x800000, end - pageSize, end} {
			got, err := check(t, counted(t, pass, position))
			want := Result{Pass: pass, Position: position, Pages: int(end-First) / pageSize}
			if err != nil || got != want {
				t.Errorf("pass %d at %#x: %+v, %v", pass, position, got, err)
			}
		}
	}
	if got, err := check(t, make([]byte, ramMiB<<20)); err != nil || got.Pass != 0 {
		t.Errorf("untouched RAM: %+v, %v", got, err)
	}
}

func TestVerifyFindsTheDamagedPage(t *testing.T) {
	const pass, position, before, after = 9, 0x800000, 0x600000, 0xa00000
	page := func(ram []byte, a int) []byte { return ram[a : a+pageSize] }
	damages := map[string]struct {
		at int
		do func(ram []byte)
	}{
		"lost":                {before, func(ram []byte) { clear(page(ram, before)) }},
		"lost, not reached":   {after, func(ram []byte) { clear(page(ram, after)) }},
		"stale":               {after, func(ram []byte) { ram[after+after/pageSize%512*8] = pass - 2 }},
		"a pass ahead":        {after, func(ram []byte) { ram[after+after/pageSize%512*8] = pass }},
		"misplaced":           {before, func(ram []byte) { copy(page(ram, before), page(ram, before+pageSize)) }},
		"misplaced by 2 MiB":  {before, func(ram []byte) { copy(page(ram, before), page(ram, before-(2<<20))) }},
		"a bit in the middle": {before, func(ram []byte) { ram[before+2048+9] ^= 8 }},
		"lost, first page":    {First, func(ram []byte) { clear(page(ram, First)) }},
	}
	for what, d := range damages {
		t.Run(what, func(t *testing.T) {
			ram := counted(t, pass, position)
			d.do(ram)
			_, err := check(t, ram)
			var pe *PageError
			if !errors.Is(err, ErrDamaged) || !errors.As(err, &pe) {
				t.Fatalf("Verify = %v", err)
			}
			if what != "lost, first page" && pe.Address != uint32(d.at) {
				t.Errorf("Verify = %v, want page %#x", err, d.at)
			}
		})
	}
}

// One page is a pass behind, before the position. All pages after it look wrong, and this page must be named as the
// position.
func TestVerifyOneStalePageBeforeThePosition(t *testing.T) {
	ram := counted(t, 9, 0x800000)
	const a = 0x600000
	ram[a+a/pageSize%512*8] = 8
	got, err := check(t, ram)
	if !errors.Is(err, ErrDamaged) || got.Position != a {
		t.Errorf("Verify = %+v, %v", got, err)
	}
}

func TestVerifyRefusesWhatIsNoGuestRAM(t *testing.T) {
	if _, err := check(t, make([]byte, 1<<20)); !errors.Is(err, ErrRAMSize) {
		t.Errorf("1 MiB: %v", err)
	}
	if _, err := Verify(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestBuild(t *testing.T) {
	a, err := Build(t.Context(), 64)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Build(t.Context(), 128)
	if err != nil {
		t.Fatal(err)
	}
	if len(a) != ImageSize || a[510] != 0x55 || a[511] != 0xaa {
		t.Errorf("%d bytes, signature % x", len(a), a[510:512])
	}
	if end := binary.LittleEndian.Uint32(a[ramEndOffset:]); end != 40<<20 {
		t.Errorf("end of RAM %#x", end)
	}
	if slices.Equal(a, b) {
		t.Error("the RAM size makes no difference")
	}
	for _, size := range []int{0, 31, 2049} {
		if _, err := Build(t.Context(), size); !errors.Is(err, ErrRAMSize) {
			t.Errorf("%d MiB: %v", size, err)
		}
	}
}

func TestPass(t *testing.T) {
	if n, err := Pass("0000001e"); err != nil || n != 30 {
		t.Errorf("Pass = %d, %v", n, err)
	}
	for _, bad := range []string{"", "1e", "0000001g", "0000001e\n"} {
		if _, err := Pass(bad); err == nil {
			t.Errorf("Pass(%q) accepts it", bad)
		}
	}
}
