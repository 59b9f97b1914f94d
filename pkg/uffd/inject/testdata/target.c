// SPDX-License-Identifier: Apache-2.0
//
// A process into which tests inject system calls. argv[1] says what its main thread does. It prints "ready"
// before that and "ret=R errno=E signals=N" after it.

#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/sem.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t signals;
static void count(int sig) { (void)sig; signals++; }

static uint32_t word; // futex

static void *wake_futex(void *unused) {
	(void)unused;
	char c;
	if (read(0, &c, 1) == 1) {
		__atomic_store_n(&word, 1, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
	}
	return 0;
}

static int sem;
static void *post_sem(void *unused) {
	(void)unused;
	char c;
	struct sembuf up = {0, 1, 0};
	if (read(0, &c, 1) == 1) semop(sem, &up, 1);
	return 0;
}

static long block(const char *how) {
	struct pollfd pfd = {0, POLLIN, 0};
	struct epoll_event ev = {.events = EPOLLIN};
	struct timespec hour = {3600, 0};
	pthread_t t;
	char c;

	if (!strcmp(how, "read")) return read(0, &c, 1);
	if (!strcmp(how, "ppoll")) return ppoll(&pfd, 1, 0, 0);
	if (!strcmp(how, "ppoll-mask")) {
		sigset_t none;
		sigemptyset(&none);
		return ppoll(&pfd, 1, &hour, &none);
	}
	if (!strcmp(how, "poll-timeout")) return poll(&pfd, 1, 3600 * 1000);
	if (!strcmp(how, "epoll")) {
		int ep = epoll_create1(0);
		epoll_ctl(ep, EPOLL_CTL_ADD, 0, &ev);
		return epoll_wait(ep, &ev, 1, -1);
	}
	if (!strcmp(how, "epoll-timeout")) {
		int ep = epoll_create1(0);
		epoll_ctl(ep, EPOLL_CTL_ADD, 0, &ev);
		return epoll_wait(ep, &ev, 1, 3600 * 1000);
	}
	if (!strcmp(how, "futex") || !strcmp(how, "futex-timeout")) {
		pthread_create(&t, 0, wake_futex, 0);
		return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, how[5] ? &hour : 0, 0, 0);
	}
	if (!strcmp(how, "semop")) {
		struct sembuf down = {0, -1, 0};
		sem = semget(IPC_PRIVATE, 1, 0600);
		pthread_create(&t, 0, post_sem, 0);
		long ret = semop(sem, &down, 1);
		int saved = errno;
		semctl(sem, 0, IPC_RMID);
		errno = saved;
		return ret;
	}
	if (!strcmp(how, "nanosleep")) {
		struct timespec ts = {5, 0};
		return nanosleep(&ts, 0);
	}
	if (!strcmp(how, "nanosleep-long")) return nanosleep(&hour, 0);
	if (!strcmp(how, "pause")) return pause();
	if (!strcmp(how, "vfork")) { // the parent sleeps uninterruptibly until the child exits
		pid_t child = vfork();
		if (child == 0) {
			read(0, &c, 1);
			_exit(0);
		}
		return child > 0;
	}
	fprintf(stderr, "unknown: %s\n", how);
	exit(2);
}

// rseq_spin stays inside a restartable sequence until it reads a line. The kernel must abort the sequence
// whenever it is interrupted. The sequence is then entered again, which `entries` counts.
static volatile long entries;
static volatile int leave;
extern char sequence_start[], sequence_end[];

static void *leave_on_input(void *unused) {
	(void)unused;
	char c;
	leave = read(0, &c, 1);
	return 0;
}

static long rseq_spin(void) {
	pthread_t t;
	if (__rseq_size == 0) {
		printf("no rseq\n");
		fflush(stdout);
		return -1;
	}
	struct rseq *rs = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	pthread_create(&t, 0, leave_on_input, 0);
	printf("%p %p %p\n", (void *)sequence_start, (void *)sequence_end, (void *)&entries);
	fflush(stdout);
	__asm__ volatile(
		".pushsection .data.rel\n .balign 32\n"
		"3: .long 0, 0\n .quad sequence_start, sequence_end - sequence_start, 4f\n .popsection\n"
		"jmp 5f\n"
		".long 0x53053053\n" // RSEQ_SIG must be before the abort handler
		"4: nop\n"
		"5: incq %0\n"
		"lea 3b(%%rip), %%rax\n mov %%rax, %1\n"
		"sequence_start: cmpl $0, %2\n je sequence_start\n"
		"sequence_end:\n"
		: "+m"(entries), "=m"(rs->rseq_cs)
		: "m"(leave)
		: "rax", "cc", "memory");
	pthread_join(t, 0);
	return leave;
}

// spin keeps a known value in each register that a C compiler uses, and checks whether one has changed.
static void spin(long rounds) {
	int avx = __builtin_cpu_supports("avx"); // if so, check the upper half of a register, too
	for (long i = 0; i < rounds; i++) {
		uint64_t bad = 0;
		__asm__ volatile(
			"mov $0x1111, %%rax\n mov $0x2222, %%rbx\n mov $0x3333, %%rcx\n mov $0x4444, %%rdx\n"
			"mov $0x5555, %%rsi\n mov $0x6666, %%rdi\n mov $0x7777, %%r8\n mov $0x8888, %%r9\n"
			"mov $0x9999, %%r10\n mov $0xaaaa, %%r11\n mov $0xbbbb, %%r12\n mov $0xcccc, %%r13\n"
			"mov $0xdddd, %%r14\n movq %%rax, %%xmm0\n movq %%rbx, %%xmm7\n movq %%rcx, %%xmm15\n"
			"cmpl $0, %1\n je 5f\n vinsertf128 $1, %%xmm15, %%ymm3, %%ymm3\n"
			"5: mov $2000, %%r15\n stc\n"
			"1: lea -1(%%r15), %%r15\n lea 1(%%r15), %%r15\n lea -1(%%r15), %%r15\n"
			"jnc 2f\n" // checks the flags
			"xchg %%r15, %%rcx\n jrcxz 3f\n xchg %%r15, %%rcx\n jmp 1b\n"
			"3: xchg %%r15, %%rcx\n"
			"cmp $0x1111, %%rax\n jne 2f\n cmp $0x2222, %%rbx\n jne 2f\n cmp $0x3333, %%rcx\n jne 2f\n"
			"cmp $0x4444, %%rdx\n jne 2f\n cmp $0x5555, %%rsi\n jne 2f\n cmp $0x6666, %%rdi\n jne 2f\n"
			"cmp $0x7777, %%r8\n jne 2f\n cmp $0x8888, %%r9\n jne 2f\n cmp $0x9999, %%r10\n jne 2f\n"
			"cmp $0xaaaa, %%r11\n jne 2f\n cmp $0xbbbb, %%r12\n jne 2f\n cmp $0xcccc, %%r13\n jne 2f\n"
			"cmp $0xdddd, %%r14\n jne 2f\n"
			"movq %%xmm0, %%r8\n cmp $0x1111, %%r8\n jne 2f\n"
			"movq %%xmm7, %%r8\n cmp $0x2222, %%r8\n jne 2f\n"
			"movq %%xmm15, %%r8\n cmp $0x3333, %%r8\n jne 2f\n"
			"cmpl $0, %1\n je 6f\n vextractf128 $1, %%ymm3, %%xmm3\n movq %%xmm3, %%r8\n cmp $0x3333, %%r8\n jne 2f\n"
			"6: movq $0, %0\n jmp 4f\n"
			"2: movq $1, %0\n"
			"4:\n"
			: "=m"(bad)
			: "m"(avx)
			: "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
			  "xmm0", "xmm3", "xmm7", "xmm15", "cc", "memory");
		if (bad) {
			printf("register changed\n");
			fflush(stdout);
			abort();
		}
	}
}

static volatile int stop_spinning;
static void *spin_on(void *unused) {
	(void)unused;
	while (!stop_spinning) spin(10);
	return 0;
}

// busy spins in three threads until it reads a line. It polls for the line between the rounds. EINTR is a signal, which
// the handler counted.
static long busy(void) {
	pthread_t t[2];
	struct pollfd pfd = {0, POLLIN, 0};
	for (int i = 0; i < 2; i++) pthread_create(&t[i], 0, spin_on, 0);
	long ret;
	do spin(50); while ((ret = poll(&pfd, 1, 0)) == 0 || (ret < 0 && errno == EINTR));
	stop_spinning = 1;
	for (int i = 0; i < 2; i++) pthread_join(t[i], 0);
	return ret;
}

static void forbid_userfaultfd(uint32_t action) {
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = {sizeof code / sizeof *code, code};
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog)) {
		perror("seccomp");
		exit(2);
	}
}

int main(int argc, char **argv) {
	const char *how = argc > 1 ? argv[1] : "";
	struct sigaction sa = {.sa_handler = count, .sa_flags = SA_RESTART};
	sigaction(SIGRTMIN, &sa, 0);
	sigaction(SIGSYS, &sa, 0);
	sa.sa_flags = 0; // no SA_RESTART: a call that SIGUSR1 interrupts must fail
	sigaction(SIGUSR1, &sa, 0);

	if (!strcmp(how, "seccomp-trap")) forbid_userfaultfd(SECCOMP_RET_TRAP), how = "read";
	if (!strcmp(how, "seccomp-errno")) forbid_userfaultfd(SECCOMP_RET_ERRNO | EPERM), how = "read";
	if (!strcmp(how, "seccomp-kill")) forbid_userfaultfd(SECCOMP_RET_KILL_PROCESS), how = "read";

	printf("ready\n");
	fflush(stdout);
	errno = 0;
	long ret = !strcmp(how, "busy") ? busy() : !strcmp(how, "rseq") ? rseq_spin() : block(how);
	printf("ret=%ld errno=%d signals=%d\n", ret, ret < 0 ? errno : 0, (int)signals);
	return 0;
}
