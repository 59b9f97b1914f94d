// SPDX-License-Identifier: Apache-2.0

// Package twice makes QEMU load the state of devices twice: of each kind that this project loads early, in each version
// of QEMU.
package twice

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// restless are sections that differ between two saves for a reason other than loading.
var restless = map[string]string{
	"mc146818rtc": "has the time of day",
	"kvmclock":    "is read from KVM when it is saved: sometimes four of its bytes are others, sometimes five",
	"e1000e":      "has timers that are armed when it is loaded, from the clock of then",
}

// TestLoadedTwice: a QEMU loads the state of a running VM, and then all of it again after it has changed. It then has
// the VM's state.
func TestLoadedTwice(t *testing.T) {
	for _, version := range lab.QEMUVersions {
		seen := map[string]bool{}
		for _, m := range machines {
			t.Run(version+"/"+m.name, func(t *testing.T) {
				accelerator := "tcg"
				if m.kvm {
					accelerator = "kvm"
					if _, err := os.Stat("/dev/kvm"); err != nil {
						t.Skipf("no KVM on this machine: %v", err)
					}
				}
				d := &devices{t: t, dir: shared(t)}
				m.devices(d)
				args := append([]string{
					command(t, version), "-machine", m.machine + ",memory-backend=ram", "-accel", accelerator,
				}, d.args...)
				source := start(t, d.dir, args...)
				for _, s := range loadTwice(t, source, func() *qemu.VM {
					return start(t, d.dir, append(args, "-S", "-incoming", "defer")...)
				}) {
					seen[s.Device()] = true
				}
			})
		}
		if t.Failed() {
			return
		}
		for _, device := range devicestate.Twice() {
			if !seen[device] {
				t.Errorf("no machine of QEMU %s had a %q", version, device)
			}
		}
	}
}

// loadTwice has destinations load the state twice and once, compares them, and returns the sections of the state.
func loadTwice(t *testing.T, source *qemu.VM, startDestination func() *qemu.VM) []devicestate.Section {
	t.Helper()
	ctx := testContext(t)
	time.Sleep(2 * time.Second) // the firmware sets the devices up
	facts, err := source.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	head := append(devicestate.Head(facts.MachineType), devicestate.ReturnPath...)
	for try := 0; ; try++ {
		early, err := devicestate.Early(parse(t, saveRunning(t, source)))
		if err != nil {
			t.Fatal(err)
		}
		destination := load(t, startDestination())
		destination.feed(t, head, early)

		time.Sleep(300 * time.Millisecond) // the guest boots, or finds that it cannot
		lock, err := source.NewContLock(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := source.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		now := parse(t, save(t, source, true))
		changes, err := devicestate.Changes(early, now, func(int) bool { return true })
		if errors.Is(err, devicestate.ErrOtherForm) && try < 5 {
			t.Logf("try %d: %v", try, err)
			if err := errors.Join(lock.Close(), source.RemoveContLock(ctx)); err != nil {
				t.Fatal(err)
			}
			if _, err := source.Cont(ctx); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		list, err := devicestate.ParseChanges(early, changes)
		if err != nil {
			t.Fatal(err)
		}
		if err := destination.UnmapRootComplex(ctx); err != nil {
			t.Fatal(err)
		}
		var again []devicestate.Section
		for _, c := range list {
			again = append(again, c.Section)
		}
		destination.feed(t, nil, again)
		other := load(t, startDestination())
		other.feed(t, head, now)
		compareLoads(t, now, destination.saveAgain(t), other.saveAgain(t))
		if err := errors.Join(lock.Lock(), lock.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := source.Cont(ctx); !errors.Is(err, qmp.ErrGeneric) {
			t.Errorf("continue a VM that was handed over: %v", err)
		}
		if err := source.Quit(ctx); err != nil { // it still has the disks
			t.Error(err)
		}
		if _, err := destination.Cont(ctx); err != nil {
			t.Error(err)
		}
		return now
	}
}

// compareLoads fails unless QEMU has changed as few bytes of what was loaded twice as of what was loaded once.
func compareLoads(t *testing.T, saved, twice, once []devicestate.Section) {
	t.Helper()
	changed := map[string]int{}
	for _, d := range devicestate.Compare(saved, once) {
		changed[d.Name] = d.Bytes
	}
	for _, d := range devicestate.Compare(saved, twice) {
		if restless[devicestate.Section{Name: d.Name}.Device()] == "" && d.Bytes != changed[d.Name] {
			t.Errorf("%d bytes of %q are others when they are saved again; of what was loaded once %d",
				d.Bytes, d.Name, changed[d.Name])
		}
	}
}

// A loader is a QEMU that loads device states.
type loader struct {
	*qemu.VM
	stream  *os.File
	loading *qemu.Loading
}

func load(t *testing.T, vm *qemu.VM) *loader {
	t.Helper()
	if err := vm.PrepareIncoming(testContext(t)); err != nil {
		t.Fatal(err)
	}
	theirs, ours := sockets(t)
	loading, err := vm.BeginLoading(testContext(t), theirs)
	if err != nil {
		t.Fatal(err)
	}
	return &loader{vm, ours, loading}
}

// saveAgain ends the stream, and saves what was loaded.
func (l *loader) saveAgain(t *testing.T) []devicestate.Section {
	t.Helper()
	if _, err := l.stream.Write(devicestate.End(nil)); err != nil {
		t.Fatal(err)
	}
	if err := l.loading.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
	return parse(t, save(t, l.VM, false))
}

// feed makes it load sections, one by one.
func (l *loader) feed(t *testing.T, head []byte, sections []devicestate.Section) {
	t.Helper()
	if err := l.loading.Feed(testContext(t), l.stream, head, sections, func(int) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

func parse(t *testing.T, state []byte) []devicestate.Section {
	t.Helper()
	sections, err := devicestate.Parse(state)
	if err != nil {
		t.Fatal(err)
	}
	return sections
}

// saveRunning saves as an early load does, and checks that the VM stood still and runs again.
func saveRunning(t *testing.T, vm *qemu.VM) []byte {
	t.Helper()
	for try := 0; ; try++ {
		saver := newSaver(t, vm)
		looked := 0
		state, pause, err := saver.SaveRunning(testContext(t), func() error { looked++; return nil })
		if closeErr := saver.Close(testContext(t)); closeErr != nil {
			t.Error(closeErr)
		}
		if errors.Is(err, qemu.ErrTooShort) && try < 20 {
			continue
		}
		if err != nil || looked != 1 || pause <= 0 {
			t.Fatalf("saved with a pause of %v, in which was looked %d times: %v", pause, looked, err)
		}
		if runs, err := vm.Running(testContext(t)); err != nil || !runs {
			t.Fatalf("the VM runs: %t, %v", runs, err)
		}
		return state
	}
}

func save(t *testing.T, vm *qemu.VM, giveUpDisks bool) []byte {
	t.Helper()
	saver := newSaver(t, vm)
	state, err := saver.Save(testContext(t), giveUpDisks, nil)
	if err := errors.Join(err, saver.Close(testContext(t))); err != nil {
		t.Fatal(err)
	}
	return state
}

func newSaver(t *testing.T, vm *qemu.VM) *qemu.Saver {
	t.Helper()
	saver, err := vm.NewSaver(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return saver
}

// start starts a QEMU whose RAM is a file in dir. All QEMUs share that RAM, because this test is not about it.
func start(t *testing.T, dir string, args ...string) *qemu.VM {
	t.Helper()
	socket, err := os.MkdirTemp("", "migrated-test-") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(socket) })
	socket = filepath.Join(socket, "qmp")
	cmd := exec.CommandContext(t.Context(), args[0], append([]string{
		"-nodefaults", "-display", "none", "-smp", "2", "-m", "64",
		"-object", "memory-backend-file,id=ram,size=64M,share=on,mem-path=" + filepath.Join(dir, "ram"),
		"-qmp", "unix:" + socket + ",server=on,wait=off",
	}, args[1:]...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		if t.Failed() && said.Len() > 0 {
			t.Logf("QEMU: %s", said.Bytes())
		}
	})
	var vm *qemu.VM
	for ctx := testContext(t); ; time.Sleep(10 * time.Millisecond) {
		if vm, err = qemu.Attach(ctx, socket); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = vm.Close() }) // QEMU may have ended
	return vm
}

func command(t *testing.T, version string) string {
	t.Helper()
	if version == lab.InstalledQEMU {
		path, err := exec.LookPath("qemu-system-x86_64")
		if err != nil {
			testenv.CannotRun(t, "%v", err)
		}
		return path
	}
	path, err := emulator.Command(testContext(t), version)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	return path
}

// shared returns a directory in memory.
func shared(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "migrated-test-")
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func sockets(t *testing.T) (theirs, ours *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	theirs, ours = os.NewFile(uintptr(fds[0]), "theirs"), os.NewFile(uintptr(fds[1]), "ours")
	t.Cleanup(func() { theirs.Close(); ours.Close() })
	return theirs, ours
}
