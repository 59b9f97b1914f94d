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

// A Saver takes the state of a VM's devices from its QEMU, once: QEMU would write a second one behind the first. Making it
// before the VM stops spares the downtime the preparation. Close it when it is no longer needed.
type Saver struct {
	vm   *VM
	file *os.File // a memfd(2): QEMU writes to it without waiting for a reader
	set  int      // of descriptors in QEMU
}

// NewSaver hands QEMU a file in memory to save to.
func (vm *VM) NewSaver(ctx context.Context) (*Saver, error) {
	file, writer, err := memoryFile("device-state", os.O_WRONLY) // the mode that QEMU opens it with
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

// lookEvery is how often Save looks what QEMU has written: QEMU writes 32 KiB at a time, of which a state of 1 MB has one
// in 0.6 ms.
const lookEvery = 500 * time.Microsecond

// lookSoon is the same for SaveRunning: of a VM without devices QEMU saves all within a millisecond.
const lookSoon = 50 * time.Microsecond

// Save returns the state of all devices of a stopped VM, as QEMU's savevm.c writes it: magic and version of a migration
// stream, a section for each device that has state, and the end; the run state in it is "paused" (devicestate.Pause). RAM
// is not in it. The VM stays stopped.
//
// With giveUpDisks QEMU also gives the disks up, so that another QEMU can have them, until Cont or ActivateDisks. A
// QEMU that has given them up must not be asked to do so again: it would abort (see DisksActive).
//
// QEMU holds its big lock until it has written the last byte, and waits for nobody: the file is memory. Meanwhile written
// gets what there is, unless it is nil, each time from the first byte on; it owns nothing of that. Its error is returned once
// QEMU has answered.
func (s *Saver) Save(ctx context.Context, giveUpDisks bool, written func(state []byte) error) ([]byte, error) {
	return s.save(ctx, giveUpDisks, written, lookEvery)
}

func (s *Saver) save(
	ctx context.Context, giveUpDisks bool, written func(state []byte) error, every time.Duration,
) ([]byte, error) {
	// The name is Xen's, the command is everybody's (qmp_xen_save_devices_state in migration/savevm.c). "live" is what
	// makes it give up the disks of a VM that was stopped before.
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
	var failed error // of written, or of reading
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

// ErrTooShort says that a VM stood still for too short a time.
var ErrTooShort = errors.New("the VM went on before its memory was looked at")

// SaveRunning saves the state of all devices of a VM that runs, and returns for how long that stood still: QEMU stops
// it, saves, and continues it by itself, whatever becomes of this process. look is called while it stands still, once
// QEMU has written something; its devices have written to memory what they had to. The error is ErrTooShort, with the
// state, where look returned after the VM went on or was not called: of a small state QEMU shows nothing before it is
// whole. Without the state, somebody else stopped or continued the VM.
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

// read appends to state what the file has more than that. QEMU only appends.
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
	devicestate.Pause(state[max(0, had-devicestate.RunStateSize):]) // it may have come in two parts
	return state, nil
}

// Close lets QEMU forget the file, and what is in it.
func (s *Saver) Close(ctx context.Context) error {
	err := s.file.Truncate(0) // QEMU may keep its descriptor for as long as the VM does not run
	if s.vm.QMP.Err() == nil {
		err = errors.Join(err, s.vm.removeFD(ctx, s.set))
	}
	return errors.Join(err, s.file.Close())
}
