// SPDX-License-Identifier: Apache-2.0

package main

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"strings"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

//go:embed report.html.tmpl
var reportPageText string

var reportPage = template.Must(template.New("report").Funcs(template.FuncMap{"oneLine": oneLine}).Parse(reportPageText))

// writeReportPage writes a page that is complete in itself: it has no script, and refers to no other file.
func writeReportPage(out io.Writer, r *migratedv1.Report) error {
	type shown struct {
		section
		ID    string // the id of the heading
		Chart *chart
	}
	var sections []shown
	for i, s := range reportSections(r) {
		id := fmt.Sprintf("s%d", i+1)
		sections = append(sections, shown{s, id, s.chart(id)})
	}
	return reportPage.Execute(out, map[string]any{
		"Title": reportTitle(r), "Made": madeText(r),
		"Facts": reportFacts(r), "Findings": r.GetFindings(), "Sections": sections,
	})
}

// A chart is a drawing in units of its own, which the page scales. On a screen as narrow as a telephone's, its letters
// are as large as the page's.
type chart struct {
	ID, Title, Description string
	Width, Height          float64
	Bars                   []chartBar
	Line                   string // points of a polyline
	Texts                  []chartText
	Ground                 []chartLine
}

type (
	chartBar  struct{ X, Y, Width, Height float64 }
	chartLine struct{ X1, Y1, X2, Y2 float64 }
	chartText struct {
		X, Y   float64
		Anchor string // start or end
		Text   string
	}
)

const (
	chartWidth = 340
	barsFrom   = 126 // names are to the left of it
	barsTo     = 262 // figures are to the right of it
	lineHeight = 22
	curveSize  = 130
)

// chart draws the curve of a section, or its bars; nil: it has neither.
func (s section) chart(id string) *chart {
	switch {
	case s.Curve != nil:
		return s.Curve.chart(id)
	case s.Bars == "":
		return nil
	}
	c := &chart{ID: id, Title: s.Title, Description: s.Bars, Width: chartWidth}
	if s.Scale != "" {
		c.Description += "; the whole width is " + s.Scale
	}
	c.Description += ". The table has the same figures."
	y := 4.0
	for _, r := range s.Rows {
		if r.Bar == nil {
			continue
		}
		// A bar that would be too short to be seen is made longer. An empty one is not drawn.
		if width := (r.Bar.To - r.Bar.From) * (barsTo - barsFrom); width > 0 {
			x := min(barsFrom+r.Bar.From*(barsTo-barsFrom), barsTo-2)
			c.Bars = append(c.Bars, chartBar{x, y + 4, max(2, min(width, barsTo-x)), lineHeight - 8})
		}
		c.Texts = append(c.Texts,
			chartText{barsFrom - 6, y + 15, "end", r.Cells[0]},
			chartText{barsTo + 6, y + 15, "start", r.Cells[barCell]})
		y += lineHeight
	}
	if y == 4 {
		return nil
	}
	c.Ground = []chartLine{{barsFrom, 2, barsFrom, y + 2}}
	c.Height = y + 4
	return c
}

// chart draws a curve, with labels for its ends.
func (v *curve) chart(id string) *chart {
	const left, right, top = 8.0, chartWidth - 8.0, 20.0
	bottom := top + curveSize
	c := &chart{
		ID: id, Title: v.Title,
		Description: fmt.Sprintf("%s; the whole width is %s, the whole height %s. The table has some of the figures.",
			v.Description, v.Width, v.Height),
		Width: chartWidth, Height: bottom + 20,
		Ground: []chartLine{{left, bottom, right, bottom}, {left, top, right, top}},
		Texts: []chartText{
			{left, top - 6, "start", v.Height},
			{left, bottom + 14, "start", "the switch"}, {right, bottom + 14, "end", v.Width},
		},
	}
	var points []string
	for _, p := range v.Points {
		points = append(points, fmt.Sprintf("%.1f,%.1f", left+p.X*(right-left), bottom-p.Y*(bottom-top)))
	}
	c.Line = strings.Join(points, " ")
	return c
}
