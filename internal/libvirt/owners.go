// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/beevik/etree"
	golibvirt "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"
)

// ErrOwner says that an image may have another owner now, although its VM uses it on another host.
var ErrOwner = errors.New("an image that the VM uses on another host may have the wrong owner now")

// An image is a file of a domain, with its owner while the domain runs.
type image struct {
	file     *os.File // opened with O_PATH, which names it only (open(2))
	uid, gid uint32
}

// A volumeFinder returns the path of a volume of a storage pool on this host.
type volumeFinder func(pool, volume string) (path string, err error)

// volumePath is the volumeFinder of the libvirt that c is connected to. A volume that is not there is fs.ErrNotExist.
func (c *connection) volumePath(pool, volume string) (path string, err error) {
	var vol golibvirt.StorageVol
	p, err := c.StoragePoolLookupByName(pool)
	if err == nil {
		vol, err = c.StorageVolLookupByName(p, volume)
	}
	if err == nil {
		path, err = c.StorageVolGetPath(vol)
	}
	if isError(err, golibvirt.ErrNoStoragePool) || isError(err, golibvirt.ErrNoStorageVol) {
		err = fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	if err != nil {
		return "", fmt.Errorf("path of the volume %q in the pool %q: %w", volume, pool, err)
	}
	return path, nil
}

// imagePaths returns the paths of the images in a domain's definition that may be files: those of its disks, with the
// images behind them, and its NVRAM. If it returns an error, some may be missing.
func imagePaths(root *etree.Element, volume volumeFinder) (paths []string, err error) {
	sources := root.FindElements("devices/disk//source")
	if vars := root.FindElement("os/nvram"); vars != nil {
		paths = append(paths, strings.TrimSpace(vars.Text()))
		sources = append(sources, vars.SelectElements("source")...)
	}
	for _, source := range sources {
		path := source.SelectAttrValue("file", "")
		if pool := source.SelectAttrValue("pool", ""); pool != "" {
			var volumeErr error
			path, volumeErr = volume(pool, source.SelectAttrValue("volume", ""))
			err = errors.Join(err, volumeErr)
		}
		paths = append(paths, path)
	}
	return slices.DeleteFunc(paths, func(path string) bool {
		return !filepath.IsAbs(path) // an empty CD drive, or a volume that other hosts serve
	}), err
}

// images opens the images in a domain's definition that are files. Devices of this host are left out.
//
// A domain that the daemon ends here continues at another host. When libvirt ends a domain, it gives the images back to
// their earlier owner, unless an extended attribute says that they are still in use (remember_owner in qemu.conf), and
// NFS has none. Its own migration does not do so.
func images(definition string, volume volumeFinder) (found []image, err error) {
	_, root, err := parse(definition)
	if err != nil {
		return nil, err
	}
	paths, err := imagePaths(root, volume)
	for _, path := range paths {
		file, openErr := os.OpenFile(path, unix.O_PATH, 0)
		if openErr != nil {
			err = errors.Join(err, openErr)
			continue
		}
		var st unix.Stat_t
		statErr := unix.Fstat(int(file.Fd()), &st)
		if statErr != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			err = errors.Join(err, statErr, file.Close())
			continue
		}
		found = append(found, image{file, st.Uid, st.Gid})
	}
	return found, err
}

// keepOwners has start make libvirt start a domain. libvirt gives the images to its user and, if the domain fails to
// start after that, to their earlier owner or to root. keepOwners then restores the owner of each.
func keepOwners(definition string, volume volumeFinder, start func() error) error {
	kept, notKept := images(definition, volume)
	err := start()
	if err == nil {
		closeAll(kept)
		return nil
	}
	err = errors.Join(err, restoreOwners(kept))
	if notKept != nil && !errors.Is(notKept, fs.ErrNotExist) { // libvirt says that a file is missing, or makes it
		err = errors.Join(err, fmt.Errorf("%w: %w", ErrOwner, notKept))
	}
	return err
}

func closeAll(images []image) {
	for _, i := range images {
		i.file.Close()
	}
}

// restoreOwners is restoreOwner for each image.
func restoreOwners(images []image) (err error) {
	for _, i := range images {
		err = errors.Join(err, i.restoreOwner())
	}
	return err
}

// restoreOwner changes the owner of the image back to i.uid and i.gid, and closes i.file.
func (i image) restoreOwner() error {
	defer i.file.Close()
	var st unix.Stat_t
	err := unix.Fstat(int(i.file.Fd()), &st)
	if err == nil && (st.Uid != i.uid || st.Gid != i.gid) {
		err = unix.Fchownat(int(i.file.Fd()), "", int(i.uid), int(i.gid), unix.AT_EMPTY_PATH)
	}
	if err != nil {
		return fmt.Errorf("%w: %w; run: chown %d:%d %s", ErrOwner, err, i.uid, i.gid, i.file.Name())
	}
	return nil
}
