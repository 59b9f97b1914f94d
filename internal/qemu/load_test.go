// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// twoVMs starts a source and a destination that have the same RAM file: what the page engine does between two
// files is not the subject here.
func twoVMs(t *testing.T, extra ...string) (source, destination *VM, process *Process) {
	t.Helper()
	path := ramFile(t)
	_, source = start(t, append(ram(path), extra...)...)
	process, destination = start(t, append(append(ram(path), extra...), "-S", "-incoming", "defer")...)
	if err := destination.PrepareIncoming(testContext(t)); err != nil {
		t.Fatal(err)
	}
	return source, destination, process
}

// save stops a VM and returns the state of its devices as a stream.
func save(t *testing.T, vm *VM, giveUpDisks bool) []byte {
	t.Helper()
	ctx := testContext(t)
	if _, _, err := vm.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	saver, err := vm.NewSaver(ctx)
	if err != nil {
		t.Fatal(err)
	}
	state, err := saver.Save(ctx, giveUpDisks, nil)
	if err := errors.Join(err, saver.Close(ctx)); err != nil {
		t.Fatal(err)
	}
	if _, err := devicestate.Parse(state); err != nil {
		t.Fatal(err)
	}
	facts, err := vm.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return append(devicestate.Head(facts.MachineType), devicestate.Body(state)...)
}

// load has a destination load a stream.
func load(t *testing.T, vm *VM, stream []byte) error {
	t.Helper()
	in, feed := socketPair(t)
	go func() {
		_, _ = feed.Write(stream) // a QEMU that fails does not read it
		feed.Close()
	}()
	loading, err := vm.BeginLoading(testContext(t), in)
	if err != nil {
		return err
	}
	return loading.Wait(testContext(t))
}

func TestDeviceStateMoves(t *testing.T) {
	source, destination, _ := twoVMs(t)
	ctx := testContext(t)
	stopped, ran, err := source.Stop(ctx)
	if err != nil || !ran {
		t.Fatal(ran, err)
	}
	if err := source.VerifyStopped(ctx); err != nil {
		t.Error(err)
	}
	if err := load(t, destination, save(t, source, true)); err != nil {
		t.Fatal(err)
	}
	if running, err := destination.Running(ctx); err != nil || running {
		t.Errorf("the destination runs before cont: %t, %v", running, err)
	}
	resumed, err := destination.Cont(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !resumed.After(stopped) {
		t.Errorf("stopped %v, resumed %v", stopped, resumed)
	}
	if running, err := destination.Running(ctx); err != nil || !running {
		t.Errorf("after cont: running %t, %v", running, err)
	}
	if err := source.Quit(ctx); err != nil {
		t.Error(err)
	}
}

// withDisk are the arguments that give a VM a disk in a new image.
func withDisk(t *testing.T) []string {
	t.Helper()
	disk := ramFile(t) + ".disk"
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"-drive", "file=" + disk + ",format=raw,if=none,id=d", "-device", "virtio-blk,drive=d"}
}

// The source takes its VM back, disks included, as long as the destination has not run it.
func TestSourceContinuesWithItsDisks(t *testing.T) {
	source, destination, _ := twoVMs(t, withDisk(t)...)
	if err := load(t, destination, save(t, source, true)); err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	if _, err := source.Cont(ctx); err != nil { // while the destination has loaded everything
		t.Fatal(err)
	}
	if _, err := destination.Cont(ctx); err == nil {
		t.Error("the destination runs, too, on a disk that the source has locked")
	}
}

// Who has the disks is asked, because giving up twice what one has not makes QEMU abort.
func TestDisksActive(t *testing.T) {
	source, destination, _ := twoVMs(t, withDisk(t)...)
	ctx := testContext(t)
	has := func(vm *VM, want bool, when string) {
		t.Helper()
		if got, err := vm.DisksActive(ctx); err != nil || got != want {
			t.Errorf("%s: has the disks %t, %v", when, got, err)
		}
	}
	has(source, true, "running")
	has(destination, false, "waiting for the VM")
	save(t, source, false)
	has(source, true, "saved only")
	stream := save(t, source, true)
	has(source, false, "saved and given up")
	if err := destination.TakeDisksWhenLoaded(ctx); err != nil {
		t.Fatal(err)
	}
	if err := load(t, destination, stream); err != nil {
		t.Fatal(err)
	}
	has(destination, true, "loaded, to stay paused")
	save(t, destination, true) // it can be moved on
	has(destination, false, "moved on")
	if able, err := source.ActivateDisks(ctx); err != nil {
		t.Error(err)
	} else if able {
		has(source, true, "taken back")
	}
	if _, err := source.Cont(ctx); err != nil {
		t.Fatal(err)
	}
	has(source, true, "continued")
}

func TestVMWithoutDisksHasThem(t *testing.T) {
	_, vm := start(t, ram(ramFile(t))...)
	if active, err := vm.DisksActive(testContext(t)); err != nil || !active {
		t.Errorf("%t, %v", active, err)
	}
}

// TestSaveShowsWhatIsWritten: what is shown while QEMU saves is the beginning of what it has saved in the end.
func TestSaveShowsWhatIsWritten(t *testing.T) {
	_, vm := start(t, ram(ramFile(t))...)
	ctx := testContext(t)
	if _, _, err := vm.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	saveShowing := func(written func([]byte) error) ([]byte, error) {
		t.Helper()
		saver, err := vm.NewSaver(ctx)
		if err != nil {
			t.Fatal(err)
		}
		state, err := saver.Save(ctx, false, written)
		if closeErr := saver.Close(ctx); closeErr != nil {
			t.Error(closeErr)
		}
		return state, err
	}
	// It looks now and then: QEMU may have been faster.
	const tries = 1000
	try := 0
	for early := false; !early; try++ {
		if try == tries {
			t.Fatal("nothing was ever shown before the end")
		}
		var shown [][]byte
		state, err := saveShowing(func(state []byte) error {
			shown = append(shown, state)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range shown {
			if !bytes.HasPrefix(state, s) {
				t.Fatalf("the %d bytes that were shown are not the beginning of %d", len(s), len(state))
			}
			early = early || len(s) > 0
		}
		if _, err := devicestate.Parse(state); err != nil {
			t.Fatal(err)
		}
	}
	refused := errors.New("refused")
	for called := 0; called == 0; try++ {
		if try == tries {
			t.Fatal("nobody was ever asked")
		}
		_, err := saveShowing(func([]byte) error {
			called++
			return refused
		})
		if errors.Is(err, refused) != (called == 1) || called > 1 {
			t.Fatalf("it was called %d times: %v", called, err)
		}
	}
}

// Saving neither runs nor changes a VM: it can be done again, and the VM goes on.
func TestSaveTwice(t *testing.T) {
	_, vm := start(t, ram(ramFile(t))...)
	first, second := save(t, vm, true), save(t, vm, false)
	if len(first) == 0 || len(first) != len(second) {
		t.Errorf("%d bytes, then %d", len(first), len(second))
	}
	ctx := testContext(t)
	if status, err := vm.Status(ctx); err != nil || status != "paused" {
		t.Errorf("the VM is %q, %v", status, err)
	}
	if at, err := vm.Cont(ctx); err != nil || at.IsZero() {
		t.Errorf("continue: %v, %v", at, err)
	}
}

func TestDestinationKilledWhileLoading(t *testing.T) {
	source, destination, process := twoVMs(t)
	stream := save(t, source, true)
	in, feed := socketPair(t)
	loaded := make(chan error, 1)
	loading, err := destination.BeginLoading(testContext(t), in)
	if err != nil {
		t.Fatal(err)
	}
	go func() { loaded <- loading.Wait(testContext(t)) }()
	if _, err := feed.Write(stream[:len(stream)/2]); err != nil { // it waits for more
		t.Fatal(err)
	}
	if err := process.Kill(testContext(t)); err != nil {
		t.Fatal(err)
	}
	var gone *qmp.DisconnectedError
	if err := <-loaded; !errors.As(err, &gone) {
		t.Errorf("loading: %v", err)
	}
	if _, err := source.Cont(testContext(t)); err != nil {
		t.Error(err)
	}
}

// A load that nobody wants any more ends, and QEMU with it.
func TestCancelledWhileLoading(t *testing.T) {
	source, destination, process := twoVMs(t)
	stream := save(t, source, true)
	in, feed := socketPair(t)
	ctx, cancel := context.WithCancelCause(testContext(t))
	gaveUp := errors.New("gave up")
	loaded := make(chan error, 1)
	loading, err := destination.BeginLoading(ctx, in)
	if err != nil {
		t.Fatal(err)
	}
	go func() { loaded <- loading.Wait(ctx) }()
	if _, err := feed.Write(stream[:len(stream)/2]); err != nil {
		t.Fatal(err)
	}
	cancel(gaveUp)
	if err := <-loaded; !errors.Is(err, gaveUp) {
		t.Errorf("cancelled: %v", err)
	}
	select {
	case <-process.Exited():
	case <-testContext(t).Done():
		t.Error("QEMU waits for the rest")
	}
}

func TestBadStreamIsExplained(t *testing.T) {
	_, destination, process := twoVMs(t)
	err := load(t, destination, []byte("this is no migration stream"))
	if err == nil {
		t.Fatal("garbage was loaded")
	}
	var gone *qmp.DisconnectedError
	if errors.As(err, &gone) && process.ExitReason() == "" {
		t.Error("QEMU exited and nobody says why")
	}
}

func TestContBeforeTheStateIsLoaded(t *testing.T) {
	_, destination, _ := twoVMs(t)
	if at, err := destination.Cont(testContext(t)); err == nil {
		t.Errorf("an empty VM runs since %v", at)
	}
}

func TestStopOfAStoppedVM(t *testing.T) {
	_, vm := start(t, ram(ramFile(t))...)
	ctx := testContext(t)
	for _, want := range []bool{true, false} {
		before := time.Now().Truncate(time.Microsecond)
		if at, ran, err := vm.Stop(ctx); err != nil || at.Before(before) || ran != want {
			t.Errorf("stopped at %v, %v; it ran: %t; asked at %v", at, err, ran, before)
		}
	}
	for range 2 {
		if _, err := vm.Cont(ctx); err != nil {
			t.Error(err)
		}
	}
}

// A QEMU that arrived here is to be as QEMU made it when it is migrated by others.
func TestSettingsArePutBack(t *testing.T) {
	path := ramFile(t)
	second := path + ".qmp"
	_, vm := start(t, append(ram(path), "-S", "-incoming", "defer", "-qmp", "unix:"+second+",server=on,wait=off")...)
	ctx := testContext(t)
	if err := vm.SetCapabilities(ctx, map[string]bool{"auto-converge": true}); err != nil {
		t.Fatal(err)
	}
	type settings struct {
		Capabilities map[string]bool
		Rounds       uint64 `json:"announce-rounds"`
	}
	now := func() (s settings) {
		t.Helper()
		var err error
		if s.Capabilities, err = vm.capabilities(ctx); err != nil {
			t.Fatal(err)
		}
		if err := vm.QMP.Do(ctx, "query-migrate-parameters", nil, &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := now()
	other, err := Attach(ctx, second)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(other.PrepareIncoming(ctx), other.PrepareIncoming(ctx)); err != nil {
		t.Fatal(err)
	}
	during := now()
	if !during.Capabilities[capLateBlock] || during.Capabilities["auto-converge"] || during.Rounds != 1 {
		t.Errorf("prepared: %+v", during)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, now()); diff != "" || before.Rounds == during.Rounds {
		t.Errorf("settings afterwards (-before +after):\n%s", diff)
	}
}
