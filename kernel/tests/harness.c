// SPDX-License-Identifier: GPL-2.0
#include "harness.h"

#include <signal.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/xattr.h>

/* Where a test says its outcome; see init.c. */
int outcome_fd = -1;

void outcome(const char *format, ...)
{
	char word[128];
	va_list ap;
	int n;

	va_start(ap, format);
	n = vsnprintf(word, sizeof(word), format, ap);
	va_end(ap);
	if (write(outcome_fd, word, n + 1) != n + 1)
		perror("outcome");
	_exit(0);
}

void note(const char *format, ...)
{
	char line[1100];
	va_list ap;
	int n;

	n = snprintf(line, sizeof(line), "LOG ");
	va_start(ap, format);
	n += vsnprintf(line + n, sizeof(line) - n - 1, format, ap);
	va_end(ap);
	if (n > (int)sizeof(line) - 2)
		n = sizeof(line) - 2;
	line[n++] = '\n';
	if (write(STDOUT_FILENO, line, n) != n)
		_exit(1);
}

const char *name(int error)
{
	const char *n = strerrorname_np(error);

	return n ? n : "unknown-errno";
}

const char *made(int error)
{
	return error ? name(error) : "fd";
}

pid_t spawn(void (*run)(void *), void *arg)
{
	pid_t pid = MUST(fork());

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	run(arg);
	_exit(1);
}

bool gone(pid_t pid, int *status)
{
	int fd = MUST(syscall(SYS_pidfd_open, pid, 0));
	bool ended = ready(fd, PATIENCE);

	close(fd);
	if (ended)
		MUST(waitpid(pid, status, 0));
	return ended;
}

bool dies(pid_t pid)
{
	int status;

	MUST(kill(pid, SIGKILL));
	return gone(pid, &status);
}

void enter(const char *domain)
{
	put("/proc/thread-self/attr/current", "u:r:%s", domain);
}

void drop_privileges(void)
{
	/* Leaving user 0 drops all capabilities, and with them dumpability,
	 * without which /proc/self would be root's. */
	MUST(syscall(SYS_setresgid, 1000, 1000, 1000));
	MUST(syscall(SYS_setresuid, 1000, 1000, 1000));
	MUST(prctl(PR_SET_DUMPABLE, 1));
}

bool ready(int fd, int ms)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	return MUST(poll(&p, 1, ms)) == 1;
}

void say(int fd, int what)
{
	MUST(write(fd, &what, sizeof(what)));
}

bool heard(int fd, int *what, int ms)
{
	if (!ready(fd, ms))
		return false;
	CHECK(read(fd, what, sizeof(*what)) == sizeof(*what));
	return true;
}

int hear(int fd)
{
	int what;

	CHECK(heard(fd, &what, PATIENCE));
	return what;
}

void send_fd(int sock, int fd)
{
	char control[CMSG_SPACE(sizeof(fd))] = {};
	struct iovec iov = { .iov_base = "", .iov_len = 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	MUST(sendmsg(sock, &msg, 0));
}

int recv_fd(int sock)
{
	char control[CMSG_SPACE(sizeof(int))] = {}, byte;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	int fd;

	CHECK(ready(sock, PATIENCE));
	CHECK(MUST(recvmsg(sock, &msg, 0)) == 1);
	c = CMSG_FIRSTHDR(&msg);
	if (!c) {
		CHECK(msg.msg_flags & MSG_CTRUNC);
		return -1;
	}
	memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	return fd;
}

const char *type_of(int fd)
{
	static char text[128];
	ssize_t n = MUST(fgetxattr(fd, "security.selinux", text,
				   sizeof(text) - 1));
	char *type;

	text[n] = 0;
	type = strrchr(text, ':');
	CHECK(type);
	return type + 1;
}

int open_log(void)
{
	int fd = MUST(open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC));

	MUST(lseek(fd, 0, SEEK_END));
	return fd;
}

/*
 * Whether the log says, from where it was opened, that source was denied perm
 * on target. A thread of the kernel writes the record, so it may come later.
 */
bool denied(int log, const char *perm, const char *source, const char *target)
{
	char line[2048], p[64], s[64], t[64];
	ssize_t n;

	snprintf(p, sizeof(p), "denied  { %s }", perm);
	snprintf(s, sizeof(s), "scontext=u:r:%s ", source);
	snprintf(t, sizeof(t), ":%s tclass=", target);
	while (ready(log, PATIENCE)) {
		n = read(log, line, sizeof(line) - 1);
		if (n < 0 && (errno == EPIPE || errno == EAGAIN))
			continue;
		MUST(n);
		line[n] = 0;
		line[strcspn(line, "\n")] = 0;
		if (!strstr(line, "avc:"))
			continue;
		note("%s", strstr(line, "avc:"));
		if (strstr(line, p) && strstr(line, s) && strstr(line, t))
			return true;
	}
	return false;
}

int try_put(const char *path, const char *text)
{
	int fd = MUST(open(path, O_WRONLY | O_CLOEXEC));
	int error = write(fd, text, strlen(text)) < 0 ? errno : 0;

	close(fd);
	return error;
}

void put(const char *path, const char *format, ...)
{
	char text[128];
	va_list ap;
	int error;

	va_start(ap, format);
	vsnprintf(text, sizeof(text), format, ap);
	va_end(ap);
	error = try_put(path, text);
	if (error) {
		note("write %s to %s: %s", text, path, name(error));
		outcome("put-%s", name(error));
	}
}

long get(const char *path)
{
	char text[64];
	int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
	ssize_t n = MUST(read(fd, text, sizeof(text) - 1));

	close(fd);
	text[n] = 0;
	return strtol(text, NULL, 10);
}

void fail_nth(int file, int n)
{
	char text[16];
	int size = snprintf(text, sizeof(text), "%d", n);

	CHECK(pwrite(file, text, size, 0) == size);
}

bool was_injected(int file)
{
	char text[16] = {};

	MUST(pread(file, text, sizeof(text) - 1, 0));
	fail_nth(file, 0);
	return atoi(text) == 0;
}

int new_uffd(int flags)
{
	return syscall(SYS_userfaultfd, flags);
}

int new_uffd_dev(int dev, int flags)
{
	return ioctl(dev, USERFAULTFD_IOC_NEW, flags);
}

int api(int uffd, uint64_t features)
{
	struct uffdio_api a = { .api = UFFD_API, .features = features };

	return ioctl(uffd, UFFDIO_API, &a);
}

void *region(int pages)
{
	void *at = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

void watch(int uffd, void *at, int pages)
{
	struct uffdio_register r = {
		.range = { .start = (uintptr_t)at, .len = (size_t)pages * PAGE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	MUST(ioctl(uffd, UFFDIO_REGISTER, &r));
}

void rwprotect(int uffd, void *page, uint64_t mode)
{
	struct uffdio_rwprotect p = {
		.range = { .start = (uintptr_t)page, .len = PAGE },
		.mode = mode,
	};

	MUST(ioctl(uffd, UFFDIO_RWPROTECT, &p));
}

void protect(int uffd, void *page)
{
	struct uffdio_register r = {
		.range = { .start = (uintptr_t)page, .len = PAGE },
		.mode = UFFDIO_REGISTER_MODE_RWP,
	};

	MUST(ioctl(uffd, UFFDIO_REGISTER, &r));
	rwprotect(uffd, page, UFFDIO_RWPROTECT_MODE_RWP);
}

int set_mode(int uffd, uint64_t enable, uint64_t disable)
{
	struct uffdio_set_mode m = { .enable = enable, .disable = disable };

	return ioctl(uffd, UFFDIO_SET_MODE, &m);
}

void fill(int uffd, void *page, int value)
{
	static char source[PAGE] __attribute__((aligned(PAGE)));
	struct uffdio_copy c = { .dst = (uintptr_t)page,
		.src = (uintptr_t)source, .len = PAGE };

	memset(source, value, sizeof(source));
	MUST(ioctl(uffd, UFFDIO_COPY, &c));
}

void serve(int uffd, void *page, int value)
{
	struct uffd_msg msg;

	/* poll() does not do for a blocking descriptor, read() does. */
	if (MUST(fcntl(uffd, F_GETFL)) & O_NONBLOCK)
		CHECK(ready(uffd, PATIENCE));
	CHECK(MUST(read(uffd, &msg, sizeof(msg))) == sizeof(msg));
	CHECK(msg.event == UFFD_EVENT_PAGEFAULT);
	CHECK((msg.arg.pagefault.address & ~(PAGE - 1ULL)) == (uintptr_t)page);
	fill(uffd, page, value);
}
