// SPDX-License-Identifier: Apache-2.0

// Package daemon serves what one host does for migrations: the control API for
// orchestrators and the command line, the peer protocol for other daemons, and
// the page server for destinations. It keeps the migrations of this host; what
// a migration does is package migration's.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"golang.org/x/sync/errgroup"

	"github.com/migrated-vm/migrated/internal/alive"
	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/pagelane"
	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/report"
	"github.com/migrated-vm/migrated/internal/systemd"
	"github.com/migrated-vm/migrated/internal/traces"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// stopTimeout is how long calls under way may take to end at shutdown.
	stopTimeout = 5 * time.Second
)

// reconnect is how a lost connection to another daemon is made again. gRPC's own way waits up to two minutes between two
// tries, and twenty seconds for each: a VM may stand still until the other daemon is there again and hears of it.
var reconnect = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
	MinConnectTimeout: 3 * time.Second,
}

// A Daemon is one host's daemon.
type Daemon struct {
	cfg        config.Config
	reloaded   atomic.Pointer[config.Config] // nil: never, see settings
	version    string
	log        *slog.Logger
	refusals   *limits.Refusals
	pages      *pagesrv.Server
	records    *migration.Records
	migrations *registry
	reports    *report.Store
	keeping    sync.WaitGroup // what waits for the end of a migration to keep its report
	checked    checked
	versions   *migratedv1.HostVersions // of this host, without QEMU's
	traces     *traces.Tracer           // nil: none

	ctx    context.Context //nolint:containedctx // the daemon's life, that of its migrations
	cancel context.CancelCauseFunc

	pagePort string // of Listen, once it is known
	ready    func()
	stopping chan struct{} // closed when every migration is over and the daemon is about to end
	// sockets are those that the service manager kept from an earlier run of this daemon, or opened for it.
	sockets *systemd.Listeners
	starter *qemu.Starter // nil: this process starts QEMUs
	checks  chan struct{} // a place for each QEMU that a check has started
	// checking has the ids of the checks by which this daemon asks a destination, which may be itself.
	checking sync.Map
	confine  func() error
	runAs    *qemu.Credentials // nil: QEMUs run as at their sources
	// socketGroup may use the control API's Unix socket; nil: root alone.
	socketGroup *int
}

// New makes a daemon of a valid configuration. It serves when it is run. It takes what a service manager handed to this
// process, which children would inherit before.
func New(cfg config.Config, version string, log *slog.Logger) (*Daemon, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.StateDir, 0o755); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := os.MkdirAll(cfg.LogDir, 0o750); err != nil { // VMs that are here need the daemon all the same
		log.Warn("no QEMU can be started here: there is no directory for its log", "error", err)
	}
	if files, encrypted := cfg.TLS(); encrypted {
		if err := files.Check(); err != nil {
			return nil, err
		}
	}
	var runAs *qemu.Credentials
	if cfg.RunAs != "" {
		user, err := qemu.LookupUser(cfg.RunAs)
		if err != nil {
			return nil, fmt.Errorf("run_as: %w", err)
		}
		runAs = &user
	}
	var socketGroup *int
	if cfg.SocketGroup != "" {
		group, err := lookupGroup(cfg.SocketGroup)
		if err != nil {
			return nil, err
		}
		socketGroup = &group
	}
	handedOver, _ := migration.StateDirs(cfg.StateDir)
	records, err := migration.OpenRecords(handedOver)
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		cfg: cfg, version: version, log: log, refusals: limits.NewRefusals(log), checks: make(chan struct{}, mostChecks),
		pages: pagesrv.NewServer(), records: records, migrations: newRegistry(),
		ready: func() {}, stopping: make(chan struct{}), sockets: systemd.Inherited(), confine: func() error { return nil }, runAs: runAs,
		socketGroup: socketGroup,
	}
	d.cfg.FaultWorkers = orChosen(d.cfg.FaultWorkers)
	d.reports = report.Open(d.reportsDir(), cfg.ReportKeep, log)
	kernel, err := qemu.KernelRelease()
	if err != nil {
		log.Warn("reports will not say which kernel this is", "error", err)
	}
	d.versions = &migratedv1.HostVersions{Daemon: version, Kernel: kernel}
	return d, nil
}

// orChosen is how many workers answer a VM's page faults where the configuration leaves it to the daemon.
func orChosen(workers int) int {
	if workers == 0 {
		return max(2, min(runtime.NumCPU()/2, 8))
	}
	return workers
}

// OnReady makes Run call ready once every listener accepts.
func (d *Daemon) OnReady(ready func()) { d.ready = ready }

// Confine makes Run call confine once it has opened its sockets. What that cannot do is logged. starter, where it
// is not nil, starts the QEMUs, which this process may not any more.
func (d *Daemon) Confine(starter *qemu.Starter, confine func() error) {
	d.starter, d.confine = starter, confine
}

// Run serves until ctx ends, then lets every migration that was not switched
// over continue its VM at the source, and returns.
func (d *Daemon) Run(ctx context.Context) error {
	d.ctx, d.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	defer d.cancel(nil)
	at, err := d.listen()
	if err != nil {
		return err
	}
	defer closeQuietly(at.peers)
	d.confineSelf()
	if err := d.openTraces(); err != nil {
		return errors.Join(err, closeAll(at.all()))
	}
	defer d.closeTraces()
	// After listening, so that two daemons never do so at once, and before serving, so that a peer that calls
	// finds its migration.
	if err := d.takeUp(); err != nil {
		return errors.Join(err, closeAll(at.all()))
	}
	var serving errgroup.Group
	var servers []*grpc.Server
	serve := func(server *grpc.Server, listener net.Listener) {
		servers = append(servers, server)
		serving.Go(func() error { return server.Serve(listener) })
	}
	peerServer, listener, lanes := d.newPeerServer(at.peers)
	serve(peerServer, listener)
	for _, listener := range at.controls {
		serve(d.newControlServer(listener))
	}
	var scrapes *http.Server
	if at.metrics != nil {
		scrapes, listener = d.newMetricsServer(at.metrics)
		serving.Go(func() error {
			if err := scrapes.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("metrics: %w", err)
			}
			return nil
		})
	}
	d.log.Info("serving", "version", d.version, "peers", at.peers.Addr().String(), "control", d.cfg.Socket)
	d.ready()
	go d.watchCertificates(d.ctx)

	failed := make(chan error, 1)
	go func() { failed <- serving.Wait() }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	d.log.Info("stopping", "migrations", d.migrations.active())
	d.cancel(errors.New("the daemon was stopped"))
	d.migrations.wait()
	d.keeping.Wait() // for the reports of those that ended at this moment
	close(d.stopping)
	lanes.Close()
	if scrapes != nil {
		_ = scrapes.Close() // a scrape under way is cut short: the next is of the daemon that follows
	}
	for _, server := range slices.Backward(servers) {
		stop(server)
	}
	return <-failed
}

// newPeerServer makes the server for other daemons, what it is to serve of the listener, and the server that takes lanes from
// among those connections.
func (d *Daemon) newPeerServer(listener net.Listener) (*grpc.Server, net.Listener, *pagelane.Server) {
	n := d.network(listener, d.allowPeer)
	lanes := pagelane.NewServer(func(stream *pagelane.Stream) error {
		if err := n.refuse(stream.Context()); err != nil {
			return err
		}
		return d.pages.ServeLane(stream)
	})
	server := grpc.NewServer(slices.Concat(pagewire.ServerOptions(), n.options, d.traces.ServerOptions(),
		[]grpc.ServerOption{grpc.Creds(lanes.Credentials(n.creds))})...)
	migratedv1.RegisterPeerServiceServer(server, &peerService{daemon: d})
	migratedv1.RegisterPageServiceServer(server, d.pages) // for lanes that come through gRPC
	registerCommon(server)
	return server, n, lanes
}

func (d *Daemon) newControlServer(listener net.Listener) (*grpc.Server, net.Listener) {
	var options []grpc.ServerOption
	if listener.Addr().Network() != "unix" { // there the socket's mode decides
		n := d.network(listener, d.allowOperator)
		options, listener = append([]grpc.ServerOption{grpc.Creds(n.creds)}, n.options...), n
	}
	server := grpc.NewServer(append(options, d.traces.ServerOptions()...)...)
	migratedv1.RegisterControlServiceServer(server, &controlService{daemon: d})
	registerCommon(server)
	return server, listener
}

// registerCommon adds what every gRPC server is expected to answer.
func registerCommon(server *grpc.Server) {
	checks := health.NewServer()
	for name := range server.GetServiceInfo() {
		checks.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	}
	healthpb.RegisterHealthServer(server, checks)
	reflection.Register(server)
}

// dial connects to another daemon.
func (d *Daemon) dial(address string, extra ...grpc.DialOption) (*grpc.ClientConn, error) {
	if _, _, err := net.SplitHostPort(address); err != nil {
		return nil, fmt.Errorf("%q is no HOST:PORT: %w", address, err)
	}
	creds, err := d.dialCredentials(address)
	if err != nil {
		return nil, err
	}
	options := append(pagewire.DialOptions(),
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(alive.Dial),
		grpc.WithConnectParams(reconnect),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: alive.Quiet, Timeout: alive.Answer, PermitWithoutStream: true,
		}))
	options = slices.Concat(options, d.traces.DialOptions(), extra)
	// passthrough: names are resolved by the dialer, at every attempt.
	return grpc.NewClient("passthrough:///"+address, options...)
}

// dialLane connects to another daemon for a lane.
func (d *Daemon) dialLane(ctx context.Context, address string) (net.Conn, error) {
	creds, err := d.dialCredentials(address)
	if err != nil {
		return nil, err
	}
	return pagelane.Dial(ctx, address, creds)
}

// stop lets calls end by themselves for a while.
func stop(server *grpc.Server) {
	expire := time.AfterFunc(stopTimeout, server.Stop)
	defer expire.Stop()
	server.GracefulStop()
}

func closeAll(listeners []net.Listener) error {
	var errs []error
	for _, l := range listeners {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

func closeQuietly(l net.Listener) { _ = l.Close() } // closed by its server already, mostly
