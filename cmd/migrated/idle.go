// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/evacuation"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type idleCmd struct {
	Config  *string `placeholder:"PATH" predictor:"file" help:"Configuration file of the daemon (default: ${config_path} if there is one)."`
	Stopped bool    `help:"No daemon runs: use only the files that the last one left."`
}

func (idleCmd) Help() string {
	return `Succeeds if no migration from or to this host, and no evacuation of it, is under way. Otherwise it fails ` +
		`with exit code 8 and names them. A paused evacuation counts; with --stopped none does. ` +
		`Run it before you reboot the host, remove migrated or install an older version. A failed ` +
		`migration counts, too, as long as its VM needs the daemon or the memory on this host.

It reads the daemon's state directory, and so needs root.

Examples:

    migrated idle && reboot

    # The daemon was stopped
    migrated idle --stopped`
}

func (i *idleCmd) Run(a *app) error {
	cfg, err := loadConfig(i.Config)
	if err != nil {
		return &failure{exit: exitFailed, message: err.Error(),
			remedy: "correct the configuration, which says where the daemon and its state directory are"}
	}
	ids, err := migration.UnderWay(cfg.StateDir)
	if err != nil {
		return &failure{exit: exitFailed, message: "cannot tell which migrations are under way: " + err.Error(),
			remedy: cmp.Or(migration.Remedy(err), "run the command as root")}
	}
	states := make(map[string]string) // of migrations that the daemon knows, by id
	if !i.Stopped {
		if a.daemon == "unix://"+config.Default().Socket {
			a.daemon = "unix://" + cfg.Socket
		}
		if err := a.withClient(func(ctx context.Context, c *daemonClient) error {
			all, err := c.all(ctx)
			for _, m := range all {
				states[m.GetId()] = migration.StateName(m.GetState())
				if !migration.Terminal(m.GetState()) && !slices.Contains(ids, m.GetId()) {
					ids = append(ids, m.GetId())
				}
			}
			if err != nil {
				return c.explain("", err)
			}
			return c.noEvacuation(ctx)
		}); err != nil {
			return err
		}
	}
	return a.sayUnderWay(ids, states)
}

// noEvacuation fails if an evacuation is under way, because it would begin more migrations.
func (c *daemonClient) noEvacuation(ctx context.Context) error {
	answer, err := c.ListEvacuations(ctx, &migratedv1.ListEvacuationsRequest{})
	if status.Code(err) == codes.Unimplemented {
		return nil // an older daemon
	}
	for _, view := range answer.GetEvacuations() {
		if !evacuation.Over(view.GetState()) {
			return &failure{exit: exitUnderWay,
				message: "evacuation " + view.GetId() + " is under way: " + evacuationMeaning(view),
				remedy: fmt.Sprintf("wait for it with \"migrated evacuation watch %s\", "+
					"or end it with \"migrated evacuation cancel %[1]s\"", view.GetId())}
		}
	}
	return c.explainEvacuation(err)
}

// sayUnderWay returns a failure that names the migrations under way, or prints that there are none. states need not
// have all of them.
func (a *app) sayUnderWay(ids []string, states map[string]string) error {
	if len(ids) > 0 {
		named := make([]string, len(ids))
		for i, id := range ids {
			named[i] = id
			if state := states[id]; state != "" {
				named[i] += " (" + state + ")"
			}
		}
		slices.Sort(named)
		return &failure{exit: exitUnderWay,
			message: plural(uint64(len(ids)), "migration") + " under way on this host: " + strings.Join(named, ", "),
			remedy:  `wait for it with "migrated watch ID"; if it failed, "migrated status ID" says what its VM needs`}
	}
	if a.json {
		line, err := json.Marshal(map[string][]string{"underWay": {}})
		if err != nil {
			return fmt.Errorf("encoding the answer as JSON: %w", err)
		}
		a.printf("%s\n", line)
		return nil
	}
	a.printf("No migration is under way on this host.\n")
	return nil
}

// loadConfig reads the file at path. If path is nil, it reads the file at the default path, or returns the defaults if
// there is none.
func loadConfig(path *string) (config.Config, error) {
	if path != nil {
		return config.Load(*path)
	}
	cfg, err := config.Load(config.DefaultPath)
	if errors.Is(err, fs.ErrNotExist) {
		return config.Default(), nil
	}
	return cfg, err
}
