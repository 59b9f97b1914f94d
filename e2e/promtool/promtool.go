// SPDX-License-Identifier: Apache-2.0

// Package promtool evaluates the alerts and the dashboard of deploy/monitoring with Prometheus, for tests.
package promtool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/migrated-vm/migrated/e2e/debian"
)

// Find returns the path of promtool: the installed one, or that of Debian's package prometheus. The package is
// downloaded once and never installed, because it would start a server.
func Find(ctx context.Context) (string, error) {
	if path, err := exec.LookPath("promtool"); err == nil {
		return path, nil
	}
	const pkg = "prometheus"
	out, err := exec.CommandContext(ctx, "apt-cache", "policy", pkg).Output()
	if err != nil {
		return "", fmt.Errorf("the version of %s: %w", pkg, err)
	}
	_, rest, _ := strings.Cut(string(out), "Candidate: ")
	version, _, _ := strings.Cut(rest, "\n")
	if version == "" || version == "(none)" {
		return "", fmt.Errorf("no package %s in the lists: apt-get update", pkg)
	}
	dir, err := debian.Extract(ctx, pkg, version)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "usr/bin/promtool"), nil
}

// Run runs promtool.
func Run(ctx context.Context, args ...string) error {
	program, err := Find(ctx)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, args...)
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, said)
	}
	return nil
}

// Queries returns the queries of a dashboard's panels, for one instance or all, with a minute in place of Grafana's
// interval.
func Queries(dashboard string) (queries []string, err error) {
	text, err := os.ReadFile(dashboard)
	if err != nil {
		return nil, err
	}
	var board struct {
		Panels []struct {
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		return nil, fmt.Errorf("%s: %w", dashboard, err)
	}
	variables := strings.NewReplacer("$instance", ".*", "$__rate_interval", "1m")
	for _, panel := range board.Panels {
		for _, target := range panel.Targets {
			queries = append(queries, variables.Replace(target.Expr))
		}
	}
	if len(queries) == 0 {
		return nil, fmt.Errorf("%s has no queries", dashboard)
	}
	return queries, nil
}

// The format of promtool's unit tests.
type (
	testFile struct {
		RuleFiles          []string `yaml:"rule_files"`
		EvaluationInterval string   `yaml:"evaluation_interval"`
		Tests              []test   `yaml:"tests"`
	}
	test struct {
		Interval    string      `yaml:"interval"`
		InputSeries []series    `yaml:"input_series"`
		Exprs       []exprCheck `yaml:"promql_expr_test"`
	}
	series struct {
		Series string `yaml:"series"`
		Values string `yaml:"values"`
	}
	exprCheck struct {
		Expr     string   `yaml:"expr"`
		EvalTime string   `yaml:"eval_time"`
		Samples  []sample `yaml:"exp_samples"`
	}
	sample struct {
		Labels string  `yaml:"labels"`
		Value  float64 `yaml:"value"`
	}
)

// Evaluate evaluates the rules of a file as if the scrapes of daemons, by instance, had stayed the same for 20 minutes.
// At the end exactly the alerts in firing must fire, and every query must have an answer.
func Evaluate(ctx context.Context, scrapes map[string]string, rules string, firing, queries []string) error {
	rules, err := filepath.Abs(rules)
	if err != nil {
		return err
	}
	checked := test{Interval: "15s"}
	for instance, scrape := range scrapes {
		input, err := constant(instance, scrape)
		if err != nil {
			return err
		}
		checked.InputSeries = append(checked.InputSeries, input...)
	}
	one := []sample{{Labels: "{}", Value: 1}}
	for _, alert := range firing {
		checked.Exprs = append(checked.Exprs,
			exprCheck{fmt.Sprintf(`count(count by (alertname) (ALERTS{alertname=%q, alertstate="firing"}))`, alert), "20m", one})
	}
	others := fmt.Sprintf(`count by (alertname) (ALERTS{alertname!~%q, alertstate="firing"})`, strings.Join(firing, "|"))
	checked.Exprs = append(checked.Exprs, exprCheck{others, "20m", nil})
	for _, query := range queries {
		checked.Exprs = append(checked.Exprs, exprCheck{"count(" + query + ") > bool 0", "20m", one})
	}
	text, err := yaml.Marshal(testFile{RuleFiles: []string{rules}, EvaluationInterval: "15s", Tests: []test{checked}})
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "promtool-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "test.yml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return err
	}
	return Run(ctx, "test", "rules", file)
}

// constant turns a scrape of one instance, in Prometheus' text format, into series whose values stay for 20 minutes.
func constant(instance, scrape string) (all []series, err error) {
	for line := range strings.Lines(scrape) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		if at < 0 {
			return nil, fmt.Errorf("%q is no line of a scrape", line)
		}
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("%q is no line of a scrape: %w", line, err)
		}
		name, labels, some := strings.Cut(line[:at], "{")
		if some {
			labels = "," + labels
		} else {
			labels = "}"
		}
		all = append(all, series{
			fmt.Sprintf(`%s{instance=%q,job="migrated"%s`, name, instance, labels),
			strconv.FormatFloat(value, 'f', -1, 64) + "+0x100",
		})
	}
	if len(all) == 0 {
		return nil, errors.New("the scrape is empty")
	}
	return all, nil
}
