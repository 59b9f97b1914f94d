// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	// Under the race detector every process sleeps a second before it exits.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	testscript.Main(m, map[string]func(){"migrated": main})
}

// TestScripts runs the program as an operator does, against the daemon that
// playedDaemon plays. Each script of testdata says what it is about.
// With UPDATE_SCRIPTS set, what is printed is written into them as golden.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Setup: func(env *testscript.Env) error {
			socket := filepath.Join(env.WorkDir, "d.sock")
			d, err := startPlayed(socket)
			if err != nil {
				return err
			}
			env.Defer(d.stop)
			env.Setenv("SOCKET", socket)
			env.Setenv("MIGRATED_DAEMON", "unix://"+socket)
			env.Setenv("TZ", "UTC")
			env.Setenv("GORACE", os.Getenv("GORACE"))
			env.Setenv("COLUMNS", "80") // kong wraps help texts by it
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":       exits,
			"interrupted": interrupted,
		},
	})
}

// exits runs a program and checks its exit code: exits CODE PROGRAM ARG...
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG...")
	}
	if got := exitCode(ts.Exec(args[1], args[2:]...)); got != args[0] {
		ts.Fatalf("%v: exit code %s, want %s", args[1:], got, args[0])
	}
}

// interrupted starts a program, sends it SIGINT when it has printed a line, and
// checks its exit code: interrupted CODE PROGRAM ARG...
func interrupted(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: interrupted CODE PROGRAM ARG...")
	}
	command := exec.Command(args[1], args[2:]...)
	command.Env = append(os.Environ(), "MIGRATED_DAEMON="+ts.Getenv("MIGRATED_DAEMON"))
	var stderr strings.Builder
	command.Stderr = &stderr
	stdout, err := command.StdoutPipe()
	ts.Check(err)
	ts.Check(command.Start())
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		ts.Fatalf("no line printed: %v\n%s", err, stderr.String())
	}
	ts.Check(command.Process.Signal(syscall.SIGINT))
	if got := exitCode(command.Wait()); got != args[0] {
		ts.Fatalf("%v: exit code %s, want %s\n%s", args[1:], got, args[0], stderr.String())
	}
	ts.Check(os.WriteFile(ts.MkAbs("interrupted.stderr"), []byte(stderr.String()), 0o600))
}

// exitCode returns what a process's Wait says as a number in text.
func exitCode(err error) string {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "0"
	case errors.As(err, &exit):
		return strconv.Itoa(exit.ExitCode())
	default:
		return err.Error()
	}
}
