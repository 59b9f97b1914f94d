// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/cannot"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

const nobody = 65534

var unprivileged = Credentials{UID: nobody, GID: nobody, Groups: []uint32{nobody}}

const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

func TestFactsOfAnUnprivilegedVM(t *testing.T) {
	needRoot(t)
	opts := startOptions(t, unprivileged, append(ram(ramFile(t)), "-name", "web", "-sandbox", sandbox)...)
	_, vm := startWith(t, nil, opts)
	f, err := vm.Facts(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if f.Name != "web" || !strings.HasPrefix(f.MachineType, "pc-q35-") || f.KVM || f.Version != vm.QMP.Version() {
		t.Errorf("facts %+v", f)
	}
	if f.UID != nobody || f.GID != nobody || !slices.Equal(f.Groups, []uint32{nobody}) {
		t.Errorf("user %d, group %d, groups %v", f.UID, f.GID, f.Groups)
	}
	if diff := cmp.Diff(opts.Args, f.CommandLine); diff != "" || f.WorkingDirectory != opts.Dir {
		t.Errorf("in %s, command line -want +got:\n%s", f.WorkingDirectory, diff)
	}
	if sid, err := unix.Getsid(vm.Pid); err != nil || sid != vm.Pid {
		t.Errorf("session %d, %v", sid, err)
	}
	at := slices.IndexFunc(f.RAMBlocks, func(b RAMBlock) bool { return b.ID == "ram0" })
	if at < 0 {
		t.Fatalf("memory %+v", f.RAMBlocks)
	}
	checkBlock(t, vm, f.RAMBlocks[at])
}

func TestHandedDescriptor(t *testing.T) {
	needRoot(t)
	device, err := os.OpenFile(uffd.DevicePath, os.O_RDWR, 0)
	if err != nil {
		cannot.Run(t, "%v", err)
	}
	defer device.Close()
	// No VM runs while it waits: where remove-fd closes nothing.
	_, vm := startAs(t, unprivileged, append(ram(ramFile(t)), "-sandbox", sandbox, "-S", "-incoming", "defer")...)
	ctx := testContext(t)
	for range 2 {
		release, err := vm.HandFD(ctx, device)
		if err != nil {
			t.Fatal(err)
		}
		if n := descriptors(t, vm.Pid, uffd.DevicePath); n != 1 {
			t.Errorf("QEMU has %d descriptors of the device after it was handed one", n)
		}
		if err := release(ctx); err != nil {
			t.Fatal(err)
		}
		if n := descriptors(t, vm.Pid, uffd.DevicePath); n != 0 {
			t.Errorf("QEMU has %d descriptors of the device after it closed it", n)
		}
	}
}

// descriptors counts a process' descriptors of a file.
func descriptors(t *testing.T, pid int, path string) (n int) {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if name, err := os.Readlink(link); err == nil && name == path {
			n++
		}
	}
	return n
}

func TestStartFails(t *testing.T) {
	self := Credentials{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	t.Run("bad option", func(t *testing.T) {
		opts := startOptions(t, self, "-no-such-option")
		_, _, err := Start(testContext(t), opts)
		if err == nil || !strings.Contains(err.Error(), "no-such-option") || !strings.Contains(err.Error(), "exit status 1") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("directory of another user", func(t *testing.T) {
		needRoot(t)
		opts := startOptions(t, unprivileged)
		if err := os.Chmod(filepath.Dir(opts.QMPPath), 0o755); err != nil {
			t.Fatal(err)
		}
		_, _, err := Start(testContext(t), opts)
		if err == nil || !strings.Contains(err.Error(), "Permission denied") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("socket in use", func(t *testing.T) {
		p, vm := start(t)
		opts := startOptions(t, self)
		opts.QMPPath = vm.QMP.Path()
		_, _, err := Start(testContext(t), opts)
		if err == nil || !strings.Contains(err.Error(), "another process listens") {
			t.Errorf("error %v", err)
		}
		if err := vm.QMP.Do(testContext(t), "query-status", nil, nil); err != nil {
			t.Errorf("the first QEMU, process %d: %v", p.Pid(), err)
		}
	})
	t.Run("no socket", func(t *testing.T) {
		opts := startOptions(t, self)
		opts.Args = slices.DeleteFunc(opts.Args, func(arg string) bool { return arg == "-qmp" || strings.HasPrefix(arg, "unix:") })
		pidfile := filepath.Join(opts.Dir, "pid")
		opts.Args = append(opts.Args, "-pidfile", pidfile)
		ctx, cancel := context.WithCancel(testContext(t))
		go func() { // give up when QEMU is up
			awaitFile(ctx, pidfile)
			cancel()
		}()
		_, _, err := Start(ctx, opts)
		if err == nil {
			t.Fatal("a QEMU without QMP was started")
		}
		// It stays where QEMU was killed, empty if before it wrote its number.
		if text, _ := os.ReadFile(pidfile); len(text) > 0 {
			if _, err := os.Stat("/proc/" + strings.TrimSpace(string(text))); err == nil {
				t.Errorf("QEMU %s was left behind", text)
			}
		}
	})
}

func TestQuit(t *testing.T) {
	for name, args := range map[string][]string{"obeyed": nil, "not listening": {"-S"}} {
		t.Run(name, func(t *testing.T) {
			p, vm := start(t, args...)
			if name == "not listening" {
				if err := unix.Kill(p.Pid(), unix.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			if err := vm.Quit(testContext(t)); err != nil {
				t.Fatal(err)
			}
			<-p.Exited()
			if p.ExitReason() == "" {
				t.Error("no reason")
			}
		})
	}
}
