// SPDX-License-Identifier: GPL-2.0
/* UFFD_SECURE: who accepts it, what it takes away, and that the rest works. */
#include "harness.h"

#include <pthread.h>

struct how {
	bool device; /* /dev/userfaultfd instead of userfaultfd(2) */
	int flags;
};

static int open_device(void)
{
	return MUST(open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
}

static int create(const struct how *h)
{
	int flags = h->flags | O_CLOEXEC | O_NONBLOCK;

	return h->device ? new_uffd_dev(open_device(), flags) : new_uffd(flags);
}

/* Where UFFD_SECURE is unknown the outcome of each test says so. */
static int must_create(const struct how *h)
{
	int fd = create(h);

	if (fd < 0)
		outcome("create-%s", name(errno));
	return fd;
}

static void accepted(const void *arg)
{
	enter("app_t");
	outcome("%s", made(create(arg) < 0 ? errno : 0));
}

static void barred(const void *arg)
{
	enter("barred_t");
	outcome("%s", made(create(arg) < 0 ? errno : 0));
}

static void labelled(const void *arg)
{
	enter("app_t");
	outcome("%s", type_of(must_create(arg)));
}

/* Every bit that means nothing, alone and together with UFFD_SECURE. */
static void unknown_flags(const void *arg)
{
	const int known = O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY |
			  UFFD_SECURE;
	const struct how *h = arg;
	int dev = open_device();

	for (int bit = 0; bit < 32; bit++) {
		int flag = (int)(1U << bit);

		if (flag & known)
			continue;
		for (int secure = 0; secure <= UFFD_SECURE; secure += UFFD_SECURE) {
			int fd = h->device ? new_uffd_dev(dev, flag | secure) :
					     new_uffd(flag | secure);

			if (fd >= 0)
				outcome("accepted-%#x", flag | secure);
			if (errno != EINVAL)
				outcome("%#x-%s", flag | secure, name(errno));
		}
	}
	outcome("EINVAL");
}

/* UFFD_SECURE changes nothing about the two flags that it stands beside. */
static void shared_flags(const void *arg)
{
	for (int i = 0; i < 4; i++) {
		int flags = (i & 1 ? O_CLOEXEC : 0) | (i & 2 ? O_NONBLOCK : 0);
		int fd = new_uffd(UFFD_SECURE | flags);

		if (fd < 0)
			outcome("create-%s", name(errno));
		CHECK(MUST(fcntl(fd, F_GETFD)) == (i & 1 ? FD_CLOEXEC : 0));
		CHECK((fcntl(fd, F_GETFL) & O_NONBLOCK) == (flags & O_NONBLOCK));
		CHECK((fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
	}
	outcome("kept");
}

static void fork_event(const void *arg)
{
	int fd = must_create(arg);

	if (!api(fd, UFFD_FEATURE_EVENT_FORK))
		outcome("accepted");
	if (errno != EINVAL)
		outcome("api-%s", name(errno));
	/* Refused, the descriptor is as good as new. */
	MUST(api(fd, UFFD_FEATURE_EVENT_REMAP));
	outcome("api-EINVAL");
}

/* Not that it is a matter of privilege: there is no such feature. */
static void fork_event_unprivileged(const void *arg)
{
	int fd = must_create(arg);

	drop_privileges();
	if (!api(fd, UFFD_FEATURE_EVENT_FORK))
		outcome("accepted");
	outcome("api-%s", name(errno));
}

static uint64_t features(int fd)
{
	struct uffdio_api a = { .api = UFFD_API };

	MUST(ioctl(fd, UFFDIO_API, &a));
	return a.features;
}

static void reported(const void *arg)
{
	uint64_t plain = features(MUST(new_uffd(0)));
	uint64_t got = features(must_create(arg));

	if ((plain ^ got) & ~(uint64_t)UFFD_FEATURE_EVENT_FORK)
		outcome("others-differ");
	outcome("%s", got & UFFD_FEATURE_EVENT_FORK ? "offered" : "hidden");
}

/* A fork makes no event; the child's memory is nobody's. */
static void forks(const void *arg)
{
	int status, fd = must_create(arg);
	volatile char *at = region(1);
	pid_t pid;

	MUST(api(fd, 0));
	watch(fd, (void *)at, 1);
	pid = MUST(fork());
	if (pid == 0)
		_exit(*at);
	CHECK(gone(pid, &status));
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	outcome(ready(fd, 0) ? "event" : "no-event");
}

static void *touch(void *at)
{
	return (void *)(intptr_t) * (volatile char *)at;
}

static void user_fault(const void *arg)
{
	char *at = region(1);
	pthread_t thread;
	void *value;
	int fd;

	enter("app_t");
	fd = must_create(arg);
	MUST(api(fd, 0));
	watch(fd, at, 1);
	CHECK(!pthread_create(&thread, NULL, touch, at));
	serve(fd, at, 'x');
	CHECK(!pthread_join(thread, &value));
	outcome("%s", (intptr_t)value == 'x' ? "served" : "wrong-data");
}

static int ends[2];

static void *write_from(void *at)
{
	return (void *)write(ends[1], at, 1);
}

/* The kernel touches the page, on behalf of a write(2). */
static void kernel_fault(const void *arg)
{
	char *at = region(1), got = 0;
	pthread_t thread;
	int fd;

	fd = must_create(arg);
	MUST(api(fd, 0));
	watch(fd, at, 1);
	MUST(pipe(ends));
	CHECK(!pthread_create(&thread, NULL, write_from, at));
	serve(fd, at, 'x');
	CHECK(!pthread_join(thread, NULL));
	CHECK(MUST(read(ends[0], &got, 1)) == 1);
	outcome("%s", got == 'x' ? "served" : "wrong-data");
}

#define PLAIN(...) &(const struct how){ __VA_ARGS__ }
#define SECURE(...) &(const struct how){ .flags = UFFD_SECURE, __VA_ARGS__ }
#define USER_ONLY &(const struct how){ .flags = UFFD_SECURE | UFFD_USER_MODE_ONLY }

const struct test secure_tests[] = {
	{ "secure-syscall", accepted, SECURE() },
	{ "secure-device", accepted, SECURE(.device = true) },
	{ "secure-user-mode-only", accepted, USER_ONLY },
	{ "secure-shared-flags", shared_flags },
	{ "secure-unknown-flags-syscall", unknown_flags, PLAIN() },
	{ "secure-unknown-flags-device", unknown_flags, PLAIN(.device = true) },
	{ "secure-fork-event-syscall", fork_event, SECURE() },
	{ "secure-fork-event-device", fork_event, SECURE(.device = true) },
	{ "secure-fork-event-unprivileged", fork_event_unprivileged, SECURE() },
	{ "secure-features-syscall", reported, SECURE() },
	{ "secure-features-device", reported, SECURE(.device = true) },
	{ "secure-features-plain", reported, PLAIN() },
	{ "secure-fork", forks, SECURE() },
	{ "secure-label", labelled, SECURE() },
	{ "secure-barred", barred, SECURE() },
	{ "secure-user-fault", user_fault, SECURE() },
	{ "secure-user-fault-device", user_fault, SECURE(.device = true) },
	{ "secure-kernel-fault", kernel_fault, SECURE() },
	{}
};
