/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A second process that answers 16 bytes with 4 KiB over the loopback device: a page is asked for and received with
 * only the kernel's TCP in between.
 */
#ifndef PAIR_H
#define PAIR_H

#include "bench.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define ASK 16
#define REPLY 4096

static inline void all(int fd, void *to, size_t n)
{
	char *p = to;

	while (n) {
		ssize_t got = read(fd, p, n);

		must("read", got > 0 ? 0 : -1);
		p += got;
		n -= (size_t)got;
	}
}

static inline void put(int fd, const void *p, size_t n)
{
	must("write", write(fd, p, n) == (ssize_t)n ? 0 : -1);
}

static inline int quick(int fd)
{
	int one = 1;

	must("socket", fd);
	must("TCP_NODELAY", setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)));
	return fd;
}

/* answering starts the process, which answers that many times on that CPU, and returns a connection to it. */
static inline int answering(long times, int cpu)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), fd;
	static char ask[ASK], reply[REPLY];
	socklen_t len = sizeof(a);
	pid_t pid;

	must("bind", bind(listener, (struct sockaddr *)&a, sizeof(a)));
	must("listen", listen(listener, 1));
	must("getsockname", getsockname(listener, (struct sockaddr *)&a, &len));
	pid = fork();
	must("fork", pid);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(cpu);
		fd = quick(accept(listener, NULL, NULL));
		while (times--) {
			all(fd, ask, ASK);
			put(fd, reply, REPLY);
		}
		_exit(0);
	}
	fd = quick(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	must("connect", connect(fd, (struct sockaddr *)&a, sizeof(a)));
	close(listener);
	return fd;
}

#endif
