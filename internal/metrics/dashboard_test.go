// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/units"

	"github.com/migrated-vm/migrated/e2e/guide"
	"github.com/migrated-vm/migrated/e2e/promtool"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// unitsOfPanels are the units of Grafana that the dashboard uses.
var unitsOfPanels = []string{
	units.Short, units.Seconds, units.BytesIEC, units.PercentUnit, units.OpsPerSecond, units.BytesPerSecondSI,
}

// TestDashboard checks the dashboard with Grafana's own schema, which has no unknown fields. It also checks what no
// schema requires: that panels do not overlap, have a description, and query the chosen data source.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	plugins.RegisterDefaultPlugins() // of data sources and kinds of panels
	//lint:ignore SA1019 the newer schema is for dashboards that Grafana itself stores
	var strict, board dashboard.Dashboard //nolint:staticcheck // the same
	// The schema requires options of panels for which Grafana has defaults.
	var wrong cog.BuildErrors
	if err := strict.UnmarshalJSONStrict(text); err != nil && !errors.As(err, &wrong) {
		t.Fatal(err)
	}
	for _, w := range wrong {
		if !strings.Contains(w.Error(), ".options.") ||
			!strings.HasSuffix(w.Error(), "required field is missing from input") {
			t.Error(w)
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	if err := board.Validate(); err != nil {
		t.Error(err)
	}
	var variables []string
	for _, v := range board.Templating.List {
		variables = append(variables, v.Name)
	}
	if !slices.Equal(variables, []string{"datasource", "instance"}) {
		t.Errorf("the variables are %v", variables)
	}
	var panels []dashboard.Panel
	for i, p := range board.Panels {
		if p.Panel == nil {
			t.Fatalf("panel %d is a row", i)
		}
		panels = append(panels, *p.Panel)
	}
	for i, p := range panels {
		checkPanel(t, p)
		for _, other := range panels[:i] {
			if *p.Id == *other.Id || *p.Title == *other.Title {
				t.Errorf("two panels are %d, or %q", *p.Id, *p.Title)
			}
			if overlap(*p.GridPos, *other.GridPos) {
				t.Errorf("%q lies on %q", *p.Title, *other.Title)
			}
		}
	}
}

// checkPanel checks one panel.
func checkPanel(t *testing.T, p dashboard.Panel) {
	t.Helper()
	const dataSource = "${datasource}"
	wrong := func(format string, args ...any) { t.Errorf("panel %d: %s", *p.Id, fmt.Sprintf(format, args...)) }
	if p.Title == nil || *p.Title == "" || p.Description == nil || *p.Description == "" {
		wrong("it has no title, or no description")
	}
	if g := p.GridPos; g == nil || g.W == 0 || g.H == 0 || g.X+g.W > 24 {
		wrong("its place is %v", g)
	}
	if p.FieldConfig == nil || p.FieldConfig.Defaults.Unit == nil ||
		!slices.Contains(unitsOfPanels, *p.FieldConfig.Defaults.Unit) {
		wrong("it has no unit of Grafana's")
	}
	if p.Datasource == nil || p.Datasource.Uid == nil || *p.Datasource.Uid != dataSource {
		wrong("its data source is not the one that was chosen")
	}
	if len(p.Targets) == 0 {
		wrong("it has no query")
	}
	var refs []string
	for _, target := range p.Targets {
		query, ok := target.(*prometheus.Dataquery)
		if !ok {
			if value, is := target.(prometheus.Dataquery); is {
				query, ok = &value, true
			}
		}
		if !ok {
			wrong("a query is %T", target)
			continue
		}
		if query.RefId == nil || slices.Contains(refs, *query.RefId) {
			wrong("a query has no name, or one that another has")
		} else {
			refs = append(refs, *query.RefId)
		}
		if !strings.Contains(query.Expr, `instance=~"$instance"`) {
			wrong("%s is not of the hosts that were chosen", query.Expr)
		}
	}
}

func overlap(a, b dashboard.GridPos) bool {
	return a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H
}

// TestScrapeConfiguration has Prometheus check the configuration in docs/metrics.md.
func TestScrapeConfiguration(t *testing.T) {
	if _, err := promtool.Find(t.Context()); err != nil {
		testenv.CannotRun(t, "no promtool: %v", err)
	}
	page, err := guide.Read("docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, b := range page.Blocks {
		if !strings.HasPrefix(b.Text, "scrape_configs:") {
			continue
		}
		found++
		path := filepath.Join(t.TempDir(), "prometheus.yml")
		if err := os.WriteFile(path, []byte(b.Text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := promtool.Run(t.Context(), "check", "config", "--syntax-only", path); err != nil {
			t.Error(err)
		}
	}
	if found != 1 {
		t.Errorf("docs/metrics.md has %d configurations of Prometheus", found)
	}
}
