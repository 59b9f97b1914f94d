// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/beevik/etree"
	"golang.org/x/sys/unix"
)

// ErrSharedLabel says that both hosts share the label of an image.
var ErrSharedLabel = errors.New("the hosts share the SELinux label of an image: " +
	"if the destination's libvirt relabels it, the running VM loses access to its image; " +
	"mount the file system on both hosts with one label (-o context=system_u:object_r:svirt_image_t:s0), " +
	"or export it without security_label, then restart the VM")

// refuseSharedLabel refuses a definition if an image of the domain has the same label on this host as at the
// source, where the domain runs. The hosts then share the file system and its labels. libvirt would relabel the
// image for the categories that it chooses here, and again when the domain at the source ends, because its note
// that an image is in use is valid only on one host (security_util.c of libvirt). Each time SELinux would deny
// the running QEMU its image.
func refuseSharedLabel(definition string, volume volumeFinder) error {
	_, root, err := parse(definition)
	if err != nil {
		return err
	}
	running := root.FindElement("seclabel[@model='selinux']")
	if running == nil || text(running, "imagelabel") == "" {
		return nil
	}
	paths, err := imagePaths(root, volume)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // libvirt says what is missing
		return err
	}
	for _, path := range paths {
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

// copyLabel adds the label of a running domain's images, which is in live, to the domain's definition. libvirt leaves
// the label out of a definition for another host, and ignores it there.
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

// withoutCopiedLabel undoes copyLabel. A libvirt without SELinux refuses a domain with a label of it.
func withoutCopiedLabel(root *etree.Element) {
	for _, label := range root.SelectElements("seclabel") {
		copied := label.SelectElement("imagelabel")
		switch {
		case label.SelectAttrValue("model", "") != "selinux" || copied == nil:
		case label.SelectAttrValue("type", "") == "dynamic" && label.SelectElement("baselabel") == nil:
			root.RemoveChild(label) // libvirt has such a label only in the definition of a domain that runs
		default:
			label.RemoveChild(copied)
		}
	}
}

// labelOf returns the label of a file. It is empty if the file has none, or does not exist, which libvirt then reports.
func labelOf(path string) (string, error) {
	value := make([]byte, 4096) // SELinux's labels have at most a page
	n, err := unix.Getxattr(path, "security.selinux", value)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOENT):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("the label of the image %s: %w", path, err)
	}
	return strings.TrimRight(string(value[:n]), "\x00"), nil
}
