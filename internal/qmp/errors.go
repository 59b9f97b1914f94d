// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// What errors.Is finds in an *Error of that class. QEMU has two more classes, of which nothing here
// depends, and uses GenericError for almost everything.
var (
	ErrGeneric         = errors.New("GenericError")
	ErrCommandNotFound = errors.New("CommandNotFound")
	ErrDeviceNotFound  = errors.New("DeviceNotFound")

	// ErrForbidden is of no QEMU's. What speaks for one (internal/libvirt) says by it that a security module keeps a
	// descriptor from the process.
	ErrForbidden = errors.New("Forbidden")
)

// Error is QEMU's refusal of a command. The connection stays usable.
type Error struct {
	Class   string // "GenericError", "CommandNotFound", ...: the stable part
	Desc    string // for people; changes between QEMU versions
	Command string // what was refused
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

// Is compares the class with those above.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrGeneric, ErrCommandNotFound, ErrDeviceNotFound, ErrForbidden:
		return e.Class == target.Error()
	}
	return false
}

// DisconnectedError says that the connection is over, and why. A command that fails with it may or may not
// have been carried out.
type DisconnectedError struct {
	Path  string // of the socket
	Via   string // the program that passed on what was said; empty: none
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

// NotQMPError says that something answers at the path, but not with QMP: a serial port, a monitor for
// people (HMP), a guest agent, another program.
type NotQMPError struct {
	Path  string
	Got   string // the first bytes that came; empty if none did
	Cause error  // why nothing came; nil if something did
}

func (e *NotQMPError) Error() string {
	if e.Got == "" {
		return fmt.Sprintf("%s is not a QMP socket: it sent no greeting (%v); give the socket of QEMU's -qmp option", e.Path, e.Cause)
	}
	return fmt.Sprintf("%s is not a QMP socket: its greeting is %q; give the socket of QEMU's -qmp option", e.Path, e.Got)
}

func (e *NotQMPError) Unwrap() error { return e.Cause }

// BusyError says that a connection waits at the socket without being accepted: QEMU serves one client per
// socket, and somebody else is connected.
type BusyError struct {
	Path  string
	Cause error // the end of the wait
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("QEMU does not answer at %s (%v): it serves one client per socket, and another one holds this; "+
		"disconnect that, or give QEMU a second -qmp socket", e.Path, e.Cause)
}

func (e *BusyError) Unwrap() error { return e.Cause }
