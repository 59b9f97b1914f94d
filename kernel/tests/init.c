// SPDX-License-Identifier: GPL-2.0
/*
 * /init of the kernel tests: loads /policy, enforces it, runs the tests that
 * /names lists, and prints for the host
 *
 *	RESULT name outcome
 *	LOG anything
 *	DONE
 *
 * A test that says nothing before its time is over has the outcome "hang", one
 * that ends without a word "died". After each test everything else is killed.
 */
#include "harness.h"

#include <signal.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>

extern int outcome_fd;

/* The one test that must run before there is a policy. */
#define EARLY "create-before-policy"

static long file_max; /* as the kernel set it */

static const struct test *const themes[] = {
	secure_tests, create_tests, sysctl_tests, fork_tests,
	ring_tests, receive_tests, others_tests, rwp_tests, selftests,
	stress_tests,
};

/* The host has the reason in the LOG lines before. */
static void __attribute__((noreturn)) give_up(const char *what)
{
	note("init: %s: %s", what, strerror(errno));
	reboot(RB_POWER_OFF);
	_exit(1);
}

static void mount_on(const char *type, const char *at, const char *options)
{
	mkdir(at, 0755);
	if (mount(type, at, type, 0, options) && errno != EBUSY)
		give_up(at);
}

static void load_policy(void)
{
	int load = open("/sys/fs/selinux/load", O_WRONLY);
	int fd = open("/policy", O_RDONLY);
	struct stat st;
	void *text;

	if (load < 0 || fd < 0 || fstat(fd, &st))
		give_up("open the policy");
	text = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (text == MAP_FAILED || write(load, text, st.st_size) != st.st_size)
		give_up("load the policy");
	close(load);
	close(fd);
	munmap(text, st.st_size);
}

static void prepare(void)
{
	/* Without an inode of its own, no label: from before any policy. */
	int early = new_uffd(O_CLOEXEC | O_NONBLOCK);

	mount_on("devtmpfs", "/dev", NULL);
	mount_on("proc", "/proc", NULL);
	mount_on("sysfs", "/sys", NULL);
	mount_on("selinuxfs", "/sys/fs/selinux", NULL);
	mount_on("tmpfs", "/tmp", NULL);
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	load_policy();
	put("/sys/fs/selinux/enforce", "1");
	put("/proc/sys/kernel/printk_ratelimit", "0"); /* for each AVC to show */
	file_max = get("/proc/sys/fs/file-max");
	/* A descriptor from before the policy works on under it. */
	printf("RESULT " EARLY " %s\n",
	       early < 0 ? name(errno) : api(early, 0) ? name(errno) : "fd");
	close(early);
}

/* What a test may have set. */
static void restore(void)
{
	put("/sys/fs/selinux/enforce", "1");
	put("/proc/sys/vm/unprivileged_userfaultfd", "0");
	put("/proc/sys/fs/file-max", "%ld", file_max);
}

static void kill_the_rest(const char *test)
{
	int left = PATIENCE;

	kill(-1, SIGKILL);
	while (waitpid(-1, NULL, WNOHANG) >= 0 && left > 0)
		left -= poll(NULL, 0, 1) + 1;
	if (left <= 0)
		note("%s: cannot be killed", test);
}

static void run(const struct test *t)
{
	int patience = t->patience ? t->patience : 2 * PATIENCE;
	struct pollfd p[2] = { { .events = POLLIN }, { .events = POLLIN } };
	char word[128] = "died";
	int said[2];
	pid_t pid;

	fflush(stdout);
	if (pipe2(said, O_CLOEXEC | O_NONBLOCK))
		give_up("pipe");
	pid = fork();
	if (pid < 0)
		give_up("fork");
	if (pid == 0) {
		outcome_fd = said[1];
		t->run(t->arg);
		outcome("returned");
	}
	p[0].fd = said[0];
	p[1].fd = syscall(SYS_pidfd_open, pid, 0);
	switch (poll(p, 2, patience)) {
	case -1:
		give_up("poll");
	case 0:
		strcpy(word, "hang");
		break;
	default:
		if (read(said[0], word, sizeof(word) - 1) < 0 && errno != EAGAIN)
			give_up("read an outcome");
	}
	kill_the_rest(t->name);
	restore();
	printf("RESULT %s %s\n", t->name, word);
	fflush(stdout);
	close(p[1].fd);
	close(said[0]);
	close(said[1]);
}

static const struct test *find(const char *wanted)
{
	for (size_t i = 0; i < sizeof(themes) / sizeof(*themes); i++)
		for (const struct test *t = themes[i]; t->name; t++)
			if (!strcmp(t->name, wanted))
				return t;
	return NULL;
}

/* On the host: its table has to know them all. */
static int list(void)
{
	puts(EARLY);
	for (size_t i = 0; i < sizeof(themes) / sizeof(*themes); i++)
		for (const struct test *t = themes[i]; t->name; t++)
			puts(t->name);
	return 0;
}

int main(int argc, char **argv)
{
	char line[128];
	FILE *names;

	if (argc == 2 && !strcmp(argv[1], "names"))
		return list();
	if (argc == 2)
		return receive_exec(argv[1]);
	prepare();
	names = fopen("/names", "re");
	if (!names)
		give_up("/names");
	while (fgets(line, sizeof(line), names)) {
		const struct test *t;

		line[strcspn(line, "\n")] = 0;
		if (!strcmp(line, EARLY))
			continue;
		t = find(line);
		if (t)
			run(t);
		else
			note("no test is named %s", line);
	}
	printf("DONE\n");
	fflush(stdout);
	reboot(RB_POWER_OFF);
	return 1;
}
