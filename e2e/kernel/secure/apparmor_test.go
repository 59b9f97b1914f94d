// SPDX-License-Identifier: Apache-2.0

package secure

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/debian"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// apparmorClaims are what the guest reports about a domain of libvirt's whose QEMU AppArmor confines
// (guest/apparmor.go).
var apparmorClaims = map[string]string{
	"apparmor-source": "enforced",

	"apparmor-vcpu":    "waits",
	"apparmor":         "unsupervised",
	"apparmor-arrived": "whole",
	"apparmor-guest":   "counts",
	"apparmor-memory":  "verified",
	"apparmor-virsh":   "running",
	"apparmor-profile": "enforced",
	"apparmor-log":     "mknod",

	"apparmor-back-vcpu":    "waits",
	"apparmor-back":         "unsupervised",
	"apparmor-back-arrived": "whole",
	"apparmor-back-guest":   "counts",
	"apparmor-back-memory":  "verified",
	"apparmor-back-virsh":   "running",
	"apparmor-back-profile": "enforced",
	"apparmor-back-log":     "clean",
}

// TestAppArmor moves a domain of libvirt's there and back under AppArmor, with Debian's kernel, libvirt and profiles,
// from a host without deploy/apparmor to one with it.
func TestAppArmor(t *testing.T) {
	if os.Getenv("APPARMOR") != "1" {
		t.Skip("takes minutes, and is about Debian's profiles alone: 'make -C kernel apparmor' runs it")
	}
	initrd := rootfs(t, slices.Concat(libvirtFiles(t), apparmorFiles(t))...)
	bzImage, modules, err := image.DebianWithKVM(t.Context())
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	if err := appendFile(initrd, modules); err != nil {
		t.Fatal(err)
	}
	got, err := boot(t, kernel.Options{
		Kernel: bzImage, Initrd: initrd, CommandLine: "mitigations=off init_on_alloc=0",
	}, "apparmor")
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(apparmorClaims, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// apparmorFiles returns Debian's profiles, the programs that load them, and deploy/apparmor.
func apparmorFiles(t *testing.T) []kernel.File {
	t.Helper()
	const parser = "sbin/apparmor_parser"
	files := []kernel.File{{Name: "deploy/libvirt-qemu", Path: "../../../deploy/apparmor/libvirt-qemu"}}
	var roots []string
	for _, pkg := range []struct{ name, installed string }{
		{"apparmor", "libapparmor1"}, {"libvirt-daemon-system", "libvirt-daemon"}, // of one source each
	} {
		version, err := debian.Installed(t.Context(), pkg.installed)
		if err != nil {
			testenv.CannotRun(t, "%v: install the packages of scripts/setup test", err)
		}
		root, err := debian.Extract(t.Context(), pkg.name, version)
		if err != nil {
			testenv.CannotRun(t, "%v", err)
		}
		roots = append(roots, root)
		for _, dir := range []string{"etc/apparmor", "etc/apparmor.d", "usr/share/apparmor-features"} {
			files = append(files, below(t, root, dir)...)
		}
	}
	for _, f := range program(t, filepath.Join(roots[0], parser)) {
		if f.Path == filepath.Join(roots[0], parser) {
			f.Name = parser
		}
		files = append(files, f)
	}
	return append(files, program(t, "/usr/lib/libvirt/virt-aa-helper")...)
}

// below returns the files of a directory in root, and its empty directories; none if the directory is missing.
func below(t *testing.T, root, dir string) (files []kernel.File) {
	t.Helper()
	err := fs.WalkDir(os.DirFS(root), dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case entry.IsDir():
			files = append(files, kernel.File{Name: path, Mode: fs.ModeDir | 0o755})
		case entry.Type().IsRegular():
			files = append(files, kernel.File{Name: path, Path: filepath.Join(root, path)})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// appendFile appends a file to another.
func appendFile(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}
