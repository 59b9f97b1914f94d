// SPDX-License-Identifier: Apache-2.0

// Package config is the configuration of the migrated daemon: its keys, their
// defaults, and the YAML file, whose errors have line numbers.
//
// Values come from three sources, the later overriding the earlier: [Default],
// the file given to [Load], and the flags of "migrated serve". [Config.Validate]
// checks the result.
package config

import (
	"log/slog"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// DefaultPath is the file that the daemon reads when it is given none. It need
// not exist.
const DefaultPath = "/etc/migrated/migrated.yaml"

// DefaultPort is the TCP port on which daemons reach one another.
const DefaultPort = "7600"

// Config is the configuration of a daemon. The keys of the file are the yaml
// tags; deploy/migrated.yaml explains them in full.
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
	// HTTPListen is where the control API is served as JSON over HTTP, and a page for browsers: a HOST:PORT, or the
	// absolute path of a Unix socket; empty: nowhere. Who can connect to it controls the VMs.
	HTTPListen string `yaml:"http_listen"`
	// Advertise lists the HOST:PORT addresses under which other daemons reach
	// this one's page server, in order of preference. Empty: the address that
	// the peer's connection comes from, with Listen's port.
	Advertise []string `yaml:"advertise"`
	// TLSCertificate, TLSKey and TLSCA are PEM files: this daemon's certificate
	// and key, and the authorities that it trusts. With them everything but
	// the Unix socket is mutual TLS 1.3. All three or none.
	TLSCertificate string `yaml:"tls_certificate"`
	TLSKey         string `yaml:"tls_key"`
	TLSCA          string `yaml:"tls_ca"`
	// Peers are the daemons that may connect, and that this one connects to, by a
	// name in their certificates (a SPIFFE id or DNS name); patterns of VM names
	// after it limit which VMs that daemon may send here. Empty: all daemons with
	// a certificate of TLSCA; a destination's must then be for its host name.
	Peers []string `yaml:"peers"`
	// Operators are the names in certificates that may use ControlListen and HTTPListen.
	Operators []string `yaml:"operators"`
	// MetricsListen is where metrics are served to Prometheus: a HOST:PORT, or the absolute path of a Unix socket;
	// empty: nowhere.
	MetricsListen string `yaml:"metrics_listen"`
	// MetricsClients are the names in certificates that may read what MetricsListen serves.
	MetricsClients []string `yaml:"metrics_clients"`
	// Pprof serves Go's profiles of the daemon at MetricsListen as well.
	Pprof bool `yaml:"pprof"`
	// TracesTo is the HOST:PORT of the OpenTelemetry collector that receives traces of migrations (OTLP over gRPC);
	// empty: none.
	TracesTo string `yaml:"traces_to"`
	// Plaintext lets the daemon listen and connect without encryption beyond
	// loopback.
	Plaintext bool `yaml:"plaintext"`
	// StateDir is the directory of what must outlive the daemon, above all the
	// records of migrations, which say whether a VM has been handed over. The
	// daemon locks a file in it, so that no other daemon uses it meanwhile.
	StateDir string `yaml:"state_dir"`
	// ReportKeep is how many reports of migrations that are over are kept in StateDir; 0: none.
	ReportKeep int `yaml:"report_keep"`
	// LogDir is the directory of the output of the QEMUs that this daemon starts:
	// a log of at most 2 MiB for each.
	LogDir string `yaml:"log_dir"`
	// QEMUBinaries are the absolute paths of the programs that this daemon may
	// start as a destination QEMU. A source names its QEMU's program in the
	// command line it sends; a program that is not in this list is refused.
	// Empty: this daemon starts none, it only attaches to running ones.
	QEMUBinaries []string `yaml:"qemu_binaries"`
	// QEMUCgroup is the control group below which this daemon makes one for each
	// QEMU that it starts; empty: QEMUs are in the daemon's own.
	QEMUCgroup string `yaml:"qemu_cgroup"`
	// TemplateDir is the directory of the templates of command lines that a source may name (migrate --template).
	TemplateDir string `yaml:"template_dir"`
	// MinUID is the lowest user id that a QEMU is started as here. The source of a VM names the user.
	MinUID int `yaml:"min_uid"`
	// RunAs is the user, by name or number, that every QEMU is started as here; empty: the one its source names.
	RunAs string `yaml:"run_as"`
	// ForbiddenOptions are refused in the command line of a QEMU that is started here: names of options, or of an
	// option and one of its settings.
	ForbiddenOptions []string `yaml:"forbidden_options"`
	// LibvirtSocket is the path of the socket of this host's libvirt; empty: one of its usual paths.
	LibvirtSocket string `yaml:"libvirt_socket"`
	// LibvirtHook is a program that may change the definition of an incoming domain, called as libvirt calls its own
	// hook for a migration; empty, or the file is missing: none.
	LibvirtHook string `yaml:"libvirt_hook"`
	// FaultWorkers is how many goroutines answer page faults of one migration;
	// 0: the daemon chooses by the number of CPUs.
	FaultWorkers int `yaml:"fault_workers"`
	// MaxIncoming is how many migrations to this host may be under way at once,
	// prepared ones included; a source may have half of them.
	MaxIncoming int `yaml:"max_incoming"`
	// MaxOutgoing is how many migrations away from this host may be under way at once, not counting those that wait for
	// the other host. Further ones wait for their turn.
	MaxOutgoing int `yaml:"max_outgoing"`
	// RequireSecure refuses VMs that arrive with a userfaultfd that no security
	// module supervises.
	RequireSecure bool `yaml:"require_secure"`
	// Bandwidth limits the transfer of one VM's memory, to this host or from it,
	// without the pages that a thread waits for. Package bandwidth parses it.
	// "none": only a limit of the migration itself applies.
	Bandwidth string `yaml:"bandwidth"`
	// HostBandwidth limits the same transfer of all VMs that leave this host together. Each gets a share by its weight.
	HostBandwidth string `yaml:"host_bandwidth"`
	// LogLevel is the lowest level that is logged: debug, info, warn or error.
	LogLevel string `yaml:"log_level"`
	// LogFormat is the format of the log's lines: text or json.
	LogFormat string `yaml:"log_format"`
}

// Default returns the configuration of a daemon without a file and flags. It
// listens only on loopback, because without TLS neither API authenticates its
// callers.
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
			"plugin", "readconfig", "writeconfig",
			"netdev script", "netdev downscript", "netdev helper", "netdev path", "netdev guestfwd",
			"nic script", "nic downscript", "nic helper", "nic path", "nic guestfwd",
			"net script", "net downscript", "net helper", "net path", "net guestfwd",
		},
		LibvirtHook: "/etc/libvirt/hooks/qemu",
		MaxIncoming: 16,
		MaxOutgoing: 4,

		Bandwidth:     "none",
		HostBandwidth: "none",
		LogLevel:      "info",
		LogFormat:     "text",
	}
}

// levels are the values that log_level may have.
var levels = map[string]slog.Level{
	"debug": slog.LevelDebug,
	"info":  slog.LevelInfo,
	"warn":  slog.LevelWarn,
	"error": slog.LevelError,
}

// BandwidthLimit returns Bandwidth in bytes a second, 0 for none. c must be valid.
func (c Config) BandwidthLimit() uint64 { return parseLimit(c.Bandwidth) }

// HostBandwidthLimit returns HostBandwidth in bytes a second, 0 for none. c must be valid.
func (c Config) HostBandwidthLimit() uint64 { return parseLimit(c.HostBandwidth) }

func parseLimit(text string) uint64 {
	limit, err := bandwidth.Parse(text)
	if err != nil {
		return 0
	}
	return limit
}

// TLS returns the files of TLS. ok is false if they are not set.
func (c Config) TLS() (files mtls.Files, ok bool) {
	files = mtls.Files{Certificate: c.TLSCertificate, Key: c.TLSKey, CA: c.TLSCA}
	return files, files != mtls.Files{}
}

// PeerList returns Peers, parsed. c must be valid.
func (c Config) PeerList() mtls.Peers {
	var peers mtls.Peers
	for _, text := range c.Peers {
		if p, err := mtls.ParsePeer(text); err == nil {
			peers = append(peers, p)
		}
	}
	return peers
}

// Level returns LogLevel for package slog, and info if LogLevel is not valid.
func (c Config) Level() slog.Level { return levels[c.LogLevel] }
