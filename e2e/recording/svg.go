// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"html"
	"strings"
	"text/template"
	"time"
	"unicode/utf8"
)

//go:embed recording.svg.tmpl
var pictureText string

var picture = template.Must(
	template.New("recording").Funcs(template.FuncMap{"escape": html.EscapeString}).Parse(pictureText),
)

// mostBytes bounds the size of the picture, so that a page shows it before its text is read.
const mostBytes = 60 << 10

// The measures of the picture: a cell of the terminal, its border, and the bar of its window.
const (
	cellWidth, cellHeight = 8.4, 20
	border, titleBar      = 20, 40
)

// visibleRows is the height of the window. Rows above have been scrolled away.
const visibleRows = 26

// shown is a text in the picture.
type shown struct {
	X, Y     float64
	Width    float64
	Text     string
	Class    string
	From, To string // seconds; To is empty for a text that stays
	Typed    int    // characters of a command
}

// svg draws all that the screen has shown.
func (s *screen) svg() ([]byte, error) {
	var texts []shown
	var transcript []string
	for i, r := range s.rows {
		y := float64(i+1)*cellHeight - 6
		last := ""
		for j, v := range r.versions {
			last = v.text
			if v.text == "" {
				continue
			}
			t := shown{X: border, Y: y, Text: v.text, From: seconds(v.from)}
			if r.command {
				prompt := shown{X: border, Y: y, Width: cellWidth, Text: "#", Class: "prompt", From: seconds(v.from - reading/3)}
				texts = append(texts, prompt)
				t.X, t.Class, t.Typed = border+2*cellWidth, "command", utf8.RuneCountInString(v.text)
				last = "# " + v.text
			}
			// Leading spaces are replaced by a larger X, because only these have another width in another font.
			trimmed := strings.TrimLeft(t.Text, " ")
			t.X += float64(len(t.Text)-len(trimmed)) * cellWidth
			t.Text, t.Width = trimmed, float64(utf8.RuneCountInString(trimmed))*cellWidth
			if j+1 < len(r.versions) {
				t.To = seconds(r.versions[j+1].from)
			}
			texts = append(texts, t)
		}
		transcript = append(transcript, last)
	}
	width := float64(s.columns)*cellWidth + 2*border
	visible := min(visibleRows, len(s.rows))
	height := titleBar + border + float64(visible)*cellHeight
	var out bytes.Buffer
	err := picture.Execute(&out, map[string]any{
		"Width": width, "Height": height, "Inner": width - 1, "InnerHeight": height - 1,
		"BarRight": width - 10.5, "BarBottom": titleBar,
		"Top": titleBar + border/2, "Visible": float64(visible) * cellHeight,
		"Scrolls": s.scrolls(visible), "Length": seconds(s.now), "Scrolled": float64(len(s.rows)-visible) * cellHeight,
		"Texts": texts, "Transcript": strings.Join(transcript, "\n"), "Typing": seconds(typing),
	})
	if err == nil && out.Len() > mostBytes {
		err = fmt.Errorf("the picture has %d bytes, more than %d", out.Len(), mostBytes)
	}
	return out.Bytes(), err
}

// A scroll is a moment at which rows have left the window, in percent of the recording, and how far the other rows have
// moved up.
type scroll struct {
	Percent string
	Up      float64
}

// scrolls returns the moments at which the window moves because a row below it shows something.
func (s *screen) scrolls(visible int) (all []scroll) {
	var last time.Duration
	for i, r := range s.rows {
		if i < visible || len(r.versions) == 0 {
			continue
		}
		// A row that is shown before the row above it moves the window for both.
		last = max(last, r.versions[0].from)
		at := fmt.Sprintf("%.2f", 100*last.Seconds()/s.now.Seconds())
		up := float64(i+1-visible) * cellHeight
		if n := len(all); n > 0 && all[n-1].Percent == at {
			all[n-1].Up = up
		} else {
			all = append(all, scroll{at, up})
		}
	}
	return all
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f", max(0, d).Seconds()) }
