// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMonitorForPeople(t *testing.T) {
	ctx := testContext(t)
	path := filepath.Join(t.TempDir(), "hmp")
	startQEMU(t, "-monitor", "unix:"+path+",server=on,wait=off")
	awaitFile(ctx, t, path)
	var wrong *NotQMPError
	for !errors.As(dialError(ctx, path), &wrong) && ctx.Err() == nil { // refused between bind and listen
		time.Sleep(time.Millisecond)
	}
	if wrong == nil || !strings.HasPrefix(wrong.Got, "QEMU ") {
		t.Errorf("HMP: %v", wrong)
	}
}

func dialError(ctx context.Context, path string) error {
	_, err := Dial(ctx, path)
	return err
}

// A serial port takes connections and says nothing.
func TestSilentSocket(t *testing.T) {
	path, conns := listen(t)
	go func() { <-conns }()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := Dial(ctx, path)
	var wrong *NotQMPError
	if !errors.As(err, &wrong) || wrong.Got != "" || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent socket: %v", err)
	}
}

func TestOtherGreetings(t *testing.T) {
	for _, greeting := range []string{"SSH-2.0-OpenSSH\r\n", `{"hello": 1}`, "{not json}", ""} {
		path, conns := listen(t)
		go func() {
			conn := <-conns
			_, _ = conn.Write([]byte(greeting)) // Dial says how it went
			conn.Close()
		}()
		_, err := Dial(testContext(t), path)
		var wrong *NotQMPError
		if !errors.As(err, &wrong) {
			t.Errorf("%q: %v", greeting, err)
		}
	}
}

func TestBusySocket(t *testing.T) {
	c, _ := dialQEMU(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := Dial(ctx, c.Path())
	var busy *BusyError
	if !errors.As(err, &busy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second client: %v", err)
	}
	if err := c.Do(testContext(t), "query-status", nil, nil); err != nil {
		t.Errorf("first client: %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	dir := t.TempDir()
	if _, err := Dial(t.Context(), filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(t.Context(), stale); !errors.Is(err, syscall.ECONNREFUSED) ||
		!strings.Contains(err.Error(), "nobody listens") {
		t.Errorf("left behind: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(t.Context(), file); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a file: %v", err)
	}
}
