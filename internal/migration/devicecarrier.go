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

// A deviceCarrier is the pair of sockets between the daemon and a destination's QEMU that a migration stream runs over.
// QEMU gets its end as a descriptor, so that no path, port or permission is needed, also inside QEMU's sandbox.
type deviceCarrier struct {
	qemu *os.File // to be handed to QEMU
	ours *os.File

	run atomic.Pointer[migratedv1.RunRequest] // that came with the last of it; nil: Run follows

	// Owned by who receives, until QEMU has loaded.
	received int       // bytes of devices' state
	began    time.Time // when the first of them came
	keep     bool
	kept     []byte // all of them, if keep is set

	once sync.Once
}

func newDeviceCarrier() (*deviceCarrier, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("sockets for the device state: %w", err)
	}
	// Ours is served by the runtime's poller, so that close ends a write.
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

// receiveFrom passes a stream to QEMU until its end.
func (c *deviceCarrier) receiveFrom(stream deviceRequests) error {
	return c.each(stream, func(data []byte) error {
		if c.keep {
			c.kept = append(c.kept, data...)
		}
		return c.pass(data)
	})
}

// receiveChanges passes what a stream brings of changes since an early state to QEMU, and the end of its stream. unmap
// is called before, if QEMU has to unmap what it maps again.
func (c *deviceCarrier) receiveChanges(stream deviceRequests, early []devicestate.Section, unmap func() error) error {
	var changes []byte
	if err := c.each(stream, func(data []byte) error { changes = append(changes, data...); return nil }); err != nil {
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

// each calls take with all that a stream brings.
func (c *deviceCarrier) each(stream deviceRequests, take func(data []byte) error) error {
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
