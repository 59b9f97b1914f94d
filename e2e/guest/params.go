// SPDX-License-Identifier: Apache-2.0

//go:build linux && amd64

package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/card"
	"github.com/migrated-vm/migrated/e2e/guest/disk"
	"github.com/migrated-vm/migrated/e2e/guest/load"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

// params are the guest's parameters, as migrated.NAME=VALUE on the kernel command line:
//
//	mem=MiB        to stamp (256)
//	ws=MiB         working set, the part of mem that is visited (all of mem)
//	workers=N      threads (2)
//	rate=N         visits a second and worker, 0: as many as possible (0)
//	write=PERCENT  of visits that write (50)
//	pattern=       random | sequential | stride | idle (random)
//	fill=          random | compressible | zero-mix (random)
//	churn=MiB      that are used for a second and given back for three, again and again (0)
//	disks=N        that are written to and read, with the serial numbers disk0, disk1, … (0)
//	disk-rate=N    requests a second and disk, 0: as many as possible (0)
//	nets=N         network cards, which get their addresses and send (0)
//	net-rate=N     messages a second and card, 0: as many as are answered (0)
//	window=        reporting period as a Go duration (200ms)
type params struct {
	load.Config
	Disks  disk.Config
	Cards  card.Config
	Window time.Duration
}

const prefix = "migrated."

func parseParams(cmdline string) (params, error) {
	p := params{Window: 200 * time.Millisecond}
	p.Memory = 256 << 20
	p.Workers = 2
	p.WritePercent = 50
	p.Pattern = load.RandomOrder
	var errs []error
	for _, field := range strings.Fields(cmdline) {
		setting, ok := strings.CutPrefix(field, prefix)
		if !ok {
			continue
		}
		name, value, _ := strings.Cut(setting, "=")
		if err := p.set(name, value); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", field, err))
		}
	}
	if p.WorkingSet == 0 {
		p.WorkingSet = p.Memory
	}
	return p, errors.Join(append(errs, p.Validate(), p.Disks.Validate(), p.Cards.Validate())...)
}

func (p *params) set(name, value string) (err error) {
	switch name {
	case "mem":
		p.Memory, err = mebibytes(value)
	case "ws":
		p.WorkingSet, err = mebibytes(value)
	case "churn":
		p.Churn, err = mebibytes(value)
	case "workers":
		p.Workers, err = strconv.Atoi(value)
	case "rate":
		p.Rate, err = strconv.Atoi(value)
	case "write":
		p.WritePercent, err = strconv.Atoi(value)
	case "disks":
		p.Disks.Disks, err = strconv.Atoi(value)
	case "disk-rate":
		p.Disks.Rate, err = strconv.Atoi(value)
	case "nets":
		p.Cards.Cards, err = strconv.Atoi(value)
	case "net-rate":
		p.Cards.Rate, err = strconv.Atoi(value)
	case "pattern":
		p.Pattern = load.Pattern(value)
	case "fill":
		p.Fill, err = stamp.ParseFill(value)
	case "window":
		p.Window, err = time.ParseDuration(value)
		if err == nil && p.Window < time.Millisecond {
			err = errors.New("shorter than 1ms")
		}
	default:
		err = errors.New("no such parameter")
	}
	return err
}

func mebibytes(value string) (uint64, error) {
	n, err := strconv.ParseUint(value, 10, 32)
	return n << 20, err
}
