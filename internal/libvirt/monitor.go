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

	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// eventTimeout is how long the answer to a command waits for the events that QEMU sent before it, which come another
// way: a VM that was stopped, and of which nobody says so, is taken for one that somebody else has stopped.
const eventTimeout = 2 * time.Second

// A Finder finds the process of a QEMU by the threads of its vCPUs and its UUID.
type Finder func(threads []int, uuid string) (pid int, found bool)

// Monitor connects to the domain's QEMU, and returns its process as well. The connection ends with that QEMU, with
// libvirt, and by Close.
func (d *Domain) Monitor(ctx context.Context, processOf Finder) (client *qmp.Client, pid int, err error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, 0, fmt.Errorf("sockets of a monitor: %w", err)
	}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	m := &monitor{
		domain: d, conn: theirs, cancel: cancel, handed: make(map[string]handed), changed: make(chan struct{}, 64),
	}
	release := d.within(ctx)
	greeting, err := m.begin(life, processOf)
	release()
	if err != nil {
		cancel()
		err = fmt.Errorf("monitor of libvirt's domain %s: %w", d.Name(), err)
		return nil, 0, errors.Join(err, ours.Close(), theirs.Close())
	}
	go m.serve(greeting)
	if client, err = qmp.New(ctx, ours, d.address, "libvirt's daemon"); err != nil {
		return nil, 0, errors.Join(err, ours.Close())
	}
	return client, m.pid, nil
}

// pair is a pair of connected sockets.
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

// A monitor serves one connection as QEMU would.
type monitor struct {
	domain *Domain
	conn   *net.UnixConn
	cancel context.CancelFunc
	pid    int // of QEMU
	sets   int // of descriptors, made so far

	handed map[string]handed // by the name that getfd gave it, or the number of its set

	writing sync.Mutex
	mu      sync.Mutex // guards running
	running bool
	changed chan struct{} // running has; of a client that stops and continues, one at a time
}

// A command is one of the client's.
type command struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments,omitempty"`
	ID        json.RawMessage `json:"id,omitempty"`
}

// An answer is that to a command.
type answer struct {
	Return json.RawMessage `json:"return,omitempty"`
	Error  json.RawMessage `json:"error,omitempty"`
	ID     json.RawMessage `json:"id,omitempty"`
}

// begin asks for events, and returns QEMU's greeting.
func (m *monitor) begin(life context.Context, processOf Finder) (greeting []byte, err error) {
	events, err := m.domain.SubscribeQEMUEvents(life, m.domain.Name())
	if err != nil {
		return nil, err
	}
	endings, err := m.domain.LifecycleEvents(life)
	if err != nil {
		return nil, err
	}
	if err := m.findQEMU(processOf); err != nil {
		return nil, err
	}
	ended, err := m.watch(life)
	if err != nil {
		return nil, err
	}
	var version json.RawMessage
	if err := m.ask("query-version", &version); err != nil {
		return nil, err
	}
	var status struct {
		Running bool `json:"running"`
	}
	if err := m.ask("query-status", &status); err != nil {
		return nil, err
	}
	m.running = status.Running
	go m.follow(life, events, endings, ended)
	return json.Marshal(map[string]any{"QMP": map[string]any{"version": version, "capabilities": []string{}}})
}

// ask asks QEMU for something.
func (m *monitor) ask(what string, result any) error {
	a, err := m.pass(command{Execute: what})
	if err == nil && a.Error != nil {
		err = fmt.Errorf("%s: %s", what, a.Error)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(a.Return, result)
}

// send writes a message. A client that is gone needs none.
func (m *monitor) send(message any) {
	text, err := json.Marshal(message)
	if err != nil {
		return
	}
	m.writing.Lock()
	defer m.writing.Unlock()
	_, _ = m.conn.Write(append(text, '\n'))
}

// serve answers commands until the client, or QEMU, is gone.
func (m *monitor) serve(greeting []byte) {
	defer m.end()
	_, err := m.conn.Write(append(greeting, '\n'))
	in := &passing{conn: m.conn}
	defer in.drop()
	decoder := json.NewDecoder(in)
	for err == nil {
		var c command
		if err = decoder.Decode(&c); err != nil {
			return
		}
		var a answer
		if a, err = m.answer(c, in); err == nil {
			a.ID = c.ID
			m.send(a)
		}
	}
}

// Staying begins the names of descriptors (getfd) that stay in QEMU when the connection ends.
const Staying = "stay-"

// end takes back what QEMU was handed.
func (m *monitor) end() {
	m.cancel()
	m.conn.Close()
	for key, h := range m.handed {
		if strings.HasPrefix(key, "fd:"+Staying) {
			h.file.Close()
			continue
		}
		_ = m.takeBack(h) // QEMU may have ended
	}
}

// refusal is an answer as QEMU gives it.
func refusal(err error) answer {
	class := qmp.ErrGeneric
	if errors.Is(err, inject.ErrForbidden) {
		class = qmp.ErrForbidden
	}
	text, _ := json.Marshal(map[string]string{"class": class.Error(), "desc": err.Error()}) // two strings
	return answer{Error: text}
}

// failure is what a descriptor that could not be handed leads to: the end of the connection where QEMU has ended, as
// with QEMU's own socket.
func failure(err error) (answer, error) {
	if errors.Is(err, inject.ErrProcessGone) {
		return answer{}, err
	}
	return refusal(err), nil
}

var done = answer{Return: json.RawMessage("{}")}

// answer answers one command. The error ends the connection.
func (m *monitor) answer(c command, in *passing) (answer, error) {
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
	a, err := m.pass(c)
	if err == nil && a.Error == nil {
		expected()
	}
	if c.Execute == "migrate-incoming" { // QEMU has closed them
		for key, h := range m.handed {
			if strings.HasPrefix(key, "fd:") && !strings.HasPrefix(key, "fd:"+Staying) {
				h.file.Close()
				delete(m.handed, key)
			}
		}
	}
	return a, err
}

// expect returns what waits for the events that a command which succeeded has led to: they come another way than its
// answer, and QEMU sends them before it.
func (m *monitor) expect(execute string) func() {
	m.mu.Lock()
	ran := m.running
	m.mu.Unlock()
	var changes int
	switch {
	case execute == "stop" && ran, execute == "cont" && !ran:
		changes = 1
	case execute == "xen-save-devices-state" && ran: // it is stopped, and goes on
		changes = 2
	}
	for len(m.changed) > 0 { // of before
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

// pass has libvirt give QEMU a command. The error says that there is no QEMU, or no libvirt, any more.
func (m *monitor) pass(c command) (answer, error) {
	c.ID = nil
	text, err := json.Marshal(c)
	if err != nil {
		return refusal(err), nil
	}
	var a answer
	said, err := m.domain.QEMUDomainMonitorCommand(m.domain.id, string(text), 0)
	if err == nil {
		err = json.Unmarshal([]byte(said), &a)
	}
	var refused golibvirt.Error
	switch {
	case err == nil:
		return a, nil
	case isGone(err) || !errors.As(err, &refused):
		return answer{}, err
	default:
		return refusal(fmt.Errorf("libvirt: %w", err)), nil
	}
}

// findQEMU finds its process.
func (m *monitor) findQEMU(processOf Finder) error {
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := m.ask("query-cpus-fast", &cpus); err != nil {
		return err
	}
	var threads []int
	for _, cpu := range cpus {
		threads = append(threads, cpu.Thread)
	}
	pid, found := processOf(threads, formatUUID(m.domain.id.UUID))
	if !found {
		return fmt.Errorf("no QEMU of this UUID has the threads %v, as this daemon counts them; "+
			"run the daemon in the PID namespace of QEMU", threads)
	}
	m.pid = pid
	return nil
}
