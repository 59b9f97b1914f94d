// SPDX-License-Identifier: Apache-2.0

package process

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// parseStatus reads a file of "Name:\tvalue" lines, such as /proc/PID/status.
func parseStatus(path string) (map[string]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	values := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			values[name] = strings.TrimSpace(value)
		}
	}
	return values, nil
}

// Status reads /proc/PID/status and returns its values by name (proc_pid_status(5)).
func Status(pid int) (map[string]string, error) {
	return parseStatus(fmt.Sprintf("/proc/%d/status", pid))
}

// readArgs returns the arguments of a process, argv[0] first.
func readArgs(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, fmt.Errorf("command line of QEMU: %w", err)
	}
	var args []string
	for arg := range bytes.SplitSeq(bytes.TrimSuffix(text, []byte{0}), []byte{0}) {
		args = append(args, string(arg))
	}
	return args, nil
}

// parseIDs reads white-space-separated user or group ids.
func parseIDs(text string) ([]uint32, error) {
	var ids []uint32
	for _, field := range strings.Fields(text) {
		id, err := strconv.ParseUint(field, 10, 32)
		if err != nil {
			return nil, err
		}
		ids = append(ids, uint32(id))
	}
	return ids, nil
}

// parseKiB reads "2048 kB".
func parseKiB(text string) (bytes uint64, err error) {
	number, isKiB := strings.CutSuffix(text, " kB")
	kib, err := strconv.ParseUint(number, 10, 54)
	if err != nil || !isKiB {
		return 0, fmt.Errorf("%q is no size", text)
	}
	return kib << 10, nil
}
