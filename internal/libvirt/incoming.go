// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/beevik/etree"
	golibvirt "github.com/digitalocean/go-libvirt"
)

// Elements of a definition whose values libvirt adds to QEMU's command line (drvqemu.rst of libvirt).
const (
	passthrough  = "qemu:commandline"
	argument     = "qemu:arg"
	namespace    = "xmlns:qemu"
	namespaceURI = "http://libvirt.org/schemas/domain/qemu/1.0"
)

// incoming are the arguments that make a QEMU wait for a migration.
var incoming = []string{"-incoming", "defer"}

// ErrActive says that a domain of that name runs already, or waits for a migration.
var ErrActive = errors.New("libvirt has a domain of that name already, which is not shut off")

// ErrNoAnswer says that libvirt may have started a domain, or may yet do so, but has not answered.
var ErrNoAnswer = errors.New("libvirt has not said whether it started the domain, and may still start it")

// answerTimeout bounds how long Start waits for libvirt when its context has ended.
const answerTimeout = time.Minute

// Start makes libvirt start a domain whose QEMU waits for a migration, and returns this run of it. libvirt is the one
// that listens on socket, or this host's if socket is empty. The domain is transient unless it is defined here.
//
// The VM runs on another host, so if Start fails, the images have the owner that they had before.
func Start(ctx context.Context, socket, definition string) (*Domain, error) {
	started, err := withIncoming(definition)
	if err != nil {
		return nil, err
	}
	conn, err := connect(ctx, socket)
	if err != nil {
		return nil, err
	}
	release := conn.closeAfter(ctx) // until create, which must not end with ctx
	if err := refuseSharedLabel(definition, conn.volumePath); err != nil {
		release()
		return nil, errors.Join(err, conn.Close())
	}
	var d *Domain
	if err = keepOwners(definition, conn.volumePath, func() (err error) {
		if !release() {
			return context.Cause(ctx)
		}
		d, err = create(ctx, conn, started)
		return err
	}); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	d.address = Address(socket, formatUUID(d.id.UUID))
	return d, nil
}

// create makes libvirt start the domain. libvirt goes on when its client leaves, so the call does not end with ctx, or
// nobody would end the domain: create does so when ctx has ended.
func create(ctx context.Context, conn *connection, definition string) (*Domain, error) {
	patient, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(answerTimeout, cancel) })()
	defer conn.closeAfter(patient)()
	id, err := conn.DomainCreateXML(definition, golibvirt.DomainStartPaused)
	var refused golibvirt.Error
	switch {
	case err == nil:
	case !errors.As(err, &refused):
		return nil, fmt.Errorf("%w: %w", ErrNoAnswer, err)
	case isActive(conn, definition):
		return nil, fmt.Errorf("%w: %w", ErrActive, err)
	default:
		return nil, fmt.Errorf("have libvirt start the domain: %w", err)
	}
	d := &Domain{connection: conn, id: id}
	if ctx.Err() == nil {
		return d, nil
	}
	ending, cancelEnding := context.WithTimeout(context.WithoutCancel(ctx), answerTimeout)
	defer cancelEnding()
	return nil, errors.Join(context.Cause(ctx), d.Destroy(ending))
}

// isActive says whether a domain with the name in a definition exists and is not shut off.
func isActive(conn *connection, definition string) bool {
	_, root, err := parse(definition)
	if err != nil {
		return false
	}
	d, err := conn.DomainLookupByName(text(root, "name"))
	if err != nil {
		return false
	}
	active, err := conn.DomainIsActive(d)
	return err == nil && active != 0
}

// withIncoming returns a definition to which incoming was added, and from which the label of copyLabel was removed.
func withIncoming(definition string) (string, error) {
	doc, root, err := parse(definition)
	if err != nil {
		return "", err
	}
	withoutCopiedLabel(root)
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

// asItStarts undoes withIncoming in a domain's definition, and adds the label of its images from live. The result is
// used for the domain's next start and its next migration.
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

// withoutLabel undoes copyLabel in a domain's definition.
func withoutLabel(definition string) (string, error) {
	doc, root, err := parse(definition)
	if err != nil {
		return "", err
	}
	withoutCopiedLabel(root)
	return doc.WriteToString()
}

// withoutIncoming undoes withIncoming in an element <domain>.
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

// parse returns the document and its element <domain>.
func parse(definition string) (*etree.Document, *etree.Element, error) {
	doc := etree.NewDocument()
	if err := doc.ReadFromString(definition); err != nil {
		return nil, nil, fmt.Errorf("definition of a domain: %w", err)
	}
	root := doc.SelectElement("domain")
	if root == nil {
		return nil, nil, errors.New("not the definition of a libvirt domain: there is no <domain> element")
	}
	return doc, root, nil
}

// SameDomain returns an error if two definitions have different names or UUIDs.
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
			return fmt.Errorf("the definition is of another domain: its <%s> is %q, want %q", tag, b, a)
		}
	}
	return nil
}

// text returns the text of a child element; empty: there is none.
func text(of *etree.Element, tag string) string {
	child := of.SelectElement(tag)
	if child == nil {
		return ""
	}
	return strings.TrimSpace(child.Text())
}

// Persist makes the running domain persistent, so that libvirt keeps its definition when it ends. It fails with
// ErrOtherRun if this run has ended: the definition may then be that of a later one.
func (d *Domain) Persist(ctx context.Context) error {
	definition, err := d.Definition(ctx)
	if err == nil {
		definition, err = withoutLabel(definition)
	}
	if err != nil {
		return err
	}
	defer d.closeAfter(ctx)()
	if err = d.checkRun(); err == nil {
		_, err = d.DomainDefineXMLFlags(definition, 0)
	}
	if err != nil {
		return fmt.Errorf("define libvirt's domain %s: %w", d.Name(), err)
	}
	return nil
}

// IsDefined says whether libvirt keeps the domain's definition when it ends.
func (d *Domain) IsDefined(ctx context.Context) (bool, error) {
	defer d.closeAfter(ctx)()
	persistent, err := d.DomainIsPersistent(d.id)
	if err != nil {
		return false, fmt.Errorf("is libvirt's domain %s defined: %w", d.Name(), err)
	}
	return persistent != 0, nil
}

// Undefine removes the domain's definition. It does nothing with a transient domain, which has none. It fails with
// ErrOtherRun if this run has ended: a domain that was started anew, or is shut off, is in use by somebody.
func (d *Domain) Undefine(ctx context.Context) error {
	defined, err := d.IsDefined(ctx)
	if err != nil || !defined {
		return err
	}
	defer d.closeAfter(ctx)()
	const keep = golibvirt.DomainUndefineKeepNvram | golibvirt.DomainUndefineManagedSave
	if err = d.checkRun(); err == nil {
		err = d.DomainUndefineFlags(d.id, keep)
	}
	if err != nil {
		return fmt.Errorf("undefine libvirt's domain %s: %w", d.Name(), err)
	}
	return nil
}
