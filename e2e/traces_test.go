// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// Where the lab's daemons send traces to, if they are told to, and the trace of the orchestrator that has a VM moved.
const (
	collectorAt  = "127.0.0.1:4317"
	orchestrator = "4bf92f3577b34da6a3ce929d0e0e4736"
)

// A collector takes traces as an OpenTelemetry collector does.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer
	mu    sync.Mutex
	spans []*tracepb.Span
}

func (c *collector) Export(
	_ context.Context, request *collectorpb.ExportTraceServiceRequest,
) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range request.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			c.spans = append(c.spans, scope.GetSpans()...)
		}
	}
	return new(collectorpb.ExportTraceServiceResponse), nil
}

// startCollector has a collector listen on the loopback of each host.
func startCollector(t *testing.T, l *lab.Lab) *collector {
	t.Helper()
	c := new(collector)
	server := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(server, c)
	var serving sync.WaitGroup
	t.Cleanup(func() { server.Stop(); serving.Wait() })
	for _, h := range l.Hosts() {
		var listener net.Listener
		err := h.InNetwork(func() (err error) {
			listener, err = net.Listen("tcp", collectorAt)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		serving.Go(func() { _ = server.Serve(listener) }) // it ends with Stop
	}
	return c
}

// traced is a call of the orchestrator's, which has a trace.
func traced(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "traceparent", "00-"+orchestrator+"-00f067aa0ba902b7-01")
}

// check wants what both hosts did in the orchestrator's trace: the migration and each of its states at either end, and
// the calls between them, but no page.
func (c *collector) check(t *testing.T) {
	t.Helper()
	for _, name := range []string{
		"migration source", "migration destination", "completed", "postcopy_active", "setup",
		"migrated.v1.ControlService/Start", "migrated.v1.PeerService/PrepareIncoming",
		"migrated.v1.PeerService/LoadDeviceState",
	} {
		// A call is seen by who makes it and by who answers, and states by both hosts, each of which sends when it likes.
		least := 1
		if strings.Contains(name, "PeerService") || !strings.Contains(name, "/") && !strings.HasPrefix(name, "migration") {
			least = 2
		}
		eventually(t, func() error {
			seen, n := c.names(t), 0
			for _, other := range seen {
				if other == name {
					n++
				}
			}
			if n < least {
				return fmt.Errorf("%d spans %q, want %d, among %q", n, name, least, seen)
			}
			return nil
		})
	}
}

// names are those of the spans so far, which are all of one trace.
func (c *collector) names(t *testing.T) (names []string) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, span := range c.spans {
		name := span.GetName()
		if trace := hex.EncodeToString(span.GetTraceId()); trace != orchestrator {
			t.Fatalf("span %q is of trace %s", name, trace)
		}
		if strings.Contains(name, "PageService") || strings.Contains(name, "Watch") {
			t.Fatalf("a trace has %q", name)
		}
		for _, a := range span.GetAttributes() {
			if a.GetKey() == "migration.role" {
				name += " " + a.GetValue().GetStringValue()
			}
		}
		names = append(names, name)
	}
	return names
}
