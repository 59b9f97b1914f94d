/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fault HANDLER ORDER SIZE PAGES THREADS UFFDS TOUCHER-CPU HANDLER-CPU
 *
 * THREADS threads touch PAGES of SIZE pages of shared memory, evenly spread, and time each touch. Each thread touches
 * its part one page after the other. ORDER is "rising", or "shuffled", which cannot be predicted, so that each touch
 * is a fault. The memory is registered with UFFDS userfaultfds, a part each. HANDLER answers the faults:
 *
 *	read   a thread here: read(2) that blocks, UFFDIO_COPY
 *	poll   the same with poll(2) and a read(2) that does not block
 *	spin   the same with nothing but reads that do not block
 *	tcp    read, and each page is asked for and received over TCP (pair.h), from a process on the toucher's CPU,
 *	       which is idle meanwhile
 *	away   the process at the other end of descriptor 3. It gets {address, bytes} with the descriptors, answers
 *	       with one byte when the threads may begin, and closes the socket when this process may end.
 *
 * While a touch is timed, only this memory can be missing: all other memory is written before.
 */
#define _GNU_SOURCE
#include "bench.h"
#include "pair.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define PAGE 4096ul
#define MOST 64

static char *memory;
static size_t size, pages, threads, uffds;
static int uffd[MOST], toucher_cpu, handler_cpu, lane = -1;
static const char *handler;
static uint32_t *order, *latency; /* the page of each touch, and how long the touch took, in ns */
static pthread_barrier_t barrier;
static char page[PAGE] __attribute__((aligned(4096)));

static void *touch(void *arg)
{
	size_t i = (size_t)arg, end = pages * (i + 1) / threads, stride = size / pages * PAGE;

	pin(toucher_cpu);
	pthread_barrier_wait(&barrier);
	for (size_t k = pages * i / threads; k < end; k++) {
		volatile char *p = memory + order[k] * stride;
		int64_t before = now();

		(void)*p;
		latency[k] = (uint32_t)(now() - before);
	}
	return NULL;
}

/* shuffle shuffles each thread's part (Fisher and Yates), always in the same way. */
static void shuffle(void)
{
	uint32_t seed = 1;

	for (size_t i = 0; i < threads; i++) {
		size_t first = pages * i / threads;

		for (size_t k = pages * (i + 1) / threads; k-- > first + 1;) {
			uint32_t other, kept = order[k];

			seed = seed * 1664525 + 1013904223;
			other = (uint32_t)(first + (((uint64_t)seed * (k - first + 1)) >> 32));
			order[k] = order[other];
			order[other] = kept;
		}
	}
}

static void await(void)
{
	struct pollfd p = { .fd = uffd[0], .events = POLLIN };

	if (!strcmp(handler, "poll"))
		must("poll", poll(&p, 1, -1));
}

static void *handle(void *arg)
{
	struct uffdio_copy copy = { .src = (uintptr_t)page, .len = PAGE };
	struct uffd_msg m;

	(void)arg;
	pin(handler_cpu);
	for (size_t left = pages; left;) {
		ssize_t n = read(uffd[0], &m, sizeof(m));

		if (n < 0 && errno == EAGAIN) {
			await();
			continue;
		}
		must("read", n);
		if (lane >= 0) {
			put(lane, page, ASK);
			all(lane, page, PAGE);
		}
		copy.dst = m.arg.pagefault.address & ~(PAGE - 1);
		copy.copy = 0;
		must("UFFDIO_COPY", ioctl(uffd[0], UFFDIO_COPY, &copy));
		left--;
	}
	return NULL;
}

static void supervise(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register r = {
		.range = { (uintptr_t)memory, size * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	must("UFFDIO_API", ioctl(uffd[0], UFFDIO_API, &api));
	must("UFFDIO_REGISTER", ioctl(uffd[0], UFFDIO_REGISTER, &r));
}

/* hand_over gives the descriptors away. They close when the other process ends, so that no thread waits for ever. */
static void hand_over(void)
{
	uint64_t where[2] = { (uintptr_t)memory, size * PAGE };
	char control[CMSG_SPACE(MOST * sizeof(int))] = { 0 }, go;
	struct iovec iov = { where, sizeof(where) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control };
	struct cmsghdr *c;

	m.msg_controllen = CMSG_SPACE(uffds * sizeof(int));
	c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(uffds * sizeof(int));
	memcpy(CMSG_DATA(c), uffd, uffds * sizeof(int));
	must("sendmsg", sendmsg(3, &m, MSG_NOSIGNAL));
	for (size_t i = 0; i < uffds; i++)
		close(uffd[i]);
	if (read(3, &go, 1) != 1)
		exit(1);
}

int main(int argc, char **argv)
{
	pthread_t thread[MOST], answers;
	int fd, away, blocks;
	int64_t begun;
	char end;

	if (argc != 9)
		return 2;
	handler = argv[1];
	size = strtoul(argv[3], NULL, 0);
	pages = strtoul(argv[4], NULL, 0);
	threads = strtoul(argv[5], NULL, 0);
	uffds = strtoul(argv[6], NULL, 0);
	toucher_cpu = atoi(argv[7]);
	handler_cpu = atoi(argv[8]);
	away = !strcmp(handler, "away");
	blocks = !strcmp(handler, "read") || !strcmp(handler, "tcp");
	if (pages > size || threads > MOST || uffds < 1 || uffds > (away ? MOST : 1))
		return 2;

	if (!strcmp(handler, "tcp")) /* before there is memory that the process could inherit */
		lane = answering((long)pages, toucher_cpu);
	fd = memfd_create("floor", MFD_CLOEXEC);
	must("memfd_create", fd);
	must("ftruncate", ftruncate(fd, (off_t)(size * PAGE)));
	memory = mmap(NULL, size * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must("mmap", memory == MAP_FAILED ? -1 : 0);
	latency = malloc((pages + 1) * sizeof(*latency));
	memset(latency, 1, (pages + 1) * sizeof(*latency));
	order = malloc((pages + 1) * sizeof(*order));
	for (size_t k = 0; k < pages; k++)
		order[k] = (uint32_t)k;
	if (!strcmp(argv[2], "shuffled"))
		shuffle();
	memset(page, 1, sizeof(page));
	for (size_t i = 0; i < uffds; i++) {
		uffd[i] = (int)syscall(SYS_userfaultfd, O_CLOEXEC | (blocks ? 0 : O_NONBLOCK));
		must("userfaultfd", uffd[i]);
	}

	pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1);
	if (away)
		hand_over();
	else
		supervise();
	if (!away && pthread_create(&answers, NULL, handle, NULL))
		return 1;
	for (size_t i = 0; i < threads; i++)
		if (pthread_create(&thread[i], NULL, touch, (void *)i))
			return 1;
	pthread_barrier_wait(&barrier);
	begun = now();
	for (size_t i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	report(latency, pages, pages * PAGE, now() - begun);
	if (away)
		return read(3, &end, 1) < 0;
	pthread_join(answers, NULL);
	return 0;
}
