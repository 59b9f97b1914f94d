// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDefaultIsValid(t *testing.T) {
	if err := Default().Validate(); err != nil {
		t.Fatal(err)
	}
	if got := Default().Level(); got != slog.LevelInfo {
		t.Errorf("Level() = %v, want info", got)
	}
}

// TestExampleEqualsDefaults: the shipped file sets every key to its default.
func TestExampleEqualsDefaults(t *testing.T) {
	const path = "../../deploy/migrated.yaml"
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Errorf("%s differs from Default() (-default +file):\n%s", path, diff)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range Keys() {
		if !strings.Contains(string(data), "\n"+key+":") {
			t.Errorf("%s does not set %s", path, key)
		}
	}
}

func TestLoad(t *testing.T) {
	all := Config{
		Listen: "[::]:7600", Socket: "/tmp/m.sock", SocketGroup: "vmadmins", ControlListen: "127.0.0.1:7601",
		HTTPListen: "/run/m/http.sock", Advertise: []string{"10.0.0.1:7600", "host.example:7600"},
		StateDir: "/var/lib/migrated", ReportKeep: 9, LogDir: "/var/log/vms", QEMUCgroup: "/vms",
		TLSCertificate: "/etc/migrated/tls/cert.pem", TLSKey: "/etc/migrated/tls/key.pem", TLSCA: "/etc/migrated/tls/ca.pem",
		Peers: []string{"spiffe://example/host/a web-*", "b.example"}, Operators: []string{"admin.example"}, Plaintext: true,
		MetricsListen: "/run/m/metrics.sock", MetricsClients: []string{"prometheus.example"}, Pprof: true,
		TracesTo: "otel.example:4317", QEMUBinaries: []string{"/opt/qemu"}, FaultWorkers: 4, MaxIncoming: 5, MaxOutgoing: 3,
		TemplateDir: "/t", LibvirtSocket: "/l", LibvirtHook: "/h", MinUID: 7, RunAs: "vm",
		ForbiddenOptions: []string{"fsdev"}, RequireSecure: true, Bandwidth: "500M", HostBandwidth: "2G",
		LogLevel: "debug", LogFormat: "json",
	}
	one := Default()
	one.FaultWorkers = 3
	none := Default()
	none.QEMUBinaries = []string{}
	for _, test := range []struct {
		name, file string
		want       Config
	}{
		{"empty", "", Default()},
		{"comments only", "# nothing\n# here\n", Default()},
		{"empty document", "---\n", Default()},
		{"one key", "fault_workers: 3\n", one},
		{"null keeps the default", "listen:\nfault_workers: 3\n", one},
		{"a list replaces the default list", "qemu_binaries: []\n", none},
		{"all keys", `
listen: "[::]:7600"
socket: /tmp/m.sock
socket_group: vmadmins
control_listen: 127.0.0.1:7601
http_listen: /run/m/http.sock
advertise: [10.0.0.1:7600, host.example:7600]
state_dir: /var/lib/migrated
report_keep: 9
log_dir: /var/log/vms
qemu_cgroup: /vms
tls_certificate: /etc/migrated/tls/cert.pem
tls_key: /etc/migrated/tls/key.pem
tls_ca: /etc/migrated/tls/ca.pem
peers: ["spiffe://example/host/a web-*", b.example]
operators: [admin.example]
metrics_listen: /run/m/metrics.sock
metrics_clients: [prometheus.example]
pprof: true
traces_to: otel.example:4317
plaintext: true
qemu_binaries:
  - /opt/qemu
template_dir: /t
min_uid: 7
run_as: vm
forbidden_options: [fsdev]
fault_workers: 4
libvirt_socket: /l
libvirt_hook: /h
max_incoming: 5
max_outgoing: 3
require_secure: true
bandwidth: 500M
host_bandwidth: 2G
log_level: debug
log_format: json
`, all},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := Load(write(t, test.file))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadMistakes(t *testing.T) {
	for _, test := range []struct {
		name, file string
		want       []string // each error, without the path
	}{
		{"misspelt", "# c\nlistn: a\n", []string{`2: unknown key "listn"; did you mean "listen"?`}},
		{"as a flag", "fault-workers: 1\n", []string{`1: unknown key "fault-workers"; did you mean "fault_workers"?`}},
		{"case", "Listen: a\n", []string{`1: unknown key "Listen"; did you mean "listen"?`}},
		{"far from any", "colour: 3\n", []string{
			`1: unknown key "colour"; valid keys are advertise, bandwidth, control_listen, fault_workers, ` +
				`forbidden_options, host_bandwidth, http_listen, libvirt_hook, libvirt_socket, listen, log_dir, ` +
				`log_format, log_level, max_incoming, max_outgoing, metrics_clients, metrics_listen, min_uid, ` +
				`operators, peers, plaintext, pprof, qemu_binaries, qemu_cgroup, report_keep, require_secure, ` +
				`run_as, socket, socket_group, state_dir, template_dir, tls_ca, tls_certificate, tls_key, traces_to`}},
		{"text for a number", "fault_workers: many\n", []string{
			`1: fault_workers: "many" is not a whole number (written without quotes)`}},
		{"fraction", "fault_workers: 1.5\n", []string{
			`1: fault_workers: "1.5" is not a whole number (written without quotes)`}},
		{"text for a yes or no", "require_secure: maybe\n", []string{
			`1: require_secure: "maybe" is not true or false (written without quotes)`}},
		{"list for a text", "listen: [a]\n", []string{`1: listen: a list is not a text`}},
		{"text for a list", "advertise: a:1\n", []string{
			`1: advertise: "a:1" is not a list of texts, as in [first, second]`}},
		{"list in a list", "advertise:\n  - a:1\n  - [b]\n", []string{`3: advertise: an entry of the list is not a text`}},
		{"twice", "listen: a\nlisten: b\n", []string{`2: mapping key "listen" already defined at line 1`}},
		{"several", "listn: a\nfault_workers: x\n", []string{
			`1: unknown key "listn"; did you mean "listen"?`,
			`2: fault_workers: "x" is not a whole number (written without quotes)`}},
		{"no mapping", "- a\n", []string{"1: cannot construct !!seq into config.Config; " +
			"the file is a list of KEY: VALUE lines, see deploy/migrated.yaml"}},
		{"no YAML", "listen: a\n  b: c\n", []string{"2: this is not YAML: mapping values are not allowed in this context"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := write(t, test.file)
			_, err := Load(path)
			if err == nil {
				t.Fatal("no error")
			}
			var first *FileError
			if !errors.As(err, &first) {
				t.Fatalf("not a FileError: %v", err)
			}
			got := strings.Split(strings.ReplaceAll(err.Error(), path+":", ""), "\n")
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadMissingFile(t *testing.T) {
	if _, err := Load(filepath.Join(t.TempDir(), "none.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v does not wrap fs.ErrNotExist", err)
	}
}

func encrypt(c *Config) { c.TLSCertificate, c.TLSKey, c.TLSCA = "/c.pem", "/k.pem", "/ca.pem" }

func TestValidate(t *testing.T) {
	for _, test := range []struct {
		name       string
		change     func(*Config)
		key, value string // of the ValueError; empty: valid
	}{
		{"all addresses", func(c *Config) { c.Listen, c.Plaintext = ":7600", true }, "", ""},
		{"all addresses unencrypted", func(c *Config) { c.Listen = ":7600" }, "listen", ":7600"},
		{"another network unencrypted", func(c *Config) { c.Listen = "10.0.0.1:7600" }, "listen", "10.0.0.1:7600"},
		{"control API unencrypted", func(c *Config) { c.ControlListen = "10.0.0.1:7601" }, "control_listen", "10.0.0.1:7601"},
		{"TLS", func(c *Config) { encrypt(c); c.Listen, c.Peers = ":7600", []string{"spiffe://x/a web-*"} }, "", ""},
		{"TLS by halves", func(c *Config) { encrypt(c); c.TLSKey = "" }, "tls_key", ""},
		{"TLS by a relative path", func(c *Config) { encrypt(c); c.TLSCA = "ca.pem" }, "tls_ca", "ca.pem"},
		{"TLS for anybody at the control API", func(c *Config) { encrypt(c); c.ControlListen = "10.0.0.1:7601" },
			"operators", ""},
		{"TLS for operators", func(c *Config) {
			encrypt(c)
			c.ControlListen, c.Operators = "10.0.0.1:7601", []string{"o"}
		}, "", ""},
		{"peers without TLS", func(c *Config) { c.Peers = []string{"a"} }, "peers", "a"},
		{"operators without TLS", func(c *Config) { c.Operators = []string{"a"} }, "operators", "a"},
		{"a peer with a bad pattern", func(c *Config) { encrypt(c); c.Peers = []string{"a ["} }, "peers", "a ["},
		{"any port", func(c *Config) { c.Listen = "127.0.0.1:0" }, "", ""},
		{"no port", func(c *Config) { c.Listen = "127.0.0.1" }, "listen", "127.0.0.1"},
		{"port by name", func(c *Config) { c.Listen = "127.0.0.1:http" }, "listen", "127.0.0.1:http"},
		{"port too big", func(c *Config) { c.Listen = "h:65536" }, "listen", "h:65536"},
		{"no listen", func(c *Config) { c.Listen = "" }, "listen", ""},
		{"relative socket", func(c *Config) { c.Socket = "m.sock" }, "socket", "m.sock"},
		{"longest socket", func(c *Config) { c.Socket = "/" + strings.Repeat("s", 106) }, "", ""},
		{"socket too long", func(c *Config) { c.Socket = "/" + strings.Repeat("s", 107) },
			"socket", "/" + strings.Repeat("s", 107)},
		{"HTTP unencrypted", func(c *Config) { c.HTTPListen = "10.0.0.1:7603" }, "http_listen", "10.0.0.1:7603"},
		{"HTTP for anybody with TLS", func(c *Config) { encrypt(c); c.HTTPListen = "10.0.0.1:7603" }, "operators", ""},
		{"HTTP for operators", func(c *Config) {
			encrypt(c)
			c.HTTPListen, c.Operators = "10.0.0.1:7603", []string{"o"}
		}, "", ""},
		{"HTTP at a socket", func(c *Config) { encrypt(c); c.HTTPListen = "/run/http.sock" }, "", ""},
		{"HTTP on this host", func(c *Config) { c.HTTPListen = "127.0.0.1:7603" }, "", ""},
		{"HTTP at a relative path", func(c *Config) { c.HTTPListen = "http.sock" }, "http_listen", "http.sock"},
		{"metrics unencrypted", func(c *Config) { c.MetricsListen = "10.0.0.1:7602" }, "metrics_listen", "10.0.0.1:7602"},
		{"metrics for anybody with TLS", func(c *Config) { encrypt(c); c.MetricsListen = "10.0.0.1:7602" },
			"metrics_clients", ""},
		{"metrics for one", func(c *Config) {
			encrypt(c)
			c.MetricsListen, c.MetricsClients = "10.0.0.1:7602", []string{"p"}
		}, "", ""},
		{"metrics at a socket", func(c *Config) { encrypt(c); c.MetricsListen = "/run/metrics.sock" }, "", ""},
		{"metrics at a relative path", func(c *Config) { c.MetricsListen = "metrics.sock" },
			"metrics_listen", "metrics.sock"},
		{"metrics for names without TLS", func(c *Config) { c.MetricsClients = []string{"p"} }, "metrics_clients", "p"},
		{"traces to all addresses", func(c *Config) { c.TracesTo = ":4317" }, "traces_to", ":4317"},
		{"traces unencrypted", func(c *Config) { c.TracesTo = "10.0.0.1:4317" }, "traces_to", "10.0.0.1:4317"},
		{"traces with TLS", func(c *Config) { encrypt(c); c.TracesTo = "10.0.0.1:4317" }, "", ""},
		{"traces to this host", func(c *Config) { c.TracesTo = "127.0.0.1:4317" }, "", ""},
		{"profiles nowhere", func(c *Config) { c.Pprof = true }, "pprof", "true"},
		{"log format", func(c *Config) { c.LogFormat = "xml" }, "log_format", "xml"},
		{"control", func(c *Config) { c.ControlListen = "localhost:1" }, "", ""},
		{"control without port", func(c *Config) { c.ControlListen = "localhost" }, "control_listen", "localhost"},
		{"advertised name", func(c *Config) { c.Advertise = []string{"h.example:7600"} }, "", ""},
		{"advertised any port", func(c *Config) { c.Advertise = []string{"10.0.0.1:7600", "10.0.0.1:0"} },
			"advertise", "10.0.0.1:0"},
		{"advertised no host", func(c *Config) { c.Advertise = []string{":7600"} }, "advertise", ":7600"},
		{"advertised any host", func(c *Config) { c.Advertise = []string{"[::]:7600"} }, "advertise", "[::]:7600"},
		{"control group", func(c *Config) { c.QEMUCgroup = "/vms/../x" }, "qemu_cgroup", "/vms/../x"},
		{"relative logs", func(c *Config) { c.LogDir = "log" }, "log_dir", "log"},
		{"relative state", func(c *Config) { c.StateDir = "state" }, "state_dir", "state"},
		{"no QEMU", func(c *Config) { c.QEMUBinaries = nil }, "", ""},
		{"QEMU by name", func(c *Config) { c.QEMUBinaries = []string{"qemu-kvm"} }, "qemu_binaries", "qemu-kvm"},
		{"relative templates", func(c *Config) { c.TemplateDir = "t" }, "template_dir", "t"},
		{"root allowed", func(c *Config) { c.MinUID = 0 }, "", ""},
		{"negative user", func(c *Config) { c.MinUID = -1 }, "min_uid", "-1"},
		{"forbidden with its dash", func(c *Config) { c.ForbiddenOptions = []string{"-fsdev"} },
			"forbidden_options", "-fsdev"},
		{"negative workers", func(c *Config) { c.FaultWorkers = -1 }, "fault_workers", "-1"},
		{"too many workers", func(c *Config) { c.FaultWorkers = 64 }, "fault_workers", "64"},
		{"fewer reports than none", func(c *Config) { c.ReportKeep = -1 }, "report_keep", "-1"},
		{"too many reports", func(c *Config) { c.ReportKeep = 1001 }, "report_keep", "1001"},
		{"no migrations", func(c *Config) { c.MaxIncoming = 0 }, "max_incoming", "0"},
		{"none may leave", func(c *Config) { c.MaxOutgoing = 0 }, "max_outgoing", "0"},
		{"too many may leave", func(c *Config) { c.MaxOutgoing = 65 }, "max_outgoing", "65"},
		{"bandwidth of the host", func(c *Config) { c.HostBandwidth = "1Gbit" }, "host_bandwidth", "1Gbit"},
		{"too many migrations", func(c *Config) { c.MaxIncoming = 65 }, "max_incoming", "65"},
		{"bandwidth", func(c *Config) { c.Bandwidth = "1.5G" }, "", ""},
		{"bandwidth in bits", func(c *Config) { c.Bandwidth = "500Mbit" }, "bandwidth", "500Mbit"},
		{"bandwidth without a unit", func(c *Config) { c.Bandwidth = "500" }, "bandwidth", "500"},
		{"log level", func(c *Config) { c.LogLevel = "INFO" }, "log_level", "INFO"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := Default()
			test.change(&c)
			err := c.Validate()
			if test.key == "" {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			var v *ValueError
			if !errors.As(err, &v) {
				t.Fatalf("not a ValueError: %v", err)
			}
			if v.Key != test.key || v.Value != test.value || v.Want == "" {
				t.Errorf("refused %s %q (%s), want %s %q", v.Key, v.Value, v.Want, test.key, test.value)
			}
		})
	}
}

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "migrated.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
