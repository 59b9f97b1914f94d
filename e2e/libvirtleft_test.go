// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestLibvirtDomainThere: what is left at the destination of an attempt whose daemon was killed is named, with what to do
// about it, and not touched.
func TestLibvirtDomainThere(t *testing.T) {
	l := newLab(t)
	startLibvirt(t, l)
	var guest report.Log
	if err := runDomain(t, l.A, domainVM(t), false, &guest).Close(); err != nil {
		t.Fatal(err)
	}
	const left = `<domain type='qemu'><name>` + lab.DomainName + `</name><memory unit='MiB'>32</memory>` +
		`<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>`
	if err := l.B.VirshXML(testContext(t), left, "create", "--paused"); err != nil {
		t.Fatal(err)
	}
	out, code := operate(t, l.A, "migrate", "--vm", lab.DomainVM, "--to", l.B.DaemonAddr())
	if code == 0 || !strings.Contains(out, "virsh destroy "+lab.DomainName) {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	awaitDomain(t, l.A, "running")
	awaitDomain(t, l.B, "paused")
}
