// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/internal/qmp"
)

const (
	// closeTimeout bounds the QMP commands of Close.
	closeTimeout = 2 * time.Second
	// quitPatience is how long Quit waits for QEMU to end by itself.
	quitPatience = 2 * time.Second
)

// VM is a connection to a running QEMU. Close it when done; QEMU goes on.
type VM struct {
	QMP *qmp.Client
	Pid int // in this process's PID namespace

	// RAM is the VM's memory.
	RAM *ram.Memory

	process *process.Handle

	endings *endings

	restore *Settings // what PrepareIncoming changed; nil: nothing

	domain *libvirt.Domain // nil: libvirt does not manage the VM
}

// Attach connects to the QMP socket at path and finds the QEMU process behind it. The path may also be the address of a
// libvirt VM. Errors of the connection are those of qmp.Dial.
func Attach(ctx context.Context, path string) (*VM, error) {
	if libvirt.IsAddress(path) {
		return attachDomain(ctx, path)
	}
	client, err := qmp.Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	pid, err := process.Behind(ctx, client)
	if err != nil {
		return nil, errors.Join(err, client.Disconnect())
	}
	vm, err := attach(client, pid)
	if err != nil {
		return nil, errors.Join(err, client.Disconnect())
	}
	return vm, nil
}

func attachDomain(ctx context.Context, address string) (*VM, error) {
	domain, err := libvirt.Open(ctx, address)
	if err != nil {
		return nil, err
	}
	client, pid, err := domain.Monitor(ctx, process.OfThreads)
	if err != nil {
		return nil, errors.Join(err, domain.Close())
	}
	vm, err := attach(client, pid)
	if err != nil {
		return nil, errors.Join(err, client.Disconnect(), domain.Close())
	}
	vm.domain = domain
	return vm, nil
}

// attach makes a VM of a connection and the PID of its QEMU. It takes over the connection, unless it fails.
func attach(client *qmp.Client, pid int) (*VM, error) {
	vm := &VM{QMP: client, Pid: pid, endings: followEndings(client)}
	var err error
	if vm.process, err = process.Open(vm.Pid); err != nil {
		return nil, err
	}
	if client.Err() != nil { // an open connection proves that pid still is the QEMU that answers
		return nil, errors.Join(client.Err(), vm.process.Close())
	}
	vm.RAM = ram.Of(client, vm.process)
	return vm, nil
}

// Close restores the migration settings that were changed, so that QEMU's own migrations work as before. Then it
// disconnects.
func (vm *VM) Close() error {
	var err error
	if vm.restore != nil && vm.QMP.Err() == nil {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		if err = vm.apply(ctx, *vm.restore); err != nil {
			err = fmt.Errorf("put back QEMU's migration settings: %w", err)
		}
		var gone *qmp.DisconnectedError
		if errors.As(err, &gone) {
			err = nil // QEMU ended, and its settings with it
		}
	}
	err = errors.Join(err, vm.QMP.Disconnect(), vm.process.Close())
	if vm.domain != nil {
		err = errors.Join(err, vm.domain.Close())
	}
	return err
}

// WaitExit returns nil when the process has ended. The process need not be a child of this one.
func (vm *VM) WaitExit(ctx context.Context) error {
	if err := vm.process.Wait(ctx); err != nil {
		return fmt.Errorf("QEMU, process %d: %w", vm.Pid, err)
	}
	return nil
}

// Alive returns nil while the process runs. When it has ended, errors.Is(err, unix.ESRCH) holds.
func (vm *VM) Alive() error { return vm.process.Alive() }

// Ended reports whether the process has ended, even when its parent has not waited for it yet. After Close it returns
// false, because the state is not known.
func (vm *VM) Ended() bool { return vm.process.Ended() }

// Identity returns the identity of the QEMU process.
func (vm *VM) Identity() (process.Identity, error) { return process.Identify(vm.Pid) }

// DomainKeeps returns what libvirt keeps of the VM on this host that does not move with it. Without libvirt it is
// nothing.
func (vm *VM) DomainKeeps(ctx context.Context) (libvirt.Keeps, error) {
	if vm.domain == nil {
		return libvirt.Keeps{}, nil
	}
	return vm.domain.Keeps(ctx)
}

// Quit ends QEMU and returns when its process is gone. It kills a QEMU whose main loop hangs, for example on a page
// that will never arrive. If the error is a libvirt.ErrOwner, QEMU has ended nevertheless. If the process has ended
// before, Quit does nothing: libvirt's domain may have been started anew, and that is another VM.
func (vm *VM) Quit(ctx context.Context) error {
	if vm.Ended() {
		return nil
	}
	if vm.domain != nil {
		err := vm.domain.Destroy(ctx)
		if (err == nil || errors.Is(err, libvirt.ErrOwner)) && vm.WaitExit(ctx) == nil {
			return err
		}
	}
	polite, cancel := context.WithTimeoutCause(ctx, quitPatience,
		fmt.Errorf("QEMU did not obey quit within %v", quitPatience))
	defer cancel()
	err := vm.QMP.Do(polite, "quit", nil, nil)
	var gone *qmp.DisconnectedError
	if err == nil || errors.As(err, &gone) {
		if vm.WaitExit(polite) == nil {
			return nil
		}
	}
	if err := vm.process.Kill(); err != nil {
		return fmt.Errorf("kill QEMU, process %d: %w", vm.Pid, err)
	}
	return vm.WaitExit(ctx)
}
