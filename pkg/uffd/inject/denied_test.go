// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

func TestTwoTracers(t *testing.T) {
	v := startVictim(t, "read")
	first, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Seize(t.Context(), v.pid); !errors.Is(err, ErrAlreadyTraced) ||
		!strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("second Seize: %v", err)
	}
	if _, err := Take(t.Context(), v.pid, TakeOptions{}); !errors.Is(err, ErrAlreadyTraced) {
		t.Errorf("Take: %v", err)
	}
	if err := first.Detach(); err != nil {
		t.Fatal(err)
	}
	injectGetpid(t, v.pid)
}

// TestDenied runs itself again as a user who may not trace the target.
func TestDenied(t *testing.T) {
	if pid, err := strconv.Atoi(os.Getenv("INJECT_TEST_SEIZE")); err == nil {
		_, err := Seize(t.Context(), pid)
		if !errors.Is(err, ErrPtraceDenied) || !errors.Is(err, unix.EPERM) ||
			!strings.Contains(err.Error(), "CAP_SYS_PTRACE") {
			t.Errorf("Seize: %v", err)
		}
		_, err = Take(t.Context(), pid, TakeOptions{})
		var takeErr *TakeError
		if !errors.As(err, &takeErr) || len(takeErr.Attempts) != 1 || !errors.Is(err, ErrPtraceDenied) {
			t.Errorf("Take: %v", err)
		}
		return
	}
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root to become another user")
	}
	v := startVictim(t, "read")
	// Do not use its path: that user may not be permitted to enter the directory.
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestDenied$", "-test.v")
	cmd.Env = append(os.Environ(), fmt.Sprintf("INJECT_TEST_SEIZE=%d", v.pid), "TMPDIR=/tmp")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS: TestDenied") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestForbidden checks that EACCES becomes the error of a security module, and says which process was refused what.
func TestForbidden(t *testing.T) {
	for _, method := range []string{MethodSyscall, MethodDevice} {
		err := target{pid: os.Getpid()}.explain(method, unix.EACCES)
		if !refused(err) || !errors.Is(err, ErrForbidden) || !errors.Is(err, unix.EACCES) ||
			!strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
			t.Errorf("%s: %v", method, err)
		}
		if err := (target{pid: os.Getpid()}).explain(method, unix.EPERM); !refused(err) || errors.Is(err, ErrForbidden) {
			t.Errorf("%s, EPERM: %v", method, err)
		}
	}
}
