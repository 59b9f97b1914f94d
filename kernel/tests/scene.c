// SPDX-License-Identifier: GPL-2.0
#include "scene.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

static void child(struct scene *s)
{
	if (s->abandoned)
		_exit(0);
	for (int i = 0; i < s->descriptors; i++)
		say(s->child_seen[1], ((volatile char *)s->stage)[i * PAGE]);
	pause();
}

static void forked(struct scene *s, pid_t pid, int error)
{
	int status;

	if (pid == 0)
		child(s);
	if (pid > 0 && s->abandoned)
		CHECK(gone(pid, &status));
	say(s->forked[1], pid < 0 ? error : 0);
}

static void *fork_once(void *arg)
{
	pid_t pid = fork();

	forked(arg, pid, errno);
	return NULL;
}

/* The system call alone: the library would allocate too. */
static void fork_failing(struct scene *s, int n)
{
	int file = MUST(open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC));
	int error, injected;
	pid_t pid;

	fail_nth(file, n);
	pid = syscall(SYS_fork);
	error = errno;
	if (pid == 0)
		child(s);
	injected = was_injected(file);
	close(file);
	say(s->seen[1], injected);
	forked(s, pid, error);
}

static void forker(void *arg)
{
	struct scene *s = arg;
	pthread_t second;

	enter("app_t");
	for (int i = 0; i < s->descriptors; i++) {
		int fd = MUST(new_uffd(s->flags));

		MUST(api(fd, UFFD_FEATURE_EVENT_FORK |
				     (s->rwp ? UFFD_FEATURE_RWP : 0)));
		if (s->rwp) {
			s->stage[i * PAGE] = RWP_DATA;
			protect(fd, s->stage + i * PAGE);
		} else {
			watch(fd, s->stage + i * PAGE, 1);
		}
		send_fd(s->sock[1], fd);
		close(fd);
	}
	enter("child_t");
	if (s->unprivileged)
		drop_privileges();
	for (int what; read(s->orders[0], &what, sizeof(what)) > 0;) {
		switch (what) {
		case FORK_TWICE:
			CHECK(!pthread_create(&second, NULL, fork_once, s));
			fork_once(s);
			break;
		case FORK:
			fork_once(s);
			break;
		case FORK_WAITING:
			forked(s, syscall(SYS_clone, CLONE_VFORK | SIGCHLD, 0,
					  0, 0, 0), errno);
			break;
		case FORK_FOREVER:
			for (;;)
				fork_once(s);
		case LOOK:
			say(s->seen[1], *(volatile char *)s->stage);
			break;
		default:
			fork_failing(s, what - FAIL);
		}
	}
}

void begin(struct scene *s, const char *reader)
{
	if (!s->descriptors)
		s->descriptors = 1;
	s->stage = region(s->descriptors);
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, s->sock));
	MUST(pipe(s->orders));
	MUST(pipe(s->forked));
	MUST(pipe(s->seen));
	MUST(pipe(s->child_seen));
	s->forker = spawn(forker, s);
	enter(reader);
	for (int i = 0; i < s->descriptors; i++)
		s->uffd[i] = MUST(recv_fd(s->sock[0]));
}

void end_scene(struct scene *s)
{
	const int *pipes[] = { s->orders, s->forked, s->seen, s->child_seen,
			       s->sock };

	for (size_t i = 0; i < sizeof(pipes) / sizeof(*pipes); i++) {
		close(pipes[i][0]);
		close(pipes[i][1]);
	}
	munmap(s->stage, s->descriptors * PAGE);
}

void order(struct scene *s, enum order what)
{
	say(s->orders[1], what);
}

int fork_result(struct scene *s)
{
	return hear(s->forked[0]);
}

bool stuck(struct scene *s)
{
	char path[64], stat[512], *state;
	int fd, n, error;

	if (heard(s->forked[0], &error, STUCK))
		return false;
	snprintf(path, sizeof(path), "/proc/%d/stat", s->forker);
	fd = MUST(open(path, O_RDONLY));
	n = MUST(read(fd, stat, sizeof(stat) - 1));
	stat[n] = 0;
	close(fd);
	state = strrchr(stat, ')');
	return state && state[2] == 'D';
}

int read_fork(int uffd, int *child)
{
	struct uffd_msg msg;
	ssize_t n;

	if (fcntl(uffd, F_GETFL) & O_NONBLOCK && !ready(uffd, PATIENCE))
		return ETIMEDOUT;
	n = read(uffd, &msg, sizeof(msg));
	if (n < 0)
		return errno;
	CHECK(n == sizeof(msg));
	CHECK(msg.event == UFFD_EVENT_FORK);
	*child = msg.arg.fork.ufd;
	return 0;
}

void serve_child(struct scene *s, const int *child)
{
	for (int i = 0; i < s->descriptors; i++) {
		serve(child[i], s->stage + i * PAGE, 'a' + i);
		CHECK(hear(s->child_seen[0]) == 'a' + i);
	}
}
