// SPDX-License-Identifier: GPL-2.0
/*
 * For the debug kernel, which complains on the console by itself. What is said
 * here is that all went on, and that nothing was left behind.
 */
#include "scene.h"

#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/rseq.h>
#include <time.h>

#define KMEMLEAK "/sys/kernel/debug/kmemleak"
#define USERCOPY "/sys/kernel/debug/fail_usercopy/require-end"
#define KILL_RACE 20 /* s */
#define MOST 5000    /* allocations of one system call, to end a sweep at all */

/*
 * The kernel counts its open files for each CPU in portions of 32, so what it
 * says is about right; the one file that is lost is for kmemleak to find. They
 * are freed a moment after closing.
 */
#define FILES "/proc/sys/fs/file-nr"

static bool files_are_back(long before)
{
	long slack = 2 * 32 * sysconf(_SC_NPROCESSORS_ONLN);

	for (int left = PATIENCE; left > 0; left--) {
		if (get(FILES) <= before + slack)
			return true;
		poll(NULL, 0, 1);
	}
	note("%ld files, before: %ld", get(FILES), before);
	return false;
}

/* What became of a call whose n-th allocation, n = 1, 2 ..., was made to fail. */
struct sweep {
	int n, failed, unharmed;
};

/*
 * Every kind of allocation, not only those that must not wait. What the kernel
 * writes to the thread's rseq area, whenever it is preempted, may need a page,
 * and without one the thread is killed, so there is to be no such area.
 */
static void arm_all(void)
{
	MUST(syscall(SYS_rseq, (char *)__builtin_thread_pointer() + __rseq_offset,
		     sizeof(struct rseq), RSEQ_FLAG_UNREGISTER, RSEQ_SIG));
	put("/sys/kernel/debug/failslab/ignore-gfp-wait", "N");
	put("/sys/kernel/debug/failslab/verbose", "0");
	put("/sys/kernel/debug/fail_page_alloc/ignore-gfp-wait", "N");
	put("/sys/kernel/debug/fail_page_alloc/ignore-gfp-highmem", "N");
	put("/sys/kernel/debug/fail_page_alloc/min-order", "0");
	put("/sys/kernel/debug/fail_page_alloc/verbose", "0");
	/* But not the copying to and from the caller, which no code can. */
	if (!access(USERCOPY, W_OK))
		put(USERCOPY, "1");
}

/* Counts one call; the sweep is over when there was no n-th allocation. */
static bool swept(struct sweep *w, bool injected, int error)
{
	if (!injected) {
		CHECK(!error);
		return true;
	}
	if (error && error != ENOMEM && error != EAGAIN)
		outcome("%s-at-%d", name(error), w->n);
	w->failed += error != 0;
	w->unharmed += error == 0;
	CHECK(w->n < MOST);
	return false;
}

static void judge(const struct sweep *w, long files)
{
	note("%d injected: %d calls failed, %d did without", w->n - 1,
	     w->failed, w->unharmed);
	CHECK(w->failed);
	outcome("%s", files_are_back(files) ? "clean" : "files-left");
}

/* The forker's allocations, while its two events are read as they come. */
static void fail_fork(const void *domain)
{
	struct scene s = { .flags = O_CLOEXEC | O_NONBLOCK, .descriptors = 2,
		.abandoned = true };
	struct sweep w = {};
	long files;

	arm_all();
	begin(&s, domain);
	files = get(FILES);
	do {
		struct pollfd p[3] = {
			{ .fd = s.uffd[0], .events = POLLIN },
			{ .fd = s.uffd[1], .events = POLLIN },
			{ .fd = s.forked[0], .events = POLLIN },
		};
		int child;

		order(&s, FAIL + ++w.n);
		while (!p[2].revents) {
			CHECK(MUST(poll(p, 3, PATIENCE)));
			for (int i = 0; i < 2; i++)
				if (p[i].revents && !read_fork(s.uffd[i], &child))
					close(child);
		}
	} while (!swept(&w, hear(s.seen[0]), fork_result(&s)));
	judge(&w, files);
}

/* A reader in a process of its own, whose table of descriptors is full. */
struct unlucky {
	struct scene *s;
	int n, said[2];
};

#define TABLE 64 /* the kernel allocates a larger one from here on */

static void read_failing(void *arg)
{
	struct unlucky *u = arg;
	struct uffd_msg msg;
	int nth, error;

	while (dup(STDIN_FILENO) < TABLE - 2)
		;
	nth = MUST(open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC));
	CHECK(nth == TABLE - 1);
	fail_nth(nth, u->n);
	error = read(u->s->uffd[0], &msg, sizeof(msg)) < 0 ? errno : 0;
	say(u->said[1], was_injected(nth));
	say(u->said[1], error);
	_exit(0);
}

/* The reader's: what fails must leave the event where it is. */
static void fail_read(const void *domain)
{
	struct scene s = { .flags = O_CLOEXEC | O_NONBLOCK, .abandoned = true };
	struct unlucky u = { .s = &s };
	struct sweep w = {};
	int child, error, status;
	bool injected;
	long files;

	arm_all();
	MUST(pipe(u.said));
	begin(&s, domain);
	files = get(FILES);
	do {
		pid_t pid;

		order(&s, FORK);
		CHECK(ready(s.uffd[0], PATIENCE));
		u.n = ++w.n;
		pid = spawn(read_failing, &u);
		injected = hear(u.said[0]);
		error = hear(u.said[0]);
		CHECK(gone(pid, &status));
		if (error) {
			CHECK(!read_fork(s.uffd[0], &child));
			close(child);
		}
		CHECK(!fork_result(&s));
	} while (!swept(&w, injected, error));
	judge(&w, files);
}

static void fail_create(const void *domain)
{
	struct sweep w = {};
	int nth, fd, error;
	bool injected;
	long files;

	arm_all();
	enter(domain);
	nth = MUST(open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC));
	files = get(FILES);
	do {
		fail_nth(nth, ++w.n);
		fd = new_uffd(UFFD_SECURE | O_CLOEXEC);
		error = fd < 0 ? errno : 0;
		injected = was_injected(nth);
		if (!error)
			close(fd);
	} while (!swept(&w, injected, error));
	judge(&w, files);
}

/* A reader that nothing stops but its death. */
struct reader {
	struct scene *s;
	const char *domain;
};

static void read_all(void *arg)
{
	struct reader *r = arg;
	int child;

	enter(r->domain);
	for (int i = 0;; i = !i)
		if (ready(r->s->uffd[i], 1) && !read_fork(r->s->uffd[i], &child))
			close(child);
}

static bool over(const struct timespec *end)
{
	struct timespec now;

	MUST(clock_gettime(CLOCK_MONOTONIC, &now));
	return now.tv_sec >= end->tv_sec;
}

/* A forker and two readers, permitted or not, each killed at any moment. */
static void kill_race(const void *arg)
{
	const char *given = getenv("seed"); /* on the kernel's command line */
	const char *domains[] = { "reader_t", "outsider_t" };
	struct timespec end;
	unsigned int seed;
	int rounds = 0;
	long files;

	if (given)
		seed = strtoul(given, NULL, 0);
	else
		MUST(getrandom(&seed, sizeof(seed), 0));
	note("seed=%u", seed);
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	files = get(FILES);
	MUST(clock_gettime(CLOCK_MONOTONIC, &end));
	for (end.tv_sec += KILL_RACE; !over(&end); rounds++) {
		struct scene s = { .flags = O_CLOEXEC | O_NONBLOCK,
			.descriptors = 2, .abandoned = true };
		struct reader r[2];
		pid_t pid[3];
		int first;

		begin(&s, "kernel_t");
		pid[2] = s.forker;
		for (int i = 0; i < 2; i++) {
			r[i] = (struct reader){ &s, domains[rand_r(&seed) % 2] };
			pid[i] = spawn(read_all, &r[i]);
		}
		for (int i = 0; i < 2; i++)
			close(s.uffd[i]);
		order(&s, FORK_FOREVER);
		first = rand_r(&seed) % 3;
		for (int i = 0; i < 3; i++) {
			usleep(rand_r(&seed) % 20000); /* not to wait for: to vary */
			if (!dies(pid[(first + i) % 3]))
				outcome("unkillable-in-round-%d", rounds);
		}
		end_scene(&s);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
	note("%d rounds", rounds);
	CHECK(rounds > 10);
	outcome("%s", files_are_back(files) ? "clean" : "files-left");
}

/*
 * Whatever the tests before lost. An object counts from its fifth second on,
 * and when it is found unchanged a second time.
 */
static void leaks(const void *arg)
{
	char text[4096], *line, *next;
	int fd, found = 0;
	ssize_t n;

	poll(NULL, 0, 6000);
	put(KMEMLEAK, "scan");
	put(KMEMLEAK, "scan");
	fd = MUST(open(KMEMLEAK, O_RDONLY));
	while ((n = MUST(read(fd, text, sizeof(text) - 1))) > 0) {
		text[n] = 0;
		for (next = text; (line = strsep(&next, "\n"));)
			note("%s", line);
		found += n;
	}
	outcome("%s", found ? "leaks" : "clean");
}

const struct test stress_tests[] = {
	{ "stress-fail-fork", fail_fork, "reader_t", 4 * PATIENCE },
	{ "stress-fail-read", fail_read, "reader_t", 4 * PATIENCE },
	{ "stress-fail-create", fail_create, "app_t", 4 * PATIENCE },
	{ "stress-kill-race", kill_race, NULL, 4 * PATIENCE },
	{ "stress-kmemleak", leaks, NULL, 6 * PATIENCE },
	{}
};
