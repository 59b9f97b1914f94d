// SPDX-License-Identifier: Apache-2.0

package secure

import (
	"io/fs"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// svirtClaims are what the guest reports about a domain of libvirt's (guest/libvirt.go).
var svirtClaims = map[string]string{
	"svirt-policy":       "enforcing",
	"svirt-shared-label": "refused",

	"svirt-vcpu":    "waits",
	"svirt":         "flag",
	"svirt-label":   "its-domain's",
	"svirt-arrived": "whole",
	"svirt-guest":   "counts",
	"svirt-memory":  "verified",
	"svirt-virsh":   "running",

	"svirt-back-vcpu":    "waits",
	"svirt-back":         "flag",
	"svirt-back-label":   "its-domain's",
	"svirt-back-arrived": "whole",
	"svirt-back-guest":   "counts",
	"svirt-back-memory":  "verified",
	"svirt-back-virsh":   "running",

	"svirt-log":             "clean",
	"svirt-stranger-create": "EACCES",
}

// TestLibvirt moves a domain of libvirt's there and back under SELinux, which confines both daemons, and the domain's
// QEMU by categories of its own.
func TestLibvirt(t *testing.T) {
	t.Parallel()
	kernel.Only(t, kernel.Linux612)
	initrd := rootfs(t, slices.Concat(policies(t), libvirtFiles(t), selinuxFiles())...)
	tree, err := kernel.Build(t.Context(), kernel.Linux612, kernel.Patched)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	got, err := boot(t, underSELinux(tree, initrd), "svirt")
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(svirtClaims, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// selinuxFiles returns the files that libselinux and libvirt's driver for it read on a host.
func selinuxFiles() []kernel.File {
	files := []kernel.File{
		{Name: "etc/selinux/config", Data: []byte("SELINUX=enforcing\nSELINUXTYPE=small\n")},
	}
	for name, text := range map[string]string{
		"virtual_domain_context": "system_u:system_r:svirt_t:s0\n",
		"virtual_image_context":  "system_u:object_r:svirt_image_t:s0\nsystem_u:object_r:virt_content_t:s0\n",
		"files/file_contexts": "/run/vm(/.*)?\tsystem_u:object_r:svirt_runtime_t:s0\n" +
			"/run/vm/disk\tsystem_u:object_r:virt_image_t:s0\n",
	} {
		files = append(files, kernel.File{Name: "etc/selinux/small/contexts/" + name, Data: []byte(text)})
	}
	return files
}

// libvirtFiles returns libvirtd, virsh, and what they load.
func libvirtFiles(t *testing.T) []kernel.File {
	t.Helper()
	files := []kernel.File{
		{Name: "etc/passwd", Data: []byte("root:x:0:0::/:/bin/false\nlibvirt-qemu:x:107:107::/:/bin/false\n")},
		{Name: "etc/group", Data: []byte("root:x:0:\nlibvirt-qemu:x:107:\nkvm:x:108:\n")},
		{Name: "etc/libvirt", Mode: fs.ModeDir | 0o755},
		{Name: "var/lib/libvirt", Mode: fs.ModeDir | 0o755},
		{Name: "var/cache/libvirt", Mode: fs.ModeDir | 0o755},
	}
	for _, pattern := range []string{
		"/usr/share/libvirt/cpu_map/x86_*", "/usr/share/libvirt/cpu_map/index.xml",
		"/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-*.so", // libvirt asks a QEMU what it can do with either accelerator
	} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			testenv.CannotRun(t, "%s is not there: install the packages of scripts/setup test", pattern)
		}
		for _, name := range found {
			files = append(files, kernel.File{Name: name, Path: name})
		}
	}
	return slices.Concat(files, program(t, "/usr/sbin/libvirtd"), program(t, "/usr/bin/virsh"),
		program(t, "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so"))
}

// program returns a program of this machine and what it loads.
func program(t *testing.T, path string) []kernel.File {
	t.Helper()
	files := []kernel.File{{Name: path, Path: path}}
	for _, name := range libraries(t, path) {
		files = append(files, kernel.File{Name: name, Path: name})
	}
	return files
}
