// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// descriptors returns the process' descriptors and their files.
func descriptors(t *testing.T, pid int) map[int]string {
	t.Helper()
	fds, err := selectFDs(pid, func(int) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	of := make(map[int]string)
	for _, fd := range fds {
		if of[fd], err = os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err != nil {
			t.Fatal(err)
		}
	}
	return of
}

// mappings returns the process' mappings, to compare them.
func mappings(t *testing.T, pid int) string {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(maps)
}

func TestHand(t *testing.T) {
	v := startVictim(t, "read")
	fd, err := unix.MemfdCreate("handed", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "handed")
	defer f.Close()
	if _, err := f.WriteString("what it holds"); err != nil {
		t.Fatal(err)
	}
	before, mapped := descriptors(t, v.pid), mappings(t, v.pid)
	remote, err := Hand(t.Context(), v.pid, f)
	if err != nil {
		t.Fatal(err)
	}
	during := descriptors(t, v.pid)
	if len(during) != len(before)+1 || before[remote] != "" || mappings(t, v.pid) != mapped {
		t.Errorf("descriptor %d; the process had %v and has %v", remote, before, during)
	}
	theirs, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", v.pid, remote))
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if text, err := io.ReadAll(theirs); err != nil || string(text) != "what it holds" {
		t.Errorf("it holds %q: %v", text, err)
	}
	other, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := CloseHanded(t.Context(), v.pid, remote, other); !errors.Is(err, ErrNotUserfault) {
		t.Errorf("a descriptor of another file: %v", err)
	}
	if err := CloseHanded(t.Context(), v.pid, remote, f); err != nil {
		t.Fatal(err)
	}
	if after := descriptors(t, v.pid); len(after) != len(before) {
		t.Errorf("the process had %v and has %v", before, after)
	}
	v.awaitBlocked(unix.SYS_READ)
	v.wantUntraced()
}

// TestHandFails checks that a failure in the middle leaves nothing in the process.
func TestHandFails(t *testing.T) {
	v := startVictim(t, "read")
	before := descriptors(t, v.pid)
	closed, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	if _, err := Hand(t.Context(), v.pid, closed); err == nil {
		t.Error("a closed file was handed over")
	}
	if after := descriptors(t, v.pid); len(after) != len(before) {
		t.Errorf("the process had %v and has %v", before, after)
	}
	v.awaitBlocked(unix.SYS_READ)
	v.wantUntraced()
}
