// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/migrated-vm/migrated/internal/gomaxprocs"
	"github.com/migrated-vm/migrated/internal/machine"
	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/internal/redact"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Prepare makes everything ready for the device state. On failure the destination has given up.
func (d *Destination) Prepare(ctx context.Context) (*migratedv1.PrepareIncomingResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.step() != preparing {
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
	if err == nil { // ctx alone tells that the source has ended
		err = context.Cause(ctx)
	}
	mayEarly := d.cfg.Request.GetEarly() && d.cfg.Request.GetDestinationQmp() == "" // else it cannot be replaced
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
		Qemu: d.shownQEMU(d.vm.Pid),
	}
	for _, b := range d.blocks {
		answer.RamBlocks = append(answer.RamBlocks, &migratedv1.RamBlock{Id: b.ID, Size: b.Size, PageSize: b.PageSize})
	}
	return answer, nil
}

// prepareQEMU starts the destination's QEMU, or attaches to it. It empties its memory and takes a userfaultfd from
// it.
func (d *Destination) prepareQEMU(ctx context.Context) error {
	if err := d.openQEMU(ctx); err != nil {
		return err
	}
	d.update(func(m *migratedv1.Migration) { m.DestinationQemu = d.shownQEMU(d.vm.Pid) })
	testPoint("destination-started")
	if err := d.compare(ctx); err != nil {
		return err
	}
	d.foreign = false
	if err := d.vm.PrepareIncoming(ctx); err != nil {
		return fmt.Errorf("prepare the destination QEMU: %w", err)
	}
	if err := d.vm.RAM.Drop(ctx, d.blocks); err != nil {
		return withRemedy(fmt.Errorf("empty the RAM of the destination VM: %w", err), remedyOfRAM(err))
	}
	if err := d.checkRoomAfterStart(); err != nil {
		return err
	}
	var err error
	if d.reserve, err = reserveFor(d.blocks, availableMemory); err != nil {
		return err
	}
	if err := d.takeDescriptor(ctx); err != nil {
		return err
	}
	testPoint("destination-taken")
	return nil
}

// compare refuses a destination QEMU whose VM differs from the source's, before anything is loaded.
func (d *Destination) compare(ctx context.Context) error {
	facts, err := d.vm.Facts(ctx)
	if err != nil {
		return qemuQueryError("destination", err)
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
		return qemuQueryError("destination", err)
	}
	source := d.cfg.Request.GetMachine()
	differs := refusalOf("the destination QEMU's VM differs from the source's",
		machine.Compare(source.GetDescription(), waits, machine.Destination{
			Chosen: d.cfg.Request.GetDestinationQmp() != "" || d.cfg.Request.GetDestinationTemplate() != "",
			Has:    func(file string) bool { return machine.HasFile(d.vm, file) },
		}))
	d.blocks, err = matchMachine(source, facts)
	return errors.Join(err, differs)
}

// ready does the rest of the preparation: it registers all memory, opens the lanes and starts pump.
func (d *Destination) ready(ctx context.Context) error {
	keptFacts, err := d.writeKept()
	if err != nil {
		return err
	}
	testPoint("destination-kept")
	if err := d.makeEngine(keptFacts); err != nil {
		return err
	}
	if err := d.vm.RAM.CheckEmpty(d.blocks); err != nil {
		return err
	}
	first, err := openLanes(d.ctx, d.laneConfig())
	if err != nil {
		return err
	}
	d.pumpStarted = true
	go d.pump(first)
	go d.watchQEMU(d.vm)
	testPoint("destination-prepared")
	d.moveTo(prepared) // unless pump has given up already
	d.expire(preparedTimeout, "the source did not start the prepared migration")
	d.update(func(m *migratedv1.Migration) {
		m.Prepared = true
		m.Progress = d.meter.progress(d.engine.Stats())
	})
	d.log.Info("prepared", "pid", d.vm.Pid, "protocol", d.cfg.Request.GetProtocol(), "userfaultfd", d.taken.Method,
		"supervision", d.supervision, "label", d.label)
	return nil
}

// openQEMU starts the destination QEMU, or attaches to the one that the request names.
func (d *Destination) openQEMU(ctx context.Context) error {
	request := d.cfg.Request
	if path := request.GetDestinationQmp(); path != "" {
		vm, err := qemu.Attach(ctx, path)
		if err != nil {
			return fmt.Errorf("attach to the destination QEMU: %w", err)
		}
		if err := checkUnused(ctx, vm); err != nil {
			return errors.Join(err, vm.Close())
		}
		if d.claim, err = qemuClaims.claimVM(vm, request.GetId()); err != nil {
			return errors.Join(err, vm.Close())
		}
		d.vm, d.foreign = vm, true // until compare has found it to be this VM's
		return nil
	}
	if definition := request.GetMachine().GetLibvirtDefinition(); definition != "" {
		return d.openDomain(ctx, definition)
	}
	if len(d.cfg.Binaries) == 0 {
		return withRemedy(cmdline.ErrNoBinaries,
			"start QEMU there with -S -incoming defer and name its socket with --to-qmp, "+
				"or set qemu_binaries in the destination's configuration")
	}
	machine := request.GetMachine()
	if err := checkPromise(machine, availableMemory); err != nil {
		return err
	}
	if err := d.checkRoomBeforeStart(); err != nil {
		return err
	}
	argv, err := cmdline.Destination(
		cmdline.Source{
			Name: machine.GetName(), Args: machine.GetCommandLine(), QMPPath: machine.GetQmpPath(),
			Dir: machine.GetWorkingDirectory(), GenerationID: machine.GetDescription().GetGenerationId(),
		},
		cmdline.Options{
			QMPPath: machine.GetQmpPath(), Binaries: d.cfg.Binaries, Template: request.GetDestinationTemplate(),
			TemplateDir: d.cfg.TemplateDir, Forbidden: d.cfg.ForbiddenOptions,
		})
	var forbidden *cmdline.ForbiddenError
	if errors.As(err, &forbidden) {
		return withRemedy(err,
			"take the option out with --template, or off forbidden_options in the destination's configuration")
	}
	if err != nil {
		return err
	}
	startsAs, err := launch.StartsAs(argv, d.user())
	if err != nil {
		return err
	}
	if err := d.mayStartAs(argv, startsAs); err != nil {
		return err
	}
	d.log.Info("starting QEMU", "argv", redact.Texts(argv), "uid", startsAs.UID)
	d.process, d.vm, err = qemu.Start(ctx, d.cfg.Starter, launch.Options{
		Args: argv, Credentials: startsAs, Attributes: attributesOf(machine.GetAttributes()),
		Cgroup: d.cfg.Cgroup, Name: request.GetId(),
		Dir: machine.GetWorkingDirectory(), QMPPath: machine.GetQmpPath(),
		PipePath: d.pipePath(), LogPath: d.logPath(),
	})
	if err != nil {
		return thisHost.explainFailedStart(fmt.Errorf("start the destination QEMU: %w", err), machine)
	}
	d.claim, err = qemuClaims.claimVM(d.vm, request.GetId())
	return err
}

// checkUser refuses a QEMU that was started like the source's and runs as another user. If an operator started it or
// gave a template for it, any user is right.
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

// shownQEMU returns the QEMU that the VM is moved to, for the API.
func (d *Destination) shownQEMU(pid int) *migratedv1.QemuProcess {
	shown := &migratedv1.QemuProcess{Pid: uint32(pid), Qmp: d.qmpPath()}
	if d.domain == "" && d.cfg.Request.GetDestinationQmp() == "" { // else this daemon did not start it
		shown.Log = d.logPath()
	}
	return shown
}

// longestPath bounds the paths in another daemon's answer, in bytes (as PATH_MAX).
const longestPath = 4096

// toldQEMU returns what a destination says of its QEMU, bounded and printable. nil: it says nothing usable.
func toldQEMU(said *migratedv1.QemuProcess) *migratedv1.QemuProcess {
	if said == nil || len(said.GetQmp()) > longestPath || len(said.GetLog()) > longestPath {
		return nil
	}
	return &migratedv1.QemuProcess{
		Pid: said.GetPid(), Qmp: printable.Line(said.GetQmp()), Log: printable.Line(said.GetLog()),
	}
}

func (d *Destination) pipePath() string { return filepath.Join(d.cfg.PipeDir, d.cfg.Request.GetId()) }
func (d *Destination) logPath() string  { return launch.LogPath(d.cfg.LogDir, d.cfg.Request.GetId()) }

// checkIncoming refuses a QEMU that already runs or holds a VM.
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

// checkUnused is checkIncoming, and refuses a QEMU that waits for, or receives, a VM by a migration of QEMU's own.
func checkUnused(ctx context.Context, vm *qemu.VM) error {
	if err := checkIncoming(ctx, vm); err != nil {
		return err
	}
	info, err := vm.QueryMigrate(ctx)
	if err != nil {
		return fmt.Errorf("ask the destination QEMU for its migration: %w", err)
	}
	if info.Begun() {
		return withRemedy(errors.New("the destination QEMU waits for another migration already, one of QEMU's own"),
			"start a QEMU of its own for this migration with -S -incoming defer, and without migrate-incoming")
	}
	return nil
}

// takeDescriptor takes a userfaultfd of QEMU's memory and checks its supervision.
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

// writeKept writes the files that a restarted daemon needs to go on.
func (d *Destination) writeKept() (*keptFactsV1, error) {
	identity, err := d.vm.Identity()
	if err != nil {
		return nil, err
	}
	view, _ := d.Snapshot()
	facts := &keptFactsV1{
		Created: view.GetCreateTime().AsTime(),
		QEMU:    identity, QMP: d.qmpPath(), RemoteFD: d.taken.RemoteFD, Discards: true, Settings: d.vm.Changed(),
		Supervision: d.supervision, Label: d.label,
	}
	for _, b := range d.blocks {
		facts.Blocks = append(facts.Blocks, keptBlock{
			ID: b.ID, Addr: b.Addr, Size: b.Size, PageSize: b.PageSize, Populated: b.Populated,
			Private: b.Private,
		})
	}
	if d.kept, err = createKept(d.cfg.Dir, facts, d.cfg.Request); err != nil {
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

// makeEngine registers the RAM. Nothing may touch the RAM before, and loading the device state does.
func (d *Destination) makeEngine(facts *keptFactsV1) (err error) {
	blocks := facts.engineBlocks(d.taken.UFFD)
	fetchPrivateFirst(blocks, d.cfg.Request.GetMachine().GetRamBlocks())
	var ahead uint64
	if d.early == nil {
		ahead = loadAhead
	}
	d.openFiles(facts, blocks)
	d.engine, err = postcopy.New(postcopy.Options{
		Blocks: blocks, Workers: d.cfg.FaultWorkers, State: d.kept.states(),
		Copies: d.kept.copies(), Pagemap: d.pagemap, Bandwidth: d.bandwidthLimit(), LoadAhead: ahead, Sleeps: gomaxprocs.Add,
	})
	if err != nil {
		return fmt.Errorf("register the RAM of the destination VM: %w", err)
	}
	d.engines.add(d.engine)
	return nil
}

// remedyOfRAM returns what an operator can do about memory that cannot be filled. Empty: unknown.
func remedyOfRAM(err error) string {
	var bad *ram.Error
	if errors.As(err, &bad) {
		return bad.Remedy
	}
	return ""
}
