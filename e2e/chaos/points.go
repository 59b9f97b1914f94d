// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// A point is a place that internal/migration marks with testPoint: an arrow in the picture of its doc.go. The part of
// the name before the first dash says whose daemon passes it.
type point struct {
	name string
	// by is what must happen for the point to be passed; empty: every migration passes it.
	by string
}

// What brings a migration to points that it does not pass by itself.
const (
	byCancel  = "cancel"  // the migration is cancelled when the VM has stopped
	byRestart = "restart" // the point's daemon is killed after the switch and started again
	byStop    = "stop"    // the point's daemon is told to stop after the switch
	byEnd     = "end"     // the VM's QEMU is told to quit after the switch
)

// points are all points; a test compares them with the source.
var points = []point{
	{name: "source-offered"}, {name: "source-early"}, {name: "source-early-saved"}, {name: "source-prepared"},
	{name: "source-asked"}, {name: "source-recorded"},
	{name: "source-stopped"}, {name: "source-saved"}, {name: "source-loaded"}, {name: "source-committed"},
	{name: "source-answered"}, {name: "source-last-page"}, {name: "source-completing"}, {name: "source-quit"},
	{name: "source-reported"}, {name: "source-forgotten"},
	{name: "source-backing-out", by: byCancel}, {name: "source-continued", by: byCancel},
	{name: "source-taken-up", by: byRestart}, {name: "source-leaving", by: byStop},
	{name: "destination-started"}, {name: "destination-taken"},
	{name: "destination-early"}, {name: "destination-early-loaded"},
	{name: "destination-kept"}, {name: "destination-prepared"},
	{name: "destination-loading"}, {name: "destination-took"}, {name: "destination-loaded"}, {name: "destination-go"},
	{name: "destination-told"}, {name: "destination-runs"}, {name: "destination-running"}, {name: "destination-filled"},
	{name: "destination-completed"},
	{name: "destination-giving-up", by: byCancel}, {name: "destination-taken-up", by: byRestart},
	{name: "destination-ended", by: byEnd},
}

// pointsLike returns the points whose name matches a regular expression.
func pointsLike(match string) ([]point, error) {
	like, err := regexp.Compile(match)
	if err != nil {
		return nil, fmt.Errorf("--at: %w", err)
	}
	found := slices.DeleteFunc(slices.Clone(points), func(p point) bool { return !like.MatchString(p.name) })
	if len(found) == 0 {
		return nil, fmt.Errorf("--at %s: no point is called so", match)
	}
	return found, nil
}

// find returns the point of that name.
func find(name string) point {
	for _, p := range points {
		if p.name == name {
			return p
		}
	}
	panic("no point is called " + name)
}

// at returns the host whose daemon passes the point in a migration.
func (p point) at(from, to *lab.Host) *lab.Host {
	if strings.HasPrefix(p.name, "source-") {
		return from
	}
	return to
}

// The orders that internal/migration's point_chaos.go knows.
const (
	orderKill   = "kill"
	orderFreeze = "freeze"
	orderHold   = "hold"
)

// pointDir is the directory that point_chaos.go reads, on each host.
const pointDir = "/run/chaos"

// plant orders what happens when the host's daemon next passes the point.
func plant(h *lab.Host, p point, order string) error {
	if err := os.MkdirAll(h.Path(pointDir), 0o755); err != nil {
		return err
	}
	// The file must appear with all of its content.
	temp := h.Path(filepath.Join(pointDir, "."+p.name))
	if err := os.WriteFile(temp, []byte(order), 0o600); err != nil {
		return err
	}
	return os.Rename(temp, h.Path(filepath.Join(pointDir, p.name)))
}

// passed reports whether the point was passed since plant.
func passed(h *lab.Host, p point) bool {
	_, err := os.Lstat(h.Path(filepath.Join(pointDir, p.name+".reached")))
	return err == nil
}

// release lets a daemon that is held at the point go on.
func release(h *lab.Host, p point) error {
	err := os.Remove(h.Path(filepath.Join(pointDir, p.name+".reached")))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// clearPoints takes all orders back. A daemon that is held goes on.
func clearPoints(hosts ...*lab.Host) error {
	var errs []error
	for _, h := range hosts {
		entries, err := os.ReadDir(h.Path(pointDir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, entry := range entries {
			if err := os.Remove(h.Path(filepath.Join(pointDir, entry.Name()))); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// await polls until done returns true, ctx ends or the time is over. It reports whether done did.
func await(ctx context.Context, most time.Duration, done func() bool) bool {
	const firstPause, longestPause = time.Millisecond, 30 * time.Millisecond
	end := time.Now().Add(most)
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		if done() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return false
		}
	}
}
