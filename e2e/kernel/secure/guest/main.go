// SPDX-License-Identifier: Apache-2.0

// Command guest is PID 1 of a kernel in which two daemons migrate a KVM VM under SELinux. secure_test.go, which boots
// it, has the table of what it reports:
//
//	RESULT name outcome
//	LOG anything
//	DONE
//
// It runs the same on every kernel: first without a policy (bare.go), then with it (confined.go), with strangers that
// try to get at a VM's descriptor (strangers.go), and with a VM whose memory is in no file (private.go). By argument,
// it instead migrates a domain of libvirt's (libvirt.go), also where AppArmor confines it (apparmor.go), or runs test
// binaries (tests.go).
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds the whole run. Nothing waits that long unless it is broken.
const patience = 600 * time.Second

// init keeps the process's first thread for the main goroutine, so that no host gets it. Linux 7.3 takes PID 1's files
// away when that thread has a mount namespace of its own (validate_fs_switch in fs/fs_struct.c).
func init() { runtime.LockOSThread() }

func main() {
	if os.Args[0] == watchedQEMU {
		fmt.Fprintln(os.Stderr, watch(os.Args[1:])) // it returns only on an error
		os.Exit(1)
	}
	if os.Getpid() != 1 {
		probe(os.Args[1:])
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := run(ctx); err != nil {
		logf("failed: %v", err)
	} else {
		say("DONE")
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // it does not return
}

func run(ctx context.Context) error {
	if err := prepare(); err != nil {
		return err
	}
	log, err := listen()
	if err != nil {
		return err
	}
	parts := []func(context.Context, *audit) error{bare, confined, private}
	if len(os.Args) > 1 {
		part, known := map[string]func(context.Context, *audit) error{
			"tests": tests, "svirt": svirt, "apparmor": confinedByAppArmor,
		}[os.Args[1]]
		if !known {
			return fmt.Errorf("there is no part %q", os.Args[1])
		}
		parts = []func(context.Context, *audit) error{part}
	}
	for _, part := range parts {
		if err := part(ctx, log); err != nil {
			return err
		}
	}
	return nil
}

// prepare mounts and makes what a booted system has.
func prepare() error {
	for _, m := range []struct{ kind, at string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"selinuxfs", "/sys/fs/selinux"},
	} {
		err := unix.Mount(m.kind, m.at, m.kind, 0, "")
		if m.kind == "selinuxfs" && errors.Is(err, unix.ENOENT) {
			continue // another security module
		}
		if err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	program, err := os.ReadFile("/init")
	if err != nil {
		return err
	}
	return errors.Join(
		os.Mkdir("/dev/shm", 0o755),
		unix.Mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"),
		os.Chmod("/dev/kvm", 0o666), // as for the members of a group kvm
		os.Symlink("/run", "/var/run"),
		os.Mkdir("/var/log", 0o755),
		os.WriteFile(watchedQEMU, program, 0o755),
		// The programs of the strangers. There are two, because a file has only one label.
		os.WriteFile("/usr/bin/probe", program, 0o755),
		os.WriteFile("/usr/bin/probe-qemu", program, 0o755),
		// Each refusal must be logged.
		os.WriteFile("/proc/sys/kernel/printk_ratelimit", []byte("0"), 0),
		raiseLoopback())
}

// loadModules loads KVM if the kernel has it in modules, in the order of their names.
func loadModules() error {
	paths, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, path := range paths {
		params := ""
		if strings.HasSuffix(path, "-kvm-amd.ko") {
			params = "npt=0" // as the other kernels have it on their command line
		}
		module, err := os.ReadFile(path)
		if err == nil {
			err = unix.InitModule(module, params)
		}
		if err != nil {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	return nil
}

// raiseLoopback does "ip link set lo up".
func raiseLoopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// logf logs text of any number of lines.
func logf(format string, args ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		say("LOG %s", strings.TrimSpace(line))
	}
}

// result reports an outcome, which is one word.
func result(name, outcome string) { say("RESULT %s %s", name, outcome) }

// check reports good, or "failed" and logs the error.
func check(name, good string, err error) {
	if err != nil {
		logf("%s: %v", name, err)
		good = "failed"
	}
	result(name, good)
}

// descriptors returns the userfaultfds of a process.
func descriptors(pid int) []int {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // the pattern is right
	var fds []int
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && to == "anon_inode:[userfaultfd]" {
			var fd int
			if _, err := fmt.Sscanf(filepath.Base(link), "%d", &fd); err == nil {
				fds = append(fds, fd)
			}
		}
	}
	return fds
}
