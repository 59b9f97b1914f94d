// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/emulator"
)

// QEMU is the version in which Boot boots kernels. It is not the installed one, 7.2: in its emulated virtualization a
// guest of KVM's sometimes goes astray (secure/README.md, "The emulator").
const QEMU = emulator.V11

// commandLine is what every kernel gets. On a busy machine the emulated TSC has been measured against the timer as 17
// times too slow, and then every clock in the guest ran too fast; the HPET is exact. On such a machine a kernel may
// also check in vain whether the timer interrupts, because the emulator stands still meanwhile. It then panics
// (IO-APIC + timer doesn't work!), unless it is told not to check.
const commandLine = "console=ttyS0 panic=-1 tsc=unstable no_timer_check "

// Options say what Boot boots.
type Options struct {
	Kernel      string // a Tree's BzImage
	Initrd      string // from Initramfs, or none
	CommandLine string // added to commandLine
	MemoryMiB   int    // 0: 768
	CPUs        int    // 0: 2
	// CountInstructions makes the machine's clocks count the instructions of its CPUs, a nanosecond for each. Times that
	// are measured with them are the same on each run, whatever else the host does.
	CountInstructions bool
	Args              []string
	// Log, if set, gets the console's output as it comes.
	Log io.Writer
}

// afterSplat is how long a guest may go on after its kernel has complained, so that the report is complete. The guest
// may be too broken to power off.
const afterSplat = 10 * time.Second

// ErrTripleFault is in the error of a boot whose machine was reset because a CPU could not even begin to handle a
// fault. The console has nothing about it, because no handler of the kernel has run.
var ErrTripleFault = errors.New("a CPU of the machine ended in a triple fault")

// Boot boots a kernel under QEMU, without the host's KVM, and gives each line of its console to line. It returns once
// QEMU has ended, because the guest powered off, panicked, or had a triple fault (ErrTripleFault). It ends QEMU itself,
// with an error, when ctx ends, when line fails, and soon after the kernel complained (ErrSplat).
func Boot(ctx context.Context, o Options, line func(string) error) error {
	// QEMU must die with this process. For the kernel this means with the thread that started QEMU, which the Go runtime
	// may end unless it is locked.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	boot, cancel := context.WithCancel(ctx)
	defer cancel()

	qemu, err := emulator.Command(ctx, QEMU)
	if err != nil {
		return fmt.Errorf("boot %s: %w", o.Kernel, err)
	}
	resets, err := os.CreateTemp("", "resets")
	if err != nil {
		return err
	}
	defer os.Remove(resets.Name())
	defer resets.Close()
	cmd := exec.CommandContext(boot, qemu, append(o.args(), "-d", "cpu_reset", "-D", resets.Name())...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	console, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("boot %s: %w", o.Kernel, err)
	}
	complaint, lineErr := read(console, o.Log, line, cancel)
	if lineErr != nil {
		cancel()
	}
	waitErr := cmd.Wait()

	switch {
	case complaint != nil || lineErr != nil || ctx.Err() != nil:
		waitErr = nil // it was killed
	case waitErr != nil:
		waitErr = fmt.Errorf("%w: %s", waitErr, bytes.TrimSpace(stderr.Bytes()))
	case bytes.Contains(stderr.Bytes(), []byte("terminating on signal")): // QEMU adds by whom; its exit status is 0
		waitErr = errors.New(string(bytes.TrimSpace(stderr.Bytes())))
	default:
		waitErr = tripleFault(resets)
	}
	if err := errors.Join(complaint, lineErr, ctx.Err(), waitErr); err != nil {
		return fmt.Errorf("boot %s: %w", o.Kernel, err)
	}
	return nil
}

// tripleFault returns ErrTripleFault if QEMU's log of CPU resets has a triple fault.
func tripleFault(resets io.Reader) error {
	text, err := io.ReadAll(resets)
	if err == nil && bytes.Contains(text, []byte("Triple fault\n")) {
		err = ErrTripleFault
	}
	return err
}

// read reads the console to its end, or until line fails. When the kernel complains, it calls kill soon afterwards to
// end QEMU.
func read(console io.Reader, log io.Writer, line func(string) error, kill func()) (complaint, lineErr error) {
	if log != nil {
		console = io.TeeReader(console, log)
	}
	var splats splatLog
	for r := bufio.NewReader(console); ; {
		text, err := r.ReadString('\n')
		if text = strings.TrimRight(text, "\r\n"); text != "" {
			if splats.add(text) {
				defer time.AfterFunc(afterSplat, kill).Stop()
			}
			if err := line(text); err != nil {
				return splats.err(), err
			}
		}
		if err != nil { // the end of QEMU
			return splats.err(), nil
		}
	}
}

// args returns QEMU's arguments.
func (o Options) args() []string {
	memory, cpus := o.MemoryMiB, o.CPUs
	if memory == 0 {
		memory = 768
	}
	if cpus == 0 {
		cpus = 2
	}
	// Everything is emulated, even if there is /dev/kvm: '-cpu max' then has AMD's virtualization, which KVM in the guest
	// needs.
	args := []string{"-cpu", "max", "-accel", "tcg,thread=multi"}
	if o.CountInstructions {
		args = []string{"-cpu", "max", "-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"}
	}
	args = append(args, "-M", "q35",
		"-m", strconv.Itoa(memory), "-smp", strconv.Itoa(cpus),
		"-nodefaults", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", o.Kernel, "-append", strings.TrimSpace(commandLine+o.CommandLine))
	if o.Initrd != "" {
		args = append(args, "-initrd", o.Initrd)
	}
	return append(args, o.Args...)
}
