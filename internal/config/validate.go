// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// A ValueError says that the value of a key is not valid.
type ValueError struct {
	Key   string // as in the file; the flag has "-" for "_"
	Value string // as it was given
	Want  string // which values are valid: "HOST:PORT, as in 127.0.0.1:7600"
}

// Error names the key, the value and the values that are valid.
func (e *ValueError) Error() string {
	return fmt.Sprintf("%s: %q cannot be used: it must be %s", e.Key, e.Value, e.Want)
}

// maxSocketPath is the size of sockaddr_un.sun_path without its final NUL, unix(7).
const maxSocketPath = 107

// maxFaultWorkers is one less than the number of lanes that a source serves (pagesrv.MaxLanes): each worker has a lane,
// and the sweep has another. More workers than CPUs are of no use.
const maxFaultWorkers = 63

// maxIncoming and maxOutgoing are far more migrations than can usefully share a host's network.
const maxIncoming, maxOutgoing = 64, 64

// maxReports bounds the size of the reports in StateDir, which is usually in memory. A report has at most 256 KiB, and
// about ten KiB in practice.
const maxReports = 1000

// Validate returns the joined [ValueError]s of c, or nil if it is valid. It
// checks only c, not the host: it does not look for free ports or programs.
func (c Config) Validate() error {
	var errs []error
	refuse := func(key, value, want string) {
		errs = append(errs, &ValueError{key, value, want})
	}
	if !validListen(c.Listen) {
		refuse("listen", c.Listen, "HOST:PORT, as in 127.0.0.1:7600, or :7600 for all addresses")
	}
	if !filepath.IsAbs(c.Socket) || len(c.Socket) > maxSocketPath {
		refuse("socket", c.Socket, fmt.Sprintf("an absolute path of at most %d bytes", maxSocketPath))
	}
	if c.ControlListen != "" && !validListen(c.ControlListen) {
		refuse("control_listen", c.ControlListen, "HOST:PORT, as in 127.0.0.1:7601, or empty for none")
	}
	if !validEither(c.HTTPListen) {
		refuse("http_listen", c.HTTPListen,
			fmt.Sprintf("HOST:PORT, as in 127.0.0.1:7603, an absolute path of at most %d bytes, or empty for none",
				maxSocketPath))
	}
	if !validEither(c.MetricsListen) {
		refuse("metrics_listen", c.MetricsListen,
			fmt.Sprintf("HOST:PORT, as in 127.0.0.1:7602, an absolute path of at most %d bytes, or empty for none",
				maxSocketPath))
	}
	if c.Pprof && c.MetricsListen == "" {
		refuse("pprof", "true", "false where metrics_listen is empty: that is where profiles are served")
	}
	if c.TracesTo != "" && !validRemote(c.TracesTo) {
		refuse("traces_to", c.TracesTo, "the HOST:PORT of a collector, as in 127.0.0.1:4317, or empty for none")
	}
	for _, address := range c.Advertise {
		if !validRemote(address) {
			refuse("advertise", address, "a HOST:PORT that other hosts can connect to, as in 10.0.0.1:7600")
		}
	}
	errs = append(errs, c.validateTLS()...)
	if !filepath.IsAbs(c.StateDir) {
		refuse("state_dir", c.StateDir, "an absolute path")
	}
	if c.ReportKeep < 0 || c.ReportKeep > maxReports {
		refuse("report_keep", strconv.Itoa(c.ReportKeep), fmt.Sprintf("0 (none is kept) to %d", maxReports))
	}
	if !filepath.IsAbs(c.LogDir) {
		refuse("log_dir", c.LogDir, "an absolute path")
	}
	for _, program := range c.QEMUBinaries {
		if !filepath.IsAbs(program) {
			refuse("qemu_binaries", program, "the absolute path of a program, as in /usr/bin/qemu-system-x86_64")
		}
	}
	if c.QEMUCgroup != "" && (!filepath.IsAbs(c.QEMUCgroup) || filepath.Clean(c.QEMUCgroup) != c.QEMUCgroup) {
		refuse("qemu_cgroup", c.QEMUCgroup,
			"the path of a control group below its mount, as in /vms, or empty for the daemon's own")
	}
	if c.TemplateDir != "" && !filepath.IsAbs(c.TemplateDir) {
		refuse("template_dir", c.TemplateDir, "an absolute path, or empty for no templates")
	}
	if c.LibvirtSocket != "" && !filepath.IsAbs(c.LibvirtSocket) {
		refuse("libvirt_socket", c.LibvirtSocket, "an absolute path, or empty for libvirt's usual ones")
	}
	if c.LibvirtHook != "" && !filepath.IsAbs(c.LibvirtHook) {
		refuse("libvirt_hook", c.LibvirtHook, "the absolute path of a program, or empty for none")
	}
	if c.MinUID < 0 || int64(c.MinUID) > math.MaxUint32 {
		refuse("min_uid", strconv.Itoa(c.MinUID), "the number of a user; 0 allows root")
	}
	for _, text := range c.ForbiddenOptions {
		if err := cmdline.ParseForbidden(text); err != nil {
			refuse("forbidden_options", text,
				"the name of a QEMU option, then perhaps of one of its settings, as in \"netdev script\"")
		}
	}
	if c.FaultWorkers < 0 || c.FaultWorkers > maxFaultWorkers {
		refuse("fault_workers", strconv.Itoa(c.FaultWorkers),
			fmt.Sprintf("0 (the daemon chooses) to %d", maxFaultWorkers))
	}
	if c.MaxIncoming < 1 || c.MaxIncoming > maxIncoming {
		refuse("max_incoming", strconv.Itoa(c.MaxIncoming), fmt.Sprintf("1 to %d", maxIncoming))
	}
	if c.MaxOutgoing < 1 || c.MaxOutgoing > maxOutgoing {
		refuse("max_outgoing", strconv.Itoa(c.MaxOutgoing), fmt.Sprintf("1 to %d", maxOutgoing))
	}
	for key, text := range map[string]string{"bandwidth": c.Bandwidth, "host_bandwidth": c.HostBandwidth} {
		if _, err := bandwidth.Parse(text); err != nil {
			refuse(key, text, "bytes a second, as in 500M for 500 MiB, from 64K on; or none")
		}
	}
	if _, ok := levels[c.LogLevel]; !ok {
		refuse("log_level", c.LogLevel, "debug, info, warn or error")
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		refuse("log_format", c.LogFormat, "text or json")
	}
	return errors.Join(errs...)
}

// encryption is the text of the error for an address beyond this host without TLS.
const encryption = "an address of this host alone, unless tls_certificate, tls_key and tls_ca are set; " +
	"or set plaintext where nobody but hypervisors is on the network"

// validateTLS checks the keys of encryption, and those that say who may connect.
func (c Config) validateTLS() (errs []error) {
	refuse := func(key, value, want string) { errs = append(errs, &ValueError{key, value, want}) }
	_, encrypted := c.TLS()
	for _, file := range []struct{ key, path string }{
		{"tls_certificate", c.TLSCertificate}, {"tls_key", c.TLSKey}, {"tls_ca", c.TLSCA},
	} {
		if encrypted && !filepath.IsAbs(file.path) {
			refuse(file.key, file.path, "the absolute path of a PEM file: tls_certificate, tls_key and tls_ca go together")
		}
	}
	for _, peer := range c.Peers {
		if _, err := mtls.ParsePeer(peer); err != nil {
			refuse("peers", peer, fmt.Sprintf("a name of a certificate, then patterns of VM names, "+
				"as in \"spiffe://example/host/a web-*\" (%v)", err))
		}
	}
	if !encrypted {
		if len(c.Peers) > 0 {
			refuse("peers", c.Peers[0], "empty unless tls_certificate is set: names come from certificates")
		}
		if len(c.Operators) > 0 {
			refuse("operators", c.Operators[0], "empty unless tls_certificate is set: names come from certificates")
		}
		if !c.Plaintext && validListen(c.Listen) && !mtls.Loopback(c.Listen) {
			refuse("listen", c.Listen, encryption)
		}
		if !c.Plaintext && validListen(c.ControlListen) && !mtls.Loopback(c.ControlListen) {
			refuse("control_listen", c.ControlListen, encryption)
		}
		if !c.Plaintext && validListen(c.HTTPListen) && !mtls.Loopback(c.HTTPListen) {
			refuse("http_listen", c.HTTPListen, encryption)
		}
		if len(c.MetricsClients) > 0 {
			refuse("metrics_clients", c.MetricsClients[0],
				"empty unless tls_certificate is set: names come from certificates")
		}
		if !c.Plaintext && validListen(c.MetricsListen) && !mtls.Loopback(c.MetricsListen) {
			refuse("metrics_listen", c.MetricsListen, encryption)
		}
		if !c.Plaintext && validRemote(c.TracesTo) && !mtls.Loopback(c.TracesTo) {
			refuse("traces_to", c.TracesTo, encryption)
		}
	}
	if encrypted && c.ControlListen != "" && len(c.Operators) == 0 {
		refuse("operators", "", "the names in the certificates of those who may use control_listen: they control the VMs")
	}
	if encrypted && validListen(c.HTTPListen) && len(c.Operators) == 0 {
		refuse("operators", "", "the names in the certificates of those who may use http_listen: they control the VMs")
	}
	if encrypted && validListen(c.MetricsListen) && len(c.MetricsClients) == 0 {
		refuse("metrics_clients", "", "the names in the certificates of those who may read metrics_listen")
	}
	return errs
}

// validEither says whether address is a HOST:PORT, the path of a Unix socket, or empty.
func validEither(address string) bool {
	return address == "" || validListen(address) || filepath.IsAbs(address) && len(address) <= maxSocketPath
}

// validListen reports whether a socket can be bound to address.
func validListen(address string) bool {
	_, port, err := net.SplitHostPort(address)
	return err == nil && validPort(port)
}

// validRemote reports whether other hosts can connect to address: its host is
// not the unspecified address, and its port is not 0.
func validRemote(address string) bool {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || strings.ContainsAny(host, " /") {
		return false
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
		return false
	}
	return validPort(port) && port != "0"
}

func validPort(port string) bool {
	_, err := strconv.ParseUint(port, 10, 16)
	return err == nil
}
