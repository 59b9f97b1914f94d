// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// incomingInterval is how often a source is told the figures, at the most.
const incomingInterval = 50 * time.Millisecond

// peerService serves the calls of source daemons.
type peerService struct {
	migratedv1.UnimplementedPeerServiceServer
	daemon *Daemon
}

func (p *peerService) CheckHost(ctx context.Context, _ *migratedv1.CheckHostRequest) (*migratedv1.CheckHostResponse, error) {
	return &migratedv1.CheckHostResponse{
		Results: shown(p.daemon.checkHost(ctx, p.daemon.cfg.RequireSecure),
			migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION),
	}, nil
}

func (p *peerService) PrepareIncoming(ctx context.Context, request *migratedv1.PrepareIncomingRequest) (*migratedv1.PrepareIncomingResponse, error) {
	if err := migration.AgreeOnProtocol(request); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	if !validID.MatchString(request.GetId()) {
		return nil, status.Errorf(codes.InvalidArgument, "id %q cannot be used", request.GetId())
	}
	if err := p.daemon.maySend(ctx, request.GetMachine().GetName()); err != nil {
		return nil, err
	}
	if p.daemon.migrations.source(request.GetId()) != nil && request.GetDestinationQmp() == "" {
		return nil, migration.ToStatus(codes.FailedPrecondition, errOwnHost)
	}
	if err := absoluteAddresses(ctx, request); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	d, err := p.daemon.expectIncoming(ctx, request)
	if err != nil {
		return nil, err
	}
	answer, err := d.Prepare(ctx)
	return answer, migration.ToStatus(codes.FailedPrecondition, err)
}

// errOwnHost says that a daemon is to start a QEMU for a VM of its own host.
var errOwnHost = migration.WithRemedy(
	errors.New("the destination is the VM's own host: a QEMU that is started like the VM's would have its files and sockets"),
	"name another host; or start a QEMU here yourself, with files and sockets of its own, and name it with --to-qmp")

// expectIncoming makes the destination of a new migration, if there is room for it.
func (d *Daemon) expectIncoming(ctx context.Context, request *migratedv1.PrepareIncomingRequest) (*migration.Destination, error) {
	dir := filepath.Join(d.incomingDir(), request.GetId())
	destination, forgotten, err := d.migrations.addDestination(request.GetId(), callerID(ctx), d.cfg.MaxIncoming, func() *migration.Destination {
		cfg := d.destinationConfig(dir)
		cfg.Request = request
		life := d.traces.Begin(d.ctx, ctx, request.GetId(), migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION)
		destination := migration.NewDestination(life, cfg)
		d.follow(life, destination)
		return destination
	})
	var crowded *crowdedError
	switch {
	case errors.As(err, &crowded):
		d.refusals.Refused(limits.Moving, callerNetwork(ctx), "id", request.GetId())
		return nil, migration.ToStatus(codes.ResourceExhausted, migration.WithRemedy(crowded, remedyCrowded))
	case err != nil:
		return nil, status.Errorf(codes.AlreadyExists, "a migration %s to this host is under way; choose another id", request.GetId())
	}
	for _, id := range forgotten {
		if err := migration.RemoveDir(filepath.Join(d.incomingDir(), id)); err != nil {
			d.log.Warn("the directory of an old migration stays", "migration", id, "error", err)
		}
	}
	return destination, nil
}

// maxPageAddresses bounds how many addresses of one source are tried.
const maxPageAddresses = 16

// absoluteAddresses completes page addresses without a host by the caller's.
func absoluteAddresses(ctx context.Context, request *migratedv1.PrepareIncomingRequest) error {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return errors.New("the caller has no address")
	}
	callerHost, _, err := net.SplitHostPort(caller.Addr.String())
	if err != nil {
		return fmt.Errorf("the caller's address: %w", err)
	}
	if n := len(request.GetPageAddresses()); n > maxPageAddresses {
		return fmt.Errorf("%d page addresses, at most %d are tried", n, maxPageAddresses)
	}
	for i, address := range request.GetPageAddresses() {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return fmt.Errorf("page address: %w", err)
		}
		if host == "" {
			request.PageAddresses[i] = net.JoinHostPort(callerHost, port)
		}
	}
	return nil
}

func (p *peerService) LoadEarlyState(
	stream grpc.ClientStreamingServer[migratedv1.LoadEarlyStateRequest, migratedv1.LoadEarlyStateResponse],
) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	d, err := p.destination(stream.Context(), first.GetId())
	if err != nil {
		return err
	}
	return migration.ToStatus(codes.FailedPrecondition, d.LoadEarlyState(first, stream))
}

func (p *peerService) LoadDeviceState(stream grpc.ClientStreamingServer[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	d, err := p.destination(stream.Context(), first.GetId())
	if err != nil {
		return err
	}
	return handedOver(d.LoadDeviceState(first, stream))
}

// handedOver is the status of a call that may have run the VM.
func handedOver(err error) error {
	if errors.Is(err, migration.ErrNotRun) {
		return migration.ToStatus(codes.Aborted, err)
	}
	return migration.ToStatus(codes.FailedPrecondition, err)
}

func (p *peerService) Run(ctx context.Context, request *migratedv1.RunRequest) (*migratedv1.RunResponse, error) {
	d, err := p.destination(ctx, request.GetId())
	if err != nil {
		return nil, err
	}
	// A source that hangs up does not stop what it asked for half way.
	answer, err := d.Run(context.WithoutCancel(ctx), request)
	return answer, handedOver(err)
}

func (p *peerService) WatchIncoming(request *migratedv1.WatchIncomingRequest, stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
	d, err := p.destination(stream.Context(), request.GetId())
	if err != nil {
		return err
	}
	return p.daemon.watch(stream.Context(), d, incomingInterval, func(view *migratedv1.Migration) error {
		state := view.GetState()
		if state == migratedv1.MigrationState_MIGRATION_STATE_ENDED { // the location says so, to sources that know it
			state = migratedv1.MigrationState_MIGRATION_STATE_FAILED
		}
		answer := &migratedv1.WatchIncomingResponse{
			State: state, Progress: view.GetProgress(), Error: view.GetError(), Location: view.GetLocation(),
		}
		if migration.Terminal(state) {
			r := d.Report()
			answer.Incoming, answer.Timeline = r.GetIncoming(), r.GetTimeline()
		}
		return stream.Send(answer)
	})
}

func (p *peerService) LimitIncoming(ctx context.Context, request *migratedv1.LimitIncomingRequest) (*migratedv1.LimitIncomingResponse, error) {
	d, err := p.destination(ctx, request.GetId())
	if err != nil {
		return nil, err
	}
	holds, err := d.SetBandwidth(request.GetBandwidth())
	if err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	return &migratedv1.LimitIncomingResponse{Bandwidth: holds}, nil
}

func (p *peerService) AbortIncoming(ctx context.Context, request *migratedv1.AbortIncomingRequest) (*migratedv1.AbortIncomingResponse, error) {
	d, err := p.destination(ctx, request.GetId())
	if err != nil {
		return nil, err
	}
	if err := d.Abort(request.GetReason()); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	return &migratedv1.AbortIncomingResponse{}, nil
}

// destination finds the migration that a call is about. Which ids exist is
// nobody's business but their sources'.
func (p *peerService) destination(ctx context.Context, id string) (*migration.Destination, error) {
	d := p.daemon.migrations.destination(id)
	if err := p.daemon.migrations.whyLeft(id); d == nil && err != nil {
		// Its token cannot be read either, and the source must not take this for an answer: another daemon will have one.
		return nil, migration.ToStatus(codes.Unknown, err)
	}
	if d == nil || !d.Authentic(ctx) {
		return nil, status.Errorf(codes.NotFound, "this daemon knows no migration %q to its host", id)
	}
	return d, nil
}
