// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/internal/qmp"
)

func TestDeviceStateMoves(t *testing.T) {
	source, destination, _ := twoVMs(t)
	ctx := qemutest.Context(t)
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

// TestSourceContinuesWithItsDisks checks that the source can continue its VM, disks included, until the destination
// runs it.
func TestSourceContinuesWithItsDisks(t *testing.T) {
	source, destination, _ := twoVMs(t, withDisk(t)...)
	if err := load(t, destination, save(t, source, true)); err != nil {
		t.Fatal(err)
	}
	ctx := qemutest.Context(t)
	if _, err := source.Cont(ctx); err != nil { // the destination has loaded everything
		t.Fatal(err)
	}
	if _, err := destination.Cont(ctx); err == nil {
		t.Error("the destination runs, too, on a disk that the source has locked")
	}
}

// TestDisksActive checks DisksActive in each state. A wrong answer is dangerous: QEMU aborts when it is to give up
// disks that it does not hold.
func TestDisksActive(t *testing.T) {
	source, destination, _ := twoVMs(t, withDisk(t)...)
	ctx := qemutest.Context(t)
	has := func(vm *qemu.VM, want bool, when string) {
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
	if err := source.CheckDisksGivenUp(ctx); err != nil {
		t.Error(err)
	}
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
	_, vm := qemutest.Start(t, qemutest.RAM(qemutest.RAMFile(t))...)
	if active, err := vm.DisksActive(qemutest.Context(t)); err != nil || !active {
		t.Errorf("%t, %v", active, err)
	}
}

// TestSaveShowsWhatIsWritten checks that each part shown during a save is a prefix of the final state.
func TestSaveShowsWhatIsWritten(t *testing.T) {
	_, vm := qemutest.Start(t, qemutest.RAM(qemutest.RAMFile(t))...)
	ctx := qemutest.Context(t)
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
	// Save looks at intervals, so QEMU may finish before the first look.
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

// TestSaveTwice checks that a save neither runs nor changes a VM: it can be repeated, and the VM can continue.
func TestSaveTwice(t *testing.T) {
	_, vm := qemutest.Start(t, qemutest.RAM(qemutest.RAMFile(t))...)
	first, second := save(t, vm, true), save(t, vm, false)
	if len(first) == 0 || len(first) != len(second) {
		t.Errorf("%d bytes, then %d", len(first), len(second))
	}
	ctx := qemutest.Context(t)
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
	loading, err := destination.BeginLoading(qemutest.Context(t), in)
	if err != nil {
		t.Fatal(err)
	}
	go func() { loaded <- loading.Wait(qemutest.Context(t)) }()
	if _, err := feed.Write(stream[:len(stream)/2]); err != nil { // QEMU waits for more
		t.Fatal(err)
	}
	if err := process.Kill(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	var gone *qmp.DisconnectedError
	if err := <-loaded; !errors.As(err, &gone) {
		t.Errorf("loading: %v", err)
	}
	if _, err := source.Cont(qemutest.Context(t)); err != nil {
		t.Error(err)
	}
}

// TestCancelledWhileLoading checks that the load, and QEMU with it, ends when the caller cancels it.
func TestCancelledWhileLoading(t *testing.T) {
	source, destination, process := twoVMs(t)
	stream := save(t, source, true)
	in, feed := socketPair(t)
	ctx, cancel := context.WithCancelCause(qemutest.Context(t))
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
	case <-qemutest.Context(t).Done():
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
	if at, err := destination.Cont(qemutest.Context(t)); err == nil {
		t.Errorf("an empty VM runs since %v", at)
	}
}

func TestStopOfAStoppedVM(t *testing.T) {
	_, vm := qemutest.Start(t, qemutest.RAM(qemutest.RAMFile(t))...)
	ctx := qemutest.Context(t)
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

// TestSettingsArePutBack checks that Close restores QEMU's settings for migrations by other programs.
func TestSettingsArePutBack(t *testing.T) {
	path := qemutest.RAMFile(t)
	second := path + ".qmp"
	_, vm := qemutest.Start(t,
		append(qemutest.RAM(path), "-S", "-incoming", "defer", "-qmp", "unix:"+second+",server=on,wait=off")...)
	ctx := qemutest.Context(t)
	if err := vm.SetCapabilities(ctx, map[string]bool{"auto-converge": true}); err != nil {
		t.Fatal(err)
	}
	type settings struct {
		Capabilities map[string]bool
		Rounds       uint64 `json:"announce-rounds"`
	}
	now := func() (s settings) {
		t.Helper()
		var list []struct {
			Name string `json:"capability"`
			On   bool   `json:"state"`
		}
		if err := vm.QMP.Do(ctx, "query-migrate-capabilities", nil, &list); err != nil {
			t.Fatal(err)
		}
		s.Capabilities = map[string]bool{}
		for _, c := range list {
			s.Capabilities[c.Name] = c.On
		}
		if err := vm.QMP.Do(ctx, "query-migrate-parameters", nil, &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := now()
	other, err := qemu.Attach(ctx, second)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(other.PrepareIncoming(ctx), other.PrepareIncoming(ctx)); err != nil {
		t.Fatal(err)
	}
	during := now()
	if !during.Capabilities["late-block-activate"] || during.Capabilities["auto-converge"] || during.Rounds != 1 {
		t.Errorf("prepared: %+v", during)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, now()); diff != "" || before.Rounds == during.Rounds {
		t.Errorf("settings afterwards (-before +after):\n%s", diff)
	}
}
