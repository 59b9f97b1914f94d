// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// eventTimeout is how long the answer to a command is held back for the events that QEMU sent before it, which arrive
// separately. A client that sees a stopped VM before the event would take it for one that somebody else has stopped.
const eventTimeout = 2 * time.Second

// exitTimeout is how long QEMU may take to exit after it has closed its monitor.
const exitTimeout = time.Second

// A Finder finds the process of a QEMU by the threads of its vCPUs and its UUID.
type Finder func(threads []int, uuid string) (pid int, found bool)

// Monitor connects to the domain's QEMU, and returns its process as well. The connection ends when QEMU or libvirt
// ends, or with Close.
func (d *Domain) Monitor(ctx context.Context, processOf Finder) (client *qmp.Client, pid int, err error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, 0, fmt.Errorf("sockets of a monitor: %w", err)
	}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	m := &monitor{
		domain: d, conn: theirs, cancel: cancel, handed: make(map[string]handed), changed: make(chan struct{}, 64),
		followed: make(chan struct{}),
	}
	release := d.closeAfter(ctx)
	greeting, err := m.begin(life, processOf)
	release()
	if err != nil {
		cancel()
		err = fmt.Errorf("monitor of libvirt's domain %s: %w", d.Name(), err)
		return nil, 0, errors.Join(err, m.closeProcess(), ours.Close(), theirs.Close())
	}
	go m.serve(greeting)
	if client, err = qmp.New(ctx, ours, d.address, "libvirt's daemon"); err != nil {
		return nil, 0, errors.Join(err, ours.Close())
	}
	return client, m.pid, nil
}

// pair returns two connected sockets.
func pair() (a, b *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "monitor")
		conn, connErr := net.FileConn(f)
		err = errors.Join(err, connErr, f.Close()) // FileConn duplicates it
		conns[i], _ = conn.(*net.UnixConn)
	}
	return conns[0], conns[1], err
}

// A monitor serves one connection as QEMU's monitor would.
type monitor struct {
	domain *Domain
	conn   *net.UnixConn
	cancel context.CancelFunc
	pid    int // of QEMU
	sets   int // how many sets of descriptors were made (add-fd)

	process *process.Handle // QEMU's; nil: not found yet

	ended    <-chan struct{} // closed when QEMU has ended
	followed chan struct{}   // closed when all events have been forwarded

	handed map[string]handed // by "fd:" and the name of getfd, or by "/dev/fdset/" and the number of the set

	writing sync.Mutex
	mu      sync.Mutex // guards running
	running bool
	changed chan struct{} // has an element for each change of running
}

// A command is a command of the client.
type command struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments,omitempty"`
	ID        json.RawMessage `json:"id,omitempty"`
}

// An answer is the answer to a command.
type answer struct {
	Return json.RawMessage `json:"return,omitempty"`
	Error  json.RawMessage `json:"error,omitempty"`
	ID     json.RawMessage `json:"id,omitempty"`
}

// runStatus is QEMU's answer to query-status.
type runStatus struct {
	Running bool `json:"running"`
}

// begin subscribes to events, and returns QEMU's greeting. The subscription ends only with the connection to libvirt: a
// libvirtd may crash if a client deregisters while its connection ends (9.0 frees registrations without the lock for
// deregistering).
func (m *monitor) begin(life context.Context, processOf Finder) (greeting []byte, err error) {
	events, err := m.domain.SubscribeQEMUEvents(context.WithoutCancel(life), m.domain.Name())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			drop(events)
		}
	}()
	endings, err := m.domain.LifecycleEvents(context.WithoutCancel(life))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			drop(endings)
		}
	}()
	if err := m.findQEMU(processOf); err != nil {
		return nil, err
	}
	if err := m.watch(life); err != nil {
		return nil, err
	}
	if err := m.domain.checkRun(); err != nil { // else that process may be of a later run than m.domain
		return nil, err
	}
	var version json.RawMessage
	if err := m.ask("query-version", &version); err != nil {
		return nil, err
	}
	var status runStatus
	if err := m.ask("query-status", &status); err != nil {
		return nil, err
	}
	m.running = status.Running
	go m.follow(life, events, endings)
	return json.Marshal(map[string]any{"QMP": map[string]any{"version": version, "capabilities": []string{}}})
}

// ask runs a command without arguments, and decodes what it returns into result.
func (m *monitor) ask(execute string, result any) error {
	a, err := m.pass(command{Execute: execute})
	if err == nil && a.Error != nil {
		err = fmt.Errorf("%s: %s", execute, a.Error)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(a.Return, result)
}

// send writes a message to the client. It ignores the error of a client that has disconnected.
func (m *monitor) send(message any) {
	text, err := json.Marshal(message)
	if err != nil {
		return
	}
	m.writing.Lock()
	defer m.writing.Unlock()
	_, _ = m.conn.Write(append(text, '\n'))
}

// serve answers commands until the client disconnects or QEMU ends.
func (m *monitor) serve(greeting []byte) {
	defer m.end()
	_, err := m.conn.Write(append(greeting, '\n'))
	in := &fdReader{conn: m.conn}
	defer in.drop()
	decoder := json.NewDecoder(in)
	for err == nil {
		var c command
		if err = decoder.Decode(&c); err != nil {
			return
		}
		var a answer
		if a, err = m.answer(c, in); err != nil {
			m.awaitEvents()
			return
		}
		a.ID = c.ID
		m.send(a)
	}
}

// awaitEvents waits for the last events of a QEMU that has ended. They say how it ended, and arrive separately from the
// error of the last command.
func (m *monitor) awaitEvents() {
	select {
	case <-m.followed:
	case <-time.After(stoppedTimeout + lastEvents):
	}
}

// Staying is a prefix for names of descriptors (getfd) that stay open in QEMU when the connection ends.
const Staying = "stay-"

// end closes the connection, and the descriptors in QEMU that do not stay.
func (m *monitor) end() {
	m.cancel()
	m.conn.Close()
	defer m.closeProcess() //nolint:errcheck // of a descriptor that was only read
	for key, h := range m.handed {
		if strings.HasPrefix(key, "fd:"+Staying) {
			h.file.Close()
			continue
		}
		_ = m.takeBack(h) // QEMU may have ended
	}
}

// refusal returns an error as QEMU's answer to a command.
func refusal(err error) answer {
	class := qmp.ErrGeneric
	if errors.Is(err, inject.ErrForbidden) {
		class = qmp.ErrForbidden
	}
	text, _ := json.Marshal(map[string]string{"class": class.Error(), "desc": err.Error()}) // strings can be encoded
	return answer{Error: text}
}

// failure returns the answer to a command whose descriptor could not be passed. If QEMU has ended, it returns the error
// instead, which ends the connection, as it would at QEMU's own socket.
func failure(err error) (answer, error) {
	if errors.Is(err, inject.ErrProcessGone) {
		return answer{}, err
	}
	return refusal(err), nil
}

var done = answer{Return: json.RawMessage("{}")}

// answer answers one command. The error ends the connection.
func (m *monitor) answer(c command, in *fdReader) (answer, error) {
	var args struct {
		Name string `json:"fdname"`
		Set  int    `json:"fdset-id"`
	}
	switch c.Execute {
	case "qmp_capabilities":
		return done, nil
	case "getfd", "closefd", "add-fd", "remove-fd":
		if err := json.Unmarshal(c.Arguments, &args); err != nil && c.Arguments != nil {
			return refusal(err), nil
		}
	}
	switch c.Execute {
	case "getfd":
		if err := m.hand("fd:"+args.Name, in); err != nil {
			return failure(err)
		}
		return done, nil
	case "add-fd":
		m.sets++
		key := "/dev/fdset/" + strconv.Itoa(m.sets)
		if err := m.hand(key, in); err != nil {
			return failure(err)
		}
		return answer{Return: fmt.Appendf(nil, `{"fdset-id": %d, "fd": %d}`, m.sets, m.handed[key].fd)}, nil
	case "closefd":
		return m.release("fd:" + args.Name)
	case "remove-fd":
		return m.release("/dev/fdset/" + strconv.Itoa(args.Set))
	}
	m.translate(&c)
	expected := m.expect(c.Execute)
	send := m.pass
	if c.Execute == "cont" {
		send = m.resume
	}
	a, err := send(c)
	if err == nil && a.Error == nil {
		expected()
	}
	if c.Execute == "migrate-incoming" { // QEMU has closed its descriptors of getfd
		for key, h := range m.handed {
			if strings.HasPrefix(key, "fd:") && !strings.HasPrefix(key, "fd:"+Staying) {
				h.file.Close()
				delete(m.handed, key)
			}
		}
	}
	return a, err
}

// expect is called before a command. It returns a function to be called after the command has succeeded, which waits
// for the events that QEMU sent before the answer: they arrive separately.
func (m *monitor) expect(execute string) func() {
	m.mu.Lock()
	ran := m.running
	m.mu.Unlock()
	var changes int
	switch {
	case execute == "stop" && ran, execute == "cont" && !ran:
		changes = 1
	case execute == "xen-save-devices-state" && ran: // QEMU stops the VM, and continues it
		changes = 2
	}
	for len(m.changed) > 0 { // earlier changes
		<-m.changed
	}
	return func() {
		late := time.After(eventTimeout)
		for range changes {
			select {
			case <-m.changed:
			case <-late:
				return
			}
		}
	}
}

// pass sends a command to QEMU by way of libvirt. An error says that QEMU or libvirt has ended. libvirt would pass a
// command on to whichever QEMU has the domain's UUID, so pass sends none for a QEMU that has ended.
func (m *monitor) pass(c command) (answer, error) {
	if err := m.checkProcess(); err != nil {
		return answer{}, err
	}
	c.ID = nil
	text, err := json.Marshal(c)
	if err != nil {
		return refusal(err), nil
	}
	var a answer
	reply, err := m.domain.QEMUDomainMonitorCommand(m.domain.id, string(text), 0)
	if err == nil {
		err = json.Unmarshal([]byte(reply), &a)
	}
	var refused golibvirt.Error
	switch {
	case err == nil:
		return a, nil
	case isGone(err) || !errors.As(err, &refused) || m.ends():
		return answer{}, err
	default:
		return refusal(fmt.Errorf("libvirt: %w", err)), nil
	}
}

// ends says whether QEMU is about to end, after libvirt failed to pass a command on. It waits for the process, because
// libvirt has no error code for a closed monitor, and QEMU closes its monitor just before it exits.
func (m *monitor) ends() bool {
	select {
	case <-m.ended:
		return true
	case <-time.After(exitTimeout):
		return false
	}
}
