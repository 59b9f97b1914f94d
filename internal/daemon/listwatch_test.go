// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/listing"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// silentVM returns the address of a monitor that never answers: a migration of its VM waits for it.
func silentVM(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeQuietly(l) })
	return path
}

// reasonOf returns the reason in the details of a status.
func reasonOf(err error) migratedv1.Reason {
	for _, detail := range status.Convert(err).Details() {
		if e, ok := detail.(*migratedv1.MigrationError); ok {
			return e.GetReason()
		}
	}
	return migratedv1.Reason_REASON_UNSPECIFIED
}

// TestWatchList: a watcher from the version of a list receives all events of a migration, up to its deletion.
func TestWatchList(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	before, err := client.List(t.Context(), &migratedv1.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	filter := &migratedv1.MigrationFilter{Labels: map[string]string{"team": "db"}}
	stream, err := client.WatchList(t.Context(),
		&migratedv1.WatchListRequest{ResourceVersion: before.GetResourceVersion(), Filter: filter})
	if err != nil {
		t.Fatal(err)
	}
	spec := &migratedv1.MigrationSpec{
		Vm: filepath.Join(t.TempDir(), "qmp.sock"), Destination: "127.0.0.1:1",
		Labels: map[string]string{"team": "db", "x": "y"},
	}
	other := &migratedv1.MigrationSpec{Vm: spec.GetVm(), Destination: "127.0.0.1:1"}
	for id, spec := range map[string]*migratedv1.MigrationSpec{"ours": spec, "other": other} {
		if _, err := client.Start(t.Context(), &migratedv1.StartRequest{Id: id, Spec: spec}); err != nil {
			t.Fatal(err)
		}
		awaitEnd(t, client, id)
	}
	if _, err := client.Delete(t.Context(), &migratedv1.DeleteRequest{Id: "ours"}); err != nil {
		t.Fatal(err)
	}
	var events []migratedv1.ListEvent
	var last *migratedv1.WatchListResponse
	for last.GetEvent() != migratedv1.ListEvent_LIST_EVENT_REMOVED {
		if last, err = stream.Recv(); err != nil {
			t.Fatal(err)
		}
		if last.GetMigration().GetId() != "ours" {
			t.Fatalf("it is told of %v", last)
		}
		events = append(events, last.GetEvent())
	}
	m := last.GetMigration()
	if events[0] != migratedv1.ListEvent_LIST_EVENT_ADDED || len(events) < 2 ||
		slices.Contains(events[1:], migratedv1.ListEvent_LIST_EVENT_ADDED) ||
		m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED || m.GetEndTime() == nil || m.GetStartTime() == nil {
		t.Errorf("it was told of %v, and at last of %v", events, m)
	}
	after, err := client.List(t.Context(), &migratedv1.ListRequest{PageSize: 1})
	if err != nil || len(after.GetMigrations()) != 1 || after.GetMigrations()[0].GetId() != "other" ||
		after.GetNextPageToken() != "" {
		t.Errorf("it is listed: %v, %v", after, err)
	}
	for what, err := range map[string]error{
		"Get":          second(client.Get(t.Context(), &migratedv1.GetRequest{Id: "ours"})),
		"Report":       second(client.Report(t.Context(), &migratedv1.ReportRequest{Id: "ours"})),
		"Delete again": second(client.Delete(t.Context(), &migratedv1.DeleteRequest{Id: "ours"})),
	} {
		if status.Code(err) != codes.NotFound {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := client.Start(t.Context(), &migratedv1.StartRequest{Id: "ours", Spec: other}); err != nil {
		t.Errorf("its id cannot be used again: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

// TestWatchListFromTheBeginning: a watcher without a version first receives all migrations.
func TestWatchListFromTheBeginning(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	spec := &migratedv1.MigrationSpec{Vm: "/nowhere/qmp.sock", Destination: "127.0.0.1:1"}
	for _, id := range []string{"m1", "m2"} {
		if _, err := client.Start(t.Context(), &migratedv1.StartRequest{Id: id, Spec: spec}); err != nil {
			t.Fatal(err)
		}
		awaitEnd(t, client, id)
	}
	stream, err := client.WatchList(t.Context(), &migratedv1.WatchListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		event   migratedv1.ListEvent
		id      string
		version bool
	}{
		{migratedv1.ListEvent_LIST_EVENT_ADDED, "m2", false},
		{migratedv1.ListEvent_LIST_EVENT_ADDED, "m1", false},
		{migratedv1.ListEvent_LIST_EVENT_BOOKMARK, "", true},
	} {
		e, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e.GetEvent() != want.event || e.GetMigration().GetId() != want.id ||
			(e.GetResourceVersion() != "") != want.version {
			t.Errorf("message %d is %v", i, e)
		}
	}
}

func TestWatchListRefuses(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	for version, want := range map[string]codes.Code{"another-7": codes.OutOfRange, "nonsense": codes.InvalidArgument} {
		stream, err := client.WatchList(t.Context(), &migratedv1.WatchListRequest{ResourceVersion: version})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != want || (want == codes.OutOfRange) != (reasonOf(err) == migratedv1.Reason_REASON_LIST_AGAIN) {
			t.Errorf("%q is refused with %v (%v)", version, err, reasonOf(err))
		}
	}
	for name, bad := range map[string]*migratedv1.ListRequest{
		"a large page": {PageSize: 1001}, "a page that is none": {PageToken: "x"},
		"a bad label": {Filter: &migratedv1.MigrationFilter{Labels: map[string]string{"": "v"}}},
	} {
		if _, err := client.List(t.Context(), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWatchersAreBounded: a caller may have WatchersPerCaller watchers, and further ones when these have ended.
func TestWatchersAreBounded(t *testing.T) {
	cfg := config.Default()
	cfg.Listen = "127.0.0.1:0"
	d, conn := startConfigured(t, cfg)
	client := migratedv1.NewControlServiceClient(conn)
	watch := func(ctx context.Context) error {
		stream, err := client.WatchList(ctx, &migratedv1.WatchListRequest{})
		if err != nil {
			return err
		}
		_, err = stream.Recv() // the bookmark
		return err
	}
	ctx, leave := context.WithCancel(t.Context())
	for i := range limits.WatchersPerCaller {
		if err := watch(ctx); err != nil {
			t.Fatalf("watcher %d: %v", i, err)
		}
	}
	if err := watch(t.Context()); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: %v", err)
	}
	if n := d.refusals.ByKind()[string(limits.Watching)]; n != 1 {
		t.Errorf("%d refusals are counted", n)
	}
	leave()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		err := watch(t.Context())
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("when all have left: %v", err)
		}
	}
}

// TestWatchListEndsWithTheDaemon: when the daemon stops, a watcher receives the last states of migrations, and an
// error.
func TestWatchListEndsWithTheDaemon(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.StateDir, cfg.LogDir =
		"127.0.0.1:0", filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "log")
	cfg.Socket = filepath.Join(t.TempDir(), "control.sock")
	_, stop, ended := runDaemon(t, cfg)
	client := migratedv1.NewControlServiceClient(connectSocket(t, cfg.Socket))
	stream, err := client.WatchList(t.Context(), &migratedv1.WatchListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	spec := &migratedv1.MigrationSpec{Vm: silentVM(t), Destination: "127.0.0.1:1"}
	if _, err := client.Start(t.Context(), &migratedv1.StartRequest{Id: "m1", Spec: spec}); err != nil {
		t.Fatal(err)
	}
	stop()
	var last *migratedv1.Migration
	for {
		e, err := stream.Recv()
		if err != nil {
			if status.Code(err) != codes.Unavailable {
				t.Errorf("it ended with %v", err)
			}
			break
		}
		if e.GetMigration() != nil {
			last = e.GetMigration()
		}
	}
	if last.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED {
		t.Errorf("at last it was told of %v", last)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestDeleteIsRefusedUnderWay: a migration under way cannot be deleted, and can when it is cancelled.
func TestDeleteIsRefusedUnderWay(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	spec := &migratedv1.MigrationSpec{Vm: silentVM(t), Destination: "127.0.0.1:1"}
	if _, err := client.Prepare(t.Context(), &migratedv1.PrepareRequest{Id: "m1", Spec: spec}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Delete(
		t.Context(), &migratedv1.DeleteRequest{Id: "m1"},
	); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Delete: %v", err)
	}
	if _, err := client.Cancel(t.Context(), &migratedv1.CancelRequest{Id: "m1"}); err != nil {
		t.Fatal(err)
	}
	if m := awaitEnd(t, client, "m1"); m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_CANCELLED ||
		m.GetEndTime() == nil {
		t.Errorf("it ended as %v", m)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) { // until it has released its VM
		_, err := client.Delete(t.Context(), &migratedv1.DeleteRequest{Id: "m1"})
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// TestPrepareLimit: the migration of a VM that does not answer fails after prepare_limit. It is not cancelled.
func TestPrepareLimit(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	spec := &migratedv1.MigrationSpec{
		Vm: silentVM(t), Destination: "127.0.0.1:1", PrepareLimit: durationpb.New(time.Second),
	}
	if _, err := client.Start(t.Context(), &migratedv1.StartRequest{Id: "m1", Spec: spec}); err != nil {
		t.Fatal(err)
	}
	m := awaitEnd(t, client, "m1")
	e := m.GetError()
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED ||
		e.GetReason() != migratedv1.Reason_REASON_LIMIT_MISSED ||
		!strings.Contains(e.GetMessage(), "prepare_limit: it was not prepared within 1s") ||
		!strings.Contains(e.GetRemedy(), "--prepare-limit") {
		t.Errorf("it ended as %v", m)
	}
	if !migration.Terminal(m.GetState()) || m.GetOverdue() {
		t.Errorf("it is overdue: %v", m)
	}
}

// TestSlowWatcherListsAgain: a watcher that is too slow has to list again, because events are not kept for it.
func TestSlowWatcherListsAgain(t *testing.T) {
	list := listing.New(time.Now)
	m := &migratedv1.Migration{Id: "m1"}
	changed := make(chan struct{})
	close(changed) // always
	entry := list.Add(func() (*migratedv1.Migration, <-chan struct{}) { return proto.CloneOf(m), changed })
	sent := 0
	w := &listWatcher{list: list, send: func(*migratedv1.WatchListResponse) error {
		sent++
		for range 5000 { // changes while the message is sent
			m.Prepared = !m.GetPrepared()
			entry.Refresh()
		}
		return nil
	}}
	err := w.follow(t.Context(), make(chan struct{}), time.Hour)
	if status.Code(err) != codes.OutOfRange || reasonOf(err) != migratedv1.Reason_REASON_LIST_AGAIN || sent != 1 {
		t.Errorf("after %d messages it ended with %v (%v)", sent, err, reasonOf(err))
	}
}

// TestBookmarks: while nothing changes, a watcher receives bookmarks with its version.
func TestBookmarks(t *testing.T) {
	list := listing.New(time.Now)
	list.Add(func() (*migratedv1.Migration, <-chan struct{}) { return &migratedv1.Migration{Id: "m1"}, nil })
	enough := errors.New("enough")
	var got []*migratedv1.WatchListResponse
	w := &listWatcher{list: list, send: func(e *migratedv1.WatchListResponse) error {
		if got = append(got, e); len(got) == 3 {
			return enough
		}
		return nil
	}}
	if err := w.follow(t.Context(), make(chan struct{}), time.Millisecond); !errors.Is(err, enough) {
		t.Fatal(err)
	}
	for i, want := range []migratedv1.ListEvent{
		migratedv1.ListEvent_LIST_EVENT_ADDED, migratedv1.ListEvent_LIST_EVENT_BOOKMARK,
		migratedv1.ListEvent_LIST_EVENT_BOOKMARK,
	} {
		if got[i].GetEvent() != want || got[i].GetResourceVersion() != list.Text(1) {
			t.Errorf("message %d is %v", i, got[i])
		}
	}
}

// TestDeleteReport: a migration that is not in the list any more can be deleted if it has a report.
func TestDeleteReport(t *testing.T) {
	cfg := config.Default()
	cfg.Listen = "127.0.0.1:0"
	d, conn := startConfigured(t, cfg)
	client := migratedv1.NewControlServiceClient(conn)
	for _, role := range []migratedv1.MigrationRole{
		migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
	} {
		m := &migratedv1.Migration{Id: "old", Role: role, State: migratedv1.MigrationState_MIGRATION_STATE_FAILED}
		if err := d.reports.Keep(&migratedv1.Report{Migration: m}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.Report(t.Context(), &migratedv1.ReportRequest{Id: "old"}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []codes.Code{codes.OK, codes.NotFound} {
		if _, err := client.Delete(t.Context(), &migratedv1.DeleteRequest{Id: "old"}); status.Code(err) != want {
			t.Errorf("Delete: %v, want %v", err, want)
		}
	}
	if _, err := client.Report(t.Context(), &migratedv1.ReportRequest{Id: "old"}); status.Code(err) != codes.NotFound {
		t.Errorf("the report of one that is deleted: %v", err)
	}
	if left, err := os.ReadDir(d.reportsDir()); err != nil || len(left) != 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
}
