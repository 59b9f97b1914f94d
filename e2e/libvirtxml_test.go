// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// labHook is a hook in the form of libvirt's hooks. It records its arguments on its host and sets another title for the
// domain. It fails if it is called for another domain or operation.
const labHook = `#!/bin/sh
echo "$@" >>/run/vm/hook.log
case $1:$2:$3 in
guest:migrate:begin) sed 's|<title>[a-z]*</title>|<title>of the hook</title>|' ;;
*) echo 'no room for it' >&2; exit 1 ;;
esac
`

// TestLibvirtDefinition moves a domain by the command line, with the operator's definition for the destination, which a
// hook there changes again. The destination's libvirt listens at another socket than usual. check and migrate refuse
// the definition of another domain, that of another machine, and one that is no XML.
func TestLibvirtDefinition(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	const socket, hook = "/run/libvirt-elsewhere", lab.VMDir + "/hook"
	for _, h := range l.Hosts() {
		if err := os.WriteFile(h.Path(hook), []byte(labHook), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	startDaemon(t, l.A, "--libvirt-hook", hook)
	startDaemon(t, l.B, "--libvirt-hook", hook, "--libvirt-socket", socket)
	startLibvirt(t, l)
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
	if err := os.Chown(l.B.Path(lab.VMDir), 0, 0); err != nil { // only root may change the hook
		t.Fatal(err)
	}
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.B.Run(testContext(t), "mv", lab.LibvirtSocket, socket); err != nil {
		t.Fatal(err)
	}
	definition := virsh(t, l.A, "dumpxml", "--migratable", "--security-info", lab.DomainName)
	file := func(change func(string) string) string {
		const path = lab.VMDir + "/given.xml"
		if err := os.WriteFile(l.A.Path(path), []byte(change(definition)), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, refused := range []struct {
		name, words string
		change      func(string) string
	}{
		{"another domain", `its <name> is "other"`, func(d string) string {
			return strings.Replace(d, "<name>"+lab.DomainName+"</name>", "<name>other</name>", 1)
		}},
		{"another machine", "vga.vram", func(d string) string {
			return strings.Replace(d, "<model type='vga' vram='16384'", "<model type='vga' vram='32768'", 1)
		}},
		{"no XML", "definition of a domain", func(string) string { return "<domain>" }},
	} {
		t.Run(refused.name, func(t *testing.T) {
			xml := file(refused.change)
			for _, command := range []string{"check", "migrate"} {
				out, code := operate(t, l.A, command, "--vm", lab.DomainVM, "--to", l.B.DaemonAddr(), "--xml", xml)
				t.Logf("%s: %d\n%s", command, code, out)
				if code == 0 || !strings.Contains(out, refused.words) {
					t.Errorf("%s: exit code %d:\n%s", command, code, out)
				}
			}
			awaitDomain(t, l.A, "running")
		})
	}
	titled := file(func(d string) string { return strings.Replace(d, "</uuid>", "</uuid><title>operator</title>", 1) })
	out, code := operate(t, l.A, "migrate", "--vm", "libvirt+unix:///"+lab.DomainName+"?socket="+lab.LibvirtSocket,
		"--to", l.B.DaemonAddr(), "--xml", titled)
	if code != 0 {
		t.Fatalf("migrate: exit code %d:\n%s", code, out)
	}
	if _, err := l.B.Run(testContext(t), "mv", socket, lab.LibvirtSocket); err != nil {
		t.Fatal(err)
	}
	if title := virsh(t, l.B, "desc", "--title", lab.DomainName); title != "of the hook" {
		t.Errorf("the domain's title is %q", title)
	}
	said, err := os.ReadFile(l.B.Path(lab.VMDir + "/hook.log"))
	if err != nil || !strings.HasSuffix(string(said), lab.DomainName+" migrate begin -\n") {
		t.Errorf("the hook was called with %q, %v", said, err)
	}
	awaitDomain(t, l.A, "")
	port = checkGuestAt(t, l.B, &guest)
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}
