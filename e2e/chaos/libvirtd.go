// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// startLibvirts starts the libvirtd of both hosts. The QEMUs of their domains are watched.
func (s *stage) startLibvirts(ctx context.Context) error {
	s.runner = libvirtRunner{}
	for _, h := range s.lab.Hosts() {
		if err := h.MakeWatchedEmulator(); err != nil {
			return err
		}
		log, err := os.OpenFile(filepath.Join(s.dir, "libvirtd-"+h.Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		s.logs = append(s.logs, log)
		if s.libvirtds[h], err = h.StartLibvirt(ctx, log); err != nil {
			return err
		}
	}
	return nil
}

// killLibvirtds ends libvirtds at once.
func (s *stage) killLibvirtds(hosts ...*lab.Host) error {
	var errs []error
	for _, h := range hosts {
		errs = append(errs, s.libvirtds[h].Kill())
	}
	return errors.Join(errs...)
}

// reviveLibvirtds starts the libvirtds that have ended, as systemd would.
func (s *stage) reviveLibvirtds(ctx context.Context) error {
	var errs []error
	for _, daemon := range s.libvirtds {
		select {
		case <-daemon.Exited():
			errs = append(errs, daemon.Restart(ctx))
		default:
		}
	}
	return errors.Join(errs...)
}

// stopLibvirtd ends a libvirtd as systemd does, which kills one that takes too long.
func (s *stage) stopLibvirtd(ctx context.Context, h *lab.Host) error {
	daemon := s.libvirtds[h]
	if err := syscall.Kill(daemon.PID, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	const patience = 15 * time.Second // less than systemd's, because the test is about what comes afterwards
	select {
	case <-daemon.Exited():
		return nil
	case <-time.After(patience):
		return daemon.Kill()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// signalLibvirtd signals a libvirtd.
func (s *stage) signalLibvirtd(h *lab.Host, signal syscall.Signal) error {
	if err := syscall.Kill(s.libvirtds[h].PID, signal); err != nil {
		return fmt.Errorf("libvirtd of host %s: %w", h.Name, err)
	}
	return nil
}
