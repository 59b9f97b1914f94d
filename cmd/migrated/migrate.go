// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/pkg/client"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type migrateCmd struct {
	VM             string            `name:"vm" placeholder:"PATH" predictor:"file" help:"QMP Unix socket of the VM's QEMU, on this host; or libvirt:NAME, a domain of libvirt's (or libvirt:UUID, or libvirt+unix:///NAME?socket=PATH)."`
	To             string            `placeholder:"HOST[:PORT]" help:"Daemon of the destination host (default port: ${port})."`
	ID             string            `name:"id" placeholder:"ID" predictor:"migration" help:"Name of the migration, by which it can be watched, cancelled and safely started twice; without one the daemon makes one up. With --vm and --to left out: the prepared migration to start."`
	ToQMP          string            `name:"to-qmp" placeholder:"PATH" help:"QMP socket, on the destination host, of a QEMU started with \"-S -incoming defer\". Without it the destination daemon starts one like the source's."`
	Template       string            `placeholder:"NAME" help:"Template, in the template_dir of the destination host, of the command line that QEMU is started with there."`
	KeepSource     bool              `help:"Leave the stopped source QEMU in place when all memory has left it; it does not continue the VM."`
	Persistent     bool              `help:"Of a domain of libvirt's: define it at the destination as well, so that it stays when it ends."`
	UndefineSource bool              `help:"Of a domain of libvirt's: remove its definition here when all memory has left it. With --persistent only once the destination has said that it is defined there; 'migrated status' says where it stays."`
	XML            string            `name:"xml" placeholder:"FILE" predictor:"file" help:"Of a domain of libvirt's: the definition with which it is started at the destination, instead of the one that it has here."`
	RequireSecure  bool              `help:"Fail, before the VM is touched, if no security module supervises the destination's userfaultfd (\"unsupervised\" in \"migrated status\")."`
	Bandwidth      string            `placeholder:"BYTES/S" help:"Highest rate at which memory may cross the network, in bytes a second as QEMU writes them: 500M are 500 MiB. Pages that the VM waits for are neither held up nor counted. \"migrated bandwidth\" changes it later."`
	Weight         uint32            `placeholder:"N" help:"The VM's share of this host's host_bandwidth, relative to other VMs that leave it at the same time: with 3 it gets three times as much as a VM without a weight. At most 1000."`
	QueueLimit     *time.Duration    `placeholder:"DURATION" help:"How long the migration may wait for its turn while as many are under way as either host allows (default: 1h). With 0s it is refused at once."`
	Rehearse       bool              `help:"Do all but the commit, and report what the migration would cost: the VM stops for about that long, and goes on here."`
	FreezeLimit    time.Duration     `placeholder:"DURATION" help:"How long the VM may stand still for the switch before it is given back to the source, as in 500ms (default: 10s). It ends when the destination is told to run the VM."`
	EarlyPause     time.Duration     `name:"early-pause-limit" placeholder:"DURATION" help:"How long the VM may stand still for loading its devices early (default: 1s). If it takes longer, it is not tried again."`
	NoEarlyLoad    bool              `help:"Do not stop the VM for some milliseconds while it is prepared. By default the state of its devices is saved then and loaded by the destination, so that only what has changed is loaded while the VM stands still for the switch."`
	PrepareLimit   time.Duration     `placeholder:"DURATION" help:"Give up if the migration is not prepared after so long, as in 2m (default: no limit)."`
	SwitchLimit    time.Duration     `placeholder:"DURATION" help:"Give up if the VM is not handed over so long after the start."`
	TotalLimit     time.Duration     `placeholder:"DURATION" help:"Give up if not all memory is at the destination so long after the start. A migration whose VM is handed over is not given up, but shown as overdue."`
	Label          map[string]string `mapsep:"none" placeholder:"KEY=VALUE" help:"Label, which \"migrated list --label\" finds it by; may be given several times."`
	PrepareOnly    bool              `xor:"mode" help:"Do all that can be done while the VM runs, then stop: \"migrated migrate --id ID\" switches over later."`
	Detach         bool              `xor:"mode" help:"Return once the daemon has taken the migration on."`
	Interval       time.Duration     `default:"1s" help:"Shortest time between two lines if standard output is no terminal (default: ${default})."`
}

func (migrateCmd) Help() string {
	return `Moves the VM to the other host and follows it until all its memory is there. Until the VM runs at the ` +
		`destination every failure leaves it running here. Interrupting the command does not interrupt the migration.

Examples:

    # Move a VM; the daemon of host-b starts QEMU as it was started here
    migrated migrate --vm /run/qemu/db.qmp --to host-b

    # Into a QEMU that a management system started over there
    migrated migrate --vm /run/qemu/db.qmp --to host-b --to-qmp /run/qemu/db-in.qmp

    # Move a domain of libvirt's; the daemon of host-b has its own libvirt start it
    migrated migrate --vm libvirt:db --to host-b --persistent --undefine-source

    # Leave room on the link for others
    migrated migrate --vm /run/qemu/db.qmp --to host-b --bandwidth 500M

    # Find out first whether it can be moved, and how long it would stand still
    migrated migrate --vm /run/qemu/db.qmp --to host-b --rehearse

    # Prepare now, switch over at a chosen moment
    migrated migrate --vm /run/qemu/db.qmp --to host-b --id db-1 --prepare-only
    migrated migrate --id db-1`
}

func (c *migrateCmd) Run(a *app) error {
	spec, err := c.spec(a.daemon)
	if err != nil {
		return err
	}
	return a.withClient(func(ctx context.Context, cl *daemonClient) error {
		m, err := c.begin(ctx, cl, spec)
		if err != nil {
			return err
		}
		if c.Detach {
			return a.detached(m)
		}
		done := toTheEnd
		if c.PrepareOnly {
			done = (*migratedv1.Migration).GetPrepared
		}
		m, err = cl.follow(m.GetId(), a.display(c.Interval), done)
		if err != nil {
			return err
		}
		if c.PrepareOnly && !migration.Terminal(m.GetState()) && !a.json {
			a.printf("%s is prepared; \"migrated migrate --id %s\" switches over, \"migrated cancel %s\" gives up\n",
				m.GetId(), m.GetId(), m.GetId())
		}
		return outcome(m)
	})
}

// begin makes the daemon prepare or start the migration.
func (c *migrateCmd) begin(
	ctx context.Context, cl *daemonClient, spec *migratedv1.MigrationSpec,
) (*migratedv1.Migration, error) {
	id := c.ID
	explain := func(err error) error {
		if status.Code(err) == codes.FailedPrecondition && spec != nil {
			id = "" // no migration was made
		}
		return cl.explain(id, err)
	}
	if c.PrepareOnly {
		answer, err := cl.Prepare(ctx, &migratedv1.PrepareRequest{Id: c.ID, Spec: spec})
		return answer.GetMigration(), explain(err)
	}
	answer, err := cl.Start(ctx, &migratedv1.StartRequest{Id: c.ID, Spec: spec})
	return answer.GetMigration(), explain(err)
}

// detached prints which migration has begun, and how to follow it.
func (a *app) detached(m *migratedv1.Migration) error {
	if a.json {
		return a.printJSON(m)
	}
	a.printf("%s has begun; \"migrated watch %s\" follows it\n", m.GetId(), m.GetId())
	return nil
}

// spec returns the specification that the flags describe; nil: a prepared migration is to be started.
func (c *migrateCmd) spec(daemon string) (*migratedv1.MigrationSpec, error) {
	wrong := func(format string, args ...any) error {
		return &failure{exit: exitUsage, message: fmt.Sprintf(format, args...),
			remedy: `see "migrated migrate --help" for examples`}
	}
	if c.VM == "" && c.To == "" {
		switch {
		case c.ID == "":
			return nil, wrong("--vm and --to are needed; or --id alone, for a migration that was prepared")
		case c.PrepareOnly || c.ToQMP != "" || c.Template != "" || c.KeepSource || c.RequireSecure || c.Persistent ||
			c.UndefineSource || c.XML != "" || c.Bandwidth != "" || c.Weight != 0 || c.QueueLimit != nil ||
			c.Rehearse || c.NoEarlyLoad || c.FreezeLimit != 0 || c.EarlyPause != 0 ||
			c.PrepareLimit != 0 || c.SwitchLimit != 0 || c.TotalLimit != 0 || len(c.Label) > 0:
			return nil, wrong("a prepared migration is started as it was prepared, with --id alone")
		}
		return nil, nil
	}
	if c.VM == "" || c.To == "" {
		return nil, wrong("--vm and --to are needed together")
	}
	if c.ToQMP != "" && c.Template != "" {
		return nil, wrong("--to-qmp names a QEMU that runs, --template is for one that is started: give one of them")
	}
	if c.ToQMP != "" && !filepath.IsAbs(c.ToQMP) {
		return nil, wrong("--to-qmp %s: a path on the destination host must be absolute", c.ToQMP)
	}
	if !filepath.IsAbs(c.Template) && strings.Contains(c.Template, "/") {
		return nil, wrong("--template %s: give the name of a file in the destination's template_dir", c.Template)
	}
	limit, err := parseBandwidth(c.Bandwidth)
	if err != nil {
		return nil, wrong("--%v", err)
	}
	to, err := withPort(c.To)
	if err != nil {
		return nil, wrong("--to %s: %v", c.To, err)
	}
	definition, err := readXML(c.XML)
	if err != nil {
		return nil, wrong("--xml: %v", err)
	}
	spec := &migratedv1.MigrationSpec{Vm: localPath(daemon, c.VM), Destination: to,
		DestinationQmp: c.ToQMP, DestinationTemplate: c.Template, KeepSource: c.KeepSource, RequireSecure: c.RequireSecure,
		Persistent: c.Persistent, UndefineSource: c.UndefineSource, DestinationXml: definition,
		Bandwidth: limit, Rehearse: c.Rehearse, NoEarlyLoad: c.NoEarlyLoad,
		FreezeLimit: durationFlag(c.FreezeLimit), EarlyPauseLimit: durationFlag(c.EarlyPause),
		PrepareLimit: durationFlag(c.PrepareLimit), SwitchLimit: durationFlag(c.SwitchLimit),
		TotalLimit: durationFlag(c.TotalLimit), Labels: c.Label, Weight: c.Weight}
	if c.QueueLimit != nil { // 0 is not the same as no flag
		spec.QueueLimit = durationpb.New(*c.QueueLimit)
	}
	return spec, nil
}

// durationFlag returns the value of a flag; nil: it was not given.
func durationFlag(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

// readXML reads the file of --xml. Without the flag it returns an empty definition.
func readXML(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	text, err := os.ReadFile(path)
	return string(text), err
}

// withPort returns HOST:PORT, with the default port if host has none.
func withPort(host string) (string, error) {
	// An IPv6 address without brackets and port is full of colons.
	if ip := net.ParseIP(strings.Trim(host, "[]")); ip != nil || !strings.Contains(host, ":") {
		return net.JoinHostPort(strings.Trim(host, "[]"), config.DefaultPort), nil
	}
	name, port, err := net.SplitHostPort(host)
	switch {
	case err != nil:
		return "", err
	case name == "" || port == "":
		return "", fmt.Errorf("it must be HOST:PORT, as in 10.0.0.2:%s", config.DefaultPort)
	}
	return host, nil
}

// localPath makes the path of a VM absolute for a daemon on this host, which has
// another working directory. It does not change a path for a daemon on another
// host, or the address of a libvirt domain.
func localPath(daemon, path string) string {
	if socket, _ := client.SocketPath(daemon); socket != "" && path != "" && !libvirt.IsAddress(path) {
		if absolute, err := filepath.Abs(path); err == nil {
			return absolute
		}
	}
	return path
}
