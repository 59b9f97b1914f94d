// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// crowd adds n migrations from one host, of at most most, to a registry.
func crowd(t *testing.T, r *registry, sender string, n, most int) error {
	t.Helper()
	for i := range n {
		id := fmt.Sprintf("%s-%d", sender, i)
		d, _, err := r.addDestination(id, sender, most, func() *migration.Destination {
			return migration.NewDestination(t.Context(), migration.DestinationConfig{
				Request: &migratedv1.PrepareIncomingRequest{Id: id}, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
			})
		})
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = d.Abort("the test is over") })
	}
	return nil
}

// TestMigrationsAtOnce: a host that has half of the migrations that may come is refused another one, other hosts are
// not.
func TestMigrationsAtOnce(t *testing.T) {
	r := newRegistry()
	if err := crowd(t, r, "a", 2, 4); err != nil {
		t.Fatal(err)
	}
	var crowded *crowdedError
	if err := crowd(t, r, "a", 1, 4); !errors.Is(err, errIDTaken) {
		t.Errorf("an id that is taken: %v", err)
	}
	r.destinations["a-9"], r.senders["a-9"] = r.destinations["a-0"], "a"
	delete(r.destinations, "a-0")
	if err := crowd(t, r, "a", 1, 4); !errors.As(err, &crowded) || crowded.sender != "a" {
		t.Errorf("a third of a: %v", err)
	}
	if err := crowd(t, r, "b", 2, 4); err != nil {
		t.Errorf("b is refused: %v", err)
	}
	if err := crowd(t, r, "c", 1, 4); !errors.As(err, &crowded) || crowded.sender != "" {
		t.Errorf("a fifth in all: %v", err)
	}
	if err := r.destinations["a-9"].Abort("it is over"); err != nil {
		t.Fatal(err)
	}
	<-r.destinations["a-9"].Done()
	if err := crowd(t, r, "c", 1, 4); err != nil {
		t.Errorf("there is room again: %v", err)
	}
}

// TestFailedAttemptsAreForgotten: only keptMigrations of the failed attempts are remembered and have a directory.
func TestFailedAttemptsAreForgotten(t *testing.T) {
	d := startPlain(t)
	for i := range keptMigrations + 10 {
		id := fmt.Sprintf("m-%d", i)
		destination, err := d.expectIncoming(t.Context(), &migratedv1.PrepareIncomingRequest{Id: id})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := destination.Prepare(t.Context()); err == nil {
			t.Fatal("a VM without a command line was prepared")
		}
	}
	entries, err := os.ReadDir(d.incomingDir())
	if err != nil || len(entries) != keptMigrations || len(d.migrations.senders) != keptMigrations {
		t.Errorf("%d directories, %d senders, want %d (%v)", len(entries), len(d.migrations.senders), keptMigrations, err)
	}
	if err := migration.RemoveEnded(d.incomingDir()); err != nil {
		t.Error(err)
	}
	if _, err := os.ReadDir(filepath.Join(d.incomingDir(), "m-20")); err == nil {
		t.Error("a restart keeps directories of what is over")
	}
}
