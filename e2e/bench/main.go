// SPDX-License-Identifier: Apache-2.0

// Command bench moves the same VM by migrated, by QEMU's own post-copy and by QEMU's with postcopy-preempt, with TLS
// and without, in turns, and compares what its guest felt.
//
// A case is a version of QEMU, a network, and a guest in a VM with disk, network card and balloon. Each round of a case
// moves the VM once by each contender, and once not at all; the first contender changes from round to round. All
// figures that are compared are taken outside of the contenders, in the same way for each of them, and the same guest
// program measures its own stalls. The medians over the rounds are compared; absolute times hold for this machine on
// this day only. The table of targets says what the engine must show, and whether it has.
//
// With --steps it moves the VM of each case by migrated alone, and says how long the parts of the downtime took; with
// --memory it compares shared with private memory; with --soak it moves one VM there and back very often, and counts
// what goes wrong.
//
// Reading order: cases.go, contenders.go, scene.go (the stage and one move), figures.go (what a move has shown; told.go
// has what a contender itself tells, path.go the wire, machine.go the use of the CPUs), report.go, targets.go. The
// other modes are in steps.go, memory.go, libvirt.go and soak.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/lab"
)

type options struct {
	size     string
	match    string
	rounds   int
	minutes  int
	dir      string
	versions []string // of lab.QEMUVersions, on both hosts
	qemu     string   // the first of them, if any

	steps   bool
	memory  bool
	figure  bool
	draw    string // file of a figure that was measured before
	libvirt bool

	monitoring bool
	soak       int // moves; 0: none
	devices    int // of the soak's VM, disks and network cards each
}

func main() {
	var o options
	flag.StringVar(&o.size, "size", "", fmt.Sprintf("%s; by default short, with --steps devices", describeSizes()))
	flag.StringVar(&o.match, "case", "",
		"only cases whose NETWORK/GUEST matches this regular `expression`, of all there are")
	flag.IntVar(&o.rounds, "rounds", 0, "how often each contender moves the VM in a case (default: as the size has it)")
	flag.IntVar(&o.minutes, "minutes", 0,
		"how long it may take, but for the round that is under way: fewer rounds, and then\n"+
			"fewer cases, where time is short (default: as the size has it)")
	flag.StringVar(&o.dir, "dir", "build/bench", "`directory` of the report and the logs")
	versions := flag.String("qemu", "", fmt.Sprintf("`versions` of QEMU on both hosts, separated by commas, of %s\n"+
		"(default: as the size has it, %s where there is none)", strings.Join(lab.QEMUVersions, ", "), lab.InstalledQEMU))
	flag.BoolVar(&o.steps, "steps", false, "say where the downtime goes: migrated alone, --rounds moves of each case")
	flag.BoolVar(&o.memory, "memory", false, "compare moves of private memory with those of shared memory")
	flag.BoolVar(&o.figure, "figure", false, "draw the downtime by the number of devices, with each version of QEMU")
	flag.StringVar(&o.draw, "draw", "",
		"draw the figure of this `file`, figure.json of another run, beside it; measure nothing")
	flag.BoolVar(&o.libvirt, "libvirt", false,
		"compare the downtime of a domain of libvirt's with libvirt's own post-copy")
	flag.BoolVar(&o.monitoring, "monitoring", false,
		"compare moves that are scraped, or on a page that is open, with moves that nobody watches")
	flag.IntVar(&o.soak, "soak", 0, "move one VM so many times, and count what goes wrong")
	flag.IntVar(&o.devices, "devices", 8, "with --soak: how many disks and network cards, each, the VM has")
	flag.Parse()
	if *versions != "" {
		o.versions = strings.Split(*versions, ",")
	}
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
	o, err := o.complete()
	if err != nil {
		return err
	}
	if o.draw != "" {
		return drawFigure(o.draw)
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
	if o.monitoring {
		return compareMonitoring(ctx, o)
	}
	if o.libvirt {
		return compareLibvirt(ctx, o)
	}
	if o.figure {
		return measureFigure(ctx, o)
	}
	chosen, err := choose(o)
	if err != nil {
		return err
	}
	if o.steps {
		return showSteps(ctx, o, chosen)
	}
	_, err = compareAll(ctx, o, chosen)
	return err
}

// complete fills in the defaults of the size, and refuses options that make no sense.
func (o options) complete() (options, error) {
	if o.size == "" {
		o.size = map[bool]string{false: "short", true: "devices"}[o.steps]
	}
	size, ok := sizes[o.size]
	if !ok {
		return o, fmt.Errorf("--size %s: there are %s", o.size, describeSizes())
	}
	const other = 5 // rounds of modes that have no size
	alone := o.steps || o.memory || o.figure || o.libvirt || o.monitoring || o.soak > 0
	if o.rounds == 0 {
		o.rounds = map[bool]int{false: size.rounds, true: other}[alone]
	}
	if o.minutes == 0 {
		o.minutes = size.minutes
	}
	if o.versions == nil {
		o.versions = map[bool][]string{false: size.versions, true: {lab.InstalledQEMU}}[alone]
	}
	for _, version := range o.versions {
		if !slices.Contains(lab.QEMUVersions, version) {
			return o, fmt.Errorf("--qemu %s: there are %v", version, lab.QEMUVersions)
		}
	}
	switch o.qemu = o.versions[0]; {
	case o.rounds < 1 || o.minutes < 1:
		return o, errors.New("--rounds, --minutes: at least one")
	case o.soak < 0 || o.devices < 1:
		return o, errors.New("--soak, --devices: how many?")
	case alone && len(o.versions) > 1:
		return o, errors.New("--qemu: one version, unless contenders are compared")
	}
	return o, nil
}

// A size is what a run measures by default.
type size struct {
	what     string
	rounds   int
	minutes  int
	versions []string
	of       func(benchCase) bool
	micro    bool // also e2e/floor
	balloon  bool // also VMs with and without a balloon
}

var sizes = map[string]size{
	"look": {
		what: "one round of one case", rounds: 1, minutes: 5, versions: []string{lab.InstalledQEMU},
		of: func(c benchCase) bool { return c.look }, micro: true,
	},
	"short": {
		what: "what tells most", rounds: 3, minutes: 25, versions: []string{lab.InstalledQEMU, emulator.V10},
		of: func(c benchCase) bool { return c.short }, micro: true,
	},
	"devices": {
		what: "disks and network cards, without TLS", rounds: 5, minutes: 20, versions: []string{lab.InstalledQEMU},
		of: func(c benchCase) bool { return c.devices && !c.guest.named },
	},
	"full": {
		what: "all", rounds: 3, minutes: 150, versions: lab.QEMUVersions,
		of: func(c benchCase) bool { return c.full }, micro: true, balloon: true,
	},
}

func describeSizes() string {
	var texts []string
	for _, name := range slices.Sorted(maps.Keys(sizes)) {
		texts = append(texts, fmt.Sprintf("%s (%s, at most %d minutes)", name, sizes[name].what, sizes[name].minutes))
	}
	return strings.Join(texts, ", ")
}

// Names of parts of a run that are no cases; --case matches them, too.
const (
	microPart   = "microbench"
	balloonPart = "balloon"
)

// A part is something to measure that takes its share of the time.
type part struct {
	name    string
	measure func(ctx context.Context, until time.Time) error
}

// compareAll moves the VM of each case by all contenders, and measures what else the size has. A part that fails is
// recorded, and the others go on.
func compareAll(ctx context.Context, o options, chosen []benchCase) (*benchReport, error) {
	r := newReport(o)
	var parts []part
	if o.wants(microPart, sizes[o.size].micro) {
		parts = append(parts, part{microPart, func(ctx context.Context, _ time.Time) (err error) {
			r.Micro, err = measureMicro(ctx, o)
			return err
		}})
	}
	for _, c := range chosen {
		parts = append(parts, part{c.String(), func(ctx context.Context, until time.Time) error {
			result, err := c.measure(ctx, o, until)
			if err != nil {
				return err
			}
			r.Cases = append(r.Cases, result)
			return result.print(os.Stdout)
		}})
	}
	if o.wants(balloonPart, sizes[o.size].balloon) {
		parts = append(parts, part{balloonPart, func(ctx context.Context, until time.Time) (err error) {
			r.Balloon, err = compareBalloons(ctx, o, until)
			return err
		}})
	}
	err := r.measure(ctx, o, parts)
	return r, errors.Join(err, printTargets(os.Stdout, r.Targets))
}

// measure measures the parts, each in its share of the time that is left.
func (r *benchReport) measure(ctx context.Context, o options, parts []part) (err error) {
	end := time.Now().Add(time.Duration(o.minutes) * time.Minute)
	for i, p := range parts {
		now := time.Now()
		if now.After(end) {
			r.Skipped = append(r.Skipped, p.name)
			continue
		}
		fmt.Printf("── %d of %d, %v left: %s\n", i+1, len(parts), end.Sub(now).Round(time.Second), p.name)
		if failed := p.measure(ctx, now.Add(share(end.Sub(now), len(parts)-i))); failed != nil {
			failed = fmt.Errorf("%s: %w", p.name, failed)
			fmt.Println("  ", failed)
			r.Failed = append(r.Failed, failed.Error())
			err = errors.Join(err, failed)
		}
		// After each part, so that a failure of the last one does not lose an hour's figures.
		if writeErr := r.write(o.dir); writeErr != nil {
			return writeErr
		}
		if ctx.Err() != nil {
			return err
		}
	}
	if len(r.Skipped) > 0 {
		fmt.Println("no time for", r.Skipped)
	}
	return errors.Join(err, r.write(o.dir))
}

// share returns how much of the time that is left one of so many parts may take.
func share(left time.Duration, parts int) time.Duration { return left / time.Duration(parts) }

// wants reports whether a part that is no case is to be measured.
func (o options) wants(name string, bySize bool) bool {
	if o.match == "" {
		return bySize && !o.figure
	}
	matches, err := regexp.MatchString(o.match, name)
	return err == nil && matches // choose has refused any other
}

// choose returns the cases of the size. With --case it returns all matching cases, also those of other sizes and of
// none.
func choose(o options) ([]benchCase, error) {
	pattern, err := regexp.Compile(o.match)
	if err != nil {
		return nil, fmt.Errorf("--case: %w", err)
	}
	var chosen []benchCase
	for _, c := range cases(o.versions) {
		if o.match == "" && sizes[o.size].of(c) || o.match != "" && pattern.MatchString(c.name()) {
			chosen = append(chosen, c)
		}
	}
	if len(chosen) == 0 && !o.wants(microPart, false) && !o.wants(balloonPart, false) {
		return nil, fmt.Errorf("--case %s: no such case; there are %v, %s and %s",
			o.match, names(cases(o.versions[:1])), microPart, balloonPart)
	}
	return chosen, nil
}

func names(cases []benchCase) (n []string) {
	for _, c := range cases {
		n = append(n, c.name())
	}
	return n
}
