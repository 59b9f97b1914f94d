// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/alecthomas/kong"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/pki"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// cli is the command line, which kong reads from the tags. A command's type has
// a method Run, which executes it, and a method Help with its long help text.
type cli struct {
	Daemon         string        `group:"common" env:"MIGRATED_DAEMON" default:"${socket}" placeholder:"ADDR" help:"The daemon to talk to: unix:///PATH or HOST:PORT (default: ${socket})."`
	Timeout        time.Duration `group:"common" default:"10s" help:"How long to wait for an answer of the daemon; following a migration takes as long as the migration (default: ${default})."`
	JSON           bool          `group:"common" name:"json" help:"Print JSON: one object, or one a line where a migration is followed; errors as an object on standard error. Field names are those of the API (proto/migrated/v1), 64-bit numbers are strings."`
	TLSCertificate string        `group:"tls" name:"tls-certificate" env:"MIGRATED_TLS_CERTIFICATE" type:"path" placeholder:"PATH" predictor:"file" help:"Certificate to show, a PEM file."`
	TLSKey         string        `group:"tls" name:"tls-key" env:"MIGRATED_TLS_KEY" type:"path" placeholder:"PATH" predictor:"file" help:"Its key."`
	TLSCA          string        `group:"tls" name:"tls-ca" env:"MIGRATED_TLS_CA" type:"path" placeholder:"PATH" predictor:"file" help:"Authorities to trust, a PEM file."`
	Plaintext      bool          `group:"tls" help:"Connect and listen without encryption, also beyond this host."`

	Version kong.VersionFlag `group:"common" help:"Print the version of this program and exit."`

	Serve      serveCmd      `cmd:"" help:"Run the daemon of this host."`
	Check      checkCmd      `cmd:"" help:"Say whether this host, and a VM on it, can migrate."`
	Migrate    migrateCmd    `cmd:"" help:"Migrate a VM to another host."`
	List       listCmd       `cmd:"" help:"List the migrations the daemon knows."`
	Status     statusCmd     `cmd:"" help:"Show one migration."`
	Report     reportCmd     `cmd:"" help:"Show all that is known of a migration, for a ticket."`
	Watch      watchCmd      `cmd:"" help:"Follow a migration to its end."`
	Idle       idleCmd       `cmd:"" help:"Say whether no migration is under way on this host."`
	Delete     deleteCmd     `cmd:"" help:"Forget a migration that is over."`
	Cancel     cancelCmd     `cmd:"" help:"Give up a migration that has not switched over."`
	Bandwidth  bandwidthCmd  `cmd:"" help:"Change how much of the network a migration may take."`
	Recover    recoverCmd    `cmd:"" help:"Connect to a migration's source again, also at another address."`
	Fallback   fallbackCmd   `cmd:"" help:"Continue a VM at the source whose destination is lost."`
	Release    releaseCmd    `cmd:"" help:"End what is left at the source of a VM that is at the destination."`
	Abandon    abandonCmd    `cmd:"" help:"End a VM at the destination whose source is lost."`
	VMs        vmsCmd        `cmd:"" name:"vms" help:"List the VMs that run on this host."`
	Evacuate   evacuateCmd   `cmd:"" help:"Move all VMs of this host to others."`
	Evacuation evacuationCmd `cmd:"" help:"Show, pause, resume and cancel evacuations."`
	PKI        pkiCmd        `cmd:"" name:"pki" help:"Make and show certificates."`
	Ver        versionCmd    `cmd:"" name:"version" help:"Print the versions of this program and of the daemon."`
	Completion completionCmd `cmd:"" help:"Print a script that completes this command line in a shell."`
	Man        manCmd        `cmd:"" hidden:""`
	Starter    starterCmd    `cmd:"" name:"start-qemus" hidden:""`
}

// app has what every command needs: the common flags, and where to write.
type app struct {
	ctx     context.Context // ends at the first SIGINT or SIGTERM
	stdout  *os.File
	stderr  io.Writer
	daemon  string
	timeout time.Duration
	json    bool

	tls       mtls.Files
	plaintext bool
}

// setFlags copies the common flags.
func (a *app) setFlags(c *cli) {
	a.daemon, a.timeout, a.json = c.Daemon, c.Timeout, c.JSON
	a.tls = mtls.Files{Certificate: c.TLSCertificate, Key: c.TLSKey, CA: c.TLSCA}
	a.plaintext = c.Plaintext
}

const description = `Migrates running QEMU virtual machines to other hosts by post-copy: the VM runs at the ` +
	`destination at once and its memory follows.

A daemon ("migrated serve") runs on every host. All other commands talk to the one of this host; it does the work, ` +
	`so that a migration goes on when its command is interrupted.`

// newParser builds the parser of the command line.
func newParser(c *cli, stdout, stderr io.Writer) (*kong.Kong, error) {
	defaults := config.Default()
	return kong.New(c,
		kong.Name("migrated"),
		kong.Description(description+"\n\n"+exitCodeHelp()),
		kong.Writers(stdout, stderr),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
		kong.ValueFormatter(func(v *kong.Value) string { return v.Help }),
		kong.ExplicitGroups([]kong.Group{
			{Key: "common", Title: "Flags of all commands:"},
			{Key: "tls", Title: "TLS flags of all commands " +
				"(serve: for its listeners and other daemons; else for the connection to the daemon):"},
			{Key: "settings", Title: "Settings (override the configuration file):"},
		}),
		kong.Vars{
			"version":     "migrated " + versionString(),
			"socket":      "unix://" + defaults.Socket,
			"config_path": config.DefaultPath,
			"port":        config.DefaultPort,

			"authority_days":   strconv.Itoa(pki.MostAuthorityDays),
			"certificate_days": strconv.Itoa(pki.MostCertificateDays),
		})
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string) int {
	var c cli
	parser, err := newParser(&c, os.Stdout, os.Stderr)
	if err != nil {
		// The tags of cli are wrong, which every test of a command shows.
		panic(err)
	}
	completeLine(parser)
	a := &app{ctx: ctx, stdout: os.Stdout, stderr: os.Stderr}
	k, err := parser.Parse(args)
	a.setFlags(&c)
	if err != nil {
		return a.report(usageError(err))
	}
	return a.report(k.Run(a, parser.Model.Node))
}

// usageError returns the failure for a command line that kong refused.
func usageError(err error) error {
	command, exit := "migrated", exitUsage
	var parse *kong.ParseError
	if errors.As(err, &parse) && parse.Context != nil {
		if node := parse.Context.Selected(); node != nil {
			command = node.FullPath()
			if node.Name == "serve" {
				exit = exitConfig
			}
		}
	}
	return &failure{exit: exit, message: err.Error(),
		remedy: "see " + strconv.Quote(command+" --help") + " for what is right, with examples"}
}

// printf writes a line of a command's output. It ignores errors, because the
// reader may have ended, as in "migrated list | head".
func (a *app) printf(format string, args ...any) {
	fmt.Fprintf(a.stdout, format, args...)
}
