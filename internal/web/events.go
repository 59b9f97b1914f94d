// SPDX-License-Identifier: Apache-2.0

package web

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	eventsPath = "/events"
	// eventsInterval is how often changes are sent to the page. After quietTime without changes, a comment is sent, so
	// that the connection stays open.
	eventsInterval = 500 * time.Millisecond
	quietTime      = 15 * time.Second
	// cells is the number of cells in the page's map of memory.
	cells = 1024
)

// events sends changes to the page, as server-sent events with messages of the control API:
//
//	version     once: GetVersion's answer
//	migrations  first all migrations; then those that are new or changed, and the keys (ID/ROLE) of those that are gone
//	one         about the chosen migration (?id=ID&role=ROLE): its Report, the meaning of its state, and
//	            GetIncoming's answer or error
//	end         the daemon stops
type events struct {
	control  migratedv1.ControlServiceClient
	stopping <-chan struct{}
}

// ServeHTTP sends events until the page disconnects or the daemon stops.
func (e *events) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	version, err := e.control.GetVersion(ctx, &migratedv1.GetVersionRequest{})
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, status.Code(err), status.Convert(err).Message(), "try again")
		return
	}
	s := &eventStream{events: e, id: r.URL.Query().Get("id"), seen: make(map[string]sentState)}
	s.role = migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE
	if r.URL.Query().Get("role") == "destination" {
		s.role = migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION
	}
	w.Header().Set("Content-Type", "text/event-stream")
	flush := http.NewResponseController(w)
	s.event("version", encoded(version))
	ticker := time.NewTicker(eventsInterval)
	defer ticker.Stop()
	for sent := time.Now(); ; {
		if err := s.addChanges(ctx); err != nil {
			return // the browser connects again
		}
		if s.pending.Len() == 0 && time.Since(sent) > quietTime {
			s.pending.WriteString(":\n\n")
		}
		if s.pending.Len() > 0 {
			if _, err := s.pending.WriteTo(w); err != nil || flush.Flush() != nil {
				return
			}
			sent = time.Now()
		}
		select {
		case <-ctx.Done():
			return
		case <-e.stopping:
			s.event("end", []byte("{}"))
			_, _ = s.pending.WriteTo(w)
			return
		case <-ticker.C:
		}
	}
}

// eventStream is the stream of events of one page.
type eventStream struct {
	*events

	id      string // of the chosen migration; empty: none
	role    migratedv1.MigrationRole
	seen    map[string]sentState // by key of the migrations that were sent
	last    []byte               // what was last sent about the chosen migration, without times
	listed  bool                 // all migrations were sent
	pending bytes.Buffer         // events that were not sent yet
}

// sentState identifies the state of a migration that was sent.
type sentState struct {
	updated time.Time
	state   migratedv1.MigrationState
}

// event adds an event to pending.
func (s *eventStream) event(name string, data []byte) {
	fmt.Fprintf(&s.pending, "event: %s\ndata: %s\n\n", name, data)
}

// addChanges adds events about all that has changed since the last call.
func (s *eventStream) addChanges(ctx context.Context) error {
	var all []*migratedv1.Migration
	for request := new(migratedv1.ListRequest); ; {
		answer, err := s.control.List(ctx, request)
		if err != nil {
			return err
		}
		all = append(all, answer.GetMigrations()...)
		if request.PageToken = answer.GetNextPageToken(); request.PageToken == "" {
			break
		}
	}
	s.list(all)
	if s.id == "" {
		return nil
	}
	return s.one(ctx)
}

// list adds an event about migrations that are new, changed or gone.
func (s *eventStream) list(migrations []*migratedv1.Migration) {
	list := struct {
		All        bool              `json:"all"`
		Migrations []json.RawMessage `json:"migrations"`
		Gone       []string          `json:"gone"`
	}{!s.listed, []json.RawMessage{}, []string{}}
	now := make(map[string]sentState, len(migrations))
	for _, m := range migrations {
		key := m.GetId() + "/" + migration.RoleName(m.GetRole())
		now[key] = sentState{m.GetUpdateTime().AsTime(), m.GetState()}
		if before, known := s.seen[key]; !known || before != now[key] {
			list.Migrations = append(list.Migrations, encoded(m))
		}
	}
	for key := range s.seen {
		if _, there := now[key]; !there {
			list.Gone = append(list.Gone, key)
		}
	}
	s.seen, s.listed = now, true
	if list.All || len(list.Migrations) > 0 || len(list.Gone) > 0 {
		s.event("migrations", marshal(list))
	}
}

// one adds an event about the chosen migration, unless the migration is over and its last state was sent. Until then it
// adds one even if nothing has changed, because the page shows for how long that has been so.
func (s *eventStream) one(ctx context.Context) error {
	var shown struct {
		Report        json.RawMessage `json:"report,omitempty"`
		Words         string          `json:"words,omitempty"`
		Incoming      json.RawMessage `json:"incoming,omitempty"`
		IncomingError json.RawMessage `json:"incomingError,omitempty"`
		Error         json.RawMessage `json:"error,omitempty"`
	}
	answer, err := s.control.Report(ctx, &migratedv1.ReportRequest{Id: s.id, Role: s.role})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	over := err != nil
	var same []byte // what is sent, without times
	if err != nil {
		shown.Error = encoded(status.Convert(err).Proto())
		same = shown.Error
	} else {
		report := answer.GetReport()
		shown.Report, shown.Words = encoded(report), migration.Meaning(report.GetMigration())
		over = migration.Terminal(report.GetMigration().GetState())
		request := &migratedv1.GetIncomingRequest{Id: s.id, Role: s.role, Cells: cells}
		incoming, err := s.control.GetIncoming(ctx, request)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			shown.Incoming = encoded(incoming.GetIncoming())
		case status.Code(err) != codes.FailedPrecondition && status.Code(err) != codes.NotFound: // these: no memory yet
			shown.IncomingError = encoded(status.Convert(err).Proto())
		}
		report.Time = nil
		if in := incoming.GetIncoming(); in != nil {
			in.Time = nil
		}
		same = bytes.Join([][]byte{encoded(report), encoded(incoming), shown.IncomingError}, nil)
	}
	if over && bytes.Equal(same, s.last) {
		return nil
	}
	s.last = same
	s.event("one", marshal(shown))
	return nil
}

// encoded returns a message as one line of JSON.
func encoded(m proto.Message) []byte {
	text, err := printed.Marshal(m)
	if err != nil { // not expected: the daemon's messages are valid UTF-8 (printable.Valid)
		return []byte("null")
	}
	var line bytes.Buffer
	if err := json.Compact(&line, text); err != nil { // protojson varies its white space on purpose
		return []byte("null")
	}
	return line.Bytes()
}

func marshal(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil { // not expected: v has only texts, and JSON that was made here
		return []byte("null")
	}
	return text
}
