// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestMain runs the test binary as the unprivileged process of TestOpenUnprivileged, if the environment says so.
func TestMain(m *testing.M) {
	switch os.Getenv("UFFD_TEST_UNPRIVILEGED") {
	case "0":
		os.Exit(unprivileged())
	case "2":
		os.Exit(unprivilegedSecure())
	}
	os.Exit(m.Run())
}

// open opens a userfaultfd of this process. A test must not register memory with it that the test itself touches.
func open(t testing.TB, o uffd.OpenOptions) *uffd.UFFD {
	t.Helper()
	u, err := uffd.Open(o)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	t.Cleanup(func() { u.Close() })
	return u
}

func TestOpen(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	for _, method := range []uffd.OpenMethod{uffd.OpenSyscall, uffd.OpenDevice} {
		for _, userMode := range []bool{false, true} {
			u := open(t, uffd.OpenOptions{Method: method, UserModeOnly: userMode, NonBlocking: true, ForkEvents: true})
			have, ioctls, err := u.API(uffd.FeatureThreadID)
			if err != nil {
				t.Fatalf("%v: %v", method, err)
			}
			if have&uffd.FeatureThreadID == 0 || ioctls == 0 {
				t.Errorf("%v: features %v, ioctls %#x", method, have, ioctls)
			}
			if all, err := uffd.ProbeFeatures(); err != nil || all != have {
				t.Errorf("probe says %v (%v), the handshake %v", all, err, have)
			}
			flags, err := unix.FcntlInt(uintptr(u.FD()), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("%v: close-on-exec is not set (%v)", method, err)
			}
			if _, err := u.Read(uffd.NewEventBuffer(1)); !errors.Is(err, uffd.ErrWouldBlock) || !errors.Is(err, unix.EAGAIN) {
				t.Errorf("%v: read: %v", method, err)
			}
		}
	}
}

func TestHandshake(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	t.Run("unknown feature", func(t *testing.T) {
		_, _, err := open(t, uffd.OpenOptions{}).API(1 << 50)
		var missing *uffd.NotSupportedError
		if !errors.As(err, &missing) || missing.Feature != "0x4000000000000" || !errors.Is(err, uffd.ErrNotSupported) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("twice", func(t *testing.T) {
		u := open(t, uffd.OpenOptions{})
		if _, _, err := u.API(0); err != nil {
			t.Fatal(err)
		}
		_, _, err := u.API(0)
		if !errors.Is(err, uffd.ErrInvalid) || errors.Is(err, uffd.ErrNotSupported) ||
			!strings.Contains(err.Error(), "before") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("none", func(t *testing.T) {
		u := open(t, uffd.OpenOptions{NonBlocking: true})
		if _, err := u.Register(uffd.Range{Start: 4096, Len: 4096}, uffd.ModeMissing); !errors.Is(err, uffd.ErrInvalid) {
			t.Errorf("register: %v", err)
		}
		if _, err := u.Read(uffd.NewEventBuffer(1)); !errors.Is(err, uffd.ErrInvalid) {
			t.Errorf("read: %v", err)
		}
	})
}

// TestProbeOutOfDescriptors checks that an inconclusive answer is not remembered, and that the next answer is right. It
// runs in another process, because this one may remember an answer already.
func TestProbeOutOfDescriptors(t *testing.T) {
	if os.Getenv("UFFD_TEST_PROBE") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestProbeOutOfDescriptors$", "-test.v")
		cmd.Env = append(os.Environ(), "UFFD_TEST_PROBE=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	_, err := uffd.ProbeFeatures()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) || errors.Is(err, uffd.ErrNotSupported) {
		t.Errorf("without descriptors: %v", err)
	}
	if f, err := uffd.ProbeFeatures(); err != nil || f == 0 {
		t.Errorf("afterwards: %v, %v", f, err)
	}
}

func TestClosed(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	u := open(t, uffd.OpenOptions{NonBlocking: true})
	if _, _, err := u.API(0); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := u.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if u.FD() != -1 {
		t.Errorf("FD is %d after Close", u.FD())
	}
	r := uffd.Range{Start: 4096, Len: 4096}
	for name, call := range map[string]func() error{
		"API":          func() error { _, _, err := u.API(0); return err },
		"Register":     func() error { _, err := u.Register(r, uffd.ModeMissing); return err },
		"Unregister":   func() error { return u.Unregister(r) },
		"Wake":         func() error { return u.Wake(r) },
		"Copy":         func() error { _, err := u.Copy(r.Start, make([]byte, 4096), 0); return err },
		"Zeropage":     func() error { _, err := u.Zeropage(r, 0); return err },
		"Continue":     func() error { _, err := u.Continue(r, 0); return err },
		"Poison":       func() error { _, err := u.Poison(r, 0); return err },
		"Move":         func() error { _, err := u.Move(r.Start, r.Start, r.Len, 0); return err },
		"WriteProtect": func() error { return u.WriteProtect(r, uffd.WPProtect) },
		"Read":         func() error { _, err := u.Read(uffd.NewEventBuffer(1)); return err },
		"Waiter": func() error {
			w, err := uffd.NewWaiter(u)
			if err != nil {
				return err
			}
			defer w.Close()
			return w.Wait()
		},
	} {
		if err := call(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

// TestCloseUnderUse closes the descriptor while other goroutines use it. Each of them gets a correct answer or
// ErrClosed, and never EBADF or an answer of another file with the same number.
func TestCloseUnderUse(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	for range 50 {
		u := open(t, uffd.OpenOptions{NonBlocking: true})
		if _, _, err := u.API(0); err != nil {
			t.Fatal(err)
		}
		var users sync.WaitGroup
		for range 4 {
			users.Go(func() {
				buf := uffd.NewEventBuffer(1)
				for {
					_, err := u.Read(buf)
					if errors.Is(err, os.ErrClosed) {
						return
					}
					if !errors.Is(err, uffd.ErrWouldBlock) {
						t.Errorf("read: %v", err)
						return
					}
				}
			})
		}
		if err := u.Close(); err != nil {
			t.Error(err)
		}
		users.Wait()
	}
}

func TestWaiter(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	u := open(t, uffd.OpenOptions{NonBlocking: true})
	w, err := uffd.NewWaiter(u)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Wait(); !errors.Is(err, uffd.ErrInvalid) || !strings.Contains(err.Error(), "handshake") {
		t.Errorf("before the handshake: %v", err)
	}
	if _, _, err := u.API(0); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- w.Wait() }()
	if err := w.Interrupt(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, uffd.ErrInterrupted) {
		t.Errorf("interrupted: %v", err)
	}
	if err := w.Wait(); !errors.Is(err, uffd.ErrInterrupted) {
		t.Errorf("still interrupted: %v", err)
	}
}

// TestOpenUnprivileged runs Open as a user without capabilities.
func TestOpenUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root to start a process of another user")
	}
	if b, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd"); err != nil || strings.TrimSpace(string(b)) != "0" {
		testenv.CannotRun(t, "vm.unprivileged_userfaultfd is %q (%v), not 0", b, err)
	}
	runUnprivileged(t, "0")
}

// TestOpenSecureAlone runs Open as a user without capabilities, with a setting that permits only secure descriptors.
func TestOpenSecureAlone(t *testing.T) {
	const sysctl = "/proc/sys/vm/unprivileged_userfaultfd"
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root to start a process of another user")
	}
	if !kernelHasFlag() {
		t.Skip("vm.unprivileged_userfaultfd=2 comes with UFFD_SECURE, which this kernel has not")
	}
	before, err := os.ReadFile(sysctl)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(sysctl, before, 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(sysctl, []byte("2"), 0); err != nil {
		t.Fatal(err)
	}
	runUnprivileged(t, "2")
}

// runUnprivileged runs this program as a user without capabilities. act tells TestMain what to do.
func runUnprivileged(t *testing.T, act string) {
	t.Helper()
	binary, err := os.Open(os.Args[0]) // that user may not be permitted to enter its directory
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	cmd := exec.Command("/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{binary}
	cmd.Env = []string{"UFFD_TEST_UNPRIVILEGED=" + act}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// unprivileged is main of the unprivileged process. It prints failures to standard error.
func unprivileged() (status int) {
	failed := func(what string, err error) {
		fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
		status = 1
	}
	if _, err := uffd.Open(uffd.OpenOptions{}); !errors.Is(err, fs.ErrPermission) ||
		!strings.Contains(err.Error(), "unprivileged_userfaultfd") {
		failed("userfaultfd(2)", err)
	}
	if _, err := uffd.Open(uffd.OpenOptions{Method: uffd.OpenDevice}); !errors.Is(err, fs.ErrPermission) {
		failed("device", err)
	}
	if f, err := uffd.ProbeFeatures(); err != nil || f == 0 {
		failed("probe", err)
	}
	u, err := uffd.Open(uffd.OpenOptions{UserModeOnly: true, ForkEvents: true})
	if err != nil {
		failed("user mode only", err)
		return status
	}
	if _, _, err := u.API(uffd.FeatureEventFork); !errors.Is(err, uffd.ErrPermission) ||
		!strings.Contains(err.Error(), "CAP_SYS_PTRACE") {
		failed("fork events", err)
	}
	secure, err := uffd.Open(uffd.OpenOptions{UserModeOnly: true})
	if err != nil {
		failed("user mode only, secure", err)
		return status
	}
	state, label, err := secure.Supervision()
	if err != nil || (state == uffd.Flagged) != kernelHasFlag() {
		failed(fmt.Sprintf("it is %v with label %q", state, label), err)
	}
	return status
}

// unprivilegedSecure is main of the unprivileged process of TestOpenSecureAlone: vm.unprivileged_userfaultfd is 2.
func unprivilegedSecure() (status int) {
	failed := func(what string, err error) {
		fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
		status = 1
	}
	for _, userMode := range []bool{false, true} {
		u, err := uffd.Open(uffd.OpenOptions{UserModeOnly: userMode})
		if err != nil {
			failed("secure", err)
			continue
		}
		if state, _, err := u.Supervision(); state != uffd.Flagged || err != nil {
			failed(state.String(), err)
		}
		if _, err := uffd.Open(uffd.OpenOptions{
			UserModeOnly: userMode, ForkEvents: true,
		}); !errors.Is(err, fs.ErrPermission) {
			failed("not secure", err)
		}
	}
	if f, err := uffd.ProbeFeatures(); err != nil || f&uffd.FeatureEventRemove == 0 || f&uffd.FeatureEventFork != 0 {
		failed("probe: "+f.String(), err)
	}
	return status
}
