// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// sharingState returns a configuration with that state directory and with addresses of its own.
func sharingState(t *testing.T, stateDir string) config.Config {
	t.Helper()
	cfg := config.Default()
	cfg.Listen, cfg.StateDir, cfg.LogDir = "127.0.0.1:0", stateDir, t.TempDir()
	cfg.Socket = filepath.Join(t.TempDir(), "control.sock")
	return cfg
}

// TestStateDirIsOneDaemons: a second daemon with the state directory of one that runs fails, whatever its addresses
// are. It names the directory and what to do, and touches no report. When the first has ended, another one serves.
func TestStateDirIsOneDaemons(t *testing.T) {
	stateDir := filepath.Join(t.TempDir(), "state")
	runUntil(t, sharingState(t, stateDir), func(migratedv1.ControlServiceClient) {
		unfinished := filepath.Join(stateDir, "reports", "m1.tmp") // as if the first daemon wrote it at this moment
		err := errors.Join(os.MkdirAll(filepath.Dir(unfinished), 0o755), os.WriteFile(unfinished, nil, 0o600))
		if err != nil {
			t.Fatal(err)
		}
		second, err := New(sharingState(t, stateDir), "v-test", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		second.OnReady(stop)
		err = second.Run(ctx)
		if err == nil || !strings.Contains(err.Error(), "another daemon uses the state directory "+stateDir) ||
			!strings.Contains(migration.Remedy(err), "--state-dir") {
			t.Errorf("a second daemon with the same state directory: %v; %s", err, migration.Remedy(err))
		}
		if _, err := os.Lstat(unfinished); err != nil {
			t.Errorf("what the first daemon writes: %v", err)
		}
	})
	served := false
	runUntil(t, sharingState(t, stateDir), func(migratedv1.ControlServiceClient) { served = true })
	if !served {
		t.Error("a daemon that is started after the first has ended does not serve")
	}
}

// TestLockIsNotInherited: a program that was started while the lock was held, as a QEMU is, does not hold it when the
// daemon ends.
func TestLockIsNotInherited(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := lockFile(path)
	if err != nil {
		t.Fatal(err)
	}
	qemu := exec.Command("sleep", "600")
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = qemu.Wait() }() // it was killed
	defer func() { _ = qemu.Process.Kill() }()
	if f, err := lockFile(path); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("a second lock while the first is held: %v, %v", f, err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := lockFile(path)
	if err != nil {
		t.Fatalf("after the daemon has ended: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

// TestServesWithoutLock: a daemon that cannot lock anything in its state directory serves, because VMs may wait for it.
func TestServesWithoutLock(t *testing.T) {
	stateDir := t.TempDir()
	if err := os.Mkdir(filepath.Join(stateDir, "lock"), 0o700); err != nil { // in place of the file
		t.Fatal(err)
	}
	served := false
	runUntil(t, sharingState(t, stateDir), func(migratedv1.ControlServiceClient) { served = true })
	if !served {
		t.Error("it does not serve")
	}
}
