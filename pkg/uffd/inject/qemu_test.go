// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// vm is a QEMU, started as a migration's destination starts it.
type vm struct {
	t    testing.TB
	pid  int
	ram  string // file behind the guest's RAM
	conn *net.UnixConn
	in   *bufio.Reader
}

func startQEMU(t testing.TB, uid uint32, extra ...string) *vm {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		testenv.CannotRun(t, "no QEMU: %v", err)
	}
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root to start QEMU as uid %d", uid)
	}
	dir, err := os.MkdirTemp("/dev/shm", "inject")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chown(dir, int(uid), int(uid)); err != nil {
		t.Fatal(err)
	}
	v := &vm{t: t, ram: filepath.Join(dir, "ram")}
	socket := filepath.Join(dir, "qmp")
	cmd := exec.Command(bin, append([]string{"-M", "q35", "-accel", "tcg", "-m", "64",
		"-object", "memory-backend-file,id=ram0,size=64M,share=on,mem-path=" + v.ram, "-machine", "memory-backend=ram0",
		"-S", "-incoming", "defer", "-nodefaults", "-display", "none",
		"-qmp", "unix:" + socket + ",server=on,wait=off"}, extra...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	v.pid = cmd.Process.Pid
	t.Cleanup(func() {
		_ = unix.Kill(v.pid, unix.SIGKILL)
		_ = cmd.Wait()
	})
	eventually(t, "QEMU listens for QMP", func() bool {
		v.conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
		return err == nil
	})
	t.Cleanup(func() { _ = v.conn.Close() })
	v.in = bufio.NewReader(v.conn)
	if err := v.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := v.in.ReadString('\n'); err != nil { // greeting
		t.Fatal(err)
	}
	v.mustQMP(`{"execute":"qmp_capabilities"}`)
	return v
}

// qmp sends one command, with a descriptor if fd >= 0, and returns the value of "return".
func (v *vm) qmp(command string, fd int) (json.RawMessage, error) {
	if err := v.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	if _, _, err := v.conn.WriteMsgUnix([]byte(command+"\n"), rights, nil); err != nil {
		return nil, err
	}
	for {
		line, err := v.in.ReadBytes('\n')
		if err != nil {
			return nil, err
		}
		var reply struct{ Return, Error json.RawMessage }
		if err := json.Unmarshal(line, &reply); err != nil {
			return nil, err
		}
		if reply.Error != nil {
			return nil, fmt.Errorf("%s: %s", command, reply.Error)
		}
		if reply.Return != nil {
			return reply.Return, nil
		} // otherwise it is an event
	}
}

func (v *vm) mustQMP(command string) json.RawMessage {
	v.t.Helper()
	reply, err := v.qmp(command, -1)
	if err != nil {
		v.t.Fatal(err)
	}
	return reply
}

func (v *vm) handDevice(_ context.Context, dev *os.File) (func(context.Context) error, error) {
	_, err := v.qmp(`{"execute":"getfd","arguments":{"fdname":"userfaultfd"}}`, int(dev.Fd()))
	return func(context.Context) error {
		_, err := v.qmp(`{"execute":"closefd","arguments":{"fdname":"userfaultfd"}}`, -1)
		return err
	}, err
}

// ramRange finds the guest's RAM in QEMU's address space.
func (v *vm) ramRange() uffd.Range {
	v.t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", v.pid))
	if err != nil {
		v.t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var start, end uint64
		if strings.HasSuffix(strings.TrimSpace(line), v.ram) {
			if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
				v.t.Fatal(err)
			}
			return uffd.Range{Start: start, Len: end - start}
		}
	}
	v.t.Fatalf("%s is not mapped", v.ram)
	return uffd.Range{}
}

// TestRAMIsNotInherited checks that a process that QEMU forks does not get the guest's RAM. So it does no harm
// that UFFD_SECURE does not report forks (pkg/uffd's TestForkWithoutEvent).
func TestRAMIsNotInherited(t *testing.T) {
	v := startQEMU(t, 65534)
	ram := v.ramRange()
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", v.pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(smaps), fmt.Sprintf("\n%x-", ram.Start))
	_, rest, _ = strings.Cut(rest, "\nVmFlags:")
	flags, _, _ := strings.Cut(rest, "\n")
	if !found || !slices.Contains(strings.Fields(flags), "dc") { // "do not copy area on fork", proc(5)
		t.Errorf("the RAM at %v has the flags %q", ram, flags)
	}
}

const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

func TestTakeFromQEMU(t *testing.T) {
	tests := []struct {
		name   string
		uid    uint32
		args   []string
		method string
	}{
		{"root", 0, nil, MethodSyscall},
		{"root in sandbox", 0, []string{"-sandbox", sandbox}, MethodSyscall},
		{"unprivileged in sandbox", 65534, []string{"-sandbox", sandbox}, MethodDevice},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.method == MethodDevice {
				if _, err := os.Stat(uffd.DevicePath); err != nil {
					testenv.CannotRun(t, "needs Linux 6.1: %v", err)
				}
				raw, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
				if err == nil && strings.TrimSpace(string(raw)) != "0" {
					testenv.CannotRun(t, "vm.unprivileged_userfaultfd is not 0, so userfaultfd(2) will not be refused")
				}
			}
			v := startQEMU(t, test.uid, test.args...)
			status := string(v.mustQMP(`{"execute":"query-status"}`))
			before := openFDs(t, v.pid)

			taken, err := Take(t.Context(), v.pid, TakeOptions{HandDevice: v.handDevice})
			if err != nil {
				t.Fatal(err)
			}
			defer taken.UFFD.Close()
			if taken.Method != test.method {
				t.Errorf("taken by %s, want %s", taken.Method, test.method)
			}
			if after := openFDs(t, v.pid); after != before+1 {
				t.Errorf("QEMU has %d descriptors, had %d: want one more", after, before)
			}
			wantFound(t, v.pid, taken.RemoteFD)
			wantSupervision(t, taken)
			if _, _, err := taken.UFFD.API(0); err != nil {
				t.Fatal(err)
			}
			if _, err := taken.UFFD.Register(v.ramRange(), uffd.ModeMissing); err != nil {
				t.Fatal(err)
			}
			if got := string(v.mustQMP(`{"execute":"query-status"}`)); got != status {
				t.Errorf("status after Take is %s, was %s", got, status)
			}

			if err := taken.CloseRemote(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantFound(t, v.pid)
			if got := string(v.mustQMP(`{"execute":"query-status"}`)); got != status {
				t.Errorf("status after CloseRemote is %s, was %s", got, status)
			}
			if after := openFDs(t, v.pid); after != before {
				t.Errorf("QEMU has %d descriptors, had %d", after, before)
			}
		})
	}
}

// TestQEMURefuses checks that without the device the error says the reason, and that QEMU is unharmed.
func TestQEMURefuses(t *testing.T) {
	v := startQEMU(t, 65534, "-sandbox", sandbox)
	taken, err := Take(t.Context(), v.pid, TakeOptions{})
	if err == nil {
		_ = taken.UFFD.Close()
		testenv.CannotRun(t, "vm.unprivileged_userfaultfd is 1 here")
	}
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "uid 65534") {
		t.Errorf("error does not say why: %v", err)
	}
	v.mustQMP(`{"execute":"query-status"}`)
}

func BenchmarkTakeFromQEMU(b *testing.B) {
	for name, uid := range map[string]uint32{"userfaultfd": 0, "device": 65534} {
		b.Run(name, func(b *testing.B) {
			v := startQEMU(b, uid, "-sandbox", sandbox)
			for b.Loop() {
				taken, err := Take(b.Context(), v.pid, TakeOptions{HandDevice: v.handDevice})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := errors.Join(taken.CloseRemote(b.Context()), taken.UFFD.Close()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
