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
	"github.com/migrated-vm/migrated/internal/mtls"
	"github.com/migrated-vm/migrated/internal/mtls/mtlstest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A stage is two hosts with their daemons, and VMs with the Linux guest that go from one to the other. It serves
// case after case until one fails.
type stage struct {
	dir    string // of logs
	tls    string // directory of certificates
	issued time.Time
	lab    *lab.Lab
	keeper keeper
	bare   bool                     // its VMs have no devices
	guests map[lab.Backend]*machine // with the Linux guest, by their RAM; see linux

	libvirtds map[*lab.Host]*lab.Libvirt // none where the machines are the suite's own
	logs      []*os.File                 // of these

	mu       sync.Mutex // of daemons
	daemons  map[*lab.Host]*lab.Process
	clients  map[*lab.Host]migratedv1.ControlServiceClient
	conns    []*grpc.ClientConn
	reviving sync.Mutex // one revives at a time
	// advertised is what the daemon of a host names as the address of its pages, where that is not its own.
	advertised map[*lab.Host]string
}

// newStage starts the daemons, and those of libvirt where the VMs are to be its. Their logs are in dir.
func newStage(ctx context.Context, dir string, libvirt bool) (_ *stage, err error) {
	s := &stage{
		dir: dir, daemons: map[*lab.Host]*lab.Process{}, clients: map[*lab.Host]migratedv1.ControlServiceClient{}, advertised: map[*lab.Host]string{},
		guests: map[lab.Backend]*machine{}, keeper: byHand{}, libvirtds: map[*lab.Host]*lab.Libvirt{},
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
	for _, h := range s.hosts() {
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

func (s *stage) hosts() []*lab.Host { return []*lab.Host{s.lab.A, s.lab.B} }

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

// certificatesLast is how long the certificates are used: less than the hour for which they are good.
const certificatesLast = 40 * time.Minute

// issue makes new certificates where it is time to. Daemons read them anew for each connection.
func (s *stage) issue() error {
	if time.Since(s.issued) < certificatesLast {
		return nil
	}
	ca, err := mtlstest.NewAuthority(s.tls)
	if err != nil {
		return err
	}
	for _, h := range s.hosts() {
		if _, err := ca.Issue(h.Name, h.Addr); err != nil {
			return err
		}
	}
	s.issued = time.Now()
	return nil
}

// files are the certificates of a host.
func (s *stage) files(h *lab.Host) mtls.Files {
	return mtls.Files{
		Certificate: filepath.Join(s.tls, h.Name+".pem"), Key: filepath.Join(s.tls, h.Name+".key"), CA: filepath.Join(s.tls, "ca.pem"),
	}
}

// startDaemon starts the host's daemon, and returns when it listens. It uses TLS, as in earnest: what a network damages
// is else not noticed.
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

// daemon is the host's daemon; nil where it has ended.
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

// killDaemon ends a host's daemon at once; one that has ended is no error.
func (s *stage) killDaemon(h *lab.Host) error {
	if p := s.daemon(h); p != nil {
		return p.Kill()
	}
	return nil
}

// stopping is how long a daemon that was asked to end may take. It continues VMs before, and tells others to give up.
const stopping = time.Minute

// awaitStopped waits for the end of a daemon that was asked to.
func (s *stage) awaitStopped(ctx context.Context, h *lab.Host) error {
	if !await(ctx, stopping, func() bool { return s.daemon(h) == nil }) {
		return fmt.Errorf("the daemon of host %s does not end within %v after SIGTERM", h.Name, stopping)
	}
	return nil
}

// signalDaemon signals a host's daemon; one that has ended is no error.
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
	for _, h := range s.hosts() {
		// One that is to die as soon as it takes up what it left may be gone before it answers.
		for tries := 0; s.daemon(h) == nil; tries++ {
			if err := s.startDaemon(ctx, h); err != nil && tries > 0 {
				return err
			}
		}
	}
	return nil
}

// restartDaemon replaces a daemon that has nothing to do by one that advertises another address for its pages; empty:
// its own.
func (s *stage) restartDaemon(ctx context.Context, h *lab.Host, advertised string) error {
	if err := errors.Join(s.signalDaemon(h, syscall.SIGTERM), s.awaitStopped(ctx, h)); err != nil {
		return err
	}
	s.advertised[h] = advertised
	return s.startDaemon(ctx, h)
}

// setLink makes the network what a case wants.
func (s *stage) setLink(link lab.Link) {
	for _, w := range []*lab.Wire{s.lab.AB, s.lab.BA} {
		w.SetCut(false)
		w.Set(link)
	}
}
