// SPDX-License-Identifier: Apache-2.0

// PID 1 of a kernel that shows what the module denies and allows. It loads /policy, enforces it, and runs itself
// again in the domains of a QEMU, of the daemon and of strangers. Each of them prints "RESULT name outcome": an
// errno's name, a label, or ok.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "denials.h"

#define PAGE 4096UL
#define PAGES 16UL
#define SOCKET "/run/vm/qmp.sock"

// These are newer than the headers with which this may be compiled.
struct pagemap_scan { uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any, back; };
struct move { uint64_t dst, src, len, mode; int64_t move; };
struct poison { uint64_t start, len, mode; int64_t updated; };
#define IOCTL_MOVE _IOWR(0xAA, 0x05, struct move)
#define IOCTL_POISON _IOWR(0xAA, 0x08, struct poison)
#define IOCTL_PAGEMAP_SCAN _IOWR('f', 16, struct pagemap_scan)

static const char *who = "";

static void result(const char *name, const char *format, ...)
{
	char outcome[256];
	va_list args;

	va_start(args, format);
	vsnprintf(outcome, sizeof(outcome), format, args);
	va_end(args);
	printf("RESULT %s-%s %s\n", who, name, outcome);
	fflush(stdout);
}

static const char *errname(void)
{
	return strerrorname_np(errno);
}

// outcome reports a system call's result, and returns it.
static long outcome(const char *name, long ret)
{
	result(name, "%s", ret < 0 ? errname() : "ok");
	return ret;
}

static void must(const char *what, long ret)
{
	if (ret >= 0)
		return;
	printf("LOG %s: %s: %m\n", who, what);
	fflush(stdout);
	_exit(1);
}

static void label_of(const char *name, int fd)
{
	char label[128] = "";

	result(name, "%s", fgetxattr(fd, "security.selinux", label, sizeof(label) - 1) < 0 ? errname() : label);
}

// reopen opens the file of a descriptor again.
static int reopen(int fd, int flags)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, flags | O_CLOEXEC);
}

static int new_uffd(int flags)
{
	return syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
}

// --- messages between them: one byte, with or without a descriptor ------------------------------

static int send_fd(int socket, char byte, int fd)
{
	struct iovec iov = {&byte, 1};
	union { char buf[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {0};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		msg.msg_control = control.buf;
		msg.msg_controllen = sizeof(control.buf);
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	return sendmsg(socket, &msg, 0);
}

// receive_fd returns -1 if no descriptor came. The kernel cuts a refused descriptor off the message.
static int receive_fd(int socket, char *byte)
{
	struct iovec iov = {byte, 1};
	union { char buf[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1,
			     .msg_control = control.buf, .msg_controllen = sizeof(control.buf)};
	int fd = -1;

	if (recvmsg(socket, &msg, MSG_CMSG_CLOEXEC) != 1)
		*byte = 0;
	else if (CMSG_FIRSTHDR(&msg) && !(msg.msg_flags & MSG_CTRUNC))
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(int));
	return fd;
}

struct facts { int pid, uffd; uint64_t memory; };

static int call(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};
	int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	must("socket", s);
	if (outcome("connect-to-qemu", connect(s, (void *)&address, sizeof(address))) < 0)
		_exit(0);
	return s;
}

static struct facts ask_facts(int s)
{
	struct facts f;

	must("ask", send_fd(s, 'i', -1));
	must("answer", read(s, &f, sizeof(f)) == sizeof(f) ? 0 : -1);
	return f;
}

// --- QEMU: has memory on tmpfs and a userfaultfd, and carries out orders ------------------------

static void connect_to(const char *name, int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port),
				      .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	must("tcp socket", s);
	outcome(name, connect(s, (void *)&address, sizeof(address)));
	close(s);
}

static void qemu(int ready)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};
	char message[32];
	int state = -1;

	int memory = open("/dev/shm/ram", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	must("memory file", memory);
	must("its size", ftruncate(memory, PAGES * PAGE));
	unsigned char *ram = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	must("map it", ram == MAP_FAILED ? -1 : 0);

	int u = outcome("create", new_uffd(0));
	outcome("ioctl-own", ioctl(u, UFFDIO_API, &api));
	outcome("read-own", read(u, message, sizeof(message)));
	label_of("getattr-own", u);
	outcome("open-device", open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
	connect_to("connect-other-port", 7601);
	connect_to("connect-daemon-port", 7600);

	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	must("bind", bind(listener, (void *)&address, sizeof(address)));
	must("listen", listen(listener, 8));
	must("ready", write(ready, "r", 1));
	for (;;) {
		int s = accept(listener, NULL, NULL);
		char order;
		int fd;

		must("accept", s);
		while ((fd = receive_fd(s, &order)), order) {
			struct facts f = {getpid(), u, (uint64_t)ram};
			int made = -1;

			if (order == 'i')
				must("facts", write(s, &f, sizeof(f)));
			else if (order == 'p')
				must("peek", write(s, ram, 1));
			else if (order == 'f') {
				pid_t child = fork();

				if (!child)
					_exit(0);
				must("wait", waitpid(child, NULL, 0));
				must("forked", write(s, "f", 1));
			} else if (order == 's')
				must("send", send_fd(s, 's', u));
			else if (order == 'w') { // it must save to this file
				state = fd;
				outcome("state-write", write(state, "saved", 5));
				outcome("state-open", reopen(state, O_RDONLY));
				must("written", write(s, "w", 1));
			} else if (order == 'r') { // a file that could also be read
				result("state-receive-to-read", "%s", fd < 0 ? "refused" : "ok");
				must("received", write(s, "r", 1));
			} else if (order == 't')
				must("send", send_fd(s, 't', state));
			else if (order == 'd') {
				outcome("device-api", ioctl(fd, UFFDIO_API, &api)); // that device has no such order
				made = ioctl(fd, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
				outcome("device-new", made);
				close(fd);
				must("made", write(s, &made, sizeof(made)));
			} else if (order == 'q')
				_exit(0);
		}
		close(s);
	}
}

// --- the daemon ---------------------------------------------------------------------------------

static int take(const char *name, struct facts f, int fd)
{
	int pidfd = syscall(SYS_pidfd_open, f.pid, 0);

	must("pidfd_open", pidfd);
	return outcome(name, syscall(SYS_pidfd_getfd, pidfd, fd, 0));
}

// fork_event makes QEMU fork. The fork waits until the event is read.
static void fork_event(int u, int s)
{
	struct uffd_msg msg = {0};
	struct pollfd p = {.fd = u, .events = POLLIN};
	char done;

	must("ask", send_fd(s, 'f', -1));
	must("poll", poll(&p, 1, -1));
	outcome("fork-event", read(u, &msg, sizeof(msg)));
	label_of("fork-label", msg.arg.fork.ufd);
	must("forked", read(s, &done, 1) == 1 ? 0 : -1);
}

static void orders(int u, uint64_t memory, int s)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_FORK};
	struct uffdio_register reg = {.range = {memory, PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	static unsigned char page[PAGE] __attribute__((aligned(4096))) = {42};
	struct uffdio_copy copy = {.dst = memory, .src = (uint64_t)page, .len = PAGE};
	struct uffdio_zeropage zero = {.range = {memory + PAGE, PAGE}};
	struct uffdio_range range = {memory, PAGES * PAGE};
	struct uffdio_writeprotect wp = {.range = {memory, PAGE}};
	struct uffdio_continue cont = {.range = {memory, PAGE}};
	struct move move = {.dst = memory, .src = memory + PAGE, .len = PAGE};
	struct poison poison = {.start = memory + 2 * PAGE, .len = PAGE};
	char message[32];
	unsigned char seen = 0;

	outcome("api", ioctl(u, UFFDIO_API, &api));
	outcome("register", ioctl(u, UFFDIO_REGISTER, &reg));
	outcome("read", read(u, message, sizeof(message)));
	outcome("copy", ioctl(u, UFFDIO_COPY, &copy));
	must("peek", send_fd(s, 'p', -1));
	must("seen", read(s, &seen, 1));
	result("copied", "%d", seen);
	outcome("zeropage", ioctl(u, UFFDIO_ZEROPAGE, &zero));
	outcome("wake", ioctl(u, UFFDIO_WAKE, &range));
	fork_event(u, s);
	outcome("writeprotect", ioctl(u, UFFDIO_WRITEPROTECT, &wp));
	outcome("continue", ioctl(u, UFFDIO_CONTINUE, &cont));
	outcome("move", ioctl(u, IOCTL_MOVE, &move));
	outcome("poison", ioctl(u, IOCTL_POISON, &poison));
	outcome("unregister", ioctl(u, UFFDIO_UNREGISTER, &range));
}

// save makes QEMU write to a file in memory, and reads the file.
static void save(int s)
{
	char text[8] = "", done;
	int state = outcome("state", memfd_create("device-state", MFD_CLOEXEC));

	label_of("state-label", state);
	must("order", send_fd(s, 'w', outcome("state-open", reopen(state, O_WRONLY))));
	must("written", read(s, &done, 1) == 1 ? 0 : -1);
	outcome("state-read", pread(state, text, sizeof(text) - 1, 0));
	result("state-text", "%s", text);
	outcome("state-truncate", ftruncate(state, 0));
	outcome("state-map", mmap(NULL, PAGE, PROT_READ, MAP_SHARED, state, 0) == MAP_FAILED ? -1 : 0);
	must("order", send_fd(s, 'r', state));
	must("received", read(s, &done, 1) == 1 ? 0 : -1);
}

// look reads memory of QEMU, and asks which of its pages have content.
static void look(struct facts f)
{
	struct { uint64_t start, end, categories; } region;
	struct pagemap_scan scan = {.size = sizeof(scan), .start = f.memory, .end = f.memory + PAGES * PAGE,
				    .vec = (uint64_t)&region, .vec_len = 1, .any = 1 << 3, .back = 1 << 3};
	char path[32];
	unsigned char seen = 0;

	snprintf(path, sizeof(path), "/proc/%d/mem", f.pid);
	int memory = outcome("memory-open", open(path, O_RDONLY | O_CLOEXEC));
	outcome("memory-read", pread(memory, &seen, 1, f.memory));
	result("memory", "%d", seen);
	outcome("memory-open-to-write", open(path, O_RDWR | O_CLOEXEC));
	snprintf(path, sizeof(path), "/proc/%d/pagemap", f.pid);
	int pages = outcome("pagemap-open", open(path, O_RDONLY | O_CLOEXEC));
	outcome("pagemap-scan", ioctl(pages, IOCTL_PAGEMAP_SCAN, &scan));
	outcome("pagemap-other", ioctl(pages, _IO('f', 17)));
	outcome("memory-file-open", open("/dev/shm/ram", O_RDONLY | O_CLOEXEC));
	outcome("memory-file-open-to-write", open("/dev/shm/ram", O_RDWR | O_CLOEXEC));
}

static void migrated(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	void *own = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register reg = {.range = {(uint64_t)own, PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	int made, s = call();
	char byte;
	struct facts f = ask_facts(s);

	int u = take("getfd", f, f.uffd);
	label_of("label", u);
	orders(u, f.memory, s);
	look(f);
	save(s);
	must("ask", send_fd(s, 's', -1));
	int received = receive_fd(s, &byte);
	result("scm-rights", "%s", received < 0 ? "refused" : "ok");

	int dev = outcome("open-device", open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
	must("hand it", send_fd(s, 'd', dev));
	must("made", read(s, &made, sizeof(made)));
	label_of("label-of-device-made", take("getfd-of-device-made", f, made));

	int probe = outcome("probe", new_uffd(UFFD_USER_MODE_ONLY));
	label_of("probe-label", probe);
	outcome("probe-api", ioctl(probe, UFFDIO_API, &api));
	outcome("probe-register", ioctl(probe, UFFDIO_REGISTER, &reg));
	outcome("device-new", ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC));
}

// --- any other process, and a QEMU of other categories ------------------------------------------

static void stranger(void)
{
	outcome("create", new_uffd(UFFD_USER_MODE_ONLY));
	outcome("open-device", open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
	connect_to("connect-other-port", 7601);
	connect_to("connect-daemon-port", 7600);

	char byte;
	int s = call();
	struct facts f = ask_facts(s);

	take("getfd", f, f.uffd);
	must("ask", send_fd(s, 's', -1));
	int u = receive_fd(s, &byte);
	result("scm-rights", "%s", u < 0 ? "refused" : "ok");
	must("ask", send_fd(s, 't', -1));
	int state = receive_fd(s, &byte);
	result("state-scm-rights", "%s", state < 0 ? "refused" : "ok");
	if (state >= 0)
		outcome("state-open", reopen(state, O_RDONLY));
}

// --- which program may start which --------------------------------------------------------------

static void domain(void)
{
	char label[128] = "";
	int fd = open("/proc/self/attr/current", O_RDONLY | O_CLOEXEC);

	must("attr/current", fd);
	must("attr/current", read(fd, label, sizeof(label) - 1));
	result("domain", "%s", label);
	close(fd);
}

static void run(const char *path, const char *name)
{
	int status = 0;
	pid_t pid = fork();

	must("fork", pid);
	if (!pid) {
		execl(path, path, name, "0", NULL);
		must(path, -1);
	}
	must("wait", waitpid(pid, &status, 0));
}

// --- PID 1 --------------------------------------------------------------------------------------

static void put(const char *path, const void *data, size_t size)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	must(path, fd);
	must(path, write(fd, data, size) == (ssize_t)size ? 0 : -1);
	close(fd);
}

static void label(const char *path, const char *type)
{
	char text[64];

	snprintf(text, sizeof(text), "system_u:object_r:%s:s0", type);
	must(path, lsetxattr(path, "security.selinux", text, strlen(text), 0));
}

// start runs this program under another name in a domain, and waits for its end. With ready, the program does not
// end by itself, and writes to *ready when it is ready.
static pid_t start(const char *path, const char *domain, const char *name, int *ready)
{
	int p[2];

	must("pipe", pipe(p));
	pid_t pid = fork();
	must("fork", pid);
	if (!pid) {
		char text[64], fd[8];

		snprintf(text, sizeof(text), "system_u:system_r:%s", domain);
		put("/proc/self/attr/exec", text, strlen(text));
		snprintf(fd, sizeof(fd), "%d", p[1]);
		execl(path, path, name, fd, NULL);
		who = name;
		outcome("exec", -1);
		_exit(0);
	}
	close(p[1]);
	if (ready)
		*ready = p[0];
	else {
		int status;

		must("wait", waitpid(pid, &status, 0));
		if (status)
			printf("LOG %s: status %#x\n", name, status);
		close(p[0]);
	}
	return pid;
}

static void load_policy(void)
{
	struct stat st;
	int fd = open("/policy", O_RDONLY | O_CLOEXEC);

	must("/policy", fd);
	must("/policy", fstat(fd, &st));
	void *policy = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	must("map /policy", policy == MAP_FAILED ? -1 : 0);
	put("/sys/fs/selinux/load", policy, st.st_size);
	put("/sys/fs/selinux/enforce", "1", 1);
}

static void init(void)
{
	int ready;
	char byte;

	who = "init";
	must("proc", mount("proc", "/proc", "proc", 0, NULL));
	must("sysfs", mount("sysfs", "/sys", "sysfs", 0, NULL));
	must("selinuxfs", mount("selinuxfs", "/sys/fs/selinux", "selinuxfs", 0, NULL));
	must("devtmpfs", mount("devtmpfs", "/dev", "devtmpfs", 0, NULL));
	must("shm", mkdir("/dev/shm", 01777));
	must("shm", mount("tmpfs", "/dev/shm", "tmpfs", 0, NULL));
	load_policy();
	put("/proc/sys/kernel/printk_ratelimit", "0", 1);
	put("/proc/sys/vm/unprivileged_userfaultfd", "1", 1);
	// The console to which all processes print was opened before there was a policy.
	static const char console[] = "system_u:object_r:console_device_t:s0";
	must("console", fsetxattr(1, "security.selinux", console, sizeof(console) - 1, 0));
	label("/bin/qemu", "qemu_exec_t");
	label("/bin/migrated", "migrated_exec_t");
	label("/bin/other", "other_exec_t");
	label("/dev/userfaultfd", "migrated_uffd_device_t");
	must("/run", mkdir("/run/vm", 0755));
	label("/run", "var_run_t");
	label("/run/vm", "svirt_runtime_t");

	// The loopback interface. A connection that the policy permits is refused because nothing listens.
	struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	must("lo", ioctl(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), SIOCSIFFLAGS, &lo));

	start("/bin/qemu", "svirt_t:s0:c1,c2", "qemu", &ready);
	must("QEMU", read(ready, &byte, 1) == 1 ? 0 : -1);
	start("/bin/migrated", "migrated_t:s0", "migrated", NULL);
	start("/bin/other", "other_t:s0:c1,c2", "other", NULL);
	start("/bin/other", "stranger_t:s0", "tracer", NULL);
	start("/bin/qemu", "svirt_t:s0:c1,c2", "same-qemu", NULL);
	start("/bin/qemu", "svirt_t:s0:c3,c4", "other-qemu", NULL);
	// Processes that may do everything else.
	start("/bin/other", "init_t:s0", "trusted", NULL);
	start("/bin/other", "init_t:s0:c1,c2", "trusted-with-categories", NULL);
	start("/bin/other", "migrated_t:s0", "forged", NULL);
	start("/bin/other", "init_t:s0-s0:c0.c7", "init", NULL);
	log_denials();
	printf("DONE\n");
	fflush(stdout);
	sync();
	reboot(RB_POWER_OFF);
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (getpid() == 1) {
		init();
		pause();
	}
	if (argc < 3)
		return 2;
	who = argv[1];
	if (!strcmp(who, "qemu"))
		qemu(atoi(argv[2]));
	else if (!strcmp(who, "migrated"))
		migrated();
	else if (!strcmp(who, "init")) {
		domain();
		run("/bin/migrated", "started");
	} else if (!strcmp(who, "started")) {
		domain();
		run("/bin/qemu", "qemu-of-daemon");
	} else if (!strcmp(who, "qemu-of-daemon"))
		domain();
	else
		stranger();
	return 0;
}
