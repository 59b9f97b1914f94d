// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/migrated-vm/migrated/e2e/jsonfile"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// The sockets at which the daemons serve metrics and the page.
const (
	metricsSocket = "/run/migrated/metrics.sock"
	httpSocket    = "/run/migrated/http.sock"
)

// A watcher is a way to watch both daemons during a move.
type watcher struct {
	name string
	// every is how often the metrics are scraped; 0: never.
	every time.Duration
	// page is set if the daemon's page is open, with the migration in it.
	page bool
}

// watchers are the ways that are compared, all others with the first.
var watchers = []watcher{
	{name: "nobody"}, {name: "a scrape each second", every: time.Second}, {name: "ten a second", every: time.Second / 10},
	{name: "a page open", page: true},
}

// monitoringReport is monitoring.json: what each move has shown, by watcher.
type monitoringReport struct {
	QEMU     string              `json:"qemu"` // its version
	Network  string              `json:"network"`
	Rounds   int                 `json:"rounds"`
	Watchers []*watcherMovements `json:"watchers"`
}

type watcherMovements struct {
	Name   string             `json:"name"`
	Reads  int                `json:"reads"` // scrapes, or events, in all moves
	Spread map[string]*spread `json:"spread"`
	Ratio  map[string]*spread `json:"ratio"` // to the move of the same round that nobody watched
}

// sweepLimit keeps the link free for faults, and makes a move long enough for some scrapes.
const sweepLimit = "48M"

// compareMonitoring moves one VM there and back, in turns with each watcher.
func compareMonitoring(ctx context.Context, o options) (err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	serve := []string{"--metrics-listen", metricsSocket, "--http-listen", httpSocket, "--bandwidth", sweepLimit}
	c := benchCase{qemu: o.qemu, network: networks[0], devices: true, guest: memoryGuest("random", lab.BackendDefault)}
	s, err := c.stage(ctx, o, serve...)
	if err != nil {
		return err
	}
	defer func() { err = s.close(err) }()
	r := monitoringReport{QEMU: o.qemu, Network: c.network.name, Rounds: o.rounds}
	for _, w := range watchers {
		r.Watchers = append(r.Watchers, &watcherMovements{
			Name: w.name, Spread: map[string]*spread{}, Ratio: map[string]*spread{},
		})
	}
	for round := range o.rounds {
		for i := range watchers {
			i := (i + round) % len(watchers) // each begins as often
			m, reads, err := s.moveWatched(ctx, watchers[i])
			if err != nil {
				return fmt.Errorf("round %d, watched by %s: %w", round+1, watchers[i].name, err)
			}
			r.Watchers[i].add(m, reads)
			fmt.Printf("   round %d, %-21s %d faults, mean %v p50 %v p99 %v, %d reads, %v\n",
				round+1, watchers[i].name, m.faults, m.faultMean, m.FaultP50, m.FaultP99, reads, m.figures)
		}
		if err := s.verify(ctx); err != nil {
			return fmt.Errorf("after round %d: %w", round+1, err)
		}
	}
	r.finish()
	if err := r.print(os.Stdout); err != nil {
		return err
	}
	return jsonfile.Write(filepath.Join(o.dir, "monitoring.json"), r)
}

// A watchedMove is what a watched move has shown.
type watchedMove struct {
	figures
	faults    uint64 // that were timed
	faultMean time.Duration
}

// moveWatched moves the VM by migrated while w watches both daemons. reads is how often they were read.
func (s *scene) moveWatched(ctx context.Context, w watcher) (m watchedMove, reads int, err error) {
	to := s.lab.Other(s.at)
	before, err := faultsOf(ctx, to)
	if err != nil {
		return m, 0, err
	}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	var group sync.WaitGroup
	counts, failures := make([]int, len(s.lab.Hosts())), make([]error, len(s.lab.Hosts()))
	id := moveID(s.moves + 1)
	for i, h := range s.lab.Hosts() {
		page := "/events?id=" + id + "&role=source"
		if h == to {
			page = "/events?id=" + id + "&role=destination"
		}
		group.Go(func() { counts[i], failures[i] = w.watch(watching, h, page) })
	}
	m.figures, err = s.move(ctx, contenders[0])
	stop()
	group.Wait()
	if err := errors.Join(err, errors.Join(failures...)); err != nil {
		return m, 0, err
	}
	after, err := faultsOf(ctx, to)
	if m.faults = after.count - before.count; m.faults > 0 {
		m.faultMean = time.Duration((after.seconds - before.seconds) / float64(m.faults) * float64(time.Second))
	}
	for i, n := range counts {
		if n == 0 && (w.every > 0 || w.page) {
			err = errors.Join(err, fmt.Errorf("nothing was read of host %s", s.lab.Hosts()[i].Name))
		}
		reads += n
	}
	return m, reads, err
}

// timedFaults are the faults that a daemon has timed since its start.
type timedFaults struct {
	count   uint64
	seconds float64 // in all
}

// faultsOf reads the faults from a host's daemon. It is called before and after each move, so that a move that nobody
// watches has them, too.
func faultsOf(ctx context.Context, h *lab.Host) (f timedFaults, err error) {
	client := clientOf(h.Path(metricsSocket))
	defer client.CloseIdleConnections()
	var text strings.Builder
	if _, err := read(ctx, client, "/metrics", &text); err != nil {
		return f, err
	}
	const of = "\nmigrated_fault_latency_seconds_"
	for name, into := range map[string]any{"count": &f.count, "sum": &f.seconds} {
		_, rest, _ := strings.Cut(text.String(), of+name+" ")
		if _, err := fmt.Sscan(rest, into); err != nil {
			return f, fmt.Errorf("the metrics of host %s: %w", h.Name, err)
		}
	}
	return f, nil
}

// watch watches a host's daemon until the context ends, and returns how often it read something.
func (w watcher) watch(ctx context.Context, h *lab.Host, page string) (reads int, err error) {
	switch {
	case w.every > 0:
		client := clientOf(h.Path(metricsSocket))
		defer client.CloseIdleConnections()
		ticks := time.NewTicker(w.every)
		defer ticks.Stop()
		for ; ; reads++ {
			if _, err := read(ctx, client, "/metrics", io.Discard); err != nil {
				return reads, unlessOver(ctx, err)
			}
			select {
			case <-ticks.C:
			case <-ctx.Done():
				return reads + 1, nil
			}
		}
	case w.page:
		client := clientOf(h.Path(httpSocket))
		defer client.CloseIdleConnections()
		var events chunkCounter
		_, err := read(ctx, client, page, &events)
		return events.chunks, unlessOver(ctx, err)
	}
	return 0, nil
}

// unlessOver returns err, or nil if the context has ended.
func unlessOver(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return nil
}

// clientOf returns a client of the server at a Unix socket.
func clientOf(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
}

// read copies the answer to a GET of path, and returns its bytes.
func read(ctx context.Context, client *http.Client, path string, to io.Writer) (int64, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, http.NoBody)
	if err != nil {
		return 0, err
	}
	answer, err := client.Do(request)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("%s: %s", path, answer.Status)
	}
	return io.Copy(to, answer.Body)
}

// A chunkCounter counts the writes to it.
type chunkCounter struct{ chunks int }

func (c *chunkCounter) Write(p []byte) (int, error) {
	c.chunks++
	return len(p), nil
}

// monitoringMeasures are the figures that a watcher could change.
var monitoringMeasures = []struct {
	measure
	of func(watchedMove) float64
}{
	{measure{name: "fault_mean", unit: "µs"}, func(m watchedMove) float64 { return ms(m.faultMean) * 1000 }},
	{measure{name: "fault_p50", unit: "µs"}, func(m watchedMove) float64 { return ms(m.FaultP50) * 1000 }},
	{measure{name: "fault_p99", unit: "µs"}, func(m watchedMove) float64 { return ms(m.FaultP99) * 1000 }},
	{measure{name: "downtime", unit: "ms"}, func(m watchedMove) float64 { return ms(m.Downtime) }},
	{measure{name: "cpu_daemons", unit: "s"}, func(m watchedMove) float64 { return m.CPUDaemons.Seconds() }},
}

func (w *watcherMovements) add(m watchedMove, reads int) {
	w.Reads += reads
	for _, measure := range monitoringMeasures {
		if w.Spread[measure.name] == nil {
			w.Spread[measure.name] = &spread{}
		}
		w.Spread[measure.name].All = append(w.Spread[measure.name].All, measure.of(m))
	}
}

// finish computes medians, and the ratios of each round.
func (r *monitoringReport) finish() {
	for _, w := range r.Watchers {
		for name, s := range w.Spread {
			s.finish()
			ratio := &spread{}
			for i, v := range s.All {
				ratio.All = append(ratio.All, v/r.Watchers[0].Spread[name].All[i])
			}
			ratio.finish()
			w.Ratio[name] = ratio
		}
	}
}

func (r *monitoringReport) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "QEMU %s, %s, medians of %d moves (least–most)", r.QEMU, r.Network, r.Rounds)
	for _, by := range r.Watchers {
		fmt.Fprintf(w, "\t%s", by.Name)
	}
	fmt.Fprintln(w)
	for _, m := range monitoringMeasures {
		fmt.Fprint(w, m.label())
		for _, by := range r.Watchers {
			fmt.Fprintf(w, "\t%v", by.Spread[m.name])
		}
		fmt.Fprint(w, "\n  to nobody's, of the same round")
		for _, by := range r.Watchers {
			fmt.Fprintf(w, "\t%v", by.Ratio[m.name])
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}
