// SPDX-License-Identifier: Apache-2.0

package web

import (
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A rule of http.yaml maps requests to a call.
type rule struct {
	Selector               string
	Get, Post, Put, Delete string
	Body                   string
	AdditionalBindings     []rule `yaml:"additional_bindings"`
}

// requests returns the method and the path of each request, by the name of the call.
func requests(t *testing.T) map[protoreflect.FullName][][2]string {
	t.Helper()
	text, err := os.ReadFile("../../proto/migrated/v1/http.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ HTTP struct{ Rules []rule } }
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	all := make(map[protoreflect.FullName][][2]string)
	for _, r := range file.HTTP.Rules {
		for _, binding := range append([]rule{r}, r.AdditionalBindings...) {
			for method, path := range map[string]string{
				"GET": binding.Get, "POST": binding.Post, "PUT": binding.Put, "DELETE": binding.Delete,
			} {
				if name := protoreflect.FullName(r.Selector); path != "" {
					all[name] = append(all[name], [2]string{method, path})
				}
				if (method == "POST" || method == "PUT") && path != "" && binding.Body != "*" {
					t.Errorf("%s: %s takes no body", r.Selector, path)
				}
			}
		}
	}
	return all
}

// TestEveryCallHasARequest: http.yaml and docs/http.md have all calls of the services.
func TestEveryCallHasARequest(t *testing.T) {
	docs, err := os.ReadFile("../../docs/http.md")
	if err != nil {
		t.Fatal(err)
	}
	all := requests(t)
	h := newTestHandler(t, migratedv1.UnimplementedControlServiceServer{}, nil)
	var methods []protoreflect.MethodDescriptor
	for _, service := range []protoreflect.ServiceDescriptor{
		migratedv1.File_migrated_v1_control_proto.Services().ByName("ControlService"),
		migratedv1.File_migrated_v1_evacuation_proto.Services().ByName("EvacuationService"),
	} {
		for i := range service.Methods().Len() {
			methods = append(methods, service.Methods().Get(i))
		}
	}
	for _, method := range methods {
		ways := all[method.FullName()]
		delete(all, method.FullName())
		if len(ways) == 0 {
			t.Errorf("%s is not in proto/migrated/v1/http.yaml: it cannot be called over HTTP", method.FullName())
		}
		for _, way := range ways {
			if !strings.Contains(string(docs), "`"+way[0]+" "+way[1]+"`") {
				t.Errorf("docs/http.md has no `%s %s`", way[0], way[1])
			}
			if strings.HasSuffix(way[1], ":watch") != method.IsStreamingServer() {
				t.Errorf("%s: only paths of streams end with :watch, by which they are known: %s",
					method.FullName(), way[1])
			}
			answer := ask(t, h, way[0], strings.ReplaceAll(way[1], "{id}", "m"), nil, "Content-Type: application/json")
			if answer.StatusCode != http.StatusNotImplemented { // the service implements none
				t.Errorf("%s %s has status %d: run scripts/generate", way[0], way[1], answer.StatusCode)
			}
		}
	}
	for name := range all {
		t.Errorf("http.yaml has %s, which is no call of the service", name)
	}
}

// recorder is a control API that records callers and headers, and fails.
type recorder struct {
	migratedv1.UnimplementedControlServiceServer

	callers []*peer.Peer
	headers []metadata.MD
}

func (r *recorder) note(ctx context.Context) {
	caller, _ := peer.FromContext(ctx)
	headers, _ := metadata.FromIncomingContext(ctx)
	r.callers, r.headers = append(r.callers, caller), append(r.headers, headers)
}

// refused returns an error in the form of calls' errors.
func refused() error {
	st, err := status.New(codes.FailedPrecondition, "the VM was handed over").WithDetails(
		&migratedv1.MigrationError{
			Message: "the VM was handed over", Remedy: "see migrated watch m", Reason: migratedv1.Reason_REASON_CANCELLED,
		})
	if err != nil {
		return err
	}
	return st.Err()
}

func (r *recorder) Cancel(ctx context.Context, _ *migratedv1.CancelRequest) (*migratedv1.CancelResponse, error) {
	r.note(ctx)
	return nil, refused()
}

func (r *recorder) Watch(
	_ *migratedv1.WatchRequest, stream grpc.ServerStreamingServer[migratedv1.WatchResponse],
) error {
	r.note(stream.Context())
	for _, state := range []migratedv1.MigrationState{
		migratedv1.MigrationState_MIGRATION_STATE_SETUP, migratedv1.MigrationState_MIGRATION_STATE_DEVICE,
	} {
		m := &migratedv1.Migration{Id: "m", State: state}
		if err := stream.Send(&migratedv1.WatchResponse{Migration: m}); err != nil {
			return err
		}
	}
	return refused()
}

// newTestHandler returns a handler that serves a control API by way of a Bridge.
func newTestHandler(t *testing.T, service migratedv1.ControlServiceServer, stopping chan struct{}) http.Handler {
	t.Helper()
	bridge := NewBridge()
	server := grpc.NewServer(bridge.ServerOptions()...)
	migratedv1.RegisterControlServiceServer(server, service)
	migratedv1.RegisterEvacuationServiceServer(server, migratedv1.UnimplementedEvacuationServiceServer{})
	go func() { _ = server.Serve(bridge.Listener()) }()
	conn, err := bridge.Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		server.Stop()
		bridge.callers.Range(func(number, _ any) bool {
			t.Errorf("caller %v is still remembered", number)
			return true
		})
	})
	h, err := NewHandler(Options{Control: conn, Stopping: stopping, Foreign: func(*http.Request, error) {}})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// problem is an error as a program reads it.
type problem struct {
	Code    int
	Message string
	Details []struct{ Message, Remedy, Reason string }
}

// TestErrorsHaveRemedies: errors of calls, errors within streams and errors of HTTP have the same form.
func TestErrorsHaveRemedies(t *testing.T) {
	server := httptest.NewServer(newTestHandler(t, new(recorder), nil))
	defer server.Close()
	var p problem
	check := func(what string, code codes.Code, reason string) {
		t.Helper()
		if p.Code != int(code) || p.Message == "" || len(p.Details) != 1 ||
			p.Details[0].Remedy == "" || p.Details[0].Reason != reason {
			t.Errorf("%s: %+v", what, p)
		}
		p = problem{}
	}
	post := func(path, body string) *http.Response {
		t.Helper()
		answer, err := http.Post(server.URL+path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = answer.Body.Close() })
		return answer
	}
	decode := func(r io.Reader, into any) {
		t.Helper()
		if err := json.NewDecoder(r).Decode(into); err != nil {
			t.Fatal(err)
		}
	}
	answer := post("/v1/migrations/m:cancel", "")
	decode(answer.Body, &p)
	if answer.StatusCode != http.StatusBadRequest || answer.Header.Get("Content-Type") != "application/json" {
		t.Errorf("a call that fails: %s, %v", answer.Status, answer.Header)
	}
	check("a call that fails", codes.FailedPrecondition, "REASON_CANCELLED")
	decode(post("/v1/machines", "").Body, &p)
	check("no call", codes.NotFound, "REASON_UNSPECIFIED")
	answer = post("/v1/migrations/m:watch", "")
	decode(answer.Body, &p)
	check("a call by another method", codes.Unimplemented, "REASON_UNSPECIFIED")
	decode(post("/v1/migrations/m:cancel", `{"force": true}`).Body, &p)
	if p.Code != int(codes.InvalidArgument) || !strings.Contains(p.Message, `unknown field "force"`) {
		t.Errorf("a field that is not there: %+v", p)
	}

	watch, err := http.Get(server.URL + "/v1/migrations/m:watch?interval=1s")
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Body.Close()
	if kind := watch.Header.Get("Content-Type"); kind != "application/x-ndjson" {
		t.Errorf("a stream is %s", kind)
	}
	text, err := io.ReadAll(watch.Body)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) != 3 || !strings.Contains(lines[1], `"state":"MIGRATION_STATE_DEVICE"`) {
		t.Fatalf("a stream:\n%s", text)
	}
	last := struct{ Error *problem }{&p}
	decode(strings.NewReader(lines[2]), &last)
	check("a stream that fails", codes.FailedPrecondition, "REASON_CANCELLED")
}

// TestCallersAreKnown: the service sees the caller as it would over gRPC, and headers cannot fake one.
func TestCallersAreKnown(t *testing.T) {
	r := new(recorder)
	server := httptest.NewServer(newTestHandler(t, r, nil))
	defer server.Close()
	for range 2 {
		url := server.URL + "/v1/migrations/m:cancel"
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string]string{
			"Content-Type": "application/json", "Grpc-Metadata-" + callerKey: "1", callerKey: "1",
			"Cookie": "a=b", "X-Request": "x",
			"Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		} {
			request.Header.Set(name, value)
		}
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_ = answer.Body.Close()
	}
	if len(r.callers) != 2 {
		t.Fatalf("%d calls", len(r.callers))
	}
	for i, caller := range r.callers {
		if caller == nil || !strings.HasPrefix(caller.Addr.String(), "127.0.0.1:") || caller.AuthInfo != nil {
			t.Errorf("the caller is %v", caller)
		}
		keys := slices.Sorted(maps.Keys(r.headers[i]))
		for _, key := range keys {
			switch key {
			case ":authority", "content-type", "grpc-accept-encoding", "user-agent",
				"x-forwarded-for", "x-forwarded-host", "traceparent", callerKey:
			default:
				t.Errorf("a header became the metadata %s: %v", key, r.headers[i][key])
			}
		}
		if len(r.headers[i][callerKey]) != 1 || len(r.headers[i]["traceparent"]) != 1 {
			t.Errorf("the metadata is %v", r.headers[i])
		}
	}
	conn, err := NewBridge().Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = migratedv1.NewControlServiceClient(conn).List(t.Context(), &migratedv1.ListRequest{})
	if err == nil || !strings.Contains(err.Error(), errNobody.Error()) {
		t.Errorf("a call of nobody's: %v", err)
	}
}
