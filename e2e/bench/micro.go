// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/migrated-vm/migrated/e2e/checkout"
)

// microReport is e2e/floor's comparison of the engine with the bare system call, in the same run.
type microReport struct {
	Rounds int          `json:"rounds"`
	Ratios []microRatio `json:"ratios"`
}

type microRatio struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"` // median over the rounds
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
}

// Names of ratios of e2e/floor that the targets are about, and the contenders that they need.
const (
	microSweep    = "sweep / UFFDIO_COPY"
	microSweepTLS = "sweep with TLS / UFFDIO_COPY"
	microFaultTLS = "network fault with TLS / without"

	microContenders = "uffdio-copy,sweep,sweep-tls,remote,remote-tls"
)

// microRounds is how often each contender of e2e/floor runs. These runs are short, and vary more than moves do.
const microRounds = 5

// measureMicro runs the contenders of e2e/floor that the targets are about.
func measureMicro(ctx context.Context, o options) (*microReport, error) {
	root, err := checkout.Root()
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "bench-micro.json")
	cmd := exec.CommandContext(ctx, "go", "run", "./e2e/floor", "--only", microContenders,
		"--rounds", strconv.Itoa(microRounds), "--out", out)
	cmd.Dir, cmd.Stdout, cmd.Stderr = root, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("e2e/floor: %w", err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	var r microReport
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", out, err)
	}
	return &r, nil
}
