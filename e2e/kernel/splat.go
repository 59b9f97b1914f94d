// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// ErrSplat is in the error of a boot whose kernel complained about itself.
var ErrSplat = errors.New("the kernel complained")

// splat matches the first line of a complaint by the kernel, or by one of the tools that watch it. Stalls of RCU are
// not among them: on a machine with more work than CPUs, an emulated CPU stands still that long through no fault of the
// kernel's.
var splat = regexp.MustCompile(strings.Join([]string{
	`BUG:`, `WARNING:`, `Oops`, `KASAN`, `UBSAN`, `kernel BUG at`, `(?i)kernel panic`,
	`general protection fault`, `[Uu]nable to handle`, `stack segment fault`, `double fault`,
	`possible (circular|recursive) locking`, `possible irq lock inversion`, `inconsistent lock state`,
	`suspicious RCU usage`, `INFO: trying to register non-static key`, `sleeping function called`,
	`INFO: task .* blocked`, `ODEBUG:`, `list_(add|del) corruption`, `refcount_t:`,
	`unreferenced object`, `new suspected memory leaks`,
}, "|"))

// maxSplatLines bounds how many lines of a complaint are kept. A report of lockdep with all its chains is shorter.
const maxSplatLines = 150

// splatLog keeps what the console says from the first complaint on.
type splatLog struct{ lines []string }

// add takes a line, and reports whether it is the first complaint.
func (s *splatLog) add(line string) (first bool) {
	first = len(s.lines) == 0 && splat.MatchString(line)
	if (first || len(s.lines) > 0) && len(s.lines) < maxSplatLines {
		s.lines = append(s.lines, line)
	}
	return first
}

// err is nil as long as the kernel did not complain.
func (s *splatLog) err() error {
	if len(s.lines) == 0 {
		return nil
	}
	return fmt.Errorf("%w:\n%s", ErrSplat, strings.Join(s.lines, "\n"))
}
