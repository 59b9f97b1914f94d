// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
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

// TestLimit: a definition from another host that would give it more than a VM is refused.
func TestLimit(t *testing.T) {
	refused := errors.New("that binary is not started here")
	limit := Limit{MayRun: func(binary string) error {
		if binary != "/usr/bin/qemu-system-x86_64" {
			return refused
		}
		return nil
	}}
	insert := func(before, text string) string { return strings.Replace(plain, before, text+before, 1) }
	for name, c := range map[string]struct{ definition, want string }{
		"a VM":          {plain, ""},
		"its own label": {insert("</domain>", `<seclabel type="dynamic" model="selinux"/>`), ""},
		"another binary": {
			strings.Replace(plain, "/usr/bin/qemu-system-x86_64", "/tmp/evil", 1), refused.Error(),
		},
		"no binary": {strings.Replace(plain, "emulator>", "nothing>", 2), "names no emulator"},
		"arguments": {
			insert("</domain>", `<qemu:commandline xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0"/>`),
			"<qemu:commandline>",
		},
		"a script": {
			insert("</devices>", `<interface type="ethernet"><script path="/tmp/evil"/></interface>`), "as root",
		},
		"no confinement": {insert("</domain>", `<seclabel type="none" model="selinux"/>`), "how QEMU is confined"},
		"a label of its choice": {
			insert("</domain>", `<seclabel type="static" model="selinux"><label>u:r:t:s0</label></seclabel>`),
			"how QEMU is confined",
		},
		"another user": {
			insert("</domain>", `<seclabel model="dac" relabel="no"><label>+0:+0</label></seclabel>`), "whom QEMU runs as",
		},
	} {
		err := limit.Check(c.definition)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	limit.Root = true
	if err := limit.Check(insert("</domain>", `<seclabel model="dac"/>`)); err != nil {
		t.Errorf("where every user is allowed: %v", err)
	}
}
