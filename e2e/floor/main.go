// SPDX-License-Identifier: Apache-2.0

// Command floor measures how far the engine is from what the machine can do, in one run and as ratios: a fault against
// a bare loop of read(2) and UFFDIO_COPY, a page fetched against 4 KiB over bare TCP, the sweep against memcpy, and how
// shards and the size of RAM change these.
//
// The contenders take turns, round after round, each in a new process, so that the machine's other load meets all of
// them. The medians over the rounds count. The memory that faults is always that of a C program (testdata/fault.c),
// because a Go process must not wait for its own pages.
//
//	driver (plan.go) ──┬─ C programs of testdata: the floor
//	                   ├─ engine (engine.go): pkg/postcopy and a child that faults
//	                   ├─ client (client.go): a lane without an engine
//	                   └─ source (source.go): pkg/pagesrv, over loopback TCP
//
// docs/fault-budget.md says what the numbers mean.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/jsonfile"
)

// timeout bounds a run. It is ten times what a run takes.
const timeout = 15 * time.Minute

func main() {
	if role(os.Args) {
		return
	}
	s := full
	out := flag.String("out", "build/bench/micro.json", "`file` for the numbers")
	flag.IntVar(&s.rounds, "rounds", s.rounds, "how often each contender runs")
	only := flag.String("only", "", "only these `contenders`, by NAME, SECTION or SECTION/NAME, separated by commas")
	flag.StringVar(&s.profiles, "profiles", "",
		"`directory` for CPU profiles of the engine, one for each contender and round")
	flag.Parse()
	if *only != "" {
		s.only = strings.Split(*only, ",")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := run(ctx, s, *out); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1) //nolint:gocritic // nothing is left to be released
	}
}

func run(ctx context.Context, s scale, out string) error {
	r, err := measure(ctx, s)
	if err != nil {
		return err
	}
	if err := r.print(os.Stdout); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	return jsonfile.Write(out, r)
}

// A job is what the driver tells a process of this program to do.
type job struct {
	Role string // engine, client or source

	Lane    string // how the pages come: see openLanes
	Address string // of the source's process
	Size    uint64 // pages of RAM
	Pages   uint64 // pages that are touched, fetched or have data, evenly spread
	Threads int    // threads that touch them
	Rising  bool   // they are touched in the order of their addresses
	UFFDs   int    // userfaultfds over which RAM is split
	Sweep   bool   // also fetch the rest
	Fault   string // path of the program that faults
	Profile string // file for a CPU profile
	TLS     string // directory of the certificate that both ends show; empty: none
}

// role does the job in args, if any, and returns whether there is one. The driver starts processes with a job.
func role(args []string) bool {
	var j job
	if len(args) != 3 || args[1] != roleArg {
		return false
	}
	err := json.Unmarshal([]byte(args[2]), &j)
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		err = map[string]func(context.Context, job) error{
			"engine": engine, "client": client, "source": source,
		}[j.Role](ctx, j)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "floor: %s %s: %v\n", j.Role, j.Lane, err)
		os.Exit(1) //nolint:gocritic // the process ends
	}
	return true
}
