// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// throttled is the display for output that is not a terminal. It prints each new
// state at once, and the figures of a state at most once an interval. It uses the
// times in the messages, so that its output depends only on the messages.
type throttled struct {
	interval time.Duration
	print    func(*migratedv1.Migration)

	printed *migratedv1.Migration // the last one that was printed
}

func (t *throttled) show(m *migratedv1.Migration) {
	// If the clock was set back, passed is negative, and the migration is printed.
	passed := m.GetUpdateTime().AsTime().Sub(t.printed.GetUpdateTime().AsTime())
	if t.printed != nil && t.printed.GetState() == m.GetState() && t.printed.GetPrepared() == m.GetPrepared() &&
		t.printed.GetLocation() == m.GetLocation() &&
		passed >= 0 && passed < t.interval {
		return
	}
	t.printed = m
	t.print(m)
}

func (t *throttled) close() {}

// plainLine describes a migration in one line for a log.
func plainLine(m *migratedv1.Migration) string { return lineOf(m, m.GetId()) }

// lineOf is plainLine with another name for the migration.
func lineOf(m *migratedv1.Migration, name string) string {
	prefix := m.GetUpdateTime().AsTime().Local().Format(time.TimeOnly) + " " + name + " "
	state := migration.StateName(m.GetState())
	switch m.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE:
		return prefix + state + " " + percent(m.GetProgress()) + ", " + strings.Join(figures(m.GetProgress()), ", ")
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		return prefix + summary(m)
	case migratedv1.MigrationState_MIGRATION_STATE_REHEARSED:
		return prefix + rehearsalSummary(m)
	case migratedv1.MigrationState_MIGRATION_STATE_FAILED, migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return prefix + state + ": " + m.GetError().GetMessage()
	default:
		return prefix + state + ": " + stateMeaning(m)
	}
}

// columns returns the width of a terminal; 0: f is not a terminal.
func columns(f *os.File) int {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return int(size.Col)
}

// leastText is the shortest width beside the indentation for which a line is wrapped.
const leastText = 20

// wrapped breaks a line between words so that it fits into width columns. Continued lines are indented by indent
// columns. With a width of 0 the line is not broken.
func wrapped(line string, indent, width int) string {
	if width < indent+leastText {
		return line
	}
	var out strings.Builder
	rest := []rune(line)
	for len(rest) > width {
		end := width
		for end > indent && rest[end] != ' ' {
			end--
		}
		if end <= indent { // the word is longer than a line
			end = width
		}
		out.WriteString(strings.TrimRight(string(rest[:end]), " ") + "\n")
		rest = []rune(strings.Repeat(" ", indent) + strings.TrimLeft(string(rest[end:]), " "))
	}
	out.WriteString(string(rest))
	return out.String()
}

// isTerminalFile reports whether f is a terminal.
func isTerminalFile(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
