// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// TestMain lets the test binary run the jobs that the driver starts.
func TestMain(m *testing.M) {
	if role(os.Args) {
		return
	}
	os.Exit(m.Run())
}

// TestOnly: only the named contenders are measured; a name that no contender has is an error.
func TestOnly(t *testing.T) {
	if os.Getuid() != 0 {
		testenv.CannotRun(t, "userfaultfd(2) needs root")
	}
	one := scale{rounds: 1, faults: 64, sharded: 64, mib: 4, gib: []uint64{1, 2}, only: []string{"sizes/2-gib"}}
	r, err := measure(t.Context(), one)
	if errors.Is(err, errNoCompiler) {
		testenv.CannotRun(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if rows := r.Sections["sizes"]; len(r.Sections) != 1 || len(rows) != 1 ||
		rows[0].Name != "2-gib" || rows[0].Sweep <= 0 || len(r.Ratios) != 0 {
		t.Errorf("measured %+v, ratios %v", r.Sections, r.Ratios)
	}
	one.only = []string{"size"}
	if _, err := measure(t.Context(), one); err == nil {
		t.Error("a section that does not exist is measured")
	}
}

// TestSmoke runs every contender once with little to do. It checks that there are figures; these mean nothing.
func TestSmoke(t *testing.T) {
	if os.Getuid() != 0 {
		testenv.CannotRun(t, "userfaultfd(2) needs root")
	}
	out := filepath.Join(t.TempDir(), "build", "micro.json")
	small := scale{
		rounds: 1, faults: 64, sharded: 64, mib: 4, threads: []int{1, 3}, uffds: []int{1, 2}, gib: []uint64{1},
		profiles: t.TempDir(),
	}
	err := run(t.Context(), small, out)
	if errors.Is(err, errNoCompiler) {
		testenv.CannotRun(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	var r struct {
		CPUs     int
		Kernel   string
		Rounds   int
		Ratios   []map[string]any
		Sections map[string][]map[string]any
	}
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	if r.CPUs < 1 || r.Kernel == "" || r.Rounds != 1 || len(r.Ratios) != 19 {
		t.Errorf("%+v", r)
	}
	for _, x := range r.Ratios {
		if v, _ := x["value"].(float64); v <= 0 {
			t.Errorf("ratio %v", x)
		}
	}
	latencies := []string{"p50_us", "p90_us", "p99_us", "per_second"}
	for section, want := range map[string]struct {
		names, keys []string
	}{
		"faults": {
			[]string{
				"floor", "floor-poll", "floor-spin", "floor-one-cpu", "floor-tcp", "floor-tcp-one-cpu",
				"bare", "instant", "memory", "pipe", "local", "remote", "remote-tls", "grpc", "plain", "remote-rising",
			},
			latencies,
		},
		"round_trips": {[]string{"wake", "wake-one-cpu", "tcp", "tcp-one-cpu", "tcp-go", "lane"}, latencies},
		"throughput": {
			[]string{"memcpy", "uffdio-copy", "sweep-install", "sweep", "sweep-tls", "sweep-grpc", "serve"},
			[]string{"mb_per_second"},
		},
		"shards":       {[]string{"1x1", "1x2", "3x1", "3x2"}, append(latencies, "inside_p50_us")},
		"shards_alone": {[]string{"1x1", "1x2", "3x1", "3x2"}, append(latencies, "inside_p50_us")},
		"sizes": {
			[]string{"1-gib"}, []string{"p50_us", "p99_us", "sweep_ms", "rss_mib", "source_rss_mib", "limit_rss_mib"},
		},
	} {
		rows := r.Sections[section]
		if len(rows) != len(want.names) {
			t.Errorf("section %s has %d rows: %v", section, len(rows), rows)
			continue
		}
		for i, name := range want.names {
			for _, key := range want.keys {
				if v, _ := rows[i][key].(float64); rows[i]["name"] != name || v <= 0 {
					t.Errorf("section %s, row %d (%s): %s is missing in %v", section, i, name, key, rows[i])
				}
			}
		}
	}
}
