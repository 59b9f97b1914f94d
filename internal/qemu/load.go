// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// cancelTimeout bounds how long CancelMigrate may take.
const cancelTimeout = 5 * time.Second

// fdName is the name under which QEMU keeps the stream's descriptor between getfd and its use.
const fdName = "migrated-device-state"

// A Loading is a migration stream that QEMU is reading.
type Loading struct {
	vm     *VM
	stream *os.File
	events *qmp.Subscription
}

// BeginLoading makes a QEMU that was started with -incoming defer read a migration stream from f. f stays the caller's.
// Call PrepareIncoming first. The parts of the stream may arrive at any time: QEMU waits for the next one without its
// big lock (qemu_loadvm_state in migration/savevm.c runs as a coroutine), and its monitor answers meanwhile.
func (vm *VM) BeginLoading(ctx context.Context, f *os.File) (_ *Loading, err error) {
	l := &Loading{vm: vm, stream: f, events: vm.QMP.Subscribe("MIGRATION")}
	defer func() {
		if err != nil {
			l.events.Close()
		}
	}()
	if err := vm.getFD(ctx, fdName, f); err != nil {
		return nil, err
	}
	if err := vm.QMP.Do(ctx, "migrate-incoming", map[string]string{"uri": "fd:" + fdName}, nil); err != nil {
		var refused *qmp.Error
		if errors.As(err, &refused) {
			// closefd fails when QEMU took the descriptor before it refused.
			_ = vm.closeFD(ctx, fdName)
			return nil, err
		}
		return nil, abandon(f, err)
	}
	return l, nil
}

// Feed writes head and then sections to stream, the other end of the migration stream. It writes each section when QEMU
// has loaded the one before, and returns when QEMU has loaded the last. It calls loaded with the index of each section
// after its load. By the end of head, the stream must have made QEMU answer (devicestate.ReturnPath). The stream stays
// open. The caller bounds the time with ctx; when ctx ends, the stream cannot be used further. If QEMU ends, the error
// is a *qmp.DisconnectedError.
func (l *Loading) Feed(
	ctx context.Context, stream *os.File, head []byte, sections []devicestate.Section, loaded func(index int) error,
) error {
	// A QEMU that cannot load exits. The socket does not show this, because this process has both of its ends.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-l.vm.QMP.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for i, s := range sections {
		want := devicestate.Pong(uint32(i))
		_, err := stream.Write(slices.Concat(head, s.Bytes, devicestate.Ping(uint32(i))))
		head = nil
		got := make([]byte, len(want))
		if err == nil {
			_, err = io.ReadFull(stream, got)
		}
		if gone := l.vm.QMP.Err(); err != nil && gone != nil {
			err = gone
		}
		if err != nil {
			return fmt.Errorf("QEMU did not load the state of %q: %w", s.Name, err)
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("QEMU answered %x when it had loaded the state of %q", got, s.Name)
		}
		if err := loaded(i); err != nil {
			return err
		}
	}
	return nil
}

// Wait returns when QEMU has loaded the whole stream. Call it from one goroutine only.
//
// A QEMU that fails to load exits: the error is a *qmp.DisconnectedError, and QEMU's own message is in
// Process.ExitReason. When ctx ends, Wait shuts the stream's socket down; QEMU takes this as a failed load.
func (l *Loading) Wait(ctx context.Context) error {
	defer l.events.Close()
	err := l.vm.awaitMigration(ctx, l.events)
	if err != nil && ctx.Err() != nil {
		return abandon(l.stream, err)
	}
	return err
}

// UnmapRootComplex makes a stopped q35 unmap the registers of its root complex (RCBA, at 0xf0 of the LPC bridge,
// 0:1f.0), as the guest could do. While they are mapped, a second load of the bridge's state makes QEMU exit.
// UnmapRootComplex overwrites the address register of the PCI host, so load the host's state again, too.
func (vm *VM) UnmapRootComplex(ctx context.Context) error {
	const address, data, register = 0xcf8, 0xcfc, 1<<31 | 0x1f<<11 | 0xf0 // PCI's configuration mechanism #1
	for _, line := range []string{
		fmt.Sprintf("o /w %#x %#x", address, register), fmt.Sprintf("o /w %#x 0", data), // w: a word of 32 bits
	} {
		said, err := vm.QMP.HMP(ctx, line)
		if err == nil && said != "" {
			err = errors.New(strings.TrimSpace(said))
		}
		if err != nil {
			return fmt.Errorf("unmap the root complex registers: %w", err)
		}
	}
	return nil
}

// abandon shuts the stream down, so that QEMU does not continue a load that has no waiter. It returns reason, joined
// with the error of the shutdown, if any.
func abandon(f *os.File, reason error) error {
	if err := shutdown(f); err != nil {
		reason = errors.Join(reason, fmt.Errorf("end the migration stream: %w", err))
	}
	return reason
}

// shutdown ends both directions of a socket, also for QEMU's duplicate.
func shutdown(f *os.File) error {
	raw, err := f.SyscallConn()
	if errors.Is(err, os.ErrClosed) {
		return nil // the caller has closed it already
	}
	if err != nil {
		return err
	}
	var shutErr error
	err = raw.Control(func(fd uintptr) { shutErr = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	if errors.Is(shutErr, unix.ENOTCONN) {
		shutErr = nil // the other end was shut down already
	}
	if errors.Is(err, os.ErrClosed) {
		err = nil
	}
	return errors.Join(err, shutErr)
}

// awaitMigration waits for the MIGRATION event that ends the migration. It returns nil for "completed".
func (vm *VM) awaitMigration(ctx context.Context, events *qmp.Subscription) error {
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("QEMU's migration stream: %w", context.Cause(ctx))
		case e, open := <-events.Events():
			if !open {
				return fmt.Errorf("QEMU's migration stream: %w", vm.QMP.Err())
			}
			var data struct {
				Status string `json:"status"`
			}
			if err := json.Unmarshal(e.Data, &data); err != nil {
				return fmt.Errorf("QEMU's event MIGRATION %s: %w", e.Data, err)
			}
			switch data.Status {
			case "completed":
				return nil
			case "failed", "cancelled":
				return vm.migrationFailed(ctx, data.Status)
			}
		}
	}
}

// migrationFailed asks QEMU why the migration failed and returns that as an error.
func (vm *VM) migrationFailed(ctx context.Context, status string) error {
	info, err := vm.QueryMigrate(ctx)
	if err != nil {
		return fmt.Errorf("QEMU's migration stream %s: %w", status, err)
	}
	if info.ErrorDesc == "" {
		return fmt.Errorf("QEMU's migration stream %s", status)
	}
	return fmt.Errorf("QEMU's migration stream %s: %s", status, info.ErrorDesc)
}

// MigrationInfo is QEMU's answer to query-migrate (MigrationInfo in qapi/migration.json).
type MigrationInfo struct {
	Status         string   `json:"status"` // empty: there was no migration
	ErrorDesc      string   `json:"error-desc"`
	BlockedReasons []string `json:"blocked-reasons"` // QEMU >= 6.0
	// Addresses are where a destination listens for a VM.
	Addresses []json.RawMessage `json:"socket-address"`
}

// Begun reports whether there is or was a migration. At a destination one begins when QEMU listens for it, which older
// versions of QEMU show by the address alone.
func (i MigrationInfo) Begun() bool {
	return i.Status != "" && i.Status != "none" || len(i.Addresses) > 0
}

// Active reports whether the migration has not ended yet. One that is being cancelled is still active.
func (i MigrationInfo) Active() bool {
	switch i.Status {
	case "", "none", "completed", "failed", "cancelled":
		return false
	}
	return true
}

// QueryMigrate returns the state of QEMU's own migration.
func (vm *VM) QueryMigrate(ctx context.Context) (MigrationInfo, error) {
	var info MigrationInfo
	err := vm.QMP.Do(ctx, "query-migrate", nil, &info)
	return info, err
}

// CancelMigrate cancels QEMU's own migration, if there is one, and returns when it has ended. The VM stays stopped. A
// daemon that speaks only protocol 1 leaves such a migration if it dies at the wrong moment.
func (vm *VM) CancelMigrate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cancelTimeout)
	defer cancel()
	events := vm.QMP.Subscribe("MIGRATION")
	defer events.Close()
	info, err := vm.QueryMigrate(ctx)
	if err != nil || !info.Active() {
		return err
	}
	if err := vm.QMP.Do(ctx, "migrate_cancel", nil, nil); err != nil {
		return err
	}
	for {
		if info, err = vm.QueryMigrate(ctx); err != nil || !info.Active() {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cancel QEMU's migration, it is %q: %w", info.Status, context.Cause(ctx))
		case _, open := <-events.Events():
			if !open {
				return vm.QMP.Err()
			}
		}
	}
}
