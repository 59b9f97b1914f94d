/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process whose memory the tests register with userfaultfd. It executes requests from a SOCK_SEQPACKET
 * socket (descriptor 3), one request and one reply at a time, and ends when the socket closes. Actions that
 * may block (touching memory, discarding, forking) run in a thread that is joined later.
 *
 * It is C and not Go: its fork() is a plain fork, and no runtime touches memory that the test does not know of.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { OP_OPEN = 1, OP_MAP, OP_ALIAS, OP_START, OP_JOIN, OP_DO, OP_SEND, OP_CLOSE, OP_TRUNCATE };
enum { ACT_READ = 1, ACT_WRITE, ACT_MADVISE, ACT_MUNMAP, ACT_MREMAP, ACT_FORK, ACT_TOUCH };
enum { KIND_ANON, KIND_SHMEM, KIND_HUGETLB };

struct request { uint64_t op, action, slot, x, y, z; char payload[2048]; };
struct reply { int64_t value, err; };
struct slot { pthread_t thread; struct request rq; struct reply rp; pid_t tid; int ready[2]; };

#define SLOTS 1024
static struct slot slots[SLOTS];
static int uffd = -1, memfd = -1;
static __thread sigjmp_buf escape;
static __thread volatile sig_atomic_t armed;

static void on_sigbus(int sig, siginfo_t *si, void *ctx)
{
	(void)ctx;
	if (!armed)
		_exit(128 + sig);
	siglongjmp(escape, si->si_code ? si->si_code : 1);
}

/* act does one action with memory and returns its result. After a SIGBUS, err is SIGBUS and value its si_code. */
static struct reply act(const struct request *rq)
{
	struct reply rp = { 0, 0 };
	int code;

	errno = 0;
	switch (rq->action) {
	case ACT_READ:
	case ACT_WRITE:
		code = sigsetjmp(escape, 1);
		if (code) {
			armed = 0;
			return (struct reply){ code, SIGBUS };
		}
		armed = 1;
		if (rq->action == ACT_READ)
			rp.value = *(volatile uint64_t *)rq->x;
		else
			*(volatile uint64_t *)rq->x = rq->y;
		armed = 0;
		break;
	case ACT_MADVISE:
		rp.value = madvise((void *)rq->x, rq->y, (int)rq->z);
		break;
	case ACT_MUNMAP:
		rp.value = munmap((void *)rq->x, rq->y);
		break;
	case ACT_MREMAP: /* to the address z; it replaces what is mapped there */
		rp.value = (int64_t)mremap((void *)rq->x, rq->y, rq->y, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)rq->z);
		break;
	case ACT_FORK: { /* value is the low byte that the new process read at x, or minus the signal that killed it */
		int status = 0;
		pid_t pid = fork();
		if (pid == 0)
			_exit(rq->x ? (int)(*(volatile uint64_t *)rq->x & 0xff) : 0);
		if (pid < 0 || waitpid(pid, &status, 0) < 0)
			return (struct reply){ -1, errno };
		rp.value = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
		break;
	}
	case ACT_TOUCH: /* read a byte of each page of z bytes in [x, x+y); value is their sum */
		for (uint64_t off = 0; off < rq->y; off += rq->z)
			rp.value += *(volatile uint8_t *)(rq->x + off);
		break;
	default:
		errno = ENOSYS;
		rp.value = -1;
	}
	rp.err = rp.value == -1 ? errno : 0;
	return rp;
}

static void *run(void *arg)
{
	struct slot *s = arg;
	char go = 1;

	s->tid = (pid_t)syscall(SYS_gettid);
	if (write(s->ready[1], &go, 1) != 1)
		abort();
	s->rp = act(&s->rq);
	return NULL;
}

static struct reply start(const struct request *rq)
{
	struct slot *s = &slots[rq->slot % SLOTS];
	char go;
	int err;

	s->rq = *rq;
	if (pipe2(s->ready, O_CLOEXEC))
		return (struct reply){ -1, errno };
	err = pthread_create(&s->thread, NULL, run, s);
	if (!err && read(s->ready[0], &go, 1) != 1)
		abort();
	close(s->ready[0]);
	close(s->ready[1]);
	return err ? (struct reply){ -1, err } : (struct reply){ s->tid, 0 };
}

static struct reply open_uffd(const struct request *rq)
{
	if (rq->x) { /* from the device */
		int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		if (dev < 0)
			return (struct reply){ -1, errno };
		uffd = ioctl(dev, 0xAA00 /* USERFAULTFD_IOC_NEW */, rq->y);
		close(dev);
	} else {
		uffd = (int)syscall(SYS_userfaultfd, rq->y);
	}
	return (struct reply){ uffd, uffd < 0 ? errno : 0 };
}

static struct reply map(const struct request *rq)
{
	int flags = MAP_SHARED;
	void *p;

	memfd = -1;
	if (rq->x == KIND_ANON) {
		flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE; /* may be more than the machine's memory */
	} else {
		memfd = memfd_create("child", MFD_CLOEXEC | (rq->x == KIND_HUGETLB ? MFD_HUGETLB : 0));
		if (memfd < 0 || ftruncate(memfd, (off_t)rq->y))
			return (struct reply){ -1, errno };
	}
	p = mmap(NULL, rq->y, PROT_READ | PROT_WRITE, flags, memfd, 0);
	return (struct reply){ (int64_t)p, p == MAP_FAILED ? errno : 0 };
}

/* alias maps the last shared memory a second time: access to its page cache that is not registered. */
static struct reply alias(const struct request *rq)
{
	void *p = mmap(NULL, rq->y, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	return (struct reply){ (int64_t)p, p == MAP_FAILED ? errno : 0 };
}

static int send_with_fd(int sock, const void *data, size_t len, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { (void *)data, len };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *c;
		m.msg_control = control;
		m.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	return sendmsg(sock, &m, MSG_NOSIGNAL) == (ssize_t)len ? 0 : -1;
}

/* send_over does what a virtual machine monitor does: it connects to a socket and sends a message with the
 * userfaultfd. payload is the socket's path, then 0, then the message. */
static struct reply send_over(const struct request *rq)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	const char *message = rq->payload + strlen(rq->payload) + 1;
	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), err = 0;

	strncpy(sa.sun_path, rq->payload, sizeof(sa.sun_path) - 1);
	if (connect(sock, (struct sockaddr *)&sa, sizeof(sa)) || send_with_fd(sock, message, strlen(message), uffd))
		err = errno;
	close(sock);
	return (struct reply){ err ? -1 : 0, err };
}

int main(void)
{
	struct sigaction sa = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	static struct request rq;
	struct reply rp;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGBUS, &sa, NULL);
	for (;;) {
		memset(&rq, 0, sizeof(rq));
		if (read(3, &rq, sizeof(rq)) <= 0)
			return 0;
		switch (rq.op) {
		case OP_OPEN: rp = open_uffd(&rq); break;
		case OP_MAP: rp = map(&rq); break;
		case OP_ALIAS: rp = alias(&rq); break;
		case OP_START: rp = start(&rq); break;
		case OP_DO: rp = act(&rq); break;
		case OP_SEND: rp = send_over(&rq); break;
		case OP_CLOSE: rp = (struct reply){ close(uffd), 0 }; uffd = -1; break;
		case OP_TRUNCATE: rp.value = ftruncate(memfd, (off_t)rq.x); rp.err = rp.value ? errno : 0; break;
		case OP_JOIN:
			pthread_join(slots[rq.slot % SLOTS].thread, NULL);
			rp = slots[rq.slot % SLOTS].rp;
			break;
		default: rp = (struct reply){ -1, ENOSYS };
		}
		if (send_with_fd(3, &rp, sizeof(rp), rq.op == OP_OPEN ? uffd : -1))
			return 1;
	}
}
