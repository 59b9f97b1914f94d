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

// metaPackage depends on the current kernel of Debian's that is built for
// virtual machines: 8250 serial ports, devtmpfs and initramfs are built in, so
// no module is needed but those of virtioModules.
const metaPackage = "linux-image-cloud-amd64"

// dependency is the meta package's one: name and version of the real package.
var dependency = regexp.MustCompile(`(?m)^Depends: (linux-image-\S+) \(= (\S+)\)$`)

// debianKernel returns the path of the kernel that apt would install now.
// Nothing is installed.
func debianKernel(ctx context.Context, c cache) (string, error) {
	current.Lock()
	defer current.Unlock()
	if current.name == "" {
		if err := resolve(ctx); err != nil {
			return "", err
		}
	}
	return c.file("vmlinuz-"+current.name+"-"+current.version, func() ([]byte, error) {
		archive, err := download(ctx, current.name, current.version)
		if err != nil {
			return nil, err
		}
		return findKernel(bytes.NewReader(archive))
	})
}

// virtioModules are the drivers of virtio devices on PCI (balloon, virtio-mem, disks, network cards, random numbers),
// below the package's kernel/, each after those that it needs.
var virtioModules = []string{
	"drivers/virtio/virtio_ring", "drivers/virtio/virtio", "drivers/virtio/virtio_pci_modern_dev",
	"drivers/virtio/virtio_pci_legacy_dev", "drivers/virtio/virtio_pci", "drivers/virtio/virtio_balloon",
	"drivers/virtio/virtio_mem", "drivers/block/virtio_blk", "net/core/failover", "drivers/net/net_failover",
	"drivers/net/virtio_net", "drivers/char/hw_random/virtio-rng",
}

// kvmModules are KVM for a processor of AMD's, as QEMU emulates it.
var kvmModules = []string{"virt/lib/irqbypass", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd"}

// debianModules returns the path of an initramfs with modules of the same kernel as /modules/NN-NAME.ko, in their
// order.
func debianModules(ctx context.Context, c cache, modules []string) (string, error) {
	if _, err := debianKernel(ctx, c); err != nil { // which says what is current
		return "", err
	}
	current.Lock()
	defer current.Unlock()
	list := hash([]byte(strings.Join(modules, " ")))
	return c.file(fmt.Sprintf("modules-%s-%s-%x.cpio.gz", current.name, current.version, list), func() ([]byte, error) {
		archive, err := download(ctx, current.name, current.version)
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

// current is the real package, once it is known: asking apt takes a second.
var current struct {
	sync.Mutex
	name, version string
}

// resolve sets current, whose lock the caller holds.
func resolve(ctx context.Context) error {
	out, err := run(ctx, "", "apt-cache", "show", "--no-all-versions", metaPackage)
	if err != nil {
		return fmt.Errorf("find the guest's kernel (on Debian, with package lists: apt-get update): %w", err)
	}
	m := dependency.FindSubmatch(out)
	if m == nil {
		return fmt.Errorf("find the guest's kernel: %s depends on no kernel of one version: %s", metaPackage, out)
	}
	current.name, current.version = string(m[1]), string(m[2])
	return nil
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
		if name := strings.TrimPrefix(h.Name, "./"); h.Typeflag == tar.TypeReg && strings.HasPrefix(name, prefix) && strings.HasSuffix(name, suffix) {
			return io.ReadAll(t)
		}
	}
}

// run returns what a command writes to its standard output; its standard error
// is in the error.
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
