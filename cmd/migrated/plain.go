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

// throttled is the display for whatever is no terminal: it prints each new
// state at once and a state's figures at most once an interval. Time is the
// daemon's, so that what is printed depends on nothing but what was sent.
type throttled struct {
	interval time.Duration
	print    func(*migratedv1.Migration)

	printed *migratedv1.Migration // the last one
}

func (t *throttled) show(m *migratedv1.Migration) {
	// A clock that was put back, by hours perhaps, must not silence it for as long.
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
func plainLine(m *migratedv1.Migration) string {
	prefix := m.GetUpdateTime().AsTime().Local().Format(time.TimeOnly) + " " + m.GetId() + " "
	name := migration.StateName(m.GetState())
	switch m.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE:
		return prefix + name + " " + percent(m.GetProgress()) + ", " + strings.Join(figures(m.GetProgress()), ", ")
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		return prefix + summary(m)
	case migratedv1.MigrationState_MIGRATION_STATE_REHEARSED:
		return prefix + rehearsalSummary(m)
	case migratedv1.MigrationState_MIGRATION_STATE_FAILED, migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return prefix + name + ": " + m.GetError().GetMessage()
	default:
		return prefix + name + ": " + stateMeaning(m)
	}
}

// isTerminalFile reports whether f is a terminal.
func isTerminalFile(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
