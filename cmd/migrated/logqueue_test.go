// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"testing"
)

// stuck is a writer that blocks until it is released.
type stuck struct {
	strings.Builder
	entered, released chan struct{}
	first             bool
}

func (s *stuck) Write(p []byte) (int, error) {
	if !s.first {
		s.first = true
		close(s.entered)
		<-s.released
	}
	return s.Builder.Write(p)
}

// TestLogThatHangs: while the log hangs, loggers do not wait. Later the log has the lines in their order, and the
// number of those that were dropped.
func TestLogThatHangs(t *testing.T) {
	to := &stuck{entered: make(chan struct{}), released: make(chan struct{})}
	q := newLogQueue(to)
	line := func(i int) string { return fmt.Sprintf("line %d\n", i) }
	write := func(i int) {
		text := []byte(line(i))
		if n, err := q.Write(text); n != len(text) || err != nil {
			t.Fatal(n, err)
		}
		clear(text) // slog uses its buffer again
	}
	write(0)
	<-to.entered
	const more = 7
	for i := 1; i <= logLines+more; i++ {
		write(i)
	}
	close(to.released)
	q.Close()
	<-q.written // which Close does not wait for longer than logGrace
	var want strings.Builder
	want.WriteString(line(0) + fmt.Sprintf("%d lines of the log were dropped here: it was blocked\n", more))
	for i := 1; i <= logLines; i++ {
		want.WriteString(line(i))
	}
	if got := to.String(); got != want.String() {
		t.Errorf("the log has %d bytes, want %d:\n%.300s", len(got), want.Len(), got)
	}
}

// TestLogThatHangsAtTheEnd: the daemon ends although the log hangs.
func TestLogThatHangsAtTheEnd(t *testing.T) {
	to := &stuck{entered: make(chan struct{}), released: make(chan struct{})}
	q := newLogQueue(to)
	if _, err := q.Write([]byte("line\n")); err != nil {
		t.Fatal(err)
	}
	q.Close()
	close(to.released)
	<-q.written
}
