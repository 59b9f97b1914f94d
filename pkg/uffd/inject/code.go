// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

// code holds the addresses of the instructions in the process that an injected call runs.
type code struct {
	call    uint64 // callInstructions: make a system call and return
	returns uint64 // returnInstructions: rt_sigreturn(2)
}

// findCode looks for the instructions in the files that the process has mapped as code, so that nothing has to be
// written into the target's code. It reads the C library and its loader first, then the others from the smallest: the
// loader of glibc has both instructions, and a QEMU has a hundred libraries.
//
// The bytes may be in the middle of longer instructions. That does not matter: the processor decodes from the address
// that it jumps to.
func findCode(pid int) (c code, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return c, fmt.Errorf("find code of process %d: %w", pid, err)
	}
	var parts []codePart
	for line := range strings.Lines(string(maps)) {
		p, ok, err := parseCodePart(line)
		if err != nil {
			return c, fmt.Errorf("find code of process %d in %q: %w", pid, line, err)
		}
		if ok {
			parts = append(parts, p)
		}
	}
	slices.SortFunc(parts, func(a, b codePart) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), cmp.Compare(a.size, b.size))
	})
	for _, p := range parts {
		text := make([]byte, p.size)
		if err := readMemory(pid, p.start, text); err != nil {
			continue // unmapped meanwhile by another thread, or memory of a device
		}
		if c.call == 0 {
			c.call = indexAny(text, p.start, callInstructions)
		}
		if c.returns == 0 {
			c.returns = indexAny(text, p.start, returnInstructions)
		}
		if c.call != 0 && c.returns != 0 {
			return c, nil
		}
	}
	return c, fmt.Errorf("process %d has no code of a C library for system calls and for the return from signals: %w",
		pid, ErrUnsupported)
}

// codePart is a mapping of code.
type codePart struct {
	start, size uint64
	name        string // of the file, without its directory; may be empty
}

// rank is lower for files that most likely have the instructions.
func (p codePart) rank() int {
	for _, library := range []string{"ld-", "libc.", "libc-"} {
		if strings.HasPrefix(p.name, library) {
			return 0
		}
	}
	return 1
}

// parseCodePart parses a line of /proc/PID/maps (proc_pid_maps(5)). ok is true if it is code that may be read.
func parseCodePart(line string) (p codePart, ok bool, err error) {
	fields := strings.Fields(line) // addresses, permissions, offset, device, inode, path
	if len(fields) < 5 {
		return p, false, fmt.Errorf("%d fields", len(fields))
	}
	if !strings.HasPrefix(fields[1], "r-x") || len(fields) > 5 && fields[5] == "[vsyscall]" {
		return p, false, nil
	}
	from, to, _ := strings.Cut(fields[0], "-")
	start, err := strconv.ParseUint(from, 16, 64)
	if err != nil {
		return p, false, err
	}
	end, err := strconv.ParseUint(to, 16, 64)
	if err != nil {
		return p, false, err
	}
	p = codePart{start: start, size: end - start}
	if len(fields) > 5 {
		p.name = path.Base(fields[5])
	}
	return p, true, nil
}

// indexAny returns the address of the first of patterns that text contains, or 0. start is the address of text.
func indexAny(text []byte, start uint64, patterns [][]byte) uint64 {
	for _, pattern := range patterns {
		if i := bytes.Index(text, pattern); i >= 0 {
			return start + uint64(i)
		}
	}
	return 0
}
