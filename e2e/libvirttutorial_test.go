// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/checkout"
	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/guide"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// becomeInstalled is a script that gives a host a private /usr and private directories for what an operator installs.
// It copies the program $1 to $2 and the unit $3 to the directory $4. Its systemctl starts what the unit says: there is
// no systemd on the host.
const becomeInstalled = `
mkdir -p /run/layers
mount -t tmpfs tmpfs /run/layers
mkdir -p /run/layers/upper /run/layers/work
mount -t overlay -o lowerdir=/usr,upperdir=/run/layers/upper,workdir=/run/layers/work overlay /usr
for dir in /etc/migrated /etc/systemd/system; do
	mkdir -p "$dir"
	mount -t tmpfs -o mode=0755 tmpfs "$dir"
done
cp "$1" "$2"
cp "$3" "$4"
cat >/usr/local/bin/systemctl <<'end'
#!/bin/sh
[ "$*" = 'enable --now migrated' ] || exit 1
setsid $(sed -n 's/^ExecStart=//p' /etc/systemd/system/migrated.service) >/run/vm/migrated.log 2>&1 </dev/null &
echo $! >/run/vm/migrated.pid
until [ -S /run/migrated/migrated.sock ]; do sleep 0.1; kill -0 $! || exit 1; done
end
chmod 755 /usr/local/bin/systemctl
`

// installedBy finds in the tutorial where the program and the unit are copied to.
var installedBy = regexp.MustCompile(
	"copy `build/migrated` to `(.*)` and\n`(deploy/migrated.service)` to `(.*)` of both hosts")

// TestLibvirtTutorial runs the commands of docs/libvirt-tutorial.md on two hosts with libvirt. Host a runs a domain.
func TestLibvirtTutorial(t *testing.T) {
	t.Parallel()
	binary, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	page, err := guide.Read("docs/libvirt-tutorial.md")
	blocks := blocksOf(t, page, err)
	root, err := checkout.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs/libvirt-tutorial.md"))
	if err != nil {
		t.Fatal(err)
	}
	to := installedBy.FindStringSubmatch(string(text))
	if to == nil {
		t.Fatal("the tutorial does not say where the program and the unit are copied to")
	}
	l := newHosts(t)
	startLibvirt(t, l)
	for _, h := range l.Hosts() {
		if _, err := h.Run(testContext(t), "sh", "-ec", becomeInstalled, "sh",
			binary, to[1], filepath.Join(root, to[2]), to[3]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { endDaemon(t, h) })
	}
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), true, &guest)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	says := map[string]string{ // as the tutorial tells
		"virsh list --all --persistent --name": lab.DomainName, "virsh list --all --name": "",
		"virsh domstate " + lab.DomainName: "running",
	}
	typed := make(map[string]bool) // of says
	for _, b := range blocks {
		for _, c := range b.Commands() {
			out := runTyped(t, l, c)
			want, told := says[c.Text]
			if told && strings.TrimSpace(out) != want {
				t.Errorf("%s says %q, want %q", c.Text, out, want)
			}
			if told {
				typed[c.Text] = true
			}
		}
	}
	for text := range says {
		if !typed[text] {
			t.Errorf("docs/libvirt-tutorial.md has no command %q", text)
		}
	}
	port = checkGuestAt(t, l.A, &guest)
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// runTyped runs a command of the documentation on the host that it names, and returns its standard output. The command
// must succeed.
func runTyped(t *testing.T, l *lab.Lab, c guide.Command) string {
	t.Helper()
	h := map[string]*lab.Host{"host-a": l.A, "host-b": l.B}[c.Host]
	if h == nil {
		t.Fatalf("%q names no host", c.Text)
	}
	began := time.Now()
	cmd := h.Command(testContext(t), "sh", "-ec", c.Text)
	cmd.WaitDelay = time.Second // processes that it started may keep its output open
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	t.Logf("%s# %s\n%s%s%v", c.Host, c.Text, out, stderr.String(), time.Since(began).Round(time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// endDaemon ends the daemon that a host's systemctl has started, if there is one.
func endDaemon(t *testing.T, h *lab.Host) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	const end = `[ ! -e /run/vm/migrated.pid ] || {
	p=$(cat /run/vm/migrated.pid); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.1; done
}`
	if _, err := h.Run(ctx, "sh", "-c", end); err != nil {
		t.Error(err)
	}
	if t.Failed() {
		log, err := os.ReadFile(h.Path("/run/vm/migrated.log"))
		t.Logf("daemon of host %s, %v:\n%s", h.Name, err, log)
	}
}
