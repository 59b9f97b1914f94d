// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFilled checks every pair of results of the kernel's fill ioctls (see operation.filled).
func TestFilled(t *testing.T) {
	op := newOperation("UFFDIO_TEST")
	for _, tt := range []struct {
		name  string
		errno unix.Errno
		field int64
		n     int
		want  error // outcome
		is    unix.Errno
	}{
		{"all done", 0, 8192, 8192, nil, 0},
		{"partial progress", unix.EAGAIN, 4096, 4096, ErrAgain, unix.EAGAIN},
		{"changing, field written", unix.EAGAIN, -int64(unix.EAGAIN), 0, ErrAgain, unix.EAGAIN},
		{"changing, field left alone", unix.EAGAIN, 0, 0, ErrAgain, unix.EAGAIN},
		{"present", unix.EEXIST, -int64(unix.EEXIST), 0, ErrExist, unix.EEXIST},
		{"the field knows better", unix.EAGAIN, -int64(unix.EEXIST), 0, ErrExist, unix.EEXIST},
		{"range gone", unix.ENOENT, -int64(unix.ENOENT), 0, ErrNotRegistered, unix.ENOENT},
		{"process gone", unix.ESRCH, 0, 0, ErrProcessGone, unix.ESRCH},
		{"process gone, 4.11", unix.ENOSPC, 0, 0, ErrNoSpace, unix.ENOSPC},
		{"no space", unix.ENOSPC, -int64(unix.ENOSPC), 0, ErrNoSpace, unix.ENOSPC},
		{"no memory", unix.ENOMEM, -int64(unix.ENOMEM), 0, ErrNoMemory, unix.ENOMEM},
		{"not permitted", unix.EPERM, 0, 0, ErrPermission, unix.EPERM},
		{"invalid", unix.EINVAL, 0, 0, ErrInvalid, unix.EINVAL},
		{"fault", unix.EFAULT, -int64(unix.EFAULT), 0, ErrFault, unix.EFAULT},
		{"busy", unix.EBUSY, -int64(unix.EBUSY), 0, ErrBusy, unix.EBUSY},
		{"undocumented", unix.EHWPOISON, -int64(unix.EHWPOISON), 0, nil, unix.EHWPOISON},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, err := op.filled(tt.errno, tt.field)
			if n != tt.n {
				t.Errorf("n = %d, want %d", n, tt.n)
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("%v is not %v", err, tt.want)
			}
			for _, o := range outcomes {
				if o != tt.want && errors.Is(err, o) {
					t.Errorf("%v is also %v", err, o)
				}
			}
			if tt.is == 0 {
				if err != nil {
					t.Errorf("error %v", err)
				}
				return
			}
			if !errors.Is(err, tt.is) {
				t.Errorf("%v is not %v", err, tt.is)
			}
			var oe *OpError
			if !errors.As(err, &oe) || oe.Op != "UFFDIO_TEST" || !strings.Contains(err.Error(), "UFFDIO_TEST") {
				t.Errorf("%v does not name the operation", err)
			}
		})
	}
}

func TestOutcomesDoNotAllocate(t *testing.T) {
	op := newOperation("UFFDIO_TEST")
	for _, o := range outcomes {
		errno := o.errno.(unix.Errno)
		found := true
		if n := testing.AllocsPerRun(100, func() {
			_, err := op.filled(errno, -int64(errno))
			found = found && errors.Is(err, o) && errors.Is(err, errno)
		}); n != 0 {
			t.Errorf("%v: %v allocations", o, n)
		}
		if !found {
			t.Errorf("%v was not found in its own error", o)
		}
	}
}

// TestWouldBlock checks that EAGAIN from read(2) is ErrWouldBlock, and not ErrAgain.
func TestWouldBlock(t *testing.T) {
	if err := opRead.err(unix.EAGAIN); !errors.Is(err, ErrWouldBlock) || errors.Is(err, ErrAgain) {
		t.Error(err)
	}
	if err := opCopy.err(unix.EAGAIN); errors.Is(err, ErrWouldBlock) || !errors.Is(err, ErrAgain) {
		t.Error(err)
	}
}

// TestStandardErrors checks that errors also match the standard library's errors for their errno.
func TestStandardErrors(t *testing.T) {
	if err := opCopy.err(unix.EEXIST); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	if err := opRegister.err(unix.EPERM); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
	if !errors.Is(opCopy.closed, os.ErrClosed) {
		t.Error(opCopy.closed)
	}
}

func TestNotSupported(t *testing.T) {
	for _, tt := range []struct {
		missing       Features
		name, version string
	}{
		{FeatureMove, "UFFD_FEATURE_MOVE", "6.8"},
		{FeatureEventRemove | FeaturePoison, "UFFD_FEATURE_EVENT_REMOVE|UFFD_FEATURE_POISON", "6.6"},
		{FeatureRWP | FeatureRWPAsync, "UFFD_FEATURE_RWP|UFFD_FEATURE_RWP_ASYNC", "7.3"},
		{1 << 40, "0x10000000000", ""},
		{FeatureMove | 1<<40, "UFFD_FEATURE_MOVE|0x10000000000", ""},
	} {
		err := featureTable.notSupported(tt.missing)
		if err.Feature != tt.name || err.MinKernel != tt.version || !errors.Is(err, ErrNotSupported) {
			t.Errorf("%#x: %+v", tt.missing, err)
		}
	}
	if s := Features(0).String(); s != "none" {
		t.Errorf("no features: %q", s)
	}
}

func TestProbeRemembersOnlyAnswers(t *testing.T) {
	var p probe[Features]
	asked := 0
	refused := errors.New("no descriptors left")
	answers := []error{refused, nil, nil}
	ask := func() (Features, error) { asked++; return FeatureMove, answers[asked-1] }
	if _, err := p.get(ask); !errors.Is(err, refused) {
		t.Fatalf("error %v", err)
	}
	for range 2 {
		if f, err := p.get(ask); err != nil || f != FeatureMove {
			t.Fatalf("%v, %v", f, err)
		}
	}
	if asked != 2 {
		t.Errorf("the kernel was asked %d times, want 2: the failure again, the answer not", asked)
	}
}
