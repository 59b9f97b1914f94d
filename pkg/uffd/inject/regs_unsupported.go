// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package inject

import (
	"fmt"
	"runtime"
)

// To support an architecture, write a regs_GOARCH.go that defines what this file defines, as regs_amd64.go does.

var syscallInstruction []byte

var callInstructions, returnInstructions [][]byte

const auditArch = 0

type regs struct{}

func supported() error { return fmt.Errorf("%w on %s", ErrUnsupported, runtime.GOARCH) }

func getRegs(int) (regs, error) { return regs{}, supported() }
func setRegs(int, *regs) error  { return supported() }

func (r *regs) check() error                                     { return supported() }
func (r *regs) forCall(_, _ uint64, _ uintptr, _ []uintptr) regs { return *r }
func (r *regs) forgetCall()                                      {}
func (r *regs) keepCallGoing() bool                              { return false }
func (r *regs) instruction() *uint64                             { return new(uint64) }

func (r regs) withoutCall() regs                              { return r }
func (r *regs) frame(uint64, sigset, []byte) (uint64, []byte) { return 0, nil }
func getXstate(int) ([]byte, error)                           { return nil, supported() }
