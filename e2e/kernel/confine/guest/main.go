// SPDX-License-Identifier: Apache-2.0

// Command guest is PID 1 of a kernel with Landlock. It reports what root may do to another process, outside a Landlock
// domain and inside one:
//
//	RESULT name outcome
//	DONE
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("LOG failed:", err)
	}
	if os.Getpid() == 1 {
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // it does not return
	}
}

func run(args []string) error {
	switch {
	case os.Getpid() == 1:
		return boot()
	case args[0] == "sleep":
		return unix.Pause()
	case args[0] == "restrict": // name, pid
		return restrict(args[1], args[2])
	case args[0] == "try": // name, pid
		return try(args[1], args[2])
	}
	return fmt.Errorf("there is no %q", args)
}

// boot starts a process, and then the programs that try to access it.
func boot() error {
	err := errors.Join(unix.Mount("proc", "/proc", "proc", 0, ""), unix.Mount("devtmpfs", "/dev", "devtmpfs", 0, ""))
	if err != nil {
		return err
	}
	sleeper := exec.Command("/init", "sleep")
	if err := sleeper.Start(); err != nil {
		return err
	}
	pid := strconv.Itoa(sleeper.Process.Pid)
	for _, args := range [][]string{
		{"try", "free", pid}, {"restrict", "files", pid}, {"restrict", "network", pid}, {"restrict", "inside", pid},
	} {
		cmd := exec.Command("/init", args...)
		cmd.Stdout = os.Stdout
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%v: %w", args, err)
		}
	}
	fmt.Println("DONE")
	return nil
}

// rulesets are the smallest rulesets that Landlock accepts: they forbid making block devices, or binding TCP ports, and
// nothing else.
var rulesets = map[string]unix.LandlockRulesetAttr{
	"files":   {Handled_access_fs: unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK},
	"network": {Handled_access_net: unix.LANDLOCK_ACCESS_NET_BIND_TCP},
	"inside":  {Handled_access_fs: unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK},
}

// restrict puts this process into a domain and tries there. A domain applies to the thread that asked for it, and to
// the program that this thread starts. In the case "inside", the other process is in the same domain.
func restrict(name, pid string) error {
	runtime.LockOSThread()
	attr := rulesets[name]
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return fmt.Errorf("landlock_create_ruleset: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("landlock_restrict_self: %w", errno)
	}
	if name == "inside" {
		sleeper := exec.Command("/init", "sleep")
		if err := sleeper.Start(); err != nil { // this thread starts it
			return err
		}
		pid = strconv.Itoa(sleeper.Process.Pid)
	}
	return unix.Exec("/init", []string{"/init", "try", name, pid}, os.Environ())
}

// try does to a process what the daemon does to a QEMU.
func try(name, arg string) error {
	pid, err := strconv.Atoi(arg)
	if err != nil {
		return err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	_, duplicate := unix.PidfdGetfd(pidfd, 1, 0)
	report(name+"-getfd", duplicate)
	_, maps := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	report(name+"-maps", maps)
	memory, opened := os.OpenFile(fmt.Sprintf("/proc/%d/fd/0", pid), os.O_RDONLY, 0)
	if opened == nil {
		opened = memory.Close()
	}
	report(name+"-open", opened)
	report(name+"-trace", unix.PtraceSeize(pid)) // last, because the end of this thread ends the trace
	return nil
}

func report(name string, err error) {
	outcome := "ok"
	var errno unix.Errno
	switch {
	case errors.As(err, &errno):
		outcome = unix.ErrnoName(errno)
	case err != nil:
		outcome = "failed"
	}
	fmt.Printf("RESULT %s %s\n", name, outcome)
}
