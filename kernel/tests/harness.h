/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests share. A test is a function in a process of its own, which
 * ends by saying one word, its outcome; nothing else about it is judged here.
 * The word that each kernel is expected to give is in e2e/kernel, as a table.
 */
#ifndef HARNESS_H
#define HARNESS_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef UFFD_SECURE
#define UFFD_SECURE 2 /* new: the headers of the build machine lack it */
#endif

#ifndef UFFDIO_RWPROTECT /* as new, and of Linux 7.3 */
#define UFFDIO_REGISTER_MODE_RWP (1ULL << 3)
#define UFFD_FEATURE_RWP (1 << 17)
#define UFFD_FEATURE_RWP_ASYNC (1 << 18)
#define UFFD_PAGEFAULT_FLAG_RWP (1 << 3)
#define UFFDIO_RWPROTECT_MODE_RWP (1ULL << 0)
struct uffdio_rwprotect {
	struct uffdio_range range;
	__u64 mode;
};
#define UFFDIO_RWPROTECT _IOWR(UFFDIO, 0x09, struct uffdio_rwprotect)
struct uffdio_set_mode {
	__u64 enable;
	__u64 disable;
};
#define UFFDIO_SET_MODE _IOW(UFFDIO, 0x0a, struct uffdio_set_mode)
#endif

#define PAGE 4096

/* All waits for what must come end here; only a defect waits that long. */
#define PATIENCE 20000 /* ms */

/* How long a process is watched before it counts as stuck. */
#define STUCK 400 /* ms */

struct test {
	const char *name;
	void (*run)(const void *arg);
	const void *arg;
	int patience; /* in ms where it is not 2 * PATIENCE */
};

int receive_exec(const char *number); /* main() of what the test executes */

extern const struct test secure_tests[], create_tests[], sysctl_tests[],
	fork_tests[], ring_tests[], receive_tests[], others_tests[],
	rwp_tests[], stress_tests[], selftests[];

/* Ends the test. */
void outcome(const char *format, ...)
	__attribute__((noreturn, format(printf, 1, 2)));

/* Writes one line to the console for whoever reads why a test failed. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The errno's name, or "fd" for 0: what became of a descriptor wanted. */
const char *made(int error);

/* The name of an errno. */
const char *name(int error);

/* Ends the test where what it needs failed. */
#define MUST(call)                                                             \
	({                                                                     \
		__typeof__(call) got_ = (call);                                \
		if (got_ < 0)                                                  \
			outcome("%s:%d:%s", __FILE_NAME__, __LINE__,           \
				name(errno));                                  \
		got_;                                                          \
	})
#define CHECK(condition)                                                       \
	do {                                                                   \
		if (!(condition))                                              \
			outcome("%s:%d", __FILE_NAME__, __LINE__);             \
	} while (0)

/* Processes. */
pid_t spawn(void (*run)(void *), void *arg); /* which must not return */
bool dies(pid_t pid);			     /* of SIGKILL */
bool gone(pid_t pid, int *status);	     /* within PATIENCE */
void enter(const char *domain);		     /* change the calling thread's */
void drop_privileges(void);		     /* to those of an ordinary user */

/* What happens to descriptors. */
bool ready(int fd, int ms);
void say(int fd, int what);
bool heard(int fd, int *what, int ms);
int hear(int fd); /* within PATIENCE */
void send_fd(int sock, int fd);
int recv_fd(int sock); /* the descriptor, or -1 where the kernel kept it */
const char *type_of(int fd);

/* The kernel's log, read from here on. */
int open_log(void);
bool denied(int log, const char *perm, const char *source, const char *target);

/* Files in /proc and /sys. */
void put(const char *path, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
int try_put(const char *path, const char *text); /* 0 or errno */
long get(const char *path);

/* Makes the n-th allocation of the calling thread fail, from here on. */
void fail_nth(int file, int n);
bool was_injected(int file); /* and ends it */

/* Userfaultfds. Those that return an int give -1 and errno. */
int new_uffd(int flags);
int new_uffd_dev(int dev, int flags);
int api(int uffd, uint64_t features);
void *region(int pages);
void watch(int uffd, void *at, int pages);
void fill(int uffd, void *page, int value); /* UFFDIO_COPY */
void serve(int uffd, void *page, int value); /* one fault on page */

/* Read-write protection of one page. */
void protect(int uffd, void *page); /* and register it for that */
void rwprotect(int uffd, void *page, uint64_t mode);
int set_mode(int uffd, uint64_t enable, uint64_t disable); /* of features */

#endif
