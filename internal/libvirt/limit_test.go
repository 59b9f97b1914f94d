// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

const (
	ofQEMU = ` xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0"`
	// metadata is what virt-install and Nova write.
	metadata = `<metadata><libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">` +
		`<libosinfo:os id="http://debian.org/debian/12"/></libosinfo:libosinfo>` +
		`<nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1"><nova:name>db</nova:name>` +
		`</nova:instance>` +
		`<other xmlns="urn:x" a:b="c" xmlns:a="urn:a"><emulator>/x</emulator></other></metadata>`
	evil = "<emulator>/tmp/evil</emulator>"
)

// insert puts text before the first occurrence of before in plain.
func insert(before, text string) string { return strings.Replace(plain, before, text+before, 1) }

var errNotStarted = errors.New("that binary is not started here")

// aLimit allows the binary of plain.
func aLimit() Limit {
	return Limit{Name: "db", MayRun: func(binary string) error {
		if binary != "/usr/bin/qemu-system-x86_64" {
			return errNotStarted
		}
		return nil
	}}
}

// limits are definitions from another host. want is in the error; empty: the definition is accepted. root: it is
// accepted where the other host may have QEMU run as root.
var limits = map[string]struct {
	definition, want string
	root             bool
}{
	"a VM":                 {plain, "", true},
	"its own label":        {insert("</domain>", `<seclabel type="dynamic" model="selinux"/>`), "", true},
	"metadata":             {insert("</domain>", metadata), "", true},
	"a declared namespace": {strings.Replace(plain, "<domain", "<domain"+ofQEMU, 1), "", true},
	"a declaration":        {"<?xml version='1.0' encoding='UTF-8'?>\n<!-- by hand -->\n" + plain, "", true},
	"a log":                {device("serial", "file", "/var/log/libvirt/qemu/db.log"), "", true},
	"a copy in the logs":   {copyTo("/var/log/libvirt/qemu/db.log"), "", true},
	"a socket":             {device("channel", "unix", "/run/db.sock"), "", true},
	"an image":             {insert("</devices>", `<disk type="file"><source file="/db.img"/></disk>`), "", true},
	"a directory": {
		insert("</devices>", `<filesystem type="mount"><source dir="/srv"/></filesystem>`), "", true,
	},
	"another VM": {
		strings.Replace(plain, ">db<", ">web<", 1), `is of "web", but the VM that is sent is "db"`, false,
	},
	"a name that looks alike": {strings.Replace(plain, ">db<", "> db<", 1), `is of " db"`, false},
	"two names":               {insert("<name>", "<name>web</name>"), "2 elements name", false},
	"another binary": {
		strings.Replace(plain, "/usr/bin/qemu-system-x86_64", "/tmp/evil", 1), errNotStarted.Error(), false,
	},
	"no binary":            {strings.Replace(plain, "emulator>", "nothing>", 2), "0 elements devices/emulator", false},
	"two binaries":         {insert("</devices>", evil), "2 elements devices/emulator", false},
	"two lists of devices": {insert("<devices>", "<devices>"+evil+"</devices>"), "2 elements devices/em", false},
	"a binary in parts":    {insert("</emulator>", "<a>/../evil</a>"), "more than a text", false},
	"a binary behind another": {
		insert("<emulator>", `<x:emulator xmlns:x="urn:x">/usr/bin/qemu-system-x86_64</x:emulator>`),
		"<x:emulator>", false,
	},
	"arguments": {insert("</domain>", `<qemu:commandline`+ofQEMU+`/>`), "<qemu:commandline>", false},
	"arguments without a prefix": {
		insert("</domain>", `<commandline xmlns="http://libvirt.org/schemas/domain/qemu/1.0"/>`),
		"<commandline xmlns=", false,
	},
	"arguments by a document type": {
		`<!DOCTYPE domain [<!ATTLIST commandline xmlns CDATA "http://libvirt.org/schemas/domain/qemu/1.0">]>` +
			insert("</domain>", `<commandline/>`), "no document type", false,
	},
	"another encoding": {
		`<?xml version="1.0" encoding ="UTF-7"?>` + insert("</devices>", "+ADw-emulator+AD4-"), "UTF-8", false,
	},
	"an attribute of a namespace": {
		insert("</domain>", `<seclabel x:type="dynamic" type="none" xmlns:x="urn:x"/>`), "x:type=", false,
	},
	"a namespace for the metadata": {insert("</domain>", `<metadata xmlns="urn:x"/>`), "<metadata xmlns=", false},
	"a script": {
		insert("</devices>", `<interface type="ethernet"><script path="/tmp/evil"/></interface>`), "as root", false,
	},
	"virtiofs": {
		insert("</devices>", `<filesystem type="mount"><driver type="virtiofs"/><source dir="/"/></filesystem>`),
		"virtiofs", false,
	},
	"a binary of virtiofs": {
		insert("</devices>", `<filesystem type="mount"><binary path="/tmp/evil"/></filesystem>`), "virtiofs", false,
	},
	"no confinement": {insert("</domain>", `<seclabel type="none" model="selinux"/>`), "how QEMU is confined", true},
	"a label of its choice": {
		insert("</domain>", `<seclabel type="static" model="selinux"><label>u:r:t:s0</label></seclabel>`),
		"how QEMU is confined", true,
	},
	"another user": {
		insert("</domain>", `<seclabel model="dac" relabel="no"><label>+0:+0</label></seclabel>`),
		"sets the user that QEMU runs as", true,
	},
	"a file of root's":   {device("serial", "file", "/etc/cron.d/db"), `"/etc/cron.d/db" as root`, true},
	"a pipe":             {device("channel", "pipe", "/run/db.pipe"), "/run/db.pipe", true},
	"out of the logs":    {device("console", "file", "/var/log/libvirt/qemu/../x"), "as root", true},
	"a copy of a socket": {copyTo("/etc/cron.d/db"), "as root", true},
	"a file for a rng": {
		insert("</devices>", `<rng><backend type="file"><source path="/etc/cron.d/db"/></backend></rng>`),
		"as root", true,
	},
}

// device returns a definition with a character device.
func device(tag, kind, path string) string {
	return insert("</devices>", `<`+tag+` type="`+kind+`"><source path="`+path+`"/></`+tag+`>`)
}

// copyTo returns a definition with a character device whose output is copied to a file.
func copyTo(file string) string {
	return insert("</devices>", `<serial type="pty"><log file="`+file+`"/></serial>`)
}

// TestLimit: a definition from another host that would give it more than the VM that it said it sends is refused.
func TestLimit(t *testing.T) {
	for name, c := range limits {
		limit := aLimit()
		err := limit.Check(c.definition)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		limit.Root = true
		if err := limit.Check(c.definition); (err == nil) != c.root {
			t.Errorf("%s, where QEMU may run as root: %v", name, err)
		}
	}
}

// TestLimitOfItsOwn: the next host accepts the definition of a domain that arrived here.
func TestLimitOfItsOwn(t *testing.T) {
	waits, err := withIncoming(insert("</domain>", metadata))
	if err != nil {
		t.Fatal(err)
	}
	if err := aLimit().Check(waits); err == nil {
		t.Error("the arguments that are added after the check would pass it")
	}
	next, err := asItStarts(waits, plain)
	if err != nil {
		t.Fatal(err)
	}
	if err := aLimit().Check(next); err != nil {
		t.Errorf("%v: %s", err, next)
	}
}

// TestOutput: what a VM says may be written where others than root can write, as in a directory of Nova's.
func TestOutput(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root")
	}
	dir := t.TempDir()
	theirs, roots := filepath.Join(dir, "theirs"), filepath.Join(dir, "roots")
	if err := errors.Join(os.Mkdir(theirs, 0o755), os.Mkdir(roots, 0o755), os.Chown(theirs, 64055, 64055),
		os.WriteFile(filepath.Join(theirs, "old.log"), nil, 0o600),
		os.Symlink("/etc/passwd", filepath.Join(theirs, "link.log")), os.Symlink(roots, filepath.Join(theirs, "link")),
	); err != nil {
		t.Fatal(err)
	}
	for path, accepted := range map[string]bool{
		theirs + "/new.log": true, theirs + "/old.log": true,
		roots + "/new.log": false, theirs + "/link.log": false, theirs + "/link/new.log": false,
		theirs + "/none/new.log": false, theirs + "/../roots/new.log": false, "new.log": false, "": false,
	} {
		for _, definition := range []string{device("serial", "file", path), copyTo(path)} {
			if err := aLimit().Check(definition); (err == nil) != accepted {
				t.Errorf("%q: %v", path, err)
			}
		}
	}
}
