// SPDX-License-Identifier: Apache-2.0

// Package image makes the files from which the test guests boot: a Debian kernel with an initramfs of the guest program
// (Linux), and the boot disk of the bare-metal guest (Metal).
//
// The files are kept in ${XDG_CACHE_HOME:-$HOME/.cache}/migrated, named after their inputs: a new kernel package or a
// changed guest makes new files, and a missing file is made again. Any number of processes may ask at once; a file
// appears whole or not at all.
package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/migrated-vm/migrated/e2e/metal"
	"github.com/migrated-vm/migrated/internal/cpio"
)

// CommandLine is the kernel command line that every Linux guest needs; append its parameters (see e2e/guest/params.go).
//
// The kernel's own messages go to the first serial port. Whatever moves or fills memory without the guest program is
// off (NUMA balancing, zeroing at allocation), and so is what costs time under TCG without making a difference here:
// mitigations, security modules, five-level page tables. The TSC is declared reliable because the alternative, the
// HPET, needs an exit to QEMU for every reading: with it the guest did a third of its visits.
const CommandLine = "console=ttyS0 quiet panic=-1 nokaslr mitigations=off no5lvl tsc=reliable" +
	" random.trust_cpu=on init_on_alloc=0 numa_balancing=disable lsm="

const guestPackage = "github.com/migrated-vm/migrated/e2e/guest"

// Linux returns the paths of the guest's kernel and initramfs. It needs the go command and, when the kernel is not
// cached, apt and dpkg-deb.
func Linux(ctx context.Context) (kernel, initrd string, err error) {
	c, err := openCache()
	if err != nil {
		return "", "", err
	}
	if kernel, err = DebianKernel(ctx, Linux61); err != nil {
		return "", "", err
	}
	init, err := buildGuest(ctx)
	if err != nil {
		return "", "", err
	}
	// The program itself is the key, because it depends on its sources and the toolchain, and the go command knows when to
	// build it again.
	initrd, err = c.file(fmt.Sprintf("initramfs-%x.cpio.gz", hash(init)), func() ([]byte, error) {
		return initramfs(init)
	})
	return kernel, initrd, err
}

// LinuxWithVirtio is Linux with the drivers of virtio devices, which the guest loads first.
func LinuxWithVirtio(ctx context.Context) (kernel, initrd string, err error) {
	kernel, plain, err := Linux(ctx)
	if err != nil {
		return "", "", err
	}
	c, err := openCache()
	if err != nil {
		return "", "", err
	}
	modules, err := debianModules(ctx, c, virtioModules)
	if err != nil {
		return "", "", err
	}
	// The kernel unpacks one archive after the other.
	var both []byte
	for _, part := range []string{plain, modules} {
		content, err := os.ReadFile(part)
		if err != nil {
			return "", "", err
		}
		both = append(both, content...)
	}
	initrd, err = c.file(fmt.Sprintf("initramfs-virtio-%x.cpio.gz", hash(both)),
		func() ([]byte, error) { return both, nil })
	return kernel, initrd, err
}

// DebianWithKVM returns the paths of Debian's kernel and of an initramfs with nothing but KVM's modules, as
// /modules/NN-NAME.ko in their order. It can be appended to another initramfs: the kernel unpacks one after the other.
func DebianWithKVM(ctx context.Context) (kernel, initrd string, err error) {
	c, err := openCache()
	if err != nil {
		return "", "", err
	}
	if kernel, err = DebianKernel(ctx, Linux61); err != nil {
		return "", "", err
	}
	initrd, err = debianModules(ctx, c, kvmModules)
	return kernel, initrd, err
}

// Metal returns the path of the boot disk for a bare-metal guest with ramMiB of RAM. It must not be written to: give it
// to QEMU with snapshot=on.
func Metal(ctx context.Context, ramMiB int) (disk string, err error) {
	c, err := openCache()
	if err != nil {
		return "", err
	}
	return c.file(fmt.Sprintf("metal-%d-%x.img", ramMiB, hash(metal.Source())), func() ([]byte, error) {
		return metal.Build(ctx, ramMiB)
	})
}

// hash returns a name for content. 8 bytes are enough for the few files of a cache.
func hash(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:8]
}

// buildGuest builds the guest program, static, and returns its content.
func buildGuest(ctx context.Context) ([]byte, error) {
	dir, err := os.MkdirTemp("", "migrated-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags=-s -w", "-o", out, guestPackage)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the guest (run this within the module's source tree): %w: %s", err, msg)
	}
	return os.ReadFile(out)
}

// initramfs packs init as /init, with the console that the kernel opens for it.
func initramfs(init []byte) ([]byte, error) {
	return pack([]cpio.File{
		{Name: "dev", Mode: fs.ModeDir | 0o755},
		{Name: "dev/console", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Major: 5, Minor: 1},
		{Name: "init", Mode: 0o755, Data: init},
	})
}

// pack makes an initramfs of files.
func pack(files []cpio.File) ([]byte, error) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := cpio.NewWriter(z)
	for _, f := range files {
		if err := w.Write(f); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
