/* SPDX-License-Identifier: Apache-2.0 */
/*
 * trip KIND TIMES CPU OTHER-CPU
 *
 * TIMES round trips between two processes, one after the other:
 *
 *	tcp   16 bytes there, 4 KiB back, see pair.h
 *	wake  8 bytes there and back through two eventfds: each process sleeps until the other wakes it
 */
#define _GNU_SOURCE
#include "bench.h"
#include "pair.h"

#include <string.h>
#include <sys/eventfd.h>
#include <sys/wait.h>

/* echoing starts a process that sends back what it gets. */
static void echoing(int in, int out, long times, int cpu)
{
	uint64_t word;
	pid_t pid = fork();

	must("fork", pid);
	if (pid)
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	pin(cpu);
	while (times--) {
		all(in, &word, sizeof(word));
		put(out, &word, sizeof(word));
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	static char there[REPLY] = { 1 }, back[REPLY]; /* an eventfd takes any number but 0 */
	size_t ask = ASK, reply = REPLY;
	int out, in, cpu;
	uint32_t *ns;
	long times;
	int64_t begun;

	if (argc != 5)
		return 2;
	times = atol(argv[2]);
	cpu = atoi(argv[4]);
	ns = malloc(((size_t)times + 1) * sizeof(*ns));
	memset(ns, 1, (size_t)times * sizeof(*ns));
	if (!strcmp(argv[1], "tcp")) {
		in = out = answering(times, cpu);
	} else {
		must("eventfd", out = eventfd(0, 0));
		must("eventfd", in = eventfd(0, 0));
		echoing(out, in, times, cpu);
		ask = reply = sizeof(uint64_t);
	}
	pin(atoi(argv[3]));
	begun = now();
	for (long i = 0; i < times; i++) {
		int64_t before = now();

		put(out, there, ask);
		all(in, back, reply);
		ns[i] = (uint32_t)(now() - before);
	}
	report(ns, (size_t)times, (size_t)times * reply, now() - begun);
	wait(NULL);
	return 0;
}
