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

const (
	collectorAt  = "127.0.0.1:4317"                   // to which the lab's daemons send traces, if a test asks them to
	orchestrator = "4bf92f3577b34da6a3ce929d0e0e4736" // ID of the trace in which a test calls a daemon
)

// collector receives traces as an OpenTelemetry collector does.
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

// startCollector starts a collector that listens on the loopback of each host.
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

// traced returns a context for calls in the orchestrator's trace.
func traced(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "traceparent", "00-"+orchestrator+"-00f067aa0ba902b7-01")
}

// check waits until the orchestrator's trace has what both hosts did: the migration and its states at either end, and
// the calls between them. No span may be of the transfer of pages.
func (c *collector) check(t *testing.T) {
	t.Helper()
	for _, name := range []string{
		"migration source", "migration destination", "completed", "postcopy_active", "setup",
		"migrated.v1.ControlService/Start", "migrated.v1.PeerService/PrepareIncoming",
		"migrated.v1.PeerService/LoadDeviceState",
	} {
		// A call has a span at the caller and one at the callee, a state has one at each host. Each host sends its
		// spans in its own time.
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

// names returns the names of the spans so far. The test fails if one is of another trace, or of a call that is not to
// be traced.
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
