// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// A Saver saves the device state of a VM once: QEMU would append a second state to the first. To keep the preparation
// out of the downtime, create the Saver before the VM stops. Close it when it is no longer needed.
type Saver struct {
	vm   *VM
	file *os.File // a memfd(2): QEMU writes to it without waiting for a reader
	set  int      // number of the descriptor set in QEMU
}

// NewSaver creates a file in memory and gives it to QEMU to save to.
func (vm *VM) NewSaver(ctx context.Context) (*Saver, error) {
	file, writer, err := memoryFile("device-state", os.O_WRONLY) // the mode in which QEMU opens it
	if err != nil {
		return nil, fmt.Errorf("file for the device state: %w", err)
	}
	defer writer.Close() // QEMU has a duplicate
	set, err := vm.addFD(ctx, writer)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &Saver{vm: vm, file: file, set: set}, nil
}

// lookEvery is the interval at which Save looks at what QEMU has written. QEMU writes 32 KiB at a time; a state of 1 MB
// grows by that much every 0.6 ms.
const lookEvery = 500 * time.Microsecond

// lookSoon is the interval for SaveRunning: QEMU saves the whole state of a VM without devices within a millisecond.
const lookSoon = 50 * time.Microsecond

// Save returns the state of all devices of a stopped VM, as QEMU's savevm.c writes it: magic and version of a migration
// stream, one section per device that has state, and an end mark. The run state in it is "paused" (devicestate.Pause).
// The state does not contain RAM. The VM stays stopped.
//
// With giveUpDisks QEMU also gives the disks up, so that another QEMU can take them, until Cont or ActivateDisks. QEMU
// does not always say that it could not: ask CheckDisksGivenUp. Do not set giveUpDisks when QEMU has already given them
// up: QEMU would abort (see DisksActive).
//
// QEMU holds its big lock until it has written the last byte. It does not wait for a reader, because the file is
// memory. Meanwhile Save calls written, unless it is nil, with everything written so far, from the first byte on.
// written must not keep or change the slice. Save returns the error of written once QEMU has answered.
func (s *Saver) Save(ctx context.Context, giveUpDisks bool, written func(state []byte) error) ([]byte, error) {
	return s.save(ctx, giveUpDisks, written, lookEvery)
}

func (s *Saver) save(
	ctx context.Context, giveUpDisks bool, written func(state []byte) error, every time.Duration,
) ([]byte, error) {
	// The command has Xen's name but works for every VM (qmp_xen_save_devices_state in migration/savevm.c). With "live" it
	// also gives up the disks of a VM that was already stopped.
	args := map[string]any{"filename": fdsetPath(s.set), "live": giveUpDisks}
	wait, err := s.vm.QMP.Begin(ctx, "xen-save-devices-state", args)
	if err != nil {
		return nil, err
	}
	answered := make(chan error, 1)
	go func() { answered <- wait(ctx) }()
	look := time.NewTicker(every)
	defer look.Stop()
	var state []byte
	var failed error // from written, or from reading
	for {
		select {
		case err := <-answered:
			if err := errors.Join(err, failed); err != nil {
				return nil, err
			}
			return s.read(state)
		case <-look.C:
		}
		if failed != nil || written == nil {
			continue
		}
		if state, failed = s.read(state); failed == nil {
			failed = written(state)
		}
	}
}

// ErrTooShort means that a VM was stopped for too short a time.
var ErrTooShort = errors.New("the VM went on before its memory was looked at")

// SaveRunning saves the state of all devices of a running VM. QEMU stops the VM, saves and continues the VM by itself,
// even when this process ends. pause is how long the VM was stopped. SaveRunning calls look while the VM is stopped, as
// soon as QEMU has written something; by then the devices have finished their writes to memory.
//
// The error is ErrTooShort, with the state, when look returned after the VM continued, or was not called: QEMU shows
// nothing of a small state before it is complete. The error is ErrTooShort without the state when another client
// stopped or continued the VM.
func (s *Saver) SaveRunning(ctx context.Context, look func() error) (state []byte, pause time.Duration, err error) {
	events := s.vm.QMP.Subscribe("STOP", "RESUME")
	defer events.Close()
	var looked time.Time
	state, err = s.save(ctx, false, func(begun []byte) error {
		if len(begun) == 0 || !looked.IsZero() {
			return nil
		}
		err := look()
		looked = time.Now()
		return err
	}, lookSoon)
	if err != nil {
		return nil, 0, err
	}
	var happened []qmp.Event
	for len(events.Events()) > 0 {
		happened = append(happened, <-events.Events())
	}
	if len(happened) != 2 || happened[0].Name != "STOP" || happened[1].Name != "RESUME" {
		return nil, 0, fmt.Errorf("%w: somebody else stops and continues it, too", ErrTooShort)
	}
	stopped, resumed := happened[0].Time, happened[1].Time
	if looked.IsZero() || looked.After(resumed) {
		return state, resumed.Sub(stopped), ErrTooShort
	}
	return state, resumed.Sub(stopped), nil
}

// read appends to state the part of the file that state lacks. QEMU only appends to the file.
func (s *Saver) read(state []byte) ([]byte, error) {
	info, err := s.file.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > devicestate.Most {
		return nil, fmt.Errorf("the state of the VM's devices has %d bytes, more than the %d that are moved",
			info.Size(), devicestate.Most)
	}
	had := len(state)
	state = append(state, make([]byte, int(info.Size())-had)...)
	if _, err := s.file.ReadAt(state[had:], int64(had)); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the device state: %w", err)
	}
	devicestate.Pause(state[max(0, had-devicestate.RunStateSize):]) // the run state may have come in two parts
	return state, nil
}

// Close makes QEMU release the file, and frees the file's memory.
func (s *Saver) Close(ctx context.Context) error {
	err := s.file.Truncate(0) // QEMU may keep its descriptor until the VM runs
	if s.vm.QMP.Err() == nil {
		err = errors.Join(err, s.vm.removeFD(ctx, s.set))
	}
	return errors.Join(err, s.file.Close())
}
