// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/confine"
	"github.com/migrated-vm/migrated/internal/daemon"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/redact"
	"github.com/migrated-vm/migrated/internal/systemd"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// serveCmd has a flag for each key of the configuration file. A flag that was
// not given is nil and leaves the file's value.
type serveCmd struct {
	Config         *string  `placeholder:"PATH" predictor:"file" help:"Configuration file (default: ${config_path} if there is one)."`
	Listen         *string  `group:"settings" placeholder:"HOST:PORT" help:"Where other daemons reach this one."`
	Socket         *string  `group:"settings" placeholder:"PATH" predictor:"file" help:"Unix socket of the control API."`
	SocketGroup    *string  `group:"settings" placeholder:"GROUP" help:"Group whose members may use that socket besides root."`
	ControlListen  *string  `group:"settings" placeholder:"HOST:PORT" help:"Serve the control API at this address as well."`
	HTTPListen     *string  `group:"settings" name:"http-listen" placeholder:"HOST:PORT|PATH" help:"Serve the control API as JSON over HTTP, and a page for browsers, at this address, or at this Unix socket."`
	Advertise      []string `group:"settings" placeholder:"HOST:PORT" help:"Address under which other daemons reach this one's page server; may be repeated."`
	Peers          []string `group:"settings" placeholder:"NAME" help:"Name in the certificate of a daemon that may connect, and patterns of the VMs it may send; may be repeated."`
	Operators      []string `group:"settings" placeholder:"NAME" help:"Name in a certificate that may use --control-listen and --http-listen; may be repeated."`
	MetricsListen  *string  `group:"settings" placeholder:"HOST:PORT|PATH" help:"Serve metrics to Prometheus at this address, or at this Unix socket."`
	MetricsClients []string `group:"settings" placeholder:"NAME" help:"Name in a certificate that may read --metrics-listen; may be repeated."`
	Pprof          *bool    `group:"settings" help:"Serve profiles of the daemon at --metrics-listen as well."`
	TracesTo       *string  `group:"settings" placeholder:"HOST:PORT" help:"Send traces of migrations to this OpenTelemetry collector (OTLP over gRPC)."`
	QEMUCgroup     *string  `group:"settings" name:"qemu-cgroup" placeholder:"PATH" help:"Control group below which each QEMU gets one of its own; empty: QEMUs are in the daemon's."`
	LogDir         *string  `group:"settings" placeholder:"PATH" predictor:"file" help:"Directory of the logs of QEMUs that are started here."`
	StateDir       *string  `group:"settings" placeholder:"PATH" predictor:"file" help:"Directory of what must outlive the daemon."`
	ReportKeep     *int     `group:"settings" placeholder:"N" help:"How many reports of migrations that are over are kept; 0: none."`
	QEMUBinaries   []string `group:"settings" name:"qemu-binaries" placeholder:"PATH" help:"Program that may be started as a destination QEMU; may be repeated."`
	LibvirtSocket  *string  `group:"settings" placeholder:"PATH" predictor:"file" help:"Socket of this host's libvirt (default: libvirt's usual sockets)."`
	LibvirtHook    *string  `group:"settings" placeholder:"PATH" predictor:"file" help:"Program that may change the definition of an incoming domain of libvirt's, called as libvirt's own hook for migrations; empty: none."`
	TemplateDir    *string  `group:"settings" placeholder:"PATH" predictor:"file" help:"Directory of the templates that a source may name with --template."`
	MinUID         *int     `group:"settings" name:"min-uid" placeholder:"N" help:"Lowest user id that a QEMU is started as here; 0 allows root."`
	RunAs          *string  `group:"settings" placeholder:"USER" help:"User that QEMUs are started as here, whoever runs them at their sources."`
	Forbidden      []string `group:"settings" name:"forbidden-options" placeholder:"OPTION" help:"Option that no QEMU is started with here, or an option and one of its settings; may be repeated."`
	FaultWorkers   *int     `group:"settings" placeholder:"N" help:"Workers that answer the page faults of one VM; 0: by the number of CPUs."`
	MaxIncoming    *int     `group:"settings" placeholder:"N" help:"Migrations to this host at once; more wait for their turn."`
	MaxOutgoing    *int     `group:"settings" placeholder:"N" help:"Migrations away from this host at once; more wait for their turn."`
	RequireSecure  *bool    `group:"settings" help:"Refuse VMs that would arrive with a userfaultfd that no security module supervises."`
	Bandwidth      *string  `group:"settings" placeholder:"BYTES/S" help:"Highest rate at which one VM's memory may cross the network, without pages that it waits for, as in 500M; none: no limit."`
	HostBandwidth  *string  `group:"settings" placeholder:"BYTES/S" help:"The same for all VMs together that leave this host."`
	LogLevel       *string  `group:"settings" placeholder:"LEVEL" help:"debug, info, warn or error."`
	LogFormat      *string  `group:"settings" placeholder:"FORMAT" help:"text or json; --json is the same as json."`
}

func (serveCmd) Help() string {
	return `Runs the daemon until SIGINT or SIGTERM. SIGHUP has it read its configuration again: peers, operators, ` +
		`metrics_clients and host_bandwidth change at once, bandwidth for migrations that begin from then on, all else at ` +
		`the next start. It needs root, or the capabilities that deploy/migrated.service gives it. ` +
		`Once it listens it keeps six of them, gains none, and makes no system calls but its own; ` +
		`QEMUs are started by a second process, which is not on the network. "migrated check" shows what confines it.

Look at "migrated list" before stopping it. Migrations that have not switched over are given up and their VMs go on ` +
		`at the source; a VM that has switched over waits for the pages it lacks. The log names each.

Examples:

    migrated serve

    # Reachable by other hosts on the migration network
    migrated serve --listen 10.0.0.1:7600 --tls-certificate /etc/migrated/tls/cert.pem ` +
		`--tls-key /etc/migrated/tls/key.pem --tls-ca /etc/migrated/tls/ca.pem

    # A second daemon on this host, to try a migration out
    migrated serve --listen 127.0.0.1:7700 --socket /run/migrated-b/migrated.sock --state-dir /run/migrated-b`
}

func (s *serveCmd) Run(a *app) error {
	hangups := catchSignals()
	cfg, err := s.load(a)
	if err != nil {
		return &failure{exit: exitConfig, message: err.Error(),
			remedy: "correct the configuration; deploy/migrated.yaml explains every key"}
	}
	lines := newLogQueue(os.Stderr)
	defer lines.Close()
	log := a.logger(cfg, lines)
	d, err := daemon.New(cfg, versionString(), log)
	if err != nil {
		return fmt.Errorf("starting the daemon: %w", err)
	}
	d.OnReady(func() { tellManager(log, "READY=1") })
	var starter *launch.Starter // nil: this daemon starts neither QEMUs nor a hook
	if len(cfg.QEMUBinaries) > 0 || cfg.LibvirtHook != "" {
		if starter, err = launch.NewStarter(starterCommand, cfg.LibvirtHook, cfg.QEMUBinaries); err != nil {
			return err
		}
		defer starter.Close()
	}
	d.Confine(starter, confine.Apply)
	// The daemon has a context of its own, so that logInFlight can ask it for
	// migrations before it is stopped.
	ctx, stop := context.WithCancel(context.WithoutCancel(a.ctx))
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	for {
		select {
		case <-hangups:
			s.reload(a, d, log)
			continue
		case err = <-ended:
		case <-a.ctx.Done():
			tellManager(log, "STOPPING=1")
			logInFlight(cfg.Socket, log)
			stop()
			err = <-ended
		}
		if err != nil {
			return &failure{exit: exitFailed, message: fmt.Sprintf("the daemon failed: %v", err), remedy: migration.Remedy(err)}
		}
		return nil
	}
}

// catchSignals catches SIGHUP and SIGPIPE, so that the daemon, which VMs may wait for, goes on when its terminal is
// closed or nobody reads its log. It does not ignore them, because programs that it starts would inherit that.
func catchSignals() (hangups <-chan os.Signal) {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGHUP)
	return c
}

// reload reads the configuration again. If that is not valid, nothing changes.
func (s *serveCmd) reload(a *app, d *daemon.Daemon, log *slog.Logger) {
	tellManager(log, "RELOADING=1")
	defer tellManager(log, "READY=1")
	cfg, err := s.load(a)
	if err == nil {
		err = d.Reload(cfg)
	}
	if err != nil {
		log.Error("configuration not reloaded: the old one stays in effect", "error", err)
	}
}

// tellManager sends the daemon's state to the service manager. It only logs an error, because the daemon can serve
// nevertheless.
func tellManager(log *slog.Logger, state string) {
	if err := systemd.Notify(state); err != nil {
		log.Warn("the service manager is not told", "state", state, "error", err)
	}
}

// load returns the defaults overridden by the file overridden by the flags.
func (s *serveCmd) load(a *app) (config.Config, error) {
	cfg, err := loadConfig(s.Config)
	if err != nil {
		return config.Config{}, err
	}
	set(&cfg.Listen, s.Listen)
	set(&cfg.Socket, s.Socket)
	set(&cfg.SocketGroup, s.SocketGroup)
	set(&cfg.ControlListen, s.ControlListen)
	set(&cfg.HTTPListen, s.HTTPListen)
	if s.Advertise != nil {
		cfg.Advertise = s.Advertise
	}
	if s.Peers != nil {
		cfg.Peers = s.Peers
	}
	if s.Operators != nil {
		cfg.Operators = s.Operators
	}
	set(&cfg.MetricsListen, s.MetricsListen)
	if s.MetricsClients != nil {
		cfg.MetricsClients = s.MetricsClients
	}
	set(&cfg.Pprof, s.Pprof)
	set(&cfg.TracesTo, s.TracesTo)
	if files := a.tls; files != (mtls.Files{}) {
		cfg.TLSCertificate, cfg.TLSKey, cfg.TLSCA = files.Certificate, files.Key, files.CA
	}
	if a.plaintext {
		cfg.Plaintext = true
	}
	set(&cfg.StateDir, s.StateDir)
	set(&cfg.ReportKeep, s.ReportKeep)
	set(&cfg.LogDir, s.LogDir)
	set(&cfg.QEMUCgroup, s.QEMUCgroup)
	if s.QEMUBinaries != nil {
		cfg.QEMUBinaries = s.QEMUBinaries
	}
	set(&cfg.LibvirtSocket, s.LibvirtSocket)
	set(&cfg.LibvirtHook, s.LibvirtHook)
	set(&cfg.TemplateDir, s.TemplateDir)
	set(&cfg.MinUID, s.MinUID)
	set(&cfg.RunAs, s.RunAs)
	if s.Forbidden != nil {
		cfg.ForbiddenOptions = s.Forbidden
	}
	set(&cfg.FaultWorkers, s.FaultWorkers)
	set(&cfg.MaxIncoming, s.MaxIncoming)
	set(&cfg.MaxOutgoing, s.MaxOutgoing)
	set(&cfg.RequireSecure, s.RequireSecure)
	set(&cfg.Bandwidth, s.Bandwidth)
	set(&cfg.HostBandwidth, s.HostBandwidth)
	set(&cfg.LogLevel, s.LogLevel)
	set(&cfg.LogFormat, s.LogFormat)
	return cfg, cfg.Validate()
}

// set overrides a value with that of a flag, if the flag was given.
func set[T any](value *T, flag *T) {
	if flag != nil {
		*value = *flag
	}
}

// logger returns a logger that writes to to, as JSON if the configuration or --json says so.
func (a *app) logger(cfg config.Config, to io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.Level(), ReplaceAttr: redacted}
	if a.json || cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(to, options))
	}
	return slog.New(slog.NewTextHandler(to, options))
}

// redacted replaces secrets in all attributes of the log, because texts from QEMU and from errors may have some.
func redacted(_ []string, a slog.Attr) slog.Attr {
	switch v := a.Value.Resolve().Any().(type) {
	case string:
		a.Value = slog.StringValue(redact.Text(v))
	case []string:
		a.Value = slog.AnyValue(redact.Texts(v))
	case error:
		a.Value = slog.StringValue(redact.Text(v.Error()))
	}
	return a
}

// logInFlight logs the migrations that are under way when the daemon is about to
// stop. It asks the daemon for them, as a client.
func logInFlight(socket string, log *slog.Logger) {
	log.Info("stopping after a signal; a second one ends the daemon at once")
	a := &app{ctx: context.Background(), stderr: io.Discard, daemon: "unix:" + socket, timeout: 2 * time.Second}
	err := a.withClient(func(ctx context.Context, c *daemonClient) error {
		all, err := c.all(ctx)
		for _, m := range all {
			if !migration.Terminal(m.GetState()) {
				log.Warn("stopping with a migration in flight", "migration", m.GetId(), "vm", vmName(m),
					"role", migration.RoleName(m.GetRole()), "state", migration.StateName(m.GetState()),
					"memory", percent(m.GetProgress()), "meaning", stateMeaning(m))
			}
		}
		return err
	})
	if err != nil {
		log.Warn("stopping without knowing which migrations are in flight", "error", err)
	}
}
