// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestRepliesOfAnySize(t *testing.T) {
	c, _ := dialQEMU(t)
	for range 3 { // go-qemu's monitor loses track at the second command
		var schema json.RawMessage
		if err := c.Do(testContext(t), "query-qmp-schema", nil, &schema); err != nil {
			t.Fatal(err)
		}
		if len(schema) <= 64<<10 {
			t.Fatalf("the schema has %d bytes: not enough to test with", len(schema))
		}
	}
}

func TestPrettySocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "qmp")
	startQEMU(t, "-qmp-pretty", "unix:"+path+",server=on,wait=off")
	c := dial(testContext(t), t, path)
	var status struct{ Running bool }
	if err := c.Do(testContext(t), "query-status", nil, &status); err != nil || !status.Running {
		t.Errorf("status %+v, %v", status, err)
	}
}

func TestRefusals(t *testing.T) {
	c, _ := dialQEMU(t)
	for _, test := range []struct {
		command string
		args    any
		want    error
	}{
		{"no-such-command", nil, ErrCommandNotFound},
		{"closefd", map[string]string{"fdname": "none"}, ErrGeneric},
		{"device_del", map[string]string{"id": "none"}, ErrDeviceNotFound},
	} {
		err := c.Do(testContext(t), test.command, test.args, nil)
		var refusal *Error
		if !errors.As(err, &refusal) || refusal.Command != test.command || refusal.Desc == "" {
			t.Errorf("%s: %#v", test.command, err)
		}
		for _, class := range []error{ErrCommandNotFound, ErrGeneric, ErrDeviceNotFound} {
			if got := errors.Is(err, class); got != (class == test.want) {
				t.Errorf("%s: errors.Is(%v, %v) = %t", test.command, err, class, got)
			}
		}
	}
	if err := c.Do(testContext(t), "query-status", nil, nil); err != nil {
		t.Errorf("after refusals: %v", err)
	}
}

func TestEventsPrecedeTheirReply(t *testing.T) {
	c, _ := dialQEMU(t)
	events := c.Subscribe("STOP", "RESUME")
	before := time.Now().Truncate(time.Microsecond)
	for i, command := range []string{"stop", "cont"} {
		if err := c.Do(testContext(t), command, nil, nil); err != nil {
			t.Fatal(err)
		}
		select {
		case e := <-events.Events():
			if want := []string{"STOP", "RESUME"}[i]; e.Name != want {
				t.Errorf("event %q after %s, want %q", e.Name, command, want)
			}
			if now := time.Now(); e.Time.Before(before) || e.Time.After(now) {
				t.Errorf("event of %v, between %v and %v", e.Time, before, now)
			}
		default:
			t.Errorf("no event when %s was answered", command)
		}
	}
	events.Close()
	if _, open := <-events.Events(); open || events.Dropped() != 0 {
		t.Error("a closed subscription goes on")
	}
}

func TestDeathOfQEMU(t *testing.T) {
	c, process := dialQEMU(t)
	events := c.Subscribe()
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	for range events.Events() { // closed
	}
	var gone *DisconnectedError
	for name, err := range map[string]error{
		"Err":     c.Err(),
		"Connect": c.Monitor(testContext(t)).Connect(),
		"Do":      c.Do(testContext(t), "query-status", nil, nil),
	} {
		if !errors.As(err, &gone) || gone.Cause == nil {
			t.Errorf("%s: %#v", name, err)
		}
	}
	if _, open := <-c.Subscribe().Events(); open {
		t.Error("a subscription after the end is open")
	}
}

// QEMU closes a descriptor when the next one arrives before its command was run, so these commands must not be
// pipelined.
func TestDescriptorsSentAtOnce(t *testing.T) {
	c, process := dialQEMU(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const count = 20
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			if err := c.DoWithFD(testContext(t), "getfd", map[string]string{"fdname": fmt.Sprint("fd", i)}, nil, w); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() { // something else between them
			if err := c.Do(testContext(t), "query-status", nil, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if got := countDescriptors(t, process.Pid, name); got != count {
		t.Errorf("QEMU has %d descriptors of the pipe, want %d", got, count)
	}
	for i := range count {
		if err := c.Do(testContext(t), "closefd", map[string]string{"fdname": fmt.Sprint("fd", i)}, nil); err != nil {
			t.Error(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(r); err != nil || len(text) != 0 { // hangs if QEMU still had one
		t.Errorf("read %q, %v", text, err)
	}
}

func countDescriptors(t *testing.T, pid int, name string) (count int) {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if link, err := os.Readlink(path); err == nil && link == name {
			count++
		}
	}
	return count
}

func TestPeer(t *testing.T) {
	c, process := dialQEMU(t)
	if c.PeerPID() != process.Pid || int(c.PeerUID()) != os.Geteuid() {
		t.Errorf("peer %d of user %d, want %d of %d", c.PeerPID(), c.PeerUID(), process.Pid, os.Geteuid())
	}
	if v := c.Version(); v.Major < 2 || !strings.HasPrefix(v.String(), fmt.Sprint(v.Major, ".")) {
		t.Errorf("version %v", v)
	}
}

func TestRun(t *testing.T) {
	c, _ := dialQEMU(t)
	reply, err := c.Monitor(testContext(t)).Run([]byte(`{"execute": "query-name", "id": "mine"}`))
	var decoded struct{ Return *struct{} }
	if err != nil || json.Unmarshal(reply, &decoded) != nil || decoded.Return == nil {
		t.Errorf("reply %s, %v", reply, err)
	}
	if _, err := c.Monitor(testContext(t)).Run([]byte(`{"execute": "no-such"}`)); !errors.Is(err, ErrCommandNotFound) {
		t.Errorf("refusal: %v", err)
	}
	for _, bad := range []string{``, `{`, `[]`, `{}`, `{"execute": 1}`} {
		if _, err := c.Monitor(testContext(t)).Run([]byte(bad)); err == nil {
			t.Errorf("%q was run", bad)
		}
	}
	if err := c.Monitor(testContext(t)).Connect(); err != nil {
		t.Errorf("after bad commands: %v", err)
	}
}
