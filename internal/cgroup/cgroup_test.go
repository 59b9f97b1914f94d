// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/internal/cgroup/cgrouptest"
)

// TestPlace: a process that is started in a place is in its groups from the beginning, and has the limit of the group
// above.
func TestPlace(t *testing.T) {
	const limit = 96 << 20
	path := fmt.Sprintf("/%s-%d", t.Name(), os.Getpid())
	t.Cleanup(func() { cgrouptest.RemoveAll(t, path) })
	dir := cgrouptest.Limited(t, path, limit)
	p, err := NewPlace(path, "m1")
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat", "/proc/self/cgroup", "-")
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd.Stdout = &said
	if err := p.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile("/proc/thread-self/cgroup"); err != nil || !bytes.Equal(after, before) {
		t.Errorf("this thread was in\n%s and is in\n%s: %v", before, after, err)
	}
	groups, err := Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	least, has, err := groups.Least(Memory)
	if err != nil || !has || least.Max != limit || least.Group != dir || least.Left() > limit {
		t.Errorf("the least limit is %+v (%v), %v", least, has, err)
	}
	if err := p.Remove(); err != nil {
		t.Errorf("a place that is in use: %v", err)
	}
	if err := errors.Join(hold.Close(), cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(said.String(), path+"/migrated-m1") {
		t.Errorf("what was started says that it is in\n%s", said.String())
	}
	// NewPlace removes a place that was left because it had a process. The kernel may need a moment to see it empty.
	var next *Place
	for _, g := range p.groups {
		for end := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
			if next, err = NewPlace(path, "m2"); err != nil {
				t.Fatal(err)
			}
			if _, err = os.Stat(g.path); errors.Is(err, fs.ErrNotExist) {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s is left: %v", g.path, err)
			}
		}
	}
	if err := next.Remove(); err != nil {
		t.Error(err)
	}
}

// TestPlacesAtOnce: a place that has no process yet stays when another one is made, unless its start has failed.
func TestPlacesAtOnce(t *testing.T) {
	path := fmt.Sprintf("/%s-%d", t.Name(), os.Getpid())
	t.Cleanup(func() { cgrouptest.RemoveAll(t, path) })
	cgrouptest.Limited(t, path, 96<<20)
	var places []*Place
	for _, name := range []string{"m1", "m2", "m3"} {
		p, err := NewPlace(path, name)
		if err != nil {
			t.Fatal(err)
		}
		places = append(places, p)
	}
	for _, p := range places[:2] {
		cmd := exec.Command("true")
		if err := p.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(cmd.Wait(), p.Remove()); err != nil {
			t.Error(err)
		}
	}
	if err := places[2].Start(exec.Command("/does/not/exist")); err == nil {
		t.Fatal("what does not exist was started")
	}
	last, err := NewPlace(path, "m4")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range places[2].groups {
		if _, err := os.Stat(g.path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s, where nothing could be started, is left: %v", g.path, err)
		}
	}
	if err := last.Remove(); err != nil {
		t.Error(err)
	}
}

// TestLeast reads directories made like those of both versions of control groups.
func TestLeast(t *testing.T) {
	for name, c := range map[string]struct {
		controllers []string
		files       map[string]string
		resource    string
		want        string // the group below the mount; empty: there is no limit
		left        uint64
	}{
		"version 2, the middle one": {nil, map[string]string{
			"memory.stat": "anon 1", "a/memory.max": "1000",
			"a/memory.current": "900", "a/memory.stat": "inactive_file 100\nactive_file 50\n",
			"a/b/memory.max": "max", "a/b/memory.current": "5", "a/b/memory.stat": "",
		}, Memory, "a", 250},
		"version 2, used up": {nil, map[string]string{
			"a/b/memory.max": "10", "a/b/memory.current": "11", "a/b/memory.stat": "",
		}, Memory, "a/b", 0},
		"version 1": {[]string{"rw", "memory"}, map[string]string{
			"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "7", "memory.stat": "",
			"a/b/memory.limit_in_bytes": "4096", "a/b/memory.usage_in_bytes": "96",
			"a/b/memory.stat": "total_inactive_file 6\ninactive_file 9\n",
		}, Memory, "a/b", 4006},
		"huge pages": {nil, map[string]string{
			"a/hugetlb.2MB.max": "4194304", "a/hugetlb.2MB.current": "2097152",
		}, HugePages(2 << 20), "a", 2 << 20},
		"none":               {nil, map[string]string{"a/memory.max": "max"}, Memory, "", 0},
		"another controller": {[]string{"rw", "cpu"}, map[string]string{"a/memory.limit_in_bytes": "1"}, Memory, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o755); err != nil {
				t.Fatal(err)
			}
			for file, text := range c.files {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			h := hierarchy{dir: dir, root: "/", controllers: c.controllers}
			least, has, err := Groups{{h, h.dirOf("/a/b")}}.Least(c.resource)
			if err != nil || has != (c.want != "") ||
				has && (least.Group != filepath.Join(dir, c.want) || least.Left() != c.left) {
				t.Errorf("%+v (%v), %v", least, has, err)
			}
		})
	}
}

// TestDirOf: the directory of a group that this process does not see is the mount point.
func TestDirOf(t *testing.T) {
	h := hierarchy{dir: "/cg", root: "/pod"}
	for group, want := range map[string]string{
		"/pod/x/y": "/cg/x/y", "/pod": "/cg", "/other": "/cg", "/../x": "/cg", "/podx": "/cg",
	} {
		if got := h.dirOf(group); got != want {
			t.Errorf("%s is at %s, want %s", group, got, want)
		}
	}
}
