// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// status holds the lines of /proc/TID/status that matter here, see proc_pid_status(5).
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
		number, _ := strconv.Atoi(fields[0]) // 0 for the lines that are not numbers; those are not used
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

// findSyscallInstruction returns the address of a system call instruction in the process' vDSO: code that the
// kernel maps into every process, so nothing has to be written into the target.
func findSyscallInstruction(pid int) (uint64, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, fmt.Errorf("find the vDSO of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(maps)) {
		if !strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			continue
		}
		var start, end uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
			return 0, fmt.Errorf("find the vDSO of process %d in %q: %w", pid, line, err)
		}
		code := make([]byte, end-start)
		if err := readMemory(pid, start, code); err != nil {
			return 0, fmt.Errorf("read the vDSO of process %d: %w", pid, err)
		}
		// The bytes may also be the middle of a longer instruction. That is no harm: the processor decodes from
		// where it is sent to, and what follows is never executed.
		if i := bytes.Index(code, syscallInstruction); i >= 0 {
			return start + uint64(i), nil
		}
		return 0, fmt.Errorf("the vDSO of process %d has no system call instruction: %w", pid, ErrUnsupported)
	}
	return 0, fmt.Errorf("process %d has no vDSO (booted with vdso=0?): %w", pid, ErrUnsupported)
}

func readMemory(pid int, addr uint64, buf []byte) error {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer func() { _ = mem.Close() }() // read only: nothing can be lost
	_, err = mem.ReadAt(buf, int64(addr))
	return err
}
