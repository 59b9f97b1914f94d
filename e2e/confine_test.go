// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// neededCapabilities are cap_chown, cap_dac_override, cap_kill, cap_sys_ptrace, cap_lease and cap_checkpoint_restore,
// as in proc_pid_status(5).
const neededCapabilities = "0000010010080023"

// TestDaemonIsConfined: two confined daemons move a VM there and back. Both have dropped the capabilities that they do
// not need, and their filter refuses system calls that they do not make. A QEMU that a daemon starts does not inherit
// the daemon's confinement.
func TestDaemonIsConfined(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	daemons := map[*lab.Host]*lab.Process{l.A: startDaemon(t, l.A), l.B: startDaemon(t, l.B)}
	s := newScene(t, l)
	moveMetal(t, s.vm, l.A, l.B)
	before := statusOf(t, "/proc/self")
	qemu := statusOf(t, fmt.Sprintf("/proc/%d", qemuOn(t, l.B)))
	// QEMU inherits the confinement of the starter (confine.ApplyToStarter), which only takes away what no QEMU needs,
	// and not that of the daemon.
	if qemu["NoNewPrivs"] != before["NoNewPrivs"] || qemu["Seccomp"] != "2" {
		t.Errorf("QEMU has no_new_privs %s and seccomp %s", qemu["NoNewPrivs"], qemu["Seccomp"])
	}
	var had, has uint64
	if _, err := fmt.Sscanf(before["CapBnd"]+" "+qemu["CapBnd"], "%x %x", &had, &has); err != nil {
		t.Fatal(err)
	}
	const module, trace, net = 1 << unix.CAP_SYS_MODULE, 1 << unix.CAP_SYS_PTRACE, 1 << unix.CAP_NET_ADMIN
	if has&(module|trace) != 0 || has&net != had&net {
		t.Errorf("QEMU may have the capabilities %x, what started the daemon %x", has, had)
	}
	moveMetal(t, s.vm, l.B, l.A)

	for h, daemon := range daemons {
		if qemu["PPid"] == fmt.Sprint(daemon.PID) {
			t.Errorf("QEMU is a child of the daemon of host %s", h.Name)
		}
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", daemon.PID))
		if err != nil || len(tasks) == 0 {
			t.Fatalf("threads of the daemon of host %s: %v, %v", h.Name, tasks, err)
		}
		for _, task := range tasks {
			status, err := readStatus(task)
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
				continue // the thread has ended
			} else if err != nil {
				t.Fatal(err)
			}
			for key, want := range map[string]string{
				"CapEff": neededCapabilities, "CapPrm": neededCapabilities, "CapBnd": neededCapabilities,
				"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
			} {
				if status[key] != want {
					t.Errorf("%s of host %s's daemon: %s is %s, want %s", task, h.Name, key, status[key], want)
				}
			}
		}
		checkRefusedSyscalls(t, daemon.PID)
		checkSendBuffer(t, h)
		out, code := operate(t, h, "check")
		if code != 0 || !strings.Contains(out, "no new privileges; system calls filtered") {
			t.Errorf("check on host %s: exit code %d:\n%s", h.Name, code, out)
		}
	}
}

// checkSendBuffer checks that connections that a daemon accepts have a send buffer of 16 MiB. Setting it takes a
// capability that the daemon has dropped by then.
func checkSendBuffer(t *testing.T, h *lab.Host) {
	t.Helper()
	var conn net.Conn
	if err := h.InNetwork(func() (err error) {
		conn, err = net.Dial("tcp", h.DaemonAddr())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, func() error { // until the daemon has accepted it
		shown, err := h.Run(testContext(t), "ss", "-Htnm", "state", "established", "sport", "=", ":"+lab.DaemonPort)
		switch {
		case err != nil:
			t.Fatal(err)
		case !strings.Contains(shown, "skmem"):
			return fmt.Errorf("the daemon of host %s accepts no connection", h.Name)
		case !strings.Contains(shown, ",tb33554432,"): // Linux shows twice what was set
			t.Fatalf("host %s: its daemon's connections are %q", h.Name, shown)
		}
		return nil
	})
}

// checkRefusedSyscalls makes a daemon call system calls that it never makes by itself, and checks that it gets EPERM.
func checkRefusedSyscalls(t *testing.T, pid int) {
	t.Helper()
	p, err := inject.Seize(testContext(t), pid)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Detach(); err != nil {
			t.Error(err)
		}
	}()
	// Without the filter, root gets no EPERM from any of these (TestForbidden of internal/confine). In the daemon,
	// init_module and the raw socket fail with EPERM in any case, because it has dropped their capabilities.
	for name, call := range map[string][]uintptr{
		"mount": {unix.SYS_MOUNT, 0, 0, 0, 0, 0}, "unshare": {unix.SYS_UNSHARE, 0}, "execve": {unix.SYS_EXECVE, 0, 0, 0},
		"bpf": {unix.SYS_BPF, ^uintptr(0), 0, 0}, "init_module": {unix.SYS_INIT_MODULE, 0, 0, 0},
		"io_uring_setup": {unix.SYS_IO_URING_SETUP, 0, 0},
		"a process":      {unix.SYS_CLONE, unix.CLONE_FS | unix.CLONE_NEWNS, 0, 0, 0, 0},
		"a raw socket":   {unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW, 0},
	} {
		if _, err := p.Syscall(testContext(t), call[0], call[1:]...); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s in the daemon, process %d: %v, want EPERM", name, pid, err)
		}
	}
	if got, err := p.Syscall(testContext(t), unix.SYS_GETPID); err != nil || int(got) != pid {
		t.Errorf("getpid in the daemon, process %d: %d, %v", pid, got, err)
	}
}

// statusOf returns the fields of the status file of a process or thread, see proc_pid_status(5). dir is its directory
// in /proc.
func statusOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	values, err := readStatus(dir)
	if err != nil {
		t.Fatal(err)
	}
	return values
}

func readStatus(dir string) (map[string]string, error) {
	text, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return nil, err
	}
	values := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		values[key] = strings.TrimSpace(value)
	}
	return values, nil
}
