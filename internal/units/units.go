// SPDX-License-Identifier: Apache-2.0

// Package units formats durations, bytes and rates for people, with few digits.
package units

import (
	"fmt"
	"time"
)

// Bytes returns a number of bytes as "4.0 GiB".
func Bytes(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1024, 0
	units := []string{"KiB", "MiB", "GiB", "TiB", "PiB"}
	for value >= 1023.95 && unit < len(units)-1 {
		value, unit = value/1024, unit+1
	}
	return fmt.Sprintf("%.1f %s", value, units[unit])
}

// Rate returns bytes a second as "812.4 MB/s": decimal, as network rates are.
func Rate(perSecond float64) string { return fmt.Sprintf("%.1f MB/s", perSecond/1e6) }

// Duration returns a duration as "312 µs", "2.4 ms", "1.8 s", "2m05s".
func Duration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < time.Second:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	default:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
}

// Plural returns "1 page", "2 pages".
func Plural(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// Percent returns a share of a whole as "43 %". A share below 1 % that is not 0 is "under 1 %".
func Percent(part, whole float64) string {
	switch percent := 100 * part / whole; {
	case whole == 0 || part == 0:
		return "0 %"
	case percent < 1:
		return "under 1 %"
	default:
		return fmt.Sprintf("%.0f %%", percent)
	}
}
