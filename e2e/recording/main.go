// SPDX-License-Identifier: Apache-2.0

// Command recording draws docs/recording.svg: what "migrated check" and "migrated migrate" print in a terminal while
// they move a real VM between two hosts of the lab.
//
//	lab, daemons, VM (main.go) → bytes of a terminal, with their times (record) → lines (screen.go) → picture (svg.go)
//
// Run it by scripts/recording.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/creack/pty"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// timeout bounds a recording. It is ten times what a recording takes.
const timeout = 5 * time.Minute

// The link between the hosts. On a faster one the move would be over before a viewer could see it.
var link = lab.Link{Rate: 1e9, Delay: 100 * time.Microsecond}

// columns is the width of the terminal.
const columns = 100

func main() {
	out := flag.String("out", "docs/recording.svg", "`file` of the picture")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := run(ctx, *out); err != nil {
		fmt.Fprintln(os.Stderr, "recording:", err)
		os.Exit(1) //nolint:gocritic // nothing is left to be released
	}
}

func run(ctx context.Context, out string) (err error) {
	kernel, initrd, err := image.LinuxWithVirtio(ctx)
	if err != nil {
		return err
	}
	l, err := lab.NewWithLink(ctx, link)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	for _, h := range l.Hosts() {
		if err := h.MakeVMDir(); err != nil {
			return err
		}
		if _, err := h.StartDaemon(ctx, os.Stderr); err != nil {
			return err
		}
	}
	var guest report.Log
	vm := lab.RealVM(kernel, initrd, 1024, 1, 1, "migrated.mem=512", "migrated.ws=128", "migrated.workers=2",
		"migrated.rate=2000", "migrated.write=50", "migrated.window=200ms")
	port, err := l.A.Boot(ctx, vm, &guest)
	if err != nil {
		return err
	}
	if err := port.Close(); err != nil {
		return err
	}
	s := newScreen(columns)
	for _, args := range [][]string{
		{"check", "--vm", lab.QMPPath, "--to", l.B.Addr},
		{"migrate", "--vm", lab.QMPPath, "--to", l.B.Addr, "--id", "db-1"},
	} {
		if err := record(ctx, s, l.A, args); err != nil {
			return fmt.Errorf("migrated %v: %w", args, err)
		}
	}
	picture, err := s.svg()
	if err != nil {
		return err
	}
	return os.WriteFile(out, picture, 0o644)
}

// record runs a command of migrated's on a host, in a terminal, and writes its output to the screen.
func record(ctx context.Context, s *screen, h *lab.Host, args []string) error {
	binary, err := lab.Binary()
	if err != nil {
		return err
	}
	s.prompt("migrated", args)
	began := time.Now()
	cmd := h.Command(ctx, append([]string{binary}, args...)...)
	terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 40, Cols: columns})
	if err != nil {
		return err
	}
	defer terminal.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := terminal.Read(buffer)
		if writeErr := s.write(time.Since(began), buffer[:n]); writeErr != nil {
			return writeErr
		}
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.EIO) { // the command has closed the terminal
			break
		}
		if err != nil {
			return err
		}
	}
	err = cmd.Wait()
	s.ends(time.Since(began))
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("exit code %d", exit.ExitCode())
	}
	return err
}
