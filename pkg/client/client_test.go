// SPDX-License-Identifier: Apache-2.0

package client_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/client"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	active    = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
	completed = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
	failed    = migratedv1.MigrationState_MIGRATION_STATE_FAILED

	added   = migratedv1.ListEvent_LIST_EVENT_ADDED
	changed = migratedv1.ListEvent_LIST_EVENT_CHANGED
	removed = migratedv1.ListEvent_LIST_EVENT_REMOVED
)

// events is the stream of WatchList.
type events = grpc.ServerStreamingServer[migratedv1.WatchListResponse]

// daemon is a fake daemon. Its answers are those that a test cannot get from a real one at the right time. e2e tests
// the client with real ones.
type daemon struct {
	migratedv1.UnimplementedControlServiceServer

	watch func(nth int, id string, send func(*migratedv1.Migration) error) error

	mu      sync.Mutex
	watched int
	lists   [][]*migratedv1.Migration // one for each List; the last is also for all later calls
	listed  int
	follows []func(from string, stream events) error
	from    []string // the versions from which WatchList was called
}

// start serves at a socket until stop is called.
func (d *daemon) start(t testing.TB, socket string) (stop func()) {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	migratedv1.RegisterControlServiceServer(server, d)
	go func() { _ = server.Serve(listener) }() // until stop
	t.Cleanup(server.Stop)
	return server.Stop
}

func dial(t testing.TB, daemon string) *client.Client {
	t.Helper()
	c, err := client.Dial(daemon, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// refusal is a status with details, as a daemon makes it.
func refusal(code codes.Code, message string, e *migratedv1.MigrationError) error {
	s, err := status.New(code, message).WithDetails(e)
	if err != nil {
		return err
	}
	return s.Err()
}

func (d *daemon) Get(ctx context.Context, r *migratedv1.GetRequest) (*migratedv1.GetResponse, error) {
	switch r.GetId() {
	case "refused":
		return nil, refusal(codes.FailedPrecondition, "the VM cannot migrate", &migratedv1.MigrationError{
			Remedy: "start it anew", VmStatus: "the VM was not touched", Reason: migratedv1.Reason_REASON_VM_REFUSED,
		})
	case "away": // this daemon cannot reach the other host
		return nil, refusal(codes.Unavailable, "host-b cannot be reached", &migratedv1.MigrationError{Remedy: "see why"})
	case "slow":
		<-ctx.Done()
	}
	return nil, status.Error(codes.NotFound, "this daemon knows no migration")
}

func (d *daemon) Start(_ context.Context, r *migratedv1.StartRequest) (*migratedv1.StartResponse, error) {
	return &migratedv1.StartResponse{Migration: &migratedv1.Migration{Id: r.GetId(), Spec: r.GetSpec()}}, nil
}

func (d *daemon) Watch(r *migratedv1.WatchRequest, stream grpc.ServerStreamingServer[migratedv1.WatchResponse]) error {
	d.mu.Lock()
	nth := d.watched
	d.watched++
	d.mu.Unlock()
	return d.watch(nth, r.GetId(), func(m *migratedv1.Migration) error {
		return stream.Send(&migratedv1.WatchResponse{Migration: m})
	})
}

// List returns pages of one migration. Their tokens and versions contain the number of the list.
func (d *daemon) List(_ context.Context, r *migratedv1.ListRequest) (*migratedv1.ListResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at := len(r.GetPageToken())
	if at == 0 {
		d.listed++
	}
	all := d.lists[min(d.listed, len(d.lists))-1]
	page := &migratedv1.ListResponse{ResourceVersion: "list-" + strconv.Itoa(d.listed)}
	if at < len(all) {
		page.Migrations = all[at : at+1]
	}
	if at+1 < len(all) {
		page.NextPageToken = strings.Repeat("x", at+1)
	}
	return page, nil
}

// WatchList runs the next function of follows. The last is also for all later calls.
func (d *daemon) WatchList(r *migratedv1.WatchListRequest, stream events) error {
	d.mu.Lock()
	play := d.follows[min(len(d.from), len(d.follows)-1)]
	d.from = append(d.from, r.GetResourceVersion())
	d.mu.Unlock()
	return play(r.GetResourceVersion(), stream)
}

func at(id string, state migratedv1.MigrationState) *migratedv1.Migration {
	return &migratedv1.Migration{Id: id, State: state}
}

// TestErrors checks the kinds of errors, for programs, and their remedies, for operators.
func TestErrors(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	d := &daemon{}
	stop := d.start(t, socket)
	c := dial(t, "unix://"+socket)
	get := func(ctx context.Context, id string) error {
		_, err := c.Get(ctx, &migratedv1.GetRequest{Id: id})
		return err
	}
	var told *client.Error
	err := get(t.Context(), "refused")
	if !errors.Is(err, client.ErrRefused) || errors.Is(err, client.ErrNotFound) || !errors.As(err, &told) ||
		told.Remedy != "start it anew" || told.Reason != migratedv1.Reason_REASON_VM_REFUSED || told.VMStatus == "" {
		t.Errorf("refused: %#v", err)
	}
	if err := get(t.Context(), "no-such"); !errors.Is(err, client.ErrNotFound) || status.Code(err) != codes.NotFound {
		t.Errorf("not found: %v", err)
	}
	if err := get(t.Context(), "away"); !errors.Is(err, client.ErrRefused) || errors.Is(err, client.ErrUnreachable) {
		t.Errorf("another host is away: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := get(ctx, "slow"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	_, err = c.Delete(t.Context(), &migratedv1.DeleteRequest{})
	if errors.Is(err, client.ErrRefused) || status.Code(err) != codes.Unimplemented {
		t.Errorf("of an older daemon: %v", err)
	}
	stop()
	if err := get(t.Context(), "refused"); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("a daemon that has ended: %v", err)
	}
	c = dial(t, socket)
	if err := get(t.Context(), "refused"); !errors.Is(err, client.ErrUnreachable) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a daemon that is not there: %v", err)
	}
	for _, bad := range []string{"", "unix:", "nonsense"} {
		if _, err := client.Dial(bad, client.Options{}); err == nil {
			t.Errorf("%q is taken for an address", bad)
		}
	}
	if _, err := client.Dial("192.0.2.1:7601", client.Options{}); !errors.Is(err, client.ErrEncryption) {
		t.Errorf("another host without encryption: %v", err)
	}
}

// TestMigrateSurvivesARestart restarts the daemon during a migration.
func TestMigrateSurvivesARestart(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	inTheMiddle, over := make(chan struct{}), make(chan struct{})
	defer close(over)
	first := &daemon{watch: func(_ int, id string, send func(*migratedv1.Migration) error) error {
		err := send(at(id, active))
		<-over
		return err
	}}
	stop := first.start(t, socket)
	go func() {
		<-inTheMiddle
		stop()
		second := &daemon{watch: func(nth int, id string, send func(*migratedv1.Migration) error) error {
			if nth == 0 {
				return status.Error(codes.Unavailable, "it ends, too")
			}
			return send(at(id, completed))
		}}
		for !t.Failed() { // until the socket is free
			if l, err := net.Listen("unix", socket); err == nil {
				server := grpc.NewServer()
				migratedv1.RegisterControlServiceServer(server, second)
				t.Cleanup(server.Stop)
				_ = server.Serve(l) // until the test is over
				return
			}
		}
	}()
	var states []migratedv1.MigrationState
	m, err := dial(t, socket).Migrate(t.Context(), "m1", &migratedv1.MigrationSpec{}, func(m *migratedv1.Migration) {
		if states = append(states, m.GetState()); len(states) == 1 {
			close(inTheMiddle)
		}
	})
	if err != nil || m.GetState() != completed || !slices.Equal(states, []migratedv1.MigrationState{active, completed}) {
		t.Errorf("it was %v, and ended as %v, %v", states, m, err)
	}
}

func TestWaitSaysHowItEnded(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	d := &daemon{watch: func(_ int, id string, send func(*migratedv1.Migration) error) error {
		switch id {
		case "failed":
			return send(&migratedv1.Migration{Id: id, State: failed, Error: &migratedv1.MigrationError{
				Message: "no room", Remedy: "make some", Reason: migratedv1.Reason_REASON_DESTINATION_REFUSED,
			}})
		case "cancelled":
			return send(at(id, migratedv1.MigrationState_MIGRATION_STATE_CANCELLED))
		case "ended":
			return send(at(id, migratedv1.MigrationState_MIGRATION_STATE_ENDED))
		case "twice": // somebody continued the VM at the source
			return send(&migratedv1.Migration{Id: id, State: completed, Error: &migratedv1.MigrationError{
				Message: "somebody continued it", Reason: migratedv1.Reason_REASON_INTERFERED,
			}})
		case "completed":
			return send(at(id, completed))
		case "rehearsed":
			return send(at(id, migratedv1.MigrationState_MIGRATION_STATE_REHEARSED))
		}
		return status.Error(codes.NotFound, "this daemon knows no migration")
	}}
	d.start(t, socket)
	c := dial(t, socket)
	for id, want := range map[string]error{
		"failed": client.ErrFailed, "cancelled": client.ErrCancelled, "ended": client.ErrEnded,
		"rehearsed": nil, "no-such": client.ErrNotFound, "twice": client.ErrFailed, "completed": nil,
	} {
		m, err := c.Wait(t.Context(), id, nil)
		if !errors.Is(err, want) || (m == nil) != (id == "no-such") {
			t.Errorf("%s: %v, %v", id, m, err)
		}
	}
	_, err := c.Wait(t.Context(), "failed", nil)
	var told *client.Error
	if !errors.As(err, &told) || told.Remedy != "make some" ||
		told.Reason != migratedv1.Reason_REASON_DESTINATION_REFUSED {
		t.Errorf("failed: %#v", err)
	}
}

// send sends events. Their versions are base and a number that counts up.
func send(stream events, base string, all ...*migratedv1.WatchListResponse) error {
	for i, e := range all {
		e.ResourceVersion = base + strconv.Itoa(i)
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	return nil
}

func event(what migratedv1.ListEvent, m *migratedv1.Migration) *migratedv1.WatchListResponse {
	return &migratedv1.WatchListResponse{Event: what, Migration: m}
}

// TestFollower checks that a Follower continues where it was after a lost connection. When it is told to list again, it
// does, and reports what has changed meanwhile.
func TestFollower(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	d := &daemon{
		lists: [][]*migratedv1.Migration{
			{at("b", active), at("a", active)},
			{at("d", active), at("a", completed)},
		},
		follows: []func(string, events) error{
			func(_ string, stream events) error {
				err := send(stream, "x", event(added, at("c", active)), event(changed, at("b", completed)))
				return errors.Join(err, status.Error(codes.Unavailable, "a broken wire"))
			},
			func(_ string, stream events) error {
				err := send(stream, "y", event(removed, at("c", active)))
				if err != nil {
					return err
				}
				return refusal(codes.OutOfRange, "too old", &migratedv1.MigrationError{Reason: migratedv1.Reason_REASON_LIST_AGAIN})
			},
			func(_ string, stream events) error {
				<-stream.Context().Done()
				return stream.Context().Err()
			},
		},
	}
	d.start(t, socket)
	var told []string
	synced := 0
	ctx, cancel := context.WithCancel(t.Context())
	f := client.NewFollower(dial(t, socket), nil, client.Handlers{
		Added: func(m *migratedv1.Migration) { told = append(told, "+"+m.GetId()) },
		Changed: func(before, after *migratedv1.Migration) {
			told = append(told, before.GetId()+"="+after.GetState().String()[16:])
		},
		Removed: func(m *migratedv1.Migration) { told = append(told, "-"+m.GetId()) },
		Synced: func() {
			if synced++; synced == 2 {
				cancel()
			}
		},
		Lost: func(err error) {
			if !errors.Is(err, client.ErrUnreachable) {
				t.Errorf("it is lost: %v", err)
			}
			told = append(told, "lost")
		},
	})
	if err := f.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	want := []string{"+a", "+b", "+c", "b=COMPLETED", "lost", "-c", "-b", "a=COMPLETED", "+d"}
	if !slices.Equal(told, want) {
		t.Errorf("it told of\n%v, not of\n%v", told, want)
	}
	if want := []string{"list-1", "x1"}; !slices.Equal(d.from[:2], want) {
		t.Errorf("it watched from %v", d.from)
	}
	var ids []string
	for _, m := range f.Migrations() {
		ids = append(ids, m.GetId())
	}
	if !slices.Equal(ids, []string{"a", "d"}) {
		t.Errorf("it has %v", ids)
	}
}

// TestFollowerEnds checks that Run returns an error that another attempt cannot help.
func TestFollowerEnds(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	d := &daemon{lists: [][]*migratedv1.Migration{nil}, follows: []func(string, events) error{
		func(string, events) error {
			return status.Error(codes.Unimplemented, "unknown method WatchList")
		},
	}}
	d.start(t, socket)
	if err := client.NewFollower(
		dial(t, socket), nil, client.Handlers{},
	).Run(t.Context()); status.Code(err) != codes.Unimplemented {
		t.Errorf("it ended with %v", err)
	}
}
