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
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// incomingInterval is the shortest time between two updates to a source.
const incomingInterval = 50 * time.Millisecond

// peerService serves the calls of source daemons.
type peerService struct {
	migratedv1.UnimplementedPeerServiceServer
	daemon *Daemon
}

func (p *peerService) CheckHost(
	ctx context.Context, _ *migratedv1.CheckHostRequest,
) (*migratedv1.CheckHostResponse, error) {
	room, err := migration.HostRoom(p.daemon.cfg.QEMUCgroup)
	if err != nil {
		p.daemon.log.Warn("cannot find out how much memory this host has left", "error", err)
	}
	return &migratedv1.CheckHostResponse{
		Room: room,
		Results: shown(p.daemon.checkHost(ctx, p.daemon.cfg.RequireSecure),
			migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION),
	}, nil
}

func (p *peerService) PrepareIncoming(
	ctx context.Context, request *migratedv1.PrepareIncomingRequest,
) (*migratedv1.PrepareIncomingResponse, error) {
	if err := migration.AgreeOnProtocol(request); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	if !validID.MatchString(request.GetId()) {
		return nil, status.Errorf(codes.InvalidArgument, "id %q cannot be used", request.GetId())
	}
	if err := p.daemon.maySend(ctx, request.GetMachine().GetName()); err != nil {
		return nil, err
	}
	if err := p.daemon.refuseOwnHost(request); err != nil {
		return nil, err
	}
	if err := errors.Join(
		absoluteAddresses(ctx, request), migration.CheckLabels(request.GetSpec().GetLabels()),
	); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	d, err := p.daemon.expectIncoming(ctx, request)
	if err != nil {
		return nil, err
	}
	answer, err := d.Prepare(ctx)
	return answer, migration.ToStatus(codes.FailedPrecondition, err)
}

// errOwnHost refuses to start a QEMU for a VM that runs on this host.
var errOwnHost = migration.WithRemedy(
	errors.New("the destination is the VM's own host: "+
		"a QEMU that is started like the VM's would have its files and sockets"),
	"name another host; or start a QEMU here yourself, with files and sockets of its own, and name it with --to-qmp")

// refuseOwnHost refuses to start a QEMU if a migration away from this host has the same id and is not over. It is the
// same migration if it has the same specification.
func (d *Daemon) refuseOwnHost(request *migratedv1.PrepareIncomingRequest) error {
	s := d.migrations.source(request.GetId())
	if s == nil || isDone(s) || request.GetDestinationQmp() != "" {
		return nil
	}
	if view, _ := s.Snapshot(); proto.Equal(view.GetSpec(), request.GetSpec()) {
		return migration.ToStatus(codes.FailedPrecondition, errOwnHost)
	}
	return idTaken(fmt.Errorf("%w: a migration %s away from the destination is under way", errIDTaken, request.GetId()))
}

// idTaken returns the gRPC status of an errIDTaken.
func idTaken(err error) error {
	return migration.ToStatus(codes.AlreadyExists, migration.WithRemedy(err, "choose another id"))
}

// expectIncoming makes the destination of a new migration, if fewer than max_incoming are under way.
func (d *Daemon) expectIncoming(
	ctx context.Context, request *migratedv1.PrepareIncomingRequest,
) (*migration.Destination, error) {
	dir := filepath.Join(d.incomingDir(), request.GetId())
	if old := d.migrations.destination(request.GetId()); old != nil {
		old.AskSource(ctx) // so that the id can be used again if this host was not told of a failure
	}
	destination, forgotten, err := d.migrations.addDestination(
		request.GetId(), callerID(ctx), d.cfg.MaxIncoming, func() *migration.Destination {
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
	case errors.Is(err, errUnheard):
		return nil, migration.ToStatus(codes.ResourceExhausted, err)
	case errors.Is(err, errStopping):
		return nil, migration.ToStatus(codes.Unavailable, err)
	case err != nil:
		return nil, idTaken(err)
	}
	for _, id := range forgotten {
		if err := migration.RemoveDir(filepath.Join(d.incomingDir(), id)); err != nil {
			d.log.Warn("cannot remove the directory of an old migration", "migration", id, "error", err)
		}
	}
	return destination, nil
}

// maxPageAddresses is the most addresses that a source may name.
const maxPageAddresses = 16

// absoluteAddresses adds the caller's host to page addresses without a host.
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

func (p *peerService) LoadDeviceState(
	stream grpc.ClientStreamingServer[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse],
) error {
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

// handedOver returns the gRPC status for a call that may have run the VM: Aborted says that it has not.
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
	// If the source hangs up, the command is still completed.
	answer, err := d.Run(context.WithoutCancel(ctx), request)
	return answer, handedOver(err)
}

func (p *peerService) WatchIncoming(
	request *migratedv1.WatchIncomingRequest, stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse],
) error {
	d, err := p.destination(stream.Context(), request.GetId())
	if err != nil {
		return err
	}
	return p.daemon.watch(stream.Context(), d, incomingInterval, func(view *migratedv1.Migration) error {
		state := view.GetState()
		over := migration.Terminal(state)
		if state == migratedv1.MigrationState_MIGRATION_STATE_ENDED { // unknown to older sources; others read the location
			state = migratedv1.MigrationState_MIGRATION_STATE_FAILED
		}
		answer := &migratedv1.WatchIncomingResponse{
			State: state, Progress: view.GetProgress(), Error: view.GetError(), Location: view.GetLocation(),
			Qemu: view.GetDestinationQemu(),
		}
		if over {
			r := d.Report()
			answer.Incoming, answer.Timeline, answer.Defined = r.GetIncoming(), r.GetTimeline(), d.Defined()
			if in, err := d.Incoming(0); err == nil { // fails if no memory was prepared
				answer.Memory = in.GetMemory()
			}
		}
		err := stream.Send(answer)
		if err == nil && over {
			d.Heard()
		}
		return err
	})
}

func (p *peerService) LimitIncoming(
	ctx context.Context, request *migratedv1.LimitIncomingRequest,
) (*migratedv1.LimitIncomingResponse, error) {
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

func (p *peerService) AbortIncoming(
	ctx context.Context, request *migratedv1.AbortIncomingRequest,
) (*migratedv1.AbortIncomingResponse, error) {
	d, err := p.destination(ctx, request.GetId())
	if err != nil {
		return nil, err
	}
	if err := d.Abort(request.GetReason()); err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	return &migratedv1.AbortIncomingResponse{}, nil
}

// destination returns the migration that a call is about, if the caller is its
// source. Other callers do not learn whether it exists.
func (p *peerService) destination(ctx context.Context, id string) (*migration.Destination, error) {
	d := p.daemon.migrations.destination(id)
	if err := p.daemon.migrations.whyLeft(id); d == nil && err != nil {
		// Its token cannot be read either. The source must not take this for a final answer: another release of the
		// daemon will have one.
		return nil, migration.ToStatus(codes.Unknown, err)
	}
	if d == nil || !d.Authentic(ctx) {
		return nil, status.Errorf(codes.NotFound, "this daemon knows no migration %q to its host", id)
	}
	return d, nil
}
