// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
)

// An audit collects the refused accesses that the kernel logs. A line comes some time after the refusal.
type audit struct {
	mu    sync.Mutex
	lines []string
}

// listen opens the kernel's log at its beginning.
func listen() (*audit, error) {
	f, err := os.Open("/dev/kmsg")
	if err != nil {
		return nil, err
	}
	a := &audit{}
	go func() {
		record := make([]byte, 8192)
		for {
			n, err := f.Read(record) // each read returns one record
			if err != nil {
				logf("the kernel's log: %v", err)
				return
			}
			line, _, _ := strings.Cut(string(record[:n]), "\n")
			if i := strings.Index(line, "avc:  denied"); i >= 0 || strings.Contains(line, `apparmor="DENIED"`) {
				line = line[max(i, 0):]
				a.mu.Lock()
				a.lines = append(a.lines, line)
				a.mu.Unlock()
			}
		}
	}()
	return a, nil
}

// mark returns the present end of the lines, for find and since.
func (a *audit) mark() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.lines)
}

// find waits for a line after mark that has all of the words, and logs it.
func (a *audit) find(ctx context.Context, mark int, words ...string) error {
	return until(ctx, fmt.Sprintf("the kernel's log of %q", words), func() bool {
		for _, line := range a.since(mark) {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				logf("%s", line)
				return true
			}
		}
		return false
	})
}

// since returns the lines after mark that have come so far.
func (a *audit) since(mark int) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.lines[mark:])
}
