// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestBadInput runs check and migrate for VMs that cannot be migrated and for sockets that are no QMP socket. Both
// commands fail, and name the cause and what to do.
func TestBadInput(t *testing.T) {
	t.Parallel()
	plain := lab.VMConfig{VCPUs: 1, MemoryMiB: 32, Nodes: 1}
	for _, c := range []struct {
		name string
		// vm prepares host A. path is the argument of --vm.
		vm    func(t *testing.T, l *lab.Lab)
		path  string
		words []string // in the output of both check and migrate
	}{
		{"RAM on a disk", func(t *testing.T, l *lab.Lab) {
			startRaw(t, l, "-m", "32M", "-machine", "q35,memory-backend=ram0", "-accel", "tcg",
				"-object", "memory-backend-file,id=ram0,size=32M,mem-path="+t.TempDir()+"/ram,share=on")
		}, lab.QMPPath, []string{"ram0", "tmpfs", "/dev/shm"}},
		{"a device that cannot migrate", func(t *testing.T, l *lab.Lab) {
			vm := plain
			vm.Extra = []string{"-device", "ivshmem-plain,memdev=shared", "-object", "memory-backend-ram,id=shared,size=1M"}
			startVM(t, l.A, metal(t, vm))
		}, lab.QMPPath, []string{"ivshmem"}},
		{"a socket that is not QMP", func(t *testing.T, l *lab.Lab) {
			startVM(t, l.A, metal(t, plain))
		}, lab.SerialPath, []string{"QMP", lab.SerialPath}},
		{"no socket", func(*testing.T, *lab.Lab) {}, "/run/vm/nothing", []string{"/run/vm/nothing", "no such file"}},
		{"a monitor that is in use", func(t *testing.T, l *lab.Lab) {
			startVM(t, l.A, metal(t, plain))
			client, err := l.A.QMP(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := client.Disconnect(); err != nil {
					t.Error(err)
				}
			})
		}, lab.QMPPath, []string{"another", "-qmp"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			c.vm(t, l)
			for _, command := range []string{"check", "migrate"} {
				out, code := operate(t, l.A, command, "--vm", c.path, "--to", l.B.DaemonAddr())
				if code == 0 {
					t.Errorf("%s says that all is well:\n%s", command, out)
				}
				for _, word := range c.words {
					if !strings.Contains(out, word) {
						t.Errorf("%s does not say %q:\n%s", command, word, out)
					}
				}
				t.Logf("%s: exit code %d:\n%s", command, code, out)
			}
		})
	}
}

// TestWithoutPtrace: if the destination's daemon lacks CAP_SYS_PTRACE, migrate fails and check warns. Both name the
// capability.
func TestWithoutPtrace(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	startLimitedDaemon(t, l.B, "-sys_ptrace")
	vm := lab.VMConfig{VCPUs: 1, MemoryMiB: 32, Nodes: 1, Unprivileged: true}
	startVM(t, l.A, metal(t, vm))
	out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr())
	if code == 0 || !strings.Contains(out, "CAP_SYS_PTRACE") {
		t.Errorf("migrate: exit code %d does not name CAP_SYS_PTRACE:\n%s", code, out)
	}
	// check only warns, because VMs whose QEMU runs as the daemon's own user can still arrive.
	out, _ = operate(t, l.A, "check", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr())
	if !strings.Contains(out, "lacks CAP_SYS_PTRACE") {
		t.Errorf("check does not name CAP_SYS_PTRACE:\n%s", out)
	}
	goesOn(t, l.A)
}

// TestWithoutUserfaultfd: the destination cannot create a userfaultfd. Its QEMU may not call userfaultfd(2), because it
// is unprivileged, and /dev/userfaultfd is another device. migrate names both ways, check names the device.
func TestWithoutUserfaultfd(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	if out, err := l.B.Run(testContext(t), "mount", "--bind", "/dev/null", "/dev/userfaultfd"); err != nil {
		t.Fatal(err, out)
	}
	startDaemon(t, l.A)
	startDaemon(t, l.B)
	vm := lab.VMConfig{VCPUs: 1, MemoryMiB: 32, Nodes: 1, Unprivileged: true}
	startVM(t, l.A, metal(t, vm))
	out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr())
	if code == 0 || !strings.Contains(out, "userfaultfd(2)") || !strings.Contains(out, "/dev/userfaultfd") {
		t.Errorf("migrate: exit code %d does not name both ways:\n%s", code, out)
	}
	out, code = operate(t, l.A, "check", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr())
	if !strings.Contains(out, "/dev/userfaultfd") {
		t.Errorf("check: exit code %d does not name the device:\n%s", code, out)
	}
	goesOn(t, l.A)
}

// TestNoDaemon: without a daemon, list fails and names the command that starts one.
func TestNoDaemon(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	out, code := operate(t, l.A, "list")
	if code == 0 || !strings.Contains(out, "migrated serve") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}

// operate runs the program under test on a host, and returns its output, stderr included, and its exit code.
func operate(t *testing.T, h *lab.Host, args ...string) (string, int) {
	t.Helper()
	binary, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	out, err := h.Command(testContext(t), append([]string{binary}, args...)...).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return string(out), 0
	case errors.As(err, &exit):
		return string(out), exit.ExitCode()
	default:
		t.Fatal(err)
		return "", 0
	}
}

// startRaw starts a QEMU on host A with further arguments, for VMs that VMConfig cannot describe. Its monitor is at
// QMPPath.
func startRaw(t *testing.T, l *lab.Lab, args ...string) {
	t.Helper()
	argv := append([]string{
		"qemu-system-x86_64", "-nodefaults", "-display", "none", "-qmp", "unix:" + lab.QMPPath + ",server=on,wait=off",
	}, args...)
	if _, err := l.A.Start(os.Stderr, argv...); err != nil {
		t.Fatal(err)
	}
	awaitFile(t, l.A.Path(lab.QMPPath))
}

// startLimitedDaemon starts a daemon without some capabilities. caps is as for setpriv(1): "-sys_ptrace".
func startLimitedDaemon(t *testing.T, h *lab.Host, caps string) {
	t.Helper()
	binary, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Start(os.Stderr, "setpriv", "--bounding-set="+caps, "--inh-caps="+caps, "--",
		binary, "serve", "--plaintext", "--min-uid", "0", "--listen", h.DaemonAddr()); err != nil {
		t.Fatal(err)
	}
	awaitFile(t, h.Path(lab.DaemonSocket))
}
