// SPDX-License-Identifier: Apache-2.0

// PID 1 of a kernel with the policy of a whole distribution. It loads /policy, enters the policy's domain for init,
// starts the daemon as systemd does, with a socket for its output and one for its notifications, and runs the
// operator's "migrated check". It prints "RESULT name outcome".

#define _GNU_SOURCE
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "denials.h"

#define MIGRATED "/usr/bin/migrated"
#define NOTIFY "/run/systemd/notify"

static void must(const char *what, long ret)
{
	if (ret >= 0)
		return;
	printf("LOG %s: %m\n", what);
	fflush(stdout);
	if (getpid() == 1)
		reboot(RB_POWER_OFF);
	_exit(1);
}

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

// boot does, before the policy is enforced, what a boot loader, dracut and restorecon do.
static void boot(void)
{
	static const struct { const char *path, *type; } labels[] = {
		{"/sbin/init", "init_exec_t"}, {MIGRATED, "migrated_exec_t"}, {"/sbin", "bin_t"}, {"/usr", "usr_t"},
		{"/usr/bin", "bin_t"}, {"/etc", "etc_t"}, {"/run", "var_run_t"}, {"/run/systemd", "init_runtime_t"},
		{"/var", "var_t"}, {"/var/log", "var_log_t"},
		{"/dev/userfaultfd", "migrated_uffd_device_t"}, {"/dev/null", "null_device_t"},
		{"/dev/console", "console_device_t"}, {"/dev/urandom", "urandom_device_t"},
	};
	struct stat st;

	must("proc", mount("proc", "/proc", "proc", 0, NULL));
	must("sysfs", mount("sysfs", "/sys", "sysfs", 0, NULL));
	must("selinuxfs", mount("selinuxfs", "/sys/fs/selinux", "selinuxfs", 0, NULL));
	must("devtmpfs", mount("devtmpfs", "/dev", "devtmpfs", 0, NULL));
	must("run", mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"));
	must("run", mkdir("/run/systemd", 0755));
	must("var", mount("tmpfs", "/var", "tmpfs", 0, "mode=0755"));
	must("var", mkdir("/var/log", 0755));

	int fd = open("/policy", O_RDONLY | O_CLOEXEC);
	must("/policy", fd);
	must("/policy", fstat(fd, &st));
	void *policy = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	must("map /policy", policy == MAP_FAILED ? -1 : 0);
	put("/sys/fs/selinux/load", policy, st.st_size);
	for (size_t i = 0; i < sizeof(labels) / sizeof(labels[0]); i++)
		label(labels[i].path, labels[i].type);
	put("/sys/fs/selinux/enforce", "1", 1);
	execl("/sbin/init", "/sbin/init", "init", NULL);
	must("/sbin/init", -1);
}

static void domain(const char *name, pid_t pid)
{
	char path[32], text[128] = "";

	snprintf(path, sizeof(path), "/proc/%d/attr/current", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	must(path, fd);
	must(path, read(fd, text, sizeof(text) - 1));
	printf("RESULT %s %s\n", name, text);
	close(fd);
}

static pid_t start_daemon(int output)
{
	pid_t pid = fork();

	must("fork", pid);
	if (pid)
		return pid;
	dup2(open("/dev/null", O_RDONLY), 0);
	dup2(output, 1);
	dup2(output, 2);
	setenv("NOTIFY_SOCKET", NOTIFY, 1);
	execl(MIGRATED, MIGRATED, "serve", "--listen", "127.0.0.1:7600", NULL);
	_exit(127);
}

// operate runs a command as the operator, outside the daemon's domain.
static void operate(const char *name, const char *const *args)
{
	static const char self[] = "system_u:system_r:init_t:s0";
	int status = 0;
	pid_t pid = fork();

	must("fork", pid);
	if (!pid) {
		put("/proc/self/attr/exec", self, sizeof(self) - 1);
		execv(MIGRATED, (char **)args);
		_exit(127);
	}
	must("wait", waitpid(pid, &status, 0));
	printf("RESULT %s %d\n", name, WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
	fflush(stdout);
}

// notified reads one notification and returns how many listening sockets came with it. The kernel leaves out sockets
// that the policy does not let init use.
static int notified(int notify, char *message, size_t size)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec text = {.iov_base = message, .iov_len = size - 1};
	struct msghdr m = {.msg_iov = &text, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	ssize_t n = recvmsg(notify, &m, MSG_CMSG_CLOEXEC);
	int fd, listens = 0;
	socklen_t length = sizeof(listens);

	must("notification", n);
	message[n] = 0;
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	if (!c || c->cmsg_type != SCM_RIGHTS || c->cmsg_len != CMSG_LEN(sizeof(fd)))
		return 0;
	memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	must("socket", getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length));
	return listens;
}

static void init(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = NOTIFY};
	struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	char message[4096] = "";
	int output[2], status, kept = 0;

	// The policy does not let init use the console that the kernel opened.
	int console = open("/dev/console", O_RDWR | O_CLOEXEC);
	must("/dev/console", console);
	for (int fd = 0; fd < 3; fd++)
		dup2(console, fd);
	put("/proc/sys/kernel/printk_ratelimit", "0", 1);
	must("lo", ioctl(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), SIOCSIFFLAGS, &lo));
	domain("init", 1);

	int notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	must("notify", bind(notify, (void *)&address, sizeof(address)));
	label(NOTIFY, "init_runtime_t");
	must("journal", socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, output));
	pid_t pid = start_daemon(output[1]);
	do {
		kept += notified(notify, message, sizeof(message));
	} while (!strncmp(message, "FDSTORE=1", 9));
	printf("RESULT kept %d\n", kept);
	printf("RESULT notification %s\n", strtok(message, "\n"));
	domain("daemon", pid);
	operate("check", (const char *[]){MIGRATED, "check", "--to", "127.0.0.1:7600", NULL});
	operate("list", (const char *[]){MIGRATED, "list", NULL});
	must("end", kill(pid, SIGTERM));
	must("wait", waitpid(pid, &status, 0));
	printf("RESULT end %#x\n", status);

	ssize_t n = recv(output[0], message, sizeof(message), MSG_DONTWAIT);
	printf("RESULT output %s\n", n > 0 && memmem(message, n, "serving", 7) ? "serving" : "none");
	log_denials();
	printf("DONE\n");
	fflush(stdout);
	reboot(RB_POWER_OFF);
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc < 2 || strcmp(argv[1], "init"))
		boot();
	init();
	pause();
}
