// SPDX-License-Identifier: Apache-2.0

// Command demo migrates a real VM with a busy guest between two daemons, each in a network namespace of its own, and
// shows it. With --compare it then moves the same VM back by QEMU's own post-copy, and goes on so, there by migrated
// and back by QEMU, and prints the medians of both.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// workAfter is how long the guest works after the switch before its verdict.
const workAfter = 6 * time.Second

// pingEvery is how often the VM's network card is pinged.
const pingEvery = 10 * time.Millisecond

// timeout bounds the whole demo.
const timeout = 10 * time.Minute

type options struct {
	compare bool
	libvirt bool
	rounds  int
	memory  int
	dir     string
}

func main() {
	var o options
	flag.BoolVar(&o.compare, "compare", false, "move the same VM by QEMU's own post-copy, too")
	flag.BoolVar(&o.libvirt, "libvirt", false, "the VM is a domain of libvirt's, on both hosts")
	flag.IntVar(&o.rounds, "rounds", 5, "with --compare: how often each moves the VM")
	flag.IntVar(&o.memory, "memory", 1024, "memory of the VM in `MiB`, at least 1024")
	flag.StringVar(&o.dir, "dir", "build/demo", "`directory` of the report and the logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1) //nolint:gocritic // nothing is left to be released
	}
}

func run(ctx context.Context, o options) error {
	if o.memory < 1024 {
		return fmt.Errorf("--memory %d: the demo's VM has at least 1024 MiB", o.memory)
	}
	if o.libvirt && o.compare {
		return errors.New("--libvirt, --compare: give one of them; make downtime LIBVIRT=1 compares with virsh migrate")
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	say("Getting the guest: Debian's cloud kernel and a program that checks its own memory")
	kernel, initrd, err := image.LinuxWithVirtio(ctx)
	if err != nil {
		return err
	}
	vm := lab.RealVM(kernel, initrd, o.memory, 1, 1,
		fmt.Sprintf("migrated.mem=%d", o.memory*7/10), fmt.Sprintf("migrated.ws=%d", o.memory/4),
		"migrated.workers=2", "migrated.rate=2000", "migrated.write=50", "migrated.window=200ms")
	r, err := show(ctx, o, vm)
	if err != nil {
		return err
	}
	path := filepath.Join(o.dir, "report.json")
	if err := r.write(path); err != nil {
		return err
	}
	r.print(os.Stdout, path)
	return r.verdict()
}

// show sets the stage and moves the VM.
func show(ctx context.Context, o options, vm lab.VMConfig) (_ *demoReport, err error) {
	l, err := lab.New(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	as := plain
	if o.libvirt {
		as = domain
	}
	for _, h := range l.Hosts() {
		say("Starting the daemon of host %s on %s", h.Name, h.DaemonAddr())
		log, err := os.Create(filepath.Join(o.dir, "migrated-"+h.Name+".log"))
		if err != nil {
			return nil, err
		}
		defer log.Close() // the daemon has its own
		args, err := as.stage(ctx, h, log)
		if err != nil {
			return nil, fmt.Errorf("%w; see %s", err, log.Name())
		}
		if _, err := h.StartDaemon(ctx, log, args...); err != nil {
			return nil, fmt.Errorf("%w; see %s", err, log.Name())
		}
	}
	var guest report.Log
	if err := as.begin(ctx, l.A, vm, &guest); err != nil {
		return nil, err
	}
	r, err := as.migrate(ctx, l, "demo", vm, &guest)
	if err != nil || !o.compare {
		return r, err
	}
	return r, compare(ctx, o, l, vm, &guest, r)
}

// migrate moves the VM from host a to host b by migrated, pings it meanwhile and lets the guest check itself there.
func (f form) migrate(
	ctx context.Context, l *lab.Lab, id string, vm lab.VMConfig, guest *report.Log,
) (*demoReport, error) {
	pinger, err := l.Ping(vm, 0, pingEvery)
	if err != nil {
		return nil, err
	}
	r, switched, err := f.move(ctx, l, id, guest)
	pings, stopErr := pinger.Stop()
	if err := errors.Join(err, stopErr); err != nil {
		return nil, err
	}
	r.client = newClient(pings, switched)
	return r, nil
}

// move moves the VM and returns when it was switched over.
func (f form) move(ctx context.Context, l *lab.Lab, id string, guest *report.Log) (*demoReport, lab.Switch, error) {
	watch, err := l.WatchSwitchAt(ctx, l.A, l.B, f.events)
	if err != nil {
		return nil, lab.Switch{}, err
	}
	say("Migrating: migrated migrate --id %s --vm %s --to %s", id, f.vm, l.B.DaemonAddr())
	switched, err := watch.During(ctx, func() error { return f.run(ctx, l, id) }, nil)
	if err != nil {
		return nil, lab.Switch{}, err
	}
	m, err := status(ctx, l.A, id)
	if err != nil {
		return nil, lab.Switch{}, err
	}
	if err := errors.Join(f.show(ctx, l.A), f.show(ctx, l.B)); err != nil {
		return nil, lab.Switch{}, err
	}
	verdict, err := watchGuest(ctx, l.B, guest)
	if err != nil {
		return nil, lab.Switch{}, err
	}
	return newReport(m, switched.Downtime(), verdict), switched, nil
}

// begin starts the VM and waits until its guest is at work.
func (f form) begin(ctx context.Context, h *lab.Host, vm lab.VMConfig, guest *report.Log) (err error) {
	say("Booting a VM of %d MiB on host %s; its guest stamps its memory, then reads and writes it and its disk",
		vm.MemoryMiB, h.Name)
	port, err := f.boot(ctx, h, vm, guest)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, port.Close()) }()
	ready, err := guest.WaitReady(ctx)
	if err != nil {
		return err
	}
	say("The guest is at work: %d pages stamped, %d of them in its working set", ready.Pages, ready.Working)
	// Some work first, so that the migration meets a busy guest.
	_, _, err = guest.Wait(ctx, guest.Len(), func(l report.Line) bool { return l.Window != nil && l.Window.Seq >= 5 })
	return err
}

// run runs the operator's command, with its progress bar visible.
func (f form) run(ctx context.Context, l *lab.Lab, id string) error {
	binary, err := lab.Binary()
	if err != nil {
		return err
	}
	cmd := l.A.Command(ctx, binary, "migrate", "--id", id, "--vm", f.vm, "--to", l.B.DaemonAddr())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("the migration failed, exit code %d", exit.ExitCode())
	}
	return err
}

func status(ctx context.Context, h *lab.Host, id string) (*migratedv1.Migration, error) {
	out, err := h.Migrated(ctx, "status", id, "--json")
	if err != nil {
		return nil, err
	}
	var m migratedv1.Migration
	if err := protojson.Unmarshal([]byte(out), &m); err != nil {
		return nil, fmt.Errorf("answer of migrated status: %w", err)
	}
	return &m, nil
}

// A verdict is what the guest says of its own memory and of its disk after the switch.
type verdict struct {
	opsAfter    uint64
	workedFor   time.Duration
	corruptions uint64
	blocks      uint64 // of the disk, that were checked
	badBlocks   uint64 // that were damaged, or could not be read or written
	err         error
}

// watchGuest lets the guest work on the destination, then makes it check every page.
func watchGuest(ctx context.Context, h *lab.Host, guest *report.Log) (*verdict, error) {
	say("The guest works on host %s", h.Name)
	before := guest.Last()
	port, err := h.Guest(ctx, guest)
	if err != nil {
		return nil, err
	}
	from := guest.Len()
	line, _, err := guest.Wait(ctx, from, func(l report.Line) bool {
		return l.Window != nil && time.Duration(l.Window.UptimeMS-before.UptimeMS)*time.Millisecond >= workAfter
	})
	if err != nil {
		return nil, errors.Join(err, port.Close())
	}
	say("The guest checks every page, and every block of its disk")
	verified, err := port.Verify(ctx)
	if err != nil {
		return nil, errors.Join(err, port.Close())
	}
	var badBlocks uint64
	for _, d := range verified.Disks {
		badBlocks += d.Corruptions + d.Errors
	}
	return &verdict{
		opsAfter:    line.Window.TotalOps - before.TotalOps,
		workedFor:   time.Duration(line.Window.UptimeMS-before.UptimeMS) * time.Millisecond,
		corruptions: verified.Corruptions, blocks: verified.Blocks, badBlocks: badBlocks, err: guest.Err(),
	}, port.Close()
}

func say(format string, args ...any) { fmt.Printf("── "+format+"\n", args...) }
