// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// figureMatch are the cases of the figure, unless others are chosen.
const figureMatch = `^loopback/devices-(0|1|8|16)$`

// drawFigure measures the downtime by number of devices with each version of QEMU, and draws it: figure.svg. The report
// of each version is in a directory of its own.
func drawFigure(ctx context.Context, o options) error {
	match := o.match
	if match == "" {
		match = figureMatch
	}
	chosen, err := choose("devices", match)
	if err != nil {
		return err
	}
	var reports []*benchReport
	for _, version := range lab.QEMUVersions {
		of := o
		of.qemu, of.dir = version, filepath.Join(o.dir, "qemu-"+version)
		if err := os.MkdirAll(of.dir, 0o755); err != nil {
			return err
		}
		fmt.Printf("== QEMU %s\n", version)
		r, err := compareAll(ctx, of, chosen)
		if err != nil {
			return err
		}
		reports = append(reports, r)
	}
	picture, err := downtimePlot(reports)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(o.dir, "figure.svg"), picture, 0o644)
}

// versionDashes tell the versions of QEMU apart, the oldest first.
var versionDashes = [][]vg.Length{nil, {vg.Points(6), vg.Points(3)}, {vg.Points(2), vg.Points(2)}}

// downtimePlot draws medians and the range of all moves by the number of disks, and of network cards, of the VM.
func downtimePlot(reports []*benchReport) ([]byte, error) {
	p := plot.New()
	p.X.Label.Text, p.Y.Label.Text = "disks, and as many network cards, idle", "downtime, ms"
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: 0}
	p.Legend.Top, p.Legend.Left = true, true
	for i, r := range reports {
		for _, who := range []string{ours, qemuPreempt} {
			points, err := downtimePoints(r, who)
			if err != nil {
				return nil, err
			}
			line, dots, err := plotter.NewLinePoints(points)
			if err != nil {
				return nil, err
			}
			line.Color, line.Width, line.Dashes = colours[who], vg.Points(1.5), versionDashes[i%len(versionDashes)]
			dots.Color, dots.Shape = colours[who], draw.CircleGlyph{}
			ranges, err := plotter.NewYErrorBars(points)
			if err != nil {
				return nil, err
			}
			ranges.Color = color.Gray{Y: 150}
			p.Add(line, dots, ranges)
			p.Legend.Add(map[string]string{ours: "migrated", qemuPreempt: "QEMU, preempt"}[who]+", QEMU "+r.QEMU, line)
		}
	}
	return svgFile(p, 18*vg.Centimeter, 11*vg.Centimeter)
}

// ranged are points with what plotter.YErrorer wants.
type ranged struct {
	plotter.XYs
	plotter.YErrors
}

var deviceCount = regexp.MustCompile(`^devices-(\d+)$`)

func downtimePoints(r *benchReport, who string) (points ranged, err error) {
	for _, c := range r.Cases {
		found := deviceCount.FindStringSubmatch(c.Guest)
		downtime := c.of(who)["downtime"]
		if found == nil || downtime == nil {
			return points, errors.New("the figure is of idle VMs with devices")
		}
		n, err := strconv.Atoi(found[1])
		if err != nil {
			return points, err
		}
		points.XYs = append(points.XYs, plotter.XY{X: float64(n), Y: downtime.Median})
		points.YErrors = append(points.YErrors,
			struct{ Low, High float64 }{downtime.Median - downtime.Min, downtime.Max - downtime.Median})
	}
	return points, nil
}
