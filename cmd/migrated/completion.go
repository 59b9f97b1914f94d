// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"io"
	"os"
	"time"

	"github.com/alecthomas/kong"
	"github.com/posener/complete"
	"github.com/willabides/kongplete"

	"github.com/migrated-vm/migrated/internal/config"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

func (completionCmd) Help() string {
	return `Prints a script that lets a shell complete commands, flags, files and the ids of the migrations that the daemon knows.

Examples:

    # bash, for this user
    echo 'source <(migrated completion bash)' >> ~/.bashrc

    # zsh, after compinit
    echo 'source <(migrated completion zsh)' >> ~/.zshrc

    # fish
    migrated completion fish > ~/.config/fish/completions/migrated.fish`
}

// completionScripts have the shell run migrated itself with the line so far in
// COMP_LINE, see completeLine. The program answers for its own flags that way, and
// a script never has to be renewed.
var completionScripts = map[string]string{
	"bash": `complete -C migrated migrated
`,
	// Sourced, or a file _migrated in $fpath, whose first line compinit reads and which is run at the first completion.
	"zsh": `#compdef migrated
autoload -U +X bashcompinit && bashcompinit
if [[ $funcstack[1] == _migrated ]]; then
    _bash_complete -C migrated
else
    complete -C migrated migrated
fi
`,
	"fish": `function __complete_migrated
    set -lx COMP_LINE (commandline -cp)
    test -z (commandline -ct)
    and set COMP_LINE "$COMP_LINE "
    command migrated
end
complete -f -c migrated -a "(__complete_migrated)"
`,
}

func (c *completionCmd) Run(a *app) error {
	a.printf("%s", completionScripts[c.Shell])
	return nil
}

// completeLine answers and ends the process where a shell asks for a completion.
func completeLine(parser *kong.Kong) {
	kongplete.Complete(parser,
		kongplete.WithPredictor("file", complete.PredictFiles("*")),
		kongplete.WithPredictor("migration", complete.PredictFunc(predictMigrations)))
}

// predictMigrations lists the ids that the daemon knows. Without an answer
// there is nothing to propose: a completion has no place for errors.
func predictMigrations(line complete.Args) []string {
	a := &app{ctx: context.Background(), stderr: io.Discard, timeout: time.Second, daemon: os.Getenv("MIGRATED_DAEMON")}
	if a.daemon == "" {
		a.daemon = "unix://" + config.Default().Socket
	}
	for i, word := range line.All {
		if word == "--daemon" && i+1 < len(line.All) {
			a.daemon = line.All[i+1]
		}
	}
	var ids []string
	_ = a.withClient(func(ctx context.Context, c *client) error {
		answer, err := c.List(ctx, &migratedv1.ListRequest{})
		for _, m := range answer.GetMigrations() {
			ids = append(ids, m.GetId())
		}
		return err
	})
	return ids
}
