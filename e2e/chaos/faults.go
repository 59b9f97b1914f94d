// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// A fault disturbs a migration: begin breaks something, and end mends it as a host's systemd or its operator would. arm
// is called before the migration and disarm after it.
type fault struct {
	detail      string // what the case's Pick has chosen; empty if the kind says all
	order       string // what the daemon does by itself at a point; orderHold: it waits while begin acts
	victims     []*lab.Host
	guard       bool // it must happen before the destination calls the migration complete
	begin, end  func(ctx context.Context) error
	too         func(ctx context.Context) error // runs after begin, also if the daemon acted by itself instead of begin
	arm, disarm func(ctx context.Context) error
}

func nothing(context.Context) error { return nil }

// faultOf returns what the case does to a journey of its machine.
func (s *stage) faultOf(c chaosCase, kind string, j *journey) (*fault, error) {
	f := &fault{order: orderHold, begin: nothing, too: nothing, end: nothing, arm: nothing, disarm: nothing}
	r := rand.New(rand.NewPCG(c.Pick, 0))
	switch kind {
	case killSource, killDestination, killBoth:
		s.killDaemons(f, kind, j)
	case stopSource:
		s.stopDaemon(f, j.from)
	case stopDestination:
		s.stopDaemon(f, j.to)
	case freezeSource:
		s.freezeDaemon(f, j.from)
	case freezeDestination:
		s.freezeDaemon(f, j.to)
	case killTheirQEMU:
		f.guard = true // a VM that dies with all of its memory is no failed migration
		f.begin = func(ctx context.Context) error { return j.machine.kill(ctx, j.to) }
	case killTheirHost:
		s.killDaemons(f, killDestination, j)
		f.guard = true
		f.too = func(ctx context.Context) error { return unlessTooLate(j.machine.kill(ctx, j.to)) }
	case killOurQEMU:
		f.begin = func(ctx context.Context) error {
			j.orphaned = true
			return j.machine.kill(ctx, j.from)
		}
	case freezeTheirQEMU:
		f.begin = func(context.Context) error { return j.machine.signal(j.to, syscall.SIGSTOP) }
		f.end = func(context.Context) error { return unlessTooLate(j.machine.signal(j.to, syscall.SIGCONT)) }
	case pullCable:
		f.begin = func(ctx context.Context) error { return s.lab.SetCable(ctx, false) }
		f.end = func(ctx context.Context) error { return s.lab.SetCable(ctx, true) }
	case cutBoth:
		s.cut(f, s.lab.AB, s.lab.BA)
	case cutOne:
		wire := s.lab.AB
		f.detail = "from a to b"
		if r.IntN(2) == 1 {
			wire, f.detail = s.lab.BA, "from b to a"
		}
		s.cut(f, wire)
	case badLink:
		s.worsen(f, c, r)
	case fullTmpfs:
		s.fillTmpfs(f, j, r)
	case flipBits:
		return f, s.damage(f, j, r)
	case lyingSource:
		return f, s.lie(f, j, r)
	case quitVM:
		s.quit(f, j)
	case powerOff:
		s.powerOff(f, j)
	case resetGuest, panicGuest:
		s.restart(f, j, kind)
	case continueSource:
		s.continueVM(f, j, j.from)
	case continueDestination:
		s.continueVM(f, j, j.to)
	case snapshotDisk:
		s.snapshot(f, c, j)
	case foreignMapper:
		s.mapRAM(f, j, r)
	case noFault:
	default:
		return f, s.libvirtFault(f, kind, j, r)
	}
	return f, nil
}

// meanwhile makes a fault of an order that may have to wait: for a QEMU, which may wait for a daemon that is held at
// the fault's point. The order is given by begin, and carried out by the time when end returns.
func (f *fault) meanwhile(order func(context.Context) error) {
	done := make(chan struct{})
	var result error
	f.begin = func(ctx context.Context) error {
		go func() {
			defer close(done)
			result = order(ctx)
		}()
		const prompt = time.Second
		select {
		case <-done:
			return result
		case <-time.After(prompt):
			return nil
		}
	}
	f.end = func(context.Context) error {
		<-done
		return unlessTooLate(result)
	}
}

func (s *stage) killDaemons(f *fault, kind string, j *journey) {
	switch kind {
	case killSource:
		f.victims = []*lab.Host{j.from}
	case killDestination:
		f.victims = []*lab.Host{j.to}
	default:
		f.victims = []*lab.Host{j.from, j.to}
	}
	f.order = orderKill
	f.begin = func(context.Context) error {
		var errs []error
		for _, h := range f.victims {
			errs = append(errs, s.killDaemon(h))
		}
		return errors.Join(errs...)
	}
	f.end = s.reviveDaemons
}

// stopDaemon is the planned end of a daemon, as for an upgrade.
func (s *stage) stopDaemon(f *fault, h *lab.Host) {
	f.begin = func(context.Context) error { return s.signalDaemon(h, syscall.SIGTERM) }
	f.end = func(ctx context.Context) error { return errors.Join(s.awaitStopped(ctx, h), s.reviveDaemons(ctx)) }
}

// errTooLate says that what the fault was meant for is gone.
var errTooLate = errors.New("too late")

func unlessTooLate(err error) error {
	if errors.Is(err, errTooLate) {
		return nil
	}
	return err
}

// freezeDaemon stops a daemon as if its host gave it no CPU time. To the others it hangs, and for itself time jumps.
func (s *stage) freezeDaemon(f *fault, h *lab.Host) {
	f.victims, f.order = []*lab.Host{h}, orderFreeze
	f.begin = func(context.Context) error { return s.signalDaemon(h, syscall.SIGSTOP) }
	f.end = func(context.Context) error { return s.signalDaemon(h, syscall.SIGCONT) }
}

// cut cuts wires so that neither host notices: what is sent is lost.
func (s *stage) cut(f *fault, wires ...*lab.Wire) {
	set := func(cut bool) func(context.Context) error {
		return func(context.Context) error {
			for _, w := range wires {
				w.SetCut(cut)
			}
			return nil
		}
	}
	f.begin, f.end = set(true), set(false)
}

// worsen changes the network every tenth of a second.
func (s *stage) worsen(f *fault, c chaosCase, r *rand.Rand) {
	over, done := make(chan struct{}), make(chan struct{})
	f.begin = func(context.Context) error {
		go func() {
			defer close(done)
			for {
				link := lab.Link{
					Rate: []int64{20e6, 100e6, 400e6, 0}[r.IntN(4)], Delay: time.Duration(r.IntN(40)) * time.Millisecond,
					Loss: []float64{0, 0.01, 0.05}[r.IntN(3)], Seed: r.Uint64(),
				}
				for _, w := range []*lab.Wire{s.lab.AB, s.lab.BA} {
					w.Set(link)
				}
				select {
				case <-time.After(100 * time.Millisecond):
				case <-over:
					return
				}
			}
		}()
		return nil
	}
	f.end = func(context.Context) error {
		close(over)
		<-done
		for _, w := range []*lab.Wire{s.lab.AB, s.lab.BA} {
			w.Set(c.Link)
		}
		return nil
	}
}

// ramFiles is the file system with the RAM of VMs on each host.
const ramFiles = "/dev/shm"

// fillTmpfs makes the destination's file system smaller than the VM's data, so that there is no room for most of the
// pages to come. There is never room for the last of them. After its move such a VM is like any other on a full tmpfs:
// the kernel ends it when it touches a page that it never had (SIGBUS), which concerns no migration.
func (s *stage) fillTmpfs(f *fault, j *journey, r *rand.Rand) {
	part := r.Float64() * 0.6
	f.detail = fmt.Sprintf("room for %.0f %%", 100*part)
	var data int64
	f.arm = func(context.Context) (err error) {
		data, err = j.machine.data(j.from)
		data -= 1 << 20 // the guest may clear so much until the switch
		return err
	}
	shrink := func(ctx context.Context) error {
		var st unix.Statfs_t
		if err := unix.Statfs(j.to.Path(ramFiles), &st); err != nil {
			return err
		}
		used := int64(st.Blocks-st.Bfree) * st.Bsize
		if used >= data {
			return errTooLate
		}
		return resize(ctx, j.to, fmt.Sprint(max(1, used+int64(part*float64(data-used))))) // 0 is no limit
	}
	f.begin = func(ctx context.Context) (err error) {
		await(ctx, patience, func() bool { // pages come meanwhile, and a size below what is used is refused
			err = shrink(ctx)
			return err == nil || errors.Is(err, errTooLate)
		})
		return err
	}
	f.end = func(ctx context.Context) error { return resize(ctx, j.to, "50%") }
}

func resize(ctx context.Context, h *lab.Host, size string) error {
	_, err := h.Run(ctx, "mount", "-o", "remount,size="+size, ramFiles)
	return err
}
