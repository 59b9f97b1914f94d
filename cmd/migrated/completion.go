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
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

func (completionCmd) Help() string {
	return `Prints a script that lets a shell complete commands, flags, files and the ids of the migrations that the ` +
		`daemon knows.

Examples:

    # bash, for this user
    echo 'source <(migrated completion bash)' >> ~/.bashrc

    # zsh, after compinit
    echo 'source <(migrated completion zsh)' >> ~/.zshrc

    # fish
    migrated completion fish > ~/.config/fish/completions/migrated.fish`
}

// completionScripts make the shell run migrated itself with the current line in
// COMP_LINE, see completeLine. So the program knows its own flags, and a script
// does not have to be updated with it.
var completionScripts = map[string]string{
	"bash": `complete -C migrated migrated
`,
	// This is sourced, or is a file _migrated in $fpath. compinit reads the first line of that, and the first completion
	// runs it.
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

// completeLine answers and ends the process if a shell asks for a completion.
func completeLine(parser *kong.Kong) {
	kongplete.Complete(parser,
		kongplete.WithPredictor("file", complete.PredictFiles("*")),
		kongplete.WithPredictor("migration", complete.PredictFunc(predictMigrations)))
}

// predictMigrations returns the ids that the daemon knows. If the daemon does not
// answer, it returns none, because a completion cannot show errors.
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
	_ = a.withClient(func(ctx context.Context, c *daemonClient) error {
		all, err := c.all(ctx)
		for _, m := range all {
			ids = append(ids, m.GetId())
		}
		return err
	})
	return ids
}
