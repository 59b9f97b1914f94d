// SPDX-License-Identifier: GPL-2.0
/* Fork events: who gets the child's descriptor, and what becomes of the fork. */
#include "scene.h"

#include <sys/resource.h>
#include <sys/uio.h>

#define NONBLOCK (O_CLOEXEC | O_NONBLOCK)

/* One reader, by its domain. A denied one leaves the forker where it was. */
static void plain_event(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	int child, error;

	begin(&s, domain);
	order(&s, FORK);
	error = read_fork(s.uffd[0], &child);
	if (error)
		outcome("%s-%s", name(error), stuck(&s) ? "fork-hangs" : "forked");
	error = fork_result(&s);
	outcome("%s", error ? name(error) : "event");
}

static void blocking_event(const void *domain)
{
	struct scene s = { .flags = O_CLOEXEC };
	int child;

	begin(&s, domain);
	order(&s, FORK);
	CHECK(!read_fork(s.uffd[0], &child));
	CHECK(!fork_result(&s));
	serve_child(&s, &child);
	outcome("event");
}

static void nonblocking_event(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	struct uffd_msg msg;
	int child;

	begin(&s, domain);
	if (read(s.uffd[0], &msg, sizeof(msg)) != -1)
		outcome("early-event");
	CHECK(errno == EAGAIN);
	order(&s, FORK);
	CHECK(!read_fork(s.uffd[0], &child));
	CHECK(!fork_result(&s));
	if (read(s.uffd[0], &msg, sizeof(msg)) != -1)
		outcome("second-event");
	CHECK(errno == EAGAIN);
	outcome("event");
}

/* What the event's descriptor is called, and what it can do. */
static void label(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	int child, error;

	begin(&s, domain);
	order(&s, FORK);
	error = read_fork(s.uffd[0], &child);
	if (error)
		outcome("%s-%s", name(error), stuck(&s) ? "fork-hangs" : "forked");
	outcome("%s", type_of(child));
}

static void service(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	int child, error;

	begin(&s, domain);
	order(&s, FORK);
	error = read_fork(s.uffd[0], &child);
	if (error)
		outcome("%s-%s", name(error), stuck(&s) ? "fork-hangs" : "forked");
	CHECK(!fork_result(&s));
	serve_child(&s, &child);
	/* The parent's page is still missing, and not the child's. */
	order(&s, LOOK);
	serve(s.uffd[0], s.stage, 'p');
	CHECK(hear(s.seen[0]) == 'p');
	outcome("served");
}

static void shared_flags(const void *domain)
{
	for (int i = 0; i < 4; i++) {
		int flags = (i & 1 ? O_CLOEXEC : 0) | (i & 2 ? O_NONBLOCK : 0);
		struct scene s = { .flags = flags };
		int child, error;

		begin(&s, domain);
		order(&s, FORK);
		error = read_fork(s.uffd[0], &child);
		if (error)
			outcome("%s-%s", name(error),
				stuck(&s) ? "fork-hangs" : "forked");
		CHECK(fcntl(child, F_GETFD) == (i & 1 ? FD_CLOEXEC : 0));
		CHECK((fcntl(child, F_GETFL) & O_NONBLOCK) == (flags & O_NONBLOCK));
		CHECK((fcntl(child, F_GETFL) & O_ACCMODE) == O_RDONLY);
		enter("kernel_t"); /* for the next scene */
	}
	outcome("kept");
}

/*
 * A read that must not wait, as io_uring's are: refused on a descriptor whose
 * file does not say that it can do so, as the parent's says.
 */
static void nowait(const void *domain)
{
	struct scene s = { .flags = O_CLOEXEC, .abandoned = true };
	struct uffd_msg msg;
	struct iovec iov = { &msg, sizeof(msg) };
	int child;

	begin(&s, domain);
	CHECK(preadv2(s.uffd[0], &iov, 1, -1, RWF_NOWAIT) == -1);
	CHECK(errno == EAGAIN);
	order(&s, FORK);
	CHECK(!read_fork(s.uffd[0], &child));
	CHECK(!fork_result(&s));
	CHECK(preadv2(child, &iov, 1, -1, RWF_NOWAIT) == -1);
	outcome("%s", name(errno));
}

/* No byte of the kernel's shows but the descriptor. */
static void message(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	struct uffd_msg msg, want = { .event = UFFD_EVENT_FORK };

	begin(&s, domain);
	order(&s, FORK);
	CHECK(ready(s.uffd[0], PATIENCE));
	memset(&msg, 0xff, sizeof(msg));
	CHECK(MUST(read(s.uffd[0], &msg, sizeof(msg))) == sizeof(msg));
	want.arg.fork.ufd = msg.arg.fork.ufd;
	outcome("%s", memcmp(&msg, &want, sizeof(msg)) ? "dirty" : "clean");
}

/*
 * The reader is denied perm on target: the log says so, the event stays, so
 * does the forker, which can be killed, and then there is no event.
 */
struct denial {
	const char *domain, *perm, *target;
};

static void refusal(const void *arg)
{
	const struct denial *d = arg;
	struct scene s = { .flags = NONBLOCK };
	int log = open_log(), child, error;
	struct uffd_msg msg;

	begin(&s, d->domain);
	order(&s, FORK);
	error = read_fork(s.uffd[0], &child);
	if (!error)
		outcome("event");
	if (error != EACCES || !denied(log, d->perm, d->domain, d->target))
		outcome("%s-unlogged", name(error));
	CHECK(ready(s.uffd[0], 0));
	CHECK(read_fork(s.uffd[0], &child) == EACCES);
	CHECK(stuck(&s));
	CHECK(dies(s.forker));
	CHECK(!ready(s.uffd[0], 0));
	CHECK(read(s.uffd[0], &msg, sizeof(msg)) == -1 && errno == EAGAIN);
	outcome("EACCES-%s", d->perm);
}

/* A second reader, in a process of its own with its own copies. */
struct second {
	struct scene *s;
	const char *domain;
	int said[2]; /* the errno of its read, or 0 */
};

static void read_too(void *arg)
{
	struct second *r = arg;
	int child, error;

	enter(r->domain);
	error = read_fork(r->s->uffd[0], &child);
	say(r->said[1], error);
	pause();
}

/* The denied reader comes first, dies, and the permitted one gets it all. */
static void denied_first(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	struct second r = { .s = &s, .domain = "outsider_t" };
	int child, error;
	pid_t pid;

	MUST(pipe(r.said));
	begin(&s, domain);
	enter("kernel_t");
	order(&s, FORK);
	pid = spawn(read_too, &r);
	error = hear(r.said[0]);
	if (error != EACCES)
		outcome("first-%s", error ? name(error) : "event");
	CHECK(dies(pid));
	enter(domain);
	error = read_fork(s.uffd[0], &child);
	if (error)
		outcome("EACCES-%s", name(error));
	CHECK(!fork_result(&s));
	serve_child(&s, &child);
	outcome("EACCES-event");
}

#define ROUNDS 100

struct racer {
	struct scene *s;
	const char *domain;
	bool denied;
	int start[2], got[2];
};

/* Reads once for each start. */
static void race(void *arg)
{
	struct racer *r = arg;
	struct uffd_msg msg;

	enter(r->domain);
	for (;;) {
		ssize_t n;

		hear(r->start[0]);
		n = read(r->s->uffd[0], &msg, sizeof(msg));
		if (n < 0 && errno != EAGAIN)
			outcome("%s", name(errno));
		if (n > 0)
			close(msg.arg.fork.ufd);
		say(r->got[1], n > 0);
	}
}

/* Both read, once, what poll() says is there: one gets it, one finds nothing. */
static void two_readers(const void *domain)
{
	struct scene s = { .flags = NONBLOCK, .abandoned = true };
	struct racer r[2];
	int wins[2] = {};

	begin(&s, "kernel_t");
	for (int i = 0; i < 2; i++) {
		r[i] = (struct racer){ .s = &s, .domain = domain };
		MUST(pipe(r[i].start));
		MUST(pipe(r[i].got));
		spawn(race, &r[i]);
	}
	for (int round = 0; round < ROUNDS; round++) {
		int got[2];

		order(&s, FORK);
		CHECK(ready(s.uffd[0], PATIENCE));
		for (int i = 0; i < 2; i++)
			say(r[i].start[1], 0);
		for (int i = 0; i < 2; i++)
			wins[i] += got[i] = hear(r[i].got[0]);
		if (got[0] + got[1] != 1)
			outcome("%d-in-round-%d", got[0] + got[1], round);
		CHECK(!fork_result(&s));
	}
	note("the two readers got %d and %d events", wins[0], wins[1]);
	outcome("one-each");
}

/* Reads without end; where there is nothing, waits, in poll() or in read(). */
static void insist(void *arg)
{
	struct racer *r = arg;
	struct uffd_msg msg;

	enter(r->domain);
	for (;;) {
		ssize_t n;

		if (r->s->flags & O_NONBLOCK)
			ready(r->s->uffd[0], -1);
		n = read(r->s->uffd[0], &msg, sizeof(msg));
		if (n < 0 && (errno == EAGAIN || (errno == EACCES && r->denied)))
			continue;
		if (n < 0)
			outcome("%s", name(errno));
		close(msg.arg.fork.ufd);
		say(r->got[1], 0);
	}
}

/*
 * A denied reader takes the event and puts it back all the time. The permitted
 * one, which sleeps when it finds none, must hear of it whenever it is back.
 */
static void against_denied(const void *flags)
{
	struct scene s = { .flags = *(const int *)flags, .abandoned = true };
	struct racer r[2] = { { .s = &s, .domain = "outsider_t", .denied = true },
			      { .s = &s, .domain = "reader_t" } };
	int none;

	begin(&s, "kernel_t");
	for (int i = 0; i < 2; i++) {
		MUST(pipe(r[i].got));
		spawn(insist, &r[i]);
	}
	/* Half as many: the denied one has the event most of the time. */
	for (int round = 0; round < ROUNDS / 2; round++) {
		order(&s, FORK);
		if (!heard(r[1].got[0], &none, PATIENCE))
			outcome("lost-in-round-%d", round);
		CHECK(!fork_result(&s));
	}
	CHECK(!heard(r[0].got[0], &none, 0));
	outcome("event");
}

/* Two threads fork at once: one read gets both events. */
static void two_events(const void *domain)
{
	struct scene s = { .flags = NONBLOCK, .abandoned = true };
	struct uffd_msg msg[3];
	ssize_t n, got = 0;

	begin(&s, domain);
	order(&s, FORK_TWICE);
	while (got < 2) {
		CHECK(ready(s.uffd[0], PATIENCE));
		n = MUST(read(s.uffd[0], msg, sizeof(msg)));
		n /= sizeof(*msg);
		for (int i = 0; i < n; i++)
			CHECK(msg[i].event == UFFD_EVENT_FORK);
		CHECK(n == 1 || msg[0].arg.fork.ufd != msg[1].arg.fork.ufd);
		got += n;
	}
	for (int i = 0; i < 2; i++)
		CHECK(!fork_result(&s));
	outcome("%zd-events", got);
}

/* Neither loses the event: a buffer that is too small, a table that is full. */
static void short_buffer(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	struct uffd_msg msg;
	int child;

	begin(&s, domain);
	order(&s, FORK);
	CHECK(ready(s.uffd[0], PATIENCE));
	CHECK(read(s.uffd[0], &msg, sizeof(msg) - 1) == -1 && errno == EINVAL);
	CHECK(!read_fork(s.uffd[0], &child));
	CHECK(!fork_result(&s));
	serve_child(&s, &child);
	outcome("EINVAL-event");
}

static void full_table(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	struct rlimit limit, none;
	struct uffd_msg msg;
	int child;

	begin(&s, domain);
	order(&s, FORK);
	CHECK(ready(s.uffd[0], PATIENCE));
	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	none = (struct rlimit){ 0, limit.rlim_max };
	MUST(setrlimit(RLIMIT_NOFILE, &none));
	CHECK(read(s.uffd[0], &msg, sizeof(msg)) == -1 && errno == EMFILE);
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	CHECK(!read_fork(s.uffd[0], &child));
	CHECK(!fork_result(&s));
	serve_child(&s, &child);
	outcome("EMFILE-event");
}

/* Nowhere to put the message: the event is gone, and so is the waiting. */
static void bad_buffer(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	long n;

	begin(&s, domain);
	order(&s, FORK);
	CHECK(ready(s.uffd[0], PATIENCE));
	/* Not read(): the compiler would see through it. */
	n = syscall(SYS_read, s.uffd[0], 8L, sizeof(struct uffd_msg));
	CHECK(n == -1 && errno == EFAULT);
	CHECK(!fork_result(&s));
	outcome("EFAULT-forked");
}

/* Its last descriptor closed, nobody is left to ask: the fork goes on. */
static void closed(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };

	begin(&s, domain);
	order(&s, FORK);
	CHECK(ready(s.uffd[0], PATIENCE));
	close(s.uffd[0]);
	CHECK(!fork_result(&s));
	CHECK(hear(s.child_seen[0]) == 0); /* its page is nobody's */
	outcome("forked");
}

/* The only holder of the descriptor, denied, is killed. */
static void denied_reader_dies(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	struct second r = { .s = &s, .domain = domain };
	pid_t pid;
	int error;

	MUST(pipe(r.said));
	begin(&s, "kernel_t");
	pid = spawn(read_too, &r);
	close(s.uffd[0]);
	order(&s, FORK);
	error = hear(r.said[0]);
	CHECK(error == EACCES);
	CHECK(dies(pid));
	CHECK(!fork_result(&s));
	CHECK(hear(s.child_seen[0]) == 0);
	outcome("EACCES-forked");
}

static void forker_dies(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	struct uffd_msg msg;

	begin(&s, domain);
	order(&s, FORK);
	CHECK(ready(s.uffd[0], PATIENCE));
	CHECK(dies(s.forker));
	CHECK(!ready(s.uffd[0], 0));
	CHECK(read(s.uffd[0], &msg, sizeof(msg)) == -1 && errno == EAGAIN);
	outcome("killed");
}

/*
 * No more files for an ordinary user. With the file made at fork it is the
 * forker that goes without, at once and cleanly; the next fork is fine.
 */
static void file_max(const void *domain)
{
	struct scene s = { .flags = NONBLOCK, .unprivileged = true };
	long max = get("/proc/sys/fs/file-max");
	struct pollfd p[2];
	int child, error;

	begin(&s, domain);
	p[0] = (struct pollfd){ .fd = s.forked[0], .events = POLLIN };
	p[1] = (struct pollfd){ .fd = s.uffd[0], .events = POLLIN };
	put("/proc/sys/fs/file-max", "0");
	order(&s, FORK);
	CHECK(MUST(poll(p, 2, PATIENCE)));
	if (!(p[0].revents & POLLIN)) {
		CHECK(stuck(&s));
		CHECK(!read_fork(s.uffd[0], &child));
		outcome("event");
	}
	error = fork_result(&s);
	if (!error)
		outcome("forked");
	CHECK(!ready(s.uffd[0], 0));
	put("/proc/sys/fs/file-max", "%ld", max);
	order(&s, FORK);
	CHECK(!read_fork(s.uffd[0], &child));
	CHECK(!fork_result(&s));
	serve_child(&s, &child);
	outcome("%s-event", name(error));
}

/*
 * The forker waits for its child after the event, which is the reader's by
 * now: closed there, the child's memory is nobody's, and its faults go on.
 */
static void closed_after(const void *domain)
{
	struct scene s = { .flags = NONBLOCK };
	int child;

	begin(&s, domain);
	order(&s, FORK_WAITING);
	CHECK(!read_fork(s.uffd[0], &child));
	close(child);
	CHECK(hear(s.child_seen[0]) == 0);
	CHECK(stuck(&s));
	outcome("released");
}

static void two_descriptors(const void *domain)
{
	struct scene s = { .flags = NONBLOCK, .descriptors = 2 };
	int child[2], error;

	begin(&s, domain);
	order(&s, FORK);
	for (int i = 0; i < 2; i++) {
		error = read_fork(s.uffd[i], &child[i]);
		if (error)
			outcome("%s-%s", name(error),
				stuck(&s) ? "fork-hangs" : "forked");
	}
	CHECK(!fork_result(&s));
	serve_child(&s, child);
	outcome("2-events");
}

#define FLAGS(flags) &(const int){ flags }
#define DENIAL(...) &(const struct denial){ __VA_ARGS__ }

const struct test fork_tests[] = {
	{ "fork-reader-with-create", plain_event, "app_t" },
	{ "fork-reader-without-create", plain_event, "reader_t" },
	{ "fork-reader-without-use", refusal,
	  DENIAL("nouse_t", "use", "child_t") },
	{ "fork-reader-without-read", refusal,
	  DENIAL("noread_t", "read", "child_uffd_t") },
	{ "fork-reader-without-any", plain_event, "outsider_t" },
	{ "fork-label", label, "app_t" },
	{ "fork-label-without-create", label, "reader_t" },
	{ "fork-service", service, "app_t" },
	{ "fork-service-without-create", service, "reader_t" },
	{ "fork-shared-flags", shared_flags, "app_t" },
	{ "fork-shared-flags-without-create", shared_flags, "reader_t" },
	{ "fork-nowait", nowait, "app_t" },
	{ "fork-message", message, "app_t" },
	{ "fork-blocking-read", blocking_event, "app_t" },
	{ "fork-nonblocking-read", nonblocking_event, "app_t" },
	{ "fork-denied-then-permitted", denied_first, "app_t" },
	{ "fork-denied-then-without-create", denied_first, "reader_t" },
	{ "fork-two-readers", two_readers, "app_t" },
	{ "fork-two-readers-without-create", two_readers, "reader_t" },
	{ "fork-denied-against-reading", against_denied, FLAGS(O_CLOEXEC),
	  4 * PATIENCE },
	{ "fork-denied-against-polling", against_denied, FLAGS(NONBLOCK),
	  4 * PATIENCE },
	{ "fork-two-at-once", two_events, "app_t" },
	{ "fork-short-buffer", short_buffer, "app_t" },
	{ "fork-full-table", full_table, "app_t" },
	{ "fork-bad-buffer", bad_buffer, "app_t" },
	{ "fork-descriptor-closed", closed, "app_t" },
	{ "fork-denied-reader-dies", denied_reader_dies, "outsider_t" },
	{ "fork-forker-dies", forker_dies, "app_t" },
	{ "fork-file-max", file_max, "app_t" },
	{ "fork-child-descriptor-closed", closed_after, "app_t" },
	{ "fork-two-descriptors", two_descriptors, "app_t" },
	{ "fork-two-descriptors-without-create", two_descriptors, "reader_t" },
	{}
};
