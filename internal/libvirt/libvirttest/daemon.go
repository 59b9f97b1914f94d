// SPDX-License-Identifier: Apache-2.0

// Package libvirttest is a libvirt daemon for tests that need what a real one does not do on demand: a domain that is
// started anew between two calls, a call that fails, an event at a chosen moment. It has one domain, and answers the
// calls that internal/libvirt makes.
package libvirttest

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// Domain is the daemon's domain.
type Domain struct {
	Name       string
	UUID       golibvirt.UUID
	Number     int32 // of the run; -1: it is shut off
	Persistent bool
	Gone       bool // libvirt knows no such domain
	State      golibvirt.DomainState

	Snapshots, Checkpoints int
	Autostart              bool
	XML                    string
}

// Daemon is a libvirt daemon that listens on a socket of its own.
type Daemon struct {
	Socket string

	mu      sync.Mutex
	domain  Domain
	before  map[string]func()
	refused map[string]string
	calls   []string
	monitor func(command string) (reply string)
	clients []client
	conns   []net.Conn
}

// A client has asked for events.
type client struct {
	conn     net.Conn
	callback uint32
	qemu     bool // for QEMU's events, else for those of the domain's life
}

// Start starts a daemon that ends with the test.
func Start(t testing.TB, domain Domain) *Daemon {
	t.Helper()
	d := &Daemon{
		Socket: filepath.Join(t.TempDir(), "libvirt-sock"), domain: domain,
		before: map[string]func(){}, refused: map[string]string{},
	}
	listener, err := net.Listen("unix", d.Socket)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			d.mu.Lock()
			d.conns = append(d.conns, conn)
			d.mu.Unlock()
			serving.Go(func() { d.serve(conn) })
			t.Cleanup(func() { conn.Close() })
		}
	})
	t.Cleanup(func() { listener.Close() })
	return d
}

// Address returns the address of the domain for internal/libvirt.
func (d *Daemon) Address() string {
	name := d.Domain().Name
	return "libvirt+unix:///" + name + "?" + url.Values{"socket": {d.Socket}}.Encode()
}

// Domain returns the domain as it is now.
func (d *Daemon) Domain() Domain {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.domain
}

// Change changes the domain, as its operator does with virsh.
func (d *Daemon) Change(change func(*Domain)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(&d.domain)
}

// StartAnew ends the domain's run and begins another one.
func (d *Daemon) StartAnew() { d.Change(func(d *Domain) { d.Number++ }) }

// Disconnect ends all connections, as when the daemon ends.
func (d *Daemon) Disconnect() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, conn := range d.conns {
		conn.Close()
	}
}

// TellStopped sends the event that the domain was destroyed. As libvirt's, it has no number any more.
func (d *Daemon) TellStopped() {
	stopped := d.Domain()
	stopped.Number = -1
	const lifecycle, event, destroyed = 318, 5, 1 // VIR_DOMAIN_EVENT_STOPPED, VIR_DOMAIN_EVENT_STOPPED_DESTROYED
	d.tell(false, lifecycle, append(stopped.encode(), words(event, destroyed)...))
}

// TellQEMU sends an event of the QEMU that the domain has now.
func (d *Daemon) TellQEMU(event string) {
	const monitorEvent = 6
	d.tell(true, monitorEvent, append(text(d.Domain().encode(), event), words(0, 0, 0, 0)...)) // time; no details
}

// tell sends an event to those who asked for it.
func (d *Daemon) tell(qemu bool, procedure uint32, body []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	program, version, typeMessage := uint32(remoteProgram), uint32(1), uint32(2)
	if qemu {
		program = qemuProgram
	}
	for _, c := range d.clients {
		if c.qemu == qemu {
			header := words(uint32(headerSize+4+len(body)), program, version, procedure, typeMessage, 0, 0)
			_, _ = c.conn.Write(slices.Concat(header, words(c.callback), body)) // it may have disconnected
		}
	}
}

// Before has do called once, before the next call of that name is executed.
func (d *Daemon) Before(call string, do func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.before[call] = do
}

// Refuse makes calls of that name fail.
func (d *Daemon) Refuse(call, message string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refused[call] = message
}

// Monitor sets who answers QMP commands.
func (d *Daemon) Monitor(answer func(command string) (reply string)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.monitor = answer
}

// Called returns the calls that changed the domain, by name: "create", "define", "undefine", "destroy", "resume".
func (d *Daemon) Called() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

// Messages of libvirt (rpc.rst there): the length of the whole message, then program, version, procedure, type, serial
// and status, 32 bits each.
const (
	headerSize    = 7 * 4
	remoteProgram = 0x20008086
	qemuProgram   = 0x20008087
	typeReply     = 1
	statusError   = 1
)

// calls are the procedures by program and number (remote_protocol.x and qemu_protocol.x of libvirt).
var calls = map[bool]map[uint32]string{
	false: {
		1: "open", 2: "close", 10: "create", 14: "xml", 15: "autostart", 23: "lookup by name", 24: "lookup by UUID",
		28: "resume", 66: "auth list", 151: "is persistent", 212: "state", 231: "undefine", 234: "destroy",
		274: "snapshots", 316: "register", 317: "deregister",
		350: "define", 413: "checkpoints",
	},
	true: {1: "monitor", 4: "register", 5: "deregister"},
}

// serve answers the calls of a connection, one after the other.
func (d *Daemon) serve(conn net.Conn) {
	defer conn.Close()
	for {
		header := make([]byte, headerSize)
		if _, err := io.ReadFull(conn, header); err != nil {
			return
		}
		body := make([]byte, binary.BigEndian.Uint32(header)-headerSize)
		if _, err := io.ReadFull(conn, body); err != nil {
			return
		}
		qemu := binary.BigEndian.Uint32(header[4:]) == qemuProgram
		call := calls[qemu][binary.BigEndian.Uint32(header[12:])]
		reply, err := d.answer(call, body)
		if call == "register" {
			reply = d.register(conn, qemu)
		}
		binary.BigEndian.PutUint32(header[16:], typeReply)
		if err != nil {
			binary.BigEndian.PutUint32(header[24:], statusError)
			reply = encodeError(err)
		}
		binary.BigEndian.PutUint32(header, uint32(headerSize+len(reply)))
		d.mu.Lock() // events are written by others
		_, err = conn.Write(slices.Concat(header, reply))
		d.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// register notes that a client wants events, and returns the answer.
func (d *Daemon) register(conn net.Conn, qemu bool) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	callback := uint32(len(d.clients) + 1)
	d.clients = append(d.clients, client{conn, callback, qemu})
	return words(callback)
}

// answer executes a call.
func (d *Daemon) answer(call string, body []byte) ([]byte, error) {
	d.mu.Lock()
	first, monitor := d.before[call], d.monitor
	delete(d.before, call)
	d.mu.Unlock()
	if first != nil {
		first()
	}
	if call == "monitor" && monitor != nil { // not under mu: it may end QEMU
		return text(nil, monitor(commandIn(body))), nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if message, refused := d.refused[call]; refused {
		return nil, golibvirt.Error{Code: uint32(golibvirt.ErrInternalError), Message: message}
	}
	switch call {
	case "open", "close", "register", "deregister":
		return nil, nil
	case "auth list":
		return words(1, 0), nil // one way: none
	}
	if d.domain.Gone && call != "create" {
		return nil, golibvirt.Error{Code: uint32(golibvirt.ErrNoDomain), Message: "no such domain"}
	}
	switch call {
	case "lookup by name", "lookup by UUID":
		return d.domain.encode(), nil
	case "state":
		return words(uint32(d.domain.State), 0), nil
	case "xml":
		return text(nil, d.domain.XML), nil
	case "snapshots":
		return words(0, uint32(d.domain.Snapshots)), nil // no list, and the number
	case "checkpoints":
		return words(0, uint32(d.domain.Checkpoints)), nil
	case "autostart":
		return truth(d.domain.Autostart), nil
	case "is persistent":
		return truth(d.domain.Persistent), nil
	}
	return d.change(call)
}

// change executes a call that changes the domain. The caller holds mu.
func (d *Daemon) change(call string) ([]byte, error) {
	off := d.domain.Number < 0
	switch {
	case call == "destroy" && !off:
		d.domain.Number, d.domain.Gone = -1, !d.domain.Persistent
	case call == "resume" && !off:
		d.domain.State = golibvirt.DomainRunning
	case call == "undefine" && d.domain.Persistent:
		d.domain.Persistent, d.domain.Gone = false, off
	case call == "define":
		d.domain.Persistent = true
	case call == "create" && off:
		d.domain.Number, d.domain.Gone = 1, false
	case call == "":
		return nil, golibvirt.Error{Code: uint32(golibvirt.ErrNoSupport), Message: "not made for this test"}
	default:
		return nil, golibvirt.Error{Code: uint32(golibvirt.ErrOperationInvalid), Message: "the domain is not running"}
	}
	d.calls = append(d.calls, call)
	if call == "define" || call == "create" {
		return d.domain.encode(), nil
	}
	return nil, nil
}

// commandIn returns the QMP command in the arguments of a call: it is behind the domain.
func commandIn(body []byte) string {
	name := int(binary.BigEndian.Uint32(body))
	body = body[4+(name+3)/4*4+16+4:]
	return string(body[4 : 4+binary.BigEndian.Uint32(body)])
}

// encode returns a remote_nonnull_domain.
func (d Domain) encode() []byte {
	return append(append(text(nil, d.Name), d.UUID[:]...), words(uint32(d.Number))...)
}

// encodeError returns the begin of a remote_error, as far as go-libvirt reads it.
func encodeError(err error) []byte {
	var refused golibvirt.Error
	if !errors.As(err, &refused) {
		refused.Message = err.Error()
	}
	return append(text(words(refused.Code, 0, 1), refused.Message), words(2)...) // 1: there is a message; 2: an error
}

// words returns numbers of 32 bits.
func words(values ...uint32) (out []byte) {
	for _, v := range values {
		out = binary.BigEndian.AppendUint32(out, v)
	}
	return out
}

// truth returns a number that is 1 or 0.
func truth(yes bool) []byte {
	if yes {
		return words(1)
	}
	return words(0)
}

// text appends a string, which is padded to words.
func text(to []byte, s string) []byte {
	to = append(append(to, words(uint32(len(s)))...), s...)
	return append(to, make([]byte, (4-len(s)%4)%4)...)
}
