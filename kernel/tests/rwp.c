// SPDX-License-Identifier: GPL-2.0
/*
 * Read-write protection, which is newer than 6.12: what it can do with the
 * descriptors that the series is about, and that neither it nor the change of
 * features that came with it, UFFDIO_SET_MODE, is a way to a fork event.
 */
#include "scene.h"

#include <pthread.h>

#define NONBLOCK (O_CLOEXEC | O_NONBLOCK)

static int create(int flags)
{
	int fd = new_uffd(flags | NONBLOCK);

	if (fd < 0)
		outcome("create-%s", name(errno));
	return fd;
}

/* Where there is no such feature the outcome of each test says so. */
static void offer(int fd)
{
	if (api(fd, UFFD_FEATURE_RWP))
		outcome("api-%s", name(errno));
}

/* Reads the fault on a protected page and undoes the protection. */
static void answer(int uffd, void *page)
{
	struct uffd_msg msg;

	CHECK(ready(uffd, PATIENCE));
	CHECK(MUST(read(uffd, &msg, sizeof(msg))) == sizeof(msg));
	CHECK(msg.event == UFFD_EVENT_PAGEFAULT);
	CHECK(msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_RWP);
	CHECK((msg.arg.pagefault.address & ~(PAGE - 1ULL)) == (uintptr_t)page);
	rwprotect(uffd, page, 0);
}

static void *touch(void *at)
{
	return (void *)(intptr_t) * (volatile char *)at;
}

static int ends[2];

static void *write_from(void *at)
{
	return (void *)(intptr_t)(write(ends[1], at, 1) < 0 ? errno : 0);
}

static void user_fault(const void *flags)
{
	char *at = region(1);
	pthread_t thread;
	void *value;
	int fd;

	enter("app_t");
	fd = create(*(const int *)flags);
	offer(fd);
	*at = 'x';
	protect(fd, at);
	CHECK(!pthread_create(&thread, NULL, touch, at));
	answer(fd, at);
	CHECK(!pthread_join(thread, &value));
	outcome("%s", (intptr_t)value == 'x' ? "served" : "wrong-data");
}

/* The kernel touches the page, on behalf of a write(2). */
static void kernel_fault(const void *flags)
{
	char *at = region(1), got = 0;
	pthread_t thread;
	void *error;
	int fd;

	fd = create(*(const int *)flags);
	offer(fd);
	*at = 'x';
	protect(fd, at);
	MUST(pipe(ends));
	CHECK(!pthread_create(&thread, NULL, write_from, at));
	if (!(*(const int *)flags & UFFD_USER_MODE_ONLY))
		answer(fd, at);
	CHECK(!pthread_join(thread, &error));
	CHECK(!ready(fd, 0));
	if (error)
		outcome("%s", name((intptr_t)error));
	CHECK(MUST(read(ends[0], &got, 1)) == 1);
	outcome("%s", got == 'x' ? "served" : "wrong-data");
}

/* Every feature but the one that is meant to be switched, both ways. */
static void set_mode_refused(const void *flags)
{
	int fd = create(*(const int *)flags);

	if (api(fd, UFFD_FEATURE_RWP))
		MUST(api(fd, 0));
	for (int bit = 0; bit < 64; bit++) {
		uint64_t feature = 1ULL << bit;

		if (feature == UFFD_FEATURE_RWP_ASYNC)
			continue;
		for (int on = 0; on < 2; on++) {
			if (!set_mode(fd, on ? feature : 0, on ? 0 : feature))
				outcome("accepted-%d", bit);
			if (errno != EINVAL)
				outcome("%d-%s", bit, name(errno));
		}
	}
	outcome("EINVAL");
}

/* A fork makes no event; the child's page is as accessible as any. */
static void forks(const void *flags)
{
	int status, fd = create(*(const int *)flags);
	volatile char *at = region(1);
	pid_t pid;

	offer(fd);
	*at = 'x';
	protect(fd, (void *)at);
	pid = MUST(fork());
	if (pid == 0)
		_exit(*at);
	CHECK(gone(pid, &status));
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 'x');
	outcome(ready(fd, 0) ? "event" : "no-event");
}

static void begin_rwp(struct scene *s, const char *domain)
{
	int fd = create(0);

	offer(fd);
	close(fd);
	begin(s, domain);
}

/* The fork event, or the outcome is what came instead. */
static int child_of(struct scene *s)
{
	int child, error = read_fork(s->uffd[0], &child);

	if (error)
		outcome("%s-%s", name(error), stuck(s) ? "fork-hangs" : "forked");
	CHECK(!fork_result(s));
	return child;
}

static void fork_fault(const void *domain)
{
	struct scene s = { .flags = NONBLOCK, .rwp = true };

	begin_rwp(&s, domain);
	order(&s, FORK);
	answer(child_of(&s), s.stage);
	CHECK(hear(s.child_seen[0]) == RWP_DATA);
	/* The parent's page is still protected, and not the child's. */
	order(&s, LOOK);
	answer(s.uffd[0], s.stage);
	CHECK(hear(s.seen[0]) == RWP_DATA);
	outcome("served");
}

/* The child's descriptor has the mode of the parent's, and keeps it. */
static void fork_async(const void *domain)
{
	struct scene s = { .flags = NONBLOCK, .rwp = true };
	int child;

	begin_rwp(&s, domain);
	MUST(set_mode(s.uffd[0], UFFD_FEATURE_RWP_ASYNC, 0));
	order(&s, FORK);
	CHECK(ready(s.uffd[0], PATIENCE));
	MUST(set_mode(s.uffd[0], 0, UFFD_FEATURE_RWP_ASYNC));
	child = child_of(&s);
	CHECK(hear(s.child_seen[0]) == RWP_DATA);
	CHECK(!ready(child, 0));
	outcome("no-message");
}

/* Nobody is left to undo the protection: the child can do without. */
static void closed(const void *domain)
{
	struct scene s = { .flags = NONBLOCK, .rwp = true };

	begin_rwp(&s, domain);
	order(&s, FORK);
	CHECK(ready(s.uffd[0], PATIENCE));
	close(s.uffd[0]);
	CHECK(!fork_result(&s));
	CHECK(hear(s.child_seen[0]) == RWP_DATA);
	outcome("forked");
}

#define FLAGS(flags) &(const int){ flags }

const struct test rwp_tests[] = {
	{ "rwp-user-fault", user_fault, FLAGS(0) },
	{ "rwp-secure-user-fault", user_fault, FLAGS(UFFD_SECURE) },
	{ "rwp-kernel-fault", kernel_fault, FLAGS(0) },
	{ "rwp-secure-kernel-fault", kernel_fault, FLAGS(UFFD_SECURE) },
	{ "rwp-kernel-fault-user-mode-only", kernel_fault,
	  FLAGS(UFFD_USER_MODE_ONLY) },
	{ "rwp-set-mode", set_mode_refused, FLAGS(0) },
	{ "rwp-secure-set-mode", set_mode_refused, FLAGS(UFFD_SECURE) },
	{ "rwp-secure-fork", forks, FLAGS(UFFD_SECURE) },
	{ "rwp-fork", fork_fault, "app_t" },
	{ "rwp-fork-without-create", fork_fault, "reader_t" },
	{ "rwp-fork-async", fork_async, "app_t" },
	{ "rwp-fork-descriptor-closed", closed, "app_t" },
	{}
};
