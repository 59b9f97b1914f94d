// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/checkout"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/packages"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// becomeInstallable gives a host private copies of /usr, /etc and the package lists and caches. They begin as the
// machine's, without migrated's configuration.
const becomeInstallable = `
mkdir -p /run/layers
mount -t tmpfs tmpfs /run/layers
for dir in usr etc var/lib var/cache; do
	mkdir -p /run/layers/$dir/upper /run/layers/$dir/work
	mount -t overlay -o "lowerdir=/$dir,upperdir=/run/layers/$dir/upper,workdir=/run/layers/$dir/work" overlay "/$dir"
done
rm -rf /etc/migrated
mkdir -p /run/systemd/system/migrated.service.d
cd /run/systemd/system
printf '[Unit]\nDefaultDependencies=no\n' | tee network-online.target >migrated.service.d/lab.conf
`

// older and newer are the versions of the packages. A release candidate is older than its release.
const older, newer = "1.1.0-rc1", "1.1.0"

// packaged is a host with systemd, on which migrated is installed from a package.
type packaged struct {
	*testing.T
	host            *lab.Host
	made            map[string]string // paths of the packages, by version
	install, remove []string          // commands; a package's path follows install
}

// newPackaged makes the packages of both versions and prepares the host. It installs none.
func newPackaged(t *testing.T, h *lab.Host, format string, install, remove []string) *packaged {
	t.Helper()
	root, err := checkout.Root()
	if err != nil {
		t.Fatal(err)
	}
	p := &packaged{T: t, host: h, made: map[string]string{}, install: install, remove: remove}
	for _, version := range []string{older, newer} {
		if p.made[version], err = packages.Make(testContext(t), root, t.TempDir(), version, format); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Run(testContext(t), "sh", "-ec", becomeInstallable); err != nil {
		t.Fatal(err)
	}
	startSystemd(t, h)
	return p
}

// do runs a command, mostly of the package manager. It returns the output and whether the command succeeded.
func (p *packaged) do(command ...string) (said string, done bool) {
	p.Helper()
	out, err := p.host.Command(testContext(p.T), command...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.Fatal(err)
	}
	return string(out), err == nil
}

func (p *packaged) installs(version string) (said string, done bool) {
	p.Helper()
	return p.do(append(p.install, p.made[version])...)
}

// mustInstall installs a version. It checks that this restarted the daemon if restarts is true, and not otherwise.
func (p *packaged) mustInstall(version string, restarts bool) (said string) {
	p.Helper()
	before := p.daemon()
	said, done := p.installs(version)
	if !done {
		p.Fatalf("host %s: %s is not installed: %s", p.host.Name, version, said)
	}
	if after := p.daemon(); after == "0" != (before == "0") || (after != before) != restarts {
		p.Errorf("host %s: installing %s, the daemon was process %s and is %s: %s", p.host.Name, version, before, after, said)
	}
	return said
}

// refuses checks that a command was refused with the wanted reason, named the migration, and did not restart the
// daemon.
func (p *packaged) refuses(want, said string, done bool, daemon string) {
	p.Helper()
	if done || !strings.Contains(said, want) || !strings.Contains(said, "under way on this host: packaged (postcopy-") {
		p.Errorf("host %s: %q is missing in: %s", p.host.Name, want, said)
	}
	if now := p.daemon(); now != daemon {
		p.Errorf("host %s: the daemon was process %s and is %s: %s", p.host.Name, daemon, now, said)
	}
}

// daemon returns the pid of the daemon, or "0" if it does not run.
func (p *packaged) daemon() string {
	p.Helper()
	return unitProperty(p.T, p.host, "MainPID")
}

// configure does what an operator does after the first installation.
func (p *packaged) configure() {
	p.Helper()
	path := p.host.Path("/etc/migrated/migrated.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		p.Fatal(err)
	}
	text = []byte(strings.NewReplacer(
		"listen: 127.0.0.1:7600", "listen: "+p.host.DaemonAddr(), "plaintext: false", "plaintext: true",
		"min_uid: 1", "min_uid: 0", `socket_group: ""`, "socket_group: migrated",
	).Replace(string(text)))
	if err := os.WriteFile(path, text, 0o644); err != nil {
		p.Fatal(err)
	}
	if err := os.WriteFile(p.host.Path("/etc/migrated/tls/key.pem"), nil, 0o600); err != nil {
		p.Fatal(err)
	}
	systemctl(p.T, p.host, "enable", "--now", "migrated")
}

// awaitIdle waits until no migration is under way on the host.
func (p *packaged) awaitIdle() {
	p.Helper()
	eventually(p.T, func() error {
		if said, idle := p.do("migrated", "idle"); !idle {
			return fmt.Errorf("host %s is not idle: %s", p.host.Name, said)
		}
		return nil
	})
}

// exists reports whether the host has a file.
func (p *packaged) exists(path string) bool {
	_, err := os.Lstat(p.host.Path(path))
	return err == nil
}

// TestPackagesMeanwhile installs migrated as a package, on one host as a deb and on the other as an rpm. During the
// migration of a VM, an upgrade is possible, but a downgrade and a removal are refused. After the migration, all of
// them are possible, and the VM continues without migrated.
func TestPackagesMeanwhile(t *testing.T) {
	t.Parallel()
	for _, needed := range []string{"dpkg", "rpm"} {
		if _, err := exec.LookPath(needed); err != nil {
			testenv.CannotRun(t, "%v", err)
		}
	}
	l := newHosts(t)
	// --nodeps: the rpm database does not know Debian's packages.
	a := newPackaged(t, l.A, "deb",
		[]string{"dpkg", "--force-unsafe-io", "--install"}, []string{"dpkg", "--remove", "migrated"})
	b := newPackaged(t, l.B, "rpm",
		[]string{"rpm", "--upgrade", "--nodeps", "--oldpackage"}, []string{"rpm", "--erase", "--nodeps", "migrated"})
	both := []*packaged{a, b}
	for _, p := range both {
		if said := p.mustInstall(older, false); !strings.Contains(said, "nothing was started") {
			t.Errorf("host %s: installation says: %s", p.host.Name, said)
		}
		if out, _ := p.do("systemctl", "is-enabled", "migrated"); strings.TrimSpace(out) != "disabled" {
			t.Errorf("host %s: the unit is %s", p.host.Name, out)
		}
		if out, ok := p.do("systemd-analyze", "verify", "migrated.service"); !ok ||
			strings.Contains(out, "migrated.service") {
			t.Errorf("host %s: systemd-analyze verify: %s", p.host.Name, out)
		}
		p.configure()
		out, _ := p.do("stat", "--format=%a %U:%G",
			"/run/migrated", "/var/log/migrated", lab.DaemonSocket, "/etc/migrated/tls")
		if out != "755 root:root\n750 root:root\n660 root:migrated\n700 root:root\n" {
			t.Errorf("host %s: modes and owners are\n%s", p.host.Name, out)
		}
	}

	s := largeScene(t, l, 1)
	s.moveHalfway("packaged")
	for _, p := range both {
		said := p.mustInstall(newer, false)
		if !strings.Contains(said, "the daemon of the version before goes on") {
			t.Errorf("host %s: the upgrade says: %s", p.host.Name, said)
		}
		daemon := p.daemon()
		said, done := p.installs(older)
		p.refuses("version 1.1.0~rc1 is older than 1.1.0", said, done, daemon)
		said, done = p.do(p.remove...)
		p.refuses("is not removed while a migration is under way", said, done, daemon)
		if out, ok := p.do("migrated", "idle"); ok {
			t.Errorf("host %s is said to be idle: %s", p.host.Name, out)
		}
	}
	systemctl(t, l.B, "restart", "migrated")
	s.cable(true)
	completed(t, awaitEnd(t, control(t, l.A), "packaged"))
	s.arrived()
	// QEMU has the seccomp filter of the unit, but may still execute a program that gains privileges.
	status := statusOf(t, fmt.Sprintf("/proc/%d", qemuOn(t, l.B)))
	if status["Seccomp"] != "2" || status["NoNewPrivs"] != "0" {
		t.Errorf("QEMU has seccomp %s and no_new_privs %s", status["Seccomp"], status["NoNewPrivs"])
	}

	for _, p := range both {
		p.awaitIdle()
		p.mustInstall(older, true)
		p.mustInstall(newer, true)
		if said, done := p.do(p.remove...); !done || p.daemon() != "0" {
			t.Errorf("host %s: it is not removed: %s", p.host.Name, said)
		}
		for path, want := range map[string]bool{
			"/usr/bin/migrated": false, "/etc/systemd/system/multi-user.target.wants/migrated.service": false,
			"/run/migrated": true,
		} {
			if p.exists(path) != want {
				t.Errorf("host %s: migrated is removed, and %s is there: %v", p.host.Name, path, !want)
			}
		}
	}
	if !a.exists("/etc/migrated/migrated.yaml") || !b.exists("/etc/migrated/migrated.yaml.rpmsave") {
		t.Error("what was configured is gone")
	}
	if said, done := a.do("dpkg", "--purge", "migrated"); !done || !strings.Contains(said, "/etc/migrated/tls stays") {
		t.Errorf("purge says %s", said)
	}
	for path, want := range map[string]bool{
		"/etc/migrated/migrated.yaml": false, "/var/log/migrated": false,
		"/etc/migrated/tls/key.pem": true, "/run/migrated": true,
	} {
		if a.exists(path) != want {
			t.Errorf("migrated is purged, and %s is there: %v", path, !want)
		}
	}
	goesOn(t, l.B)
	s.arrived()
}
