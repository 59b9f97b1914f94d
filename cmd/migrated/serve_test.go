// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/internal/config"
)

// TestServeSettings: the file overrides the defaults, and flags override the file, for each type of value.
func TestServeSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "m.yaml")
	if err := os.WriteFile(file, []byte("listen: 10.0.0.1:7600\nplaintext: true\nfault_workers: 3\n"+
		"advertise: [10.0.0.1:7600]\nlog_level: warn\nrequire_secure: true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fromFile := config.Default()
	fromFile.Listen, fromFile.FaultWorkers, fromFile.Advertise, fromFile.LogLevel =
		"10.0.0.1:7600", 3, []string{"10.0.0.1:7600"}, "warn"
	fromFile.RequireSecure, fromFile.Plaintext = true, true
	overridden := fromFile
	overridden.RequireSecure = false
	overridden.Listen, overridden.FaultWorkers, overridden.Advertise =
		"10.0.0.2:7600", 0, []string{"10.0.0.2:7600", "10.9.0.2:7600"}
	every := config.Config{
		Listen: "h:1", Socket: "/s", SocketGroup: "g", ControlListen: "h:2", HTTPListen: "/hs",
		Advertise: []string{"h:3"}, StateDir: "/d", ReportKeep: 8, LogDir: "/l", QEMUCgroup: "/vms",
		TLSCertificate: "/c", TLSKey: "/k", TLSCA: "/ca", Peers: []string{"p"}, Operators: []string{"o"}, Plaintext: true,
		MetricsListen: "h:4", MetricsClients: []string{"mc"}, Pprof: true, TracesTo: "h:5",
		QEMUBinaries: []string{"/q", "/r"}, FaultWorkers: 5, MaxIncoming: 6, MaxOutgoing: 7,
		TemplateDir: "/t", LibvirtSocket: "/ls", LibvirtHook: "/lh", MinUID: 7, RunAs: "vm",
		ForbiddenOptions: []string{"fsdev"}, RequireSecure: true, Bandwidth: "500M", HostBandwidth: "2G",
		LogLevel: "error", LogFormat: "json",
	}
	for _, test := range []struct {
		name string
		args []string
		want config.Config
	}{
		{"file", []string{"--config", file}, fromFile},
		{"flags override the file, also with a zero", []string{
			"--config", file, "--listen", "10.0.0.2:7600", "--fault-workers", "0", "--require-secure=false",
			"--advertise", "10.0.0.2:7600", "--advertise", "10.9.0.2:7600",
		}, overridden},
		{"every flag", []string{
			"--config", file, "--listen=h:1", "--socket=/s", "--socket-group=g", "--control-listen=h:2",
			"--http-listen=/hs", "--advertise=h:3", "--state-dir=/d", "--report-keep=8", "--log-dir=/l",
			"--qemu-cgroup=/vms", "--plaintext", "--tls-certificate=/c", "--tls-key=/k", "--tls-ca=/ca", "--peers=p",
			"--operators=o", "--metrics-listen=h:4", "--metrics-clients=mc", "--pprof", "--traces-to=h:5",
			"--qemu-binaries=/q,/r", "--fault-workers=5", "--max-incoming=6", "--max-outgoing=7",
			"--libvirt-socket=/ls", "--libvirt-hook=/lh", "--template-dir=/t", "--min-uid=7", "--run-as=vm",
			"--forbidden-options=fsdev", "--require-secure", "--bandwidth", "500M", "--host-bandwidth", "2G",
			"--log-level=error", "--log-format=json",
		}, every},
	} {
		t.Run(test.name, func(t *testing.T) {
			var c cli
			parser, err := newParser(&c, io.Discard, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parser.Parse(append([]string{"serve"}, test.args...)); err != nil {
				t.Fatal(err)
			}
			a := new(app)
			a.setFlags(&c)
			got, err := c.Serve.load(a)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestHookWithoutBinaries: the process that calls the hook starts also where no binary is allowed.
func TestHookWithoutBinaries(t *testing.T) {
	var c cli
	parser, err := newParser(&c, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse([]string{starterCommand, "/hook"}); err != nil {
		t.Fatal(err)
	}
	if c.Starter.LibvirtHook != "/hook" || len(c.Starter.QEMUBinaries) > 0 {
		t.Errorf("it got %+v", c.Starter)
	}
}

// TestServe runs the daemon in a process of its own. It tells the service manager
// when it serves, answers calls, and ends without an error after SIGTERM.
func TestServe(t *testing.T) {
	dir := t.TempDir()
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	told := func(want string) {
		t.Helper()
		wantTold(t, manager, want)
	}
	socket := filepath.Join(dir, "d.sock")
	serve := exec.Command("migrated", "serve", "--socket", socket, "--listen", "127.0.0.1:0",
		"--state-dir", filepath.Join(dir, "state"))
	serve.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
	var log bytes.Buffer
	serve.Stderr = &log
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = serve.Process.Kill() }() // where the test ends before the daemon
	told("FDSTORE=1\nFDNAME=peers")
	told("FDSTORE=1\nFDNAME=control")
	told("READY=1")

	for _, args := range [][]string{{"version"}, {"list"}} {
		out, err := exec.Command("migrated", append(args, "--daemon", "unix://"+socket)...).CombinedOutput()
		if err != nil {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	if err := serve.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	told("STOPPING=1")
	if err := serve.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, log.String())
	}
}

// TestServeOutlivesItsTerminal: the daemon goes on after SIGHUP, reads its configuration again, and goes on when nobody
// reads its log.
func TestServeOutlivesItsTerminal(t *testing.T) {
	dir := t.TempDir()
	socket, file := filepath.Join(dir, "d.sock"), filepath.Join(dir, "m.yaml")
	if err := os.WriteFile(file, []byte("bandwidth: none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	serve := exec.Command("migrated", "serve", "--config", file, "--socket", socket, "--listen", "127.0.0.1:0",
		"--state-dir", filepath.Join(dir, "state"))
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	serve.Stderr = write
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = serve.Process.Kill() }() // where the test ends before the daemon
	_ = write.Close()
	log := bufio.NewScanner(read)
	awaitLine := func(want string) {
		t.Helper()
		for log.Scan() {
			if strings.Contains(log.Text(), want) {
				return
			}
		}
		t.Fatalf("the log ends without %q: %v", want, log.Err())
	}
	awaitLine("serving")
	for _, step := range []struct{ file, want string }{
		{"bandwidth: 500M\nmax_incoming: 3\n", `"reloaded the configuration" peers=0 operators=0 bandwidth=500M`},
		{"bandwidth: fast\n", "configuration not reloaded"},
	} {
		if err := os.WriteFile(file, []byte(step.file), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := serve.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		awaitLine(step.want)
	}
	_ = read.Close()
	for range 2 { // each logs a line that nobody reads
		if err := serve.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("migrated", "list", "--daemon", "unix://"+socket).CombinedOutput(); err != nil {
			t.Errorf("list: %v\n%s", err, out)
		}
	}
	if err := serve.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := serve.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// TestServeInherits: a daemon uses the sockets that the service manager kept, closes those that the configuration does
// not have, and passes none to its children.
func TestServeInherits(t *testing.T) {
	dir := t.TempDir()
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	socket := filepath.Join(dir, "d.sock")
	kept, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	kept.SetUnlinkOnClose(false)
	old, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for _, l := range []net.Listener{kept, old} {
		f, err := l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// Before the daemon inherits it: Fd makes the socket blocking for all processes that have it.
	inode, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", files[0].Fd()))
	if err != nil {
		t.Fatal(err)
	}
	serve := exec.Command("sh", "-c",
		`LISTEN_PID=$$ exec migrated serve --socket "$1" --listen 127.0.0.1:0 --state-dir "$2"`,
		"sh", socket, filepath.Join(dir, "state"))
	serve.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"), "LISTEN_FDS=2",
		"LISTEN_FDNAMES=control:peers")
	serve.ExtraFiles = files
	var log bytes.Buffer
	serve.Stderr = &log
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = serve.Process.Kill() }() // where the test ends before the daemon
	for _, want := range []string{"FDSTOREREMOVE=1\nFDNAME=peers", "FDSTORE=1\nFDNAME=peers", "READY=1"} {
		wantTold(t, manager, want)
	}
	if out, err := exec.Command("migrated", "version", "--daemon", "unix://"+socket).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, process := range processes {
		stat, err := os.ReadFile(filepath.Join("/proc", process.Name(), "stat"))
		if err != nil || parentOf(string(stat)) != strconv.Itoa(serve.Process.Pid) {
			continue
		}
		links, err := filepath.Glob(filepath.Join("/proc", process.Name(), "fd", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if target, _ := os.Readlink(link); target == inode {
				t.Errorf("the child %s has the socket too", process.Name())
			}
		}
	}
	if err := serve.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wantTold(t, manager, "STOPPING=1")
	if err := serve.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, log.String())
	}
}

// parentOf returns the number of the parent in /proc/PID/stat: the second field after the name, which is in brackets
// and may have any characters.
func parentOf(stat string) string {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 2 {
		return ""
	}
	return fields[1]
}

// wantTold reads the next message to the service manager, which must be want.
func wantTold(t *testing.T, manager *net.UnixConn, want string) {
	t.Helper()
	if err := manager.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	message := make([]byte, 256)
	n, err := manager.Read(message)
	if err != nil {
		t.Fatalf("waiting for %s: %v", want, err)
	}
	if got := string(message[:n]); got != want {
		t.Fatalf("the service manager was told %q, want %q", got, want)
	}
}

func TestServeRefusesBadConfiguration(t *testing.T) {
	file := filepath.Join(t.TempDir(), "m.yaml")
	if err := os.WriteFile(file, []byte("# ours\nlistn: a\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"--config", file}, file + `:2: unknown key "listn"; did you mean "listen"?`},
		{[]string{"--config", file + ".none"}, "no such file or directory"},
		{[]string{"--log-level", "loud"}, `log_level: "loud" cannot be used: it must be debug, info, warn or error`},
		{[]string{"--no-such-flag"}, "unknown flag --no-such-flag"},
	} {
		out, err := exec.Command("migrated", append([]string{"serve"}, test.args...)...).CombinedOutput()
		if code := exitCode(err); code != "78" {
			t.Errorf("%v: exit code %s, want 78, which a panic does not have", test.args, code)
		}
		if !strings.Contains(string(out), test.want) {
			t.Errorf("%v printed\n%s\nwant %s in it", test.args, out, test.want)
		}
	}
}

// TestLogInFlight: a daemon that stops logs the migrations that are not over, and no others.
func TestLogInFlight(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	d, err := startPlayed(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer d.stop()
	var out bytes.Buffer
	logInFlight(socket, slog.New(slog.NewTextHandler(&out, nil)))
	if n := strings.Count(out.String(), "in flight"); n != 1 ||
		!strings.Contains(out.String(), "migration=db-1 vm=postgres role=source state=postcopy-active memory=43.1%") {
		t.Errorf("logged\n%s\nwant db-1 alone in flight", out.String())
	}
}
