// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"strings"
)

// ErrNotSupported is what errors.Is finds in every *NotSupportedError.
var ErrNotSupported = errors.New("not supported by this kernel")

// NotSupportedError names what the running kernel lacks. It is returned only on a conclusive answer of the
// kernel: a lack of privilege or of descriptors is another error.
type NotSupportedError struct {
	Feature   string // one or more of the kernel's names, joined by "|"
	MinKernel string // first release that has all of them, "6.6"; empty if this package does not know it
}

func (e *NotSupportedError) Error() string {
	if e.MinKernel == "" {
		return "userfaultfd: " + e.Feature + " is not supported by this kernel, and this program does not know which has it"
	}
	return "userfaultfd: " + e.Feature + " is not supported by this kernel; it needs Linux " + e.MinKernel +
		" or newer, built with it for this architecture"
}

// Is makes errors.Is(err, ErrNotSupported) true.
func (e *NotSupportedError) Is(target error) bool { return target == ErrNotSupported }

// capabilities describe the bits of a set S that the kernel may support, in the order of the bits.
type capabilities[S ~uint64] []struct {
	bit       S
	name      string        // the kernel's name of it
	minKernel kernelVersion // the first release that has it
}

// names lists the names of the bits in s, joined by "|". Bits without a name are in hexadecimal.
func (c capabilities[S]) names(s S) string {
	if s == 0 {
		return "none"
	}
	var names []string
	for _, e := range c {
		if s&e.bit != 0 {
			names = append(names, e.name)
			s &^= e.bit
		}
	}
	if s != 0 {
		names = append(names, fmt.Sprintf("%#x", uint64(s)))
	}
	return strings.Join(names, "|")
}

// notSupported makes the error for the bits in missing.
func (c capabilities[S]) notSupported(missing S) *NotSupportedError {
	err := &NotSupportedError{Feature: c.names(missing)}
	var newest kernelVersion
	for _, e := range c {
		if missing&e.bit == 0 {
			continue
		}
		missing &^= e.bit
		if newest.less(e.minKernel) {
			newest = e.minKernel
		}
	}
	if missing == 0 {
		err.MinKernel = newest.String()
	}
	return err
}

// kernelVersion is a release of Linux: 6.12 is {6, 12}.
type kernelVersion struct{ major, minor int }

func (v kernelVersion) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

func (v kernelVersion) less(w kernelVersion) bool {
	return v.major < w.major || v.major == w.major && v.minor < w.minor
}
