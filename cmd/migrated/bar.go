// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"unicode/utf8"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// bar is the display for a terminal: two lines that mpb redraws in place, and
// a summary when the migration is over.
type bar struct {
	progress *mpb.Progress
	bar      *mpb.Bar
	out      *os.File
	now      atomic.Pointer[migratedv1.Migration] // drawn by mpb's goroutine
}

// newBar returns a bar that draws on terminal until close.
func newBar(terminal *os.File) *bar {
	b := &bar{progress: mpb.New(mpb.WithOutput(terminal)), out: terminal}
	line := func(i int) mpb.BarFillerFunc {
		return func(w io.Writer, s decor.Statistics) error {
			text := frame(b.now.Load(), s.AvailableWidth)[i]
			if i == 0 {
				text = "\r" + text // overwrites a ^C that the terminal echoed
			} else {
				text += "\n" // mpb ends only the first line
			}
			_, err := io.WriteString(w, text)
			return err
		}
	}
	// Add fails only after Wait.
	b.bar, _ = b.progress.Add(1, line(0), mpb.BarFillerTrim(), mpb.BarBtmExtender(line(1)))
	return b
}

func (b *bar) show(m *migratedv1.Migration) { b.now.Store(m) }

func (b *bar) close() {
	b.bar.Abort(false) // leaves the lines on the screen
	b.progress.Wait()
	switch m := b.now.Load(); m.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		fmt.Fprintln(b.out, wrapped(m.GetId()+" "+summary(m), 2, columns(b.out)))
	case migratedv1.MigrationState_MIGRATION_STATE_REHEARSED:
		fmt.Fprintln(b.out, wrapped(m.GetId()+" "+rehearsalSummary(m), 2, columns(b.out)))
	}
}

const (
	maxFrameWidth = 100 // a bar across a very wide screen is hard to read
	minBarWidth   = 10  // a shorter bar shows less than the percentage
)

// style is the style of the bar in a frame.
var style = mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding("-").Rbound("]")

// frame draws a migration as two lines of at most width columns:
//
//	db-1 postcopy-active [==========>-------------]  43.1%
//	  442/1024 pages  812.4 MB/s  3.0 s left  downtime 2.4 ms
func frame(m *migratedv1.Migration, width int) [2]string {
	if m == nil {
		return [2]string{"", ""}
	}
	width = min(width, maxFrameWidth)
	head := m.GetId() + " " + migration.StateName(m.GetState()) + " "
	tail := fmt.Sprintf(" %6s", percent(m.GetProgress()))
	first := head + strings.TrimSpace(tail)
	if room := width - utf8.RuneCountInString(head) - len(tail); room >= minBarWidth {
		first = head + drawBar(fraction(m.GetProgress()), room) + tail
	}
	return [2]string{cut(first, width), cut(below(m, width), width)}
}

// below returns the second line of a frame: figures while memory is transferred,
// otherwise the meaning of the state.
func below(m *migratedv1.Migration, width int) string {
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE {
		return "  " + stateMeaning(m)
	}
	text := ""
	for _, figure := range figures(m.GetProgress()) {
		longer := text + "  " + figure
		if text != "" && utf8.RuneCountInString(longer) > width {
			break
		}
		text = longer
	}
	return text
}

// drawBar draws a bar of width columns, of which done (0 to 1) is filled.
func drawBar(done float64, width int) string {
	const whole = 1 << 20
	var b bytes.Buffer
	// Writing to a buffer does not fail.
	_ = style.Build().Fill(&b, decor.Statistics{
		AvailableWidth: width, Total: whole, Current: int64(done * whole), Completed: done >= 1,
	})
	return b.String()
}

// cut shortens a line to width columns.
func cut(line string, width int) string {
	if utf8.RuneCountInString(line) <= width {
		return line
	}
	return string([]rune(line)[:max(width, 0)])
}
