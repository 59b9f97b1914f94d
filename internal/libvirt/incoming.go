// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/beevik/etree"
	golibvirt "github.com/digitalocean/go-libvirt"
)

// The part of a definition that goes to QEMU as it is (drvqemu.rst of libvirt).
const (
	passthrough  = "qemu:commandline"
	argument     = "qemu:arg"
	namespace    = "xmlns:qemu"
	namespaceURI = "http://libvirt.org/schemas/domain/qemu/1.0"
)

// incoming are the arguments by which a QEMU waits for a migration, one an element.
var incoming = []string{"-incoming", "defer"}

// ErrActive says that a domain of the name runs already, or waits.
var ErrActive = errors.New("libvirt has a domain of that name already, which is not shut off")

// Start has the libvirt that listens at a socket, empty: this host's own, start a domain of that definition, whose QEMU
// waits for a migration, and returns its address. The domain is transient where it is not defined here.
func Start(ctx context.Context, socket, definition string) (vm string, err error) {
	if definition, err = withIncoming(definition); err != nil {
		return "", err
	}
	if err := refuseSharedLabel(definition); err != nil {
		return "", err
	}
	conn, err := connect(ctx, socket)
	if err != nil {
		return "", err
	}
	defer conn.within(ctx)()
	d, err := conn.DomainCreateXML(definition, golibvirt.DomainStartPaused)
	if err != nil {
		err = fmt.Errorf("have libvirt start the domain: %w", err)
		if isActive(conn, definition) {
			err = fmt.Errorf("%w: %w", ErrActive, err)
		}
		return "", errors.Join(err, conn.Close())
	}
	return Address(socket, formatUUID(d.UUID)), conn.Close()
}

// isActive says whether a domain of a definition's name is there, and not shut off.
func isActive(conn *connection, definition string) bool {
	name, err := NameOf(definition)
	if err != nil {
		return false
	}
	d, err := conn.DomainLookupByName(name)
	if err != nil {
		return false
	}
	active, err := conn.DomainIsActive(d)
	return err == nil && active != 0
}

// withIncoming returns a definition whose QEMU waits for a migration.
func withIncoming(definition string) (string, error) {
	doc, root, err := parse(definition)
	if err != nil {
		return "", err
	}
	root.CreateAttr(namespace, namespaceURI)
	line := root.SelectElement(passthrough)
	if line == nil {
		line = root.CreateElement(passthrough)
	}
	for _, value := range incoming {
		line.CreateElement(argument).CreateAttr("value", value)
	}
	return doc.WriteToString()
}

// asItStarts returns a domain's definition as it was before withIncoming, with the label of its images: what its next start
// uses, and its next move.
func asItStarts(definition, live string) (string, error) {
	doc, root, err := parse(definition)
	if err != nil {
		return "", err
	}
	withoutIncoming(root)
	if err := copyLabel(root, live); err != nil {
		return "", err
	}
	return doc.WriteToString()
}

// withoutIncoming undoes withIncoming.
func withoutIncoming(root *etree.Element) {
	line := root.SelectElement(passthrough)
	if line == nil {
		return
	}
	args := line.SelectElements(argument)
	for i := 0; i+1 < len(args); i++ {
		first, second := args[i].SelectAttrValue("value", ""), args[i+1].SelectAttrValue("value", "")
		if first == incoming[0] && second == incoming[1] {
			line.RemoveChild(args[i])
			line.RemoveChild(args[i+1])
			i++
		}
	}
	if len(line.ChildElements()) == 0 {
		root.RemoveChild(line)
	}
}

func parse(definition string) (*etree.Document, *etree.Element, error) {
	doc := etree.NewDocument()
	if err := doc.ReadFromString(definition); err != nil {
		return nil, nil, fmt.Errorf("definition of a domain: %w", err)
	}
	root := doc.SelectElement("domain")
	if root == nil {
		return nil, nil, errors.New("definition of a domain: it is none of a domain")
	}
	return doc, root, nil
}

// SameDomain refuses a definition that is of another domain than the first.
func SameDomain(first, other string) error {
	_, want, err := parse(first)
	if err != nil {
		return err
	}
	_, got, err := parse(other)
	if err != nil {
		return err
	}
	for _, tag := range []string{"name", "uuid"} {
		a, b := text(want, tag), text(got, tag)
		if a != b {
			return fmt.Errorf("it is of another domain: its <%s> is %q, and not %q", tag, b, a)
		}
	}
	return nil
}

// text is that of a child; empty: there is none.
func text(of *etree.Element, tag string) string {
	child := of.SelectElement(tag)
	if child == nil {
		return ""
	}
	return strings.TrimSpace(child.Text())
}

// NameOf is the name of the domain that a definition is of.
func NameOf(definition string) (string, error) {
	_, root, err := parse(definition)
	if err != nil {
		return "", err
	}
	return text(root, "name"), nil
}

// A Limit says what a definition of somebody else's may not have.
type Limit struct {
	// MayRun says whether a QEMU binary may be started.
	MayRun func(binary string) error
	// Root: it may say whom QEMU runs as, and what a security module lets it do.
	Root bool
}

// Check refuses a definition by which its sender would have more of this host than a VM.
func (l Limit) Check(definition string) error {
	_, root, err := parse(definition)
	if err != nil {
		return err
	}
	emulator := root.FindElement("devices/emulator")
	if emulator == nil {
		return errors.New("the domain's definition names no emulator")
	}
	if err := l.MayRun(strings.TrimSpace(emulator.Text())); err != nil {
		return err
	}
	for _, child := range root.ChildElements() {
		if child.Space != "" {
			return fmt.Errorf("the domain's definition has <%s>, by which QEMU is started with anything",
				child.FullTag())
		}
	}
	for _, script := range root.FindElements("devices/interface/*") {
		if script.Tag == "script" || script.Tag == "downscript" {
			return errors.New("the domain's definition has an interface with a script, which libvirt would run as root")
		}
	}
	for _, label := range root.FindElements("seclabel") {
		if label.SelectAttrValue("model", "") == "dac" && !l.Root {
			return errors.New("the domain's definition says whom QEMU runs as (<seclabel model='dac'>)")
		}
		if kind := label.SelectAttrValue("type", ""); kind != "" && kind != "dynamic" && !l.Root {
			return fmt.Errorf("the domain's definition says how QEMU is confined (<seclabel type='%s'>)", kind)
		}
	}
	return nil
}

// Persist defines the domain here as it runs, so that it stays when it ends.
func (d *Domain) Persist(ctx context.Context) error {
	definition, err := d.Definition(ctx)
	if err != nil {
		return err
	}
	defer d.within(ctx)()
	if _, err := d.DomainDefineXMLFlags(definition, 0); err != nil {
		return fmt.Errorf("define libvirt's domain %s: %w", d.Name(), err)
	}
	return nil
}

// Undefine removes the domain's definition. A transient one has none.
func (d *Domain) Undefine(ctx context.Context) error {
	defer d.within(ctx)()
	persistent, err := d.DomainIsPersistent(d.id)
	if err != nil {
		return fmt.Errorf("libvirt's domain %s: %w", d.Name(), err)
	}
	if persistent == 0 {
		return nil
	}
	const keep = golibvirt.DomainUndefineKeepNvram | golibvirt.DomainUndefineManagedSave
	if err := d.DomainUndefineFlags(d.id, keep); err != nil {
		return fmt.Errorf("undefine libvirt's domain %s: %w", d.Name(), err)
	}
	return nil
}
