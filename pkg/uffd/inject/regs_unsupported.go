// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package inject

import (
	"fmt"
	"runtime"
)

// To support an architecture write a regs_GOARCH.go with what is in this file; regs_amd64.go is the example.

var syscallInstruction []byte

const auditArch = 0

type regs struct{}

func supported() error { return fmt.Errorf("%w on %s", ErrUnsupported, runtime.GOARCH) }

func getRegs(int) (regs, error) { return regs{}, supported() }
func setRegs(int, *regs) error  { return supported() }

func (r *regs) check() error                            { return supported() }
func (r *regs) forCall(uint64, uintptr, []uintptr) regs { return *r }
func (r *regs) forgetCall()                             {}
func (r *regs) keepCallGoing() bool                     { return false }
