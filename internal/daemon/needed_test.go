// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// leaveUnheard writes files of a migration to this host whose switch had begun, and whose QEMU has ended since. The
// next daemon gives it up. Its source, which cannot be asked, may still send Run.
func leaveUnheard(t *testing.T, stateDir, id string) {
	t.Helper()
	dir := filepath.Join(stateDir, "incoming", id)
	facts := fmt.Sprintf(`{"version":%d,"request":{"id":%q,"protocol":2,"token":"secret",`+
		`"pageAddresses":["127.0.0.1:1"]},"qemu":{"pid":%d,"start_time":1,"boot_id":"another"}}`,
		version.State, id, os.Getpid())
	pages := make([]byte, 4096)
	binary.NativeEndian.PutUint64(pages, 0x6d696772_00000000|version.State)
	binary.NativeEndian.PutUint64(pages[11*8:], uint64(time.Now().UnixNano())) // when the switch began
	if err := errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "migration.json"), []byte(facts), 0o600),
		os.WriteFile(filepath.Join(dir, "pages"), pages, 0o600),
	); err != nil {
		t.Fatal(err)
	}
}

// expectIDTaken expects that a source is refused the id, with a remedy.
func expectIDTaken(t *testing.T, what string, err error) {
	t.Helper()
	if status.Code(err) != codes.AlreadyExists || migration.Remedy(migration.FromStatus(err)) == "" {
		t.Errorf("%s: %v (%s)", what, err, migration.Remedy(migration.FromStatus(err)))
	}
}

// TestUnheardAnswerIsKept: that the VM never ran here is forgotten neither for another migration of the id nor to make
// room for others, until the source has heard it. The id of a migration that cannot be read is nobody else's, either.
func TestUnheardAnswerIsKept(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.StateDir = "127.0.0.1:0", t.TempDir()
	leaveUnheard(t, cfg.StateDir, "unheard")
	newerFile(t, cfg.StateDir, "incoming", "unread", "migration.json")
	d, _ := startConfigured(t, cfg)
	expect := func(id string) error {
		destination, err := d.expectIncoming(t.Context(), &migratedv1.PrepareIncomingRequest{Id: id})
		if err == nil {
			err = destination.Abort("the test has what it wants")
		}
		return err
	}
	expectIDTaken(t, "a migration that cannot be read", expect("unread"))
	expectIDTaken(t, "an answer that the source has not heard", expect("unheard"))
	before := mostNeeded
	mostNeeded = 1
	if err := expect("one too many"); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("where no more can be remembered: %v", err)
	}
	mostNeeded = before
	for i := range keptMigrations + 1 {
		if err := expect(fmt.Sprintf("m-%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	old := d.migrations.destination("unheard")
	if old == nil || d.migrations.destination("m-0") != nil {
		t.Fatalf("forgotten: %t; the first of the others: %t", old == nil, d.migrations.destination("m-0") == nil)
	}
	if _, err := old.Run(t.Context(), &migratedv1.RunRequest{Id: "unheard"}); !errors.Is(err, migration.ErrNotRun) {
		t.Errorf("Run: %v", err)
	}
	old.Heard()
	if err := expect("unheard"); err != nil {
		t.Errorf("when the source has heard: %v", err)
	}
}

// undecided is a migration that is over and must not be forgotten.
type undecided struct{ *migration.Leftover }

func (undecided) Needed() error { return errors.New("it is not decided where the VM is") }

// forgettable is a migration that is over.
type forgettable struct{ *migration.Leftover }

func (forgettable) Needed() error { return nil }

// TestUndecidedIsNotForgotten: room is made by migrations that are not needed any more, and by no others.
func TestUndecidedIsNotForgotten(t *testing.T) {
	type over interface {
		tracked
		Needed() error
	}
	r, all := newRegistry(), map[string]over{}
	add := func(id string, m over) {
		all[id] = m
		r.show(m)
	}
	leftover := func(id string) *migration.Leftover {
		return migration.NewLeftover(id, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, errors.New("over"))
	}
	defer r.shown.Close()
	add("undecided", undecided{leftover("undecided")})
	for i := range keptMigrations - 1 {
		id := fmt.Sprintf("m-%d", i)
		add(id, forgettable{leftover(id)})
	}
	if forgotten := forgetOld(r, all); len(forgotten) != 1 || forgotten[0] == "undecided" || all["undecided"] == nil {
		t.Errorf("forgotten: %v", forgotten)
	}
}

// TestNothingBeginsWhenTheDaemonStops: a QEMU that is started while the daemon waits for the end of its migrations
// would be left without it.
func TestNothingBeginsWhenTheDaemonStops(t *testing.T) {
	d := startPlain(t)
	spec := &migratedv1.MigrationSpec{Vm: filepath.Join(t.TempDir(), "qmp.sock"), Destination: "127.0.0.1:1"}
	control := &controlService{daemon: d}
	if _, err := control.Prepare(t.Context(), &migratedv1.PrepareRequest{Id: "known", Spec: spec}); err != nil {
		t.Fatal(err)
	}
	d.migrations.stop()
	destination, err := d.expectIncoming(t.Context(), &migratedv1.PrepareIncomingRequest{Id: "m1"})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("to this host: %v, %v", err, destination.Abort("the daemon would wait for it"))
	}
	_, err = control.Prepare(t.Context(), &migratedv1.PrepareRequest{Id: "m2", Spec: spec})
	if status.Code(err) != codes.Unavailable || d.migrations.source("m2") != nil {
		t.Errorf("away from this host: %v", err)
	}
	if _, err := control.Prepare(t.Context(), &migratedv1.PrepareRequest{Id: "known", Spec: spec}); err != nil {
		t.Errorf("one that is known: %v", err)
	}
}

// TestOwnHost: a migration comes back to the host that it leaves only if it is the same one. Another one of its id is
// refused as such, and one that is over is in nobody's way.
func TestOwnHost(t *testing.T) {
	d := startPlain(t)
	socket := filepath.Join(t.TempDir(), "qmp.sock")
	silent, err := net.Listen("unix", socket) // the migration goes on until it is cancelled
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	spec := &migratedv1.MigrationSpec{Vm: socket, Destination: "127.0.0.1:1"}
	s, err := (&controlService{daemon: d}).source(t.Context(), "new-kernel", spec)
	if err != nil {
		t.Fatal(err)
	}
	request := &migratedv1.PrepareIncomingRequest{Id: "new-kernel", Spec: spec}
	if err := d.refuseOwnHost(request); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("the same migration: %v", err)
	}
	request.Spec = &migratedv1.MigrationSpec{Vm: socket, Destination: "host-a:7600"}
	expectIDTaken(t, "another migration", d.refuseOwnHost(request))
	if err := s.Cancel(); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if err := d.refuseOwnHost(request); err != nil {
		t.Errorf("when the one away from here is over: %v", err)
	}
}
