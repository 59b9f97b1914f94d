// SPDX-License-Identifier: Apache-2.0

// Package confine reduces the privileges of the daemon once it listens. It drops most of root's capabilities
// permanently, and forbids all system calls that the daemon does not make (capabilities.go, seccomp.go).
//
// QEMUs are started by another process (qemu.Starter), which is started before, because a QEMU must not inherit any
// of this. It has a sandbox of its own, may start a set-user-ID program to set up its network, and may change its
// domain by an SELinux policy; no_new_privs would prevent the last two.
//
// Landlock is not used: a process in a Landlock domain may not trace, read or take descriptors from processes outside
// of it (task_ptrace in security/landlock/task.c), and the daemon does so with every QEMU. e2e/kernel/confine shows it.
package confine

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// ErrNotSupported matches every *NotSupportedError in errors.Is.
var ErrNotSupported = errors.New("not supported by this kernel")

// NotSupportedError names what the running kernel lacks.
type NotSupportedError struct {
	Feature   string
	MinKernel string // first release that has the feature
	Option    string // kernel option that the feature needs
}

func (e *NotSupportedError) Error() string {
	return fmt.Sprintf("%s: not supported by this kernel; use Linux %s or newer, built with %s",
		e.Feature, e.MinKernel, e.Option)
}

// Is makes errors.Is(err, ErrNotSupported) true.
func (e *NotSupportedError) Is(target error) bool { return target == ErrNotSupported }

// Apply confines all threads of this process permanently. If one part fails, the others are still done; the errors
// say which failed, a *NotSupportedError among them if the kernel lacks a feature.
func Apply() error {
	err := errors.Join(dropCapabilities(), noNewPrivileges(), filterSystemCalls())
	if err != nil {
		return err
	}
	// The kernel's own view is checked as well: seccomp(2) does not set errno if it cannot give all threads the filter.
	s, err := Current()
	if err == nil && !s.Complete() {
		err = fmt.Errorf("this process is less confined than it was asked to be: %v", s)
	}
	return err
}

// State is how far a process is confined.
type State struct {
	Capabilities    []string // permitted, by their kernel's names: "cap_kill"
	NoNewPrivileges bool
	Filtered        bool // a seccomp filter is installed
}

// Complete says whether the process is confined as Apply does it.
func (s State) Complete() bool {
	for _, name := range s.Capabilities {
		if value, err := cap.FromName(name); err != nil || !needed(value) {
			return false
		}
	}
	return s.NoNewPrivileges && s.Filtered
}

// String returns a text for operators: "capabilities sys_ptrace, kill; no new privileges; system calls filtered".
func (s State) String() string {
	var names []string
	for _, name := range s.Capabilities {
		names = append(names, strings.TrimPrefix(name, "cap_"))
	}
	capabilities, gains, calls := "no capabilities", "may gain privileges", "all system calls"
	switch {
	case len(names) > len(Needed):
		capabilities = fmt.Sprintf("%d capabilities", len(names))
	case len(names) > 0:
		capabilities = "capabilities " + strings.Join(names, ", ")
	}
	if s.NoNewPrivileges {
		gains = "no new privileges"
	}
	if s.Filtered {
		calls = "system calls filtered"
	}
	return capabilities + "; " + gains + "; " + calls
}

// Current returns the state of this thread, from proc_pid_status(5). Apply confines all threads alike.
func Current() (State, error) {
	text, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return State{}, fmt.Errorf("what confines this process: %w", err)
	}
	var s State
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "CapPrm":
			bits, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				return State{}, fmt.Errorf("what confines this process: capabilities %q: %w", value, err)
			}
			for c := range cap.MaxBits() {
				if bits&(1<<c) != 0 {
					s.Capabilities = append(s.Capabilities, c.String())
				}
			}
		case "NoNewPrivs":
			s.NoNewPrivileges = value == "1"
		case "Seccomp":
			s.Filtered = value == "2"
		}
	}
	return s, nil
}
