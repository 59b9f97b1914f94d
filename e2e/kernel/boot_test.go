// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// hello reports whether a line is the first line of testdata/init.c.
func hello(line string) bool { return strings.HasPrefix(line, "hello from ") }

// stock returns the options that boot the stock kernel into testdata/init.c.
func stock(t *testing.T, end string) Options {
	t.Helper()
	needQEMU(t)
	tree := built(t, Linux612, Stock)
	return Options{Kernel: tree.BzImage, Initrd: initOnly(t), CommandLine: "quiet -- " + end}
}

// checkGone fails the test if a process still has the initramfs, which is the test's own, on its command line.
func checkGone(t *testing.T, o Options) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d processes, %v", len(files), err)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file) // empty if the process has just ended
		if bytes.Contains(text, []byte(o.Initrd)) {
			t.Errorf("QEMU is still there: %s", file)
		}
	}
}

// Every variant boots and names itself in its release.
func TestBoots(t *testing.T) {
	needQEMU(t)
	eachVersion(t, func(t *testing.T, version Version) {
		for _, v := range []Variant{Stock, Patched, Debug} {
			t.Run(string(v), func(t *testing.T) {
				if v == Debug {
					needDebug(t, version)
				}
				boots(t, version, v, built(t, version, v))
			})
		}
	})
}

// boots boots a kernel into testdata/init.c and waits for its end.
func boots(t *testing.T, version Version, v Variant, tree Tree) {
	t.Helper()
	var log bytes.Buffer
	var hellos []string
	o := Options{Kernel: tree.BzImage, Initrd: initOnly(t), CommandLine: "-- off", Args: v.args(), Log: &log}
	err := Boot(testContext(t), o, func(line string) error {
		if hello(line) {
			hellos = append(hellos, line)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, log.Bytes())
	}
	if len(hellos) != 1 || !strings.HasPrefix(hellos[0], "hello from "+string(version)+".") ||
		!strings.HasSuffix(hellos[0], "-"+string(v)) {
		t.Errorf("it says %q\n%s", hellos, log.Bytes())
	}
	checkGone(t, o)
}

func TestCrashIsAnError(t *testing.T) {
	o := stock(t, "crash")
	seen := false
	err := Boot(testContext(t), o, func(line string) error {
		seen = seen || hello(line)
		return nil
	})
	if !seen {
		t.Error("the guest did not come so far as to crash")
	}
	if !errors.Is(err, ErrSplat) || !strings.Contains(err.Error(), "sysrq triggered crash") {
		t.Errorf("Boot = %v", err)
	}
	checkGone(t, o)
}

func TestTripleFaultIsAnError(t *testing.T) {
	o := stock(t, "reset")
	o.CommandLine = "reboot=triple " + o.CommandLine
	seen := false
	err := Boot(testContext(t), o, func(line string) error {
		seen = seen || hello(line)
		return nil
	})
	if !seen || !errors.Is(err, ErrTripleFault) {
		t.Errorf("Boot = %v, hello: %v", err, seen)
	}
	checkGone(t, o)
}

func TestContextEndsQEMU(t *testing.T) {
	o := stock(t, "hang")
	ctx, cancel := context.WithCancelCause(testContext(t))
	defer cancel(nil)
	seen := false
	err := Boot(ctx, o, func(line string) error {
		if hello(line) {
			seen = true
			cancel(nil)
		}
		return nil
	})
	if !seen || !errors.Is(err, context.Canceled) || errors.Is(err, ErrSplat) {
		t.Errorf("Boot = %v, hello: %v", err, seen)
	}
	checkGone(t, o)
}

func TestLineEndsQEMU(t *testing.T) {
	o := stock(t, "hang")
	enough := errors.New("enough")
	err := Boot(testContext(t), o, func(line string) error {
		if hello(line) {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Errorf("Boot = %v", err)
	}
	checkGone(t, o)
}

func TestQEMUsReasonIsInTheError(t *testing.T) {
	needQEMU(t)
	o := Options{Kernel: filepath.Join(t.TempDir(), "no-such-kernel")}
	err := Boot(testContext(t), o, func(string) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "could not open kernel file") {
		t.Errorf("Boot = %v", err)
	}
}

// A kernel that complains and goes on forever is ended. The error has the complaint, whichever tool made it.
func TestComplaintEndsTheGuest(t *testing.T) {
	complaints := []string{
		"[    1.000000] BUG: sleeping function called from invalid context at mm/x.c:1",
		"[    1.000000] WARNING: possible circular locking dependency detected",
		"[    1.000000] BUG: KASAN: slab-use-after-free in x+0x1/0x2",
		"[    1.000000] Oops: general protection fault, 0000 [#1] SMP",
		"[    1.000000] Kernel panic - not syncing: x",
		"[  242.000000] INFO: task x:1 blocked for more than 120 seconds.",
		"LOG unreferenced object 0xffff888003d9a000 (size 1024):",
		"[    1.000000] kmemleak: 2 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
		"RESULT x [    1.000000] ODEBUG: free active (active state 0)",
	}
	for _, complaint := range complaints {
		console := "before\r\n" + complaint + "\r\nCall Trace:\r\n"
		killed := false
		got, lineErr := read(strings.NewReader(console), nil, func(string) error { return nil }, func() { killed = true })
		if lineErr != nil || !errors.Is(got, ErrSplat) || !strings.HasSuffix(got.Error(), complaint+"\nCall Trace:") {
			t.Errorf("%s\nread = %v, %v", complaint, got, lineErr)
		}
		if killed {
			t.Errorf("%s\nQEMU is ended though it had ended", complaint)
		}
	}
}

// What kernels print when all is well is no complaint.
func TestNoComplaint(t *testing.T) {
	for _, line := range []string{
		"[    0.000000] Linux version 6.12.117-debug (migrated@migrated) (gcc (Debian 12.2.0-14+deb12u1) 12.2.0) #1 SMP",
		"[    0.010000] kasan: KernelAddressSanitizer initialized (generic)",
		"[    0.020000] Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar",
		"[    0.100000] kmemleak: Kernel memory leak detector initialized (mem pool available: 15000)",
		"[    1.000000] FAULT_INJECTION: forcing a failure.",
		"[    1.100000] audit: type=1400 audit(1.1:2): avc:  denied  { use } for  pid=1",
		"[   30.000000] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
		"RESULT debug-kernel ok",
	} {
		var s splatLog
		s.add(line)
		if err := s.err(); err != nil {
			t.Errorf("%q: %v", line, err)
		}
	}
}
