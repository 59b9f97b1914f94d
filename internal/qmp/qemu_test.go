// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startQEMU starts a QEMU without a machine, and kills it at the end of the test.
func startQEMU(t *testing.T, args ...string) *os.Process {
	t.Helper()
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	cmd := exec.Command(binary, append([]string{"-M", "none", "-nodefaults", "-display", "none"}, args...)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may be dead
		_ = cmd.Wait()
	})
	return cmd.Process
}

// testContext ends a test that hangs.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// awaitFile returns when path exists.
func awaitFile(ctx context.Context, t *testing.T, path string) {
	t.Helper()
	for ctx.Err() == nil {
		if _, err := os.Stat(path); err == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("%s: %v", path, context.Cause(ctx))
}

// dialQEMU starts a QEMU and connects to it.
func dialQEMU(t *testing.T, args ...string) (*Client, *os.Process) {
	t.Helper()
	ctx := testContext(t)
	path := filepath.Join(t.TempDir(), "qmp")
	process := startQEMU(t, append(args, "-qmp", "unix:"+path+",server=on,wait=off")...)
	return dial(ctx, t, path), process
}

// dial connects to a socket that is about to appear.
func dial(ctx context.Context, t *testing.T, path string) *Client {
	t.Helper()
	for {
		c, err := Dial(ctx, path)
		if err == nil {
			t.Cleanup(func() {
				if err := c.Disconnect(); err != nil {
					t.Error(err)
				}
			})
			return c
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond) // between bind and listen
	}
}
