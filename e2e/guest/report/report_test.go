// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestLogCountsWhatItDoesNotUnderstand(t *testing.T) {
	var l Log
	in := "tail of a line\"}\n\r\n" +
		`{"type":"ready","pages":10,"workers":1}` + "\n" +
		`{"type":"window","seq":1,"ops":5,"total_ops":5,"corruptions":0}` + "\r\n" +
		`{"type":"nonsense"}` + "\n" +
		`{"type":"window","seq":2,"ops":5,"tot`
	if err := l.Follow(strings.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	if l.Len() != 2 || len(l.Garbled()) != 3 {
		t.Errorf("%d lines, garbled %q", l.Len(), l.Garbled())
	}
	if err := l.Err(); err != nil {
		t.Errorf("Err = %v", err)
	}
	if r, err := l.WaitReady(deadline(t)); err != nil || r.Pages != 10 {
		t.Errorf("WaitReady = %+v, %v", r, err)
	}
	if w := l.Lines(0)[1].Window; w == nil || w.TotalOps != 5 {
		t.Errorf("the second line is of the window %+v", w)
	}
}

func TestDamageIsKnownWithoutItsLine(t *testing.T) {
	for name, in := range map[string]string{
		"counted":   `{"type":"window","total_ops":5,"corruptions":2}`,
		"described": `{"type":"corruption","page":7,"kind":"stale","corruptions":1}`,
		"backwards": `{"type":"window","total_ops":9}` + "\n" + `{"type":"window","total_ops":8}`,
		"forgotten": `{"type":"window","corruptions":1}` + "\n" + `{"type":"window","corruptions":0}`,
	} {
		var l Log
		if err := l.Follow(strings.NewReader(in + "\n")); err != nil {
			t.Fatal(err)
		}
		if err := l.Err(); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: Err = %v, want ErrDamaged", name, err)
		}
	}
}

// TestDisks: a disk that failed or is damaged is reported, and not as damage to memory.
func TestDisks(t *testing.T) {
	const good = `{"type":"window","total_ops":5,` +
		`"disks":[{"name":"disk0","reads":7,"writes":9},{"name":"disk1","reads":1}]}` + "\n"
	for name, c := range map[string]struct {
		in   string
		want error
	}{
		"good": {good, nil},
		"corrupt": {good + `{"type":"verified","total_ops":5,` +
			`"disks":[{"name":"disk0","reads":8,"writes":9},{"name":"disk1","reads":2,"corruptions":1}]}`, ErrDisk},
		"failed": {good + `{"type":"window","total_ops":6,` +
			`"disks":[{"name":"disk0","reads":8,"writes":9,"errors":1},{"name":"disk1","reads":2}]}`, ErrDisk},
		"backwards": {good + `{"type":"window","total_ops":6,` +
			`"disks":[{"name":"disk0","reads":6,"writes":9},{"name":"disk1","reads":2}]}`, ErrDamaged},
	} {
		var l Log
		if err := l.Follow(strings.NewReader(c.in + "\n")); err != nil {
			t.Fatal(err)
		}
		if err := l.Err(); !errors.Is(err, c.want) {
			t.Errorf("%s: Err = %v, want %v", name, err, c.want)
		}
		if d := l.Disks(); len(d) != 2 || d[0].Writes != 9 {
			t.Errorf("%s: Disks = %+v", name, d)
		}
	}
}

func TestPortCommand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "serial")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		sc := bufio.NewScanner(conn)
		for sc.Scan() {
			if id, ok := strings.CutPrefix(sc.Text(), "verify "); ok {
				_, err := io.WriteString(conn, `{"type":"verified","id":"old","pages":1}`+"\n"+
					`{"type":"verified","id":"`+id+`","pages":4,"found":1,"corruptions":1}`+"\n")
				if err != nil {
					t.Error(err)
				}
			}
		}
	}()
	var l Log
	p, err := Open(deadline(t), path, &l)
	if err != nil {
		t.Fatal(err)
	}
	v, err := p.Verify(deadline(t))
	if err != nil {
		t.Fatal(err)
	}
	if v.Pages != 4 || v.Found != 1 {
		t.Errorf("Verify = %+v", v)
	}
	if err := p.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func TestWaitEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var l Log
	if _, _, err := l.Wait(ctx, 0, func(Line) bool { return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait = %v", err)
	}
	if _, err := Dial(ctx, filepath.Join(t.TempDir(), "none")); !errors.Is(err, context.Canceled) {
		t.Errorf("Dial = %v", err)
	}
}

func TestTailWaitsForMore(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("one\r\ntw"); err != nil {
		t.Fatal(err)
	}
	r, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b := bufio.NewReader(Tail(deadline(t), r))
	seen := make(chan struct{})
	result := make(chan string, 1)
	go func() {
		line, err := WaitLine(b, func(s string) bool {
			if s == "one" {
				close(seen) // the rest is written only after the reader has met the end
			}
			return s == "two"
		})
		result <- line
		if err != nil {
			t.Error(err)
		}
	}()
	<-seen
	if _, err := f.WriteString("o\n"); err != nil {
		t.Fatal(err)
	}
	if got := <-result; got != "two" {
		t.Errorf("WaitLine = %q", got)
	}
}

// TestChecksum: a line with a repeated or missing byte is refused, even if it is valid JSON.
func TestChecksum(t *testing.T) {
	var b bytes.Buffer
	if err := NewEncoder(&b).Encode(Window{
		Type: TypeWindow, Seq: 7, Counters: Counters{UptimeMS: 1200, TotalOps: 5},
	}); err != nil {
		t.Fatal(err)
	}
	line := b.Bytes()
	if l, err := Parse(line); err != nil || l.Window == nil || l.Window.UptimeMS != 1200 {
		t.Fatalf("%+v, %v", l, err)
	}
	for i := range bytes.IndexByte(line, '\t') {
		twice := slices.Concat(line[:i+1], line[i:])
		missing := slices.Concat(line[:i], line[i+1:])
		for _, damaged := range [][]byte{twice, missing} {
			if l, err := Parse(damaged); err == nil {
				t.Errorf("%q is taken for %+v", damaged, l)
			}
		}
	}
}
