// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"regexp"
	"strings"
	"sync"

	"github.com/migrated-vm/migrated/e2e/debian"
	"github.com/migrated-vm/migrated/internal/cpio"
)

// The meta packages of Debian's kernels for virtual machines. Each depends on the current kernel. 8250 serial ports,
// devtmpfs and initramfs are built in, so only the modules of virtioModules are needed.
const (
	Linux61  = "linux-image-cloud-amd64" // Debian 12's own
	Linux612 = "linux-image-6.12-cloud-amd64"
)

// dependency matches the only dependency of a meta package: name and version of the real package.
var dependency = regexp.MustCompile(`(?m)^Depends: (linux-image-\S+) \(= (\S+)\)$`)

// DebianKernel returns the path of the kernel that apt would now install for a meta package. It installs nothing.
func DebianKernel(ctx context.Context, meta string) (string, error) {
	c, err := openCache()
	if err != nil {
		return "", err
	}
	p, err := resolve(ctx, meta)
	if err != nil {
		return "", err
	}
	return c.file("vmlinuz-"+p.name+"-"+p.version, func() ([]byte, error) {
		archive, err := download(ctx, p.name, p.version)
		if err != nil {
			return nil, err
		}
		return findKernel(bytes.NewReader(archive))
	})
}

// virtioModules are the drivers of virtio devices on PCI (balloon, virtio-mem, disks, network cards, random numbers),
// below the package's kernel/, each after the ones that it needs.
var virtioModules = []string{
	"drivers/virtio/virtio_ring", "drivers/virtio/virtio", "drivers/virtio/virtio_pci_modern_dev",
	"drivers/virtio/virtio_pci_legacy_dev", "drivers/virtio/virtio_pci", "drivers/virtio/virtio_balloon",
	"drivers/virtio/virtio_mem", "drivers/block/virtio_blk", "net/core/failover", "drivers/net/net_failover",
	"drivers/net/virtio_net", "drivers/char/hw_random/virtio-rng",
}

// kvmModules are KVM's modules for an AMD processor, as QEMU emulates it.
var kvmModules = []string{"virt/lib/irqbypass", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd"}

// debianModules returns the path of an initramfs with modules of Linux61 as /modules/NN-NAME.ko, in their order.
func debianModules(ctx context.Context, c cache, modules []string) (string, error) {
	p, err := resolve(ctx, Linux61)
	if err != nil {
		return "", err
	}
	list := hash([]byte(strings.Join(modules, " ")))
	return c.file(fmt.Sprintf("modules-%s-%s-%x.cpio.gz", p.name, p.version, list), func() ([]byte, error) {
		archive, err := download(ctx, p.name, p.version)
		if err != nil {
			return nil, err
		}
		files := []cpio.File{{Name: "modules", Mode: fs.ModeDir | 0o755}}
		for i, name := range modules {
			module, err := find(bytes.NewReader(archive), "lib/modules/", "/kernel/"+name+".ko")
			if err != nil {
				return nil, err
			}
			to := fmt.Sprintf("modules/%02d-%s.ko", i, path.Base(name))
			files = append(files, cpio.File{Name: to, Mode: 0o644, Data: module})
		}
		return pack(files)
	})
}

// A realPackage is the package on which a meta package depends.
type realPackage struct{ name, version string }

// current caches the real packages, because asking apt takes a second.
var current = struct {
	sync.Mutex
	of map[string]realPackage
}{of: make(map[string]realPackage)}

// resolve returns the real package of a meta package.
func resolve(ctx context.Context, meta string) (realPackage, error) {
	current.Lock()
	defer current.Unlock()
	if p, known := current.of[meta]; known {
		return p, nil
	}
	out, err := run(ctx, "", "apt-cache", "show", "--no-all-versions", meta)
	if err != nil {
		return realPackage{}, fmt.Errorf("find the guest's kernel (on Debian, with package lists: apt-get update): %w", err)
	}
	m := dependency.FindSubmatch(out)
	if m == nil {
		return realPackage{}, fmt.Errorf("find the guest's kernel: %s depends on no kernel of one version: %s", meta, out)
	}
	p := realPackage{string(m[1]), string(m[2])}
	current.of[meta] = p
	return p, nil
}

// download returns the file system archive in a Debian package.
func download(ctx context.Context, name, version string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "migrated-kernel-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	deb, err := debian.Download(ctx, dir, name, version)
	if err != nil {
		return nil, fmt.Errorf("download the guest's kernel: %w", err)
	}
	archive, err := run(ctx, dir, "dpkg-deb", "--fsys-tarfile", deb)
	if err != nil {
		return nil, fmt.Errorf("unpack the guest's kernel: %w", err)
	}
	return archive, nil
}

// findKernel returns the kernel in a package's file system archive.
func findKernel(archive io.Reader) ([]byte, error) { return find(archive, "boot/vmlinuz-", "") }

// find returns the first file whose path has that prefix and that suffix.
func find(archive io.Reader, prefix, suffix string) ([]byte, error) {
	for t := tar.NewReader(archive); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("unpack the guest's kernel: the package has no /%s*%s", prefix, suffix)
		}
		if err != nil {
			return nil, fmt.Errorf("unpack the guest's kernel: %w", err)
		}
		if name := strings.TrimPrefix(h.Name, "./"); h.Typeflag == tar.TypeReg &&
			strings.HasPrefix(name, prefix) && strings.HasSuffix(name, suffix) {
			return io.ReadAll(t)
		}
	}
}

// run returns the standard output of a command; the error has its standard error.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
