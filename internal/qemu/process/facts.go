// SPDX-License-Identifier: Apache-2.0

package process

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Facts describe how a process was started and how much memory it holds.
type Facts struct {
	CommandLine      []string // argv[0] first
	WorkingDirectory string
	Credentials      // effective
	Attributes       Attributes
	// PrivateMemory is what the process alone holds in small pages, in memory or swapped out. HugeMemory is what it holds
	// in huge pages, including those of files. Both are in bytes, at the moment of the read.
	PrivateMemory, HugeMemory uint64
}

// Attributes are properties that a process inherits from the process that starts it, and that QEMU has no option for.
// The destination's QEMU gets those of the source's. The niceness and the allowed CPUs are not among them: they concern
// one host only.
type Attributes struct {
	OOMScoreAdj int    // proc_pid_oom_score_adj(5)
	Umask       uint32 // for the sockets and files that QEMU creates
}

// ReadFacts reads the facts of a process from /proc.
func ReadFacts(pid int) (f Facts, err error) {
	if f.CommandLine, err = readArgs(pid); err != nil {
		return f, err
	}
	if f.WorkingDirectory, err = os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil {
		return f, fmt.Errorf("working directory of QEMU: %w", err)
	}
	status, err := Status(pid)
	if err != nil {
		return f, fmt.Errorf("user of QEMU: %w", err)
	}
	// Real, effective, saved and file system id; QEMU's -runas sets all of them.
	uids, uidErr := parseIDs(status["Uid"])
	gids, gidErr := parseIDs(status["Gid"])
	groups, groupErr := parseIDs(status["Groups"])
	if uidErr != nil || gidErr != nil || groupErr != nil || len(uids) < 2 || len(gids) < 2 {
		return f, fmt.Errorf("user of QEMU: /proc/%d/status says Uid %q, Gid %q, Groups %q",
			pid, status["Uid"], status["Gid"], status["Groups"])
	}
	f.UID, f.GID, f.Groups = uids[1], gids[1], groups
	if f.Attributes, err = attributes(pid, status); err != nil {
		return f, err
	}
	anonymous, anonymousErr := parseKiB(status["RssAnon"])
	swapped, swappedErr := parseKiB(status["VmSwap"])
	huge, hugeErr := parseKiB(status["HugetlbPages"])
	f.PrivateMemory, f.HugeMemory = anonymous+swapped, huge
	if err := errors.Join(anonymousErr, swappedErr, hugeErr); err != nil {
		return f, fmt.Errorf("memory of QEMU: /proc/%d/status: %w", pid, err)
	}
	return f, nil
}

func attributes(pid int, status map[string]string) (a Attributes, err error) {
	if a.OOMScoreAdj, err = OOMScoreAdj(strconv.Itoa(pid)); err != nil {
		return a, fmt.Errorf("OOM score of QEMU: %w", err)
	}
	umask, err := strconv.ParseUint(status["Umask"], 8, 32)
	if err != nil {
		return a, fmt.Errorf("umask of QEMU: %w", err)
	}
	a.Umask = uint32(umask)
	return a, nil
}

// OOMScoreAdj reads oom_score_adj of a process. name is its name in /proc: its PID or "self".
func OOMScoreAdj(name string) (int, error) {
	text, err := os.ReadFile("/proc/" + name + "/oom_score_adj")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}
