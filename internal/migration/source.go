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
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Each step of the source has a time limit, so that a peer that hangs delays the VM no longer than this.
const (
	attachTimeout  = 10 * time.Second
	openTimeout    = 30 * time.Second // the VM runs meanwhile
	prepareTimeout = 60 * time.Second
	longestPrepare = 20 * time.Minute // the most for a VM whose memory is preallocated
	// beginTimeout bounds how long the destination's QEMU takes to begin to load. The VM runs meanwhile.
	beginTimeout  = 10 * time.Second
	resumeTimeout = 30 * time.Second
	abortTimeout  = 10 * time.Second
	quitTimeout   = 10 * time.Second
)

// SourceConfig is what one migration away from this host needs.
type SourceConfig struct {
	ID   string
	Spec *migratedv1.MigrationSpec
	// DestinationXML is MigrationSpec.destination_xml. It is not in Spec, because it may have secrets.
	DestinationXML string
	// Pages serves the VM's RAM once it is stopped.
	Pages   *pagesrv.Server
	Records *Records
	// PageAddresses are sent to the destination, see PrepareIncomingRequest.
	PageAddresses []string
	// Versions are the versions on this host, without QEMU's. Check is what an earlier check told the VM's operator.
	// Both are for the report.
	Versions *migratedv1.HostVersions
	Check    *migratedv1.EarlierCheck
	// Bandwidth is this daemon's own limit, bytes per second; 0: none.
	Bandwidth uint64
	// Turn waits until this host may send one more VM. With atOnce it does not wait, and fails if that is not now. It
	// calls ahead with the number of migrations that wait before this one. nil: there is no limit.
	Turn func(ctx context.Context, atOnce bool, ahead func(int)) error
	// Report stores the report of a migration that is shown as over, before its record is removed; nil: reports are not
	// stored.
	Report func(*Source)
	// Dial connects to the destination daemon.
	Dial Dialer
	Log  *slog.Logger
}

// Source drives one migration away from this host. The embedded Tracker shows it.
type Source struct {
	*Tracker

	cfg       SourceConfig
	log       *slog.Logger
	daemonCtx context.Context //nolint:containedctx // ends with the daemon, after the migration's own
	startOnce sync.Once
	started   chan struct{}
	done      chan struct{}
	cancel    context.CancelCauseFunc

	sourceState

	limitMu sync.Mutex // guards limit
	limit   uint64     // the bandwidth that was asked for last, bytes per second; 0: no limit

	startedAt    time.Time // set before started is closed
	prepareBegan time.Time // when preparing began; set before prepare is called

	// Owned by the goroutine of run.
	attempt
	token         string
	protocol      uint32   // the version that both daemons use
	takenUp       bool     // made by TakeUpSource
	noEarlyReason error    // why there must be no early load; nil: there may be one
	discards      []string // memory backends whose discard-data is off because of this migration
	steps         steps

	lastIncoming heard // what the destination said last about the VM's memory
	definedThere *bool // what it said of the domain's definition there, see noteDefined; nil: nothing

	endWatch func()      // ends watchQEMU
	qemuGone atomic.Bool // watchQEMU has seen QEMU end
}

// An attempt has what prepare made and what the switch did with it. A source that prepares afresh, or starts over,
// begins another one.
type attempt struct {
	vm          *qemu.VM
	reconnected *qemu.VM         // a second connection to QEMU, after that of vm was lost; nil: it was not
	claim       process.Identity // the claim on QEMU; zero: none
	facts       *qemu.Facts
	devices     []string                       // the VM's devices
	description *migratedv1.MachineDescription // the machine that the destination has to match
	ram         *pagesrv.RAM
	export      *pagesrv.Export
	blocks      []keptBlock // the VM's memory, as the destination knows it
	conn        *grpc.ClientConn
	peer        migratedv1.PeerServiceClient

	earlyState   *snapshot // what the destination has loaded early; nil: nothing
	earlySavedAt time.Time

	wasRunning  bool // the VM ran before it was stopped
	stoppedAt   time.Time
	stopped     chan struct{}  // closed when QEMU has said that the VM is stopped
	contLock    *qemu.ContLock // nil: this daemon made none
	gaveUpDisks bool           // QEMU was asked to give the disks up

	endGuard         context.CancelFunc // ends guardStopped; nil: it has not begun
	continuedByOther chan struct{}      // closed when somebody else has continued the VM after it was stopped
	resumeEvents     *qmp.Subscription  // QEMU's RESUME events; nil: not subscribed yet
	endEvents        *qmp.Subscription  // QEMU's SHUTDOWN and GUEST_PANICKED events; nil: not subscribed yet
	sleepEvents      *qmp.Subscription  // QEMU's SUSPEND and WAKEUP events since openDeviceStream

	runSentAt      time.Time                           // when Run was sent, with the end of the device state
	loadAnsweredAt time.Time                           // when LoadDeviceState was answered
	loadAnswer     *migratedv1.LoadDeviceStateResponse // nil: not loaded, or told to run without an answer
}

func newAttempt() attempt {
	return attempt{stopped: make(chan struct{}), continuedByOther: make(chan struct{})}
}

// NewSource begins a migration. It prepares at once, and switches over when Start is called. It goes on until it is
// over or ctx ends, which counts as a failure of this daemon.
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
		attempt: newAttempt(),
		limit:   cfg.Spec.GetBandwidth(),
	}
	s.note(func(r *migratedv1.Report) { r.Source, r.Check = versionsOf(cfg.Versions, ""), cfg.Check })
	s.daemonCtx = ctx
	ctx, s.cancel = context.WithCancelCause(ctx)
	return s, ctx
}

// Start lets the migration switch over as soon as it is prepared.
func (s *Source) Start() {
	s.startOnce.Do(func() {
		s.startedAt = time.Now()
		s.updateUnlessOver(func(m *migratedv1.Migration) { m.StartTime = timestamppb.New(s.startedAt) })
		close(s.started)
	})
}

// Done returns a channel that is closed when the migration is over and has released everything that it held.
func (s *Source) Done() <-chan struct{} { return s.done }

// Cancel gives the migration up and returns at once. After the commit point it returns ErrCommitted. Cancelling a
// migration that is over does nothing.
func (s *Source) Cancel() error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.isCommitted() {
		if view, _ := s.Snapshot(); Terminal(view.GetState()) {
			return nil
		}
		return withRemedy(ErrCommitted, "wait for it to complete, then migrate the VM back")
	}
	s.cancel(ErrCancelled)
	return nil
}

// prepareRecord prepares the record. From then on a restarted daemon knows of this VM.
func (s *Source) prepareRecord() error {
	identity, err := s.vm.Identity()
	if err != nil {
		return err
	}
	spec, err := protojson.Marshal(s.cfg.Spec)
	if err != nil {
		return fmt.Errorf("write down the specification: %w", err)
	}
	view, _ := s.Snapshot()
	return s.cfg.Records.Prepare(Record{
		ID: s.cfg.ID, VM: s.cfg.Spec.GetVm(), Identity: identity,
		Destination: s.cfg.Spec.GetDestination(), HandedOver: time.Now(),
		Created: view.GetCreateTime().AsTime(), Started: s.startedAt, Due: s.totalDeadline(),
		Protocol: s.protocol, Spec: spec, Token: s.token, WasRunning: s.wasRunning, Blocks: s.blocks,
	})
}

// commit passes the commit point, unless the migration was cancelled first.
func (s *Source) commit(ctx context.Context) error {
	s.lockCont() // before the record is committed: whatever undoes the commit also removes the lock
	err := s.commitRecord(ctx)
	if err == nil {
		testPoint("source-committed")
	}
	return err
}

// commitRecord commits the record, unless ctx has ended.
func (s *Source) commitRecord(ctx context.Context) error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if err := s.cfg.Records.Commit(s.cfg.ID); err != nil {
		return err
	}
	s.moveTo(pastCommit)
	s.update(func(m *migratedv1.Migration) { m.SwitchTime = timestamppb.Now() })
	return nil
}

// undoCommit undoes commit. It is called after the destination promised ErrNotRun, and when the destination was never
// told to run the VM.
func (s *Source) undoCommit() {
	s.clearCommit()
	s.update(func(m *migratedv1.Migration) { m.SwitchTime = nil })
}

// clearCommit clears the commit: this source has nothing more to do with the VM that was handed over. A limit that
// passed while the VM was handed over gives the migration up now.
func (s *Source) clearCommit() {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.isCommitted() {
		s.moveTo(stopAsked)
	}
	if s.missedLimit != nil {
		s.cancel(s.missedLimit)
	}
}

// run drives the migration from its turn to its end.
func (s *Source) run(ctx context.Context) {
	defer close(s.done)
	defer s.cancel(nil)
	defer s.release()

	prepared := func() {}
	keep, err := s.awaitTurn(ctx)
	if err == nil {
		prepared = s.startLimits(ctx) // not before: limits do not count while the migration waits for its turn
		err = s.prepare(ctx)
	}
	keep()
	if err != nil {
		s.backOut(ctx, causeOf(ctx, err))
		return
	}
	prepared()
	s.update(func(m *migratedv1.Migration) { m.Prepared = true })
	s.log.Info("prepared", "destination", s.cfg.Spec.GetDestination(), "protocol", s.protocol)
	testPoint("source-prepared")

	if err = s.awaitStart(ctx); err == nil {
		err = s.renew(ctx)
	}
	if err != nil {
		s.backOut(ctx, causeOf(ctx, err))
		return
	}
	if s.switchOver(ctx) {
		s.followToEnd(ctx)
	}
}

// followToEnd follows a migration whose VM runs at the destination until it ends.
func (s *Source) followToEnd(ctx context.Context) {
	if err := s.follow(ctx); err != nil {
		s.failAfterCommit(err)
		return
	}
	s.endWatch() // QEMU may end from here on
	s.complete()
}

// failAfterCommit ends a migration after the commit point because of err. Only the destination could tell where the VM
// is.
func (s *Source) failAfterCommit(err error) {
	s.endWatch()
	var how *endedError
	switch {
	case errors.As(err, &how):
		s.followEnding(how)
		return
	case s.daemonCtx.Err() != nil && errors.Is(err, context.Cause(s.daemonCtx)):
		s.leaveToNextDaemon(err, s.whereAfterCommit())
		return
	case errors.Is(err, errDeclaring):
		err = errDeclaring // whatever was under way
	}
	s.log.Error("failed after the commit point", "error", err)
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, err, s.whereFailedThere())
	if s.qemuEnded() {
		s.removeRecord() // without its QEMU the VM cannot be continued here
	}
}

// switchOver moves the VM itself. If it returns false, the VM was not moved and the migration is over: the tracker says
// why and where the VM is.
func (s *Source) switchOver(ctx context.Context) bool {
	defer processGC.hold()()
	s.guardStopped(ctx)
	s.setState(migratedv1.MigrationState_MIGRATION_STATE_DEVICE)
	if err := s.moveDevices(ctx); err != nil {
		s.undoCommit() // even if committed: the destination was not told to run the VM, or promised not to
		if errors.Is(err, devicestate.ErrOtherForm) {
			return s.startOver(ctx, err)
		}
		s.backOut(ctx, err)
		return false
	}
	testPoint("source-loaded")
	if s.cfg.Spec.GetRehearse() {
		s.finishRehearsal(ctx)
		return false
	}
	if !s.toldToRun() {
		err := s.checkMayRun(ctx)
		if err == nil {
			err = s.commit(ctx)
		}
		if err != nil {
			s.backOut(ctx, err)
			return false
		}
	}
	return s.finishHandOver(ctx)
}

// finishHandOver is the second half of switchOver, after the commit point. It reports whether the VM runs at the
// destination.
func (s *Source) finishHandOver(ctx context.Context) bool {
	s.endWatch = s.watchQEMU(ctx)
	err := s.handOver(ctx)
	switch {
	case err == nil:
		return true
	case errors.Is(err, ErrNotRun), !s.toldToRun():
		s.endWatch()
		s.undoCommit()
		s.backOut(ctx, err)
	case errors.Is(err, errContinued):
		s.endWatch()
		s.retractHandOver(ctx)
	default:
		s.failAfterCommit(err)
	}
	return false
}
