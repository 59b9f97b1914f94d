// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/jsonfile"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
)

const (
	// movePatience bounds one move of a soak with all its waiting, and one check of its guest.
	movePatience = 3 * time.Minute
	// checkEvery is the number of moves between two checks, in which the guest reads all that it has ever written. It
	// checks what it reads in between anyway.
	checkEvery = 10
)

// soakReport is soak.json.
type soakReport struct {
	QEMU     string   `json:"qemu"`    // its version
	Devices  int      `json:"devices"` // disks and network cards, each
	Moves    int      `json:"moves"`   // that were tried
	Failures []string `json:"failures"`

	Checks            int    `json:"checks"` // of all memory and all disks
	MemoryCorruptions uint64 `json:"memory_corruptions"`
	DiskBlocks        uint64 `json:"disk_blocks"` // that the last check read
	DiskCorruptions   uint64 `json:"disk_corruptions"`
	DiskErrors        uint64 `json:"disk_errors"`
	DiskWrites        uint64 `json:"disk_writes"`

	// Of the client that pings the first network card during each move.
	Pings     int `json:"pings"`
	PingsLost int `json:"pings_lost"`
	// Of the messages that the guest sends by all network cards.
	MessagesAnswered uint64 `json:"messages_answered"`
	MessagesLost     uint64 `json:"messages_lost"`
	MessagesWrong    uint64 `json:"messages_wrong"`

	Downtime *spread `json:"downtime_ms"`
	PingGap  *spread `json:"ping_gap_ms"`
}

// soak moves one VM there and back by migrated while its guest drives its devices.
func soak(ctx context.Context, o options) (err error) {
	ctx, cancel := context.WithTimeout(ctx, patience+time.Duration(o.soak)*2*movePatience)
	defer cancel()
	c := benchCase{qemu: o.qemu, network: networks[0], devices: true, guest: deviceGuest(o.devices, true)}
	fmt.Printf("── soak: %s, %d moves, QEMU %s\n", c.name(), o.soak, o.qemu)
	s, err := c.stage(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = s.close(err) }()
	r := &soakReport{QEMU: o.qemu, Devices: o.devices, Failures: []string{}, Downtime: &spread{}, PingGap: &spread{}}
	for r.Moves < o.soak {
		if err := r.move(ctx, s); err != nil {
			return errors.Join(err, r.write(o.dir))
		}
		if r.Moves%checkEvery == 0 || r.Moves == o.soak {
			if err := r.check(ctx, s); err != nil {
				return errors.Join(err, r.write(o.dir))
			}
		}
		if err := r.write(o.dir); err != nil { // after each move, so that hours of results are not lost
			return err
		}
	}
	return r.verdict()
}

// move tries one move. It counts a failed move, and returns an error only if the VM cannot be moved again.
func (r *soakReport) move(ctx context.Context, s *scene) error {
	r.Moves++
	moving, cancel := context.WithTimeout(ctx, movePatience)
	defer cancel()
	from := s.at
	f, err := s.move(moving, contenders[0])
	r.Pings, r.PingsLost = r.Pings+f.Pings, r.PingsLost+f.PingsLost
	if f.Downtime > 0 {
		r.Downtime.All = append(r.Downtime.All, ms(f.Downtime))
		r.PingGap.All = append(r.PingGap.All, ms(f.PingGap))
	}
	if err == nil || errors.Is(err, report.ErrDamaged) || errors.Is(err, report.ErrDisk) { // check counts these
		fmt.Printf("   move %d: %s to %s, %v\n", r.Moves, from.Name, s.at.Name, f)
		return nil
	}
	r.Failures = append(r.Failures, fmt.Sprintf("move %d (%s, from host %s): %v", r.Moves, s.id(), from.Name, err))
	fmt.Println("  ", r.Failures[len(r.Failures)-1])
	if err := s.findVM(ctx); err != nil {
		return fmt.Errorf("after a failed move: %w; the logs are in %s", err, s.dir)
	}
	return nil
}

// check makes the guest check everything. It returns an error if the guest cannot.
func (r *soakReport) check(ctx context.Context, s *scene) error {
	ctx, cancel := context.WithTimeout(ctx, movePatience)
	defer cancel()
	v, err := s.check(ctx)
	if err != nil {
		return fmt.Errorf("after move %d: %w", r.Moves, err)
	}
	r.Checks++
	r.MemoryCorruptions, r.DiskBlocks = v.Corruptions, v.Blocks
	r.DiskCorruptions, r.DiskErrors, r.DiskWrites = 0, 0, 0
	for _, d := range v.Disks { // counters since the guest booted
		r.DiskCorruptions += d.Corruptions
		r.DiskErrors += d.Errors
		r.DiskWrites += d.Writes
	}
	r.MessagesAnswered, r.MessagesLost, r.MessagesWrong = 0, 0, 0
	for _, c := range v.Cards {
		r.MessagesAnswered += c.Answered
		r.MessagesLost += c.Lost
		r.MessagesWrong += c.Wrong
	}
	fmt.Printf("   check after move %d: %d pages and %d blocks; so far %d and %d corruptions, %d errors of disks\n",
		r.Moves, v.Pages, v.Blocks, r.MemoryCorruptions, r.DiskCorruptions, r.DiskErrors)
	return nil
}

// findVM finds the host where the VM runs, and ends the QEMU that is left on the other one.
func (s *scene) findVM(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, movePatience)
	defer cancel()
	var running []*lab.Host
	for _, h := range s.lab.Hosts() {
		status, err := vmStatus(ctx, h)
		if err != nil {
			fmt.Printf("   host %s has no VM: %v\n", h.Name, err)
			continue
		}
		fmt.Printf("   host %s has a VM: %s\n", h.Name, status)
		if status == "running" {
			running = append(running, h)
		}
	}
	if len(running) != 1 {
		return fmt.Errorf("the VM runs on %d hosts", len(running))
	}
	s.at = running[0]
	s.serial.follow(s.at)
	if _, err := vmStatus(ctx, s.lab.Other(s.at)); err != nil {
		return nil // nothing is left there
	}
	return contenders[0].end(ctx, s.lab.Other(s.at))
}

// vmStatus asks QEMU on a host by the monitor that the daemon does not use.
func vmStatus(ctx context.Context, h *lab.Host) (string, error) {
	client, err := qmp.Dial(ctx, h.Path(lab.EventsPath))
	if err != nil {
		return "", err
	}
	var answer struct {
		Status string `json:"status"`
	}
	err = client.Do(ctx, "query-status", nil, &answer)
	return answer.Status, errors.Join(err, client.Disconnect())
}

func (r *soakReport) write(dir string) error {
	for _, s := range []*spread{r.Downtime, r.PingGap} {
		if len(s.All) > 0 {
			s.finish()
		}
	}
	return jsonfile.Write(filepath.Join(dir, "soak.json"), r)
}

// verdict prints what was counted. It returns an error if a move failed or anything was damaged.
func (r *soakReport) verdict() error {
	fmt.Printf("%d moves, %d failed; downtime %v ms\n", r.Moves, len(r.Failures), r.Downtime)
	fmt.Printf("%d checks: %d corruptions of memory; %d of disks, %d errors, %d writes, %d blocks in the last check\n",
		r.Checks, r.MemoryCorruptions, r.DiskCorruptions, r.DiskErrors, r.DiskWrites, r.DiskBlocks)
	fmt.Printf("%d pings, %d lost, longest gap %v ms; %d messages of the guest's answered, %d lost, %d wrong\n",
		r.Pings, r.PingsLost, r.PingGap, r.MessagesAnswered, r.MessagesLost, r.MessagesWrong)
	if len(r.Failures) > 0 || r.MemoryCorruptions+r.DiskCorruptions+r.DiskErrors+r.MessagesWrong > 0 {
		return errors.New("the soak found failures or damage")
	}
	return nil
}
