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

// ErrNoDomain says that libvirt knows no such domain: none runs, and none is defined.
var ErrNoDomain = errors.New("libvirt has no such domain")

// ErrOtherRun says that the domain has ended, or was started anew, since its Domain was opened. Nothing was changed:
// the command would have reached the QEMU of a later run.
var ErrOtherRun = errors.New("the domain has ended, or was started anew, since this daemon connected to it")

// sockets are the paths at which libvirt's daemon for QEMU may listen, the newer one first (daemons.rst of libvirt).
var sockets = []string{"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"}

// uri is the connection URI for the VMs of the whole host.
const uri = golibvirt.QEMUSystem

// A Domain is a domain of this host's libvirt, with a connection of its own to libvirt, which Close closes. It stands
// for one run of the domain, the one at the time it was opened: see checkRun.
//
// libvirt may take long to answer. When the context of a call ends, the connection is closed, and all calls on it fail.
type Domain struct {
	*connection
	id      golibvirt.Domain // its ID is the number of the run; -1: the domain did not run
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

// closeAfter closes the connection when ctx ends, unless release is called before.
func (c *connection) closeAfter(ctx context.Context) (release func() bool) {
	return context.AfterFunc(ctx, func() { _ = c.socket.Close() }) // the call that is under way then fails
}

// Close closes the connection, and that of a Monitor. The domain continues.
func (c *connection) Close() (err error) {
	c.close.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		defer c.closeAfter(ctx)() // Disconnect calls libvirt, and waits for the answer
		err = c.Disconnect()
	})
	if errors.Is(err, net.ErrClosed) || errors.Is(err, golibvirt.ErrInterrupted) { // it has ended either way
		return nil
	}
	return err
}

// connect makes a connection to the libvirt that listens on a socket. If socketPath is empty, it tries sockets.
func connect(ctx context.Context, socketPath string) (*connection, error) {
	paths := sockets
	if socketPath != "" {
		paths = []string{socketPath}
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
		defer c.closeAfter(ctx)()
		if err := c.ConnectToURI(uri); err != nil {
			return nil, errors.Join(fmt.Errorf("connect to libvirt at %s: %w", path, err), socket.Close())
		}
		return c, nil
	}
	for _, err := range errs {
		if socketPath != "" || !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", ErrNoLibvirt, err)
		}
	}
	return nil, ErrNoLibvirt
}

// Open connects to the libvirt of an address, and finds the domain.
func Open(ctx context.Context, vm string) (*Domain, error) {
	socket, name, err := parseAddress(vm)
	if err != nil {
		return nil, err
	}
	conn, err := connect(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer conn.closeAfter(ctx)()
	d := &Domain{connection: conn, address: vm}
	if uuid, isUUID := parseUUID(name); isUUID {
		d.id, err = conn.DomainLookupByUUID(uuid)
	} else {
		d.id, err = conn.DomainLookupByName(name)
	}
	if err != nil {
		if isError(err, golibvirt.ErrNoDomain) {
			err = fmt.Errorf("%w: %w", ErrNoDomain, err)
		}
		return nil, errors.Join(fmt.Errorf("the domain %q: %w", name, err), d.Close())
	}
	return d, nil
}

// Name returns the domain's name.
func (d *Domain) Name() string { return d.id.Name }

// Address returns the address that the domain was opened with.
func (d *Domain) Address() string { return d.address }

// checkRun returns nil if the run that d was opened with goes on, else ErrOtherRun. It is called right before a call
// that changes something, because libvirt finds a domain by its UUID alone: the call would change whichever run has
// that now. libvirt gives each run another number (virDomainGetID), and none to a domain that is shut off. A libvirtd
// that is restarted may use a number again, but the connection of d ends with the libvirtd that it was made to.
//
// A run that begins between the answer and the call is not noticed. libvirt has no call that names a run.
func (d *Domain) checkRun() error {
	now, err := d.DomainLookupByUUID(d.id.UUID)
	switch {
	case err != nil && isGone(err):
		return ErrOtherRun
	case err != nil:
		return fmt.Errorf("number of the domain's run: %w", err)
	case now.ID != d.id.ID || now.ID < 0:
		return ErrOtherRun
	default:
		return nil
	}
}

// isGone says whether libvirt refused a call because the domain does not run, or does not exist any more.
func isGone(err error) bool {
	return isError(err, golibvirt.ErrNoDomain) || isError(err, golibvirt.ErrOperationInvalid)
}

// isError says whether libvirt answered with that code.
func isError(err error, code golibvirt.ErrorNumber) bool {
	var refused golibvirt.Error
	return errors.As(err, &refused) && golibvirt.ErrorNumber(refused.Code) == code
}

// Destroy ends the QEMU of this run of the domain at once. It is no error if that has ended already; a later run is
// left alone. A transient domain does not exist any more after it. The domain's images keep their owner; ErrOwner says
// that the domain has ended, but that an image has another owner now.
func (d *Domain) Destroy(ctx context.Context) error {
	defer d.closeAfter(ctx)()
	definition, err := d.DomainGetXMLDesc(d.id, 0)
	if err != nil && isGone(err) {
		return nil
	}
	var kept []image
	if err == nil {
		kept, err = images(definition, d.volumePath)
	}
	var notKept error
	if err != nil { // the domain is ended nevertheless
		notKept = fmt.Errorf("%w: %w", ErrOwner, err)
	}
	if err = d.checkRun(); err != nil {
		closeAll(kept)
		if errors.Is(err, ErrOtherRun) {
			return nil
		}
		return fmt.Errorf("end libvirt's domain %s: %w", d.Name(), err)
	}
	err = d.DomainDestroyFlags(d.id, golibvirt.DomainDestroyDefault)
	notKept = errors.Join(notKept, restoreOwners(kept))
	if err != nil && !isGone(err) {
		return fmt.Errorf("end libvirt's domain %s: %w", d.Name(), err)
	}
	if notKept != nil {
		return fmt.Errorf("the domain has ended: %w", notKept)
	}
	return nil
}

// Definition returns the definition of the running domain, with devices that were plugged in and with its secrets, as
// libvirt's own migration would send it.
func (d *Domain) Definition(ctx context.Context) (string, error) {
	defer d.closeAfter(ctx)()
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

// Running is a domain that runs.
type Running struct{ Name, UUID string }

// Domains returns the running domains of the libvirt that listens on socket, or of this host's libvirt if it is empty.
func Domains(ctx context.Context, socket string) (running []Running, err error) {
	conn, err := connect(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer conn.closeAfter(ctx)()
	domains, _, err := conn.ConnectListAllDomains(1, golibvirt.ConnectListDomainsActive)
	for _, d := range domains {
		running = append(running, Running{Name: d.Name, UUID: formatUUID(d.UUID)})
	}
	return running, errors.Join(err, conn.Close())
}
