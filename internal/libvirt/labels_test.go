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

	"github.com/migrated-vm/migrated/internal/cannot"
)

func TestWithLabel(t *testing.T) {
	const imageLabel = "system_u:object_r:svirt_image_t:s0:c1,c2"
	dir, err := os.MkdirTemp("/dev/shm", "labels") // it keeps labels, also where no module asks for them
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
		cannot.Run(t, "label a file: %v", err)
	}
	for _, c := range []struct {
		name, image, label, want string
	}{
		{"its image has the label here", labelled, `type='dynamic' model='selinux' relabel='yes'`, "static"},
		{"it has none here", plain, `type='dynamic' model='selinux' relabel='yes'`, "dynamic"},
		{"there is no image", "", `type='dynamic' model='selinux' relabel='yes'`, "dynamic"},
		{"the operator chose it", labelled, `type='static' model='selinux' relabel='yes'`, "static"},
		{"images keep theirs", labelled, `type='dynamic' model='selinux' relabel='no'`, "dynamic"},
		{"it is AppArmor's", labelled, `type='dynamic' model='apparmor' relabel='yes'`, "dynamic"},
	} {
		t.Run(c.name, func(t *testing.T) {
			given := strings.ReplaceAll(fmt.Sprintf(
				`<domain><devices><disk type='file'><source file='%s'/></disk></devices><seclabel %s>`+
					`<label>system_u:system_r:svirt_t:s0:c1,c2</label><imagelabel>%s</imagelabel></seclabel></domain>`,
				c.image, c.label, imageLabel), "'", `"`)
			got, err := withLabel(given, func(string) error { return nil })
			if err != nil {
				t.Fatal(err)
			}
			_, root, err := parse(got)
			if err != nil {
				t.Fatal(err)
			}
			if kind := root.SelectElement("seclabel").SelectAttrValue("type", ""); kind != c.want {
				t.Errorf("the label is %s, want %s: %s", kind, c.want, got)
			}
			if !strings.Contains(got, "<label>system_u:system_r:svirt_t:s0:c1,c2</label>") {
				t.Errorf("the label is gone: %s", got)
			}
			back, err := asItStarts(got, got)
			if err != nil || back != given {
				t.Errorf("undone, it is\n%s, %v, and was\n%s", back, err, given)
			}
		})
	}
	foreign := errors.New("foreign")
	given := fmt.Sprintf(`<domain><devices><disk type="file"><source file="%s"/></disk></devices>`+
		`<seclabel type="dynamic" model="selinux"><label>a:b:c:s0:c1,c2</label><imagelabel>%s</imagelabel></seclabel></domain>`, labelled, imageLabel)
	if _, err := withLabel(given, func(string) error { return foreign }); !errors.Is(err, foreign) {
		t.Errorf("a label of another policy's: %v", err)
	}
}

func TestCopyLabel(t *testing.T) {
	const label = `<seclabel type="dynamic" model="selinux" relabel="yes"><label>a:b:c:s0:c1,c2</label></seclabel>`
	const live = `<domain><seclabel type="dynamic" model="dac"><label>+1:+1</label></seclabel>` + label + `</domain>`
	for given, want := range map[string]string{
		`<domain/>`: `<domain>` + label + `</domain>`,
		`<domain><seclabel type="dynamic" model="selinux" relabel="yes"/></domain>`: `<domain>` + label + `</domain>`,
		`<domain><seclabel type="static" model="selinux"/></domain>`:                `<domain><seclabel type="static" model="selinux"/></domain>`,
	} {
		if got, err := asItStarts(given, live); err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", given, got, err, want)
		}
	}
}
