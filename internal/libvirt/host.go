// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"sync"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// ErrNoLibvirt says that no libvirtd answers on this host.
var ErrNoLibvirt = errors.New("no libvirt daemon answers on this host; start libvirtd or virtqemud")

// sockets are those of libvirt's daemon for QEMU, the newer one first (daemons.rst of libvirt).
var sockets = []string{"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"}

// uri is that of the VMs of the whole host.
const uri = golibvirt.QEMUSystem

// A Domain is one that is defined, or runs, on this host, and a connection of its own to libvirt. Close it.
//
// libvirt may take its time: when the context of a call is over, the connection is closed, and everything on it fails.
type Domain struct {
	*connection
	id      golibvirt.Domain
	address string
}

// closeTimeout bounds Close.
const closeTimeout = 2 * time.Second

// A connection is one to libvirt.
type connection struct {
	*golibvirt.Libvirt
	socket net.Conn
	close  sync.Once
}

// within closes the connection when ctx is over, until release.
func (c *connection) within(ctx context.Context) (release func() bool) {
	return context.AfterFunc(ctx, func() { _ = c.socket.Close() }) // what is called says that it failed
}

// Close ends the connection, and that of a Monitor. The domain goes on.
func (c *connection) Close() (err error) {
	c.close.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		defer c.within(ctx)() // it says goodbye, and waits for the answer
		err = c.Disconnect()
	})
	if errors.Is(err, net.ErrClosed) || errors.Is(err, golibvirt.ErrInterrupted) { // it has ended either way
		return nil
	}
	return err
}

// connect makes a connection to the libvirt that listens at a path; empty: at one of sockets.
func connect(ctx context.Context, at string) (*connection, error) {
	paths := sockets
	if at != "" {
		paths = []string{at}
	}
	var errs []error
	for _, path := range paths {
		socket, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c := &connection{
			Libvirt: golibvirt.NewWithDialer(dialers.NewAlreadyConnected(&withDetails{Conn: socket})), socket: socket,
		}
		defer c.within(ctx)()
		if err := c.ConnectToURI(uri); err != nil {
			return nil, errors.Join(fmt.Errorf("connect to libvirt at %s: %w", path, err), socket.Close())
		}
		return c, nil
	}
	for _, err := range errs {
		if at != "" || !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", ErrNoLibvirt, err)
		}
	}
	return nil, ErrNoLibvirt
}

// Open finds the domain of an address.
func Open(ctx context.Context, vm string) (*Domain, error) {
	socket, name, err := parseAddress(vm)
	if err != nil {
		return nil, err
	}
	conn, err := connect(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer conn.within(ctx)()
	d := &Domain{connection: conn, address: vm}
	if uuid, isUUID := parseUUID(name); isUUID {
		d.id, err = conn.DomainLookupByUUID(uuid)
	} else {
		d.id, err = conn.DomainLookupByName(name)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("libvirt has no domain %q: %w", name, err), d.Close())
	}
	return d, nil
}

// Name is the domain's.
func (d *Domain) Name() string { return d.id.Name }

// isGone says whether libvirt refused a call because the domain does not run, or is none any more.
func isGone(err error) bool {
	var refused golibvirt.Error
	if !errors.As(err, &refused) {
		return false
	}
	code := golibvirt.ErrorNumber(refused.Code)
	return code == golibvirt.ErrNoDomain || code == golibvirt.ErrOperationInvalid
}

// Destroy ends the domain's QEMU at once. One that has ended is no error. A transient domain is gone then. Its images
// stay whose they are: an ErrOwner says that it has ended, and that they do not.
func (d *Domain) Destroy(ctx context.Context) error {
	defer d.within(ctx)()
	definition, err := d.DomainGetXMLDesc(d.id, 0)
	if err != nil && isGone(err) {
		return nil
	}
	var kept []image
	if err == nil {
		kept, err = images(definition)
	}
	var notKept error
	if err != nil { // it ends all the same
		notKept = fmt.Errorf("%w, perhaps: %w", ErrOwner, err)
	}
	err = d.DomainDestroyFlags(d.id, golibvirt.DomainDestroyDefault)
	for _, i := range kept {
		notKept = errors.Join(notKept, i.giveBack())
	}
	if err != nil && !isGone(err) {
		return fmt.Errorf("end libvirt's domain %s: %w", d.Name(), err)
	}
	return notKept
}

// Definition is the domain's as it runs now, with what was plugged in and with its secrets, as libvirt's own migration
// would send it.
func (d *Domain) Definition(ctx context.Context) (string, error) {
	defer d.within(ctx)()
	text, err := d.DomainGetXMLDesc(d.id, golibvirt.DomainXMLMigratable|golibvirt.DomainXMLSecure)
	var live string
	if err == nil {
		live, err = d.DomainGetXMLDesc(d.id, 0)
	}
	if err == nil {
		text, err = asItStarts(text, live)
	}
	if err != nil {
		return "", fmt.Errorf("definition of libvirt's domain %s: %w", d.Name(), err)
	}
	return text, nil
}

// Names are those of the domains that run at the libvirt that listens at a socket; empty: this host's own.
func Names(ctx context.Context, socket string) ([]string, error) {
	conn, err := connect(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer conn.within(ctx)()
	domains, _, err := conn.ConnectListAllDomains(1, golibvirt.ConnectListDomainsActive)
	var names []string
	for _, d := range domains {
		names = append(names, d.Name)
	}
	return names, errors.Join(err, conn.Close())
}
