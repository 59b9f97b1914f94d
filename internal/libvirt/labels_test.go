// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

func TestSharedLabel(t *testing.T) {
	const imageLabel = "system_u:object_r:svirt_image_t:s0:c1,c2"
	dir, err := os.MkdirTemp("/dev/shm", "labels") // stores labels even without SELinux
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	plain, labelled := filepath.Join(dir, "plain"), filepath.Join(dir, "labelled")
	for _, path := range []string{plain, labelled} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Setxattr(labelled, "security.selinux", []byte(imageLabel+"\x00"), 0); err != nil {
		testenv.CannotRun(t, "label a file: %v", err)
	}
	for _, c := range []struct {
		name, image, module, label string
		want                       error
	}{
		{"it has it here, too", labelled, "selinux", imageLabel, ErrSharedLabel},
		{"it has another", labelled, "selinux", "system_u:object_r:svirt_image_t:s0:c1,c3", nil},
		{"it has none", plain, "selinux", imageLabel, nil},
		{"it is not there", filepath.Join(dir, "none"), "selinux", imageLabel, nil},
		{"there is no image", "", "selinux", imageLabel, nil},
		{"another module's", labelled, "apparmor", imageLabel, nil},
	} {
		definition := fmt.Sprintf(`<domain><devices><disk type="file"><source file="%s"/></disk></devices>`+
			`<seclabel type="dynamic" model="%s"><imagelabel>%s</imagelabel></seclabel></domain>`, c.image, c.module, c.label)
		if err := refuseSharedLabel(definition, noVolumes); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// TestLabelIsNotHandedOn: libvirt gets no label of SELinux's with which only the hosts are compared: one without
// SELinux would refuse the domain.
func TestLabelIsNotHandedOn(t *testing.T) {
	const label = `<seclabel type="dynamic" model="selinux" relabel="yes"><label>a:b:c:s0:c1,c2</label>` +
		`<imagelabel>a:b:d:s0:c1,c2</imagelabel></seclabel>`
	if got, err := withIncoming(insert("</domain>", label)); err != nil || strings.Contains(got, "seclabel") {
		t.Errorf("libvirt gets %s, %v", got, err)
	}
}

func TestCopyLabel(t *testing.T) {
	const (
		image = `<imagelabel>a:b:d:s0:c1,c2</imagelabel>`
		label = `<seclabel type="dynamic" model="selinux" relabel="yes"><label>a:b:c:s0:c1,c2</label>` + image + `</seclabel>`
		live  = `<domain><seclabel type="dynamic" model="dac"><label>+1:+1</label></seclabel>` + label + `</domain>`
	)
	for given, want := range map[string]string{
		`<domain/>`: `<domain>` + label + `</domain>`,
		`<domain><seclabel type="dynamic" model="selinux"/></domain>`: `<domain><seclabel type="dynamic" model="selinux">` +
			image + `</seclabel></domain>`,
		`<domain><seclabel type="dynamic" model="selinux"><baselabel>a:b:c:s0</baselabel></seclabel></domain>`: `<domain>` +
			`<seclabel type="dynamic" model="selinux"><baselabel>a:b:c:s0</baselabel>` + image + `</seclabel></domain>`,
	} {
		got, err := asItStarts(given, live)
		if err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", given, got, err, want)
		}
		if got, err = withoutLabel(got); err != nil || strings.Contains(got, "imagelabel") ||
			strings.Contains(got, "seclabel") != strings.Contains(given, "baselabel") {
			t.Errorf("%s: without the label again: %s, %v", given, got, err)
		}
	}
	if got, err := asItStarts(`<domain/>`, `<domain/>`); err != nil || got != `<domain/>` {
		t.Errorf("without a label: %s, %v", got, err)
	}
}
