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

	"github.com/migrated-vm/migrated/internal/cannot"
)

var targetDir string // made by buildTarget

func TestMain(m *testing.M) {
	code := m.Run()
	if targetDir != "" {
		_ = os.RemoveAll(targetDir)
	}
	os.Exit(code)
}

// buildTarget compiles testdata/target.c. Where there is no compiler, as in the initramfs that tests of the kernel
// series run in, INJECT_TEST_TARGET names a program compiled before.
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

// startVictim returns when the target says that it is ready. Nobody waits for the process before it has ended,
// see the package comment.
func startVictim(t testing.TB, mode string) *victim {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil && os.Getenv("INJECT_TEST_TARGET") == "" {
		cannot.Run(t, "no C compiler: %v", err)
	}
	bin, err := buildTarget()
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{t: t, cmd: exec.Command(bin, mode)}
	// A group of its own, whose parent is this process: SIGTSTP stops nobody in an orphaned group (setpgid(2)), and who
	// starts the tests may have made them one.
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

// line reads the next line; "" at the end of output. A target that hangs is killed after 30 s, which ends the
// output.
func (v *victim) line() string {
	killer := time.AfterFunc(30*time.Second, func() { _ = unix.Kill(v.pid, unix.SIGKILL) })
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

// eventually polls until ok, at most 20 s.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// blockedIn says which system call the thread sleeps in; -1 if it is not asleep in one.
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

func (v *victim) awaitBlocked(calls ...int) {
	v.t.Helper()
	eventually(v.t, fmt.Sprintf("target is blocked in system call %v", calls), func() bool {
		for _, nr := range calls {
			// Asleep, too: one that was just detached is still in the call, on its
			// way to begin it again.
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

// wantUntraced is part of 'as found'.
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
