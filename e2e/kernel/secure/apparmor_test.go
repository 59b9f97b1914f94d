// SPDX-License-Identifier: Apache-2.0

package secure

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/e2e/debian"
	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/internal/cannot"
)

// apparmorClaims are what the guest reports of a domain of libvirt's whose QEMU AppArmor confines (guest/apparmor.go).
var apparmorClaims = map[string]string{
	"apparmor-profiles": "loaded",
	"apparmor-qemu":     "confined",

	"apparmor-vcpu":    "waits",
	"apparmor":         "flag",
	"apparmor-arrived": "whole",
	"apparmor-guest":   "counts",
	"apparmor-memory":  "verified",
	"apparmor-virsh":   "running",

	"apparmor-log": "clean",
}

// TestAppArmor moves a domain of libvirt's whose QEMU has a profile, with what deploy/apparmor adds to it.
func TestAppArmor(t *testing.T) {
	confined(t, "apparmor", "apparmor", apparmorClaims, append(apparmorFiles(t), libvirtFiles(t)...))
}

// apparmorFiles are Debian's profiles, those of libvirt with deploy/apparmor, and the programs that load them.
func apparmorFiles(t *testing.T) []kernel.File {
	t.Helper()
	const local = "etc/apparmor.d/local/abstractions/libvirt-qemu"
	files := []kernel.File{{Name: local, Path: "../../../deploy/apparmor/libvirt-qemu"}}
	var parser string
	for _, pkg := range []struct{ name, like string }{
		{"apparmor", "libapparmor1"}, {"libvirt-daemon-system", "libvirt-daemon"}, // of one source each
	} {
		version, err := debian.Installed(t.Context(), pkg.like)
		if err != nil {
			cannot.Run(t, "%v: install the packages of scripts/setup test", err)
		}
		root, err := debian.Extract(t.Context(), pkg.name, version)
		if err != nil {
			cannot.Run(t, "%v", err)
		}
		if parser == "" {
			parser = filepath.Join(root, "sbin/apparmor_parser")
		}
		err = fs.WalkDir(os.DirFS(root), "etc/apparmor.d", func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.Type().IsRegular() && path != local {
				files = append(files, kernel.File{Name: path, Path: filepath.Join(root, path)})
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range program(t, parser) {
		if f.Path == parser {
			f.Name = "sbin/apparmor_parser"
		}
		files = append(files, f)
	}
	return append(files, program(t, "/usr/lib/libvirt/virt-aa-helper")...)
}
