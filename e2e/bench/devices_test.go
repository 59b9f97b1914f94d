// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// The daemons' logs of moves.
const (
	sourceLog = "level=INFO msg=prepared migration=bench-2 role=source\n" +
		`level=INFO msg="the early state of the devices" migration=bench-2 pause=2.5ms load=60ms` + "\n" +
		`level=INFO msg="the device state is loaded" migration=bench-1 bytes=1 stop=9s save=9s transfer=9s load=9s` + "\n" +
		`level=INFO msg="the device state is loaded" migration=bench-2 bytes=1007867 stop=36.85ms save=105.8ms ` +
		"transfer=253.4ms load=252.1ms\n" +
		`level=INFO msg="switched over" migration=bench-2 downtime=409.5ms stopped_for=400.2ms network=500µs cont=8.2ms` +
		"\n"
	destinationLog = `level=INFO msg="the VM runs" migration=bench-2 stopped_for=1s faults=39 slowest_fault=14.1ms` + "\n"
)

func TestSteps(t *testing.T) {
	a, b := &lab.Host{Name: "a"}, &lab.Host{Name: "b"}
	s := &scene{dir: t.TempDir(), at: b, moves: 2}
	for host, text := range map[*lab.Host]string{a: sourceLog, b: destinationLog} {
		if err := os.WriteFile(s.daemonLog(host), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	e, err := s.entries(a, figures{Downtime: 410 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	want := []float64{2.5, 36.85, 105.8, 253.4, 252.1, 41.85, 0.25, 8.2, 410, 1007.867, 39, 14.1}
	if len(want) != len(steps) {
		t.Fatalf("there are %d steps", len(steps))
	}
	for i, step := range steps {
		if got, err := step.of(e); err != nil || math.Abs(got-want[i]) > 1e-6 {
			t.Errorf("%s is %v, %v; want %v", step.name, got, err, want[i])
		}
	}
	s.moves = 3
	if _, err := s.entries(a, figures{}); err == nil {
		t.Error("a move that nobody logged has steps")
	}
	delete(e.switched, "downtime")
	if _, err := commitTime(e); err == nil {
		t.Error("a log that does not say when the hand-over began has a time of it")
	}
}

func TestEntry(t *testing.T) {
	e := parseEntry(`msg="a \"quoted\" word" error="x: y=z" n=7 empty= last="l"`)
	for key, want := range map[string]string{
		"msg": `a "quoted" word`, "error": "x: y=z", "n": "7", "empty": "", "last": "l",
	} {
		if e[key] != want {
			t.Errorf("%s is %q, want %q", key, e[key], want)
		}
	}
}

func TestClient(t *testing.T) {
	stopped := time.Now()
	sw := lab.Switch{Stopped: stopped, Resumed: stopped.Add(40 * time.Millisecond)}
	at := func(ms int) lab.Announcement {
		return lab.Announcement{At: stopped.Add(time.Duration(ms) * time.Millisecond)}
	}
	var f figures
	heard := []lab.Announcement{at(-5), at(55), at(99)}
	f.ofClient(lab.Pings{Sent: 9, Lost: 2, LongestGap: time.Second, Announcements: heard}, sw, benchCase{})
	if f.Pings != 9 || f.PingsLost != 2 || f.PingGap != time.Second || f.Announced != 55*time.Millisecond {
		t.Errorf("the client has seen %+v", f)
	}
	f.ofClient(lab.Pings{Sent: 9, Announcements: []lab.Announcement{at(-5)}}, sw, benchCase{})
	if f.Announced <= time.Second {
		t.Errorf("a VM that is never announced is announced after %v", f.Announced)
	}
}

// A guest whose cards are off cannot be pinged, so its report has no such measure.
func TestMeasuresOfDevices(t *testing.T) {
	for name, want := range map[string]bool{
		"devices-8": false, "devices-8-busy": true, "random-private": false, "random": true,
	} {
		r := newCaseReport(aCase(t, "loopback/"+name))
		for _, m := range []string{"pings_lost", "ping_gap", "announced"} {
			if _, has := r.By[ours][m]; has != want {
				t.Errorf("%s has %s: %t", name, m, has)
			}
		}
		if _, has := r.By[ours]["link_use"]; has {
			t.Error("the loopback has a rate")
		}
	}
	if _, has := newCaseReport(aCase(t, "2G-20ms/sweep")).By[ours]["link_use"]; !has {
		t.Error("nobody measures what the sweep uses of the link")
	}
}

func TestKindsReport(t *testing.T) {
	r := newKindsReport("7.2", networks[0], memoryKinds)
	for i, kind := range memoryKinds {
		for round := range 3 {
			d := time.Duration(i+1) * time.Duration(round+1) * time.Millisecond
			r.add(kind.name, figures{Downtime: d, FaultP50: 2 * d})
		}
	}
	r.finish()
	if r.Kinds["shared"]["downtime"].Median != 2 || r.Kinds["private"]["fault_p50"].Median != 8000 ||
		r.Ratio["private"]["downtime"] != 2 {
		t.Errorf("%+v", r)
	}
	var printed strings.Builder
	if err := r.print(&printed); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(printed.String(), "4000.00 (2000.00–6000.00)  8000.00 (4000.00–12000.00)  2.00") {
		t.Errorf("printed:\n%s", printed.String())
	}
	if _, has := r.Ratio["private"]["cpu"]; has {
		t.Error("what takes no time has a ratio")
	}
}

// The VMs that are compared differ in their balloon alone.
func TestBalloonKinds(t *testing.T) {
	for i, want := range []struct{ balloon, reporting bool }{{false, false}, {true, false}, {true, true}} {
		vm := benchCase{guest: balloonKinds[i]}.vm("kernel", "initrd")
		if vm.Balloon != want.balloon || vm.FreePageReporting != want.reporting {
			t.Errorf("%s: balloon %t, reporting %t", balloonKinds[i].name, vm.Balloon, vm.FreePageReporting)
		}
		first := benchCase{guest: balloonKinds[0]}.vm("kernel", "initrd")
		if !slices.Equal(vm.KernelArgs, first.KernelArgs) {
			t.Errorf("%s: its guest has other work", balloonKinds[i].name)
		}
	}
}

func TestSoakVerdict(t *testing.T) {
	whole := func() *soakReport { return &soakReport{Moves: 2, Checks: 1, Downtime: &spread{}, PingGap: &spread{}} }
	for name, spoil := range map[string]func(*soakReport){
		"failure": func(r *soakReport) { r.Failures = slices.Concat(r.Failures, []string{"move 1"}) },
		"memory":  func(r *soakReport) { r.MemoryCorruptions = 1 },
		"disk":    func(r *soakReport) { r.DiskCorruptions = 1 },
		"errors":  func(r *soakReport) { r.DiskErrors = 1 },
		"network": func(r *soakReport) { r.MessagesWrong = 1 },
	} {
		r := whole()
		if err := r.verdict(); err != nil {
			t.Errorf("nothing went wrong: %v", err)
		}
		if spoil(r); r.verdict() == nil {
			t.Errorf("%s: the soak is content", name)
		}
	}
	dir := t.TempDir()
	if err := whole().write(dir); err != nil { // before the first move has shown anything
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "soak.json")); err != nil {
		t.Error(err)
	}
}
