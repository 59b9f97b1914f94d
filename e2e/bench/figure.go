// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/migrated-vm/migrated/e2e/jsonfile"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// figureMatch matches the cases of the figure, unless --case chooses others.
const figureMatch = `^loopback/devices-(0|1|8|16)$`

//go:generate go run . --draw ../../docs/downtime.json

// A series is one line of the figure. The lines are kept in docs/downtime.json, and 'make generate' draws them again.
type series struct {
	Who    string        `json:"who"`  // name of the contender
	QEMU   string        `json:"qemu"` // version
	Points []deviceCount `json:"points"`
}

// A deviceCount is how long the moves of a VM with so many disks, and as many network cards, took, in milliseconds.
type deviceCount struct {
	Devices int     `json:"devices"`
	Median  float64 `json:"median"`
	Min     float64 `json:"min"`
	Max     float64 `json:"max"`
}

// measureFigure measures the downtime by number of devices with each version of QEMU, and draws it: figure.json and
// figure.svg. Each version has its report in a directory of its own.
func measureFigure(ctx context.Context, o options) error {
	match := o.match
	if match == "" {
		match = figureMatch
	}
	var all []series
	for _, version := range lab.QEMUVersions {
		of := o
		of.versions, of.match, of.dir = []string{version}, match, filepath.Join(o.dir, "qemu-"+version)
		chosen, err := choose(of) // the only bound is that of each case
		if err != nil {
			return err
		}
		of.minutes = len(chosen) * int(patience.Minutes())
		if err := os.MkdirAll(of.dir, 0o755); err != nil {
			return err
		}
		fmt.Printf("== QEMU %s\n", version)
		r, err := compareAll(ctx, of, chosen)
		if err != nil {
			return err
		}
		for _, who := range []string{ours, qemuPreempt} {
			points, err := downtimeByDevices(r, who)
			if err != nil {
				return err
			}
			all = append(all, series{who, version, points})
		}
	}
	path := filepath.Join(o.dir, "figure.json")
	if err := jsonfile.Write(path, all); err != nil {
		return err
	}
	return drawFigure(path)
}

// drawFigure draws the series in a file of JSON, into an SVG beside it.
func drawFigure(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var all []series
	if err := json.Unmarshal(text, &all); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	picture, err := downtimePlot(all)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.WriteFile(strings.TrimSuffix(path, ".json")+".svg", picture, 0o644)
}

// versionDashes distinguish the versions of QEMU, the oldest first.
var versionDashes = [][]vg.Length{nil, {vg.Points(6), vg.Points(3)}, {vg.Points(2), vg.Points(2)}}

// downtimePlot draws the median and the range of all moves by the number of disks and network cards of the VM.
func downtimePlot(all []series) ([]byte, error) {
	p := newPlot()
	p.X.Label.Text, p.Y.Label.Text = "disks, and as many network cards, idle", "downtime, ms"
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, decadeTicks{}
	p.Add(plotter.NewGrid())
	most, ticks := 0, []plot.Tick{}
	for _, s := range all {
		var points ranged
		for _, of := range s.Points {
			most = max(most, of.Devices)
			tick := plot.Tick{Value: float64(of.Devices), Label: strconv.Itoa(of.Devices)}
			if !slices.Contains(ticks, tick) {
				ticks = append(ticks, tick)
			}
			points.XYs = append(points.XYs, plotter.XY{X: float64(of.Devices), Y: of.Median})
			points.YErrors = append(points.YErrors, struct{ Low, High float64 }{of.Median - of.Min, of.Max - of.Median})
		}
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return nil, err
		}
		dashes := versionDashes[max(0, slices.Index(lab.QEMUVersions, s.QEMU))%len(versionDashes)]
		line.Color, line.Width, line.Dashes = colours[s.Who], vg.Points(1.5), dashes
		dots.Color, dots.Shape = colours[s.Who], draw.CircleGlyph{}
		ranges, err := plotter.NewYErrorBars(points)
		if err != nil {
			return nil, err
		}
		ranges.Color = color.Gray{Y: 110}
		p.Add(line, dots, ranges)
		p.Legend.Add(map[string]string{ours: "migrated", qemuPreempt: "QEMU, preempt"}[s.Who]+", QEMU "+s.QEMU, line)
	}
	p.X.Min, p.X.Max = -0.2, float64(most)+0.2
	p.Y.Min, p.Y.Max = p.Y.Min*0.9, p.Y.Max*1.1
	p.X.Tick.Marker = plot.ConstantTicks(ticks)
	return svgFile(p, 20*vg.Centimeter, 10*vg.Centimeter)
}

// decadeTicks labels 1, 2 and 5 of each power of ten.
type decadeTicks struct{}

func (decadeTicks) Ticks(least, most float64) (ticks []plot.Tick) {
	for power := 0.001; power <= most; power *= 10 {
		for i := 1.0; i < 10; i++ {
			t := plot.Tick{Value: power * i}
			if i == 1 || i == 2 || i == 5 {
				t.Label = strconv.FormatFloat(power*i, 'g', 3, 64)
			}
			if t.Value >= least && t.Value <= most {
				ticks = append(ticks, t)
			}
		}
	}
	return ticks
}

// ranged is points that implement plotter.YErrorer.
type ranged struct {
	plotter.XYs
	plotter.YErrors
}

var devicesGuest = regexp.MustCompile(`^devices-(\d+)$`)

// downtimeByDevices returns the downtimes of a contender by number of devices.
func downtimeByDevices(r *benchReport, who string) (points []deviceCount, err error) {
	for _, c := range r.Cases {
		found := devicesGuest.FindStringSubmatch(c.Guest)
		downtime := c.By[who]["downtime"]
		if found == nil || downtime == nil {
			return points, errors.New("the figure is of idle VMs with devices")
		}
		n, err := strconv.Atoi(found[1])
		if err != nil {
			return points, err
		}
		points = append(points, deviceCount{n, downtime.Median, downtime.Min, downtime.Max})
	}
	return points, nil
}
