// SPDX-License-Identifier: Apache-2.0

package web

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// fakeControl is a control API that answers with what the test sets.
type fakeControl struct {
	migratedv1.UnimplementedControlServiceServer

	mu          sync.Mutex
	migrations  []*migratedv1.Migration
	incomingErr error // of GetIncoming
}

func (c *fakeControl) set(incomingErr error, migrations ...*migratedv1.Migration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.migrations, c.incomingErr = migrations, incomingErr
}

func (c *fakeControl) GetVersion(
	context.Context, *migratedv1.GetVersionRequest,
) (*migratedv1.GetVersionResponse, error) {
	return &migratedv1.GetVersionResponse{Version: "v-test"}, nil
}

func (c *fakeControl) List(context.Context, *migratedv1.ListRequest) (*migratedv1.ListResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &migratedv1.ListResponse{Migrations: c.migrations}, nil
}

func (c *fakeControl) Report(_ context.Context, r *migratedv1.ReportRequest) (*migratedv1.ReportResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.migrations {
		if m.GetId() == r.GetId() && m.GetRole() == r.GetRole() {
			return &migratedv1.ReportResponse{Report: &migratedv1.Report{Time: timestamppb.Now(), Migration: m}}, nil
		}
	}
	return nil, status.Error(codes.NotFound, "there is none")
}

func (c *fakeControl) GetIncoming(
	context.Context, *migratedv1.GetIncomingRequest,
) (*migratedv1.GetIncomingResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &migratedv1.GetIncomingResponse{Incoming: &migratedv1.Incoming{Time: timestamppb.Now()}}, c.incomingErr
}

// TestEvents: the page first receives all migrations, then changes, events about the chosen migration while it is under
// way, and an event when the daemon stops.
func TestEvents(t *testing.T) {
	one := func(id string, state migratedv1.MigrationState) *migratedv1.Migration {
		return &migratedv1.Migration{Id: id, Role: migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, State: state}
	}
	const active = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
	const failed = migratedv1.MigrationState_MIGRATION_STATE_FAILED
	service, stopping := new(fakeControl), make(chan struct{})
	service.set(status.Error(codes.Unavailable, "gone"), one("a", active), one("b", failed))
	server := httptest.NewServer(newTestHandler(t, service, stopping))
	defer server.Close()
	answer, err := http.Get(server.URL + "/events?id=a&role=source")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if kind := answer.Header.Get("Content-Type"); kind != "text/event-stream" {
		t.Errorf("events are %s", kind)
	}
	lines := bufio.NewReader(answer.Body)
	next := func() (name, data string) {
		t.Helper()
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatalf("%v after %q", err, name)
			}
			line = strings.TrimSuffix(line, "\n")
			if of, is := strings.CutPrefix(line, "event: "); is {
				name = of
			} else if of, is := strings.CutPrefix(line, "data: "); is {
				data = of
			} else if line == "" && name != "" {
				return name, data
			}
		}
	}
	expect := func(name string, has ...string) string {
		t.Helper()
		for {
			got, data := next()
			if got == "one" && name != "one" {
				continue // it is sent even if nothing has changed
			}
			if got != name {
				t.Fatalf("%s %s, instead of %s", got, data, name)
			}
			if !json.Valid([]byte(data)) {
				t.Fatalf("%s is no JSON: %s", name, data)
			}
			for _, part := range has {
				if !strings.Contains(data, part) {
					t.Errorf("%s does not have %s: %s", name, part, data)
				}
			}
			return data
		}
	}
	expect("version", `"v-test"`)
	expect("migrations", `"all":true`, `"id":"a"`, `"id":"b"`)
	expect("one", `"state":"MIGRATION_STATE_POSTCOPY_ACTIVE"`, `"incomingError":{"code":14`, "its memory follows")
	service.set(nil, one("a", failed))
	data := expect("migrations", `"all":false`, `"id":"a"`, `"gone":["b/source"]`)
	if strings.Contains(data, `"id":"b"`) {
		t.Errorf("what is gone is told: %s", data)
	}
	expect("one", `"incoming":{`, `"state":"MIGRATION_STATE_FAILED"`)
	service.set(nil, one("a", failed), one("c", failed)) // a is over, and not sent again
	expect("migrations", `"id":"c"`)
	service.set(nil)
	expect("migrations", `"gone":["`)
	expect("one", `"error":{"code":5`)
	close(stopping)
	expect("end")
	if rest, err := io.ReadAll(lines); err != nil || len(rest) != 0 {
		t.Errorf("after the end: %q, %v", rest, err)
	}
}

// TestPageIsWhole: all files are served with a type. The page refers only to files that exist, and has nothing that its
// content policy forbids.
func TestPageIsWhole(t *testing.T) {
	server := httptest.NewServer(newTestHandler(t, new(fakeControl), nil))
	defer server.Close()
	get := func(path string) (string, string) {
		t.Helper()
		answer, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil || answer.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", path, answer.Status, err)
		}
		return string(text), answer.Header.Get("Content-Type")
	}
	index, kind := get("/")
	if !strings.HasPrefix(kind, "text/html") {
		t.Errorf("the page is %s", kind)
	}
	for _, bad := range []string{"<style", " style=", "://"} {
		if strings.Contains(index, bad) {
			t.Errorf("the page has %q:\n%s", bad, index)
		}
	}
	for path := range page {
		if path == "/{$}" {
			continue
		}
		text, kind := get(path)
		if kind == "" {
			t.Errorf("%s has no type", path)
		}
		if strings.Contains(text, "innerHTML") || strings.Contains(text, "eval(") {
			t.Errorf("%s makes markup or code of text", path)
		}
		for _, other := range strings.Split(text, ` from "./`)[1:] {
			name, _, _ := strings.Cut(other, `"`)
			get("/page/" + name)
		}
	}
	answer, err := http.Get(server.URL + "/nothing")
	if err != nil {
		t.Fatal(err)
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusNotFound {
		t.Errorf("what is not there: %s", answer.Status)
	}
}
