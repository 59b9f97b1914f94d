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
	"github.com/migrated-vm/migrated/e2e/lab"
)

// becomeFresh gives a host directories of its own for what an operator installs, and a systemctl that starts the daemon
// as the unit does: there is no systemd on it.
const becomeFresh = `
for dir in /usr/local/bin /etc/migrated; do
	mkdir -p "$dir"
	mount -t tmpfs -o mode=0755 tmpfs "$dir"
done
cp "$1" /usr/local/bin/migrated
cat >/usr/local/bin/systemctl <<'end'
#!/bin/sh
[ "$*" = 'enable --now migrated' ] || exit 1
setsid /usr/local/bin/migrated serve >/run/vm/migrated.log 2>&1 </dev/null &
echo $! >/run/vm/migrated.pid
until [ -S /run/migrated/migrated.sock ]; do sleep 0.1; kill -0 $! || exit 1; done
end
chmod 755 /usr/local/bin/systemctl
`

var tutorialCommand = regexp.MustCompile(`(?m)^host-([ab])# (.*)$`)

// TestLibvirtTutorial runs the commands of docs/libvirt-tutorial.md on two hosts with libvirt, of which one runs a
// domain.
func TestLibvirtTutorial(t *testing.T) {
	t.Parallel()
	binary, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	root, err := checkout.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "libvirt-tutorial.md"))
	if err != nil {
		t.Fatal(err)
	}
	commands := tutorialCommand.FindAllStringSubmatch(string(text), -1)
	if len(commands) < 10 {
		t.Fatalf("the tutorial has %d commands", len(commands))
	}
	l := newHosts(t)
	startLibvirt(t, l)
	for _, h := range []*lab.Host{l.A, l.B} {
		if _, err := h.Run(testContext(t), "sh", "-ec", becomeFresh, "sh", binary); err != nil {
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
	for _, c := range commands {
		h := map[string]*lab.Host{"a": l.A, "b": l.B}[c[1]]
		began := time.Now()
		out, err := h.Run(testContext(t), "sh", "-ec", c[2])
		t.Logf("host-%s# %s\n%s%v", c[1], c[2], out, time.Since(began).Round(time.Millisecond))
		if err != nil {
			t.Fatal(err)
		}
		if want, told := says[c[2]]; told && strings.TrimSpace(out) != want {
			t.Errorf("%s says %q, want %q", c[2], out, want)
		}
	}
	port = worksAt(t, l.A, &guest)
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// endDaemon ends the daemon that a host's systemctl has started, if it has.
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
