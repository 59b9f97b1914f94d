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

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type idleCmd struct {
	Config  *string `placeholder:"PATH" predictor:"file" help:"Configuration file of the daemon (default: ${config_path} if there is one)."`
	Stopped bool    `help:"No daemon runs: go by what the last one left, alone."`
}

func (idleCmd) Help() string {
	return `Succeeds if no migration is under way on this host, away from it or to it, and fails with exit code 8 and their names if one is: before the host is rebooted, or before migrated is removed or put back to an older version. A migration that failed counts, too, for as long as its VM needs the daemon or the memory that is here.

It reads the daemon's state directory, and so takes root.

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
	states := make(map[string]string) // of those that the daemon knows
	if !i.Stopped {
		if a.daemon == "unix://"+config.Default().Socket {
			a.daemon = "unix://" + cfg.Socket
		}
		if err := a.withClient(func(ctx context.Context, c *client) error {
			answer, err := c.List(ctx, &migratedv1.ListRequest{})
			for _, m := range answer.GetMigrations() {
				states[m.GetId()] = migration.StateName(m.GetState())
				if !isTerminal(m.GetState()) && !slices.Contains(ids, m.GetId()) {
					ids = append(ids, m.GetId())
				}
			}
			return c.explain("", err)
		}); err != nil {
			return err
		}
	}
	return a.sayUnderWay(ids, states)
}

// sayUnderWay says which migrations are under way. states may lack some.
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

// loadConfig reads the file at path; nil: that at the default path, or the defaults where there is none.
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
