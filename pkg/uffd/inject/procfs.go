// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// status holds the lines of /proc/TID/status that this package uses, see proc_pid_status(5).
type status struct {
	state   byte // R, S, D (uninterruptible), T (stopped), t (traced), Z (zombie), X
	parent  int  // PPid
	tracer  int  // TracerPid: a thread, 0 if none
	group   int  // Tgid: the process the thread belongs to
	uid     int  // effective
	seccomp int  // 0 off, 1 strict, 2 filter
}

func readStatus(tid int) (status, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return status{}, err
	}
	var st status
	for lines := bufio.NewScanner(bytes.NewReader(raw)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		fields := strings.Fields(value)
		if len(fields) == 0 {
			continue
		}
		number, _ := strconv.Atoi(fields[0]) // 0 if it is no number; such lines do not use it
		switch key {
		case "State":
			st.state = fields[0][0]
		case "PPid":
			st.parent = number
		case "TracerPid":
			st.tracer = number
		case "Tgid":
			st.group = number
		case "Uid":
			if len(fields) > 1 {
				st.uid, _ = strconv.Atoi(fields[1])
			}
		case "Seccomp":
			st.seccomp = number
		}
	}
	return st, nil
}

// isExiting reports whether a thread has begun to exit. It may still hold memory for seconds (proc_pid_stat(5)).
func isExiting(tid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", tid))
	if err != nil {
		return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH)
	}
	const flagsAt, exiting = 6, 4 // index after the name; PF_EXITING of linux/sched.h
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(fields) <= flagsAt {
		return false
	}
	flags, err := strconv.ParseUint(fields[flagsAt], 10, 64)
	return err == nil && flags&exiting != 0
}

func readMemory(pid int, addr uint64, buf []byte) error {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer func() { _ = mem.Close() }() // opened for reading: an error of Close loses nothing
	_, err = mem.ReadAt(buf, int64(addr))
	return err
}
