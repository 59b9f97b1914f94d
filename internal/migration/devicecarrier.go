// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/devicestate"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A deviceCarrier is a pair of sockets between the daemon and a destination's QEMU that carries a migration stream.
// QEMU gets its end as a descriptor. That needs no path, port or permission, and works in QEMU's sandbox.
type deviceCarrier struct {
	qemu *os.File // QEMU's end, handed to QEMU
	ours *os.File

	run atomic.Pointer[migratedv1.RunRequest] // came with the last message; nil: the call Run follows

	// Owned by the receiving goroutine until QEMU has loaded the state.
	received int       // bytes of device state
	began    time.Time // when the first of these bytes arrived
	keep     bool      // store the state in kept
	kept     []byte    // the whole state, if keep is set

	once sync.Once
}

func newDeviceCarrier() (*deviceCarrier, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("sockets for the device state: %w", err)
	}
	// Our end is nonblocking, so that the runtime polls it and close ends a write.
	if err := unix.SetNonblock(fds[1], true); err != nil {
		return nil, errors.Join(fmt.Errorf("sockets for the device state: %w", err), unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return &deviceCarrier{
		qemu: os.NewFile(uintptr(fds[0]), "device-state-qemu"), ours: os.NewFile(uintptr(fds[1]), "device-state"),
	}, nil
}

func (c *deviceCarrier) close() {
	c.once.Do(func() {
		_ = c.qemu.Close()
		_ = c.ours.Close()
	})
}

// receiveFrom passes the whole stream to QEMU.
func (c *deviceCarrier) receiveFrom(stream deviceRequests) error {
	return c.eachMessage(stream, func(data []byte) error {
		if c.keep {
			c.kept = append(c.kept, data...)
		}
		return c.pass(data)
	})
}

// receiveChanges receives the changes since the early state and passes them to QEMU, with the end of QEMU's stream.
// It calls unmap first if the changes make QEMU map memory again that it has mapped already.
func (c *deviceCarrier) receiveChanges(stream deviceRequests, early []devicestate.Section, unmap func() error) error {
	var changes []byte
	collect := func(data []byte) error { changes = append(changes, data...); return nil }
	if err := c.eachMessage(stream, collect); err != nil {
		return err
	}
	list, err := devicestate.ParseChanges(early, changes)
	if err != nil {
		return err
	}
	all := devicestate.Merge(early, list)
	if c.keep {
		c.kept = devicestate.End(devicestate.Join(all))
	}
	var sections []byte
	if devicestate.Remaps(list) {
		if err := unmap(); err != nil {
			return err
		}
		sections = devicestate.Join(devicestate.Hosts(all))
	}
	for _, change := range list {
		sections = append(sections, change.Bytes...)
	}
	return c.pass(devicestate.End(sections))
}

// eachMessage calls take with the data of each message.
func (c *deviceCarrier) eachMessage(stream deviceRequests, take func(data []byte) error) error {
	for {
		message, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive the device state: %w", err)
		}
		data, run := message.GetData(), message.GetRun()
		if len(data) == 0 && run == nil {
			continue // padding
		}
		if c.began.IsZero() {
			c.began = time.Now()
		}
		if run != nil {
			c.run.Store(run)
		}
		if c.received += len(data); c.received > devicestate.Most {
			return fmt.Errorf("the source sends more than %d bytes of device state", devicestate.Most)
		}
		if err := take(data); err != nil {
			return err
		}
	}
}

func (c *deviceCarrier) pass(data []byte) error {
	if _, err := c.ours.Write(data); err != nil {
		return fmt.Errorf("pass the device state to QEMU: %w", err)
	}
	return nil
}
