// SPDX-License-Identifier: GPL-2.0
/* The kernel's own tests, which come with the series, as the kernel's CI runs them. */
#include "harness.h"

#define KSFT_SKIP 4

struct counts {
	int passed, skipped;
};

/* One line of TAP. Diagnostics are indented or begin with a hash. */
static void count(struct counts *c, const char *line)
{
	note("%s", line);
	if (!strncmp(line, "not ok ", 7))
		outcome("failed");
	if (strncmp(line, "ok ", 3))
		return;
	if (strstr(line, "# SKIP"))
		c->skipped++;
	else
		c->passed++;
}

static void selftest(const void *program)
{
	char path[128], *line = NULL;
	struct counts c = {};
	size_t size = 0;
	int out[2], status;
	ssize_t n;
	FILE *tap;
	pid_t pid;

	snprintf(path, sizeof(path), "/selftests/%s", (const char *)program);
	MUST(pipe(out));
	pid = MUST(fork());
	if (pid == 0) {
		dup2(out[1], STDOUT_FILENO);
		dup2(out[1], STDERR_FILENO);
		close(out[0]);
		close(out[1]);
		execl(path, path, NULL);
		_exit(127);
	}
	close(out[1]);
	tap = fdopen(out[0], "r");
	CHECK(tap);
	while ((n = getline(&line, &size, tap)) > 0) {
		line[n - 1] = 0;
		count(&c, line);
	}
	CHECK(gone(pid, &status));
	note("%d passed, %d skipped", c.passed, c.skipped);
	if (!WIFEXITED(status))
		outcome("killed");
	if (WEXITSTATUS(status) == KSFT_SKIP || c.skipped)
		outcome("skipped");
	if (WEXITSTATUS(status))
		outcome("exit-%d", WEXITSTATUS(status));
	outcome("%s", c.passed ? "passed" : "empty");
}

const struct test selftests[] = {
	{ "selftest-uffd-secure", selftest, "uffd-secure", 4 * PATIENCE },
	{ "selftest-uffd-fork", selftest, "uffd_fork", 4 * PATIENCE },
	{}
};
