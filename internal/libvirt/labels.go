// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/beevik/etree"
	"golang.org/x/sys/unix"
)

// ErrLabelledNFS says that the source's libvirt would take a running VM's image away when it ends its own domain.
var ErrLabelledNFS = errors.New("the image is on NFS that keeps SELinux labels, whose use by two hosts libvirt cannot " +
	"write down there; mount it on both hosts without them (export it without security_label), and start the VM anew")

// ErrForeignLabel says that libvirt here would not run a QEMU as the source's does.
var ErrForeignLabel = errors.New("the images are labelled for a domain of SELinux's that no QEMU of this host runs in; " +
	"give both hosts the same policy")

// chosen is in the metadata of a definition whose label was not static before withLabel.
const (
	chosen       = "migrated:label"
	chosenPrefix = "xmlns:migrated"
	chosenURI    = "https://github.com/migrated-vm/migrated/libvirt"
)

// withLabel returns a definition whose QEMU runs with the source's label, where its images have that label on this host
// too: the file system is one, and keeps labels. By itself libvirt would choose other categories and label the images
// for them, and SELinux would refuse them to the QEMU that runs. A definition of a domain that runs names both labels
// (security_selinux.c of libvirt). may says whether a QEMU of this host may have the label.
func withLabel(definition string, may func(label string) error) (string, error) {
	doc, root, err := parse(definition)
	if err != nil {
		return "", err
	}
	label := root.FindElement("seclabel[@model='selinux'][@type='dynamic']")
	if label == nil || label.SelectAttrValue("relabel", "yes") != "yes" || text(label, "label") == "" {
		return definition, nil
	}
	labelled, err := haveLabel(root, text(label, "imagelabel"))
	if err != nil || !labelled {
		return definition, err
	}
	if err := may(text(label, "label")); err != nil {
		return "", err
	}
	label.CreateAttr("type", "static")
	metadata := root.SelectElement("metadata")
	if metadata == nil {
		metadata = root.CreateElement("metadata")
	}
	mark := metadata.CreateElement(chosen)
	mark.CreateAttr(chosenPrefix, chosenURI)
	mark.CreateAttr("type", "dynamic")
	return doc.WriteToString()
}

// copyLabel adds the label of a domain that runs to its definition, which has it no more than what libvirt chose
// otherwise.
func copyLabel(root *etree.Element, live string) error {
	_, running, err := parse(live)
	if err != nil {
		return err
	}
	label, given := running.FindElement("seclabel[@model='selinux']"), root.FindElement("seclabel[@model='selinux']")
	switch {
	case label == nil:
		return nil
	case given == nil && label.SelectAttrValue("type", "") != "dynamic":
		return nil
	case given != nil && given.SelectAttrValue("type", "") != "dynamic": // its operator chose it
		return nil
	case given != nil:
		root.RemoveChild(given)
	}
	label = label.Copy() // static, if it had to be at the move before
	label.CreateAttr("type", "dynamic")
	root.AddChild(label)
	return nil
}

// withoutLabel undoes withLabel: at its next start libvirt chooses the domain's label again.
func withoutLabel(root *etree.Element) {
	metadata := root.SelectElement("metadata")
	if metadata == nil || metadata.SelectElement(chosen) == nil {
		return
	}
	metadata.RemoveChild(metadata.SelectElement(chosen))
	if len(metadata.ChildElements()) == 0 {
		root.RemoveChild(metadata)
	}
	if label := root.FindElement("seclabel[@model='selinux'][@type='static']"); label != nil {
		label.CreateAttr("type", "dynamic")
	}
}

// selinuxDir is libselinux's (selinux_config(5)).
const selinuxDir = "/etc/selinux"

// mayLabel refuses a label that this host's libvirt would not choose, but for its categories. It reads what libvirt
// reads: the domains of QEMUs by KVM and by TCG, one a line (virtual_domain_context(5)).
func mayLabel(label string) error {
	config, err := os.ReadFile(filepath.Join(selinuxDir, "config"))
	if err != nil {
		return fmt.Errorf("the labels of libvirt's QEMUs: %w", err)
	}
	var policy string
	for line := range strings.Lines(string(config)) {
		if name, is := strings.CutPrefix(strings.TrimSpace(line), "SELINUXTYPE="); is {
			policy = name
		}
	}
	contexts, err := os.ReadFile(filepath.Join(selinuxDir, policy, "contexts/virtual_domain_context"))
	if err != nil {
		return fmt.Errorf("the labels of libvirt's QEMUs: %w", err)
	}
	for _, own := range strings.Fields(string(contexts)) {
		if label == own || strings.HasPrefix(label, own+":") {
			return nil
		}
	}
	return fmt.Errorf("%w: %s", ErrForeignLabel, label)
}

// haveLabel says whether one of a domain's images has a label of SELinux's on this host.
func haveLabel(root *etree.Element, label string) (bool, error) {
	for _, source := range root.FindElements("devices/disk[@type='file']/source") {
		path := source.SelectAttrValue("file", "")
		if path == "" || label == "" {
			continue
		}
		got, err := labelOf(path)
		if err != nil {
			return false, err
		}
		if got != label {
			continue
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(path, &fs); err != nil {
			return false, fmt.Errorf("the file system of the image %s: %w", path, err)
		}
		if fs.Type == unix.NFS_SUPER_MAGIC {
			return false, fmt.Errorf("%w: %s", ErrLabelledNFS, path)
		}
		return true, nil
	}
	return false, nil
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
