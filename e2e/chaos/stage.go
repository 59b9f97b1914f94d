// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/mtls"
	"github.com/migrated-vm/migrated/pkg/mtls/mtlstest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A stage is two hosts with their daemons, and VMs with the Linux guest that go from one to the other. It serves case
// after case until one fails.
type stage struct {
	dir    string // of logs
	tls    string // directory of certificates
	issued time.Time
	lab    *lab.Lab
	runner runner
	bare   bool                     // its VMs have no devices
	guests map[lab.Backend]*machine // with the Linux guest, by their RAM; see linux

	libvirtds map[*lab.Host]*lab.Libvirt // none if the suite runs the machines itself
	logs      []*os.File                 // of these

	mu       sync.Mutex // of daemons
	daemons  map[*lab.Host]*lab.Process
	clients  map[*lab.Host]migratedv1.ControlServiceClient
	conns    []*grpc.ClientConn
	reviving sync.Mutex // one revival at a time
	// advertised is the address that the daemon of a host names for its pages, if that is not its own.
	advertised map[*lab.Host]string
}

// newStage starts the daemons, and libvirt's if the VMs are its domains. Their logs are in dir.
func newStage(ctx context.Context, dir string, libvirt bool) (_ *stage, err error) {
	s := &stage{
		dir: dir, daemons: map[*lab.Host]*lab.Process{}, clients: map[*lab.Host]migratedv1.ControlServiceClient{},
		advertised: map[*lab.Host]string{}, guests: map[lab.Backend]*machine{},
		runner: suiteRunner{}, libvirtds: map[*lab.Host]*lab.Libvirt{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close(ctx))
		}
	}()
	if s.tls, err = os.MkdirTemp("", "migrated-chaos-tls-"); err != nil {
		return nil, err
	}
	l, err := lab.NewWithLink(ctx, lab.Link{})
	if err != nil {
		return nil, err // it is closed
	}
	s.lab = l
	if err := s.issue(); err != nil {
		return nil, err
	}
	if libvirt {
		if err := s.startLibvirts(ctx); err != nil {
			return nil, err
		}
	}
	for _, h := range s.lab.Hosts() {
		if err := s.startDaemon(ctx, h); err != nil {
			return nil, err
		}
		conn, client, err := h.Control()
		if err != nil {
			return nil, err
		}
		s.conns = append(s.conns, conn)
		s.clients[h] = client
	}
	return s, nil
}

// close ends all that newStage started.
func (s *stage) close(ctx context.Context) error {
	var errs []error
	for _, conn := range s.conns {
		errs = append(errs, conn.Close())
	}
	for _, m := range s.guests {
		errs = append(errs, m.destroy(ctx))
	}
	if s.lab != nil {
		errs = append(errs, s.lab.Close())
	}
	for _, log := range s.logs {
		errs = append(errs, log.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(s.tls))...)
}

// certificatesLast is how long the certificates are used. They are valid for an hour.
const certificatesLast = 40 * time.Minute

// issue makes new certificates when the old ones are due. Daemons read them anew for each connection.
func (s *stage) issue() error {
	if time.Since(s.issued) < certificatesLast {
		return nil
	}
	ca, err := mtlstest.NewAuthority(s.tls)
	if err != nil {
		return err
	}
	for _, h := range s.lab.Hosts() {
		if _, err := ca.Issue(h.Name, h.Addr); err != nil {
			return err
		}
	}
	s.issued = time.Now()
	return nil
}

// files returns the certificates of a host.
func (s *stage) files(h *lab.Host) mtls.Files {
	return mtls.Files{
		Certificate: filepath.Join(s.tls, h.Name+".pem"), Key: filepath.Join(s.tls, h.Name+".key"),
		CA: filepath.Join(s.tls, "ca.pem"),
	}
}

// startDaemon starts the host's daemon, and returns when it listens. It uses TLS, as in production: without TLS, damage
// by a network would not be noticed.
func (s *stage) startDaemon(ctx context.Context, h *lab.Host) error {
	log, err := os.OpenFile(filepath.Join(s.dir, "migrated-"+h.Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // the daemon has its own
	files := s.files(h)
	args := []string{"--tls-certificate", files.Certificate, "--tls-key", files.Key, "--tls-ca", files.CA}
	if address := s.advertised[h]; address != "" {
		args = append(args, "--advertise", address)
	}
	if len(s.libvirtds) > 0 {
		args = append(args, "--qemu-binaries", lab.WatchedEmulator)
	}
	p, err := h.StartDaemon(ctx, log, args...)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.daemons[h] = p
	return err
}

// daemon returns the host's daemon; nil if it has ended.
func (s *stage) daemon(h *lab.Host) *lab.Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.daemons[h]
	if p == nil {
		return nil
	}
	select {
	case <-p.Exited():
		return nil
	default:
		return p
	}
}

// killDaemon ends a host's daemon at once. It is no error if the daemon has ended.
func (s *stage) killDaemon(h *lab.Host) error {
	if p := s.daemon(h); p != nil {
		return p.Kill()
	}
	return nil
}

// stopping is how long a daemon that was asked to end may take. It continues VMs first, and tells other hosts to give
// up.
const stopping = time.Minute

// awaitStopped waits for the end of a daemon that was asked to end.
func (s *stage) awaitStopped(ctx context.Context, h *lab.Host) error {
	if !await(ctx, stopping, func() bool { return s.daemon(h) == nil }) {
		return fmt.Errorf("the daemon of host %s does not end within %v after SIGTERM", h.Name, stopping)
	}
	return nil
}

// signalDaemon signals a host's daemon. It is no error if the daemon has ended.
func (s *stage) signalDaemon(h *lab.Host, signal syscall.Signal) error {
	p := s.daemon(h)
	if p == nil {
		return nil
	}
	if err := syscall.Kill(p.PID, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// reviveDaemons starts daemons that have ended, as systemd would.
func (s *stage) reviveDaemons(ctx context.Context) error {
	s.reviving.Lock()
	defer s.reviving.Unlock()
	for _, h := range s.lab.Hosts() {
		// A daemon that has an order to die at destination-taken-up or source-taken-up may be gone before it answers.
		for tries := 0; s.daemon(h) == nil; tries++ {
			if err := s.startDaemon(ctx, h); err != nil && tries > 0 {
				return err
			}
		}
	}
	return nil
}

// restartDaemon replaces an idle daemon by one that advertises another address for its pages; empty: its own.
func (s *stage) restartDaemon(ctx context.Context, h *lab.Host, advertised string) error {
	if err := errors.Join(s.signalDaemon(h, syscall.SIGTERM), s.awaitStopped(ctx, h)); err != nil {
		return err
	}
	s.advertised[h] = advertised
	return s.startDaemon(ctx, h)
}

// setLink makes the network that of a case.
func (s *stage) setLink(link lab.Link) {
	for _, w := range []*lab.Wire{s.lab.AB, s.lab.BA} {
		w.SetCut(false)
		w.Set(link)
	}
}
