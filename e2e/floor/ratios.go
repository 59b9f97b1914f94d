// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"slices"
)

// p50 and rate are the values of one round from which ratios are made; NaN for a contender that did not run.
func (r *report) p50(name string, round int) float64 {
	if r.samples[name] == nil {
		return math.NaN()
	}
	return float64(r.samples[name][round].P50)
}

func (r *report) rate(name string, round int) float64 {
	if r.samples[name] == nil {
		return math.NaN()
	}
	s := r.samples[name][round]
	return perSecond(s.Bytes, s.Wall)
}

// judge computes the ratios. Those with a target judge the engine; the others show where the time goes.
func (r *report) judge() {
	below := func(limit float64) (string, func(float64) bool) {
		return fmt.Sprintf("<= %g", limit), func(v float64) bool { return v <= limit }
	}
	above := func(limit float64) (string, func(float64) bool) {
		return fmt.Sprintf(">= %g", limit), func(v float64) bool { return v >= limit }
	}
	target, met := below(3)
	r.compare("local fault / floor", target, met, func(i int) float64 { return r.p50("pipe", i) / r.p50("floor", i) })
	target, met = below(1.5)
	r.compare("network fault / (TCP + floor)", target, met, func(i int) float64 {
		return r.p50("remote", i) / (r.p50("tcp", i) + r.p50("floor", i))
	})
	target, met = above(0.6)
	r.compare("sweep / memcpy", target, met, func(i int) float64 { return r.rate("sweep", i) / r.rate("memcpy", i) })
	target, met = above(0.8)
	r.compare("sweep / UFFDIO_COPY", target, met, func(i int) float64 {
		return r.rate("sweep", i) / r.rate("uffdio-copy", i)
	})
	target, met = above(0.6)
	r.compare("sweep with TLS / UFFDIO_COPY", target, met, func(i int) float64 {
		return r.rate("sweep-tls", i) / r.rate("uffdio-copy", i)
	})
	target, met = below(1.25)
	r.compare("network fault with TLS / without", target, met, func(i int) float64 {
		return r.p50("remote-tls", i) / r.p50("remote", i)
	})
	r.compare("lane / TCP", "", nil, func(i int) float64 { return r.p50("lane", i) / r.p50("tcp", i) })

	r.compare("network fault / through gRPC's library", "", nil, func(i int) float64 {
		return r.p50("remote", i) / r.p50("grpc", i)
	})
	r.compare("sweep / through gRPC's library", "", nil, func(i int) float64 {
		return r.rate("sweep", i) / r.rate("sweep-grpc", i)
	})
	r.compare("local fault without a connection / floor", "", nil, func(i int) float64 {
		return r.p50("memory", i) / r.p50("floor", i)
	})
	r.compare("local fault over TCP / floor", "", nil, func(i int) float64 {
		return r.p50("local", i) / r.p50("floor", i)
	})
	r.compare("local fault / floor on one CPU", "", nil, func(i int) float64 {
		return r.p50("pipe", i) / r.p50("floor-one-cpu", i)
	})
	r.compare("network fault / (TCP + floor), one CPU", "", nil, func(i int) float64 {
		return r.p50("remote", i) / (r.p50("tcp-one-cpu", i) + r.p50("floor-one-cpu", i))
	})
	r.compare("network fault / the same in C", "", nil, func(i int) float64 {
		return r.p50("remote", i) / r.p50("floor-tcp", i)
	})
	r.compare("network fault without HTTP/2 / the same in C", "", nil, func(i int) float64 {
		return r.p50("plain", i) / r.p50("floor-tcp", i)
	})
	r.compare("lane / TCP in Go", "", nil, func(i int) float64 { return r.p50("lane", i) / r.p50("tcp-go", i) })
	r.compare("sweep's installing alone / memcpy", "", nil, func(i int) float64 {
		return r.rate("sweep-install", i) / r.rate("memcpy", i)
	})
	r.compare("UFFDIO_COPY / memcpy", "", nil, func(i int) float64 {
		return r.rate("uffdio-copy", i) / r.rate("memcpy", i)
	})
	r.compare("page server / memcpy", "", nil, func(i int) float64 { return r.rate("serve", i) / r.rate("memcpy", i) })
}

// compare adds a ratio, unless one of its contenders did not run.
func (r *report) compare(name, target string, met func(float64) bool, of func(round int) float64) {
	all := make([]float64, r.Rounds)
	for i := range all {
		if all[i] = of(i); math.IsNaN(all[i]) {
			return
		}
	}
	slices.Sort(all)
	x := ratio{
		Name: name, Value: (all[len(all)/2] + all[(len(all)-1)/2]) / 2, Low: all[0], High: all[len(all)-1], Target: target,
	}
	if met != nil {
		ok := met(x.Value)
		x.Met = &ok
	}
	r.Ratios = append(r.Ratios, x)
}
