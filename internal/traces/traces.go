// SPDX-License-Identifier: Apache-2.0

// Package traces sends traces of migrations to an OpenTelemetry collector. A trace has a span for the migration at each
// host, a span for each of its states, and the spans of the calls between an orchestrator and the daemons. Transfers of
// pages are not traced, so that faults are not slowed down.
package traces

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A Tracer sends spans to one collector. A nil Tracer makes none.
type Tracer struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
	conn     *grpc.ClientConn
}

// propagator passes a trace from one process to the next (W3C Trace Context).
var propagator = propagation.TraceContext{}

// New returns a Tracer that sends spans over conn to a collector, by OTLP. Spans that the collector does not take in
// time are dropped, which is logged. Close closes conn.
func New(ctx context.Context, conn *grpc.ClientConn, version string, log *slog.Logger) (*Tracer, error) {
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("traces are lost", "error", err) }))
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithGRPCConn(conn))
	if err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(resource.NewSchemaless(
		attribute.String("service.name", "migrated"), attribute.String("service.version", version),
		attribute.String("host.name", host),
	)))
	return &Tracer{provider: provider, tracer: provider.Tracer("migrated"), conn: conn}, nil
}

// Close sends the spans that are left, until ctx ends, and closes the connection.
func (t *Tracer) Close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	err := t.provider.Shutdown(ctx)
	if closeErr := t.conn.Close(); err == nil {
		err = closeErr
	}
	return err
}

// ServerOptions returns options with which a gRPC server makes spans of its calls.
func (t *Tracer) ServerOptions() []grpc.ServerOption {
	if t == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(t.options()...))}
}

// DialOptions returns options with which a gRPC client makes spans of its calls.
func (t *Tracer) DialOptions() []grpc.DialOption {
	if t == nil {
		return nil
	}
	return []grpc.DialOption{grpc.WithStatsHandler(otelgrpc.NewClientHandler(t.options()...))}
}

// options leaves out calls that are not steps of a migration: those for pages, and those that last as long as a client
// watches.
func (t *Tracer) options() []otelgrpc.Option {
	return []otelgrpc.Option{
		otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithPropagators(propagator),
		otelgrpc.WithFilter(func(info *stats.RPCTagInfo) bool {
			name := info.FullMethodName
			return strings.HasPrefix(name, "/migrated.") &&
				!strings.Contains(name, ".PageService/") && !strings.Contains(name, "/Watch")
		}),
	}
}

// A Migration is one side of a migration.
type Migration interface {
	Snapshot() (view *migratedv1.Migration, changed <-chan struct{})
	Done() <-chan struct{}
}

// Begin begins the span of one side of a migration, as a child of the span in caller. It returns life with that span,
// for the migration's own calls. Follow ends the span.
func (t *Tracer) Begin(life, caller context.Context, id string, role migratedv1.MigrationRole) context.Context {
	if t == nil {
		return life
	}
	ctx := trace.ContextWithSpanContext(life, trace.SpanContextFromContext(caller))
	ctx, _ = t.tracer.Start(ctx, "migration", trace.WithAttributes(
		attribute.String("migration.id", id),
		attribute.String("migration.role", shortName(role.String(), "MIGRATION_ROLE_")),
	))
	return ctx
}

// Follow makes a span for each state of the migration until it is over, and then ends the span that ctx has from Begin.
// It does so in a goroutine, and returns at once.
func (t *Tracer) Follow(ctx context.Context, m Migration) {
	if t == nil {
		return
	}
	go t.follow(ctx, m)
}

func (t *Tracer) follow(ctx context.Context, m Migration) {
	whole := trace.SpanFromContext(ctx)
	defer whole.End()
	var step trace.Span
	state, reason := migratedv1.MigrationState(-1), migratedv1.Reason_REASON_UNSPECIFIED
	for {
		// Done is checked before the snapshot: if it is closed, the snapshot is the last state.
		over := false
		select {
		case <-m.Done():
			over = true
		default:
		}
		view, changed := m.Snapshot()
		if view.GetState() != state {
			state = view.GetState()
			if step != nil {
				step.End()
			}
			_, step = t.tracer.Start(ctx, shortName(state.String(), "MIGRATION_STATE_"))
		}
		if failure := view.GetError(); failure.GetReason() != reason {
			if reason = failure.GetReason(); failure != nil {
				message := attribute.String("message", failure.GetMessage())
				step.AddEvent(shortName(reason.String(), "REASON_"), trace.WithAttributes(message))
			}
		}
		if over {
			step.End()
			t.end(whole, view)
			return
		}
		select {
		case <-changed:
		case <-m.Done():
		}
	}
}

// end adds the outcome of the migration to its span.
func (t *Tracer) end(whole trace.Span, view *migratedv1.Migration) {
	p := view.GetProgress()
	whole.SetAttributes(
		attribute.String("vm.name", view.GetVmName()),
		attribute.String("migration.state", shortName(view.GetState().String(), "MIGRATION_STATE_")),
		attribute.String("migration.location", shortName(view.GetLocation().String(), "LOCATION_")),
		attribute.Float64("migration.downtime_ms", float64(p.GetDowntime().AsDuration())/float64(time.Millisecond)),
		attribute.Int64("migration.pages", int64(p.GetPagesTotal())),
	)
	if failure := view.GetError(); failure != nil {
		whole.SetStatus(codes.Error, failure.GetMessage())
	}
}

// shortName returns the name of a value of the API's enumerations without its prefix, in lower case.
func shortName(name, prefix string) string { return strings.ToLower(strings.TrimPrefix(name, prefix)) }
