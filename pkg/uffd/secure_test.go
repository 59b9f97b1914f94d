// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// These tests hold on every kernel. On one with this project's series (kernel/) they test the flag, on
// others the behaviour without it.

// kernelHasFlag asks the kernel for UFFD_USER_MODE_ONLY|UFFD_SECURE. A kernel with these flags permits them to
// every process.
func kernelHasFlag() bool {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|1|2, 0, 0)
	if errno != 0 {
		return false
	}
	_ = unix.Close(int(fd))
	return true
}

// policyLabels reports whether selinuxfs shows a policy with the class of userfaultfds.
func policyLabels() bool {
	_, err := os.Stat("/sys/fs/selinux/class/anon_inode")
	return err == nil
}

// wantState checks the supervision of u. flagged says whether u is known to be made with the flag.
func wantState(t *testing.T, u *uffd.UFFD, flagged bool) {
	t.Helper()
	want := uffd.Unsupervised
	if policyLabels() {
		want = uffd.Labelled
	}
	if flagged {
		want = uffd.Flagged
	}
	state, label, err := u.Supervision()
	if state != want || err != nil || (label != "") != policyLabels() {
		t.Errorf("%v, labelled %q (%v); want %v", state, label, err, want)
	}
}

// copyOf returns a duplicate of u that does not know how the descriptor was made.
func copyOf(t *testing.T, u *uffd.UFFD) *uffd.UFFD {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(u.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c := uffd.FromFD(fd)
	t.Cleanup(func() { c.Close() })
	return c
}

func TestOpenSecure(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	t.Logf("the kernel has UFFD_SECURE: %v; a policy labels userfaultfds: %v", kernelHasFlag(), policyLabels())
	for _, method := range []uffd.OpenMethod{uffd.OpenSyscall, uffd.OpenDevice} {
		for _, userMode := range []bool{false, true} {
			for _, forkEvents := range []bool{false, true} {
				flagged := kernelHasFlag() && !forkEvents
				o := uffd.OpenOptions{Method: method, UserModeOnly: userMode, NonBlocking: true, ForkEvents: forkEvents}
				u := open(t, o)
				wantState(t, u, flagged)
				stranger := copyOf(t, u)
				wantState(t, stranger, false)

				_, _, err := u.API(uffd.FeatureEventFork)
				if errors.Is(err, uffd.ErrForkRefused) != flagged || (err == nil) == flagged {
					t.Errorf("%+v: fork events asked for: %v", o, err)
				}
				if !flagged {
					continue // the handshake has been made
				}
				// The kernel refuses it, too, and does not count this attempt as the handshake.
				if _, _, err := stranger.API(uffd.FeatureEventFork); !errors.Is(err, uffd.ErrInvalid) ||
					!strings.Contains(err.Error(), "UFFD_SECURE") {
					t.Errorf("%+v: fork events asked for by who does not know of the flag: %v", o, err)
				}
				if have, _, err := stranger.API(uffd.FeatureEventRemove); err != nil || have&uffd.FeatureEventFork != 0 {
					t.Errorf("%+v: offers %v (%v)", o, have, err)
				}
				wantState(t, stranger, true) // API has found out that it was made with the flag
			}
		}
	}
}

func TestProbeSupervision(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	state, label, err := uffd.ProbeSupervision()
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	u := open(t, uffd.OpenOptions{})
	if s, l, err := u.Supervision(); s != state || l != label || err != nil {
		t.Errorf("the probe says %v, labelled %q, the descriptor %v, labelled %q (%v)", state, label, s, l, err)
	}
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := u.Supervision(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestSupervisionText(t *testing.T) {
	for state, want := range map[uffd.Supervision]string{
		uffd.Unsupervised: "unsupervised", uffd.Labelled: "labelled", uffd.Flagged: "flag",
	} {
		text, err := state.MarshalText()
		if string(text) != want || err != nil || state.String() != want {
			t.Errorf("%q, %q, %v; want %q", text, state, err, want)
		}
		var back uffd.Supervision
		if err := back.UnmarshalText(text); err != nil || back != state {
			t.Errorf("%q gives %v (%v)", text, back, err)
		}
	}
	var s uffd.Supervision
	if err := s.UnmarshalText([]byte("secure")); err == nil || !strings.Contains(err.Error(), "unsupervised") {
		t.Errorf("error %v", err)
	}
	if _, err := uffd.Supervision(9).MarshalText(); err == nil {
		t.Error("no error for a state that does not exist")
	}
}
