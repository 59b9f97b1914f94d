// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// jail is the root directory of a QEMU with -chroot.
const jail = lab.VMDir + "/jail"

// makeJails makes jail on both hosts. Only the VM's directory is in it, because the test has QEMU save RAM there.
func makeJails(t *testing.T, l *lab.Lab) {
	t.Helper()
	for _, h := range l.Hosts() {
		const script = "mkdir -p " + jail + lab.VMDir + " && mount --bind " + lab.VMDir + " " + jail + lab.VMDir
		if _, err := h.Run(testContext(t), "sh", "-c", script); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRunAsAndChroot moves VMs there and back whose QEMU is started by root and drops its privileges by itself, as
// under LXD and Incus. Each QEMU that the daemons start has the same user, the same groups and the same root directory.
func TestRunAsAndChroot(t *testing.T) {
	t.Parallel()
	sandbox := []string{"-sandbox", "on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny"}
	for _, c := range []struct {
		name, version string
		backend       lab.Backend
		user          string // 65534: nobody
		args          []string
	}{
		{"runas and chroot", lab.InstalledQEMU, lab.BackendDefault, "65534", []string{"-runas", "nobody", "-chroot", jail}},
		{"numbers, and a sandbox", lab.InstalledQEMU, lab.BackendFile, "65534",
			slices.Concat([]string{"-runas", "65534:65534"}, sandbox)},
		{"chroot alone", lab.InstalledQEMU, lab.BackendDefault, "0", []string{"-chroot", jail}},
		{"run-with", emulator.V11, lab.BackendDefault, "65534",
			slices.Concat([]string{"-run-with", "user=nobody,chroot=" + jail}, sandbox)},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newHosts(t)
			for _, h := range l.Hosts() {
				useQEMU(t, h, c.version)
				startDaemon(t, h)
			}
			makeJails(t, l)
			s := sceneOf(t, l, lab.VMConfig{Backend: c.backend, Extra: c.args}.WithDevices(1, 1))
			before := privilegesOf(t, qemuOn(t, l.A))
			if u := c.user; !strings.Contains(before, strings.Join([]string{"Uid:", u, u, u, u}, "\t")) {
				t.Fatalf("at the source, where nothing is tested yet: %s", before)
			}
			moveMetal(t, s.vm, l.A, l.B)
			if got := privilegesOf(t, qemuOn(t, l.B)); got != before {
				t.Errorf("at the source QEMU had\n%s\nand at the destination\n%s", before, got)
			}
			moveMetal(t, s.vm, l.B, l.A)
			if got := privilegesOf(t, qemuOn(t, l.A)); got != before {
				t.Errorf("at the source QEMU had\n%s\nand when it was back\n%s", before, got)
			}
		})
	}
}

// privilegesOf returns a process's user, groups and root directory, from /proc.
func privilegesOf(t *testing.T, pid int) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		t.Fatal(err)
	}
	lines := []string{"root " + root}
	for line := range strings.Lines(string(status)) {
		if key, _, _ := strings.Cut(line, ":"); slices.Contains([]string{"Uid", "Gid", "Groups"}, key) {
			lines = append(lines, strings.TrimRight(line, " \n"))
		}
	}
	return strings.Join(lines, "\n")
}

// TestRAMFileGoes: after a VM has left, its host removes the RAM file, also that of another user's VM, and so gets the
// memory back. It keeps a file that another process has open. `status` says what was done.
func TestRAMFileGoes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		vm   lab.VMConfig
		open bool
		want string
	}{
		{"unprivileged", lab.VMConfig{Unprivileged: true}, false, "removed"},
		{"open elsewhere", lab.VMConfig{}, true, "it was not removed: another process has it open or mapped"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			s := sceneOf(t, l, c.vm)
			files := s.vm.RAMFiles()
			if len(files) != 1 {
				t.Fatalf("RAM is in %v", files)
			}
			if c.open {
				if _, err := l.A.Start(os.Stderr, "sh", "-c", "exec sleep infinity <"+files[0]); err != nil {
					t.Fatal(err)
				}
				eventually(t, func() error { return checkOpen(l.A, files[0]) })
			}
			moveMetal(t, s.vm, l.A, l.B)
			eventually(t, func() error {
				out, code := operate(t, l.A, "status", "there-b")
				if code != 0 || !strings.Contains(out, files[0]+": "+c.want) {
					return fmt.Errorf("status, exit code %d:\n%s", code, out)
				}
				return nil
			})
			_, err := os.Stat(l.A.Path(files[0]))
			if gone := errors.Is(err, fs.ErrNotExist); gone == c.open {
				t.Errorf("the file is gone: %v (%v)", gone, err)
			}
		})
	}
}

// checkOpen returns nil if a sleep process of the host has a file open as its standard input.
func checkOpen(h *lab.Host, path string) error {
	pids, err := h.Processes("sleep")
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if file, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/0", pid)); err == nil && file == path {
			return nil
		}
	}
	return fmt.Errorf("none of the processes %v has %s open", pids, path)
}
