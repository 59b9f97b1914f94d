// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/pagesrv/pagemap"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// loadedTimeout is how long a destination that has loaded the device state
// waits for Run before it gives up. The source repeats Run for longer; it is
// then told that the VM never ran here.
const loadedTimeout = 60 * time.Second

// endTimeout is how long Abort waits for all to be let go.
const endTimeout = 5 * time.Second

// What a source that is not heard of keeps at most: a QEMU that is prepared, and one that loads. A source that goes on is
// a hundred times faster (prepareTimeout and deviceTimeout are its own), but its operator may take time to say start.
const (
	awaitingEarlyTimeout = 30 * time.Second // for the call to begin
	preparedTimeout      = 15 * time.Minute
	loadTimeout          = 30 * time.Second
)

// DestinationConfig is what one migration to this host needs.
type DestinationConfig struct {
	// Request is the source's, its page addresses made absolute. Its protocol is the one that was agreed on.
	Request *migratedv1.PrepareIncomingRequest
	// Dir is a directory of this migration's own; Prepare makes it.
	Dir string
	// PipeDir and LogDir have what QEMUs write: see qemu.FollowOutputs.
	PipeDir, LogDir string
	// Binaries are patterns of QEMU binaries that a source may have started.
	Binaries []string
	// TemplateDir has the templates of command lines that a source may name.
	TemplateDir string
	// ForbiddenOptions are those that no QEMU is started with; see qemu.ParseForbidden.
	ForbiddenOptions []string
	// MinUID is the least user that a QEMU is started as.
	MinUID int
	// RunAs is the user that QEMUs are started as, whoever runs them at their sources; nil: as at the source.
	RunAs *qemu.Credentials
	// LibvirtSocket is where this host's libvirt listens; empty: at one of its usual places.
	LibvirtSocket string
	// Starter starts QEMU; nil: this process does.
	Starter *qemu.Starter
	// Cgroup is the control group below which each QEMU is started in one of its own, as "/vms"; empty: it is in the daemon's.
	Cgroup string
	// FaultWorkers is the number of fault workers and demand lanes.
	FaultWorkers int
	// Versions are of this host, without QEMU's, for the report.
	Versions *migratedv1.HostVersions
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

	fate     atomic.Int32 // see decide
	mu       sync.Mutex   // serializes the peer's calls; guards what follows
	phase    phase
	reason   error // why phase is givenUp
	answer   *migratedv1.RunResponse
	vm       *qemu.VM
	claim    qemu.Identity // of claimed; zero: none
	process  *qemu.Process // nil: somebody else started QEMU
	domain   string        // address of libvirt's domain that was started; empty: none
	facts    *keptFactsV1  // of a migration that was taken up
	replaced []*qemu.VM    // before vm, the same QEMU by monitors that were lost
	left     qemu.Identity // of a QEMU that an earlier run of the daemon left, until vm answers
	blocks   []qemu.RAMBlock
	discards bool                 // of its Facts
	reserve  *reserve             // nil in a migration that was taken up
	loadTime *durationpb.Duration // of the devices' state, when the VM had stopped; nil: it is not known
	early    *earlyLoaded         // nil: QEMU loads all of the devices' state when the VM has stopped
	steps    int                  // that were expected, see expire
	taken    *inject.Taken
	// Of taken's userfaultfd.
	supervision uffd.Supervision
	label       string

	engine  *postcopy.Engine
	counted counted
	// What the engine needs where another process touches the VM's memory, see openFiles.
	pagemap                      *pagemap.Map
	files                        []*os.File
	warnTouched, warnUnexplained sync.Once
	kept                         *kept
	leave                        bool // kept for a later daemon
	word                         word
	pumping                      bool // pump was started; it releases what is held
	orphan                       bool // the pump's: the source's QEMU has ended
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
	preparing     phase = iota
	awaitingEarly       // LoadEarlyState comes first
	prepared
	loading
	loaded
	running // QEMU was told to run it: the VM is this host's
	givenUp // for good: Run is answered with ErrNotRun
)

// Fates of a destination.
const (
	undecided int32 = iota
	toldToRun       // QEMU was told to run the VM, or will be
	cannotRun       // before that the source's pages could not be had any more, or QEMU not be told
)

// decide makes f the destination's fate, unless it has another. The peer's calls and the pump both ask, and the pump cannot
// wait for mu: Run holds that while it waits for QEMU, which may wait for pages.
func (d *Destination) decide(f int32) bool {
	return d.fate.CompareAndSwap(undecided, f) || d.fate.Load() == f
}

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
			VmName: printable.Line(request.GetMachine().GetName()),
		}),
		cfg:  cfg,
		log:  cfg.Log.With("migration", request.GetId(), "role", "destination", "vm", printable.Line(request.GetMachine().GetName())),
		done: make(chan struct{}),

		releaseGC: func() {}, hurry: make(chan struct{}, 1), daemon: ctx,
	}
	d.note(func(r *migratedv1.Report) {
		r.Source = versionsOf(request.GetVersions(), request.GetMachine().GetQemuVersion())
		r.Destination = versionsOf(cfg.Versions, "")
		r.Protocol = request.GetProtocol()
	})
	d.ctx, d.cancel = context.WithCancelCause(ctx)
	d.loadCtx, d.cancelLoad = context.WithCancelCause(d.ctx)
	return d
}

// Done is closed when the migration is over and everything it held released.
func (d *Destination) Done() <-chan struct{} { return d.done }

// expire gives up a destination that is still in that phase when the time has passed, and has not gone on since, to
// come back to it perhaps. The clock is the monotonic one. The caller holds mu.
func (d *Destination) expire(in phase, after time.Duration, why string) {
	d.steps++
	step := d.steps
	time.AfterFunc(after, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.phase == in && d.steps == step {
			d.giveUp(fmt.Errorf("%s within %v", why, after))
		}
	})
}

// explain adds what QEMU itself wrote to an error that its death caused, once.
func (d *Destination) explain(err error) error {
	if d.process == nil {
		return err
	}
	if said := d.process.ExitReason(); said != "" && !strings.Contains(err.Error(), said) {
		return fmt.Errorf("%w; QEMU says: %s", err, said)
	}
	return err
}

// Abort gives up a migration that Run was not obeyed for.
func (d *Destination) Abort(reason string) error {
	d.cancelLoad(fmt.Errorf("the source gave up: %s", reason)) // it holds the lock
	if err := d.abort(reason); err != nil {
		return err
	}
	select { // the source may begin another of the same id
	case <-d.done:
	case <-time.After(endTimeout):
	}
	return nil
}

func (d *Destination) abort(reason string) error {
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
