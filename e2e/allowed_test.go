// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestNotAllowed: a destination refuses templates outside its directory, options that it forbids, the name of another
// VM, and to start QEMU as root. It gives the reason and leaves no QEMU, and the VM continues at the source. A refused
// request does not keep its place of max_incoming.
func TestNotAllowed(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	vm := metal(t, lab.VMConfig{VCPUs: 1, MemoryMiB: 32, Nodes: 1})
	startVM(t, l.A, vm)
	daemon := startDaemon(t, l.B, "--max-incoming", "2")
	templates := l.B.Path(lab.VMDir)
	if err := syscall.Mkfifo(filepath.Join(templates, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/shadow", filepath.Join(templates, "shadow")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"renamed": "{{range .Args}}{{.}}\n{{end}}-name\nanother\n",
		"plugin":  "{{range .Args}}{{.}}\n{{end}}-plugin\nfile=/tmp/x.so\n",
	} {
		if err := os.WriteFile(filepath.Join(templates, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(template string, words ...string) {
		t.Helper()
		args := []string{"migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr()}
		if template != "" {
			args = append(args, "--template", template)
		}
		out, code := operate(t, l.A, args...)
		if code == 0 || strings.Contains(out, "root:") {
			t.Errorf("%s: exit code %d:\n%s", template, code, out)
		}
		for _, word := range words {
			if !strings.Contains(out, word) {
				t.Errorf("%s: %q is not said:\n%s", template, word, out)
			}
		}
		pids, err := l.B.Processes("qemu-system-x86_64")
		if err != nil || len(pids) > 0 {
			t.Errorf("%s: QEMUs %v at the destination, %v", template, pids, err)
		}
		goesOn(t, l.A)
	}
	for range 2 { // max_incoming: the requests below would wait if these kept their places
		refused("fifo", "no regular file")
	}
	refused("/dev/zero", "template_dir")
	refused("/etc/shadow", "template_dir")
	refused("shadow", "escapes")
	refused("renamed", `"another"`, "-name")
	refused("plugin", "-plugin", "forbidden_options")
	if err := daemon.Stop(testContext(t)); err != nil {
		t.Fatal(err)
	}
	startDaemon(t, l.B, "--min-uid", "1")
	refused("", "as root", "run_as", "min_uid: 0")
	checkMetal(t, vm, l.A)
}

// TestRunAs: a destination with --run-as starts QEMU as that user, and the VM arrives there.
func TestRunAs(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	startDaemon(t, l.B, "--min-uid", "1", "--run-as", "nobody")
	vm := metal(t, lab.VMConfig{VCPUs: 1, MemoryMiB: 32, Nodes: 1})
	startVM(t, l.A, vm)
	if err := os.Chmod(l.B.Path(lab.VMDir), 0o777); err != nil {
		t.Fatal(err)
	}
	if out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr()); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	info, err := os.Stat("/proc/" + strconv.Itoa(qemuOn(t, l.B)))
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != 65534 {
		t.Errorf("QEMU's process is %v, %v", info, err)
	}
	metalPass(t, l.B, func(pass uint64) bool { return pass > 1 })
	checkMetal(t, vm, l.B)
}
