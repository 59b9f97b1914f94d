// SPDX-License-Identifier: Apache-2.0

// Package selinux_test boots a kernel that enforces the SELinux module of deploy/selinux, with processes in the domains
// of the daemon, of QEMUs and of others, and checks what each of them may do.
package selinux_test

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

const (
	base    = "../secure/policy/base.cil"
	modules = "../../../deploy/selinux/*.cil"

	// patience bounds a boot, which takes seconds.
	patience = 3 * time.Minute
)

// The label that a descriptor of the QEMU of testdata/guest.c must have.
const uffdLabel = "system_u:object_r:migrated_uffd_t:s0:c1,c2"

// expected is what each process reports.
var expected = map[string]string{
	// A QEMU makes a descriptor (D1), and can do nothing with it but hold it (N1).
	"qemu-create":              "ok",
	"qemu-ioctl-own":           "EACCES",
	"qemu-read-own":            "EACCES",
	"qemu-getattr-own":         "EACCES",
	"qemu-open-device":         "EACCES", // N6
	"qemu-connect-other-port":  "ECONNREFUSED",
	"qemu-connect-daemon-port": "EACCES", // N11

	// The daemon takes it (D3) and gives it the orders of post-copy (D4) and no others (N4).
	"migrated-connect-to-qemu": "ok",
	"migrated-getfd":           "ok",
	"migrated-label":           uffdLabel,
	"migrated-api":             "ok",
	"migrated-register":        "ok",
	"migrated-read":            "EAGAIN", // permitted, but there is nothing to read
	"migrated-copy":            "ok",
	"migrated-copied":          "42",
	"migrated-zeropage":        "ok",
	"migrated-wake":            "ok",
	"migrated-writeprotect":    "EACCES",
	"migrated-continue":        "EEXIST", // permitted, but the page is there already
	"migrated-move":            "EACCES",
	"migrated-poison":          "ok",
	"migrated-unregister":      "ok",
	"migrated-scm-rights":      "ok",

	// A fork of QEMU is reported, even by a kernel that checks whether the reader may create a descriptor (D7).
	"migrated-fork-event": "ok",
	"migrated-fork-label": uffdLabel,

	// It reads QEMU's memory, and asks which pages have content (M2, Q3). It writes to none (N14).
	"migrated-memory-open":               "ok",
	"migrated-memory-read":               "ok",
	"migrated-memory":                    "42",
	"migrated-memory-open-to-write":      "EACCES",
	"migrated-pagemap-open":              "ok",
	"migrated-pagemap-scan":              "ok",
	"migrated-pagemap-other":             "EACCES",
	"migrated-memory-file-open":          "ok",
	"migrated-memory-file-open-to-write": "EACCES",

	// QEMU writes the state of its devices to a file of the daemon's (M1), and does not read it (N13).
	"migrated-state":             "ok",
	"migrated-state-label":       "system_u:object_r:migrated_state_t:s0",
	"migrated-state-open":        "ok",
	"qemu-state-write":           "ok",
	"qemu-state-open":            "ok",
	"migrated-state-read":        "ok",
	"migrated-state-text":        "saved",
	"migrated-state-truncate":    "ok",
	"migrated-state-map":         "EACCES",
	"qemu-state-receive-to-read": "ok",

	// Through the device (D2, D5).
	"migrated-open-device":          "ok",
	"qemu-device-api":               "EACCES", // N6
	"qemu-device-new":               "ok",
	"migrated-getfd-of-device-made": "ok",
	"migrated-label-of-device-made": uffdLabel,

	// Its own descriptor (D6) serves for one question (N5), and it may not make one by the device.
	"migrated-probe":          "ok",
	"migrated-probe-label":    "system_u:object_r:migrated_probe_t:s0",
	"migrated-probe-api":      "ok",
	"migrated-probe-register": "EACCES",
	"migrated-device-new":     "EACCES",

	// Another process.
	"other-create":              "EACCES",
	"other-open-device":         "EACCES",
	"other-connect-other-port":  "ECONNREFUSED",
	"other-connect-daemon-port": "EACCES",
	"other-connect-to-qemu":     "ok",
	"other-getfd":               "EPERM", // no ptrace (N8)
	"other-scm-rights":          "refused",
	"other-state-scm-rights":    "refused", // N13

	// A process that may trace QEMU.
	"tracer-create":              "EACCES",
	"tracer-open-device":         "EACCES",
	"tracer-connect-other-port":  "ECONNREFUSED",
	"tracer-connect-daemon-port": "EACCES",
	"tracer-connect-to-qemu":     "ok",
	"tracer-getfd":               "EACCES", // N1
	"tracer-scm-rights":          "refused",
	"tracer-state-scm-rights":    "refused",

	// Another QEMU, with the same categories or with others.
	"same-qemu-create":               "ok",
	"same-qemu-open-device":          "EACCES",
	"same-qemu-connect-other-port":   "ECONNREFUSED",
	"same-qemu-connect-daemon-port":  "EACCES",
	"same-qemu-connect-to-qemu":      "ok",
	"same-qemu-getfd":                "EPERM", // N9
	"same-qemu-scm-rights":           "refused",
	"same-qemu-state-scm-rights":     "ok", // a QEMU may pass it on, for writing only
	"same-qemu-state-open":           "ok",
	"other-qemu-create":              "ok",
	"other-qemu-open-device":         "EACCES",
	"other-qemu-connect-other-port":  "ECONNREFUSED",
	"other-qemu-connect-daemon-port": "EACCES",
	"other-qemu-connect-to-qemu":     "EACCES",

	// A process that may do everything else, with QEMU's categories or without.
	"trusted-create":                              "ok", // a descriptor of its own, with its own label
	"trusted-open-device":                         "ok",
	"trusted-connect-other-port":                  "ECONNREFUSED",
	"trusted-connect-daemon-port":                 "EACCES",
	"trusted-connect-to-qemu":                     "ok",
	"trusted-getfd":                               "EACCES", // N1
	"trusted-scm-rights":                          "refused",
	"trusted-state-scm-rights":                    "refused",
	"trusted-with-categories-create":              "ok",
	"trusted-with-categories-open-device":         "ok",
	"trusted-with-categories-connect-other-port":  "ECONNREFUSED",
	"trusted-with-categories-connect-daemon-port": "EACCES",
	"trusted-with-categories-connect-to-qemu":     "ok",
	"trusted-with-categories-getfd":               "EACCES",
	"trusted-with-categories-scm-rights":          "refused",
	"trusted-with-categories-state-scm-rights":    "refused",

	// Which program may start which (S1, Q4, N10).
	"forged-exec":           "EACCES",
	"init-domain":           "system_u:system_r:init_t:s0-s0:c0.c7",
	"started-domain":        "system_u:system_r:migrated_t:s0",
	"qemu-of-daemon-domain": "system_u:system_r:svirt_t:s0",
}

// denials must be in the log: permission, domain, label, class.
var denials = []denial{
	{"ioctl", "svirt_t:s0:c1,c2", "migrated_uffd_t:s0:c1,c2", "anon_inode"},
	{"read", "svirt_t:s0:c1,c2", "migrated_uffd_t:s0:c1,c2", "anon_inode"},
	{"open", "svirt_t:s0:c1,c2", "migrated_uffd_device_t:s0", "chr_file"},
	{"ioctl", "svirt_t:s0:c1,c2", "migrated_uffd_device_t:s0", "chr_file"},
	{"name_connect", "svirt_t:s0:c1,c2", "migrated_port_t:s0", "tcp_socket"},
	{"ioctl", "migrated_t:s0", "migrated_uffd_t:s0:c1,c2", "anon_inode"},
	{"ioctl", "migrated_t:s0", "migrated_probe_t:s0", "anon_inode"},
	{"create", "other_t:s0:c1,c2", "other_t:s0:c1,c2", "anon_inode"},
	{"ptrace", "other_t:s0:c1,c2", "svirt_t:s0:c1,c2", "process"},
	{"ptrace", "svirt_t:s0:c1,c2", "svirt_t:s0:c1,c2", "process"},
	{"read", "other_t:s0:c1,c2", "migrated_uffd_t:s0:c1,c2", "anon_inode"},
	{"read", "stranger_t:s0", "migrated_uffd_t:s0:c1,c2", "anon_inode"},
	{"read", "init_t:s0", "migrated_uffd_t:s0:c1,c2", "anon_inode"},
	{"write", "migrated_t:s0", "svirt_t:s0:c1,c2", "file"},
	{"ioctl", "migrated_t:s0", "svirt_t:s0:c1,c2", "file"},
	{"write", "init_t:s0", "migrated_state_t:s0", "file"},
	{"entrypoint", "migrated_t:s0", "other_exec_t:s0", "file"},
}

// TestModule: what the module permits works, and nothing else does.
func TestModule(t *testing.T) {
	got := bootGuest(t, policy(t, base))
	if diff := cmp.Diff(expected, got.results); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, want := range denials {
		if !slices.Contains(got.denials, want) {
			t.Errorf("no AVC of %+v", want)
		}
	}
}

// TestCategories: if another module permits more, only domains with QEMU's own categories profit from it (D8).
func TestCategories(t *testing.T) {
	generous := filepath.Join(t.TempDir(), "generous.cil")
	if err := os.WriteFile(generous, []byte("(allow init_t migrated_uffd_t (anon_inode (read)))\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := bootGuest(t, policy(t, base, "-N", generous)) // -N, because N1 would refuse it
	for name, want := range map[string]string{
		"trusted-getfd":                      "EACCES",
		"trusted-scm-rights":                 "refused",
		"trusted-with-categories-getfd":      "ok",
		"trusted-with-categories-scm-rights": "ok",
		"tracer-getfd":                       "EACCES", // not named
		"migrated-getfd":                     "ok",
	} {
		if got.results[name] != want {
			t.Errorf("%s: %s, want %s", name, got.results[name], want)
		}
	}
}

// policy compiles the module with args of secilc.
func policy(t *testing.T, args ...string) string {
	t.Helper()
	files, err := filepath.Glob(modules)
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %q, %v", modules, files, err)
	}
	if _, err := exec.LookPath("secilc"); err != nil {
		testenv.CannotRun(t, "%v: install the packages of scripts/setup", err)
	}
	out := filepath.Join(t.TempDir(), "policy")
	if err := kernel.CompilePolicy(t.Context(), out, slices.Concat(args, files)...); err != nil {
		t.Fatal(err)
	}
	return out
}

// seen is the output of a booted guest.
type seen struct {
	results map[string]string
	denials []denial
}

type denial struct{ permission, source, target, class string }

var avc = regexp.MustCompile(
	`avc:  denied  \{ (.*?) \} .* scontext=system_u:\w+:(\S+) tcontext=system_u:\w+:(\S+) tclass=(\w+) permissive=0`,
)

// bootGuest runs testdata/guest.c as PID 1 under a policy.
func bootGuest(t *testing.T, policy string) seen {
	t.Helper()
	program := compileC(t, "testdata/guest.c")
	files := []kernel.File{{Name: "policy", Path: policy}}
	for _, name := range []string{"init", "bin/qemu", "bin/migrated", "bin/other"} { // one program, several labels
		files = append(files, kernel.File{Name: name, Mode: 0o755, Path: program})
	}
	return boot(t, files)
}

func compileC(t *testing.T, source string) string {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		testenv.CannotRun(t, "%v: install the packages of scripts/setup", err)
	}
	source, err := filepath.Abs(source)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "program")
	if err := kernel.CompileC(t.Context(), filepath.Dir(source), program, source); err != nil {
		t.Fatal(err)
	}
	return program
}

// boot boots the stock kernel with these files and returns what their /init, and the kernel, printed.
func boot(t *testing.T, files []kernel.File) seen {
	t.Helper()
	if _, err := emulator.Dir(t.Context(), kernel.QEMU); err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	kernel.Only(t, kernel.Linux612)
	tree, err := kernel.Build(t.Context(), kernel.Linux612, kernel.Stock)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	for _, name := range []string{"proc", "sys", "dev", "run"} {
		files = append(files, kernel.File{Name: name, Mode: fs.ModeDir | 0o755})
	}
	initrd, err := kernel.Initramfs(t.TempDir(), files)
	if err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var console bytes.Buffer
	var got seen
	o := kernel.Options{Kernel: tree.BzImage, Initrd: initrd, CommandLine: "lsm=selinux loglevel=5", Log: &console}
	got.results, err = kernel.Results(ctx, o, func(line string) {
		if match := avc.FindStringSubmatch(line); match != nil {
			for permission := range strings.FieldsSeq(match[1]) {
				got.denials = append(got.denials, denial{permission, match[2], match[3], match[4]})
			}
		}
	})
	if err != nil {
		t.Fatalf("%v; console:\n%s", err, console.String())
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", console.String())
		}
	})
	return got
}
