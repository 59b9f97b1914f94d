// SPDX-License-Identifier: Apache-2.0

// Package config is the configuration of the migrated daemon: what can be set,
// the defaults, and a YAML file whose mistakes are named with their line.
//
// Values come from three places, the later overriding the earlier: [Default],
// the file given to [Load], and the flags of "migrated serve". [Config.Validate]
// looks at the result, whatever its source.
package config

import (
	"log/slog"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/internal/mtls"
)

// DefaultPath is where the daemon looks for its file when it is given none. It
// need not exist.
const DefaultPath = "/etc/migrated/migrated.yaml"

// DefaultPort is the TCP port on which daemons reach one another.
const DefaultPort = "7600"

// Config is what an operator can set of a daemon. The keys of the file are the
// yaml tags; deploy/migrated.yaml explains them at length.
type Config struct {
	// Listen is the HOST:PORT at which other daemons reach this one: the peer
	// protocol and the page server. Port 0 lets the kernel choose one.
	Listen string `yaml:"listen"`
	// Socket is the path of the control API's Unix socket.
	Socket string `yaml:"socket"`
	// SocketGroup is the group, by name or number, whose members may use Socket, and so control the VMs of this host;
	// empty: root alone.
	SocketGroup string `yaml:"socket_group"`
	// ControlListen is a HOST:PORT at which the control API is served as well;
	// empty: at the Unix socket alone. Who can connect to it controls the VMs.
	ControlListen string `yaml:"control_listen"`
	// Advertise lists the HOST:PORT addresses under which other daemons reach
	// this one's page server, in order of preference. Empty: the address that
	// the peer's connection comes from, with Listen's port.
	Advertise []string `yaml:"advertise"`
	// TLSCertificate, TLSKey and TLSCA are PEM files: this daemon's certificate
	// and key, and the authorities that it believes. With them everything but
	// the Unix socket is mutual TLS 1.3. All three or none.
	TLSCertificate string `yaml:"tls_certificate"`
	TLSKey         string `yaml:"tls_key"`
	TLSCA          string `yaml:"tls_ca"`
	// Peers are the daemons that may connect, and to which this one does, by a
	// name in their certificates (a SPIFFE id or DNS name); patterns of VM names
	// after it limit which VMs that daemon may send here. Empty: all that the
	// authorities vouch for; a destination's certificate is then for its host.
	Peers []string `yaml:"peers"`
	// Operators are the names in certificates that may use ControlListen.
	Operators []string `yaml:"operators"`
	// MetricsListen is where metrics are served to Prometheus: a HOST:PORT, or the absolute path of a Unix socket; empty:
	// nowhere.
	MetricsListen string `yaml:"metrics_listen"`
	// MetricsClients are the names in certificates that may read what MetricsListen serves.
	MetricsClients []string `yaml:"metrics_clients"`
	// Pprof serves Go's profiles of the daemon at MetricsListen as well.
	Pprof bool `yaml:"pprof"`
	// TracesTo is the HOST:PORT of an OpenTelemetry collector that is told of migrations (OTLP over gRPC); empty: none.
	TracesTo string `yaml:"traces_to"`
	// Plaintext lets the daemon listen and connect without encryption beyond
	// loopback.
	Plaintext bool `yaml:"plaintext"`
	// StateDir is the directory of what must outlive the daemon, above all
	// which VMs have been handed over.
	StateDir string `yaml:"state_dir"`
	// ReportKeep is how many reports of migrations that are over are kept in StateDir; 0: none.
	ReportKeep int `yaml:"report_keep"`
	// LogDir is the directory of what the QEMUs write that this daemon starts, a
	// log of at most 2 MiB each.
	LogDir string `yaml:"log_dir"`
	// QEMUBinaries are the absolute paths of the programs that this daemon may
	// start as a destination QEMU. A source names its QEMU's program in the
	// command line it sends; this list is what keeps it from naming any other.
	// Empty: this daemon starts none, it only attaches to running ones.
	QEMUBinaries []string `yaml:"qemu_binaries"`
	// QEMUCgroup is the control group below which this daemon starts each QEMU in
	// one of its own; empty: QEMUs are in the daemon's.
	QEMUCgroup string `yaml:"qemu_cgroup"`
	// TemplateDir is the directory of the templates of command lines that a source may name (migrate --template).
	TemplateDir string `yaml:"template_dir"`
	// MinUID is the least user id that a QEMU is started as here: its source names the user.
	MinUID int `yaml:"min_uid"`
	// RunAs is the user, by name or number, that every QEMU is started as here; empty: the one its source names.
	RunAs string `yaml:"run_as"`
	// ForbiddenOptions are what no command line of a QEMU that is started here may have: names of options, or of an
	// option and a setting of it.
	ForbiddenOptions []string `yaml:"forbidden_options"`
	// LibvirtSocket is where this host's libvirt listens; empty: at one of its usual places.
	LibvirtSocket string `yaml:"libvirt_socket"`
	// LibvirtHook is a program that may change the definition of a domain that comes, called as libvirt calls its own
	// for a migration; empty, or not there: none.
	LibvirtHook string `yaml:"libvirt_hook"`
	// FaultWorkers is how many goroutines answer page faults of one migration;
	// 0: the daemon chooses by the number of CPUs.
	FaultWorkers int `yaml:"fault_workers"`
	// MaxIncoming is how many migrations to this host may be under way at once,
	// prepared ones included; a source may have half of them.
	MaxIncoming int `yaml:"max_incoming"`
	// RequireSecure refuses VMs that arrive with a userfaultfd that no security
	// module supervises.
	RequireSecure bool `yaml:"require_secure"`
	// Bandwidth limits, as package bandwidth reads it, what crosses the network of
	// one VM's memory that no thread waits for, away from this host or to it;
	// "none": only what a migration itself says.
	Bandwidth string `yaml:"bandwidth"`
	// LogLevel is the least severe level that is logged: debug, info, warn or
	// error.
	LogLevel string `yaml:"log_level"`
	// LogFormat is how a line of the log is written: text or json.
	LogFormat string `yaml:"log_format"`
}

// Default returns the configuration of a daemon that was told nothing. It
// listens on loopback alone, because neither API authenticates its callers.
func Default() Config {
	return Config{
		Listen:    "127.0.0.1:" + DefaultPort,
		Socket:    "/run/migrated/migrated.sock",
		Advertise: []string{},
		Peers:     []string{},
		Operators: []string{},

		MetricsClients: []string{},

		StateDir:     "/run/migrated",
		ReportKeep:   50,
		LogDir:       "/var/log/migrated",
		QEMUBinaries: []string{"/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"},
		TemplateDir:  "/etc/migrated/templates",
		MinUID:       1,
		ForbiddenOptions: []string{
			"plugin", "readconfig", "writeconfig", "netdev script", "netdev downscript", "netdev helper",
			"nic script", "nic downscript", "nic helper",
			"net script", "net downscript", "net helper",
		},
		LibvirtHook: "/etc/libvirt/hooks/qemu",
		MaxIncoming: 16,
		Bandwidth:   "none",
		LogLevel:    "info",
		LogFormat:   "text",
	}
}

// levels are the names that log_level may have.
var levels = map[string]slog.Level{
	"debug": slog.LevelDebug,
	"info":  slog.LevelInfo,
	"warn":  slog.LevelWarn,
	"error": slog.LevelError,
}

// BandwidthLimit is Bandwidth in bytes a second, 0 for none; it is valid.
func (c Config) BandwidthLimit() uint64 {
	limit, err := bandwidth.Parse(c.Bandwidth)
	if err != nil {
		return 0
	}
	return limit
}

// TLS is the files of TLS, ok where they are set.
func (c Config) TLS() (files mtls.Files, ok bool) {
	files = mtls.Files{Certificate: c.TLSCertificate, Key: c.TLSKey, CA: c.TLSCA}
	return files, files != mtls.Files{}
}

// PeerList is Peers, parsed; they are valid.
func (c Config) PeerList() mtls.Peers {
	var peers mtls.Peers
	for _, text := range c.Peers {
		if p, err := mtls.ParsePeer(text); err == nil {
			peers = append(peers, p)
		}
	}
	return peers
}

// Level returns LogLevel for package slog; info where LogLevel is not valid.
func (c Config) Level() slog.Level { return levels[c.LogLevel] }
