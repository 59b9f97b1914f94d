// SPDX-License-Identifier: Apache-2.0

// Package bandwidth parses and checks limits in bytes a second. 0 is no limit.
package bandwidth

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Least is the lowest limit, in bytes a second. One request of the sweep is for 64 KiB. At a lower rate a VM would need
// days to arrive: such a value was probably meant in another unit.
const Least = 64 << 10

// ErrSyntax says that a text cannot be parsed as a limit.
var ErrSyntax = errors.New("it is not a number of bytes a second as QEMU writes them: " +
	"500M are 500 MiB (524,288,000 bytes) a second, with K, M, G or T for powers of 1024; \"none\" means no limit")

// ErrTooLow says that a limit is below [Least].
var ErrTooLow = errors.New("it is less than 64K, 64 KiB a second, at which a VM would take days to arrive; " +
	"the unit is bytes, unless K, M, G or T follow: 500M are 500 MiB a second")

// units are QEMU's suffixes (qemu_strtosz).
var units = map[byte]float64{'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}

// Parse reads a limit: "500M", "1.5G", "70000", or "none". It fails with ErrSyntax, or with the error of Check.
func Parse(text string) (uint64, error) {
	if text == "none" {
		return 0, nil
	}
	digits, unit := text, 1.0
	if n := len(text); n > 0 {
		if u, ok := units[strings.ToUpper(text)[n-1]]; ok {
			digits, unit = text[:n-1], u
		}
	}
	// ParseFloat would also accept hexadecimal numbers, exponents and infinity.
	if strings.Trim(digits, "0123456789.") != "" {
		return 0, fmt.Errorf("bandwidth %q: %w", text, ErrSyntax)
	}
	value, err := strconv.ParseFloat(digits, 64)
	if value *= unit; err != nil || value >= math.MaxInt64 {
		return 0, fmt.Errorf("bandwidth %q: %w", text, ErrSyntax)
	}
	if value > 0 && value < 1 {
		value = 1 // 0 would be no limit
	}
	limit := uint64(value)
	if err := Check(limit); err != nil {
		return 0, fmt.Errorf("bandwidth %q: %w", text, err)
	}
	return limit, nil
}

// Check returns ErrTooLow for a limit below Least.
func Check(limit uint64) error {
	if limit > 0 && limit < Least {
		return ErrTooLow
	}
	return nil
}

// Lower returns the lower of two limits.
func Lower(a, b uint64) uint64 {
	if a == 0 || b == 0 {
		return max(a, b)
	}
	return min(a, b)
}
