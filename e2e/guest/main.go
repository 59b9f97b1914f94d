// SPDX-License-Identifier: Apache-2.0

//go:build linux && amd64

// Command guest is /init of the Linux guest that the end-to-end tests migrate. It stamps its memory, visits it under
// load, writes and reads its disks, and makes its network cards answer and send. On the second serial port it reports
// what it finds (package report) and takes these commands:
//
//	verify [ID]        check all memory, and all that was written to disks, answer "verified"
//	load [ID]          load on, answer "state"
//	stop|idle [ID]     load off, answer "state"
//	poweroff
//	panic              make the kernel panic
//
// Its parameters are on the kernel command line, see params.go.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/disk"
	"github.com/migrated-vm/migrated/e2e/guest/report"
)

// memoryLimit is how many bytes of memory the program has when garbage is collected in spite of SetGCPercent(-1). The
// reporter makes a few kilobytes of garbage in each window, so that happens once in hours.
const memoryLimit = 96 << 20

// quiet keeps the runtime's preemption signals off the workers, so that only memory stalls them. They call functions
// often enough to be stopped without. The runtime reads this setting only from the environment, before main.
const quiet = "GODEBUG=asyncpreemptoff=1"

func main() {
	if !slices.Contains(os.Environ(), quiet) {
		err := unix.Exec("/init", []string{"/init"}, append(os.Environ(), quiet))
		fmt.Fprintln(os.Stderr, "guest: cannot start again with", quiet, err)
	}
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		powerOff() // init must not return: the kernel would panic
	}
}

func run() error {
	if err := mountAll(); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	port, err := openSerial("/dev/ttyS1")
	if err != nil {
		return err
	}
	// UEFI firmware writes to every port without ending its line.
	if _, err := port.WriteString("\n"); err != nil {
		return err
	}
	out := report.NewEncoder(port)
	err = serve(port, out)
	return errors.Join(err, out.Encode(report.Error{Type: report.TypeError, Message: err.Error()}))
}

// serve runs the load and reports on it. It returns only with an error.
func serve(port *os.File, out *report.Encoder) error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	p, err := parseParams(string(cmdline))
	if err != nil {
		return err
	}
	// A thread each for the workers, the reporter, the reader of commands, and the work that waits for devices.
	runtime.GOMAXPROCS(p.Workers + 2 + p.Disks.Disks*disk.Lanes + p.Cards.Cards)
	w, ready, err := begin(p)
	if err != nil {
		return err
	}
	if err := out.Encode(ready); err != nil {
		return err
	}
	commands := make(chan string)
	go func() {
		in := bufio.NewScanner(port)
		for in.Scan() {
			commands <- in.Text()
		}
	}()
	w.run(true)
	return w.reportLoop(p.Window, commands, out)
}

// reportLoop is the only goroutine that writes to the port. It returns only with an error.
func (w *work) reportLoop(period time.Duration, commands <-chan string, out *report.Encoder) error {
	tick := time.NewTicker(period)
	for {
		var err error
		select {
		case <-tick.C:
			err = out.Encode(w.window())
		case c := <-commands:
			err = w.execute(c, out)
		}
		for err == nil {
			line, ok := w.finding()
			if !ok {
				break
			}
			err = out.Encode(line)
		}
		if err != nil {
			return err
		}
	}
}

// execute carries out a command from the port.
func (w *work) execute(command string, out *report.Encoder) error {
	name, id, _ := strings.Cut(strings.TrimSpace(command), " ")
	switch name {
	case "":
		return nil
	case "verify":
		return out.Encode(w.verify(id))
	case "load", "stop", "idle":
		w.run(name == "load")
		return out.Encode(report.State{
			Type: report.TypeState, Counters: w.memory.Counters(uptime()), ID: id, Loaded: name == "load",
		})
	case "poweroff":
		powerOff()
	case "panic":
		return os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	return out.Encode(report.Error{Type: report.TypeError, Message: fmt.Sprintf("unknown command %q", command)})
}

// uptime returns CLOCK_MONOTONIC: for how long the guest has run.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // the clock exists since Linux 2.6
	}
	return time.Duration(ts.Nano())
}
