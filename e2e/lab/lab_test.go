// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/migrated-vm/migrated/e2e/lab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newLab makes a lab. It needs root.
func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	needRoot(t)
	l, err := lab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("the lab's namespaces need root")
		}
		t.Skip("the lab's namespaces need root")
	}
}

func TestHostsAreApart(t *testing.T) {
	l := newLab(t)
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(l.A.Path("/run/mark"), []byte("a"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := l.A.Run(t.Context(), "cat", "/run/mark"); err != nil || out != "a" {
		t.Errorf("host a reads %q, %v from its own /run", out, err)
	}
	for _, path := range []string{l.B.Path("/run/mark"), "/run/mark"} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s: host a's file is seen outside of it (%v)", path, err)
		}
	}
	routes, err := l.A.Run(t.Context(), "ip", "route")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(routes, "default") || !strings.Contains(routes, "10.77.0.0/24") {
		t.Errorf("host a has more, or less, than the cable: %q", routes)
	}
}

func TestCable(t *testing.T) {
	l := newLab(t)
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := l.SetCable(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if out, err := l.A.Run(t.Context(), "ip", "-br", "link", "show", "cable"); err != nil ||
		!strings.Contains(out, "DOWN") {
		t.Errorf("the pulled cable is %q, %v", out, err)
	}
	if err := l.SetCable(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if out, err := l.B.Run(t.Context(), "ip", "-br", "link", "show", "cable"); err != nil ||
		!strings.Contains(out, "LOWER_UP") {
		t.Errorf("the plugged cable is %q, %v", out, err)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	l := newLab(t)
	p, err := l.B.Start(os.Stderr, "sleep", "infinity")
	if err != nil {
		t.Fatal(err)
	}
	// Start a process that leaves its parent, as a daemon's QEMU does.
	out, err := l.A.Run(t.Context(), "sh", "-c", "setsid sleep infinity >/dev/null 2>&1 & echo $!")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Exited():
	case <-time.After(10 * time.Second):
		t.Error("a started process is still there")
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		state, err := os.ReadFile("/proc/" + strings.TrimSpace(out) + "/stat")
		if err != nil || strings.Contains(string(state), ") Z ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a process that left its parent is still there: %s", state)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
