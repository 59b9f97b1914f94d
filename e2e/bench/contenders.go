// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/rival"
)

// A contender moves the VM. move begins with starting the destination's QEMU and returns when all memory is there; the
// source's QEMU is stopped then and still exists. move fills in the figures that only the contender knows.
type contender struct {
	name  string
	label string // for people
	move  func(ctx context.Context, s *scene, from, to *lab.Host, f *figures) error
}

// Names of contenders, and keys of the report.
const (
	ours           = "ours"
	oursTLS        = "ours_tls"
	qemuPlain      = "qemu"
	qemuPreempt    = "qemu_preempt"
	qemuPreemptTLS = "qemu_preempt_tls"
	// still is a VM that is not moved. Its figures show what the machine and the emulator contribute to all figures.
	still = "still"
)

var contenders = []contender{
	{ours, "migrated", migrated(false)},
	{oursTLS, "migrated, TLS", migrated(true)},
	{qemuPlain, "QEMU", qemu(rival.Options{}, false)},
	{qemuPreempt, "QEMU, preempt", qemu(rival.Options{Preempt: true}, false)},
	{qemuPreemptTLS, "QEMU, preempt, TLS", qemu(rival.Options{Preempt: true}, true)},
	{still, "not moved", nil},
}

// aPair is a contender by migrated, and the one of QEMU's that it is compared with.
type aPair struct{ ours, theirs string }

var (
	plainPair = aPair{ours, qemuPreempt}
	tlsPair   = aPair{oursTLS, qemuPreemptTLS}
	pairs     = []aPair{plainPair, tlsPair}
)

func (p aPair) String() string { return p.ours + " / " + p.theirs }

// contenders returns the contenders that move the case's VM.
func (c benchCase) contenders() []contender {
	if !c.devices {
		return contenders
	}
	return slices.DeleteFunc(slices.Clone(contenders), func(who contender) bool {
		return !slices.Contains([]string{ours, qemuPlain, qemuPreempt}, who.name)
	})
}

// order returns the contenders of a round in the order in which they move the VM. The first place rotates, and every
// other round reverses the places after it, so that no contender always follows the same one.
func order(of []contender, round int) []contender {
	n := round % len(of)
	turns := slices.Concat(of[n:], of[:n])
	if round%2 == 1 {
		slices.Reverse(turns[1:])
	}
	return turns
}

// id returns the ID of the newest move by migrated.
func (s *scene) id() string { return moveID(s.moves) }

// moveID returns the ID of the n-th move, from 1 on.
func moveID(n int) string { return fmt.Sprintf("bench-%d", n) }

// migrated returns a function that moves the VM by the daemons with TLS, or by those without.
func migrated(tls bool) func(context.Context, *scene, *lab.Host, *lab.Host, *figures) error {
	return func(ctx context.Context, s *scene, from, to *lab.Host, f *figures) error {
		address := to.DaemonAddr()
		if tls {
			address = to.SecondDaemonAddr()
		}
		_, err := ask(ctx, from, tls, "migrate", "--id", s.id(), "--vm", lab.QMPPath, "--to", address, "--keep-source")
		f.tls = tls
		return err
	}
}

// ask runs a command of migrated's on a host, with the daemon that uses TLS or with the one that does not.
func ask(ctx context.Context, h *lab.Host, tls bool, args ...string) (string, error) {
	socket := lab.DaemonSocket
	if tls {
		socket = lab.SecondSocket
	}
	return h.Migrated(ctx, append([]string{"--daemon", "unix://" + socket}, args...)...)
}

// qemu returns a function that moves the VM by QEMU's own post-copy.
func qemu(o rival.Options, tls bool) func(context.Context, *scene, *lab.Host, *lab.Host, *figures) error {
	return func(ctx context.Context, s *scene, from, to *lab.Host, f *figures) error {
		o := o
		o.KeepSource, o.Latencies = true, s.bench.qemu == emulator.V11
		if tls {
			o.Credentials = s.credentials.ofQEMU
		}
		result, err := rival.Migrate(ctx, from, to, s.vm, o)
		if err != nil {
			return err
		}
		f.Faults = result.Latencies
		f.Steps = []stepTime{
			{"save and transfer", result.Loading.Sub(result.Switch.Stopped)},
			{"load and continue", result.Switch.Resumed.Sub(result.Loading)},
		}
		return nil
	}
}

// told adds what the contender tells of the move only when it is over.
func (c contender) told(ctx context.Context, s *scene, from *lab.Host, f *figures) error {
	if c.name != ours && c.name != oursTLS {
		return nil
	}
	return f.ofReport(ctx, s, from)
}

// A stepTime is how long a part of the downtime took.
type stepTime struct {
	name string
	took time.Duration
}

// end ends the QEMU that the move left at the source.
func (contender) end(ctx context.Context, from *lab.Host) error {
	client, err := from.QMP(ctx)
	if err != nil {
		return err
	}
	defer client.Disconnect() //nolint:errcheck // QEMU ends it first
	return client.Do(ctx, "quit", nil, nil)
}
