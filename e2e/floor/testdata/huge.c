// SPDX-License-Identifier: Apache-2.0
//
// What huge pages gain for memory that UFFDIO_COPY filled, and what they cost: docs/huge-pages.md.
//
//	huge pidfd FILE		process_madvise(2) by another process
//	huge file FILE		madvise(2) by another process, on its own mapping of the file
//
// FILE must not exist yet, and must be on a tmpfs with 1.1 GiB of room.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/userfaultfd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define HUGE ((size_t)2 << 20)
#define SIZE ((size_t)1 << 30)
#define RUN ((size_t)512 << 10) // what one UFFDIO_COPY installs
#define STEPS 20000000

static void must(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(1);
	}
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

// mapped returns how much of this process' shared memory huge pages map, in MiB.
static long mapped(void)
{
	char line[256];
	long kb = 0;
	FILE *f = fopen("/proc/self/smaps_rollup", "r");
	must(f != NULL, "smaps_rollup");
	while (fgets(line, sizeof line, f))
		sscanf(line, "ShmemPmdMapped: %ld", &kb);
	fclose(f);
	return kb >> 10;
}

// walk reads words in random order, each only when the last one is known. It returns ns per step.
static double walk(const volatile uint64_t *m)
{
	uint64_t x = 88172645463325252ull, last = 0;
	double began = now();
	for (int i = 0; i < STEPS; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		last = m[(x + (last & 1)) % (SIZE / 8)];
	}
	return (now() - began) / STEPS * 1e9;
}

static const volatile uint64_t *shared;
static volatile int over;
static double longest;

// victim is a thread that works in the memory meanwhile. It notes the longest time of one access.
static void *victim(void *unused)
{
	uint64_t x = 1;
	while (!over) {
		double began = now();
		x = x * 6364136223846793005ull + 1442695040888963407ull;
		(void)shared[(x >> 20) % (SIZE / 8)];
		double took = now() - began;
		if (took > longest)
			longest = took;
	}
	return unused;
}

// collapse makes huge pages of all the memory, from another process.
static void collapse(const char *way, int fd, int pidfd, char *m)
{
	double began = now(), most = 0;
	int failed = 0, why = 0;
	if (!strcmp(way, "file")) {
		must(!munmap(m, SIZE), "munmap");
		must(mmap(m, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == m, "mmap");
	}
	for (size_t at = 0; at < SIZE; at += HUGE) {
		struct { void *base; size_t len; } range = { m + at, HUGE };
		double call = now();
		int bad = !strcmp(way, "file") ? madvise(m + at, HUGE, MADV_COLLAPSE) != 0
					       : syscall(SYS_process_madvise, pidfd, &range, 1, MADV_COLLAPSE, 0) != (long)HUGE;
		if (bad)
			failed++, why = errno;
		double took = now() - call;
		if (took > most)
			most = took;
	}
	printf("MADV_COLLAPSE of 1 GiB by %s: %.2f s, the longest of 512 calls %.1f ms, %d failed (%s)\n", way, now() - began, most * 1e3, failed,
	       failed ? strerror(why) : "none");
}

// disturbed prints the longest access of a thread while huge pages are made in that way; NULL: while nothing is done.
static void disturbed(const char *what, const char *way, int fd, char *m)
{
	pthread_t thread;
	over = 0, longest = 0;
	must(!pthread_create(&thread, NULL, victim, NULL), "thread");
	if (way) {
		int pidfd = syscall(SYS_pidfd_open, getpid(), 0);
		fflush(stdout);
		pid_t child = fork();
		if (child == 0) {
			collapse(way, fd, pidfd, m);
			fflush(stdout);
			_exit(0);
		}
		waitpid(child, NULL, 0);
	} else {
		sleep(3);
	}
	over = 1;
	pthread_join(thread, NULL);
	printf("the longest access of a thread while %s: %.2f ms\n", what, longest * 1e3);
}

int main(int argc, char **argv)
{
	must(argc == 3, "usage: huge pidfd|file FILE");
	int fd = open(argv[2], O_RDWR | O_CREAT | O_EXCL, 0600);
	must(fd >= 0 && !ftruncate(fd, SIZE), argv[2]);
	unlink(argv[2]);
	char *m = mmap((void *)0x700000000000, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
	must(m != MAP_FAILED, "mmap");
	shared = (void *)m;
	int u = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register r = { .range = { (uintptr_t)m, SIZE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	must(!ioctl(u, UFFDIO_API, &api) && !ioctl(u, UFFDIO_REGISTER, &r), "userfaultfd");

	char *page = malloc(RUN);
	memset(page, 7, RUN);
	struct stat st;
	struct uffdio_copy one = { .dst = (uintptr_t)m, .src = (uintptr_t)page, .len = 4096 };
	must(!ioctl(u, UFFDIO_COPY, &one), "UFFDIO_COPY");
	errno = 0;
	int refused = madvise(m, HUGE, MADV_COLLAPSE);
	fstat(fd, &st);
	printf("registered, one page of 512 there: MADV_COLLAPSE %s, %ld KiB of the file\n", refused ? strerror(errno) : "succeeds", (long)st.st_blocks / 2);
	for (size_t at = 0; at < SIZE; at += RUN) {
		struct uffdio_copy c = { .dst = (uintptr_t)m + at, .src = (uintptr_t)page, .len = RUN };
		if (at == 0)
			c.dst += 4096, c.len -= 4096;
		must(!ioctl(u, UFFDIO_COPY, &c), "UFFDIO_COPY");
	}
	struct uffdio_range all = { (uintptr_t)m, SIZE };
	must(!ioctl(u, UFFDIO_UNREGISTER, &all), "unregister");
	printf("filled by UFFDIO_COPY: %ld of 1024 MiB by huge pages\n", mapped());
	double before = walk((void *)m);
	disturbed("nobody does anything", NULL, fd, m);
	disturbed("huge pages are made", argv[1], fd, m);
	double after = walk((void *)m);
	printf("after a walk: %ld of 1024 MiB by huge pages\n", mapped());
	printf("a random walk: %.0f ns a step before, %.0f after, ratio %.2f\n", before, after, after / before);

	// A range that is a hole except for one page, after everything is unregistered.
	must(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, HUGE - 4096), "punch");
	fstat(fd, &st);
	long had = st.st_blocks / 2;
	refused = madvise(m, HUGE, MADV_COLLAPSE);
	fstat(fd, &st);
	printf("unregistered, one page of 512 there: MADV_COLLAPSE %s, %ld KiB more of the file\n", refused ? strerror(errno) : "succeeds", (long)st.st_blocks / 2 - had);
	return 0;
}
