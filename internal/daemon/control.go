// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// defaultWatchInterval is the interval of Watch if the caller names none.
const defaultWatchInterval = 100 * time.Millisecond

// validID matches ids of migrations. They are used as names of files.
var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// controlService serves the control API.
type controlService struct {
	migratedv1.UnimplementedControlServiceServer
	daemon *Daemon
}

func (c *controlService) Prepare(
	ctx context.Context, request *migratedv1.PrepareRequest,
) (*migratedv1.PrepareResponse, error) {
	s, err := c.source(ctx, request.GetId(), request.GetSpec())
	if err != nil {
		return nil, err
	}
	view, _ := s.Snapshot()
	return &migratedv1.PrepareResponse{Migration: view}, nil
}

func (c *controlService) Start(
	ctx context.Context, request *migratedv1.StartRequest,
) (*migratedv1.StartResponse, error) {
	var s *migration.Source
	if request.GetSpec() == nil {
		if s = c.daemon.migrations.source(request.GetId()); s == nil {
			return nil, notFound(request.GetId())
		}
	} else {
		var err error
		if s, err = c.source(ctx, request.GetId(), request.GetSpec()); err != nil {
			return nil, err
		}
	}
	s.Start()
	view, _ := s.Snapshot()
	return &migratedv1.StartResponse{Migration: view}, nil
}

// source returns the migration with that id and spec, and makes it if there is none.
func (c *controlService) source(
	ctx context.Context, id string, spec *migratedv1.MigrationSpec,
) (*migration.Source, error) {
	if err := validateSpec(spec); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	spec, definition := proto.CloneOf(spec), spec.GetDestinationXml()
	spec.DestinationXml = "" // it may have secrets, and must not be shown
	spec.Vm = libvirt.At(c.daemon.cfg.LibvirtSocket, spec.GetVm())
	if id == "" {
		id = strings.ToLower(rand.Text()[:12])
	}
	if !validID.MatchString(id) {
		return nil, status.Errorf(codes.InvalidArgument,
			"id %q cannot be used: 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit", id)
	}
	if c.daemon.migrations.leftover(id) != nil {
		return nil, status.Errorf(codes.AlreadyExists,
			"an earlier run of this daemon left a migration %s that it cannot take up; choose another id", id)
	}
	create := func() *migration.Source { return c.daemon.newSource(ctx, id, spec, definition) }
	s, busy, err := c.daemon.migrations.addSource(id, spec.GetVm(), create)
	if busy != "" && c.daemon.migrations.awaitRelease(busy) {
		s, busy, err = c.daemon.migrations.addSource(id, spec.GetVm(), create)
	}
	if err != nil {
		return nil, migration.ToStatus(codes.Unavailable, err)
	}
	if busy != "" {
		return nil, migration.ToStatus(codes.FailedPrecondition, underWayError(busy))
	}
	if view, _ := s.Snapshot(); !proto.Equal(view.GetSpec(), spec) {
		return nil, status.Errorf(codes.AlreadyExists,
			"migration %s exists with another specification; choose another id", id)
	}
	return s, nil
}

// underWayError says that migration id of the VM is under way already.
func underWayError(id string) error {
	return migration.WithRemedy(fmt.Errorf("this VM is being migrated already, by migration %s", id),
		fmt.Sprintf("follow it with 'migrated watch %s'", id))
}

// newSource makes a migration away from this host, which caller has asked for.
func (d *Daemon) newSource(
	caller context.Context, id string, spec *migratedv1.MigrationSpec, definition string,
) *migration.Source {
	cfg := d.sourceConfig()
	cfg.ID, cfg.Spec, cfg.DestinationXML = id, proto.CloneOf(spec), definition
	cfg.Check, cfg.Turn = d.checked.of(spec.GetVm(), spec.GetDestination()), d.awaitTurn(id)
	life := d.traces.Begin(d.ctx, caller, id, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)
	s := migration.NewSource(life, cfg)
	d.follow(life, s)
	return s
}

// maxWeight is the highest MigrationSpec.weight.
const maxWeight = 1000

// validateVM refuses a text that cannot be the address of a VM.
func validateVM(vm string) error {
	if libvirt.IsAddress(vm) {
		if err := libvirt.CheckAddress(vm); err != nil {
			return fmt.Errorf("vm: %w", err)
		}
		return nil
	}
	if !filepath.IsAbs(vm) {
		return fmt.Errorf("vm: %q is no absolute path of a QMP socket, and no libvirt:NAME", vm)
	}
	return nil
}

// maxXML bounds a definition, in bytes. Usual ones have about 10 KB.
const maxXML = 1 << 20

// validateXML refuses a definition that cannot be used for the VM at the destination.
func validateXML(vm, definition string) error {
	switch {
	case definition == "":
		return nil
	case !libvirt.IsAddress(vm):
		return errors.New("destination_xml is for a domain of libvirt's (vm: libvirt:NAME)")
	case len(definition) > maxXML:
		return fmt.Errorf("destination_xml has %d bytes, more than %d", len(definition), maxXML)
	}
	return nil
}

func validateSpec(spec *migratedv1.MigrationSpec) error {
	if err := errors.Join(validateVM(spec.GetVm()), validateXML(spec.GetVm(), spec.GetDestinationXml())); err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(spec.GetDestination())
	if err != nil || host == "" || port == "" {
		return fmt.Errorf("destination: %q is no HOST:PORT", spec.GetDestination())
	}
	if path := spec.GetDestinationQmp(); path != "" && !filepath.IsAbs(path) {
		return fmt.Errorf("destination_qmp: %q is no absolute path", path)
	}
	if template := spec.GetDestinationTemplate(); !filepath.IsAbs(template) && strings.Contains(template, "/") {
		return fmt.Errorf("destination_template: %q is neither a name nor an absolute path", template)
	}
	if spec.GetDestinationQmp() != "" && spec.GetDestinationTemplate() != "" {
		return errors.New("destination_qmp and destination_template exclude each other: " +
			"QEMU is either running there or started from a template")
	}
	if err := bandwidth.Check(spec.GetBandwidth()); err != nil {
		return fmt.Errorf("bandwidth: %d: %w", spec.GetBandwidth(), err)
	}
	if limit := spec.GetQueueLimit(); limit != nil &&
		(limit.AsDuration() < 0 || limit.AsDuration() > migration.MaxQueueLimit) {
		return fmt.Errorf("queue_limit: %v is not between 0 and %v", limit.AsDuration(), migration.MaxQueueLimit)
	}
	if weight := spec.GetWeight(); weight > maxWeight {
		return fmt.Errorf("weight: %d is more than %d", weight, maxWeight)
	}
	if err := migration.CheckLabels(spec.GetLabels()); err != nil {
		return err
	}
	return migration.CheckBudgets(spec)
}

func (c *controlService) Get(_ context.Context, request *migratedv1.GetRequest) (*migratedv1.GetResponse, error) {
	t := c.daemon.migrations.find(request.GetId())
	if t == nil {
		return nil, notFound(request.GetId())
	}
	view, _ := t.Snapshot()
	return &migratedv1.GetResponse{Migration: view}, nil
}

func (c *controlService) Watch(
	request *migratedv1.WatchRequest, stream grpc.ServerStreamingServer[migratedv1.WatchResponse],
) error {
	t := c.daemon.migrations.find(request.GetId())
	if t == nil {
		return notFound(request.GetId())
	}
	interval := defaultWatchInterval
	if request.GetInterval() != nil {
		interval = max(0, request.GetInterval().AsDuration())
	}
	return c.daemon.watch(stream.Context(), t, interval, func(view *migratedv1.Migration) error {
		return stream.Send(&migratedv1.WatchResponse{Migration: view})
	})
}

// watch sends the state of t, and then sends it again whenever it has changed and
// interval has passed, up to and including the terminal state. The end of the daemon
// does not wait for watchers, because a VM may wait for the daemon to start again.
func (d *Daemon) watch(
	ctx context.Context, t tracked, interval time.Duration, send func(*migratedv1.Migration) error,
) error {
	for last := false; ; {
		view, changed := t.Snapshot()
		if err := send(view); err != nil {
			return err
		}
		switch {
		case migration.Terminal(view.GetState()):
			return nil
		case last:
			return status.Error(codes.Unavailable, "the daemon is stopping; it continues the migration when it is started again")
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-d.stopping:
		case <-time.After(interval):
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-d.stopping:
			last = true
		case <-changed:
		}
	}
}

func (c *controlService) Cancel(
	_ context.Context, request *migratedv1.CancelRequest,
) (*migratedv1.CancelResponse, error) {
	s := c.daemon.migrations.source(request.GetId())
	if s == nil {
		if c.daemon.migrations.destination(request.GetId()) != nil {
			return nil, status.Errorf(codes.FailedPrecondition,
				"migration %s comes to this host; cancel it at its source", request.GetId())
		}
		return nil, notFound(request.GetId())
	}
	if err := s.Cancel(); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	view, _ := s.Snapshot()
	return &migratedv1.CancelResponse{Migration: view}, nil
}

func (c *controlService) Recover(
	_ context.Context, request *migratedv1.RecoverRequest,
) (*migratedv1.RecoverResponse, error) {
	if via := request.GetVia(); via != "" {
		if host, port, err := net.SplitHostPort(via); err != nil || host == "" || port == "" {
			return nil, status.Errorf(codes.InvalidArgument, "via: %q is no HOST:PORT", via)
		}
	}
	d := c.daemon.migrations.destination(request.GetId())
	if d == nil {
		if c.daemon.migrations.source(request.GetId()) != nil {
			return nil, status.Errorf(codes.FailedPrecondition,
				"migration %s goes away from this host; recover it at its destination", request.GetId())
		}
		return nil, notFound(request.GetId())
	}
	if err := d.Recover(request.GetVia()); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	view, _ := d.Snapshot()
	return &migratedv1.RecoverResponse{Migration: view}, nil
}

func (c *controlService) FallBack(
	ctx context.Context, request *migratedv1.FallBackRequest,
) (*migratedv1.FallBackResponse, error) {
	s := c.daemon.migrations.source(request.GetId())
	if s == nil {
		if c.daemon.migrations.destination(request.GetId()) != nil {
			return nil, status.Errorf(codes.FailedPrecondition,
				"migration %s comes to this host; fall back at its source", request.GetId())
		}
		return nil, notFound(request.GetId())
	}
	if !request.GetDestinationIsGone() {
		return nil, status.Error(codes.InvalidArgument,
			"destination_is_gone is not set: a VM that still runs there would run twice, and corrupt its disks; "+
				"make sure that it cannot, then say so")
	}
	if err := s.FallBack(ctx); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	c.daemon.keepReport(s)
	view, _ := s.Snapshot()
	return &migratedv1.FallBackResponse{Migration: view}, nil
}

func (c *controlService) Release(
	ctx context.Context, request *migratedv1.ReleaseRequest,
) (*migratedv1.ReleaseResponse, error) {
	s := c.daemon.migrations.source(request.GetId())
	if s == nil {
		if c.daemon.migrations.destination(request.GetId()) != nil {
			return nil, status.Errorf(codes.FailedPrecondition,
				"migration %s comes to this host; release it at its source", request.GetId())
		}
		return nil, notFound(request.GetId())
	}
	if !request.GetVmIsAtDestination() {
		return nil, status.Error(codes.InvalidArgument,
			"vm_is_at_destination is not set: memory that the VM still needs would be lost; "+
				"make sure that it is whole there, then say so")
	}
	if err := s.Release(ctx); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	c.daemon.keepReport(s)
	view, _ := s.Snapshot()
	return &migratedv1.ReleaseResponse{Migration: view}, nil
}

func (c *controlService) Abandon(
	ctx context.Context, request *migratedv1.AbandonRequest,
) (*migratedv1.AbandonResponse, error) {
	d := c.daemon.migrations.destination(request.GetId())
	if d == nil {
		if c.daemon.migrations.source(request.GetId()) != nil {
			return nil, status.Errorf(codes.FailedPrecondition,
				"migration %s goes away from this host; abandon it at its destination", request.GetId())
		}
		return nil, notFound(request.GetId())
	}
	if !request.GetSourceIsGone() {
		return nil, status.Error(codes.InvalidArgument,
			"source_is_gone is not set: the VM would be ended although its memory may come; be sure that it cannot, then set it")
	}
	if err := d.Abandon(ctx); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	c.daemon.keepReport(d)
	view, _ := d.Snapshot()
	return &migratedv1.AbandonResponse{Migration: view}, nil
}

func (c *controlService) SetBandwidth(
	ctx context.Context, request *migratedv1.SetBandwidthRequest,
) (*migratedv1.SetBandwidthResponse, error) {
	limit := request.GetBandwidth()
	if err := bandwidth.Check(limit); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "bandwidth: %d: %v", limit, err)
	}
	var holds uint64
	var err error
	if s := c.daemon.migrations.source(request.GetId()); s != nil {
		holds, err = s.SetBandwidth(ctx, limit)
	} else if d := c.daemon.migrations.destination(request.GetId()); d != nil {
		holds, err = d.SetBandwidth(limit)
	} else {
		return nil, notFound(request.GetId())
	}
	if err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	return &migratedv1.SetBandwidthResponse{Bandwidth: holds}, nil
}

func (c *controlService) GetVersion(
	context.Context, *migratedv1.GetVersionRequest,
) (*migratedv1.GetVersionResponse, error) {
	return &migratedv1.GetVersionResponse{Version: c.daemon.version, Protocol: version.Protocol}, nil
}

func notFound(id string) error {
	return status.Errorf(codes.NotFound, "this daemon knows no migration %q; see 'migrated list'", id)
}
