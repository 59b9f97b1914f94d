// SPDX-License-Identifier: Apache-2.0

package uffd

import "errors"

// ErrNotSupported is what errors.Is finds in every *NotSupportedError.
var ErrNotSupported = errors.New("not supported by this kernel")

// NotSupportedError names what the running kernel lacks. It is only given on a conclusive answer of the
// kernel: a refusal for want of privilege or of descriptors is another error.
type NotSupportedError struct {
	Feature   string // one or more of the kernel's names, joined by "|"
	MinKernel string // first release that has all of them, "6.6"; empty where this package does not know
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

// notSupported makes the error for the features in missing.
func notSupported(missing Features) *NotSupportedError {
	e := &NotSupportedError{Feature: missing.String()}
	var newest kernelVersion
	for _, f := range featureTable {
		if missing&f.bit == 0 {
			continue
		}
		missing &^= f.bit
		if newest.less(f.minKernel) {
			newest = f.minKernel
		}
	}
	if missing == 0 {
		e.MinKernel = newest.String()
	}
	return e
}
