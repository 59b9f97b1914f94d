// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// lockImage opens an image and locks it as a QEMU does that lets nobody else write to it (util/osdep.c and
// block/file-posix.c of QEMU): byte 200 and the ones after it are locked for what others may not do, and the second one
// stands for writing. Closing the file unlocks it.
func lockImage(path string) (*os.File, error) {
	const othersMayNotWrite = 200 + 1
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: othersMayNotWrite, Len: 1})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// onWarning is a log handler that is called with the text of each warning.
type onWarning func(text string)

func (onWarning) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }
func (w onWarning) WithAttrs([]slog.Attr) slog.Handler             { return w }
func (w onWarning) WithGroup(string) slog.Handler                  { return w }
func (w onWarning) Handle(_ context.Context, r slog.Record) error  { w(r.Message); return nil }

// TestVMIsContinuedWhenItsImageIsFree: the destination fails while the VM stands still, and another program has a lock
// on the VM's image by then. QEMU refuses to continue the VM; it runs when the lock is gone.
func TestVMIsContinuedWhenItsImageIsFree(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	var holder *os.File
	refused := 0
	p := &peer{
		load: func(context.Context) (err error) {
			holder, err = lockImage(image)
			return errors.Join(errors.New("the destination fails"), err)
		},
		log: onWarning(func(text string) {
			if !strings.Contains(text, "does not continue the VM yet") {
				return
			}
			if refused++; refused == 2 {
				_ = holder.Close()
			}
		}),
	}
	s := newStageWith(t, t.Context(), p,
		"-blockdev", "driver=file,node-name=disk,filename="+image, "-device", "virtio-blk-pci,drive=disk")
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the destination fails")
	if refused != 2 {
		t.Errorf("QEMU refused %d times to continue the VM", refused)
	}
	if !s.vmRuns(t) {
		t.Error("the VM does not run")
	}
	s.noRecord(t)
}

// TestVMIsContinuedWhenQEMUAnswers: the source's QEMU hangs while the VM stands still, for longer than an attempt to
// continue the VM takes. The migration is not over until QEMU has answered, and then the VM runs.
func TestVMIsContinuedWhenQEMUAnswers(t *testing.T) {
	was := continueTimeout
	continueTimeout = time.Second
	t.Cleanup(func() { continueTimeout = was }) // the last to run: the migration is over then
	var s *stage
	ready := make(chan struct{})
	s = newStageWith(t, t.Context(), &peer{load: func(context.Context) error {
		<-ready
		return errors.Join(errors.New("the destination fails"), s.qemu.Process.Signal(syscall.SIGSTOP))
	}})
	close(ready) // s is set
	s.source.Start()
	s.awaitView(t, func(m *migratedv1.Migration) bool {
		if Terminal(m.GetState()) {
			t.Fatalf("it is over while the VM stands still: %v", m)
		}
		return strings.Contains(m.GetError().GetRemedy(), "tries again until it does")
	})
	if err := s.qemu.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s.givenBack(t)
	if view, _ := s.source.Snapshot(); !strings.Contains(view.GetError().GetMessage(), "the destination fails") {
		t.Errorf("it says %v", view.GetError())
	}
}
