// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/checkout"
	"github.com/migrated-vm/migrated/e2e/guide"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/packages"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// blocksOf returns the blocks of a page that the test runs.
func blocksOf(t *testing.T, page guide.Page, err error) []guide.Block {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := page.RunBy(t.Name())
	if err != nil {
		t.Fatal(err)
	}
	return blocks
}

// makeInstallable prepares the hosts for the installation of a package, and starts systemd on them. dir has a deb of
// the program.
func makeInstallable(t *testing.T, l *lab.Lab) (dir string) {
	t.Helper()
	for _, needed := range []string{"apt", "dpkg"} {
		if _, err := exec.LookPath(needed); err != nil {
			testenv.CannotRun(t, "%v", err)
		}
	}
	root, err := checkout.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	if _, err := packages.Make(testContext(t), root, dir, newer, "deb"); err != nil {
		t.Fatal(err)
	}
	for _, h := range l.Hosts() {
		if _, err := h.Run(testContext(t), "sh", "-ec", becomeInstallable); err != nil {
			t.Fatal(err)
		}
		startSystemd(t, h)
	}
	return dir
}

// inDir returns the command, preceded by a change to the directory.
func inDir(dir string, c guide.Command) guide.Command {
	c.Text = "cd " + dir + "\n" + c.Text
	return c
}

// copyOver is an scp that knows the lab's hosts: their files are at the paths in $A and $B.
const copyOver = `#!/bin/sh
for to; do :; done
case $to in
root@10.77.0.1:*) root=$A ;;
root@10.77.0.2:*) root=$B ;;
*) exit 1 ;;
esac
while [ $# -gt 1 ]; do
	cp "$1" "$root/${to#*:}"
	shift
done
`

// TestTutorial runs the commands of docs/tutorial.md on two hosts with apt, from the installation of the package to the
// VM that has moved there and back.
func TestTutorial(t *testing.T) {
	t.Parallel()
	page, err := guide.Read("docs/tutorial.md")
	blocks := blocksOf(t, page, err)
	l := newHosts(t)
	dir := makeInstallable(t, l)
	// Commands without a host, such as those that make the certificates, run on this machine.
	binary, err := lab.Binary()
	if err == nil {
		err = errors.Join(
			os.Symlink(binary, filepath.Join(dir, "migrated")), os.WriteFile(filepath.Join(dir, "scp"), []byte(copyOver), 0o755),
		)
	}
	if err != nil {
		t.Fatal(err)
	}
	letters := map[string]string{} // by the command that shows them
	for _, b := range blocks {
		for _, c := range b.Commands() {
			switch c.Host {
			case "":
				sh := exec.CommandContext(testContext(t), "sh", "-ec", c.Text)
				sh.Dir = dir
				sh.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "A="+l.A.Path("/"), "B="+l.B.Path("/"))
				if out, err := sh.CombinedOutput(); err != nil {
					t.Fatalf("$ %s: %v\n%s", c.Text, err, out)
				}
			case "both-hosts":
				for _, host := range []string{"host-a", "host-b"} {
					runTyped(t, l, guide.Command{Host: host, Text: c.Text})
				}
			default:
				letters[c.Text] = runTyped(t, l, inDir(dir, c))
			}
		}
	}
	const last, first = "tail -c 1 /run/vm/letters", "head -c 1 /run/vm/letters"
	if a, b := letters[last], letters[first]; len(a) != 1 || len(b) != 1 ||
		a[0] < 'a' || a[0] > 'z' || b[0] != 'a'+(a[0]-'a'+1)%26 {
		t.Errorf("host a ends with %q, and host b begins with %q", a, b)
	}
	report, err := os.ReadFile(l.B.Path("/run/vm/back.html"))
	if err != nil || !strings.Contains(string(report), "Migration back") {
		t.Errorf("the report is %q, %v", report, err)
	}
	for _, h := range l.Hosts() {
		awaitNoQEMU(t, h)
	}
}

// TestDeployGuide installs migrated as deploy/README.md says: on one host the package, on the other by hand.
func TestDeployGuide(t *testing.T) {
	t.Parallel()
	page, err := guide.Read("deploy/README.md")
	blocks := blocksOf(t, page, err)
	l := newHosts(t)
	dir := makeInstallable(t, l)
	root, err := checkout.Root()
	if err != nil {
		t.Fatal(err)
	}
	// The files for the installation by hand, and an editor that changes the configuration by itself.
	const editor = "#!/bin/sh\nsed -i 's/^log_level: .*/log_level: debug/' \"$1\"\n"
	err = errors.Join(os.Symlink(filepath.Join(root, "deploy"), filepath.Join(dir, "deploy")),
		os.Symlink(filepath.Join(root, "build/migrated"), filepath.Join(dir, "migrated")),
		os.WriteFile(l.A.Path("/usr/local/bin/editor"), []byte(editor), 0o755))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blocks {
		for _, c := range b.Commands() {
			runTyped(t, l, inDir(dir, c))
		}
	}
	for _, h := range l.Hosts() {
		if state := unitProperty(t, h, "ActiveState"); state != "active" {
			t.Errorf("the daemon of host %s is %s", h.Name, state)
		}
	}
	completion, err := os.ReadFile(l.B.Path("/usr/share/bash-completion/completions/migrated"))
	if err != nil || !strings.Contains(string(completion), "complete -C") {
		t.Errorf("the completion is %q, %v", completion, err)
	}
}

// withProgram is a script that gives a host private directories for what an operator installs, and copies the program
// $1 to one of them.
const withProgram = `
for dir in /usr/local/bin /etc/migrated; do
	mkdir -p "$dir"
	mount -t tmpfs -o mode=0755 tmpfs "$dir"
done
cp "$1" /usr/local/bin/migrated
`

// TestManual runs the commands of README.md, and those of docs/migrating.md, which describes the same in more detail.
// The daemons are started by hand, with certificates, and the VM belongs to an ordinary user.
func TestManual(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	binary, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	made := filepath.Join(t.TempDir(), "pki")
	pki := func(args ...string) {
		t.Helper()
		args = append(append([]string{"pki"}, args...), "--dir", made)
		if out, err := exec.CommandContext(testContext(t), binary, args...).CombinedOutput(); err != nil {
			t.Fatalf("migrated %v: %v\n%s", args, err, out)
		}
	}
	pki("init")
	addresses := map[*lab.Host]string{l.A: "192.0.2.1", l.B: "192.0.2.2"}
	for h, address := range addresses {
		name := "host-" + h.Name
		pki("issue", name, "--address", address)
		const prepare = `ip address add "$2/24" dev cable; mkdir -p /etc/migrated/tls; cp "$3"/*.pem /etc/migrated/tls`
		if _, err := h.Run(
			testContext(t), "sh", "-ec", withProgram+prepare, "sh", binary, address, filepath.Join(made, name),
		); err != nil {
			t.Fatal(err)
		}
	}
	s := sceneOf(t, l, lab.VMConfig{Unprivileged: true})
	for _, read := range []func() (guide.Page, error){
		func() (guide.Page, error) { return guide.Read("README.md") },
		func() (guide.Page, error) { return guide.Read("docs/migrating.md") },
	} {
		page, err := read()
		var daemons []*lab.Process
		for _, b := range blocksOf(t, page, err) {
			c := b.Commands()[0]
			if !strings.HasPrefix(c.Text, "migrated serve ") {
				runTyped(t, l, c)
				continue
			}
			for h, address := range addresses { // "on each host, with the certificate of that host"
				daemons = append(daemons, serveByHand(t, h, strings.Replace(c.Text, "192.0.2.1", address, 1)))
			}
		}
		s.arrived()
		// The VM moves back for the next page.
		runTyped(t, l, guide.Command{Host: "host-b", Text: "migrated migrate --vm " + lab.QMPPath + " --to 192.0.2.1"})
		for _, d := range daemons {
			mustKill(t, d)
		}
	}
}

// serveByHand starts a daemon as an operator does in a terminal, and waits until it answers.
func serveByHand(t *testing.T, h *lab.Host, command string) *lab.Process {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "daemon-"+h.Name)
	if err != nil {
		t.Fatal(err)
	}
	p, err := h.Start(log, "sh", "-ec", "exec "+command)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			text, err := os.ReadFile(log.Name())
			t.Logf("daemon of host %s, %v:\n%s", h.Name, err, text)
		}
	})
	eventually(t, func() error {
		conn, err := net.Dial("unix", h.Path(lab.DaemonSocket))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	return p
}

// nameHosts gives a host an /etc/hosts with the names and addresses of others.
func nameHosts(t *testing.T, h *lab.Host, hosts map[string]string) {
	t.Helper()
	var file strings.Builder
	file.WriteString("127.0.0.1 localhost\n")
	for name, address := range hosts {
		file.WriteString(address + " " + name + "\n")
	}
	const write = `printf %s "$1" >/run/hosts; mount --bind /run/hosts /etc/hosts`
	if _, err := h.Run(testContext(t), "sh", "-ec", write, "sh", file.String()); err != nil {
		t.Fatal(err)
	}
}

// TestEvacuateGuide runs the commands of docs/evacuate.md on a host with VMs, one of which is started in between. At
// the end all VMs run on the other hosts, and their memory is right.
func TestEvacuateGuide(t *testing.T) {
	t.Parallel()
	page, err := guide.Read("docs/evacuate.md")
	blocks := blocksOf(t, page, err)
	l := newHosts(t)
	c, err := l.AddHost(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	binary, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.A.Run(testContext(t), "sh", "-ec", withProgram, "sh", binary); err != nil {
		t.Fatal(err)
	}
	nameHosts(t, l.A, map[string]string{"host-b": l.B.Addr, "host-c": c.Addr})
	for _, h := range []*lab.Host{l.A, l.B, c} {
		startDaemon(t, h)
	}
	vms := startSmall(t, l, "web", "db")
	for _, b := range blocks {
		if strings.Contains(b.Text, "--id new-kernel") {
			vms = append(vms, startSmall(t, l, "mail")...)
		}
		for _, command := range b.Commands() {
			runTyped(t, l, command)
		}
	}
	at := map[*lab.Host]int{}
	for _, vm := range vms {
		for _, h := range []*lab.Host{l.A, l.B, c} {
			if client, err := vm.ask(testContext(t), h); err == nil {
				at[h]++
				if err := client.Disconnect(); err != nil {
					t.Error(err)
				}
				vm.verify(t, h)
			}
		}
	}
	if at[l.A] != 0 || at[l.B]+at[c] != len(vms) || at[c] == 0 {
		t.Errorf("of %d VMs %d are at host a, %d at b, %d at c", len(vms), at[l.A], at[l.B], at[c])
	}
}
