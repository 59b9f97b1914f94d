// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"image/color"
	"os"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

//go:embed report.html.tmpl
var pageText string

var page = template.Must(template.New("report").Funcs(template.FuncMap{
	"speed":      (*caseReport).speedPlot,
	"spread":     (*caseReport).spreadPlot,
	"cell":       (*caseReport).cell,
	"ratio":      (*caseReport).ratio,
	"pairs":      (*caseReport).pairs,
	"rows":       (*caseReport).rows,
	"contenders": func(r *caseReport) []contender { return r.bench.contenders() },
	"faults":     (*caseReport).faultTable,
	"kindRatio":  ratio,
}).Parse(pageText))

// writeHTML writes a page that needs no other file.
func (r *benchReport) writeHTML(path string) error {
	var out bytes.Buffer
	if err := page.Execute(&out, map[string]any{"Report": r, "KindMeasures": kindMeasures}); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o644)
}

// Name and Label are for the page's template.
func (m measure) Name() string    { return m.name }
func (m measure) Label() string   { return m.label() }
func (c contender) Name() string  { return c.name }
func (c contender) Label() string { return c.label }

// rows returns the measures that the case has.
func (r *caseReport) rows() []measure {
	return slices.DeleteFunc(slices.Clone(measures), func(m measure) bool { return r.By[ours][m.name] == nil })
}

// A faultRow is one bucket of fault times, with the share of each contender's faults in it, in percent.
type faultRow struct {
	Bucket string
	Parts  []string
}

// A faultTable is how long faults took, in QEMU's own buckets, of the contenders that tell.
type faultTable struct {
	Who  []string // labels
	Of   []uint64 // faults
	Rows []faultRow
}

func (r *caseReport) faultTable() (t faultTable) {
	var all [][]uint64
	first, last := -1, 0
	for _, who := range r.bench.contenders() {
		counts := r.Faults[who.name]
		total := uint64(0)
		for n, count := range counts {
			if total += count; count > 0 {
				last = max(last, n)
				if first < 0 || n < first {
					first = n
				}
			}
		}
		if total > 0 {
			t.Who, t.Of, all = append(t.Who, who.label), append(t.Of, total), append(all, counts)
		}
	}
	for n := max(0, first); len(all) > 0 && n <= last; n++ {
		row := faultRow{Bucket: bucketName(n)}
		for i, counts := range all {
			share := 0.0
			if n < len(counts) {
				share = float64(counts[n]) * 100 / float64(t.Of[i])
			}
			row.Parts = append(row.Parts, fmt.Sprintf("%.1f", share))
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}

// colours of the contenders, which people who see red and green alike can tell apart.
var colours = map[string]color.Color{
	ours:           color.RGBA{R: 0, G: 114, B: 178, A: 255},
	oursTLS:        color.RGBA{R: 86, G: 180, B: 233, A: 255},
	qemuPlain:      color.RGBA{R: 230, G: 159, B: 0, A: 255},
	qemuPreempt:    color.RGBA{R: 204, G: 121, B: 167, A: 255},
	qemuPreemptTLS: color.RGBA{R: 213, G: 94, B: 0, A: 255},
	still:          color.Gray{Y: 130},
}

// speedPlot draws the guest's speed from the switch on: for each window, the median over the rounds.
func (r *caseReport) speedPlot() (template.HTML, error) {
	p := newPlot()
	p.Title.Text = "the guest's speed after the switch"
	p.X.Label.Text, p.Y.Label.Text = "guest's time since the switch, s", "in parts of its speed before"
	p.Y.Min = 0
	drawn := false
	for _, who := range r.bench.contenders() {
		points := speedPoints(r.speeds[who.name])
		if len(points) == 0 {
			continue
		}
		line, err := plotter.NewLine(points)
		if err != nil {
			return "", err
		}
		line.Color, line.Width = colours[who.name], vg.Points(1.5)
		p.Add(line)
		p.Legend.Add(who.name, line)
		drawn = true
	}
	if !drawn { // an idle guest
		return "", nil
	}
	return svg(p, 15*vg.Centimeter)
}

// shownFor is how much of the guest's time after the switch is drawn.
const shownFor = 4.0 // seconds

func speedPoints(moves [][]float64) plotter.XYs {
	var points plotter.XYs
	for i := 0; float64(i)*window.Seconds() < shownFor; i++ {
		var values []float64
		for _, speeds := range moves {
			if i < len(speeds) {
				values = append(values, speeds[i])
			}
		}
		if len(values) == 0 {
			break
		}
		points = append(points, plotter.XY{X: float64(i+1) * window.Seconds(), Y: median(values)})
	}
	return points
}

// spreadPlot draws each round of each measure, relative to qemu_preempt's median.
func (r *caseReport) spreadPlot() (template.HTML, error) {
	p := newPlot()
	p.Title.Text = "every move, in parts of qemu_preempt's median"
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, decadeTicks{}
	var labels []string
	movers := slices.DeleteFunc(slices.Clone(r.bench.contenders()), func(who contender) bool { return who.name == still })
	for _, m := range measures {
		theirs := r.By[qemuPreempt][m.name]
		if theirs == nil || theirs.Median <= 0 || m.about {
			continue
		}
		for i, who := range movers {
			beside := (float64(i) - float64(len(movers)-1)/2) * 0.66 / float64(len(movers))
			var points plotter.XYs
			for _, v := range r.By[who.name][m.name].All {
				if v > 0 { // a logarithmic scale has no zero
					points = append(points, plotter.XY{X: float64(len(labels)) + beside, Y: v / theirs.Median})
				}
			}
			dots, err := plotter.NewScatter(points)
			if err != nil {
				return "", err
			}
			dots.Color, dots.Shape = colours[who.name], draw.CircleGlyph{}
			p.Add(dots)
			if len(labels) == 0 {
				p.Legend.Add(who.name, dots)
			}
		}
		labels = append(labels, m.name)
	}
	one := plotter.NewFunction(func(float64) float64 { return 1 })
	p.Add(one)
	p.NominalX(labels...)
	return svg(p, 26*vg.Centimeter)
}

// svg returns a plot as a picture within a page.
func svg(p *plot.Plot, width vg.Length) (template.HTML, error) {
	whole, err := svgFile(p, width, 9*vg.Centimeter)
	if err != nil {
		return "", err
	}
	// An XML declaration must not stand within a page.
	_, picture, _ := bytes.Cut(whole, []byte("<svg"))
	return template.HTML(append([]byte("<svg"), picture...)), nil //nolint:gosec // it is ours
}

// plotFonts are fonts whose letters are as wide as those of the font with which the picture was drawn.
const plotFonts = "Arial,Helvetica,Liberation Sans,sans-serif"

func newPlot() *plot.Plot {
	plot.DefaultFont.Variant = "Sans"
	return plot.New()
}

// besideGap is the distance between a plot and its legend.
const besideGap = 4 * vg.Millimeter

// svgFile returns a plot as an SVG file. The legend stands beside the plot, so that it covers no point.
func svgFile(p *plot.Plot, width, height vg.Length) ([]byte, error) {
	canvas := vgsvg.New(width, height)
	all := draw.New(canvas)
	all.SetColor(color.White)
	all.Fill(all.Rectangle.Path())
	legend := p.Legend
	legend.Top, legend.Left, legend.Padding = true, true, vg.Millimeter
	p.Legend = plot.NewLegend()
	// A reader may lack the font, and another font may be wider.
	const wider = 1.2
	beside := legend.Rectangle(all).Size().X*wider + besideGap
	p.Draw(draw.Crop(all, 0, -beside, 0, 0))
	legend.Draw(draw.Crop(all, width-beside+besideGap, 0, 0, -besideGap))
	var out bytes.Buffer
	_, err := canvas.WriteTo(&out)
	return bytes.ReplaceAll(out.Bytes(), []byte("font-family:Liberation Sans"), []byte("font-family:"+plotFonts)), err
}
