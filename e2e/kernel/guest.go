// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Program builds a static program from a package for a guest, and writes it to the path out.
func Program(ctx context.Context, out, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, said)
	}
	return nil
}

// Guest builds the program in ./guest, below the directory of the test that runs, and writes an initramfs into dir that
// has the program as /init, and these files. It returns the path of the initramfs.
func Guest(ctx context.Context, dir string, files ...File) (string, error) {
	program := filepath.Join(dir, "init")
	if err := Program(ctx, program, "./guest"); err != nil {
		return "", err
	}
	return Initramfs(dir, append([]File{{Name: "init", Path: program, Mode: 0o755}}, files...))
}

// Results boots a kernel and returns the outcomes that its guest reports, by name. The guest reports in lines "RESULT
// NAME OUTCOME", where the outcome may be several words, each name once. see is called with each line. A guest ends its
// report with a line "DONE"; without it there is an error, and the results are those until then.
func Results(ctx context.Context, o Options, see func(line string)) (map[string]string, error) {
	results, done := map[string]string{}, false
	err := Boot(ctx, o, func(line string) error {
		see(line)
		words := strings.Fields(line)
		switch {
		case len(words) > 2 && words[0] == "RESULT":
			outcome := strings.Join(words[2:], " ")
			if before, twice := results[words[1]]; twice {
				return fmt.Errorf("%s is reported twice: %s, %s", words[1], before, outcome)
			}
			results[words[1]] = outcome
		case line == "DONE":
			done = true
		}
		return nil
	})
	if !done {
		err = errors.Join(err, errors.New("the guest did not come to its end"))
	}
	return results, err
}
