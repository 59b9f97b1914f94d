// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"cmp"
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
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// loadedTimeout is how long a destination that has loaded the device state waits for Run before it gives up. The
// source repeats Run for longer than that. It then hears that the VM never ran here.
const loadedTimeout = 60 * time.Second

// endTimeout is how long Abort waits until everything is released.
const endTimeout = 5 * time.Second

// Timeouts for a source that sends nothing. They bound how long this host keeps a QEMU that is prepared or loading. A
// source that works is a hundred times faster: prepareTimeout and deviceTimeout are its own limits. Its operator may
// take time to say start.
const (
	awaitingEarlyTimeout = 30 * time.Second // until LoadEarlyState begins
	preparedTimeout      = 15 * time.Minute
	loadTimeout          = 30 * time.Second
)

// DestinationConfig is the configuration of one migration to this host.
type DestinationConfig struct {
	// Request is the source's request with absolute page addresses. Its protocol is the version that both daemons
	// agreed on.
	Request *migratedv1.PrepareIncomingRequest
	// Dir is the directory of this migration alone. Prepare creates it.
	Dir string
	// PipeDir and LogDir hold the output of QEMUs; see launch.FollowOutputs.
	PipeDir, LogDir string
	// Binaries are patterns of the QEMU binaries that a source may have started here.
	Binaries []string
	// TemplateDir holds the templates of command lines that a source may name.
	TemplateDir string
	// ForbiddenOptions are options that no QEMU is started with; see cmdline.ParseForbidden.
	ForbiddenOptions []string
	// MinUID is the smallest user ID that a QEMU is started as.
	MinUID int
	// RunAs is the user that every QEMU is started as. nil: the user that it runs as at the source.
	RunAs *process.Credentials
	// LibvirtSocket is the socket of this host's libvirt. Empty: one of the usual places.
	LibvirtSocket string
	// Starter starts QEMU. nil: this process does.
	Starter *launch.Starter
	// Cgroup is the parent of the control groups of QEMUs, such as "/vms"; each QEMU gets a group of its own. Empty:
	// QEMUs stay in the daemon's group.
	Cgroup string
	// FaultWorkers is the number of fault workers and demand lanes.
	FaultWorkers int
	// Versions are the versions of this host for the report, without QEMU's.
	Versions *migratedv1.HostVersions
	// RequireSecure refuses an unsupervised userfaultfd, whatever the source asks for.
	RequireSecure bool
	// Bandwidth is this daemon's own limit in bytes a second. 0: no limit.
	Bandwidth uint64
	// Dial connects a lane to the source's page server at HOST:PORT. Its errors are gRPC statuses.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	Log  *slog.Logger
}

// Destination drives one migration to this host. The embedded Tracker shows it to the API. Its parts:
//
//	destinationState   the step, and what a restarted daemon has to know of it
//	incomingQEMU       the QEMU that the VM is moved to
//	incomingMemory     the VM's memory and the engine that fills it
//	destinationLife    contexts: how long it lives, and what ends it
//	pageAddresses      addresses of the source's page server
type Destination struct {
	*Tracker
	destinationState
	incomingQEMU
	incomingMemory
	destinationLife
	pageAddresses

	cfg DestinationConfig
	log *slog.Logger

	mu       sync.Mutex           // serializes the peer's calls; guards every field without another guard
	early    *earlyLoaded         // nil: QEMU loads all of the devices' state when the VM has stopped
	loadTime *durationpb.Duration // to load the devices' state after the VM had stopped; nil: unknown
	heard    atomic.Bool          // see Heard
	// releaseGC ends the hold on the garbage collector during the switch.
	releaseGC func()
	retention retention
}

// A destinationLife holds the contexts that a destination runs under.
type destinationLife struct {
	// The lifetimes of the daemon and of the migration. A migration lives longer than any call.
	daemon context.Context //nolint:containedctx // see above
	ctx    context.Context //nolint:containedctx // see above
	cancel context.CancelCauseFunc
	// Loading runs under this one: Abort can end it early.
	loadCtx    context.Context //nolint:containedctx // see above
	cancelLoad context.CancelCauseFunc

	pumpStarted bool // pump was started; it releases everything when it ends
	done        chan struct{}
}

// An incomingQEMU is the QEMU that the VM is moved to.
type incomingQEMU struct {
	vm       *qemu.VM         // nil: not started yet, or it has not answered since this daemon took the migration up
	replaced []*qemu.VM       // connections to the same QEMU whose monitor was lost
	claim    process.Identity // what qemuClaims holds for this migration; zero: nothing
	process  *launch.Process  // nil: this daemon did not start QEMU
	domain   string           // address of the domain that libvirt started; empty: none
	defined  atomic.Bool      // libvirt keeps the domain's definition, as the source asked for
	foreign  bool             // an operator named this QEMU, and it may be another VM's: it is not ended

	// Only of a migration that was taken up.
	facts     *keptFactsV1
	left      process.Identity // the QEMU that the earlier run of the daemon left; used until vm is set
	exit      *process.Exit    // observes the end of that QEMU; nil: none was left
	attaching chan struct{}    // closed when attachTakenUp returns; nil: it was not needed

	taken       *inject.Taken // its userfaultfd; how that is supervised:
	supervision uffd.Supervision
	label       string
}

// An incomingMemory is the VM's memory and the engine that fills it.
type incomingMemory struct {
	blocks  []ram.Block
	reserve *reserve // nil: the migration was taken up
	engine  *postcopy.Engine
	engines engineList
	meter   meter
	orphan  bool // owned by pump: the source's QEMU has ended
	// The engine needs these when another process touches the VM's memory; see openFiles.
	pagemap                                *uffd.Pagemap
	files                                  []*os.File
	warnTouched, warnUnexplained, warnLost sync.Once

	limitMu   sync.Mutex // guards kept, the limit and the page states against release
	released  bool
	cachedMap cachedMap // guarded by limitMu as well
}

// pageAddresses are addresses of the source's page server beside those that the source named.
type pageAddresses struct {
	viaMu    sync.Mutex
	via      []string      // given to Recover, the newest first
	retryNow chan struct{} // a value means: dial now; capacity 1
}

// AgreeOnProtocol sets the protocol of a request to the newest version that both daemons speak. Both use it from then
// on.
func AgreeOnProtocol(request *migratedv1.PrepareIncomingRequest) (err error) {
	request.Protocol, err = version.AgreeOnProtocol("the source", request.GetOldestProtocol(), request.GetProtocol())
	if err != nil {
		return withRemedy(err, sameVersions)
	}
	return nil
}

// NewDestination creates a destination; Prepare starts it. It lives until the migration is over or ctx ends.
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
		cfg: cfg,
		log: cfg.Log.With("migration", request.GetId(), "role", "destination",
			"vm", printable.Line(request.GetMachine().GetName())),
		releaseGC:       func() {},
		destinationLife: destinationLife{daemon: ctx, done: make(chan struct{})},
		pageAddresses:   pageAddresses{retryNow: make(chan struct{}, 1)},
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

// Done returns a channel that is closed when the migration is over and everything is released.
func (d *Destination) Done() <-chan struct{} { return d.done }

// expire gives the destination up after the given time, unless it has moved to another step by then. It uses the
// monotonic clock. The caller holds mu.
func (d *Destination) expire(after time.Duration, why string) {
	moves := d.moves.Load()
	time.AfterFunc(after, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.moves.Load() == moves {
			d.giveUp(fmt.Errorf("%s within %v", why, after))
		}
	})
}

// explain adds QEMU's own output to an error that QEMU's death caused. It adds it only once.
func (d *Destination) explain(err error) error {
	if d.process == nil {
		return err
	}
	if said := d.process.ExitReason(); said != "" && !strings.Contains(err.Error(), said) {
		return fmt.Errorf("%w; QEMU says: %s", err, said)
	}
	return err
}

// Abort gives the migration up. It fails if QEMU was told to run the VM.
func (d *Destination) Abort(reason string) error {
	d.cancelLoad(fmt.Errorf("the source gave up: %s", reason)) // loading holds mu
	if err := d.abort(reason); err != nil {
		return err
	}
	d.Heard() // the source knows where the VM is
	select {  // the source may start another migration with the same id
	case <-d.done:
	case <-time.After(endTimeout):
	}
	return nil
}

func (d *Destination) abort(reason string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.toldToRun() {
		return d.errToldToRun()
	}
	d.giveUp(fmt.Errorf("the source gave up: %s", reason))
	return nil
}

// errToldToRun returns the error for a source that wants a migration given up whose QEMU was told to run the VM. It has
// REASON_DESTINATION_QEMU_ENDED if the VM was here and is not any more: then the source has the only one. The caller
// holds mu.
func (d *Destination) errToldToRun() error {
	switch {
	case cmp.Or(d.claim, d.left).Alive(): // d.vm may be closed
		return errors.New("the VM's QEMU on the destination lives, and was told to run it")
	case d.step() == filled: // it could be moved on from here
		return withRemedy(
			errors.New("the VM was on the destination with all of its memory, and its QEMU there has ended since"),
			"find out whether the VM was moved on from the destination ('migrated list' there) and runs on a third "+
				"host; only if it does, end one of the two QEMUs at once (QMP 'quit'): both write to the same disks")
	default:
		return fmt.Errorf("the VM was run on the destination, and is not there any more: %w", errQEMUGone)
	}
}
