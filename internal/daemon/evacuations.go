// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/internal/evacuation"
	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// defaultEvacuationInterval is the interval of WatchEvacuation if the caller names none.
	defaultEvacuationInterval = 500 * time.Millisecond
	// longestEvacuationID leaves room for the numbers that the ids of its migrations have after it.
	longestEvacuationID = 48
	// mostDestinations and mostNames bound a specification.
	mostDestinations, mostNames, longestName = 64, 1024, 4096
	mostAtOnce                               = 64
)

// evacuationsDir is the directory of the evacuations' files.
func (d *Daemon) evacuationsDir() string { return filepath.Join(d.cfg.StateDir, "evacuations") }

// limitHost sets the bandwidth of all VMs that leave this host together: the lower of the host's own limit and that of
// the evacuation under way.
func (d *Daemon) limitHost() {
	d.pages.SetBandwidth(bandwidth.Lower(d.settings().HostBandwidthLimit(), d.evacuated.Load()))
}

// evacuationService serves the evacuation API.
type evacuationService struct {
	migratedv1.UnimplementedEvacuationServiceServer
	daemon *Daemon
}

func (s *evacuationService) ListVMs(
	ctx context.Context, _ *migratedv1.ListVMsRequest,
) (*migratedv1.ListVMsResponse, error) {
	vms, err := s.daemon.vms(ctx)
	if err != nil {
		return nil, migration.ToStatus(codes.Internal, err)
	}
	return &migratedv1.ListVMsResponse{Vms: vms}, nil
}

func (s *evacuationService) Evacuate(
	_ context.Context, request *migratedv1.EvacuateRequest,
) (*migratedv1.EvacuateResponse, error) {
	spec := proto.CloneOf(request.GetSpec())
	if err := s.daemon.completeEvacuation(spec); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	id := request.GetId()
	if id == "" {
		id = "evacuation-" + strings.ToLower(rand.Text()[:8])
	}
	if !validID.MatchString(id) || len(id) > longestEvacuationID {
		return nil, status.Errorf(codes.InvalidArgument,
			"id %q cannot be used: 1 to %d letters, digits, '.', '_' and '-', beginning with a letter or digit",
			id, longestEvacuationID)
	}
	view, err := s.daemon.evacuations.Begin(id, spec)
	return &migratedv1.EvacuateResponse{Evacuation: view}, evacuationStatus(err)
}

// evacuationStatus returns the gRPC status of an error of evacuation.Manager.
func evacuationStatus(err error) error {
	code := codes.Internal
	switch {
	case err == nil:
		return nil
	case errors.Is(err, evacuation.ErrUnknown):
		code = codes.NotFound
	case errors.Is(err, evacuation.ErrExists):
		code = codes.AlreadyExists
	case errors.Is(err, evacuation.ErrUnderWay), errors.Is(err, evacuation.ErrOver):
		code = codes.FailedPrecondition
	}
	return status.Error(code, err.Error())
}

// completeEvacuation checks a specification, and makes the addresses of its VMs those of this host.
func (d *Daemon) completeEvacuation(spec *migratedv1.EvacuationSpec) error {
	if n := len(spec.GetDestinations()); n == 0 || n > mostDestinations {
		return fmt.Errorf("destinations: %d are named, 1 to %d are allowed", n, mostDestinations)
	}
	for i, address := range spec.GetDestinations() {
		host, port, err := net.SplitHostPort(address)
		if err != nil || host == "" || port == "" {
			return fmt.Errorf("destinations: %q is no HOST:PORT", address)
		}
		if slices.Contains(spec.GetDestinations()[:i], address) {
			return fmt.Errorf("destinations: %s is named twice", address)
		}
	}
	if spec.GetAtOnce() > mostAtOnce {
		return fmt.Errorf("at_once: %d is more than %d", spec.GetAtOnce(), mostAtOnce)
	}
	if err := bandwidth.Check(spec.GetBandwidth()); err != nil {
		return fmt.Errorf("bandwidth: %d: %w", spec.GetBandwidth(), err)
	}
	lists := [][]string{spec.GetVms(), spec.GetExcept()}
	for _, group := range spec.GetApart() {
		lists = append(lists, group.GetVms())
	}
	names := len(spec.GetWeights())
	for _, list := range lists {
		for i, name := range list {
			if names++; names > mostNames || name == "" || len(name) > longestName {
				return fmt.Errorf("a name of a VM is empty or has more than %d bytes, or there are more than %d",
					longestName, mostNames)
			}
			list[i] = libvirt.At(d.cfg.LibvirtSocket, name)
		}
	}
	for name, weight := range spec.GetWeights() {
		if weight == 0 || weight > maxWeight {
			return fmt.Errorf("weights: that of %s is %d, and not 1 to %d", name, weight, maxWeight)
		}
	}
	return checkCommon(spec.GetMigration())
}

// checkCommon refuses settings that all migrations of an evacuation cannot have in common.
func checkCommon(spec *migratedv1.MigrationSpec) error {
	if spec == nil {
		return nil
	}
	rest := proto.CloneOf(spec)
	rest.KeepSource, rest.RequireSecure, rest.NoEarlyLoad, rest.Persistent, rest.UndefineSource =
		false, false, false, false, false
	rest.FreezeLimit, rest.EarlyPauseLimit, rest.QueueLimit = nil, nil, nil
	rest.PrepareLimit, rest.SwitchLimit, rest.TotalLimit = nil, nil, nil
	rest.DestinationTemplate, rest.Bandwidth, rest.Labels = "", 0, nil
	if !proto.Equal(rest, &migratedv1.MigrationSpec{}) {
		return fmt.Errorf("migration: the migrations of an evacuation cannot have in common: %v", rest)
	}
	whole := proto.CloneOf(spec)
	whole.Vm, whole.Destination = "/", "host:1" // each migration has its own
	if whole.Labels == nil {
		whole.Labels = make(map[string]string)
	}
	whole.Labels[evacuation.Label] = "" // each migration has it
	return validateSpec(whole)
}

func (s *evacuationService) GetEvacuation(
	_ context.Context, request *migratedv1.GetEvacuationRequest,
) (*migratedv1.GetEvacuationResponse, error) {
	view, _, err := s.daemon.evacuations.Snapshot(request.GetId())
	return &migratedv1.GetEvacuationResponse{Evacuation: view}, evacuationStatus(err)
}

func (s *evacuationService) ListEvacuations(
	context.Context, *migratedv1.ListEvacuationsRequest,
) (*migratedv1.ListEvacuationsResponse, error) {
	return &migratedv1.ListEvacuationsResponse{Evacuations: s.daemon.evacuations.List()}, nil
}

func (s *evacuationService) WatchEvacuation(
	request *migratedv1.WatchEvacuationRequest, stream grpc.ServerStreamingServer[migratedv1.WatchEvacuationResponse],
) error {
	interval := defaultEvacuationInterval
	if request.GetInterval() != nil {
		interval = max(0, request.GetInterval().AsDuration())
	}
	for last := false; ; {
		view, changed, err := s.daemon.evacuations.Snapshot(request.GetId())
		if err != nil {
			return evacuationStatus(err)
		}
		if err := stream.Send(&migratedv1.WatchEvacuationResponse{Evacuation: view}); err != nil {
			return err
		}
		switch {
		case evacuation.Over(view.GetState()):
			return nil
		case last:
			return status.Error(codes.Unavailable, "the daemon ends, and goes on with the evacuation when it is started again")
		}
		for passed := time.After(interval); !last && (passed != nil || changed != nil); {
			select {
			case <-passed:
				passed = nil
			case <-changed:
				changed = nil
			case <-stream.Context().Done():
				return status.FromContextError(stream.Context().Err()).Err()
			case <-s.daemon.stopping: // as for watch: not before, or callers would come back to this daemon
				last = true
			}
		}
	}
}

func (s *evacuationService) PauseEvacuation(
	_ context.Context, request *migratedv1.PauseEvacuationRequest,
) (*migratedv1.PauseEvacuationResponse, error) {
	view, err := s.daemon.evacuations.Pause(request.GetId())
	return &migratedv1.PauseEvacuationResponse{Evacuation: view}, evacuationStatus(err)
}

func (s *evacuationService) ResumeEvacuation(
	_ context.Context, request *migratedv1.ResumeEvacuationRequest,
) (*migratedv1.ResumeEvacuationResponse, error) {
	view, err := s.daemon.evacuations.Resume(request.GetId())
	return &migratedv1.ResumeEvacuationResponse{Evacuation: view}, evacuationStatus(err)
}

func (s *evacuationService) CancelEvacuation(
	_ context.Context, request *migratedv1.CancelEvacuationRequest,
) (*migratedv1.CancelEvacuationResponse, error) {
	view, err := s.daemon.evacuations.Cancel(request.GetId())
	return &migratedv1.CancelEvacuationResponse{Evacuation: view}, evacuationStatus(err)
}
