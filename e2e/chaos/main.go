// SPDX-License-Identifier: Apache-2.0

// Command chaos breaks migrations, one after the other, in every way that it knows and at every point of the state
// machines. After each it looks for the VM: the VM must run on exactly one host, with every page of its memory as it
// was, at once or after the command that migrated prints. Two copies must never run, however briefly.
//
// Case number i of a seed follows from these two numbers alone, so that each case can be repeated. The VM is not booted
// for each case: it goes on from where the last case left it. There are two VMs, with disks and network cards. One has
// RAM of QEMU's own and the other RAM in a file; each case says which it uses. With --libvirt they are domains, and
// virsh must show the truth on both hosts.
//
// Reading order: cases.go (what is broken, and when), points.go (the points, and how a daemon dies there), play.go (one
// case), journey.go (what becomes of a migration, and the verdict), orphan.go (a VM that is lost with its source QEMU),
// machine.go (a VM; runner.go starts its QEMUs, linux.go and metal.go check its memory), guests.go, faults.go, liar.go,
// copies.go, report.go. Of domains: libvirt.go, libvirtfaults.go, virsh.go, virshwatch.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

type options struct {
	n    int
	seed uint64
	only int    // -1: all of n
	at   string // matches the points' names
	// compare plays some faults that QEMU's own post-copy can meet, too, instead of the cases.
	compare bool
	// libvirt makes the VMs domains of libvirt's.
	libvirt bool
	dir     string
}

func main() {
	var o options
	flag.IntVar(&o.n, "n", 100, "how many cases")
	flag.Uint64Var(&o.seed, "seed", 1, "of the sequence of cases")
	flag.IntVar(&o.only, "only", -1, "play only the case with this `index`")
	flag.StringVar(&o.at, "at", "", "only points whose name matches this regular `expression`")
	flag.BoolVar(&o.compare, "compare", false,
		"instead of the cases: strike migrated and QEMU's own post-copy with the same faults at the same moment")
	flag.BoolVar(&o.libvirt, "libvirt", false,
		"the VMs are domains of libvirt's, and libvirt and its users are among what disturbs them")
	flag.StringVar(&o.dir, "dir", "build/chaos", "`directory` of the report and the logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if o.compare {
		if err := compare(ctx, o.dir); err != nil {
			fmt.Fprintln(os.Stderr, "chaos:", err)
			os.Exit(1) //nolint:gocritic // nothing is left to be released
		}
		return
	}
	r, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
	}
	if r != nil {
		r.print(os.Stdout)
		fmt.Println(r.summary())
	}
	if err != nil {
		os.Exit(1)
	}
}

// caseTime bounds a case up to its verdict.
const caseTime = 6 * time.Minute

// run plays the cases. If some failed, it returns the report and an error.
func run(ctx context.Context, o options) (*chaosReport, error) {
	if err := os.RemoveAll(o.dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return nil, err
	}
	remove, err := build(ctx)
	if err != nil {
		return nil, err
	}
	defer remove()
	at, err := pointsLike(o.at)
	if err != nil {
		return nil, err
	}
	indices := []int{o.only}
	if o.only < 0 {
		indices = nil
		for i := range o.n {
			indices = append(indices, i)
		}
	}
	r := newReport(o.seed, o.libvirt)
	if err := r.play(ctx, o, indices, at); err != nil {
		return r, err
	}
	if failed := r.failed(); len(failed) > 0 {
		return r, fmt.Errorf("%d cases failed: %v", len(failed), failed)
	}
	return r, nil
}

func (o options) pack() pack {
	if o.libvirt {
		return ofDomains
	}
	return ofQEMUs
}

// play plays the cases in turn on a stage. After a case that failed it sets up a new stage.
func (r *chaosReport) play(ctx context.Context, o options, indices []int, at []point) (err error) {
	var s *stage
	defer func() {
		if s != nil {
			err = errors.Join(err, s.close(context.WithoutCancel(ctx)))
		}
	}()
	for _, index := range indices {
		if err := ctx.Err(); err != nil {
			return err
		}
		if s == nil {
			dir := filepath.Join(o.dir, fmt.Sprintf("from-%d", index))
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			if s, err = newStage(ctx, dir, o.libvirt); err != nil {
				return fmt.Errorf("set the stage: %w", err)
			}
		}
		c := newCase(o.seed, index, o.pack(), at)
		res := s.bounded(ctx, c)
		if err := ctx.Err(); err != nil {
			return err // it was cut off, and nothing is known of its VM
		}
		r.add(res)
		if err := r.write(o.dir); err != nil {
			return err
		}
		fmt.Printf("%s: %s\n", res.Case, res)
		if res.Failure == "" {
			continue
		}
		which := map[bool]string{true: "LIBVIRT=1 "}[o.libvirt]
		fmt.Printf("   again: make chaos %sSEED=%d ONLY=%d   logs: %s\n", which, o.seed, index, s.dir)
		err := s.close(ctx)
		s = nil
		if err != nil {
			return fmt.Errorf("after case %d: %w", index, err)
		}
	}
	return nil
}

// bounded plays a case within its time. An error of the suite's own is a failure, too, because nothing is known of the
// VM then.
func (s *stage) bounded(ctx context.Context, c chaosCase) result {
	ctx, cancel := context.WithTimeout(ctx, caseTime)
	defer cancel()
	res, err := s.play(ctx, c)
	if err != nil {
		res.fail(fmt.Errorf("the suite: %w", err))
	}
	return res
}

func (r result) String() string {
	text := fmt.Sprintf("%s, stall %.0f ms, took %.1f s", r.End, ms(r.Stall), r.Took.Seconds())
	if !r.Struck {
		text = "missed; " + text
	}
	for _, note := range r.Notes {
		text += "; " + note
	}
	if r.Failure != "" {
		text = "FAILED: " + r.Failure
	}
	return text
}

// build builds the daemon with orders at points, and makes it the lab's.
func build(ctx context.Context) (remove func(), err error) {
	dir, err := os.MkdirTemp("", "migrated-chaos-")
	if err != nil {
		return nil, err
	}
	remove = func() { _ = os.RemoveAll(dir) } // it is not needed any more
	binary := filepath.Join(dir, "migrated")
	if err := lab.BuildDaemon(ctx, "chaos", binary); err != nil {
		remove()
		return nil, err
	}
	return remove, os.Setenv("MIGRATED_BINARY", binary)
}
