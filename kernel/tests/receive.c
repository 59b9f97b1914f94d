// SPDX-License-Identifier: GPL-2.0
/* How a userfaultfd goes from one domain to another, and how it does not. */
#include "scene.h"

#include <sys/prctl.h>

struct route {
	const char *domain;	    /* that of the receiver */
	const char *perm, *target; /* what it is denied, if anything */
};

/* The owner, in app_t: makes a descriptor, sends it where there is a socket. */
struct owner {
	int sock[2];
	int made[2]; /* says the number of the descriptor */
};

static void own(void *arg)
{
	struct owner *o = arg;
	int fd;

	enter("app_t");
	fd = MUST(new_uffd(O_CLOEXEC | O_NONBLOCK));
	send_fd(o->sock[1], fd);
	say(o->made[1], fd);
	pause();
}

static pid_t start(struct owner *o)
{
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, o->sock));
	MUST(pipe(o->made));
	return spawn(own, o);
}

/* A descriptor that came must also work. */
static void judge(int fd, int log, const struct route *r, const char *refused)
{
	if (fd >= 0) {
		MUST(api(fd, 0));
		outcome("fd");
	}
	if (!r->perm)
		outcome("%s", refused);
	outcome("%s-%s", refused,
		denied(log, r->perm, r->domain, r->target) ? r->perm : "unlogged");
}

static void by_socket(const void *arg)
{
	const struct route *r = arg;
	struct owner o;
	int log = open_log();

	start(&o);
	enter(r->domain);
	judge(recv_fd(o.sock[0]), log, r, "truncated");
}

static void by_pidfd(const void *arg)
{
	const struct route *r = arg;
	struct owner o;
	int log = open_log(), pidfd, fd;

	pidfd = MUST(syscall(SYS_pidfd_open, start(&o), 0));
	enter(r->domain);
	fd = syscall(SYS_pidfd_getfd, pidfd, hear(o.made[0]), 0);
	judge(fd, log, r, name(errno));
}

/*
 * A fork event's descriptor, passed on to a domain that may use whatever the
 * reader made, but not what is the child's.
 */
static void forward(void *arg)
{
	int *sock = arg;
	int fd;

	enter("nouse_t");
	fd = recv_fd(sock[0]);
	say(sock[0], fd >= 0);
	pause();
}

static void forwarded(const void *domain)
{
	struct scene s = { .flags = O_CLOEXEC | O_NONBLOCK };
	int sock[2], child, log = open_log();

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, sock));
	spawn(forward, sock);
	begin(&s, domain);
	order(&s, FORK);
	CHECK(!read_fork(s.uffd[0], &child));
	send_fd(sock[1], child);
	if (hear(sock[1]))
		outcome("fd");
	outcome("truncated-%s",
		denied(log, "use", "nouse_t", "child_t") ? "use" : "unlogged");
}

/*
 * Through an exec that changes the domain, which closes what the new domain
 * may not use: /dev/null stands in its place.
 */
static void by_exec(const void *arg)
{
	const struct route *r = arg;
	char number[16];
	int fd, status;
	pid_t pid;

	enter("app_t");
	fd = MUST(new_uffd(O_NONBLOCK));
	snprintf(number, sizeof(number), "%d", fd);
	put("/proc/thread-self/attr/exec", "u:r:%s", r->domain);
	pid = MUST(fork());
	if (pid == 0) {
		execl("/proc/self/exe", "init", number, NULL);
		_exit(2);
	}
	CHECK(gone(pid, &status));
	CHECK(WIFEXITED(status));
	if (WEXITSTATUS(status) > 1)
		outcome("exec-%d", WEXITSTATUS(status));
	outcome("%s", WEXITSTATUS(status) ? "null" : "fd");
}

/* The program that by_exec starts. */
int receive_exec(const char *number)
{
	return api(atoi(number), 0) ? 1 : 0;
}

#define ROUTE(...) &(const struct route){ __VA_ARGS__ }

const struct test receive_tests[] = {
	{ "receive-socket", by_socket, ROUTE("reader_t") },
	{ "receive-socket-without-use", by_socket,
	  ROUTE("stranger_t", "use", "app_t") },
	{ "receive-socket-without-read", by_socket,
	  ROUTE("blind_t", "read", "app_uffd_t") },
	{ "receive-pidfd", by_pidfd, ROUTE("reader_t") },
	{ "receive-pidfd-without-use", by_pidfd,
	  ROUTE("stranger_t", "use", "app_t") },
	{ "receive-pidfd-without-read", by_pidfd,
	  ROUTE("blind_t", "read", "app_uffd_t") },
	{ "receive-pidfd-without-ptrace", by_pidfd,
	  ROUTE("notrace_t", "ptrace", "app_t") },
	{ "receive-exec", by_exec, ROUTE("reader_t") },
	{ "receive-exec-without-read", by_exec, ROUTE("blind_t") },
	{ "receive-fork-event-passed-on", forwarded, "app_t" },
	{}
};
