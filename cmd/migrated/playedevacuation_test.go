// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// playedEvacuations is a fake evacuation API, which answers by the id: "e1" moves two of three VMs, "empty" the only
// one, "plan" none, and "broken" has no plan. "early" is cancelled without a plan, "blind" cannot see what it has left,
// and "restart" is of a daemon that ends and takes a while to come back.
type playedEvacuations struct {
	migratedv1.UnimplementedEvacuationServiceServer
}

const (
	waits = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING
	moves = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVING
	moved = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED
	stays = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE
)

// steps returns the successive states of an evacuation.
func steps(id string, spec *migratedv1.EvacuationSpec) (all []*migratedv1.Evacuation) {
	view := &migratedv1.Evacuation{
		Id: id, Spec: spec, State: migratedv1.EvacuationState_EVACUATION_STATE_PLANNING, CreateTime: timestamppb.New(noon),
	}
	then := func(change func()) {
		change()
		all = append(all, proto.CloneOf(view))
	}
	then(func() {})
	if id == "broken" || id == "early" {
		then(func() {
			view.State = migratedv1.EvacuationState_EVACUATION_STATE_FAILED
			if id == "early" {
				view.State = migratedv1.EvacuationState_EVACUATION_STATE_CANCELLED
			}
			view.PlanTime = timestamppb.New(noon)
			view.Error = &migratedv1.MigrationError{
				Message: "no destination can take VMs of this host",
				Remedy:  "see what each lacks with 'migrated check --to HOST'",
			}
		})
		return all
	}
	vm := func(name, destination string, state migratedv1.EvacuatedVMState) *migratedv1.EvacuatedVM {
		return &migratedv1.EvacuatedVM{
			Vm: "/run/qemu/" + name + ".qmp", Name: name, Pid: 4711, Bytes: 4 << 30, BytesHeld: 1 << 30,
			Destination: destination, State: state, Location: migratedv1.Location_LOCATION_SOURCE,
		}
	}
	db, web, gpu := vm("db", "10.0.0.2:7600", waits), vm("web", "10.0.0.3:7600", waits), vm("gpu", "", stays)
	gpu.Error = &migratedv1.MigrationError{
		Message: "VM: the device gpu0 is the host's (VFIO)", Remedy: "unplug the device, or shut the VM down",
	}
	web.Warnings = []string{"disks: web.qcow2 has cache=writeback"}
	then(func() {
		view.State, view.PlanTime = migratedv1.EvacuationState_EVACUATION_STATE_RUNNING, timestamppb.New(noon)
		view.Vms = []*migratedv1.EvacuatedVM{db, web, gpu}
		view.Warnings = []string{"10.0.0.4:7600 is left out: no route to host"}
		if id == "empty" || id == "blind" {
			view.Vms, view.Warnings = []*migratedv1.EvacuatedVM{db}, nil
		}
		if spec.GetPlanOnly() {
			view.State = migratedv1.EvacuationState_EVACUATION_STATE_PLANNED
		}
	})
	if spec.GetPlanOnly() {
		return all
	}
	then(func() {
		db.State, db.Migration, db.Attempts = moves, id+"-1-1", 1
		db.MigrationState = active
	})
	then(func() {
		db.State, db.Location, db.Downtime = moved, migratedv1.Location_LOCATION_DESTINATION,
			durationpb.New(18*time.Millisecond)
		web.State, web.Migration, web.Waiting = moves, id+"-2-1", "the destination is full; it is the next"
		web.MigrationState = setup
	})
	then(func() {
		web.State, web.Location, web.Downtime = moved, migratedv1.Location_LOCATION_DESTINATION,
			durationpb.New(21*time.Millisecond)
		view.State = migratedv1.EvacuationState_EVACUATION_STATE_DONE
		if id == "blind" {
			view.Error = &migratedv1.MigrationError{
				Message: "whether VMs came to this host after the plan was made is not known: too many open files",
				Remedy:  "see which VMs there are with 'migrated vms'",
			}
		}
	})
	return all
}

func (playedEvacuations) Evacuate(
	_ context.Context, request *migratedv1.EvacuateRequest,
) (*migratedv1.EvacuateResponse, error) {
	if request.GetId() == "busy" {
		return nil, status.Error(codes.FailedPrecondition, "another evacuation is under way: e0")
	}
	playedEvacuation.spec, playedEvacuation.back = request.GetSpec(), time.Now().Add(time.Second)
	return &migratedv1.EvacuateResponse{Evacuation: steps(request.GetId(), request.GetSpec())[0]}, nil
}

// playedEvacuation has the specification of the last evacuation, and when the daemon is back if it restarts. A script
// has one at a time.
var playedEvacuation struct {
	spec *migratedv1.EvacuationSpec
	back time.Time
}

func (playedEvacuations) WatchEvacuation(
	request *migratedv1.WatchEvacuationRequest, stream grpc.ServerStreamingServer[migratedv1.WatchEvacuationResponse],
) error {
	if request.GetId() == "restart" && time.Now().Before(playedEvacuation.back) {
		view := steps("restart", playedEvacuation.spec)[0]
		if err := stream.Send(&migratedv1.WatchEvacuationResponse{Evacuation: view}); err != nil {
			return err
		}
		return status.Error(codes.Unavailable, "stopping")
	}
	for _, view := range steps(request.GetId(), playedEvacuation.spec) {
		if err := stream.Send(&migratedv1.WatchEvacuationResponse{Evacuation: view}); err != nil {
			return err
		}
	}
	return nil
}

func (playedEvacuations) GetEvacuation(
	_ context.Context, request *migratedv1.GetEvacuationRequest,
) (*migratedv1.GetEvacuationResponse, error) {
	if request.GetId() == "unknown" {
		return nil, status.Error(codes.NotFound, `this daemon knows no such evacuation: "unknown"`)
	}
	return &migratedv1.GetEvacuationResponse{Evacuation: steps(request.GetId(), &migratedv1.EvacuationSpec{})[3]}, nil
}

func (playedEvacuations) ListEvacuations(
	context.Context, *migratedv1.ListEvacuationsRequest,
) (*migratedv1.ListEvacuationsResponse, error) {
	all := steps("e1", &migratedv1.EvacuationSpec{Destinations: []string{"10.0.0.2:7600", "10.0.0.3:7600"}})
	return &migratedv1.ListEvacuationsResponse{Evacuations: all[len(all)-1:]}, nil
}

func (playedEvacuations) PauseEvacuation(
	_ context.Context, request *migratedv1.PauseEvacuationRequest,
) (*migratedv1.PauseEvacuationResponse, error) {
	view := steps(request.GetId(), &migratedv1.EvacuationSpec{})[3]
	view.State = migratedv1.EvacuationState_EVACUATION_STATE_PAUSED
	return &migratedv1.PauseEvacuationResponse{Evacuation: view}, nil
}

func (playedEvacuations) ListVMs(context.Context, *migratedv1.ListVMsRequest) (*migratedv1.ListVMsResponse, error) {
	return &migratedv1.ListVMsResponse{Vms: []*migratedv1.HostVM{
		{Vm: "/run/qemu/db.qmp", Name: "db", Pid: 4711},
		{Vm: "libvirt:web", Name: "web", Pid: 4712, Migration: "web-1"},
		{Name: "pod", Pid: 4713, Elsewhere: true},
		{Name: "old", Pid: 4714, Problem: "no QMP socket on QEMU's command line is reachable from here"},
	}}, nil
}
