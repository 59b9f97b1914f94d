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
	"google.golang.org/grpc"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// deviceChunk is the most of QEMU's stream that one message carries. With its
	// header it fits a buffer of 16 KiB: the next larger that gRPC's pool has is of
	// 1 MiB, and to clear one for every message costs more than all of the copying.
	deviceChunk = 16<<10 - 64
	// deviceBuffer is what the socket takes from QEMU before somebody reads it, twice that and a little in fact. QEMU stops the
	// VM as soon as it is rid of the firmware: what is in the socket by then crosses before the devices do.
	deviceBuffer = 8 << 10
	// longestRoundTrip is what a ramp waits for at most, a few times.
	longestRoundTrip = 250 * time.Millisecond
	// deviceArena is set aside for the stream, and touched, before the VM stops. A
	// whole device state is about 200 KB.
	deviceArena = 1 << 20
)

// A deviceCarrier is the pair of sockets between QEMU and the daemon that
// QEMU's migration stream runs over. QEMU gets its end as a descriptor, so that
// no path, port or permission is needed, also inside QEMU's sandbox.
type deviceCarrier struct {
	qemu  *os.File // to be handed to QEMU
	ours  *os.File
	arena []byte // what is left of it

	received atomic.Uint64 // bytes passed to QEMU

	once     sync.Once
	onceQEMU sync.Once
}

func newDeviceCarrier() (*deviceCarrier, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("sockets for the device state: %w", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, deviceBuffer),
		unix.SetNonblock(fds[1], true), // ours is served by the runtime's poller, so that close ends a read
	)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("sockets for the device state: %w", err), unix.Close(fds[0]), unix.Close(fds[1]))
	}
	arena := make([]byte, deviceArena)
	for i := 0; i < len(arena); i += os.Getpagesize() {
		arena[i] = 1 // or each page would be a fault while the VM stands still
	}
	return &deviceCarrier{
		qemu: os.NewFile(uintptr(fds[0]), "device-state-qemu"),
		ours: os.NewFile(uintptr(fds[1]), "device-state"),

		arena: arena,
	}, nil
}

// closeQEMU closes our copy of QEMU's end, once QEMU has its own.
func (c *deviceCarrier) closeQEMU() { c.onceQEMU.Do(func() { _ = c.qemu.Close() }) }

func (c *deviceCarrier) close() {
	c.closeQEMU()
	c.once.Do(func() { _ = c.ours.Close() })
}

// A ramp holds back what QEMU sends before it stops the VM: firmware and video memory, several times as much as the state
// of the devices that follows, which would have to wait behind it. And a connection that was idle carries 14 KB in its
// first round trip, twice that in the next (RFC 6928, RFC 5681): at a round trip of 10 ms a stream of 250 KB takes 43 ms.
// So the firmware goes at the pace of such a connection, with QEMU waiting for it; when the VM stops, the connection
// carries all the rest at once.
type ramp struct {
	stopped   <-chan struct{} // the VM is: nothing is held back any more
	roundTrip time.Duration
	left      int // bytes that may go before the next wait
	step      int
}

func newRamp(stopped <-chan struct{}, roundTrip time.Duration) *ramp {
	return &ramp{stopped: stopped, roundTrip: min(roundTrip, longestRoundTrip), left: deviceChunk, step: deviceChunk}
}

// sent says that n bytes have gone, and waits until more may.
func (r *ramp) sent(n int) {
	if r.left -= n; r.left > 0 {
		return
	}
	r.step *= 2
	r.left = r.step
	crossed := time.NewTimer(r.roundTrip)
	defer crossed.Stop()
	select {
	case <-r.stopped:
	case <-crossed.C:
	}
}

// sendTo carries the stream of a source's QEMU until its end. Where the peer
// ended the call first, the reason is for the caller to receive.
func (c *deviceCarrier) sendTo(stream grpc.ClientStreamingClient[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse], ramp *ramp) error {
	for {
		if len(c.arena) == 0 {
			c.arena = make([]byte, deviceArena)
		}
		buf := c.arena[:min(deviceChunk, len(c.arena))]
		n, err := c.ours.Read(buf)
		c.arena = c.arena[n:] // gRPC may keep what it was given
		if n > 0 {
			if err := stream.Send(&migratedv1.LoadDeviceStateRequest{Data: buf[:n]}); err != nil {
				return err
			}
			ramp.sent(n)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the device state from QEMU: %w", err)
		}
	}
}

// receiveFrom carries the stream to a destination's QEMU until its end, which
// includes that QEMU has read enough.
func (c *deviceCarrier) receiveFrom(stream grpc.ClientStreamingServer[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]) error {
	for {
		message, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive the device state: %w", err)
		}
		n, err := c.ours.Write(message.GetData())
		c.received.Add(uint64(n))
		if err != nil {
			return fmt.Errorf("pass the device state to QEMU: %w", err)
		}
	}
}
