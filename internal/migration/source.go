// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Each step of the source is bounded, so that a peer that hangs costs the VM
// no more than this.
const (
	attachTimeout  = 10 * time.Second
	prepareTimeout = 60 * time.Second
	// deviceTimeout bounds how long the VM may stand still before the source
	// continues it. The step takes milliseconds.
	deviceTimeout = 5 * time.Second
	resumeTimeout = 30 * time.Second
	abortTimeout  = 10 * time.Second
	quitTimeout   = 10 * time.Second
)

// SourceConfig is what one migration away from this host needs.
type SourceConfig struct {
	ID   string
	Spec *migratedv1.MigrationSpec
	// Pages serves the VM's RAM once it is stopped.
	Pages   *pagesrv.Server
	Records *Records
	// PageAddresses are told to the destination, see PrepareIncomingRequest.
	PageAddresses []string
	// Bandwidth is this daemon's own limit, bytes a second; 0: none.
	Bandwidth uint64
	// Dial connects to the destination daemon.
	Dial Dialer
	Log  *slog.Logger
}

// Source drives one migration away from this host. The embedded Tracker shows
// it.
type Source struct {
	*Tracker

	cfg       SourceConfig
	log       *slog.Logger
	startOnce sync.Once
	started   chan struct{}
	done      chan struct{}
	cancel    context.CancelCauseFunc

	commitMu  sync.Mutex // guards committed against a cancellation
	committed bool

	// Owned by the goroutine of run.
	vm         *qemu.VM
	facts      *qemu.Facts
	ram        *pagesrv.RAM
	export     *pagesrv.Export
	conn       *grpc.ClientConn
	peer       migratedv1.PeerServiceClient
	token      string
	protocol   uint32 // that both keep to
	wasRunning bool
	stopTried  bool
	stoppedAt  time.Time
	stopped    chan struct{} // closed when QEMU has said that the VM is stopped
	takenUp    bool          // by TakeUpSource
}

// NewSource begins a migration; it prepares at once and switches when Start is
// called. It goes on until it is over or ctx ends, which counts as a failure of
// this daemon.
func NewSource(ctx context.Context, cfg SourceConfig) *Source {
	s, ctx := newSource(ctx, cfg)
	go s.run(ctx)
	return s
}

func newSource(ctx context.Context, cfg SourceConfig) (*Source, context.Context) {
	s := &Source{
		Tracker: newTracker(&migratedv1.Migration{
			Id:    cfg.ID,
			Role:  migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE,
			State: migratedv1.MigrationState_MIGRATION_STATE_SETUP,
			Spec:  cfg.Spec,
		}),
		cfg:     cfg,
		log:     cfg.Log.With("migration", cfg.ID, "role", "source"),
		started: make(chan struct{}),
		done:    make(chan struct{}),
		stopped: make(chan struct{}),
	}
	ctx, s.cancel = context.WithCancelCause(ctx)
	return s, ctx
}

// Start lets the migration switch over as soon as it is prepared.
func (s *Source) Start() { s.startOnce.Do(func() { close(s.started) }) }

// Done is closed when the migration is over and everything it held released.
func (s *Source) Done() <-chan struct{} { return s.done }

// Cancel gives the migration up and returns at once; after the commit point it
// is ErrCommitted. Cancelling what is over does nothing.
func (s *Source) Cancel() error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.committed {
		if view, _ := s.Snapshot(); Terminal(view.GetState()) {
			return nil
		}
		return withRemedy(ErrCommitted, "wait for it to complete, then migrate the VM back")
	}
	s.cancel(ErrCancelled)
	return nil
}

// writeDown prepares the record: from here on a daemon that is started again
// knows of this VM.
func (s *Source) writeDown() error {
	identity, err := s.vm.Identity()
	if err != nil {
		return err
	}
	spec, err := protojson.Marshal(s.cfg.Spec)
	if err != nil {
		return fmt.Errorf("write down the specification: %w", err)
	}
	return s.cfg.Records.Prepare(Record{
		ID: s.cfg.ID, VM: s.cfg.Spec.GetVm(), Identity: identity,
		Destination: s.cfg.Spec.GetDestination(), HandedOver: time.Now(),
		Protocol: s.protocol, Spec: spec, Token: s.token, WasRunning: s.wasRunning, Settings: s.vm.Changed(),
	})
}

// commit passes the commit point unless the migration was cancelled first.
func (s *Source) commit(ctx context.Context) error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if err := s.cfg.Records.Commit(s.cfg.ID); err != nil {
		return err
	}
	s.committed = true
	return nil
}

// giveBack undoes commit after the destination promised ErrNotRun.
func (s *Source) giveBack() {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	s.committed = false
}

func (s *Source) run(ctx context.Context) {
	defer close(s.done)
	defer s.cancel(nil)
	defer s.release()

	if err := s.prepare(ctx); err != nil {
		s.backOut(ctx, err)
		return
	}
	s.update(func(m *migratedv1.Migration) { m.Prepared = true })
	s.log.Info("prepared", "vm", s.cfg.Spec.GetVm(), "destination", s.cfg.Spec.GetDestination(), "protocol", s.protocol)
	reached("source-prepared")

	if err := s.awaitStart(ctx); err != nil {
		s.backOut(ctx, err)
		return
	}
	if s.switchOver(ctx) {
		s.seeThrough(ctx)
	}
}

// seeThrough follows a migration whose VM runs at the destination to its end.
func (s *Source) seeThrough(ctx context.Context) {
	if err := s.follow(ctx); err != nil {
		s.log.Error("failed after the switch", "error", err)
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, err, s.stoppedStatus())
		return
	}
	s.complete()
}

// switchOver moves the VM itself. It is false where it did not: then the
// migration is over, and the tracker says why and where the VM is.
func (s *Source) switchOver(ctx context.Context) bool {
	defer garbage.hold()()
	s.guardStopped(ctx)
	s.setState(migratedv1.MigrationState_MIGRATION_STATE_DEVICE)
	if err := s.moveDevices(ctx); err != nil {
		s.backOut(ctx, err)
		return false
	}
	reached("source-loaded")
	if err := s.commit(ctx); err != nil {
		s.backOut(ctx, err)
		return false
	}
	reached("source-committed")
	return s.handedOver(ctx)
}

// handedOver is the second half of switchOver, after the commit point.
func (s *Source) handedOver(ctx context.Context) bool {
	err := s.handOver(ctx)
	switch {
	case err == nil:
		return true
	case errors.Is(err, ErrNotRun):
		s.giveBack()
		s.backOut(ctx, err)
	default:
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, err, s.stoppedStatus())
	}
	return false
}

// prepare does all that can be done while the VM runs.
func (s *Source) prepare(ctx context.Context) error {
	if err := s.open(ctx); err != nil {
		return err
	}
	s.token = rand.Text()
	if err := s.offer(); err != nil {
		return err
	}
	destination := s.cfg.Spec.GetDestination()
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	reached("source-offered")
	answer, err := s.peer.PrepareIncoming(ctx, &migratedv1.PrepareIncomingRequest{
		Id:                  s.cfg.ID,
		Protocol:            version.Protocol,
		OldestProtocol:      version.OldestProtocol,
		Token:               s.token,
		PageAddresses:       s.cfg.PageAddresses,
		Machine:             machineOf(s.facts, s.cfg.Spec.GetVm()),
		DestinationQmp:      s.cfg.Spec.GetDestinationQmp(),
		DestinationTemplate: s.cfg.Spec.GetDestinationTemplate(),
		Spec:                s.cfg.Spec,
		Bandwidth:           bandwidth.Lower(s.cfg.Spec.GetBandwidth(), s.cfg.Bandwidth),
	})
	if err != nil {
		return causeOf(ctx, fromPeer("prepare", destination, err))
	}
	if s.protocol, err = version.AgreeOnProtocol("destination "+destination, answer.GetProtocol(), answer.GetProtocol()); err != nil {
		return withRemedy(fmt.Errorf("prepare: %w", err), sameVersions)
	}
	if len(answer.GetRamBlocks()) != len(s.facts.RAMBlocks) {
		return fmt.Errorf("prepare: destination %s has %d RAM blocks instead of %d",
			destination, len(answer.GetRamBlocks()), len(s.facts.RAMBlocks))
	}
	s.update(func(m *migratedv1.Migration) {
		m.Supervision, m.UserfaultfdLabel = answer.GetSupervision(), answer.GetUserfaultfdLabel()
	})
	return confirmSupervised(s.cfg.Spec, answer)
}

// offer lets the destination fetch pages, once the VM stands still, and calls it.
func (s *Source) offer() (err error) {
	s.export, err = s.cfg.Pages.Offer(s.cfg.ID, s.token, s.ram, s.awaitStopped)
	if err != nil {
		return fmt.Errorf("offer the RAM of the VM: %w", err)
	}
	destination := s.cfg.Spec.GetDestination()
	if s.conn, err = s.cfg.Dial(destination, withToken(s.cfg.ID, s.token)); err != nil {
		return withRemedy(fmt.Errorf("destination %s: %w", destination, err), "give the destination as HOST:PORT")
	}
	s.peer = migratedv1.NewPeerServiceClient(s.conn)
	return nil
}

// open looks at the VM and opens its RAM.
func (s *Source) open(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	var err error
	if s.vm, err = qemu.Attach(ctx, s.cfg.Spec.GetVm()); err != nil {
		return fmt.Errorf("attach to the VM: %w", err)
	}
	if err := s.refuseHandedOver(ctx); err != nil {
		return err
	}
	if err := checkVM(ctx, s.vm); err != nil {
		return err
	}
	if s.facts, err = s.vm.Facts(ctx); err != nil {
		return askQEMU("source", err)
	}
	s.update(func(m *migratedv1.Migration) { m.VmName = s.facts.Name })
	if err := s.openRAM(); err != nil {
		return err
	}
	return s.vm.PrepareOutgoing(ctx)
}

func (s *Source) openRAM() (err error) {
	blocks := make([]pagesrv.Block, 0, len(s.facts.RAMBlocks))
	for _, b := range s.facts.RAMBlocks {
		blocks = append(blocks, pagesrv.Block{
			ID: b.ID, Path: b.Path, Offset: b.FileOffset, Size: b.Size, PageSize: b.PageSize,
		})
	}
	if s.ram, err = pagesrv.OpenRAM(blocks); err != nil {
		return fmt.Errorf("open the RAM of the VM: %w", err)
	}
	return nil
}

// refuseHandedOver keeps a QEMU that was left for its memory from being taken
// for the VM. One that runs was continued by its operator, and is the VM again.
func (s *Source) refuseHandedOver(ctx context.Context) error {
	rec, handedOver, err := s.cfg.Records.ForVM(s.cfg.Spec.GetVm(), s.vm.Pid)
	if err != nil || !handedOver {
		return err
	}
	running, err := s.vm.Running(ctx)
	if err != nil {
		return askQEMU("source", err)
	}
	if running {
		s.log.Warn("a VM that was handed over runs here again", "record", rec.ID, "destination", rec.Destination)
		return s.cfg.Records.Remove(rec.ID)
	}
	return withRemedy(
		fmt.Errorf("this VM was handed over to %s by migration %s at %s and is only kept for its memory",
			rec.Destination, rec.ID, rec.HandedOver.Format(time.RFC3339)),
		"migrate the VM from the host on which it runs now")
}

// awaitStart waits for Start while both ends stay alive.
func (s *Source) awaitStart(ctx context.Context) error {
	select {
	case <-s.started:
		return nil
	default:
	}
	// The destination ends the stream with a reason when it gives up.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { cancel(s.watchIdlePeer(ctx)) }()
	select {
	case <-s.started:
		return nil
	case <-s.vm.QMP.Done():
		return fmt.Errorf("the connection to QEMU ended while waiting for start: %w", s.vm.QMP.Err())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// watchIdlePeer returns when a prepared destination is no longer prepared.
func (s *Source) watchIdlePeer(ctx context.Context) error {
	destination := s.cfg.Spec.GetDestination()
	stream, err := s.peer.WatchIncoming(ctx, &migratedv1.WatchIncomingRequest{Id: s.cfg.ID})
	if err != nil {
		return fromPeer("wait for start", destination, err)
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return fromPeer("wait for start", destination, err)
		}
		if Terminal(answer.GetState()) {
			return fmt.Errorf("wait for start: destination %s gave up: %s", destination, answer.GetError().GetMessage())
		}
	}
}

// release lets go of everything; the VM itself is not touched.
func (s *Source) release() {
	if s.export != nil {
		s.export.Withdraw()
	}
	if s.ram != nil {
		if err := s.ram.Close(); err != nil {
			s.log.Warn("close the RAM", "error", err)
		}
	}
	if s.conn != nil {
		if err := s.conn.Close(); err != nil {
			s.log.Warn("close the connection to the destination", "error", err)
		}
	}
	if s.vm != nil {
		if err := s.vm.Close(); err != nil {
			s.log.Warn("disconnect from QEMU", "error", err)
		}
	}
}
