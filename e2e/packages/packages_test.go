// SPDX-License-Identifier: Apache-2.0

package packages

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

const checkout = "../.."

// files are the files of each package besides documentation, manual pages and completions, with their modes.
var files = map[string]fs.FileMode{
	"/usr/bin/migrated":                                  0o755,
	"/usr/lib/systemd/system/migrated.service":           0o644,
	"/usr/lib/sysusers.d/migrated.conf":                  0o644,
	"/usr/lib/tmpfiles.d/migrated.conf":                  0o644,
	"/etc/migrated/migrated.yaml":                        0o644,
	"/etc/migrated/tls":                                  0o700 | fs.ModeDir,
	"/etc/migrated/templates":                            0o755 | fs.ModeDir,
	"/usr/share/migrated/version":                        0o644,
	"/usr/share/migrated/systemd/more-privileges.conf":   0o644,
	"/usr/share/migrated/selinux/migrated.cil":           0o644,
	"/usr/share/migrated/selinux/migrated_host.cil":      0o644,
	"/usr/share/migrated/selinux/migrated_libvirt.cil":   0o644,
	"/usr/share/migrated/selinux/migrated_svirt.cil":     0o644,
	"/usr/share/migrated/apparmor/libvirt-qemu":          0o644,
	"/usr/share/migrated/monitoring/dashboard.json":      0o644,
	"/usr/share/migrated/monitoring/alerts.yml":          0o644,
	"/usr/share/doc/migrated/README.md":                  0o644,
	"/usr/share/doc/migrated/docs/faults.md":             0o644,
	"/usr/share/doc/migrated/deploy/README.md":           0o644,
	"/usr/share/man/man1/migrated.1.gz":                  0o644,
	"/usr/share/man/man1/migrated-serve.1.gz":            0o644,
	"/usr/share/bash-completion/completions/migrated":    0o644,
	"/usr/share/fish/vendor_completions.d/migrated.fish": 0o644,
}

// run runs a command and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	return string(out)
}

// TestPackages makes each package twice, unpacks it and checks its files.
func TestPackages(t *testing.T) {
	for format, only := range map[string][]string{
		"deb": {"/usr/share/zsh/vendor-completions/_migrated", "/usr/share/doc/migrated/copyright"},
		"rpm": {"/usr/share/zsh/site-functions/_migrated", "/usr/share/licenses/migrated/LICENSE"},
	} {
		t.Run(format, func(t *testing.T) {
			var made [2][]byte
			var path string
			for i := range made {
				var err error
				if path, err = Make(t.Context(), checkout, t.TempDir(), "1.2.0-rc1", format); err != nil {
					t.Fatal(err)
				}
				if made[i], err = os.ReadFile(path); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(made[0], made[1]) {
				t.Error("two packages of one commit differ")
			}
			root := t.TempDir()
			if format == "deb" {
				checkDeb(t, path, root)
			} else {
				checkRPM(t, path, root)
			}
			for name, mode := range files {
				info, err := os.Lstat(root + name)
				if err != nil || info.Mode() != mode {
					t.Errorf("%s: %v, %v; want mode %v", name, info, err, mode)
				}
			}
			for _, name := range only {
				if _, err := os.Lstat(root + name); err != nil {
					t.Error(err)
				}
			}
			checkUnpacked(t, root)
		})
	}
}

func checkDeb(t *testing.T, path, root string) {
	t.Helper()
	run(t, "dpkg-deb", "--extract", path, root)
	if got := strings.TrimSpace(run(t, "dpkg-deb", "--field", path, "Version")); got != "1.2.0~rc1-1" {
		t.Errorf("the version is %q", got)
	}
	if got := strings.TrimSpace(run(t, "dpkg-deb", "--info", path, "conffiles")); got != "/etc/migrated/migrated.yaml" {
		t.Errorf("configuration files are %q", got)
	}
	for line := range strings.Lines(run(t, "dpkg-deb", "--contents", path)) {
		if fields := strings.Fields(line); fields[1] != "root/root" {
			t.Errorf("not root's: %s", line)
		}
	}
}

func checkRPM(t *testing.T, path, root string) {
	t.Helper()
	if said := run(t, "rpm", "--checksig", path); !strings.Contains(said, "digests OK") {
		t.Errorf("rpm --checksig: %s", said)
	}
	query := func(args ...string) string {
		return strings.TrimSpace(run(t, "rpm", append([]string{"--query", "--package", path}, args...)...))
	}
	got := query("--queryformat", "%{NAME} %{VERSION}-%{RELEASE} %{ARCH} %{LICENSE} %{BUILDHOST}")
	if got != "migrated 1.2.0~rc1-1 x86_64 Apache-2.0 localhost" {
		t.Errorf("the package is %q", got)
	}
	if got := query("--configfiles"); got != "/etc/migrated/migrated.yaml" {
		t.Errorf("configuration files are %q", got)
	}
	for line := range strings.Lines(query("--queryformat", "[%{FILEUSERNAME}:%{FILEGROUPNAME} %{FILENAMES}\n]")) {
		// A directory that the distribution has would belong to another package, too.
		owner, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		if owner != "root:root" || !strings.Contains(name, "migrated") {
			t.Errorf("it has %s", line)
		}
	}
	// Not rpm2cpio, because its archive has absolute paths.
	const unpack = `rpm2archive - <"$2" | tar --extract --gzip --directory="$1"`
	run(t, "bash", "-o", "pipefail", "-c", unpack, "bash", root, path)
}

// checkUnpacked checks the files of an unpacked package.
func checkUnpacked(t *testing.T, root string) {
	t.Helper()
	if got, err := os.ReadFile(root + "/usr/share/migrated/version"); err != nil || string(got) != "1.2.0~rc1\n" {
		t.Errorf("the version is %q, %v", got, err)
	}
	said := run(t, root+"/usr/bin/migrated", "--help")
	if !strings.Contains(said, "post-copy") {
		t.Errorf("migrated --help: %s", said)
	}
	if out, err := exec.CommandContext(t.Context(), "ldd", root+"/usr/bin/migrated").CombinedOutput(); err == nil {
		t.Errorf("it is no static binary: %s", out)
	}
	// Each command has its page, and the pages can be formatted (cmd/migrated has more about them).
	pages, err := filepath.Glob(root + "/usr/share/man/man1/*.1.gz")
	if err != nil || len(pages) < 15 {
		t.Errorf("there are %d manual pages (%v)", len(pages), err)
	}
	if text := run(
		t, "man", "--local-file", root+"/usr/share/man/man1/migrated.1.gz",
	); !strings.Contains(text, "SYNOPSIS") {
		t.Errorf("the manual page is %q", text)
	}
	zsh, err := filepath.Glob(root + "/usr/share/zsh/*/_migrated")
	if err != nil || len(zsh) != 1 {
		t.Fatalf("completions for zsh: %v, %v", zsh, err)
	}
	t.Setenv("PATH", root+"/usr/bin:"+os.Getenv("PATH"))
	for shell, ask := range map[string]string{
		"bash": `source "$0"/usr/share/bash-completion/completions/migrated; complete -p migrated`,
		"zsh": `fpath=(` + filepath.Dir(zsh[0]) + ` $fpath); autoload -Uz compinit; compinit -D -u
			print $_comps[migrated]`,
		"fish": `source ` + root + `/usr/share/fish/vendor_completions.d/migrated.fish; complete -C "migrated mi"`,
	} {
		if said := run(t, shell, "-c", ask, root); !strings.Contains(said, "migrat") {
			t.Errorf("%s completes migrated by %q", shell, said)
		}
	}
}

// TestMaintainerScripts: a script that dpkg calls after something went wrong, or for another version's sake, changes
// nothing. The tests of package e2e cover the other calls.
func TestMaintainerScripts(t *testing.T) {
	for _, name := range []string{"preinst", "postinst", "prerm", "postrm"} {
		path := filepath.Join(checkout, "deploy/packages", name)
		for _, args := range [][]string{{"abort-upgrade", "1.0"}, {"abort-remove"}, {"failed-upgrade", "1.0"}} {
			cmd := exec.CommandContext(t.Context(), "/bin/sh", append([]string{path}, args...)...)
			cmd.Env = []string{"PATH=/nowhere"}
			if out, err := cmd.CombinedOutput(); err != nil || len(out) != 0 {
				t.Errorf("%s %v: %v\n%s", name, args, err, out)
			}
		}
	}
}

// TestUnit: the unit is valid, and systemd rates it at most 4.0. A service without limits has 10.
func TestUnit(t *testing.T) {
	dir := t.TempDir()
	unit, err := os.ReadFile(filepath.Join(checkout, "deploy/migrated.service"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "migrated.service")
	// The program and its documentation are not installed here.
	there := strings.NewReplacer("/usr/bin/migrated", "/bin/true", "file:///usr/share/doc/migrated", "file://"+dir)
	err = errors.Join(os.WriteFile(path, []byte(there.Replace(string(unit))), 0o600),
		os.WriteFile(filepath.Join(dir, "README.md"), nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("", run(t, "systemd-analyze", "verify", path)); diff != "" {
		t.Errorf("systemd-analyze verify (-want +got):\n%s", diff)
	}
	run(t, "systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=40", path)
	// It is also valid with the further privileges that a QEMU may need.
	more := path + ".d"
	if err := os.MkdirAll(more, 0o755); err != nil {
		t.Fatal(err)
	}
	drop, err := os.ReadFile(filepath.Join(checkout, "deploy/more-privileges.conf"))
	if err == nil {
		err = os.WriteFile(filepath.Join(more, "more-privileges.conf"), drop, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if said := run(t, "systemd-analyze", "verify", path); said != "" {
		t.Errorf("with more-privileges.conf: %s", said)
	}
}
