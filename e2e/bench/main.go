// SPDX-License-Identifier: Apache-2.0

// Command bench moves one and the same VM by migrated, by QEMU's own post-copy and by QEMU's own
// with postcopy-preempt, in turns, and compares what its guest felt.
//
// A case is a network and a guest, which may have disks and network cards. Each round of a case moves the VM once by
// each contender; who begins changes from round to round. All figures are taken from outside of the contenders, in the
// same way for each of them, and the same guest program measures its own stalls. Compared are the medians over the
// rounds; absolute times are those of this machine and of today.
//
// With --steps it moves the VM of each case by migrated alone, and says what the parts of the downtime took; with
// --memory it compares shared with private memory; with --soak it moves one VM there and back very often, and counts
// what goes wrong.
//
// Reading order: cases.go, scene.go (the stage and one move), figures.go (what a move has shown), report.go;
// steps.go, memory.go, libvirt.go and soak.go are the other things to run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

type options struct {
	size   string
	match  string
	rounds int
	dir    string
	qemu   string // one of lab.QEMUVersions, on both hosts

	steps   bool
	memory  bool
	figure  bool
	libvirt bool
	soak    int // moves; 0: none
	devices int // of the soak's VM, disks and network cards each
}

func main() {
	var o options
	flag.StringVar(&o.size, "size", "", "short (8 minutes), devices (disks and network cards, 10 minutes)\n"+
		"or full (an hour); by default short, with --steps devices")
	flag.StringVar(&o.match, "case", "", "only cases whose NETWORK/GUEST matches this regular `expression`, of all there are")
	flag.IntVar(&o.rounds, "rounds", 5, "how often each contender moves the VM in a case")
	flag.StringVar(&o.dir, "dir", "build/bench", "`directory` of the report and the logs")
	flag.StringVar(&o.qemu, "qemu", lab.InstalledQEMU,
		fmt.Sprintf("`version` of QEMU on both hosts: %s", strings.Join(lab.QEMUVersions, ", ")))
	flag.BoolVar(&o.steps, "steps", false, "say where the downtime goes: migrated alone, --rounds moves of each case")
	flag.BoolVar(&o.memory, "memory", false, "compare moves of private memory with those of shared memory")
	flag.BoolVar(&o.figure, "figure", false, "draw the downtime by the number of devices, with each version of QEMU")
	flag.BoolVar(&o.libvirt, "libvirt", false, "compare the downtime of a domain of libvirt's with libvirt's own post-copy")
	flag.IntVar(&o.soak, "soak", 0, "move one VM so many times, and count what goes wrong")
	flag.IntVar(&o.devices, "devices", 8, "with --soak: how many disks and network cards, each, the VM has")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1) //nolint:gocritic // nothing is left to be released
	}
}

// patience bounds a case. Nothing takes that long unless it is broken.
const patience = 20 * time.Minute

func run(ctx context.Context, o options) error {
	switch {
	case o.rounds < 1:
		return errors.New("--rounds: at least one")
	case o.soak < 0 || o.devices < 1:
		return errors.New("--soak, --devices: how many?")
	case !slices.Contains(lab.QEMUVersions, o.qemu):
		return fmt.Errorf("--qemu %s: there are %v", o.qemu, lab.QEMUVersions)
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	if o.soak > 0 {
		return soak(ctx, o)
	}
	if o.memory {
		return compareMemory(ctx, o)
	}
	if o.libvirt {
		return compareLibvirt(ctx, o)
	}
	if o.figure {
		return drawFigure(ctx, o)
	}
	if o.size == "" {
		o.size = map[bool]string{false: "short", true: "devices"}[o.steps]
	}
	chosen, err := choose(o.size, o.match)
	if err != nil {
		return err
	}
	if o.steps {
		return showSteps(ctx, o, chosen)
	}
	_, err = compareAll(ctx, o, chosen)
	return err
}

// compareAll moves the VM of each case by all contenders.
func compareAll(ctx context.Context, o options, chosen []benchCase) (*benchReport, error) {
	r := newReport(o)
	for i, c := range chosen {
		fmt.Printf("── case %d of %d: %s, %d rounds\n", i+1, len(chosen), c.name(), o.rounds)
		result, err := c.measure(ctx, o)
		if err != nil {
			return nil, fmt.Errorf("case %s: %w", c.name(), err)
		}
		r.Cases = append(r.Cases, result)
		result.print(os.Stdout)
		// After each case: an hour's figures are not to be lost with its last one.
		if err := r.write(o.dir); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// choose returns the cases of the size, or those of all sizes, and of none, that match.
func choose(size, match string) ([]benchCase, error) {
	of, ok := map[string]func(benchCase) bool{
		"short":   func(c benchCase) bool { return c.short },
		"devices": func(c benchCase) bool { return c.devices && !c.guest.named },
		"full":    func(c benchCase) bool { return !c.guest.named },
	}[size]
	if !ok {
		return nil, fmt.Errorf("--size %s: short, devices or full", size)
	}
	pattern, err := regexp.Compile(match)
	if err != nil {
		return nil, fmt.Errorf("--case: %w", err)
	}
	var chosen []benchCase
	for _, c := range cases() {
		if match == "" && of(c) || match != "" && pattern.MatchString(c.name()) {
			chosen = append(chosen, c)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("--case %s: no such case; there are %v", match, names(cases()))
	}
	return chosen, nil
}

func names(cases []benchCase) (n []string) {
	for _, c := range cases {
		n = append(n, c.name())
	}
	return n
}
