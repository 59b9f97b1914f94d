// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// startSequence starts a target that is always in a restartable sequence. within reports whether an address is in that
// sequence. entries is the address of the target's counter of entries into it.
func startSequence(t *testing.T) (v *victim, within func(at uint64) bool, entries uint64) {
	t.Helper()
	v = startVictim(t, "rseq")
	var start, end uint64
	if line := v.line(); line == "no rseq" {
		testenv.CannotRun(t, "the C library does not use rseq")
	} else if _, err := fmt.Sscanf(line, "0x%x 0x%x 0x%x", &start, &end, &entries); err != nil {
		t.Fatal(err)
	}
	return v, func(at uint64) bool { return start <= at && at < end }, entries
}

// TestRestartableSequenceIsAborted interrupts a target that is always in a restartable sequence. The sequence must be
// aborted, and so entered again.
func TestRestartableSequenceIsAborted(t *testing.T) {
	v, within, entries := startSequence(t)
	count := func() uint64 {
		var word [8]byte
		if err := readMemory(v.pid, entries, word[:]); err != nil {
			t.Fatal(err)
		}
		return binary.NativeEndian.Uint64(word[:])
	}
	eventually(t, "target is in the sequence", func() bool { return count() > 0 })
	for hits := 0; hits < 5; {
		p, err := Seize(t.Context(), v.pid)
		if err != nil {
			t.Fatal(err)
		}
		var r regs
		err = p.tracer.do(func() error {
			r, err = getRegs(v.pid)
			return err
		})
		held := count()
		_, callErr := p.Syscall(t.Context(), unix.SYS_GETPID)
		if err := errors.Join(err, callErr, p.Detach()); err != nil {
			t.Fatal(err)
		}
		if within(r.Rip) {
			hits++
			eventually(t, "the sequence is entered again", func() bool { return count() > held })
		}
	}
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestFrameAbortsSequence checks that a thread that restores itself does not continue inside the sequence. The sequence
// was interrupted, and the kernel, which would abort it, does not look in this case.
func TestFrameAbortsSequence(t *testing.T) {
	v, within, _ := startSequence(t)
	for hits := 0; hits < 5; {
		p, err := Seize(t.Context(), v.pid)
		if err != nil {
			t.Fatal(err)
		}
		var was, ours regs
		var goesOn uint64
		err = p.tracer.do(func() (err error) {
			was, err = getRegs(v.pid)
			return err
		})
		p.reached = func(point string) { // runs on the tracer's thread
			if point != "set" {
				return
			}
			const rip = 16 // index in the words at frameRegs
			var err error
			if ours, err = getRegs(v.pid); err == nil {
				goesOn, err = peek(v.pid, ours.Rsp+frameRegs+8*rip)
			}
			if err != nil {
				t.Error(err)
			}
		}
		_, callErr := p.Syscall(t.Context(), unix.SYS_GETPID)
		if err := errors.Join(err, callErr, p.Detach()); err != nil {
			t.Fatal(err)
		}
		switch {
		case !within(was.Rip):
			if goesOn != was.Rip {
				t.Errorf("it would go on at %#x, it was at %#x", goesOn, was.Rip)
			}
		case within(goesOn) || goesOn == 0:
			t.Errorf("it would go on at %#x, within the sequence", goesOn)
		default:
			hits++
		}
		if t.Failed() {
			return
		}
	}
}
