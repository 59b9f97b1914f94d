// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrOwner says that images are not their VM's user's any more, which has them open elsewhere.
var ErrOwner = errors.New("the domain has ended, and libvirt has given an image of it away, which its VM uses on another host")

// An image is a file of a domain's, and whose it is.
type image struct {
	file     *os.File // it may be named only (open(2), O_PATH)
	uid, gid uint32
}

// images opens those of a domain's definition: files, not what may be this host's alone.
//
// A domain that we end goes on at another host, or has gone on there all the time. libvirt gives its images back to
// whom they belonged before, unless it finds written down beside them that they are still in use: in an extended
// attribute, which NFS does not have (remember_owner in qemu.conf). Where its own migration ends a domain, it does not.
func images(definition string) (found []image, err error) {
	_, root, err := parse(definition)
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, source := range root.FindElements("devices/disk[@type='file']/source") {
		paths = append(paths, source.SelectAttrValue("file", ""))
	}
	if vars := root.FindElement("os/nvram"); vars != nil {
		paths = append(paths, vars.Text())
	}
	for _, path := range paths {
		if path == "" {
			continue // an empty CD drive
		}
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

// giveBack makes it its user's again.
func (i image) giveBack() error {
	defer i.file.Close()
	var st unix.Stat_t
	err := unix.Fstat(int(i.file.Fd()), &st)
	if err == nil && (st.Uid != i.uid || st.Gid != i.gid) {
		err = unix.Fchownat(int(i.file.Fd()), "", int(i.uid), int(i.gid), unix.AT_EMPTY_PATH)
	}
	if err != nil {
		return fmt.Errorf("%w; have it belong to %d:%d: %s: %w", ErrOwner, i.uid, i.gid, i.file.Name(), err)
	}
	return nil
}
