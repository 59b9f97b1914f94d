// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// What this file uses of include/uapi/linux/kvm.h, on x86-64.
const (
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmExitReason = 8 // offset in struct kvm_run
	kvmExitHLT    = 5
)

// vcpuPages is the RAM of the VM: all that real mode reaches.
const vcpuPages = 256

// vcpu makes a virtual CPU of KVM's touch pages of its RAM, and reports which pages the kernel names: the touched ones,
// and the first, which has the program. KVM has page tables of its own, which the protection must reach, too.
func vcpu(context.Context) error {
	for _, m := range []struct {
		name  string
		flags int
	}{{"private", unix.MAP_PRIVATE}, {"shared", unix.MAP_SHARED}} {
		memory, err := unix.Mmap(-1, 0, vcpuPages*pageSize, unix.PROT_READ|unix.PROT_WRITE, m.flags|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		if err := vcpuIn(memory, m.name); err != nil {
			return fmt.Errorf("%s memory: %w", m.name, err)
		}
	}
	return nil
}

func vcpuIn(memory []byte, name string) error {
	v, err := newVM(memory)
	if err != nil {
		return err
	}
	defer v.close()
	everything := make([]int, vcpuPages)
	for page := range everything {
		everything[page] = page
	}
	if err := v.touch(everything); err != nil { // KVM has mapped all of it
		return err
	}
	u, err := uffd.Open(uffd.OpenOptions{})
	if err != nil {
		return err
	}
	defer u.Close()
	if _, _, err := u.API(uffd.FeatureRWP | uffd.FeatureRWPAsync); err != nil {
		return err
	}
	r := uffd.Range{Start: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory)))), Len: uint64(len(memory))}
	if _, err := u.Register(r, uffd.ModeRWP); err != nil {
		return err
	}
	for i, pages := range [][]int{{3, 17, 200}, {17}, {4, 5, 6, 255}} {
		if err := u.RWProtect(r, uffd.RWPProtect); err != nil {
			return err
		}
		if err := v.touch(pages); err != nil {
			return err
		}
		found, err := accessedPages(r)
		if err != nil {
			return err
		}
		if want := append([]int{0}, pages...); !slices.Equal(found, want) {
			return fmt.Errorf("the kernel names the pages %d, want %d", found, want)
		}
		fmt.Printf("RESULT vcpu-%s-%d %d\n", name, i, found)
	}
	return nil
}

// accessedPages returns the pages of this process's memory that the kernel names, counted from 0.
func accessedPages(r uffd.Range) (pages []int, err error) {
	p, err := uffd.OpenPagemap(os.Getpid())
	if err != nil {
		return nil, err
	}
	defer p.Close()
	regions := make([]uffd.PageRegion, vcpuPages)
	n, rest, err := p.Scan(r, uffd.PageQuery{All: uffd.PageAccessed}, regions)
	if err == nil && rest.Len > 0 {
		err = errors.New("there was no room for what the scan found")
	}
	for _, found := range regions[:n] {
		for at := found.Start; at < found.End; at += pageSize {
			pages = append(pages, int((at-r.Start)/pageSize))
		}
	}
	return pages, err
}

// A machine is a VM of KVM's with one virtual CPU, in real mode, and memory at address 0.
type machine struct {
	kvm, vm, cpu int
	run          []byte // struct kvm_run
	memory       []byte
}

func newVM(memory []byte) (_ *machine, err error) {
	m := &machine{kvm: -1, vm: -1, cpu: -1, memory: memory}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	if m.kvm, err = unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open /dev/kvm: %w", err)
	}
	if m.vm, err = ioctl(m.kvm, kvmCreateVM, 0); err != nil {
		return nil, err
	}
	region := struct {
		slot, flags                  uint32
		guestAddr, size, userAddress uint64
	}{size: uint64(len(memory)), userAddress: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory))))}
	if _, err := ioctl(m.vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
		return nil, err
	}
	if m.cpu, err = ioctl(m.vm, kvmCreateVCPU, 0); err != nil {
		return nil, err
	}
	size, err := ioctl(m.kvm, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return nil, err
	}
	m.run, err = unix.Mmap(m.cpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return m, err
}

func (m *machine) close() {
	if m.run != nil {
		_ = unix.Munmap(m.run)
	}
	for _, fd := range []int{m.cpu, m.vm, m.kvm} {
		_ = unix.Close(fd)
	}
}

// touch makes the virtual CPU read a byte of each page with an even number, and write a byte of each page with an odd
// one. It leaves out the first page, where the program is.
func (m *machine) touch(pages []int) error {
	var program []byte
	for _, page := range pages {
		if page == 0 {
			continue
		}
		segment := binary.LittleEndian.AppendUint16(nil, uint16(page*pageSize>>4))
		program = append(program,
			0xb8, segment[0], segment[1], // mov ax, segment
			0x8e, 0xd8) // mov ds, ax
		if page%2 == 0 {
			program = append(program, 0xa0, 0, 0) // mov al, [0]
		} else {
			program = append(program, 0xa2, 0, 0) // mov [0], al
		}
	}
	program = append(program, 0xf4) // hlt
	if len(program) > pageSize {
		return errors.New("the program is longer than a page")
	}
	copy(m.memory, program)

	var sregs [312]byte // begins with cs: base, limit, selector
	if _, err := ioctl(m.cpu, kvmGetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return err
	}
	clear(sregs[:8])
	clear(sregs[12:14])
	if _, err := ioctl(m.cpu, kvmSetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return err
	}
	var regs [18]uint64 // rip, 0, and rflags are the last two
	regs[17] = 2
	if _, err := ioctl(m.cpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs))); err != nil {
		return err
	}
	for {
		_, err := ioctl(m.cpu, kvmRun, 0)
		switch reason := binary.NativeEndian.Uint32(m.run[kvmExitReason:]); {
		case errors.Is(err, unix.EINTR): // the runtime signals threads
			continue
		case err != nil:
			return err
		case reason != kvmExitHLT:
			return fmt.Errorf("the virtual CPU stops for the reason %d", reason)
		}
		return nil
	}
}

//go:uintptrescapes
func ioctl(fd int, request, argument uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, argument)
	if errno != 0 {
		return 0, fmt.Errorf("ioctl %#x: %w", request, errno)
	}
	return int(n), nil
}
