// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"

	"github.com/migrated-vm/migrated/e2e/promtool"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

const (
	alertsFile     = "../../deploy/monitoring/alerts.yml"
	alertsTestFile = "../../deploy/monitoring/alerts_test.yml"
	dashboardFile  = "../../deploy/monitoring/dashboard.json"
)

// alert is a rule of alertsFile.
type alert struct {
	Alert       string
	Expr        string
	For         string            `yaml:"for"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

func alerts(t *testing.T) (all []alert) {
	t.Helper()
	text, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []alert
		}
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		t.Fatal("there are no alerts")
	}
	return all
}

// TestMetricsUsedExist: a scrape has all metrics that the dashboard and the alerts use.
func TestMetricsUsedExist(t *testing.T) {
	text := scrape(t, aState())
	queries, err := promtool.Queries(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range alerts(t) {
		queries = append(queries, a.Expr)
	}
	name := regexp.MustCompile(`migrated_[a-z_]+`)
	for _, query := range queries {
		used := name.FindAllString(query, -1)
		if len(used) == 0 {
			t.Errorf("%s uses no metric", query)
		}
		for _, metric := range used {
			if !strings.Contains(text, "\n"+metric+"{") && !strings.Contains(text, "\n"+metric+" ") {
				t.Errorf("%s uses %s, which no scrape has", query, metric)
			}
		}
	}
}

// TestEachAlertHasARunbook: each alert has a runbook, and a case in the test of the rules that makes it fire.
func TestEachAlertHasARunbook(t *testing.T) {
	runbooks, err := os.ReadFile("../../docs/runbooks.md")
	if err != nil {
		t.Fatal(err)
	}
	cases, err := os.ReadFile(alertsTestFile)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, a := range alerts(t) {
		names = append(names, a.Alert)
		if !strings.Contains(string(runbooks), "\n## "+a.Alert+"\n") {
			t.Errorf("%s has no runbook", a.Alert)
		}
		if got, want := a.Annotations["runbook"], "docs/runbooks.md#"+strings.ToLower(a.Alert); got != want {
			t.Errorf("%s says that its runbook is %s, not %s", a.Alert, got, want)
		}
		if !strings.Contains(string(cases), `alertname="`+a.Alert+`"`) {
			t.Errorf("nothing says what makes %s fire", a.Alert)
		}
	}
	for _, heading := range regexp.MustCompile(`(?m)^## (\S+)$`).FindAllStringSubmatch(string(runbooks), -1) {
		if !slices.Contains(names, heading[1]) {
			t.Errorf("the runbook %s is of no alert", heading[1])
		}
	}
}

// TestPromtool has Prometheus check the rules, run their test, and evaluate the dashboard's queries.
func TestPromtool(t *testing.T) {
	if _, err := promtool.Find(t.Context()); err != nil {
		testenv.CannotRun(t, "no promtool: %v", err)
	}
	for _, args := range [][]string{{"check", "rules", "--lint-fatal", alertsFile}, {"test", "rules", alertsTestFile}} {
		if err := promtool.Run(t.Context(), args...); err != nil {
			t.Error(err)
		}
	}
	queries, err := promtool.Queries(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	firing := []string{"MigratedVMStoppedCommitted", "MigratedVMWaitsForPages", "MigratedVMLeftWaiting"}
	if err := promtool.Evaluate(
		t.Context(), map[string]string{"a:7602": scrape(t, aState())}, alertsFile, firing, queries,
	); err != nil {
		t.Error(err)
	}
}
