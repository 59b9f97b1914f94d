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

// TestScripts runs the scripts in testdata, which use the program as an operator
// does, with the daemon of startPlayed. Each script says what it tests. With
// UPDATE_SCRIPTS set, the output is written into them as the golden one.
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
			"lines":       lines,
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

// lines starts a program, interrupts it when it has printed N lines, and writes these to the file lines.stdout:
// lines N PROGRAM ARG...
func lines(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[0])
	if neg || err != nil || len(args) < 2 {
		ts.Fatalf("usage: lines N PROGRAM ARG...")
	}
	command := exec.Command(args[1], args[2:]...)
	command.Env = append(os.Environ(), "MIGRATED_DAEMON="+ts.Getenv("MIGRATED_DAEMON"), "TZ=UTC")
	stdout, err := command.StdoutPipe()
	ts.Check(err)
	ts.Check(command.Start())
	var printed strings.Builder
	for in := bufio.NewReader(stdout); n > 0; n-- {
		line, err := in.ReadString('\n')
		if printed.WriteString(line); err != nil {
			ts.Fatalf("it ended after\n%s%v", printed.String(), err)
		}
	}
	ts.Check(command.Process.Signal(syscall.SIGINT))
	_ = command.Wait() // it was interrupted
	ts.Check(os.WriteFile(ts.MkAbs("lines.stdout"), []byte(printed.String()), 0o600))
}

// exitCode returns the exit code in the error of a process's Wait, as text.
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
