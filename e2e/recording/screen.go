// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// A screen remembers what each of its lines has shown, and from when on. It knows the control sequences that migrated
// writes, and refuses all others.
type screen struct {
	columns int
	now     time.Duration // in the recording
	began   time.Duration // of the command that runs, in the recording
	row     int
	column  int
	rows    []*row
	rest    []byte // the start of a sequence whose end has not come yet
}

// A row is a line of the screen.
type row struct {
	cells    []rune
	command  bool // it is a typed command after a prompt
	versions []version
}

// A version is what a row shows from a time on, until the next version.
type version struct {
	from time.Duration
	text string
}

// The pace of the recording, in addition to the time of the commands.
const (
	typing  = 60 * time.Millisecond  // a character
	reading = 900 * time.Millisecond // after a command has ended
	redraw  = 100 * time.Millisecond // the least time between two versions of a row
)

func newScreen(columns int) *screen { return &screen{columns: columns, now: reading / 2} }

// line returns a row, and makes it if it is missing.
func (s *screen) line(at int) *row {
	for len(s.rows) <= at {
		s.rows = append(s.rows, &row{})
	}
	return s.rows[at]
}

// prompt shows a command as it is typed.
func (s *screen) prompt(program string, args []string) {
	if s.column != 0 {
		s.row, s.column = s.row+1, 0
	}
	if s.row > 0 {
		s.row++ // an empty line before the next prompt
	}
	text := strings.Join(append([]string{program}, args...), " ")
	r := s.line(s.row)
	r.command = true
	r.versions = []version{{s.now, text}}
	s.row++
	s.now += time.Duration(len(text))*typing + typing*5
	s.began = s.now
}

// ends adds time for reading after a command has ended.
func (s *screen) ends(took time.Duration) { s.now = s.began + took + reading }

// write shows bytes that came at that time after the start of the command.
func (s *screen) write(at time.Duration, text []byte) error {
	s.now = s.began + at
	text = append(s.rest, text...)
	s.rest = nil
	touched := map[int]bool{}
	for len(text) > 0 {
		switch {
		case text[0] == '\n':
			s.row, s.column, text = s.row+1, 0, text[1:]
		case text[0] == '\r':
			s.column, text = 0, text[1:]
		case text[0] == 0x1b:
			n, err := s.control(text, touched)
			if err != nil {
				return err
			}
			if n == 0 {
				s.rest = slices.Clone(text)
				text = nil
			}
			text = text[n:]
		case !utf8.FullRune(text):
			s.rest = slices.Clone(text)
			text = nil
		default:
			r, n := utf8.DecodeRune(text)
			s.put(r, touched)
			text = text[n:]
		}
	}
	for at := range touched {
		s.rows[at].shows(s.now)
	}
	return nil
}

func (s *screen) put(r rune, touched map[int]bool) {
	if s.column >= s.columns { // the terminal goes on in the next line
		s.row, s.column = s.row+1, 0
	}
	cells := &s.line(s.row).cells
	for len(*cells) <= s.column {
		*cells = append(*cells, ' ')
	}
	(*cells)[s.column] = r
	s.column++
	touched[s.row] = true
}

// control carries out a control sequence, and returns its length; 0: its end has not come yet.
func (s *screen) control(text []byte, touched map[int]bool) (n int, err error) {
	if len(text) < 2 {
		return 0, nil
	}
	end := slices.IndexFunc(text[2:], func(b byte) bool { return b >= 0x40 })
	if text[1] != '[' {
		return 0, fmt.Errorf("the terminal is told %q, which is not known here", text)
	}
	if end < 0 {
		return 0, nil
	}
	n = end + 3
	arguments, order := string(text[2:n-1]), text[n-1]
	count := 1
	if arguments != "" {
		if count, err = strconv.Atoi(arguments); err != nil && order != 'm' {
			return 0, fmt.Errorf("the terminal is told %q: %w", text[:n], err)
		}
	}
	switch order {
	case 'A': // up
		s.row = max(0, s.row-count)
	case 'J': // erase from here to the end of the screen
		for at := s.row; at < len(s.rows); at++ {
			from := 0
			if at == s.row {
				from = s.column
			}
			s.rows[at].erase(from)
			touched[at] = true
		}
	case 'K': // and to the end of the line
		s.line(s.row).erase(s.column)
		touched[s.row] = true
	default:
		return 0, fmt.Errorf("the terminal is told %q, which is not known here", text[:n])
	}
	return n, nil
}

func (r *row) erase(from int) {
	if from < len(r.cells) {
		r.cells = r.cells[:from]
	}
}

// shows records what the row shows now. A version that is replaced at once is left out, because no viewer could see it.
func (r *row) shows(now time.Duration) {
	text := strings.TrimRight(string(r.cells), " ")
	last := len(r.versions) - 1
	switch {
	case last < 0 && text == "":
	case last >= 0 && r.versions[last].text == text:
	case last >= 0 && now-r.versions[last].from < redraw:
		r.versions[last].text = text
	default:
		r.versions = append(r.versions, version{now, text})
	}
}
