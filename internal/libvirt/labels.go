// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"strings"

	"github.com/beevik/etree"
	"golang.org/x/sys/unix"
)

// ErrSharedLabel says that both hosts see one label of an image.
var ErrSharedLabel = errors.New("the image has the SELinux label of the VM that runs on this host, too: libvirt would take " +
	"it from the VM; mount its file system on both hosts with one label (-o context=system_u:object_r:svirt_image_t:s0), " +
	"or export it without security_label, and start the VM anew")

// refuseSharedLabel refuses a definition whose domain runs, at the source, with images that have its label on this host.
// The file system is one, then, and keeps labels. libvirt would label the images for the categories that it chooses here,
// and again when the domain at the source ends: its note that an image is used is of one boot of one host, and not seen by
// another (security_util.c of libvirt). Each time SELinux refuses the image to the QEMU that runs.
func refuseSharedLabel(definition string) error {
	_, root, err := parse(definition)
	if err != nil {
		return err
	}
	running := root.FindElement("seclabel[@model='selinux']")
	if running == nil || text(running, "imagelabel") == "" {
		return nil
	}
	for _, source := range root.FindElements("devices/disk[@type='file']/source") {
		path := source.SelectAttrValue("file", "")
		if path == "" {
			continue // an empty CD drive
		}
		label, err := labelOf(path)
		if err != nil {
			return err
		}
		if label == text(running, "imagelabel") {
			return fmt.Errorf("%w: %s", ErrSharedLabel, path)
		}
	}
	return nil
}

// copyLabel adds to a domain's definition the label that its images have while it runs. libvirt leaves it out of what is
// to be started elsewhere, and ignores it there.
func copyLabel(root *etree.Element, live string) error {
	_, running, err := parse(live)
	if err != nil {
		return err
	}
	label := running.FindElement("seclabel[@model='selinux']")
	if label == nil || label.SelectElement("imagelabel") == nil {
		return nil
	}
	given := root.FindElement("seclabel[@model='selinux']")
	switch {
	case given == nil:
		root.AddChild(label.Copy())
	case given.SelectElement("imagelabel") == nil:
		given.AddChild(label.SelectElement("imagelabel").Copy())
	}
	return nil
}

// labelOf is the label of a file; empty where it has none, or is not there, of which libvirt says more.
func labelOf(path string) (string, error) {
	value := make([]byte, 4096) // a page is the most that the kernel gives
	n, err := unix.Getxattr(path, "security.selinux", value)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOENT):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("the label of the image %s: %w", path, err)
	}
	return strings.TrimRight(string(value[:n]), "\x00"), nil
}
