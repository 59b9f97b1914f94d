// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

const nobody = 65534

// needs are what the daemon does to a QEMU of another user: to its process, and to a file and a socket in its
// directory. Each needs the capability that it is listed under.
var needs = map[cap.Value]func(pid int, dir string) error{
	cap.SYS_PTRACE: func(pid int, _ string) error {
		p, err := inject.Seize(context.Background(), pid)
		if err != nil {
			return err
		}
		_, err = p.Syscall(context.Background(), unix.SYS_GETPID)
		return errors.Join(err, p.Detach())
	},
	cap.CHECKPOINT_RESTORE: func(pid int, _ string) error {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/map_files/*", pid))
		if err != nil || len(files) == 0 {
			return errors.Join(errors.New("its mappings are not shown"), err)
		}
		f, err := os.Open(files[0])
		if err != nil {
			return err
		}
		return f.Close()
	},
	cap.DAC_OVERRIDE: func(_ int, dir string) error {
		f, err := os.OpenFile(filepath.Join(dir, "ram"), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		conn, err := net.Dial("unix", filepath.Join(dir, "qmp"))
		if err != nil {
			return errors.Join(err, f.Close())
		}
		return errors.Join(conn.Close(), f.Close())
	},
	cap.CHOWN: func(_ int, dir string) error {
		return unix.Fchownat(unix.AT_FDCWD, filepath.Join(dir, "ram"), nobody+1, nobody, 0)
	},
	cap.LEASE: func(_ int, dir string) error {
		f, err := os.Open(filepath.Join(dir, "ram"))
		if err != nil {
			return err
		}
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
		return errors.Join(err, f.Close())
	},
	cap.KILL: func(pid int, _ string) error {
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		return errors.Join(unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0), unix.Close(pidfd))
	},
}

// needsRole takes three arguments: the capability to drop, the process and the directory.
func needsRole(args []string) (map[string]string, error) {
	pid, err := strconv.Atoi(args[1])
	if err != nil {
		return nil, err
	}
	all := Needed
	Needed = slices.DeleteFunc(slices.Clone(all), func(c cap.Value) bool { return c.String() == args[0] })
	if err := Apply(); err != nil {
		return nil, err
	}
	report := map[string]string{}
	for _, c := range all { // KILL is the last
		report[c.String()] = "works"
		if err := needs[c](pid, args[2]); err != nil {
			report[c.String()] = "fails: " + err.Error()
		}
	}
	return report, nil
}

// TestEachCapabilityIsNeeded: with all capabilities the daemon can do everything that it does to another user's QEMU.
// Without one of them, it cannot do what that one is for.
func TestEachCapabilityIsNeeded(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root")
	}
	for _, without := range append([]string{"none"}, names(Needed)...) {
		t.Run("without "+strings.TrimPrefix(without, "cap_"), func(t *testing.T) {
			pid, dir := otherUser(t)
			for name, outcome := range play(t, "needs", without, strconv.Itoa(pid), dir) {
				t.Logf("what %s is for: %s", name, outcome)
				works := outcome == "works"
				// Others may fail as well: what one capability is for may need another, too.
				if name == without && works || without == "none" && !works {
					t.Error("which is wrong")
				}
			}
		})
	}
}

func names(values []cap.Value) (names []string) {
	for _, c := range values {
		names = append(names, c.String())
	}
	return names
}

// otherUser starts a process of another user and makes its directory.
func otherUser(t *testing.T) (pid int, dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ram"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "qmp"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	for name, mode := range map[string]os.FileMode{"ram": 0o600, "qmp": 0o700, ".": 0o700} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.Chmod(path, mode), os.Chown(path, nobody, nobody)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // fails if the test has killed it
		_ = cmd.Wait()
	})
	return cmd.Process.Pid, dir
}
