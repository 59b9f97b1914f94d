// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// loadedTimeout is how long a destination that has loaded the device state
// waits for Run before it gives up. The source repeats Run for longer; it is
// then told that the VM never ran here.
const loadedTimeout = 60 * time.Second

// What a source that is not heard of keeps at most: a QEMU that is prepared, and one that loads. A source that goes on is
// a hundred times faster (prepareTimeout and deviceTimeout are its own), but its operator may take time to say start.
const (
	preparedTimeout = 15 * time.Minute
	loadTimeout     = 30 * time.Second
)

// DestinationConfig is what one migration to this host needs.
type DestinationConfig struct {
	// Request is the source's, its page addresses made absolute. Its protocol is the one that was agreed on.
	Request *migratedv1.PrepareIncomingRequest
	// Dir is a directory of this migration's own, for logs; Prepare makes it.
	Dir string
	// Binaries are patterns of QEMU binaries that a source may have started.
	Binaries []string
	// Starter starts QEMU; nil: this process does.
	Starter *qemu.Starter
	// FaultWorkers is the number of fault workers and demand lanes.
	FaultWorkers int
	// RequireSecure refuses an unsupervised userfaultfd, whatever the source asks.
	RequireSecure bool
	// Bandwidth is this daemon's own limit, bytes a second; 0: none.
	Bandwidth uint64
	// Dial makes a connection for a lane to the source's page server at HOST:PORT. Its errors are gRPC statuses.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	Log  *slog.Logger
}

// Destination drives one migration to this host. The embedded Tracker shows
// it.
type Destination struct {
	*Tracker

	cfg  DestinationConfig
	log  *slog.Logger
	done chan struct{}

	// The daemon's life; and that of the migration, longer than any call's.
	daemon context.Context //nolint:containedctx // see above
	ctx    context.Context //nolint:containedctx // see above
	cancel context.CancelCauseFunc
	// The part of it that Abort may cut short.
	loadCtx    context.Context //nolint:containedctx // see above
	cancelLoad context.CancelCauseFunc

	mu      sync.Mutex // serializes the peer's calls; guards what follows
	phase   phase
	reason  error // why phase is givenUp
	answer  *migratedv1.RunResponse
	vm      *qemu.VM
	process *qemu.Process // nil: somebody else started QEMU
	left    qemu.Identity // of a QEMU that an earlier run of the daemon left, until vm answers
	blocks  []qemu.RAMBlock
	taken   *inject.Taken
	// Of taken's userfaultfd.
	supervision uffd.Supervision
	label       string

	engine  *postcopy.Engine
	kept    *kept
	leave   bool // kept for a later daemon
	word    word
	pumping bool // pump was started; it releases what is held
	// attaching is closed when attachAgain has ended; nil where it was not needed.
	attaching chan struct{}
	// releaseGC ends the hold on the garbage collector during the switch.
	releaseGC func()
	meter     meter

	limitMu  sync.Mutex // guards the kept limit against release
	released bool

	viaMu sync.Mutex
	via   []string      // addresses given to Recover, the last first
	hurry chan struct{} // dial now; holds one
}

// A phase is how far the calls of the source have brought this destination.
type phase int

const (
	preparing phase = iota
	prepared
	loading
	loaded
	running // QEMU was told to run it: the VM is this host's
	givenUp // for good: Run is answered with ErrNotRun
)

// AgreeOnProtocol makes the protocol of a request the newest that both daemons speak, to which they keep from then on.
func AgreeOnProtocol(request *migratedv1.PrepareIncomingRequest) (err error) {
	request.Protocol, err = version.AgreeOnProtocol("the source", request.GetOldestProtocol(), request.GetProtocol())
	if err != nil {
		return withRemedy(err, sameVersions)
	}
	return nil
}

// NewDestination makes a destination that Prepare brings to life. It lives
// until it is over or ctx ends.
func NewDestination(ctx context.Context, cfg DestinationConfig) *Destination {
	request := cfg.Request
	d := &Destination{
		Tracker: newTracker(&migratedv1.Migration{
			Id:     request.GetId(),
			Role:   migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
			State:  migratedv1.MigrationState_MIGRATION_STATE_SETUP,
			Spec:   request.GetSpec(),
			VmName: request.GetMachine().GetName(),
		}),
		cfg:  cfg,
		log:  cfg.Log.With("migration", request.GetId(), "role", "destination"),
		done: make(chan struct{}),

		releaseGC: func() {}, hurry: make(chan struct{}, 1), daemon: ctx,
	}
	d.ctx, d.cancel = context.WithCancelCause(ctx)
	d.loadCtx, d.cancelLoad = context.WithCancelCause(d.ctx)
	return d
}

// Done is closed when the migration is over and everything it held released.
func (d *Destination) Done() <-chan struct{} { return d.done }

// Prepare makes everything ready for the device state. When it fails the
// destination has given up.
func (d *Destination) Prepare(ctx context.Context) (*migratedv1.PrepareIncomingResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.phase != preparing {
		return nil, fmt.Errorf("this migration was prepared before")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTimeout, fmt.Errorf("the destination was not ready within %v", prepareTimeout))
	defer cancel()
	if err := os.MkdirAll(d.cfg.Dir, 0o755); err != nil {
		err = fmt.Errorf("state directory: %w", err)
		d.giveUp(err)
		return nil, err
	}
	if err := d.prepare(ctx); err != nil {
		err = causeOf(ctx, err)
		d.giveUp(err)
		return nil, err
	}
	d.phase = prepared
	d.expire(prepared, preparedTimeout, "it was prepared and not started")
	d.update(func(m *migratedv1.Migration) {
		m.Prepared = true
		m.Progress = d.meter.progress(d.engine.Stats())
	})
	d.log.Info("prepared", "pid", d.vm.Pid, "protocol", d.cfg.Request.GetProtocol(), "userfaultfd", d.taken.Method, "supervision", d.supervision, "label", d.label)
	answer := &migratedv1.PrepareIncomingResponse{Supervision: shownSupervision[d.supervision], UserfaultfdLabel: d.label, Protocol: d.cfg.Request.GetProtocol()}
	for _, b := range d.blocks {
		answer.RamBlocks = append(answer.RamBlocks, &migratedv1.RamBlock{Id: b.ID, Size: b.Size, PageSize: b.PageSize})
	}
	return answer, nil
}

func (d *Destination) prepare(ctx context.Context) error {
	if err := d.openQEMU(ctx); err != nil {
		return err
	}
	reached("destination-started")
	facts, err := d.vm.Facts(ctx)
	if err != nil {
		return askQEMU("destination", err)
	}
	d.blocks, err = matchMachine(d.cfg.Request.GetMachine(), facts)
	if err != nil {
		return err
	}
	if err := d.vm.PrepareIncoming(ctx); err != nil {
		return fmt.Errorf("prepare the destination QEMU: %w", err)
	}
	for _, b := range d.blocks {
		if err := qemu.PunchRAM(b); err != nil {
			return fmt.Errorf("empty the RAM of the destination VM: %w", err)
		}
	}
	if err := d.takeDescriptor(ctx); err != nil {
		return err
	}
	reached("destination-taken")
	keptFacts, err := d.keep(facts.Discards)
	if err != nil {
		return err
	}
	reached("destination-kept")
	if err := d.makeEngine(keptFacts); err != nil {
		return err
	}
	first, err := openLanes(d.ctx, d.laneConfig())
	if err != nil {
		return err
	}
	d.pumping = true
	go d.pump(first)
	go d.watchQEMU()
	reached("destination-prepared")
	return nil
}

// openQEMU starts the destination QEMU, or attaches to the one it was told of.
func (d *Destination) openQEMU(ctx context.Context) error {
	request := d.cfg.Request
	if path := request.GetDestinationQmp(); path != "" {
		vm, err := qemu.Attach(ctx, path)
		if err != nil {
			return fmt.Errorf("attach to the destination QEMU: %w", err)
		}
		// Not ours until this holds: giving up ends d.vm's QEMU.
		if err := checkIncoming(ctx, vm); err != nil {
			return errors.Join(err, vm.Close())
		}
		d.vm = vm
		return nil
	}
	if len(d.cfg.Binaries) == 0 {
		return withRemedy(errors.New("the destination starts no QEMU: its list of QEMU binaries is empty"),
			"start QEMU there with -S -incoming defer and name its socket with --to-qmp, or set qemu_binaries in the destination's configuration")
	}
	machine := request.GetMachine()
	argv, err := qemu.DestinationCommand(
		qemu.SourceCommand{
			Name: machine.GetName(), Args: machine.GetCommandLine(), QMPPath: machine.GetQmpPath(),
			Dir: machine.GetWorkingDirectory(),
		},
		qemu.CommandOptions{
			QMPPath: machine.GetQmpPath(), Binaries: d.cfg.Binaries, TemplatePath: request.GetDestinationTemplate(),
		})
	if err != nil {
		return err
	}
	d.log.Info("starting QEMU", "argv", argv, "uid", machine.GetUid())
	d.process, d.vm, err = d.cfg.Starter.Start(ctx, qemu.StartOptions{
		Args: argv,
		Credentials: qemu.Credentials{
			UID: machine.GetUid(), GID: machine.GetGid(), Groups: machine.GetGroups(),
		},
		Dir: machine.GetWorkingDirectory(), QMPPath: machine.GetQmpPath(), LogPath: d.cfg.Dir + "/qemu.log",
	})
	if err != nil {
		return fmt.Errorf("start the destination QEMU: %w", err)
	}
	return nil
}

// checkIncoming refuses a QEMU that runs a VM, or holds one, already.
func checkIncoming(ctx context.Context, vm *qemu.VM) error {
	status, err := vm.Status(ctx)
	if err != nil {
		return fmt.Errorf("ask the destination QEMU for its state: %w", err)
	}
	if status != "inmigrate" {
		return withRemedy(fmt.Errorf("the destination QEMU is %q instead of waiting for a migration", status),
			"start it with -S -incoming defer")
	}
	return nil
}

// takeDescriptor obtains a userfaultfd of QEMU's memory that is supervised as it
// has to be.
func (d *Destination) takeDescriptor(ctx context.Context) error {
	var err error
	d.taken, err = inject.Take(ctx, d.vm.Pid, inject.TakeOptions{HandDevice: d.vm.HandFD})
	if err != nil {
		err = fmt.Errorf("take a userfaultfd from the destination QEMU: %w", err)
		if errors.Is(err, inject.ErrForbidden) {
			err = withRemedy(err, "look for \"avc: denied\" in the kernel's log of the destination; what its policy must allow is in deploy/selinux")
		}
		return err
	}
	return d.supervise()
}

// keep writes down what a daemon that is started again needs to go on.
func (d *Destination) keep(discards bool) (*keptFactsV1, error) {
	identity, err := d.vm.Identity()
	if err != nil {
		return nil, err
	}
	facts := &keptFactsV1{
		QEMU: identity, QMP: d.qmpPath(), RemoteFD: d.taken.RemoteFD, Discards: discards, Settings: d.vm.Changed(),
		Supervision: d.supervision, Label: d.label,
	}
	for _, b := range d.blocks {
		facts.Blocks = append(facts.Blocks, keptBlock{ID: b.ID, Addr: b.Addr, Size: b.Size, PageSize: b.PageSize})
	}
	if d.kept, err = keep(d.cfg.Dir, facts, d.cfg.Request); err != nil {
		return nil, err
	}
	d.kept.header().bandwidth.Store(d.cfg.Request.GetBandwidth())
	return facts, nil
}

func (d *Destination) qmpPath() string {
	if path := d.cfg.Request.GetDestinationQmp(); path != "" {
		return path
	}
	return d.cfg.Request.GetMachine().GetQmpPath()
}

// makeEngine registers the RAM, before anything, loading the device state
// included, can touch it.
func (d *Destination) makeEngine(facts *keptFactsV1) (err error) {
	d.engine, err = postcopy.New(postcopy.Options{
		Blocks: facts.engineBlocks(d.taken.UFFD), Workers: d.cfg.FaultWorkers, Discards: facts.Discards, State: d.kept.states(),
		Copies: d.kept.copies(), Bandwidth: d.limit(),
	})
	if err != nil {
		return fmt.Errorf("register the RAM of the destination VM: %w", err)
	}
	return nil
}

// expire gives up a destination that is still in that phase when the time has passed. The clock is the monotonic one.
func (d *Destination) expire(in phase, after time.Duration, why string) {
	time.AfterFunc(after, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.phase == in {
			d.giveUp(fmt.Errorf("%s within %v", why, after))
		}
	})
}

// explain adds what QEMU itself wrote to an error that its death caused.
func (d *Destination) explain(err error) error {
	if d.process == nil {
		return err
	}
	if said := d.process.ExitReason(); said != "" {
		return fmt.Errorf("%w; QEMU says: %s", err, said)
	}
	return err
}

// Run runs the VM: the second step of the commit. It is idempotent. ErrNotRun
// is a promise for good; any other error leaves open whether the VM ran.
func (d *Destination) Run(ctx context.Context, request *migratedv1.RunRequest) (*migratedv1.RunResponse, error) {
	arrived := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.phase == running && d.answer != nil:
		return d.answer, nil
	case d.phase == running: // it is not known whether QEMU heard what it was told
	case d.phase == givenUp:
		return nil, fmt.Errorf("%w: %w", ErrNotRun, d.reason)
	default:
		if err := d.expect(loaded); err != nil {
			return nil, err
		}
	}
	told := d.phase == running
	if d.vm == nil {
		if over := context.Cause(d.ctx); over != nil {
			return nil, fmt.Errorf("the VM may have run here: %w", over)
		}
		return nil, fmt.Errorf("the destination QEMU does not answer yet: %w", errAskAgain)
	}
	select {
	case <-d.vm.QMP.Done():
		if told {
			return nil, fmt.Errorf("the destination QEMU was told to run the VM, and is gone: %w", d.explain(d.vm.QMP.Err()))
		}
		// It can't be told any more to run, and never was.
		d.giveUp(fmt.Errorf("the destination QEMU died before it ran the VM: %w", d.explain(d.vm.QMP.Err())))
		return nil, fmt.Errorf("%w: %w", ErrNotRun, d.reason)
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, resumeTimeout/2) // the source hears before it asks again
	defer cancel()
	reached("destination-go")
	// From here on it may have run, whatever QEMU answers: nobody gives it up.
	d.kept.header().toldToRun.Store(1)
	d.phase = running
	reached("destination-told")
	resumed := time.Now()
	if request.GetResume() {
		at, err := d.vm.Cont(ctx)
		if err != nil {
			return nil, d.contFailed(told, err)
		}
		resumed = at
	}
	reached("destination-runs")
	d.releaseGC()
	d.engine.StartSweep()
	d.answer = &migratedv1.RunResponse{
		ResumeTime: durationpb.New(max(0, resumed.Sub(arrived))), ServeTime: durationpb.New(time.Since(arrived)),
	}
	downtime := request.GetStoppedFor().AsDuration() + d.answer.GetResumeTime().AsDuration()
	d.meter.switched(resumed, downtime)
	d.kept.running(resumed, d.answer.GetResumeTime().AsDuration(), downtime)
	d.setState(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE)
	d.log.Info("the VM runs", "stopped_for", downtime)
	reached("destination-running")
	return d.answer, nil
}

// contFailed finds out whether a VM that QEMU was told to continue may have
// run. Only a QEMU that refused when it was told for the first time, and still
// answers that the VM is stopped, proves that not one instruction did.
func (d *Destination) contFailed(told bool, cause error) error {
	d.releaseGC()
	ctx, cancel := context.WithTimeout(d.ctx, attachTimeout)
	defer cancel()
	var refusal *qmp.Error
	if !told && errors.As(cause, &refusal) {
		if status, err := d.vm.Status(ctx); err == nil && status != "running" {
			d.phase = loaded
			d.giveUp(fmt.Errorf("the destination QEMU refused to run the VM: %w", cause))
			return fmt.Errorf("%w: %w", ErrNotRun, d.reason)
		}
	}
	err := fmt.Errorf("continue the destination VM: %w", d.explain(cause))
	if refusal == nil && d.vm.QMP.Err() == nil {
		return fmt.Errorf("%w: %w", err, errAskAgain) // QEMU hangs, and may do later what it was told
	}
	return err
}

// Abort gives up a migration that Run was not obeyed for.
func (d *Destination) Abort(reason string) error {
	d.cancelLoad(fmt.Errorf("the source gave up: %s", reason)) // it holds the lock
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.phase == running {
		return errors.New("the VM runs on this host already")
	}
	d.giveUp(fmt.Errorf("the source gave up: %s", reason))
	return nil
}

func (d *Destination) expect(want phase) error {
	switch d.phase {
	case want:
		return nil
	case givenUp:
		return fmt.Errorf("this destination gave up: %w", d.reason)
	default:
		return fmt.Errorf("this call is out of order (phase %d instead of %d)", d.phase, want)
	}
}
