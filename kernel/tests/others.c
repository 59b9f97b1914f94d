// SPDX-License-Identifier: GPL-2.0
/* The other users of labelled anonymous inodes, which are to stay as they are. */
#include "harness.h"

#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <sys/eventfd.h>

#ifndef KVM_CREATE_GUEST_MEMFD /* newer than the build machine's headers */
struct kvm_create_guest_memfd {
	__u64 size;
	__u64 flags;
	__u64 reserved[6];
};
#define KVM_CREATE_GUEST_MEMFD                                                 \
	_IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#endif
#ifndef KVM_X86_SW_PROTECTED_VM
#define KVM_X86_SW_PROTECTED_VM 1
#endif

/* What it is made of is made before the domain is entered. */
struct kind {
	int (*prepare)(void);
	int (*create)(int prepared);
	bool (*works)(int fd);
	const char *type; /* in the policy */
};

static int secret(int prepared)
{
	return syscall(SYS_memfd_secret, O_CLOEXEC);
}

static bool memory_works(int fd)
{
	volatile char *at;

	MUST(ftruncate(fd, PAGE));
	at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(at != MAP_FAILED);
	*at = 's';
	return *at == 's';
}

/* Of tmpfs, where there is no class of its own for it. */
static int memory(int prepared)
{
	return syscall(SYS_memfd_create, "memory", MFD_CLOEXEC);
}

static struct io_uring_params params;

static int ring(int prepared)
{
	return syscall(SYS_io_uring_setup, 4, &params);
}

static bool ring_works(int fd)
{
	struct io_uring_sqe *sqes =
		mmap(NULL, 4 * sizeof(*sqes), PROT_READ | PROT_WRITE,
		     MAP_SHARED, fd, IORING_OFF_SQES);
	char *sq = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			IORING_OFF_SQ_RING);

	CHECK(sqes != MAP_FAILED && sq != MAP_FAILED);
	sqes[0] = (struct io_uring_sqe){ .opcode = IORING_OP_NOP };
	*(unsigned int *)(sq + params.sq_off.array) = 0;
	__atomic_store_n((unsigned int *)(sq + params.sq_off.tail), 1,
			 __ATOMIC_RELEASE);
	return MUST(syscall(SYS_io_uring_enter, fd, 1, 1,
			    IORING_ENTER_GETEVENTS, NULL, 0)) == 1;
}

static int vm(void)
{
	int kvm = MUST(open("/dev/kvm", O_RDWR | O_CLOEXEC));

	return MUST(ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM));
}

static int gmem(int vm)
{
	struct kvm_create_guest_memfd g = { .size = 2 * PAGE };

	return ioctl(vm, KVM_CREATE_GUEST_MEMFD, &g);
}

static bool gmem_works(int fd)
{
	return !fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, PAGE);
}

/* Of the inode that all such files share: no label, so no rule applies. */
static int event(int prepared)
{
	return eventfd(1, EFD_CLOEXEC);
}

static bool event_works(int fd)
{
	eventfd_t value;

	return !eventfd_read(fd, &value) && value == 1;
}

static int create(const struct kind *k, const char *domain)
{
	int prepared = k->prepare ? k->prepare() : -1;

	enter(domain);
	return k->create(prepared);
}

static void works(const void *arg)
{
	const struct kind *k = arg;
	int fd = MUST(create(k, "app_t"));

	outcome("%s", k->works(fd) ? "works" : name(errno));
}

static void labelled(const void *arg)
{
	outcome("%s", type_of(MUST(create(arg, "app_t"))));
}

static void refused(const void *arg)
{
	const struct kind *k = arg;
	int log = open_log();

	if (create(k, "barred_t") >= 0)
		outcome("fd");
	if (errno != EACCES)
		outcome("%s", name(errno));
	outcome("EACCES-%s",
		denied(log, "create", "barred_t", k->type) ? "create" : "unlogged");
}

static void barred(const void *arg)
{
	outcome("%s", made(create(arg, "barred_t") < 0 ? errno : 0));
}

static const struct kind secretmem = { NULL, secret, memory_works, "secret_t" };
static const struct kind memfd = { NULL, memory, memory_works, "memory_t" };
static const struct kind io_uring = { NULL, ring, ring_works, "ring_t" };
static const struct kind guest = { vm, gmem, gmem_works, "gmem_t" };
static const struct kind eventfds = { NULL, event, event_works, NULL };

#define KIND(name, kind)                                                       \
	{ name "-works", works, kind }, { name "-label", labelled, kind },     \
	{ name "-denied", refused, kind }

const struct test others_tests[] = {
	KIND("others-secretmem", &secretmem),
	KIND("others-memfd", &memfd),
	KIND("others-io-uring", &io_uring),
	KIND("others-guest-memfd", &guest),
	{ "others-eventfd-works", works, &eventfds },
	{ "others-eventfd-barred", barred, &eventfds },
	{}
};
