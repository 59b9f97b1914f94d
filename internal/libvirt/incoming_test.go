// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"strings"
	"testing"
)

const plain = `<domain type="kvm"><name>db</name>` +
	`<devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>`

// TestIncoming: asItStarts removes what withIncoming has added, and keeps arguments of the domain's owner.
func TestIncoming(t *testing.T) {
	own := strings.Replace(plain, `<domain `, `<domain xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0" `, 1)
	own = strings.Replace(own, `</domain>`,
		`<qemu:commandline><qemu:arg value="-incoming"/><qemu:arg value="tcp:0:1"/></qemu:commandline></domain>`, 1)
	for name, definition := range map[string]string{"plain": plain, "with arguments of its owner's": own} {
		waits, err := withIncoming(definition)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(waits, `<qemu:arg value="-incoming"/><qemu:arg value="defer"/></qemu:commandline>`) ||
			strings.Count(waits, "xmlns:qemu=") != 1 || strings.Count(waits, "<qemu:commandline>") != 1 {
			t.Errorf("%s: %s", name, waits)
		}
		back, err := asItStarts(waits, definition)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(back, "defer") || strings.Contains(back, "tcp:0:1") != strings.Contains(definition, "tcp:0:1") ||
			strings.Contains(back, "qemu:commandline") != strings.Contains(definition, "qemu:commandline") {
			t.Errorf("%s: %s", name, back)
		}
	}
	for _, bad := range []string{"", "<network/>", "<domain>"} {
		if _, err := withIncoming(bad); err == nil {
			t.Errorf("%q is taken for a domain", bad)
		}
	}
}
