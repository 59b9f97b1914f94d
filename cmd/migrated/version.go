// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version string

// versionString returns the version of this program: the one that the build set, or
// else that of the module or the commit.
func versionString() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	settings := make(map[string]string)
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	revision := settings["vcs.revision"]
	if len(revision) < 12 {
		return "devel"
	}
	v := "devel-" + revision[:12]
	if settings["vcs.modified"] == "true" {
		v += "-modified"
	}
	return v
}

type versionCmd struct{}

func (versionCmd) Help() string {
	return `Prints the version of this program, then that of the daemon. "migrated --version" asks no daemon.

Two daemons need a version of the protocol that both speak; the one shown is the newest that this one speaks.

Examples:

    migrated version
    migrated version --daemon host-b:7601`
}

func (versionCmd) Run(a *app) error {
	if !a.json {
		a.printf("migrated %s (%s %s/%s)\n", versionString(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	}
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.GetVersion(ctx, &migratedv1.GetVersionRequest{})
		if err != nil {
			return c.explain("", err)
		}
		if !a.json {
			a.printf("daemon   %s, protocol %d, at %s\n", answer.GetVersion(), answer.GetProtocol(), a.daemon)
			return nil
		}
		daemon, err := jsonLine(answer)
		if err != nil {
			return err
		}
		line, err := json.Marshal(struct {
			Version string          `json:"version"`
			Daemon  json.RawMessage `json:"daemon"`
		}{versionString(), daemon})
		if err != nil {
			return fmt.Errorf("encoding the versions as JSON: %w", err)
		}
		a.printf("%s\n", line)
		return nil
	})
}
