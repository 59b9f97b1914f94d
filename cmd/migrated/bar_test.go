// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestFrame(t *testing.T) {
	half := at("db-1", 0, active, 113_000)
	long := proto.CloneOf(half)
	long.Id = "a-migration-with-a-long-name"
	for _, test := range []struct {
		name      string
		migration *migratedv1.Migration
		width     int
		want      [2]string
	}{
		{"nothing yet", nil, 80, [2]string{"", ""}},
		{"setup", at("db-1", 0, setup, 0), 60, [2]string{
			"db-1 setup [----------------------------------------]   0.0%",
			"  both sides get ready; the VM is at the source"}},
		{"active", half, 80, [2]string{
			"db-1 postcopy-active [=====================>----------------------------]  43.1%",
			"  113000/262144 pages  812.4 MB/s  1.5 s left  downtime 2.4 ms"}},
		{"wide", half, 200, [2]string{
			"db-1 postcopy-active [=============================>----------------------------------------]  43.1%",
			"  113000/262144 pages  812.4 MB/s  1.5 s left  downtime 2.4 ms  1765 faults (p99 312 µs)"}},
		{"narrow", half, 40, [2]string{
			"db-1 postcopy-active [===>------]  43.1%",
			"  113000/262144 pages  812.4 MB/s"}},
		{"no room for a bar", half, 30, [2]string{
			"db-1 postcopy-active 43.1%",
			"  113000/262144 pages"}},
		{"no room for a word", long, 20, [2]string{
			"a-migration-with-a-l",
			"  113000/262144 page"}},
		{"no width", half, 0, [2]string{"", ""}},
		{"paused", at("db-1", 0, paused, 113_000), 80, [2]string{
			"db-1 postcopy-paused [=====================>----------------------------]  43.1%",
			"  the VM is at the destination; the connection to its memory is lost"}},
		{"completed", at("db-1", 0, completed, 262144), 60, [2]string{
			"db-1 completed [====================================] 100.0%",
			"  the VM and all its memory are at the destination"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := frame(test.migration, test.width)
			for i := range got {
				if got[i] != test.want[i] {
					t.Errorf("line %d:\n got %q\nwant %q", i, got[i], test.want[i])
				}
				if n := utf8.RuneCountInString(got[i]); n > test.width {
					t.Errorf("line %d has %d columns, more than %d", i, n, test.width)
				}
			}
		})
	}
}

// TestPercentRoundsDown: 100.0% is shown only with the last page, not by rounding.
func TestPercentRoundsDown(t *testing.T) {
	for present, want := range map[uint64]string{
		0: "0.0%", 1: "0.0%", 999_999: "99.9%", 1_000_000: "100.0%", 1_000_001: "100.0%",
	} {
		if got := percent(&migratedv1.Progress{PagesTotal: 1_000_000, PagesPresent: present}); got != want {
			t.Errorf("%d of 1000000 pages: %s, want %s", present, got, want)
		}
	}
	if got := percent(nil); got != "0.0%" {
		t.Errorf("no progress: %s", got)
	}
}

func TestTexts(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0 µs", 999 * time.Microsecond: "999 µs", 2400 * time.Microsecond: "2.4 ms", 1840 * time.Millisecond: "1.8 s",
		125 * time.Second: "2m05s", 3*time.Hour + 7*time.Minute: "3h07m",
	} {
		if got := durationText(durationpb.New(d)); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	if got := durationText(nil); got != "-" {
		t.Errorf("no duration: %q, want -", got)
	}
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1<<20 - 1: "1.0 MiB", 4 << 30: "4.0 GiB", 1 << 63: "8192.0 PiB",
	} {
		if got := bytesText(n); got != want {
			t.Errorf("%d bytes: %q, want %q", n, got, want)
		}
	}
}
