// SPDX-License-Identifier: GPL-2.0
/* Fork events, and the faults of the child, read through io_uring. */
#include "scene.h"

#include <linux/io_uring.h>
#include <linux/time_types.h>

struct ring {
	int fd;
	unsigned int *sq_tail, *sq_mask, *sq_array;
	unsigned int *cq_head, *cq_tail, *cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
};

static void *map(int fd, size_t size, off_t at)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, at);

	CHECK(p != MAP_FAILED);
	return p;
}

static void open_ring(struct ring *r)
{
	struct io_uring_params p = {};
	char *sq, *cq;

	r->fd = MUST(syscall(SYS_io_uring_setup, 4, &p));
	sq = map(r->fd, p.sq_off.array + p.sq_entries * sizeof(int),
		 IORING_OFF_SQ_RING);
	cq = map(r->fd, p.cq_off.cqes + p.cq_entries * sizeof(*r->cqes),
		 IORING_OFF_CQ_RING);
	r->sqes = map(r->fd, p.sq_entries * sizeof(*r->sqes), IORING_OFF_SQES);
	r->sq_tail = (void *)(sq + p.sq_off.tail);
	r->sq_mask = (void *)(sq + p.sq_off.ring_mask);
	r->sq_array = (void *)(sq + p.sq_off.array);
	r->cq_head = (void *)(cq + p.cq_off.head);
	r->cq_tail = (void *)(cq + p.cq_off.tail);
	r->cq_mask = (void *)(cq + p.cq_off.ring_mask);
	r->cqes = (void *)(cq + p.cq_off.cqes);
}

/* Asks for one message from uffd. */
static void submit(struct ring *r, int uffd, struct uffd_msg *msg, int flags)
{
	unsigned int tail = *r->sq_tail, at = tail & *r->sq_mask;

	r->sqes[at] = (struct io_uring_sqe){ .opcode = IORING_OP_READ,
		.fd = uffd, .flags = flags, .addr = (uintptr_t)msg,
		.len = sizeof(*msg), .off = (uint64_t)-1 };
	r->sq_array[at] = at;
	__atomic_store_n(r->sq_tail, tail + 1, __ATOMIC_RELEASE);
	CHECK(MUST(syscall(SYS_io_uring_enter, r->fd, 1, 0, 0, NULL, 0)) == 1);
}

/* The result: the errno, or 0 for a whole message. */
static int result(struct ring *r)
{
	struct __kernel_timespec limit = { .tv_sec = PATIENCE / 1000 };
	struct io_uring_getevents_arg arg = { .ts = (uintptr_t)&limit };
	unsigned int head = *r->cq_head;
	int res;

	while (__atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE) == head) {
		int n = syscall(SYS_io_uring_enter, r->fd, 0, 1,
				IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG,
				&arg, sizeof(arg));

		CHECK(n >= 0 || errno == EINTR);
	}
	res = r->cqes[head & *r->cq_mask].res;
	__atomic_store_n(r->cq_head, head + 1, __ATOMIC_RELEASE);
	CHECK(res < 0 || res == sizeof(struct uffd_msg));
	return res < 0 ? -res : 0;
}

struct reading {
	const char *domain;
	int sqe;   /* flags of the request */
	bool late; /* asked for after the fork waits, not before */
};

static void event(const void *arg)
{
	const struct reading *how = arg;
	struct scene s = { .flags = O_CLOEXEC | O_NONBLOCK };
	struct uffd_msg msg = {};
	struct ring r;
	int error, child;

	begin(&s, how->domain);
	open_ring(&r);
	if (how->late) {
		order(&s, FORK);
		CHECK(ready(s.uffd[0], PATIENCE));
	}
	submit(&r, s.uffd[0], &msg, how->sqe);
	if (!how->late)
		order(&s, FORK);
	error = result(&r);
	if (error)
		outcome("%s-%s", name(error), stuck(&s) ? "fork-hangs" : "forked");
	CHECK(msg.event == UFFD_EVENT_FORK);
	child = msg.arg.fork.ufd;
	CHECK(!fork_result(&s));
	serve_child(&s, &child);
	outcome("event");
}

/* A fault read from the child's descriptor, asked for as early as can be. */
static void child_fault(const void *arg)
{
	struct scene s = { .flags = O_CLOEXEC | O_NONBLOCK };
	struct uffd_msg msg = {};
	struct ring r;
	int error, child;

	begin(&s, arg);
	open_ring(&r);
	order(&s, FORK);
	error = read_fork(s.uffd[0], &child);
	CHECK(!error);
	submit(&r, child, &msg, 0);
	CHECK(!fork_result(&s));
	error = result(&r);
	if (error)
		outcome("%s", name(error));
	CHECK(msg.event == UFFD_EVENT_PAGEFAULT);
	fill(child, s.stage, 'r');
	CHECK(hear(s.child_seen[0]) == 'r');
	outcome("fault");
}

#define READ(...) &(const struct reading){ __VA_ARGS__ }

const struct test ring_tests[] = {
	{ "ring-read", event, READ("app_t") },
	{ "ring-read-late", event, READ("app_t", .late = true) },
	{ "ring-read-worker", event,
	  READ("app_t", IOSQE_ASYNC, .late = true) },
	{ "ring-read-without-create", event, READ("reader_t") },
	{ "ring-read-worker-without-create", event,
	  READ("reader_t", IOSQE_ASYNC, .late = true) },
	{ "ring-read-without-use", event, READ("nouse_t") },
	{ "ring-child-fault", child_fault, "app_t" },
	{}
};
