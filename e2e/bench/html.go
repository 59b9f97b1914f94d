// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	_ "embed"
	"html/template"
	"image/color"
	"os"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

//go:embed report.html.tmpl
var pageText string

var page = template.Must(template.New("report").Funcs(template.FuncMap{
	"speed":  (*caseReport).speedPlot,
	"spread": (*caseReport).spreadPlot,
	"cell":   (*spread).String,
	"ratio":  ratio,
}).Parse(pageText))

// writeHTML writes a page that needs nothing beside it.
func (r *benchReport) writeHTML(path string) error {
	var out bytes.Buffer
	if err := page.Execute(&out, map[string]any{"Report": r, "Measures": measures}); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o644)
}

// Name and Label are for the page.
func (m measure) Name() string  { return m.name }
func (m measure) Label() string { return m.label() }

// colours of the contenders, told apart by those who see red and green alike.
var colours = map[string]color.Color{
	ours:        color.RGBA{R: 0, G: 114, B: 178, A: 255},
	"qemu":      color.RGBA{R: 230, G: 159, B: 0, A: 255},
	qemuPreempt: color.RGBA{R: 204, G: 121, B: 167, A: 255},
}

// speedPlot draws the guest's speed from the switch on: of each window the median over the rounds.
func (r *caseReport) speedPlot() (template.HTML, error) {
	p := plot.New()
	p.Title.Text = "the guest's speed after the switch"
	p.X.Label.Text, p.Y.Label.Text = "guest's time since the switch, s", "in parts of its speed before"
	p.Y.Min = 0
	p.Legend.Top = false
	drawn := false
	for _, who := range contenders {
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

// spreadPlot draws each round of each measure, in parts of qemu_preempt's median.
func (r *caseReport) spreadPlot() (template.HTML, error) {
	p := plot.New()
	p.Title.Text = "every move, in parts of qemu_preempt's median"
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: 2}
	var labels []string
	for _, m := range measures {
		theirs := r.Preempt[m.name]
		if theirs == nil || theirs.Median <= 0 {
			continue
		}
		for i, who := range contenders {
			var points plotter.XYs
			for _, v := range r.of(who.name)[m.name].All {
				if v > 0 { // a logarithmic scale has no zero
					points = append(points, plotter.XY{X: float64(len(labels)) + float64(i-1)*0.22, Y: v / theirs.Median})
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
	return svg(p, 22*vg.Centimeter)
}

// svg is a picture within a page.
func svg(p *plot.Plot, width vg.Length) (template.HTML, error) {
	whole, err := svgFile(p, width, 9*vg.Centimeter)
	if err != nil {
		return "", err
	}
	// Within a page there is no XML declaration.
	_, picture, _ := bytes.Cut(whole, []byte("<svg"))
	return template.HTML(append([]byte("<svg"), picture...)), nil //nolint:gosec // it is ours
}

// svgFile is a picture as a file of its own.
func svgFile(p *plot.Plot, width, height vg.Length) ([]byte, error) {
	canvas := vgsvg.New(width, height)
	p.Draw(draw.New(canvas))
	var out bytes.Buffer
	_, err := canvas.WriteTo(&out)
	return out.Bytes(), err
}
