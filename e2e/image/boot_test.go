// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
	"github.com/migrated-vm/migrated/e2e/metal"
)

const qemu = "qemu-system-x86_64"

// require skips the test if something is missing on this host, or fails it where nothing may be missing.
func require(t *testing.T, err error) {
	t.Helper()
	switch {
	case err == nil:
	case os.Getenv("CI") == "true":
		t.Fatal(err)
	default:
		t.Skip(err)
	}
}

// start runs QEMU until the test ends.
func start(t *testing.T, args ...string) (exited <-chan struct{}) {
	t.Helper()
	_, err := exec.LookPath(qemu)
	require(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, qemu, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait() // it is killed
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		if t.Failed() {
			t.Logf("QEMU: %s", stderr.Bytes())
		}
	})
	return done
}

// ramFile returns a name on tmpfs, for a memory backend.
func ramFile(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "migrated-image-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "ram")
}

// commonArgs returns the arguments for a q35 with RAM in the file and no other devices.
func commonArgs(ram, size string) []string {
	return []string{
		"-M", "q35,memory-backend=ram0", "-m", size,
		"-object", "memory-backend-file,id=ram0,share=on,size=" + size + ",mem-path=" + ram,
		"-nodefaults", "-display", "none", "-no-reboot",
	}
}

func TestLinuxBoots(t *testing.T) {
	_, err := exec.LookPath("apt-get")
	require(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	kernel, initrd, err := Linux(ctx)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "serial")
	ram := ramFile(t)
	exited := start(t, append(commonArgs(ram, "256M"),
		"-accel", "tcg,thread=multi", "-smp", "2",
		"-kernel", kernel, "-initrd", initrd,
		"-append", CommandLine+" migrated.mem=64 migrated.ws=16 migrated.window=50ms",
		"-serial", "null", "-serial", "unix:"+socket+",server=on,wait=on")...)

	var log report.Log
	port, err := report.Open(ctx, socket, &log)
	if err != nil {
		t.Fatal(err)
	}
	defer port.Close()
	ready, err := log.WaitReady(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if ready.Pages != 64<<20/4096 || ready.Working != 16<<20/4096 {
		t.Errorf("ready: %+v", ready)
	}
	if _, _, err := log.Wait(
		ctx, 0, func(l report.Line) bool { return l.Window != nil && l.Window.TotalWrites > 1000 },
	); err != nil {
		t.Fatal(err)
	}
	v, err := port.Verify(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if v.Pages != ready.Pages || v.Found != 0 {
		t.Errorf("verified: %+v", v)
	}
	off, err := port.SetLoad(ctx, false)
	if err != nil {
		t.Fatal(err)
	}
	from := log.Len()
	w, _, err := log.Wait(ctx, from, func(l report.Line) bool { return l.Window != nil })
	if err != nil {
		t.Fatal(err)
	}
	if w.Window.TotalOps != off.TotalOps {
		t.Errorf("%d visits after the load was switched off", w.Window.TotalOps-off.TotalOps)
	}
	if _, err := port.SetLoad(ctx, true); err != nil {
		t.Fatal(err)
	}
	if _, _, err := log.Wait(
		ctx, from, func(l report.Line) bool { return l.Window != nil && l.Window.Ops > 0 },
	); err != nil {
		t.Fatal(err)
	}
	if err := log.Err(); err != nil {
		t.Error(err)
	}
	// A page outside the working set gets lost. The guest reports it only when it verifies.
	lost := ready.Pages - 1
	if err := losePage(ram, lost); err != nil {
		t.Fatal(err)
	}
	if v, err = port.Verify(ctx); err != nil {
		t.Fatal(err)
	}
	if v.Found != 1 || v.Corruptions != 1 {
		t.Errorf("verified with a lost page: %+v", v)
	}
	c, _, err := log.Wait(ctx, from, func(l report.Line) bool { return l.Corruption != nil })
	if err != nil {
		t.Fatal(err)
	}
	if c.Corruption.Page != lost || c.Corruption.Kind != stamp.Lost {
		t.Errorf("corruption: %+v", c.Corruption)
	}
	if err := log.Err(); !errors.Is(err, report.ErrDamaged) {
		t.Errorf("Log.Err = %v", err)
	}
	if g := log.Garbled(); len(g) > 0 {
		t.Errorf("garbled lines: %q", g)
	}
	if err := port.PowerOff(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-exited:
	case <-ctx.Done():
		t.Error("the guest did not power off")
	}
}

// losePage zeroes the stamped page with that index in a guest's RAM file, wherever the guest's kernel has put it.
func losePage(ram string, index uint32) error {
	f, err := os.OpenFile(ram, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var want stamp.Page
	want.Write(stamp.Random, index, 1)
	head := binary.LittleEndian.AppendUint64(nil, want[0])
	b := make([]byte, stamp.PageSize)
	for at := int64(0); ; at += stamp.PageSize {
		if _, err := f.ReadAt(b, at); err != nil {
			return fmt.Errorf("page %d is not in guest RAM: %w", index, err)
		}
		if bytes.HasPrefix(b, head) {
			_, err := f.WriteAt(make([]byte, stamp.PageSize), at)
			return err
		}
	}
}

// The bare-metal guest counts, and its memory verifies, unless the test damages it.
func TestMetalCounts(t *testing.T) {
	for _, accel := range []string{"tcg", "kvm"} {
		t.Run(accel, func(t *testing.T) {
			if accel == "kvm" {
				if _, err := os.Stat("/dev/kvm"); err != nil {
					t.Skipf("no KVM on this machine: %v", err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			disk, err := Metal(ctx, 64)
			if err != nil {
				t.Fatal(err)
			}
			ram, serial := ramFile(t), filepath.Join(t.TempDir(), "serial")
			start := func(t *testing.T) {
				start(t, append(commonArgs(ram, "64M"), "-accel", accel,
					"-drive", "if=none,id=boot,format=raw,snapshot=on,file="+disk, "-device", "ide-hd,drive=boot,bus=ide.0",
					"-serial", "file:"+serial)...)
			}
			var pass uint32
			t.Run("run", func(t *testing.T) { // the end of the subtest kills QEMU, wherever the guest is
				start(t)
				pass = waitPass(ctx, t, serial, 3)
			})
			if t.Failed() || pass == 0 {
				return
			}
			r, err := metal.Verify(ram)
			if err != nil {
				t.Fatal(err)
			}
			if r.Pass < pass || r.Pages != (64-2-24)<<20/4096 {
				t.Errorf("after pass %d: %+v", pass, r)
			}
			// A page as a migration might have lost it.
			f, err := os.OpenFile(ram, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(make([]byte, 4096), 20<<20); err != nil {
				t.Fatal(err)
			}
			var pe *metal.PageError
			if _, err := metal.Verify(ram); !errors.As(err, &pe) || pe.Address != 20<<20 {
				t.Errorf("Verify with a lost page = %v", err)
			}
		})
	}
}

// waitPass follows the guest's serial log until it has done pass n.
func waitPass(ctx context.Context, t *testing.T, path string, n uint32) uint32 {
	t.Helper()
	var f *os.File
	for {
		var err error
		if f, err = os.Open(path); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("QEMU made no serial log: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
	defer f.Close()
	var pass uint32
	_, err := report.WaitLine(bufio.NewReader(report.Tail(ctx, f)), func(line string) bool {
		var err error
		if pass, err = metal.Pass(line); err != nil {
			t.Error(err)
		}
		return pass >= n
	})
	if err != nil {
		t.Fatal(err)
	}
	return pass
}
