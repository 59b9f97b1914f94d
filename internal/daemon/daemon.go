// SPDX-License-Identifier: Apache-2.0

// Package daemon is the service of one host: the control API for orchestrators
// and the command line, the peer protocol for other daemons, and the page server
// for destinations. It keeps the migrations of this host. Package migration runs
// them.
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

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/evacuation"
	"github.com/migrated-vm/migrated/internal/gomaxprocs"
	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/report"
	"github.com/migrated-vm/migrated/internal/systemd"
	"github.com/migrated-vm/migrated/internal/traces"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// stopTimeout is how long calls under way may take to end when the daemon stops.
	stopTimeout = 5 * time.Second
)

// reconnect says when a lost connection to another daemon is tried again. gRPC's defaults are up to two minutes between
// two attempts, and twenty seconds for each: too long, because a VM may stand still until the daemons are connected.
var reconnect = grpc.ConnectParams{
	Backoff: backoff.Config{
		BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second,
	},
	MinConnectTimeout: 3 * time.Second,
}

// A Daemon is one host's daemon.
type Daemon struct {
	cfg         config.Config
	reloaded    atomic.Pointer[config.Config] // the configuration of the last Reload; nil: none, see settings
	version     string
	log         *slog.Logger
	refusals    *limits.Refusals
	pages       *pagesrv.Server
	records     *migration.Records
	migrations  *registry
	reports     *report.Store  // opened by Run
	keeping     sync.WaitGroup // goroutines that keep the report of a migration when it ends
	deleting    sync.Mutex     // held to delete or keep a report, so that a deleted one is not kept afterwards
	watchers    *limits.Seats  // of WatchList
	checked     checked
	evacuations *evacuation.Manager      // made by Run
	evacuated   atomic.Uint64            // bandwidth of the evacuation under way, bytes a second; 0: it has no limit
	versions    *migratedv1.HostVersions // of this host, without QEMU's
	traces      *traces.Tracer           // nil: none

	ctx    context.Context //nolint:containedctx // ends when the daemon stops; its migrations run in it
	cancel context.CancelCauseFunc

	pagePort string // the port of Listen, set by listen
	ready    func()
	stopping chan struct{} // closed when all migrations are over and the daemon is about to end
	// sockets are those that the service manager kept from an earlier run of this daemon, or opened for it.
	sockets *systemd.Listeners
	starter *launch.Starter // nil: this process itself starts QEMUs
	checks  chan struct{}   // holds a value for each QEMU that a check has started
	// checking has the ids of the checks that this daemon sends to destinations, one of which may be this daemon.
	checking sync.Map
	confine  func() error
	runAs    *process.Credentials // nil: QEMUs run as the same users as at their sources
	// socketGroup is the group that may use the control API's Unix socket; nil: root alone may.
	socketGroup *int
}

// New makes a daemon of a valid configuration. Run makes it serve. New takes the descriptors that a service manager has
// passed to this process, so that no child inherits them.
func New(cfg config.Config, version string, log *slog.Logger) (*Daemon, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.StateDir, 0o755); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := os.MkdirAll(cfg.LogDir, 0o750); err != nil { // not fatal: VMs that are here need the daemon
		log.Warn("no QEMU can be started here: there is no directory for its log", "error", err)
	}
	if files, encrypted := cfg.TLS(); encrypted {
		if err := files.Check(); err != nil {
			return nil, err
		}
	}
	var runAs *process.Credentials
	if cfg.RunAs != "" {
		user, err := process.LookupUser(cfg.RunAs)
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
		pages: pagesrv.NewServer(pagesrv.Options{CheckProtocol: checkProtocol}), records: records, migrations: newRegistry(),
		watchers: limits.NewSeats(limits.Watchers, limits.WatchersPerCaller),
		ready:    func() {}, stopping: make(chan struct{}), sockets: systemd.Inherited(),
		confine: func() error { return nil }, runAs: runAs, socketGroup: socketGroup,
	}
	d.cfg.FaultWorkers = workersOrDefault(d.cfg.FaultWorkers)
	d.limitHost()
	kernel, err := check.KernelRelease()
	if err != nil {
		log.Warn("reports will not say which kernel this is", "error", err)
	}
	d.versions = &migratedv1.HostVersions{Daemon: version, Kernel: kernel}
	return d, nil
}

// workersOrDefault returns workers, or the number that fits this host if workers is 0.
func workersOrDefault(workers int) int {
	if workers == 0 {
		return max(2, min(runtime.NumCPU()/2, 8))
	}
	return workers
}

// OnReady makes Run call ready when all servers run.
func (d *Daemon) OnReady(ready func()) { d.ready = ready }

// Confine makes Run call confine when it has opened its sockets, and log its error. A confined process cannot start
// QEMUs: starter starts them, unless it is nil.
func (d *Daemon) Confine(starter *launch.Starter, confine func() error) {
	d.starter, d.confine = starter, confine
}

// Run serves until ctx ends. It then cancels the migrations that have not switched
// over, whose VMs continue at their sources, and returns. It does the same, and fails, when one of its servers fails.
// It fails if another daemon uses the same state directory.
func (d *Daemon) Run(ctx context.Context) error {
	d.ctx, d.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	defer d.cancel(nil)
	defer d.migrations.shown.Close()
	unlock, err := d.lockState() // before anything in the directory, or another daemon's socket, is touched
	if err != nil {
		return err
	}
	defer unlock()
	d.reports = report.Open(d.reportsDir(), d.cfg.ReportKeep, d.log)
	open, err := d.listen()
	if err != nil {
		return err
	}
	defer closeQuietly(open.peers)
	d.confineSelf()
	if err := d.openTraces(); err != nil {
		return errors.Join(err, closeAll(open.all()))
	}
	defer d.closeTraces()
	// takeUp comes before serving, so that peers that call find their migrations.
	if err := d.takeUp(); err != nil {
		return errors.Join(err, closeAll(open.all()))
	}
	if d.evacuations, err = evacuation.Open(d.ctx, d.evacuationsDir(), evacuatedHost{d}, d.log); err != nil {
		return errors.Join(err, closeAll(open.all()))
	}
	serving, broken := errgroup.WithContext(d.ctx)
	var servers []*grpc.Server
	serve := func(server *grpc.Server, listener net.Listener) {
		servers = append(servers, server)
		serving.Go(func() error { return server.Serve(listener) })
	}
	peerServer, listener, lanes := d.newPeerServer(open.peers)
	serve(peerServer, listener)
	for _, listener := range open.controls {
		serve(d.newControlServer(listener))
	}
	var pages []*http.Server
	servePages := func(what string, server *http.Server, listener net.Listener) {
		pages = append(pages, server)
		serving.Go(func() error {
			if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("%s: %w", what, err)
			}
			return nil
		})
	}
	if open.metrics != nil {
		server, listener := d.newMetricsServer(open.metrics)
		servePages("metrics", server, listener)
	}
	if open.http != nil {
		w, err := d.newWebServer(open.http)
		if err != nil {
			return errors.Join(err, closeAll(open.all()))
		}
		defer w.close()
		serve(w.control, w.bridge.Listener())
		servePages("http", w.server, w.listener)
	}
	d.log.Info("serving", "version", d.version, "peers", open.peers.Addr().String(), "control", d.cfg.Socket)
	d.ready()
	go d.watchCertificates(d.ctx)

	// A server that has ended does not begin again, and its callers would wait at a socket that the service manager keeps
	// open. The daemon that is started next takes all up.
	select {
	case <-broken.Done():
		d.log.Error("a server has failed: the daemon ends, to be started again", "error", context.Cause(broken))
	case <-ctx.Done():
	}
	d.log.Info("stopping", "migrations", d.migrations.active())
	d.cancel(errors.New("the daemon was stopped"))
	d.evacuations.Wait() // before stop: a VM whose migration is refused would count as one that cannot be moved
	d.migrations.stop()
	d.keeping.Wait() // the reports of migrations that have just ended
	close(d.stopping)
	lanes.Close()
	for _, server := range pages {
		stopPages(server)
	}
	for _, server := range slices.Backward(servers) {
		stop(server)
	}
	if err := serving.Wait(); err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// checkProtocol refuses a lane of a protocol version that this daemon does not speak. Another release has begun that
// migration, and can continue it.
func checkProtocol(v uint32) error { return version.CheckProtocol("the destination", v) }

// newPeerServer makes the server for other daemons, the listener that it is to serve, and the server of lanes, which
// takes over those connections of the listener that are lanes.
func (d *Daemon) newPeerServer(listener net.Listener) (*grpc.Server, net.Listener, *pagelane.Server) {
	n := d.network(listener, d.allowPeer)
	lanes := pagelane.NewServer(func(stream *pagelane.Stream) error {
		if err := n.refuse(stream.Context()); err != nil {
			return err
		}
		return d.pages.ServeLane(stream)
	}, gomaxprocs.Add)
	server := grpc.NewServer(slices.Concat(pagewire.ServerOptions(), n.options, d.traces.ServerOptions(),
		[]grpc.ServerOption{grpc.Creds(lanes.Credentials(n.creds))})...)
	migratedv1.RegisterPeerServiceServer(server, &peerService{daemon: d})
	migratedv1.RegisterPageServiceServer(server, d.pages) // for lanes that come through gRPC
	registerCommon(server)
	return server, n, lanes
}

// newControlServer makes a server of the control API, and the listener that it is to serve.
func (d *Daemon) newControlServer(listener net.Listener) (*grpc.Server, net.Listener) {
	var options []grpc.ServerOption
	if listener.Addr().Network() != "unix" { // access to a Unix socket is decided by its mode
		n := d.network(listener, d.allowOperator)
		options, listener = append([]grpc.ServerOption{grpc.Creds(n.creds)}, n.options...), n
	}
	return d.controlServer(options), listener
}

// controlServer makes a server of the control API with these options, which decide who may call it.
func (d *Daemon) controlServer(options []grpc.ServerOption) *grpc.Server {
	server := grpc.NewServer(append(options, d.traces.ServerOptions()...)...)
	migratedv1.RegisterControlServiceServer(server, &controlService{daemon: d})
	migratedv1.RegisterEvacuationServiceServer(server, &evacuationService{daemon: d})
	registerCommon(server)
	return server
}

// registerCommon adds the services that every gRPC server should have: health and reflection.
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
		grpc.WithContextDialer(tcpkeepalive.Dial),
		grpc.WithConnectParams(reconnect),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: tcpkeepalive.Quiet, Timeout: tcpkeepalive.Answer, PermitWithoutStream: true,
		}))
	options = slices.Concat(options, d.traces.DialOptions(), extra)
	// With passthrough the dialer resolves names, again at every attempt.
	return grpc.NewClient("passthrough:///"+address, options...)
}

// dialLane connects to another daemon for a lane.
func (d *Daemon) dialLane(ctx context.Context, address string) (net.Conn, error) {
	creds, err := d.dialCredentials(address)
	if err != nil {
		return nil, err
	}
	return pagelane.Dial(ctx, address, creds, gomaxprocs.Add)
}

// stop stops a server. Calls under way have stopTimeout to end.
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

func closeQuietly(l net.Listener) { _ = l.Close() } // fails if its server has closed it
