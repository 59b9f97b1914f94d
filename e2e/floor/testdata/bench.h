/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the programs of this directory share: the clock, pinning, and the line of JSON that each prints. All
 * of them are bare loops on purpose: they show what the machine and its kernel can do.
 */
#ifndef BENCH_H
#define BENCH_H

#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static inline void must(const char *what, long ret)
{
	if (ret >= 0)
		return;
	perror(what);
	exit(1);
}

static inline int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* pin keeps the calling thread on a CPU; -1: the kernel chooses. */
static inline void pin(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	must("sched_setaffinity", sched_setaffinity(0, sizeof(set), &set));
}

static inline int ascending(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

/* report prints quantiles of n latencies, in ns, and how long everything took. It sorts the latencies. */
static inline void report(uint32_t *ns, size_t n, size_t bytes, int64_t wall)
{
	if (n)
		qsort(ns, n, sizeof(*ns), ascending);
	printf("{\"n\":%zu,\"p50_ns\":%u,\"p90_ns\":%u,\"p99_ns\":%u,\"bytes\":%zu,\"wall_ns\":%lld}\n", n,
	       n ? ns[n / 2] : 0, n ? ns[n * 9 / 10] : 0, n ? ns[n * 99 / 100] : 0, bytes, (long long)wall);
	fflush(stdout);
}

#endif
