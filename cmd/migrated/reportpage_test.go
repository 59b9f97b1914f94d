// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/html"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// void are the elements without an end tag.
var void = []string{"meta", "line", "rect", "polyline"}

// parsePage parses a page strictly: each element must be closed in the right order, and each id may occur only once.
func parsePage(t *testing.T, page string) (elements []html.Token, text string) {
	t.Helper()
	var open []string
	ids := make(map[string]bool)
	for tokens := html.NewTokenizer(strings.NewReader(page)); ; {
		kind := tokens.Next()
		token := tokens.Token()
		switch kind {
		case html.ErrorToken:
			if len(open) > 0 {
				t.Errorf("%v are not closed", open)
			}
			return elements, text
		case html.TextToken:
			text += token.Data
		case html.StartTagToken, html.SelfClosingTagToken:
			elements = append(elements, token)
			if id := attribute(token, "id"); ids[id] {
				t.Errorf("the id %q is there twice", id)
			} else if id != "" {
				ids[id] = true
			}
			if kind == html.StartTagToken && !slices.Contains(void, token.Data) {
				open = append(open, token.Data)
			}
		case html.EndTagToken:
			if n := len(open); n == 0 || open[n-1] != token.Data {
				t.Fatalf("</%s> closes nothing: open are %v", token.Data, open)
			}
			open = open[:len(open)-1]
		}
	}
}

func attribute(token html.Token, name string) string {
	for _, a := range token.Attr {
		if a.Key == name {
			return a.Val
		}
	}
	return ""
}

func pageOf(t *testing.T, r *migratedv1.Report) string {
	t.Helper()
	var out bytes.Buffer
	if err := writeReportPage(&out, r); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// TestReportPageNeedsNothing: the page has no script, refers to no other file, and shows names from others as text.
func TestReportPageNeedsNothing(t *testing.T) {
	r := reported()
	const name = `</title></h1><script src="https://example.com/x.js">alert(1)</script><img src=x onerror=alert(1)>`
	r.Migration.VmName, r.Migration.Error = name, &migratedv1.MigrationError{Message: "<b>bold</b>"}
	elements, text := parsePage(t, pageOf(t, r))
	if !strings.Contains(text, name) {
		t.Error("the name of the VM is not there as it is")
	}
	for _, e := range elements {
		if slices.Contains(
			[]string{"script", "img", "link", "iframe", "object", "embed", "b", "a", "form", "base"},
			e.Data,
		) {
			t.Errorf("it has an element %v", e)
		}
		for _, a := range e.Attr {
			if strings.HasPrefix(a.Key, "on") || slices.Contains([]string{"src", "href", "action", "style"}, a.Key) ||
				strings.Contains(a.Val, "//") {
				t.Errorf("it has %s=%q in %q", a.Key, a.Val, e.Data)
			}
		}
	}
}

// TestReportPageIsAccessible: each figure has a name, a description, and a table with its values. Nothing is drawn
// outside of a figure.
func TestReportPageIsAccessible(t *testing.T) {
	elements, _ := parsePage(t, pageOf(t, reported()))
	ids := make(map[string]bool)
	for _, e := range elements {
		ids[attribute(e, "id")] = true
	}
	figures, tables := 0, 0
	var width, height float64
	for i, e := range elements {
		for id := range strings.FieldsSeq(attribute(e, "aria-labelledby")) {
			if !ids[id] {
				t.Errorf("%s is named by %q, which is not there", e.Data, id)
			}
		}
		switch e.Data {
		case "table":
			tables++
		case "svg":
			figures++
			if attribute(e, "role") != "img" || elements[i+1].Data != "title" || elements[i+2].Data != "desc" {
				t.Errorf("figure %d is not described", figures)
			}
			box := strings.Fields(attribute(e, "viewbox"))
			width, height = number(t, box[2]), number(t, box[3])
		case "rect", "text", "line":
			x, y := attribute(e, "x"), attribute(e, "y")
			if e.Data == "line" {
				x, y = attribute(e, "x2"), attribute(e, "y2")
			}
			right, bottom := number(t, x), number(t, y)
			if e.Data == "rect" {
				right, bottom = right+number(t, attribute(e, "width")), bottom+number(t, attribute(e, "height"))
			}
			if right > width || bottom > height || right < 0 || bottom < 0 {
				t.Errorf("%v of figure %d is outside of %v x %v", e, figures, width, height)
			}
		}
	}
	if figures != 8 || tables != 11 {
		t.Errorf("there are %d figures and %d tables", figures, tables)
	}
}

func number(t *testing.T, text string) float64 {
	t.Helper()
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(n) || math.IsInf(n, 0) {
		t.Fatalf("%q is no number (%v)", text, err)
	}
	return n
}

// TestReportOfLittle: a migration about which almost nothing is known has a report, too.
func TestReportOfLittle(t *testing.T) {
	for name, r := range map[string]*migratedv1.Report{
		"nothing": {},
		"no migration": {
			Incoming: &migratedv1.IncomingPages{}, DowntimeSteps: &migratedv1.DowntimeSteps{}, Timeline: &migratedv1.Timeline{},
		},
		"no time": {Migration: at("m", 0, setup, 0), Timeline: changesOf(setup)},
		"one sample": {
			Migration: at("m", 0, active, 64), Incoming: &migratedv1.IncomingPages{Samples: []*migratedv1.PageSample{{}}},
		},
		"checked, good": {Migration: at("m", 0, setup, 0), Check: &migratedv1.EarlierCheck{}},
	} {
		t.Run(name, func(t *testing.T) {
			page := pageOf(t, r)
			parsePage(t, page)
			var text bytes.Buffer
			if err := printReport(&text, r); err != nil {
				t.Fatal(err)
			}
			for _, bad := range []string{"NaN", "Inf", "%!"} {
				if strings.Contains(page+text.String(), bad) {
					t.Errorf("it has %q:\n%s", bad, text.String())
				}
			}
		})
	}
}
