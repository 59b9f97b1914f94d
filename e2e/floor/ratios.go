// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
)

// p50 and rate are what ratios are made of, of one round.
func (r *report) p50(name string, round int) float64 { return float64(r.samples[name][round].P50) }

func (r *report) rate(name string, round int) float64 {
	s := r.samples[name][round]
	return perSecond(s.Bytes, s.Wall)
}

// judge computes the ratios. Those with a target are what the engine is measured by, the others tell where the time
// goes.
func (r *report) judge() {
	below := func(limit float64) (string, func(float64) bool) {
		return fmt.Sprintf("<= %.1f", limit), func(v float64) bool { return v <= limit }
	}
	above := func(limit float64) (string, func(float64) bool) {
		return fmt.Sprintf(">= %.1f", limit), func(v float64) bool { return v >= limit }
	}
	target, met := below(3)
	r.compare("local fault / floor", target, met, func(i int) float64 { return r.p50("pipe", i) / r.p50("floor", i) })
	target, met = below(1.5)
	r.compare("network fault / (TCP + floor)", target, met, func(i int) float64 {
		return r.p50("remote", i) / (r.p50("tcp", i) + r.p50("floor", i))
	})
	target, met = above(0.6)
	r.compare("sweep / memcpy", target, met, func(i int) float64 { return r.rate("sweep", i) / r.rate("memcpy", i) })
	r.compare("lane / TCP", "", nil, func(i int) float64 { return r.p50("lane", i) / r.p50("tcp", i) })

	r.compare("network fault / through gRPC's library", "", nil, func(i int) float64 { return r.p50("remote", i) / r.p50("grpc", i) })
	r.compare("sweep / through gRPC's library", "", nil, func(i int) float64 { return r.rate("sweep", i) / r.rate("sweep-grpc", i) })
	r.compare("local fault without a connection / floor", "", nil, func(i int) float64 { return r.p50("memory", i) / r.p50("floor", i) })
	r.compare("local fault over TCP / floor", "", nil, func(i int) float64 { return r.p50("local", i) / r.p50("floor", i) })
	r.compare("local fault / floor on one CPU", "", nil, func(i int) float64 { return r.p50("pipe", i) / r.p50("floor-one-cpu", i) })
	r.compare("network fault / (TCP + floor), one CPU", "", nil, func(i int) float64 {
		return r.p50("remote", i) / (r.p50("tcp-one-cpu", i) + r.p50("floor-one-cpu", i))
	})
	r.compare("network fault / the same in C", "", nil, func(i int) float64 { return r.p50("remote", i) / r.p50("floor-tcp", i) })
	r.compare("network fault without HTTP/2 / the same in C", "", nil, func(i int) float64 { return r.p50("plain", i) / r.p50("floor-tcp", i) })
	r.compare("lane / TCP in Go", "", nil, func(i int) float64 { return r.p50("lane", i) / r.p50("tcp-go", i) })
	r.compare("sweep's installing alone / memcpy", "", nil, func(i int) float64 { return r.rate("sweep-install", i) / r.rate("memcpy", i) })
	r.compare("UFFDIO_COPY / memcpy", "", nil, func(i int) float64 { return r.rate("uffdio-copy", i) / r.rate("memcpy", i) })
	r.compare("sweep / UFFDIO_COPY", "", nil, func(i int) float64 { return r.rate("sweep", i) / r.rate("uffdio-copy", i) })
	r.compare("page server / memcpy", "", nil, func(i int) float64 { return r.rate("serve", i) / r.rate("memcpy", i) })
}

func (r *report) compare(name, target string, met func(float64) bool, of func(round int) float64) {
	all := make([]float64, r.Rounds)
	for i := range all {
		all[i] = of(i)
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
