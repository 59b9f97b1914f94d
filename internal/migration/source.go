// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Each step of the source is bounded, so that a peer that hangs costs the VM
// no more than this.
const (
	attachTimeout  = 10 * time.Second
	openTimeout    = 30 * time.Second // the VM runs meanwhile
	prepareTimeout = 60 * time.Second
	longestPrepare = 20 * time.Minute // of a VM that is preallocated
	// beginTimeout bounds the destination QEMU's beginning to load; the VM runs.
	beginTimeout  = 10 * time.Second
	resumeTimeout = 30 * time.Second
	abortTimeout  = 10 * time.Second
	quitTimeout   = 10 * time.Second
)

// SourceConfig is what one migration away from this host needs.
type SourceConfig struct {
	ID   string
	Spec *migratedv1.MigrationSpec
	// DestinationXML is MigrationSpec.destination_xml, which is not in Spec: it may have secrets.
	DestinationXML string
	// Pages serves the VM's RAM once it is stopped.
	Pages   *pagesrv.Server
	Records *Records
	// PageAddresses are told to the destination, see PrepareIncomingRequest.
	PageAddresses []string
	// Versions are of this host, without QEMU's. Check is what the VM's operator was told before. Both are for the
	// report.
	Versions *migratedv1.HostVersions
	Check    *migratedv1.EarlierCheck
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
	daemon    context.Context //nolint:containedctx // the daemon's life, longer than the migration's
	startOnce sync.Once
	started   chan struct{}
	done      chan struct{}
	cancel    context.CancelCauseFunc

	commitMu  sync.Mutex // guards committed against a cancellation
	committed bool

	// Owned by the goroutine of run.
	vm         *qemu.VM
	again      *qemu.VM      // the same, over another connection where that of vm was lost; nil: it was not
	claim      qemu.Identity // of claimed; zero: none
	facts      *qemu.Facts
	ram        *pagesrv.RAM
	export     *pagesrv.Export
	conn       *grpc.ClientConn
	peer       migratedv1.PeerServiceClient
	token      string
	protocol   uint32      // that both keep to
	blocks     []keptBlock // the VM's memory, as the destination knows it
	wasRunning bool
	stopTried  bool
	stoppedAt  time.Time
	stopped    chan struct{} // closed when QEMU has said that the VM is stopped
	takenUp    bool          // by TakeUpSource
	// description is what the destination was compared with.
	description *migratedv1.MachineDescription
	// gaveUpDisks says that QEMU was asked to give the disks up.
	gaveUpDisks bool
	early       *snapshot // that the destination has loaded; nil: none
	earlyAt     time.Time // when it was saved
	devices     []string  // that the VM had when it was prepared
	notEarly    error     // why there is to be none
	// toldToRun says that the destination may have been told to run the VM, with the last of the devices' state.
	toldToRun      bool
	told, answered time.Time                           // when the last was sent, and answered
	loaded         *migratedv1.LoadDeviceStateResponse // nil: it was told to run, and has not answered
	steps          steps
	contLock       *qemu.ContLock // nil: none was made by this daemon

	unguard context.CancelFunc // ends guardStopped; nil: it did not begin
	resumed chan struct{}      // closed when somebody else has continued the VM, after it was stopped
	resumes *qmp.Subscription  // what QEMU has reported of that; nil: it was not asked to
	sleeps  *qmp.Subscription  // and of a guest that goes to sleep, since it was last looked at

	unwatch   func()      // ends watchQEMU
	gone      atomic.Bool // it has seen QEMU end
	runsThere atomic.Bool // the destination has said so
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
		log:     cfg.Log.With("migration", cfg.ID, "role", "source", "vm", cfg.Spec.GetVm()),
		started: make(chan struct{}),
		done:    make(chan struct{}),
		stopped: make(chan struct{}),
		resumed: make(chan struct{}),
	}
	s.note(func(r *migratedv1.Report) { r.Source, r.Check = versionsOf(cfg.Versions, ""), cfg.Check })
	s.daemon = ctx
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
		Protocol: s.protocol, Spec: spec, Token: s.token, WasRunning: s.wasRunning, Blocks: s.blocks,
	})
}

// commit passes the commit point unless the migration was cancelled first.
func (s *Source) commit(ctx context.Context) error {
	s.lockCont() // before the record says so: it is undone by whatever undoes the commit
	err := s.commitRecord(ctx)
	if err == nil {
		reached("source-committed")
	}
	return err
}

func (s *Source) commitRecord(ctx context.Context) error {
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

// giveBack undoes commit after the destination promised ErrNotRun, and where it was never told to run the VM.
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
	s.log.Info("prepared", "destination", s.cfg.Spec.GetDestination(), "protocol", s.protocol)
	reached("source-prepared")

	err := s.awaitStart(ctx)
	if err == nil {
		err = s.renew(ctx)
	}
	if err != nil {
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
		s.failAfterCommit(err)
		return
	}
	s.unwatch() // from here on QEMU may end
	s.complete()
}

// failAfterCommit ends a migration of which the destination alone could tell where the VM is.
func (s *Source) failAfterCommit(err error) {
	s.unwatch()
	var how *endedError
	switch {
	case errors.As(err, &how):
		s.followEnding(how)
		return
	case s.daemon.Err() != nil && errors.Is(err, context.Cause(s.daemon)):
		s.handedOn(err)
		return
	}
	s.log.Error("failed after the commit point", "error", err)
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, err, s.whereFailedThere())
	if s.ended() {
		s.forgetRecord() // of a VM that cannot be continued
	}
}

// switchOver moves the VM itself. It is false where it did not: then the
// migration is over, and the tracker says why and where the VM is.
func (s *Source) switchOver(ctx context.Context) bool {
	defer garbage.hold()()
	s.guardStopped(ctx)
	s.setState(migratedv1.MigrationState_MIGRATION_STATE_DEVICE)
	if err := s.moveDevices(ctx); err != nil {
		s.giveBack() // it may be committed: the destination was not told, or has promised not to run the VM
		if errors.Is(err, devicestate.ErrOtherForm) {
			return s.startOver(ctx, err)
		}
		s.backOut(ctx, err)
		return false
	}
	reached("source-loaded")
	if s.cfg.Spec.GetRehearse() {
		s.rehearsed(ctx)
		return false
	}
	if !s.toldToRun {
		err := s.stands(ctx)
		if err == nil {
			err = s.commit(ctx)
		}
		if err != nil {
			s.backOut(ctx, err)
			return false
		}
	}
	return s.handedOver(ctx)
}

// handedOver is the second half of switchOver, after the commit point.
func (s *Source) handedOver(ctx context.Context) bool {
	s.unwatch = s.watchQEMU(ctx)
	err := s.handOver(ctx)
	switch {
	case err == nil:
		return true
	case errors.Is(err, ErrNotRun), !s.toldToRun:
		s.unwatch()
		s.giveBack()
		s.backOut(ctx, err)
	case errors.Is(err, errContinued):
		s.unwatch()
		s.takeBack(ctx)
	default:
		s.failAfterCommit(err)
	}
	return false
}

// release lets go of everything; the VM itself is not touched.
func (s *Source) release() {
	s.early.close()
	s.closeContLock()
	claimed.give(s.claim)
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
	for _, vm := range []*qemu.VM{s.again, s.vm} {
		if vm == nil {
			continue
		}
		if err := vm.Close(); err != nil {
			s.log.Warn("disconnect from QEMU", "error", err)
		}
	}
}
