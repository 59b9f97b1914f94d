// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/beevik/etree"

	"github.com/migrated-vm/migrated/internal/owned"
)

// A Limit bounds what a definition from another host may contain.
type Limit struct {
	// Name is the name of the VM that the other host has said it sends.
	Name string
	// MayRun returns an error if a QEMU binary may not be started.
	MayRun func(binary string) error
	// Root allows the definition to say which user QEMU runs as, how a security module confines it, and which files the
	// output of its character devices is written to.
	Root bool
}

// Check refuses a definition that would give its sender more of this host than a VM.
func (l Limit) Check(definition string) error {
	doc, root, err := parse(definition)
	if err != nil {
		return err
	}
	// What libvirt reads is what is checked here.
	if err := errors.Join(checkProlog(doc), checkNamespaces(root)); err != nil {
		return err
	}
	if name, err := theOnly(root, "name"); err != nil {
		return err
	} else if name != l.Name {
		return fmt.Errorf("the domain's definition is of %q, but the VM that is sent is %q", name, l.Name)
	}
	emulator, err := theOnly(root, "devices/emulator")
	if err != nil {
		return err
	}
	if err := l.MayRun(emulator); err != nil {
		return err
	}
	if err := checkRoots(root); err != nil || l.Root {
		return err
	}
	return errors.Join(checkSecurityLabels(root), checkOutput(root))
}

// declaration matches what may be in an XML declaration.
var declaration = regexp.MustCompile(`^version=["']1\.0["'](\s+encoding=["'](?i:utf-8)["'])?\s*$`)

// checkProlog refuses what would make libvirt read the document otherwise than this package: another encoding, or a
// document type, which can add attributes.
func checkProlog(doc *etree.Document) error {
	for _, token := range doc.Child {
		switch t := token.(type) {
		case *etree.Directive:
			return fmt.Errorf("the domain's definition has <!%.20s…>: no document type is allowed", t.Data)
		case *etree.ProcInst:
			if t.Target != "xml" || !declaration.MatchString(t.Inst) {
				return fmt.Errorf("the domain's definition begins with <?%s %.80s?>, and must be of XML 1.0 in UTF-8",
					t.Target, t.Inst)
			}
		}
	}
	return nil
}

// checkNamespaces refuses elements and attributes of other namespaces than libvirt's own, which has no name. Those of
// QEMU's can pass any option to it, and any other could be taken for one of libvirt's here. Management programs keep
// what they like in <metadata>, which libvirt does not read.
func checkNamespaces(root *etree.Element) error {
	if err := checkNamespace(root); err != nil {
		return err
	}
	for _, child := range root.ChildElements() {
		err := checkNamespace(child)
		if err == nil && child.Tag != "metadata" {
			err = checkDescendants(child)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func checkDescendants(of *etree.Element) error {
	for _, child := range of.ChildElements() {
		if err := errors.Join(checkNamespace(child), checkDescendants(child)); err != nil {
			return err
		}
	}
	return nil
}

func checkNamespace(e *etree.Element) error {
	if e.Space != "" {
		return fmt.Errorf("the domain's definition has <%s>, which can pass any option to QEMU", e.FullTag())
	}
	for _, a := range e.Attr { // xmlns:qemu= alone, without an element that uses it, does nothing
		if a.Space != "" && a.Space != "xmlns" || a.FullKey() == "xmlns" {
			return fmt.Errorf("the domain's definition has <%s %s=%q>, which can pass any option to QEMU",
				e.Tag, a.FullKey(), a.Value)
		}
	}
	return nil
}

// theOnly returns the text of the one element at a path. Like libvirt, it does not trim the text.
func theOnly(root *etree.Element, path string) (string, error) {
	found := root.FindElements(path)
	if len(found) != 1 {
		return "", fmt.Errorf("the domain's definition has %d elements %s, want one", len(found), path)
	}
	for _, token := range found[0].Child {
		if _, isText := token.(*etree.CharData); !isText {
			return "", fmt.Errorf("the domain's definition has more than a text in its element %s", path)
		}
	}
	return found[0].Text(), nil
}

// checkRoots refuses what libvirt would run as root.
func checkRoots(root *etree.Element) error {
	for _, script := range root.FindElements("devices/interface/*") {
		if script.Tag == "script" || script.Tag == "downscript" {
			return errors.New("the domain's definition has an interface with a script, which libvirt would run as root")
		}
	}
	for _, fs := range root.FindElements("devices/filesystem") {
		if fs.FindElement("driver[@type='virtiofs']") != nil || fs.SelectElement("binary") != nil {
			return errors.New("the domain's definition has a directory shared by virtiofs, " +
				"which libvirt would serve as root, and with which no VM can be moved")
		}
	}
	return nil
}

// checkSecurityLabels refuses labels that choose QEMU's user or how it is confined.
func checkSecurityLabels(root *etree.Element) error {
	for _, label := range root.FindElements("seclabel") {
		if label.SelectAttrValue("model", "") == "dac" {
			return errors.New("the domain's definition sets the user that QEMU runs as (<seclabel model='dac'>)")
		}
		if kind := label.SelectAttrValue("type", ""); kind != "" && kind != "dynamic" {
			return fmt.Errorf("the domain's definition says how QEMU is confined (<seclabel type='%s'>)", kind)
		}
	}
	return nil
}

// logDir is the directory of libvirt's logs. Root alone can change it.
const logDir = "/var/log/libvirt/qemu/"

// checkOutput refuses character devices whose output would go to a file of root's: virtlogd makes that file, and writes
// what the guest says, as root.
func checkOutput(root *etree.Element) error {
	var paths []string
	for _, device := range root.FindElements("devices//*") {
		if device.Tag == "log" {
			paths = append(paths, device.SelectAttrValue("file", ""))
		}
		if kind := device.SelectAttrValue("type", ""); kind != "file" && kind != "pipe" {
			continue
		}
		for _, source := range device.SelectElements("source") {
			if path := source.SelectAttr("path"); path != nil { // an image has file=
				paths = append(paths, path.Value)
			}
		}
	}
	for _, path := range paths {
		if !mayWrite(path) {
			return fmt.Errorf("the domain's definition has a character device that writes to %q as root; it may do so "+
				"below %s, and in a directory that is here and that others than root can change", path, logDir)
		}
	}
	return nil
}

// Sockets returns the paths of the Unix sockets at which the QEMU of a definition is to listen. libvirt or QEMU removes
// what is there.
func Sockets(definition string) (paths []string, err error) {
	_, root, err := parse(definition)
	if err != nil {
		return nil, err
	}
	for _, device := range root.FindElements("devices//*") {
		path := device.SelectAttrValue("socket", "") // of graphics, and their listen
		if device.Tag == "source" && device.SelectAttrValue("mode", "") == "bind" {
			path = device.SelectAttrValue("path", "")
		}
		if path != "" {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

// mayWrite says whether root may write a VM's output to a file: a log of libvirt's, or where another user, a management
// program's or the VM's own, could write to it anyway.
func mayWrite(path string) bool {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path {
		return false
	}
	if strings.HasPrefix(path, logDir) {
		return true
	}
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() && info.Mode()&os.ModeNamedPipe == 0 {
		return false // a symbolic link may lead elsewhere
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return false
	}
	_, roots := owned.ByRoot(dir)
	return !roots
}
