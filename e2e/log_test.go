// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestLogThatTakesNothing starts daemons whose log is a full pipe that nobody reads, like the pipe to a journal that
// hangs. They move a VM all the same.
func TestLogThatTakesNothing(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	for _, h := range l.Hosts() {
		if _, err := h.StartDaemon(testContext(t), fullPipe(t), "--log-level", "debug"); err != nil {
			t.Fatal(err)
		}
	}
	s := newScene(t, l)
	if out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr()); code != 0 {
		t.Fatalf("migrate: exit code %d:\n%s", code, out)
	}
	metalPass(t, l.B, func(pass uint64) bool { return pass > s.began+1 })
	checkMetal(t, s.vm, l.B)
}

// fullPipe returns the write end of a full pipe. A write to it blocks until the test ends.
func fullPipe(t *testing.T) *os.File {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	for piece := make([]byte, 4096); ; {
		if _, err := unix.Write(fds[1], piece); err != nil {
			break
		}
	}
	if err := unix.SetNonblock(fds[1], false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fds[0]) })
	return os.NewFile(uintptr(fds[1]), "log")
}
