// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

var targetDir string // made by buildTarget

func TestMain(m *testing.M) {
	code := m.Run()
	if targetDir != "" {
		_ = os.RemoveAll(targetDir)
	}
	os.Exit(code)
}

// buildTarget compiles testdata/target.c. Where there is no compiler, as in the initramfs of the tests of the kernel
// series, INJECT_TEST_TARGET names a program that was compiled before.
var buildTarget = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("INJECT_TEST_TARGET"); path != "" {
		return path, nil
	}
	var err error
	if targetDir, err = os.MkdirTemp("", "inject"); err != nil {
		return "", err
	}
	bin := filepath.Join(targetDir, "target")
	cmd := exec.Command("gcc", "-O1", "-Wall", "-Werror", "-pthread", "-o", bin, "testdata/target.c")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return bin, nil
})

// victim is a running testdata/target.c.
type victim struct {
	t     testing.TB
	cmd   *exec.Cmd
	pid   int
	stdin io.WriteCloser
	lines *bufio.Scanner
}

// startVictim starts a target and returns when the target is ready. No goroutine calls Wait before the process has
// ended, see the package comment.
func startVictim(t testing.TB, mode string) *victim {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil && os.Getenv("INJECT_TEST_TARGET") == "" {
		testenv.CannotRun(t, "no C compiler: %v", err)
	}
	bin, err := buildTarget()
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{t: t, cmd: exec.Command(bin, mode)}
	// The target gets its own process group, whose parent is this process. SIGTSTP stops no process of an orphaned group
	// (setpgid(2)), and the group of the tests may be orphaned.
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	v.stdin, err = v.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.cmd.Stderr = os.Stderr
	v.lines = bufio.NewScanner(stdout)
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	v.pid = v.cmd.Process.Pid
	t.Cleanup(func() {
		_ = unix.Kill(v.pid, unix.SIGKILL)
		_ = v.cmd.Wait()
	})
	if got := v.line(); got != "ready" {
		t.Fatalf("target says %q instead of ready", got)
	}
	return v
}

// patience is the longest that a test waits for anything.
const patience = 2 * time.Minute

// line reads the next line; it is "" at the end of the output. A target that hangs is killed after patience, which ends
// the output.
func (v *victim) line() string {
	killer := time.AfterFunc(patience, func() { _ = unix.Kill(v.pid, unix.SIGKILL) })
	defer killer.Stop()
	if !v.lines.Scan() {
		return ""
	}
	return v.lines.Text()
}

func (v *victim) poke() {
	v.t.Helper()
	if _, err := v.stdin.Write([]byte("\n")); err != nil {
		v.t.Fatal(err)
	}
}

// eventually polls ok until it is true. It fails the test after patience.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// blockedIn returns the number of the system call in which the thread sleeps, or -1 if it does not sleep in one.
func blockedIn(pid int) int {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
	if err != nil {
		return -1
	}
	nr, err := strconv.Atoi(strings.Fields(string(raw))[0])
	if err != nil {
		return -1 // "running"
	}
	return nr
}

// awaitBlocked waits until the target sleeps in one of the system calls. Without any it does not wait.
func (v *victim) awaitBlocked(calls ...int) {
	v.t.Helper()
	if len(calls) == 0 {
		return
	}
	eventually(v.t, fmt.Sprintf("target is blocked in system call %v", calls), func() bool {
		for _, nr := range calls {
			// Check the state, too: a thread that was just detached is still in the call, but about to
			// repeat it.
			if blockedIn(v.pid) == nr && v.state() == 'S' {
				return true
			}
		}
		return false
	})
}

func (v *victim) state() byte {
	v.t.Helper()
	st, err := readStatus(v.pid)
	if err != nil {
		v.t.Fatal(err)
	}
	return st.state
}

// wantUntraced checks that no process traces the target.
func (v *victim) wantUntraced() {
	v.t.Helper()
	st, err := readStatus(v.pid)
	if err != nil {
		v.t.Fatal(err)
	}
	if st.tracer != 0 {
		v.t.Errorf("still traced by %d", st.tracer)
	}
}

// pending reports whether the signal is pending or blocked in the main thread.
func (v *victim) pending(sig int) bool {
	v.t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.pid))
	if err != nil {
		v.t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		key, value, _ := strings.Cut(line, ":")
		if key != "SigPnd" && key != "SigBlk" {
			continue
		}
		set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err != nil || set&(1<<(sig-1)) != 0 {
			return true
		}
	}
	return false
}
