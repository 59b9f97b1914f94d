// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// Classes of QEMU's errors: errors.Is(err, ErrGeneric) is true for an *Error of the class GenericError. QEMU uses that
// class for almost everything, and has two more that nothing here depends on.
var (
	ErrGeneric         = errors.New("GenericError")
	ErrCommandNotFound = errors.New("CommandNotFound")
	ErrDeviceNotFound  = errors.New("DeviceNotFound")

	// ErrForbidden is not a class of QEMU's. internal/libvirt, which passes commands on to a QEMU, uses it where a
	// security module does not let the process have a descriptor.
	ErrForbidden = errors.New("Forbidden")
)

// Error is QEMU's refusal of a command. The connection stays usable.
type Error struct {
	Class   string // "GenericError", "CommandNotFound", ...: the stable part
	Desc    string // for people; changes between QEMU versions
	Command string // the command that was refused
}

func (e *Error) Error() string {
	switch e.Class {
	case ErrGeneric.Error():
		return fmt.Sprintf("QEMU refused %s: %s", e.Command, e.Desc)
	case ErrForbidden.Error():
		return e.Command + ": " + e.Desc
	}
	return fmt.Sprintf("QEMU refused %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// Is says whether e is of the class that target, one of the errors above, stands for.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrGeneric, ErrCommandNotFound, ErrDeviceNotFound, ErrForbidden:
		return e.Class == target.Error()
	}
	return false
}

// DisconnectedError says that the connection has ended, and why. QEMU may or may not have run a command that
// fails with it.
type DisconnectedError struct {
	Path  string // of the socket
	Via   string // the program that relayed the messages; empty: none
	Cause error  // io.EOF: QEMU closed it; net.ErrClosed: Disconnect was called
}

func (e *DisconnectedError) Error() string {
	switch {
	case errors.Is(e.Cause, net.ErrClosed):
		return fmt.Sprintf("the connection to QEMU at %s was closed on this side", e.Path)
	case errors.Is(e.Cause, io.EOF), errors.Is(e.Cause, syscall.ECONNRESET), errors.Is(e.Cause, syscall.EPIPE):
		if e.Via != "" {
			return fmt.Sprintf("the connection to QEMU at %s has ended: %s or QEMU exited or was killed", e.Path, e.Via)
		}
		return fmt.Sprintf("QEMU closed the connection at %s: it exited or was killed", e.Path)
	}
	return fmt.Sprintf("the connection to QEMU at %s broke: %v", e.Path, e.Cause)
}

func (e *DisconnectedError) Unwrap() error { return e.Cause }

// NotQMPError says that the program that listens at the path does not speak QMP: the socket is a serial port, a human
// monitor (HMP), a guest agent or another program's.
type NotQMPError struct {
	Path  string
	Got   string // the first bytes that were received; empty: none were
	Cause error  // why nothing was received; nil: something was
}

func (e *NotQMPError) Error() string {
	if e.Got == "" {
		return fmt.Sprintf("%s is not a QMP socket: it sent no greeting (%v); give the socket of QEMU's -qmp option",
			e.Path, e.Cause)
	}
	return fmt.Sprintf("%s is not a QMP socket: its greeting is %q; give the socket of QEMU's -qmp option", e.Path, e.Got)
}

func (e *NotQMPError) Unwrap() error { return e.Cause }

// BusyError says that QEMU does not accept the connection: it serves one client per socket, and another client is
// connected.
type BusyError struct {
	Path  string
	Cause error // why the wait for QEMU ended
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("QEMU does not answer at %s (%v): it serves one client per socket, and another is connected; "+
		"disconnect that client, or give QEMU a second -qmp socket", e.Path, e.Cause)
}

func (e *BusyError) Unwrap() error { return e.Cause }
