// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/migrated-vm/migrated/internal/machine"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/internal/redact"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Prepare makes everything ready for the device state. When it fails the
// destination has given up.
func (d *Destination) Prepare(ctx context.Context) (*migratedv1.PrepareIncomingResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.phase != preparing {
		return nil, fmt.Errorf("this migration was prepared before")
	}
	limit := timeToPrepare(d.cfg.Request.GetMachine())
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the destination was not ready within %v", limit))
	defer cancel()
	if err := os.MkdirAll(d.cfg.Dir, 0o755); err != nil {
		err = fmt.Errorf("state directory: %w", err)
		d.giveUp(err)
		return nil, err
	}
	err := d.prepareQEMU(ctx)
	if err == nil { // nobody else notices that the source has ended
		err = context.Cause(ctx)
	}
	mayEarly := d.cfg.Request.GetEarly() && d.cfg.Request.GetDestinationQmp() == "" // else it could not be replaced
	if err == nil && !mayEarly {
		err = d.ready(ctx)
	}
	if err != nil {
		err = causeOf(ctx, err)
		d.giveUp(err)
		return nil, err
	}
	if mayEarly {
		d.expectEarly()
	}
	answer := &migratedv1.PrepareIncomingResponse{
		Supervision: shownSupervision[d.supervision], UserfaultfdLabel: d.label,
		Protocol: d.cfg.Request.GetProtocol(), Early: mayEarly, Versions: d.Tracker.Report().GetDestination(),
	}
	for _, b := range d.blocks {
		answer.RamBlocks = append(answer.RamBlocks, &migratedv1.RamBlock{Id: b.ID, Size: b.Size, PageSize: b.PageSize})
	}
	return answer, nil
}

// prepareQEMU starts the destination's QEMU, or attaches to it, empties its memory and takes a userfaultfd of it.
func (d *Destination) prepareQEMU(ctx context.Context) error {
	if err := d.openQEMU(ctx); err != nil {
		return err
	}
	reached("destination-started")
	if err := d.compare(ctx); err != nil {
		return err
	}
	if err := d.vm.PrepareIncoming(ctx); err != nil {
		return fmt.Errorf("prepare the destination QEMU: %w", err)
	}
	if err := d.vm.DropRAM(ctx, d.blocks); err != nil {
		return withRemedy(fmt.Errorf("empty the RAM of the destination VM: %w", err), remedyOfRAM(err))
	}
	if err := d.checkRoomNow(); err != nil {
		return err
	}
	var err error
	if d.reserve, err = reserveFor(d.blocks, availableMemory); err != nil {
		return err
	}
	if err := d.takeDescriptor(ctx); err != nil {
		return err
	}
	reached("destination-taken")
	return nil
}

// compare refuses a QEMU that would make another VM of the source's, before anything is loaded.
func (d *Destination) compare(ctx context.Context) error {
	facts, err := d.vm.Facts(ctx)
	if err != nil {
		return askQEMU("destination", err)
	}
	d.noteQEMU(facts.Version)
	if err := d.checkUser(facts); err != nil {
		return err
	}
	if err := d.checkName(facts); err != nil {
		return err
	}
	waits, err := machine.Describe(ctx, d.vm)
	if err != nil {
		return askQEMU("destination", err)
	}
	d.discards = facts.Discards
	source := d.cfg.Request.GetMachine()
	differs := refuse("the destination QEMU has another VM than the source", machine.Compare(source.GetDescription(), waits,
		machine.Destination{
			Chosen: d.cfg.Request.GetDestinationQmp() != "" || d.cfg.Request.GetDestinationTemplate() != "",
			Has:    func(file string) bool { return machine.HasFile(d.vm, file) },
		}))
	d.blocks, err = matchMachine(source, facts)
	return errors.Join(err, differs)
}

// ready is the rest of the preparation: all memory is registered, and the lanes are open.
func (d *Destination) ready(ctx context.Context) error {
	keptFacts, err := d.keep(d.discards)
	if err != nil {
		return err
	}
	reached("destination-kept")
	if err := d.makeEngine(keptFacts); err != nil {
		return err
	}
	if err := d.vm.CheckEmpty(d.blocks); err != nil {
		return err
	}
	first, err := openLanes(d.ctx, d.laneConfig())
	if err != nil {
		return err
	}
	d.pumping = true
	go d.pump(first)
	go d.watchQEMU(d.vm)
	reached("destination-prepared")
	d.phase = prepared
	d.expire(prepared, preparedTimeout, "it was prepared and not started")
	d.update(func(m *migratedv1.Migration) {
		m.Prepared = true
		m.Progress = d.meter.progress(d.engine.Stats())
	})
	d.log.Info("prepared", "pid", d.vm.Pid, "protocol", d.cfg.Request.GetProtocol(), "userfaultfd", d.taken.Method,
		"supervision", d.supervision, "label", d.label)
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
		if d.claim, err = claimed.takeVM(vm, request.GetId()); err != nil {
			return errors.Join(err, vm.Close())
		}
		d.vm = vm
		return nil
	}
	if definition := request.GetMachine().GetLibvirtDefinition(); definition != "" {
		return d.openDomain(ctx, definition)
	}
	if len(d.cfg.Binaries) == 0 {
		return withRemedy(errors.New("the destination starts no QEMU: its list of QEMU binaries is empty"),
			"start QEMU there with -S -incoming defer and name its socket with --to-qmp, or set qemu_binaries in the destination's configuration")
	}
	machine := request.GetMachine()
	if err := checkPromise(machine, availableMemory); err != nil {
		return err
	}
	if err := d.checkFutureRoom(); err != nil {
		return err
	}
	argv, err := qemu.DestinationCommand(
		qemu.SourceCommand{
			Name: machine.GetName(), Args: machine.GetCommandLine(), QMPPath: machine.GetQmpPath(),
			Dir: machine.GetWorkingDirectory(),
		},
		qemu.CommandOptions{
			QMPPath: machine.GetQmpPath(), Binaries: d.cfg.Binaries, Template: request.GetDestinationTemplate(),
			TemplateDir: d.cfg.TemplateDir, Forbidden: d.cfg.ForbiddenOptions,
		})
	var forbidden *qemu.ForbiddenError
	if errors.As(err, &forbidden) {
		return withRemedy(err, "take the option out with --template, or off forbidden_options in the destination's configuration")
	}
	if err != nil {
		return err
	}
	startsAs, err := qemu.StartsAs(argv, d.user())
	if err != nil {
		return err
	}
	if err := d.mayStartAs(argv, startsAs); err != nil {
		return err
	}
	d.log.Info("starting QEMU", "argv", redact.Texts(argv), "uid", startsAs.UID)
	d.process, d.vm, err = d.cfg.Starter.Start(ctx, qemu.StartOptions{
		Args: argv, Credentials: startsAs, Attributes: attributesOf(machine.GetAttributes()), Cgroup: d.cfg.Cgroup, Name: request.GetId(),
		Dir: machine.GetWorkingDirectory(), QMPPath: machine.GetQmpPath(),
		PipePath: d.pipePath(), LogPath: d.logPath(),
	})
	if err != nil {
		return thisHost.explainStart(fmt.Errorf("start the destination QEMU: %w", err), machine)
	}
	d.claim, err = claimed.takeVM(d.vm, request.GetId())
	return err
}

// checkUser refuses a QEMU, started as the source's was, that runs as somebody else. One that an operator started, or gave
// a template for, is as the operator wants it.
func (d *Destination) checkUser(facts *qemu.Facts) error {
	request := d.cfg.Request
	if request.GetDestinationQmp() != "" || request.GetDestinationTemplate() != "" || d.domain != "" {
		return nil
	}
	if err := facts.CheckUser(d.user()); err != nil {
		return withRemedy(err, "give the user of -runas (-run-with user=) the same number and group on both hosts, "+
			"or say with --template which user it is to be")
	}
	return nil
}

func (d *Destination) pipePath() string { return filepath.Join(d.cfg.PipeDir, d.cfg.Request.GetId()) }
func (d *Destination) logPath() string  { return qemu.LogPath(d.cfg.LogDir, d.cfg.Request.GetId()) }

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
		if errors.Is(err, inject.ErrForbidden) || errors.Is(err, qmp.ErrForbidden) {
			err = withRemedy(err, "look for \"avc: denied\" (SELinux) or apparmor=\"DENIED\" in the kernel's log of the "+
				"destination; what SELinux must allow is in deploy/selinux, and AppArmor allows it to a daemon without a profile")
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
		facts.Blocks = append(facts.Blocks, keptBlock{
			ID: b.ID, Addr: b.Addr, Size: b.Size, PageSize: b.PageSize, Populated: b.Populated,
		})
	}
	if d.kept, err = keep(d.cfg.Dir, facts, d.cfg.Request); err != nil {
		return nil, err
	}
	d.kept.header().bandwidth.Store(d.cfg.Request.GetBandwidth())
	return facts, nil
}

func (d *Destination) qmpPath() string {
	if d.facts != nil {
		return d.facts.QMP
	}
	if path := d.cfg.Request.GetDestinationQmp(); path != "" {
		return path
	}
	if d.domain != "" {
		return d.domain
	}
	return d.cfg.Request.GetMachine().GetQmpPath()
}

// makeEngine registers the RAM, before anything, loading the device state
// included, can touch it.
func (d *Destination) makeEngine(facts *keptFactsV1) (err error) {
	blocks := facts.engineBlocks(d.taken.UFFD)
	soonest(blocks, d.cfg.Request.GetMachine().GetRamBlocks())
	var ahead uint64
	if d.early == nil {
		ahead = loadAhead
	}
	d.openFiles(facts, blocks)
	d.engine, err = postcopy.New(postcopy.Options{
		Blocks: blocks, Workers: d.cfg.FaultWorkers, Discards: facts.Discards, State: d.kept.states(),
		Copies: d.kept.copies(), Pagemap: d.pagemap, Bandwidth: d.limit(), LoadAhead: ahead,
	})
	if err != nil {
		return fmt.Errorf("register the RAM of the destination VM: %w", err)
	}
	d.counted.add(d.engine)
	return nil
}

// remedyOfRAM is what to do about memory that cannot be filled, where that is known.
func remedyOfRAM(err error) string {
	var bad *qemu.RAMError
	if errors.As(err, &bad) {
		return bad.Remedy
	}
	return ""
}
