// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/cannot"
)

// The target is in a restartable sequence all the time. One that was interrupted by us has to be aborted, and
// so entered again.
func TestRestartableSequenceIsAborted(t *testing.T) {
	v := startVictim(t, "rseq")
	var start, end, entries uint64
	if line := v.line(); line == "no rseq" {
		cannot.Run(t, "the C library does not use rseq")
	} else if _, err := fmt.Sscanf(line, "0x%x 0x%x 0x%x", &start, &end, &entries); err != nil {
		t.Fatal(err)
	}
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
		if start <= r.Rip && r.Rip < end {
			hits++
			eventually(t, "the sequence is entered again", func() bool { return count() > held })
		}
	}
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
