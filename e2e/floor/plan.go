// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"

	"github.com/migrated-vm/migrated/internal/pki"
)

// scale says how much is measured.
type scale struct {
	rounds   int
	faults   uint64 // faults, or round trips, of a contender in a round
	sharded  uint64 // faults of each combination of threads and userfaultfds in a round
	mib      uint64 // amount with which throughput is measured
	threads  []int
	uffds    []int
	gib      []uint64 // sizes of sparse RAM
	profiles string   // directory of CPU profiles, "": none
	only     []string // contenders, by names that isNamed accepts; nil: all
}

var full = scale{
	rounds: 5, faults: 4000, sharded: 6400, mib: 256,
	threads: []int{1, 2, 4, 8, 16, 32, 64}, uffds: []int{1, 2, 4, 8, 16}, gib: []uint64{1, 20, 1024},
}

// The first thread that faults, and the thread in C that answers it, each have a CPU if there are two.
const toucherCPU = 0

var otherCPU = min(1, runtime.NumCPU()-1)

// contender is one thing that is measured.
type contender struct {
	section, name, what string
	run                 func(ctx context.Context, round int) (sample, error)
}

// plan has what all contenders use.
type plan struct {
	scale
	dir string
	// certificate is the directory of the certificate that both ends of a connection by TLS show.
	certificate string
	dense       *server // RAM without a hole, of this round
	listed      []contender
}

// isNamed reports whether only is a contender's name, its section's, or both.
func isNamed(only, section, name string) bool {
	return only == name || only == section || only == section+"/"+name
}

func (p *plan) add(section, name, what string, run func(ctx context.Context, round int) (sample, error)) {
	if p.only != nil && !slices.ContainsFunc(p.only, func(o string) bool { return isNamed(o, section, name) }) {
		return
	}
	p.listed = append(p.listed, contender{section, name, what, run})
}

func (p *plan) program(name string, args ...string) func(context.Context, int) (sample, error) {
	return func(ctx context.Context, _ int) (sample, error) {
		return output(ctx, filepath.Join(p.dir, name), args...)
	}
}

func number[T int | uint64](n T) string { return strconv.FormatUint(uint64(n), 10) }

// pages returns the pages of the source that all contenders but the sparse ones share.
func (p *plan) pages() uint64 { return p.mib << 20 / pageSize }

// job runs a process of this program. If that needs a source, it is the shared one.
func (p *plan) job(name string, j job) func(context.Context, int) (sample, error) {
	return func(ctx context.Context, round int) (sample, error) {
		j := j
		j.Fault, j.TLS = filepath.Join(p.dir, "fault"), p.certificate
		if j.Address == "" {
			j.Address = p.dense.address
		}
		if p.profiles != "" && j.Role == "engine" {
			j.Profile = filepath.Join(p.profiles, fmt.Sprintf("%s-%d.pprof", name, round))
		}
		return do(ctx, j)
	}
}

func (p *plan) faults() {
	const section = "faults"
	n := number(p.scale.faults)
	floor := func(handler string, cpu int) func(context.Context, int) (sample, error) {
		return p.program("fault", handler, "shuffled", n, n, "1", "1", strconv.Itoa(toucherCPU), strconv.Itoa(cpu))
	}
	p.add(section, "floor",
		"C: read(2) that blocks, UFFDIO_COPY; each thread on a CPU of its own", floor("read", otherCPU))
	p.add(section, "floor-poll", "C: poll(2), read(2), UFFDIO_COPY", floor("poll", otherCPU))
	p.add(section, "floor-spin", "C: read(2) in a loop, so nobody is woken to answer", floor("spin", otherCPU))
	p.add(section, "floor-one-cpu", "C: both threads on one CPU, so no CPU is woken", floor("read", toucherCPU))
	p.add(section, "floor-tcp", "C: floor, and each page comes from another process over TCP", floor("tcp", otherCPU))
	p.add(section, "floor-tcp-one-cpu", "C: the same, all of it on one CPU", floor("tcp", toucherCPU))
	for _, l := range []struct{ lane, what string }{
		{"bare", "Go: poll(2), pkg/uffd's Read and Copy, no engine"},
		{"instant", "engine, a lane that answers by itself"},
		{"memory", "+ page server, in this process, no connection"},
		{"pipe", "+ HTTP/2, no kernel"},
		{"local", "+ loopback TCP"},
		{"remote", "+ page server in a process of its own"},
		{"tls", "remote, with mutual TLS"},
		{"grpc", "remote, with the transport of gRPC's library"},
		{"plain", "remote, less HTTP/2 and the page server: bare TCP in Go between two processes"},
	} {
		name := l.lane
		if name == "tls" {
			name = "remote-tls"
		}
		p.add(section, name, l.what, p.job(name, job{
			Role: "engine", Lane: l.lane, Size: p.scale.faults, Pages: p.scale.faults, Threads: 1, UFFDs: 1,
		}))
	}
	p.add(section, "remote-rising", "remote, pages touched in rising order", p.job("remote-rising", job{
		Role: "engine", Lane: "remote", Size: p.scale.faults, Pages: p.scale.faults, Threads: 1, Rising: true, UFFDs: 1,
	}))
}

func (p *plan) trips() {
	const section = "round_trips"
	n := number(p.scale.faults)
	cpus := func(kind string, cpu int) func(context.Context, int) (sample, error) {
		return p.program("trip", kind, n, strconv.Itoa(toucherCPU), strconv.Itoa(cpu))
	}
	p.add(section, "wake", "C: two processes wake each other, each on its CPU", cpus("wake", otherCPU))
	p.add(section, "wake-one-cpu", "C: the same on one CPU", cpus("wake", toucherCPU))
	p.add(section, "tcp", "C: 16 bytes for 4 KiB, two processes, each on its CPU", cpus("tcp", otherCPU))
	p.add(section, "tcp-one-cpu", "C: the same on one CPU", cpus("tcp", toucherCPU))
	p.add(section, "tcp-go", "Go: the same, and a pread of the page",
		p.job("tcp-go", job{Role: "client", Lane: "plain", Pages: p.scale.faults}))
	p.add(section, "lane", "a lane to the page server",
		p.job("lane", job{Role: "client", Lane: "trips", Pages: p.scale.faults}))
}

// sweeping turns the sample of a sweep into one of a throughput.
func sweeping(f func(context.Context, int) (sample, error), bytes uint64) func(context.Context, int) (sample, error) {
	return func(ctx context.Context, round int) (sample, error) {
		s, err := f(ctx, round)
		s.Bytes, s.Wall = int64(bytes), s.Sweep
		return s, err
	}
}

func (p *plan) fills() {
	const section = "throughput"
	bytes := p.mib << 20
	p.add(section, "memcpy", "C: memcpy into fresh tmpfs", p.program("fill", "memcpy", number(p.mib)))
	p.add(section, "uffdio-copy", "C: UFFDIO_COPY, 512 KiB each", p.program("fill", "uffd", number(p.mib)))
	for _, l := range []struct{ name, lane, what string }{
		{"sweep-install", "instant", "engine's sweep, a lane that answers by itself"},
		{"sweep", "remote", "engine's sweep, all of it, page server in a process of its own"},
		{"sweep-tls", "tls", "the same, with mutual TLS"},
		{"sweep-grpc", "grpc", "the same, with the transport of gRPC's library"},
	} {
		p.add(section, l.name, l.what, sweeping(p.job(l.name, job{
			Role: "engine", Lane: l.lane, Size: p.pages(), UFFDs: 1, Sweep: true,
		}), bytes))
	}
	p.add(section, "serve", "page server and lane, what comes is thrown away",
		p.job("serve", job{Role: "client", Lane: "bulk", Size: p.pages()}))
}

func (p *plan) shards() {
	for _, threads := range p.threads {
		for _, uffds := range p.uffds {
			name := fmt.Sprintf("%dx%d", threads, uffds)
			what := fmt.Sprintf("%d threads, %d userfaultfds", threads, uffds)
			j := job{Role: "engine", Lane: "remote", Size: p.sharded, Pages: p.sharded, Threads: threads, UFFDs: uffds}
			p.add("shards", name, what, p.job("shards-"+name, j))
			j.Lane = "instant"
			p.add("shards_alone", name, what+", a lane that answers by itself", p.job("alone-"+name, j))
		}
	}
}

// sizes measures RAM that is mostly holes, each size with a source of its own, swept to its end.
func (p *plan) sizes() {
	for _, gib := range p.gib {
		j := job{
			Role: "engine", Lane: "remote", Size: gib << 30 / pageSize, Pages: p.scale.faults, Threads: 1, UFFDs: 1, Sweep: true,
		}
		name := fmt.Sprintf("%d-gib", gib)
		p.add("sizes", name, fmt.Sprintf(
			"%d GiB, of which %d pages are no holes", gib, j.Pages,
		), func(ctx context.Context, round int) (s sample, err error) {
			source, err := startServer(ctx, j)
			if err != nil {
				return s, err
			}
			j := j
			j.Address = source.address
			s, err = p.job("sizes-"+name, j)(ctx, round)
			rss, stopErr := source.stop()
			s.Source = rss
			return s, errors.Join(err, stopErr)
		})
	}
}

// round runs all contenders once. It starts a new source, because an export that is fetched again and again is served
// slowly.
func (p *plan) round(ctx context.Context, round int, got [][]sample) (err error) {
	if p.dense, err = startServer(ctx, job{Size: p.pages(), Pages: p.pages(), TLS: p.certificate}); err != nil {
		return err
	}
	defer func() {
		_, stopErr := p.dense.stop()
		err = errors.Join(err, stopErr)
	}()
	for i := range p.listed {
		i = (i + round) % len(p.listed) // so that no contender always follows the same one
		one, err := p.listed[i].run(ctx, round)
		if err != nil {
			return fmt.Errorf("%s %s: %w", p.listed[i].section, p.listed[i].name, err)
		}
		got[i] = append(got[i], one)
	}
	return nil
}

// certify makes an authority in dir that issues a certificate for this host, and returns the certificate's directory.
func certify(dir string) (string, error) {
	const days = 1
	authority, err := pki.Create(filepath.Join(dir, "authority"), "floor", days+1)
	if err != nil {
		return "", err
	}
	certificate := filepath.Join(dir, "certificate")
	_, err = authority.Issue(certificate, pki.Request{Name: "floor", Addresses: []string{"127.0.0.1"}, Days: days})
	return certificate, err
}

// measure runs all contenders, in turns.
func measure(ctx context.Context, s scale) (*report, error) {
	dir, err := os.MkdirTemp("", "floor")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := compile(ctx, dir); err != nil {
		return nil, err
	}
	if s.profiles != "" {
		if err := os.MkdirAll(s.profiles, 0o755); err != nil {
			return nil, err
		}
	}
	p := &plan{scale: s, dir: dir}
	if p.certificate, err = certify(dir); err != nil {
		return nil, err
	}
	p.faults()
	p.trips()
	p.fills()
	p.shards()
	p.sizes()
	for _, name := range s.only {
		if !slices.ContainsFunc(p.listed, func(c contender) bool { return isNamed(name, c.section, c.name) }) {
			return nil, fmt.Errorf("--only %s: there is no such contender", name)
		}
	}

	r := newReport(s)
	got := make([][]sample, len(p.listed))
	for round := range s.rounds {
		if err := p.round(ctx, round, got); err != nil {
			return nil, err
		}
	}
	for i, c := range p.listed {
		r.add(c, got[i])
	}
	r.judge()
	return r, nil
}
