// SPDX-License-Identifier: Apache-2.0

//go:build linux && amd64

package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/card"
	"github.com/migrated-vm/migrated/e2e/guest/disk"
	"github.com/migrated-vm/migrated/e2e/guest/load"
	"github.com/migrated-vm/migrated/e2e/guest/report"
)

// work is all work of the guest. Only the reporter calls its methods.
type work struct {
	memory *load.Load
	disks  *disk.Set
	cards  *card.Set
}

// begin stamps memory and finds the devices. All of them rest until run(true).
func begin(p params) (*work, report.Ready, error) {
	began := time.Now()
	memory, err := load.New(p.Config)
	if err != nil {
		return nil, report.Ready{}, err
	}
	pages, working := memory.Pages()
	ready := report.Ready{
		Type: report.TypeReady, UptimeMS: uptime().Milliseconds(), Pages: pages, Working: working,
		Workers: p.Workers, StampMS: time.Since(began).Milliseconds(), Disks: p.Disks.Disks, Cards: p.Cards.Cards,
	}
	disks, err := disk.Open(p.Disks)
	if err != nil {
		return nil, report.Ready{}, err
	}
	cards, err := card.Open(p.Cards)
	if err != nil {
		return nil, report.Ready{}, err
	}
	return &work{memory: memory, disks: disks, cards: cards}, ready, nil
}

// run makes everything work or rest. It returns when it does.
func (w *work) run(on bool) {
	w.memory.Run(on)
	w.disks.Run(on)
	w.cards.Run(on)
}

func (w *work) window() report.Window {
	window := w.memory.Window(uptime())
	window.Disks, window.Cards = w.disks.Report(), w.cards.Report()
	return window
}

// verify checks all memory and all disks, and returns the answer to the command with that ID.
func (w *work) verify(id string) report.Verified {
	pages, found := w.memory.Verify()
	blocks, blocksFound := w.disks.Verify()
	return report.Verified{
		Type: report.TypeVerified, Counters: w.memory.Counters(uptime()), ID: id, Pages: pages, Found: found,
		Blocks: blocks, BlocksFound: blocksFound, Disks: w.disks.Report(), Cards: w.cards.Report(),
	}
}

// finding returns a line about something that was found and not reported yet.
func (w *work) finding() (line any, ok bool) {
	if d, ok := w.memory.Corruption(uptime()); ok {
		return d, true
	}
	f, ok := w.disks.Finding()
	switch {
	case !ok:
		return nil, false
	case f.Err != nil:
		return report.Error{Type: report.TypeError, Message: fmt.Sprintf("%s: %v", f.Disk, f.Err)}, true
	}
	return report.Corruption{
		Type: report.TypeCorruption, Counters: w.memory.Counters(uptime()), Disk: f.Disk,
		Page: f.Damage.Page, Word: f.Damage.Word, Kind: f.Damage.Kind,
		Expected: "0x" + strconv.FormatUint(f.Damage.Expected, 16),
		Got:      "0x" + strconv.FormatUint(f.Damage.Got, 16),
	}, true
}
