// SPDX-License-Identifier: Apache-2.0

// Package confine takes from the daemon, once it listens, what it does not need: most of root's
// capabilities for good, and all system calls but those that it makes (capabilities.go, seccomp.go).
//
// What starts QEMU is another process (qemu.Starter), begun before: a QEMU must not inherit any of this. It has a
// sandbox of its own, brings its network up with a set-user-ID program, and an SELinux policy
// may want to change its domain, all of which no_new_privs ends.
//
// Not Landlock: a process in one of its domains may trace, read and take descriptors from none outside
// (task_ptrace in security/landlock/task.c), which is what the daemon does with every QEMU. e2e/kernel/confine shows it.
package confine

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// ErrNotSupported is what errors.Is finds in every *NotSupportedError.
var ErrNotSupported = errors.New("not supported by this kernel")

// NotSupportedError names what the running kernel lacks.
type NotSupportedError struct {
	Feature   string
	MinKernel string // first release that has it
	Option    string // that it must be built with
}

func (e *NotSupportedError) Error() string {
	return fmt.Sprintf("%s: not supported by this kernel; use Linux %s or newer, built with %s", e.Feature, e.MinKernel, e.Option)
}

// Is makes errors.Is(err, ErrNotSupported) true.
func (e *NotSupportedError) Is(target error) bool { return target == ErrNotSupported }

// Apply confines all threads of this process, for good. One part that fails does not keep the others
// from being done; errors say which, *NotSupportedErrors among them.
func Apply() error {
	err := errors.Join(dropCapabilities(), noNewPrivileges(), filterSystemCalls())
	if err != nil {
		return err
	}
	// The kernel's word for it: where it cannot give all threads a filter, seccomp(2) says so by no errno.
	s, err := Current()
	if err == nil && !s.Complete() {
		err = fmt.Errorf("this process is less confined than it was asked to be: %v", s)
	}
	return err
}

// State is what confines a process.
type State struct {
	Capabilities    []string // permitted, by their kernel's names: "cap_kill"
	NoNewPrivileges bool
	Filtered        bool // system calls
}

// Complete says whether it is all that Apply does.
func (s State) Complete() bool {
	for _, name := range s.Capabilities {
		if value, err := cap.FromName(name); err != nil || !needed(value) {
			return false
		}
	}
	return s.NoNewPrivileges && s.Filtered
}

// String is for operators: "capabilities sys_ptrace, kill; no new privileges; system calls filtered".
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

// Current is the state of this process, by proc_pid_status(5).
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
