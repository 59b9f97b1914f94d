// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// playCrowd moves several VMs at once, in both directions, and strikes all of them with one fault. If there are two,
// one is the VM with the Linux guest. The others have the two kinds of RAM in turns.
func (s *stage) playCrowd(ctx context.Context, c chaosCase, res *result) (err error) {
	var all []*machine
	defer func() {
		for _, m := range all {
			if m != nil && !s.keeps(m) {
				err = errors.Join(err, m.destroy(ctx))
			}
		}
	}()
	at, memory := s.lab.A, c.Memory
	if c.VMs == 2 {
		vm, err := s.linux(ctx, lab.BackendDefault)
		if err != nil {
			return err
		}
		all = append(all, vm)
		at = s.lab.Other(vm.at)
	}
	for i := len(all); i < c.VMs; i++ {
		m, err := s.newMetal(ctx, fmt.Sprintf("case%d-%d", c.Index, i), at, memory, false)
		all = append(all, m)
		if err != nil {
			return err
		}
		at = m.lab.Other(at)
		memory = map[bool]lab.Backend{true: lab.BackendDefault, false: lab.BackendFile}[memory == lab.BackendFile]
	}
	var journeys []*journey
	for i, m := range all {
		journeys = append(journeys, s.newJourney(m, fmt.Sprintf("case-%d-%d", c.Index, i)))
	}
	f, err := s.faultOf(c, c.Crowd, journeys[0])
	if err != nil {
		return err
	}
	if f.detail != "" {
		res.Case += "; " + f.detail
	}
	for _, j := range journeys {
		if err := j.start(ctx); err != nil {
			return err
		}
	}
	pause(ctx, c.At.After)
	if err := f.begin(ctx); err != nil {
		return err
	}
	pause(ctx, c.For)
	if err := f.end(ctx); err != nil {
		return err
	}
	res.Struck = true
	s.concludeAll(ctx, journeys, res)
	return nil
}

// concludeAll concludes all journeys at once.
func (s *stage) concludeAll(ctx context.Context, journeys []*journey, res *result) {
	results := make([]result, len(journeys))
	var all sync.WaitGroup
	for i, j := range journeys {
		all.Go(func() { s.conclude(ctx, j, &results[i]) })
	}
	all.Wait()
	var ends []string
	for i, r := range results {
		ends = append(ends, r.End)
		res.Notes = append(res.Notes, r.Notes...)
		res.Stall = max(res.Stall, r.Stall)
		res.Corruptions += r.Corruptions
		res.DiskCorruptions += r.DiskCorruptions
		res.Twice, res.Lost = res.Twice || r.Twice, res.Lost || r.Lost
		if r.Failure != "" {
			res.fail(fmt.Errorf("VM %s: %s", journeys[i].machine.name, r.Failure))
		}
	}
	slices.Sort(ends)
	res.End = strings.Join(slices.Compact(ends), ", ")
}

// hugePage is the size of the huge pages that /proc/meminfo counts, in bytes.
const hugePage = 2 << 20

// playHugePages moves a VM in huge pages to a host that has none left.
func (s *stage) playHugePages(ctx context.Context, c chaosCase, res *result) (err error) {
	release, err := reserve(metalMiB / 2)
	if err != nil {
		res.Notes = append(res.Notes, err.Error())
		return nil
	}
	defer func() { err = errors.Join(err, release()) }()
	m, err := s.newMetal(ctx, fmt.Sprintf("case%d", c.Index), s.lab.Hosts()[c.Pick%2], c.Memory, true)
	if m != nil {
		defer func() { err = errors.Join(err, m.destroy(ctx)) }()
	}
	if err != nil && strings.Contains(err.Error(), "Cannot allocate memory") {
		res.Notes = append(res.Notes, "somebody else took the huge pages first: the pool is the machine's")
		return nil
	}
	if err != nil {
		return err
	}
	j := s.newJourney(m, fmt.Sprintf("case-%d", c.Index))
	if err := j.start(ctx); err != nil {
		return err
	}
	res.Struck = true
	s.conclude(ctx, j, res)
	if res.Failure == "" && res.End != endStayed {
		res.fail(fmt.Errorf("it has %s, without any memory there", res.End))
	}
	return nil
}

// reserve adds huge pages of 2 MiB to the machine's pool until n of them are unused. If more are unused already, other
// programs need them, and it returns an error. release takes back the added pages.
func reserve(n int) (release func() error, err error) {
	before, unused, err := pool()
	if err != nil {
		return nil, err
	}
	added := n - unused
	if added < 0 {
		return nil, fmt.Errorf("%d huge pages are there for somebody else", unused)
	}
	if _, err := testenv.SetHugePages(hugePage, before+added); err != nil {
		return nil, err
	}
	release = func() error {
		total, _, err := pool() // others may have added some
		if err == nil {
			_, err = testenv.SetHugePages(hugePage, max(0, total-added))
		}
		return err
	}
	if _, unused, err := pool(); err != nil || unused < n {
		return nil, errors.Join(fmt.Errorf("only %d of %d huge pages can be reserved", unused, n), err, release())
	}
	return release, nil
}

// pool returns how many huge pages there are, and how many of them are neither in use nor reserved.
func pool() (total, unused int, err error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	var free, promised int
	for line := range strings.Lines(string(text)) {
		_, _ = fmt.Sscanf(line, "HugePages_Total: %d", &total) // most lines are others
		_, _ = fmt.Sscanf(line, "HugePages_Free: %d", &free)
		_, _ = fmt.Sscanf(line, "HugePages_Rsvd: %d", &promised)
	}
	return total, free - promised, nil
}
