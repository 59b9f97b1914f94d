// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/jsonfile"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/rival"
)

// comparedFaults are the faults that QEMU's own post-copy can meet, too: it has no daemon, and no page server of its
// own.
var comparedFaults = []string{
	noFault, pullCable, cutBoth, cutOne, badLink, freezeTheirQEMU, killTheirQEMU, killOurQEMU, fullTmpfs,
}

const (
	// rivalName makes the VM's paths those of the lab's only VM, which package rival expects.
	rivalName = "vm"
	// struckAfter and struckFor are the same for each fault, in the middle of the transfer.
	struckAfter, struckFor = 700 * time.Millisecond, 2 * time.Second
	// rivalPatience is how long QEMU may take after the fault has ended.
	rivalPatience = 40 * time.Second
)

// A comparison is how migrated and QEMU's own post-copy ended after the same fault.
type comparison struct {
	Kind string `json:"kind"`
	Ours result `json:"ours"`
	QEMU struct {
		End   string        `json:"end"`
		Stall time.Duration `json:"stall_ns"`
		Said  []string      `json:"said"` // the state that both QEMUs report, and the answers to the commands for recovery
	} `json:"qemu"`
}

// comparedCase returns case i, which is the same for both.
func comparedCase(i int) chaosCase {
	return chaosCase{
		Index: i, Kind: comparedFaults[i], At: moment{After: struckAfter, Switched: true}, For: struckFor,
		Link: lab.Link{Rate: 200e6}, Pick: 5, Memory: lab.BackendFile,
	}
}

// compare strikes migrated and QEMU's own post-copy, each on stages of its own, and writes compare.json into dir.
func compare(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	remove, err := build(ctx)
	if err != nil {
		return err
	}
	defer remove()
	var all []*comparison
	for i := range comparedFaults {
		c := &comparison{Kind: comparedFaults[i]}
		if c.Ours, err = strikeOurs(ctx, dir, i); err != nil {
			return fmt.Errorf("%s: %w", c.Kind, err)
		}
		fmt.Printf("%s, migrated: %v\n", c.Kind, c.Ours)
		if err := strikeRival(ctx, i, c); err != nil {
			return fmt.Errorf("%s, QEMU's own: %w", c.Kind, err)
		}
		fmt.Printf("%s, QEMU's own: %s, stall %.0f ms; %q\n", c.Kind, c.QEMU.End, ms(c.QEMU.Stall), c.QEMU.Said)
		all = append(all, c)
	}
	return jsonfile.Write(filepath.Join(dir, "compare.json"), all)
}

func strikeOurs(ctx context.Context, dir string, i int) (_ result, err error) {
	s, err := newStage(ctx, dir, false)
	if err != nil {
		return result{}, err
	}
	s.bare = true
	defer func() { err = errors.Join(err, s.close(ctx)) }()
	return s.bounded(ctx, comparedCase(i)), nil
}

func strikeRival(ctx context.Context, i int, result *comparison) (err error) {
	ctx, cancel := context.WithTimeout(ctx, caseTime)
	defer cancel()
	l, err := lab.NewWithLink(ctx, comparedCase(i).Link)
	if err != nil {
		return err
	}
	s := &stage{lab: l, runner: suiteRunner{}, guests: map[lab.Backend]*machine{}}
	defer func() { err = errors.Join(err, s.close(ctx)) }()
	kernel, initrd, err := image.LinuxWithVirtio(ctx)
	if err != nil {
		return err
	}
	m, err := s.bootLinux(ctx, rivalName, bareLinux(kernel, initrd))
	if m != nil {
		s.guests[lab.BackendFile] = m
	}
	if err != nil {
		return err
	}
	return s.moveRival(ctx, comparedCase(i), m, result)
}

// moveRival moves the VM by QEMU's own post-copy, and begins the fault when the VM runs at the destination.
func (s *stage) moveRival(ctx context.Context, c chaosCase, m *machine, result *comparison) error {
	j := s.newJourney(m, "rival")
	f, err := s.faultOf(c, c.Kind, j)
	if err != nil {
		return err
	}
	if err := errors.Join(f.arm(ctx), m.checker.begin(ctx, m)); err != nil {
		return err
	}
	j.began = time.Now()
	moving, cancel := context.WithCancel(ctx)
	defer cancel()
	moved := make(chan error, 1)
	go func() {
		_, err := rival.Migrate(moving, j.from, j.to, m.config, rival.Options{KeepSource: true})
		moved <- err
	}()
	if !await(ctx, time.Minute, j.switched) {
		return errors.New("it does not switch")
	}
	pause(ctx, c.At.After)
	if err := errors.Join(f.begin(ctx), f.too(ctx)); err != nil {
		return err
	}
	pause(ctx, c.For)
	if err := f.end(ctx); err != nil {
		return err
	}
	select {
	case err = <-moved:
	case <-time.After(rivalPatience):
		err = errors.New("it goes on for ever")
	}
	said := &result.QEMU.Said
	if err != nil {
		*said = append(*said, err.Error())
	}
	s.askRivals(ctx, j, said)
	result.QEMU.End = s.endOfRival(ctx, j, said)
	result.QEMU.Stall = j.stall()
	return nil
}

// askRivals records the state that both QEMUs show.
func (s *stage) askRivals(ctx context.Context, j *journey, said *[]string) {
	for _, h := range []*lab.Host{j.from, j.to} {
		client := j.machine.copies.client(h)
		if client == nil {
			*said = append(*said, "no QEMU on host "+h.Name)
			continue
		}
		asking, cancel := context.WithTimeout(ctx, 3*time.Second)
		var migration, state struct {
			Status string `json:"status"`
		}
		err := errors.Join(
			client.Do(asking, "query-migrate", nil, &migration), client.Do(asking, "query-status", nil, &state),
		)
		cancel()
		*said = append(*said, fmt.Sprintf("host %s: migration %s, VM %s %v", h.Name, migration.Status, state.Status, err))
	}
}

// endOfRival returns where the VM runs after the steps that QEMU's documentation gives an operator to try.
func (s *stage) endOfRival(ctx context.Context, j *journey, said *[]string) string {
	j.machine.at = j.to
	if err := j.works(ctx); err == nil {
		return endMoved
	}
	if j.machine.copies.client(j.to) == nil { // without a destination the source is asked to go on
		source := j.machine.copies.client(j.from)
		if source == nil {
			return "lost"
		}
		for _, command := range []string{"migrate_cancel", "cont"} {
			asking, cancel := context.WithTimeout(ctx, 5*time.Second)
			err := source.Do(asking, command, nil, nil)
			cancel()
			*said = append(*said, fmt.Sprintf("%s: %v", command, err))
			pause(ctx, time.Second)
		}
		j.machine.at = j.from
		if err := j.works(ctx); err == nil {
			return endFellBack
		}
		return "lost"
	}
	if source := j.machine.copies.client(j.from); source != nil {
		uri := "tcp:" + j.to.Addr + ":7701"
		for _, step := range []struct {
			host    *lab.Host
			command string
			args    map[string]any
		}{
			{j.to, "migrate-recover", map[string]any{"uri": uri}},
			{j.from, "migrate", map[string]any{"uri": uri, "resume": true}},
		} {
			asking, cancel := context.WithTimeout(ctx, 5*time.Second)
			err := j.machine.copies.client(step.host).Do(asking, step.command, step.args, nil)
			cancel()
			*said = append(*said, fmt.Sprintf("%s: %v", step.command, err))
		}
		pause(ctx, 10*time.Second)
		if err := j.works(ctx); err == nil {
			return endMoved + " after migrate-recover"
		}
	}
	return "lost"
}

// works returns an error unless the guest works on the machine's host and all of its memory is right.
func (j *journey) works(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := works(ctx, &j.machine.checker.(*linuxChecker).listeners[j.machine.at].log, nil, nil); err != nil {
		return err
	}
	_, err := j.machine.checker.verify(ctx, j.machine)
	return err
}
