// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

//go:embed testdata/*.c testdata/*.h
var sources embed.FS

// errNoCompiler says that the C programs cannot be built here.
var errNoCompiler = errors.New("no C compiler: scripts/setup test installs one")

// compile builds the C programs into dir.
func compile(ctx context.Context, dir string) error {
	if _, err := exec.LookPath("gcc"); err != nil {
		return fmt.Errorf("%w: %w", errNoCompiler, err)
	}
	if err := os.CopyFS(dir, sources); err != nil {
		return err
	}
	for _, name := range []string{"fault", "trip", "fill"} {
		program := exec.CommandContext(ctx, "gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread",
			"-o", filepath.Join(dir, name), filepath.Join(dir, "testdata", name+".c"))
		if text, err := program.CombinedOutput(); err != nil {
			return fmt.Errorf("gcc %s.c: %w: %s", name, err, text)
		}
	}
	return nil
}

// sample is the result of one run of one contender. Each kind of contender fills in some of it.
type sample struct {
	N      int64 `json:"n"` // faults or round trips
	P50    int64 `json:"p50_ns"`
	P90    int64 `json:"p90_ns"`
	P99    int64 `json:"p99_ns"`
	Bytes  int64 `json:"bytes"`
	Wall   int64 `json:"wall_ns"`
	Inside int64 `json:"inside_ns"` // median from a fault's message being read to its page being installed
	Sweep  int64 `json:"sweep_ns"`  // from the sweep's beginning to the last page
	RSS    int64 `json:"rss_bytes"` // peak of the Go process
	Source int64 `json:"source_rss_bytes"`
}

// output runs a program to its end and reads the sample that it prints.
func output(ctx context.Context, name string, args ...string) (s sample, err error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err != nil {
		return s, fmt.Errorf("%s %s: %w", filepath.Base(name), strings.Join(args, " "), err)
	}
	return s, nil
}

// roleArg makes this program do a job.
const roleArg = "floor-job"

func command(ctx context.Context, j job) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	return exec.CommandContext(ctx, self, roleArg, string(text)), nil
}

// do runs a job in a process of its own.
func do(ctx context.Context, j job) (sample, error) {
	cmd, err := command(ctx, j)
	if err != nil {
		return sample{}, err
	}
	return output(ctx, cmd.Path, cmd.Args[1:]...)
}

// server is the process of a source. It ends when its standard input does.
type server struct {
	address string // of the page service

	cmd   *exec.Cmd
	stdin io.Closer
	lines *bufio.Reader
}

func startServer(ctx context.Context, j job) (*server, error) {
	j.Role = "source"
	cmd, err := command(ctx, j)
	if err != nil {
		return nil, err
	}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{cmd: cmd, stdin: stdin, lines: bufio.NewReader(stdout)}
	line, err := s.lines.ReadString('\n')
	if err != nil {
		_, stopErr := s.stop()
		return nil, errors.Join(fmt.Errorf("source: no address: %w", err), stopErr)
	}
	s.address = strings.TrimSpace(line)
	return s, nil
}

// stop ends the process and returns its peak memory in bytes.
func (s *server) stop() (rss int64, err error) {
	_ = s.stdin.Close()
	line, readErr := s.lines.ReadString('\n')
	if err := s.cmd.Wait(); err != nil {
		return 0, fmt.Errorf("source: %w", err)
	}
	if readErr != nil {
		return 0, fmt.Errorf("source: %w", readErr)
	}
	return strconv.ParseInt(strings.TrimSpace(line), 10, 64)
}

// peakRSS returns the most memory that this process had, in bytes: proc(5), VmHWM.
func peakRSS() (int64, error) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		var kib int64
		if n, _ := fmt.Sscanf(string(line), "VmHWM: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, errors.New("/proc/self/status has no VmHWM")
}
