// SPDX-License-Identifier: Apache-2.0

package qemu_test

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

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

func TestFactsOfAnUnprivilegedVM(t *testing.T) {
	qemutest.NeedRoot(t)
	opts := qemutest.Options(t, qemutest.Unprivileged,
		append(qemutest.RAM(qemutest.RAMFile(t)), "-name", "web", "-sandbox", qemutest.Sandbox)...)
	_, vm := qemutest.StartWith(t, nil, opts)
	f, err := vm.Facts(qemutest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	if f.Name != "web" || !strings.HasPrefix(f.MachineType, "pc-q35-") || f.KVM || f.Version != vm.QMP.Version() {
		t.Errorf("facts %+v", f)
	}
	if f.UID != qemutest.Nobody || f.GID != qemutest.Nobody || !slices.Equal(f.Groups, []uint32{qemutest.Nobody}) {
		t.Errorf("user %d, group %d, groups %v", f.UID, f.GID, f.Groups)
	}
	if diff := cmp.Diff(opts.Args, f.CommandLine); diff != "" || f.WorkingDirectory != opts.Dir {
		t.Errorf("in %s, command line -want +got:\n%s", f.WorkingDirectory, diff)
	}
	if sid, err := unix.Getsid(vm.Pid); err != nil || sid != vm.Pid {
		t.Errorf("session %d, %v", sid, err)
	}
	at := slices.IndexFunc(f.RAMBlocks, func(b ram.Block) bool { return b.ID == "ram0" })
	if at < 0 {
		t.Fatalf("memory %+v", f.RAMBlocks)
	}
	qemutest.CheckBlock(t, vm, f.RAMBlocks[at])
}

func TestHandedDescriptor(t *testing.T) {
	qemutest.NeedRoot(t)
	device, err := os.OpenFile(uffd.DevicePath, os.O_RDWR, 0)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	defer device.Close()
	// The VM does not run while it waits for a migration: remove-fd would close nothing.
	_, vm := qemutest.StartWith(t, nil, qemutest.Options(t, qemutest.Unprivileged,
		append(qemutest.RAM(qemutest.RAMFile(t)), "-sandbox", qemutest.Sandbox, "-S", "-incoming", "defer")...))
	ctx := qemutest.Context(t)
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

// descriptors counts the descriptors that a process has of a file.
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
	self := qemutest.Self()
	t.Run("bad option", func(t *testing.T) {
		opts := qemutest.Options(t, self, "-no-such-option")
		_, _, err := qemu.Start(qemutest.Context(t), nil, opts)
		if err == nil || !strings.Contains(err.Error(), "no-such-option") || !strings.Contains(err.Error(), "exit status 1") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("directory of another user", func(t *testing.T) {
		qemutest.NeedRoot(t)
		opts := qemutest.Options(t, qemutest.Unprivileged)
		if err := os.Chmod(filepath.Dir(opts.QMPPath), 0o755); err != nil {
			t.Fatal(err)
		}
		_, _, err := qemu.Start(qemutest.Context(t), nil, opts)
		if err == nil || !strings.Contains(err.Error(), "Permission denied") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("socket in use", func(t *testing.T) {
		p, vm := qemutest.Start(t)
		opts := qemutest.Options(t, self)
		opts.QMPPath = vm.QMP.Path()
		_, _, err := qemu.Start(qemutest.Context(t), nil, opts)
		if err == nil || !strings.Contains(err.Error(), "another process listens") {
			t.Errorf("error %v", err)
		}
		if err := vm.QMP.Do(qemutest.Context(t), "query-status", nil, nil); err != nil {
			t.Errorf("the first QEMU, process %d: %v", p.Pid(), err)
		}
	})
	t.Run("no socket", func(t *testing.T) {
		opts := qemutest.Options(t, self)
		opts.Args = slices.DeleteFunc(opts.Args, func(arg string) bool {
			return arg == "-qmp" || strings.HasPrefix(arg, "unix:")
		})
		pidfile := filepath.Join(opts.Dir, "pid")
		opts.Args = append(opts.Args, "-pidfile", pidfile)
		ctx, cancel := context.WithCancel(qemutest.Context(t))
		go func() { // give up when QEMU is up
			qemutest.AwaitFile(ctx, pidfile)
			cancel()
		}()
		_, _, err := qemu.Start(ctx, nil, opts)
		if err == nil {
			t.Fatal("a QEMU without QMP was started")
		}
		// The pidfile stays when QEMU is killed. It is empty when QEMU was killed before it wrote its PID.
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
			p, vm := qemutest.Start(t, args...)
			if name == "not listening" {
				if err := unix.Kill(p.Pid(), unix.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			if err := vm.Quit(qemutest.Context(t)); err != nil {
				t.Fatal(err)
			}
			<-p.Exited()
			if p.ExitReason() == "" {
				t.Error("no reason")
			}
		})
	}
}
