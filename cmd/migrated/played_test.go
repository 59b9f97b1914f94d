// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/internal/listing"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	setup     = migratedv1.MigrationState_MIGRATION_STATE_SETUP
	device    = migratedv1.MigrationState_MIGRATION_STATE_DEVICE
	active    = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
	paused    = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED
	resumed   = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
	completed = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
	failed    = migratedv1.MigrationState_MIGRATION_STATE_FAILED
	cancelled = migratedv1.MigrationState_MIGRATION_STATE_CANCELLED
	ended     = migratedv1.MigrationState_MIGRATION_STATE_ENDED
)

// played is a fake daemon: a real gRPC server at a real socket, which answers by the
// id of a migration, see scenes.
type played struct {
	migratedv1.UnimplementedControlServiceServer
	server *grpc.Server

	mu      sync.Mutex
	watches map[string]int // how often each id was watched
}

func startPlayed(socket string) (*played, error) {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	p := &played{server: grpc.NewServer(), watches: make(map[string]int)}
	migratedv1.RegisterControlServiceServer(p.server, p)
	migratedv1.RegisterEvacuationServiceServer(p.server, playedEvacuations{})
	go func() { _ = p.server.Serve(listener) }() // until stop
	return p, nil
}

func (p *played) stop() { p.server.Stop() }

// noon is the start time of all played migrations.
var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// at returns the state of a migration some time after noon.
func at(id string, after time.Duration, state migratedv1.MigrationState, present uint64) *migratedv1.Migration {
	m := &migratedv1.Migration{
		Id: id, Role: migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, State: state, VmName: "postgres",
		Spec:       &migratedv1.MigrationSpec{Vm: "/run/qemu/db.qmp", Destination: "10.0.0.2:7600"},
		Prepared:   state != setup,
		Progress:   &migratedv1.Progress{PagesTotal: 262144, BytesTotal: 1 << 30},
		CreateTime: timestamppb.New(noon), UpdateTime: timestamppb.New(noon.Add(after)),
		Location: migratedv1.Location_LOCATION_SOURCE,
	}
	switch state {
	case device:
		m.Location = migratedv1.Location_LOCATION_NOWHERE
	case active, paused, resumed, completed:
		m.Location = migratedv1.Location_LOCATION_DESTINATION
	}
	if m.GetPrepared() {
		m.Supervision, m.UserfaultfdLabel = migratedv1.Supervision_SUPERVISION_LABELLED, "u:object_r:uffd_t:s0"
	}
	if present > 0 {
		p := m.Progress
		p.PagesPresent, p.PagesZero, p.BytesOnWire, p.BytesDeviceState = present, present/4, present*3072, 210_000
		p.Faults, p.Downtime, p.BytesPerSecond = present/64, durationpb.New(2400*time.Microsecond), 812.4e6
		p.PagesGuessed, p.GuessHits, p.BulkLanes = 512, 0.93, 2
		p.FaultP50, p.FaultP99, p.FaultMax =
			durationpb.New(90*time.Microsecond), durationpb.New(312*time.Microsecond), durationpb.New(12*time.Millisecond)
		p.TimeLeft = durationpb.New(time.Duration(262144-present) * 10 * time.Microsecond)
	}
	if state == completed {
		m.Progress.TimeLeft, m.Progress.BytesPerSecond, m.Progress.BulkLanes, m.Progress.Residency =
			nil, 0, 0, durationpb.New(1840*time.Millisecond)
	}
	if state == failed {
		m.Error = &migratedv1.MigrationError{
			Message:  "loading the device state at the destination: qemu: missing device 0000:00:05.0/virtio-net",
			Remedy:   "start both QEMUs with the same devices, or migrate without --template",
			VmStatus: "it runs at the source",
			Reason:   migratedv1.Reason_REASON_LOAD_FAILED,
		}
	}
	if state == ended {
		m.Location = migratedv1.Location_LOCATION_ENDED
		m.Error = &migratedv1.MigrationError{
			Message:  "the VM ended by itself on the destination: its guest powered off",
			VmStatus: "the VM has ended",
			Reason:   migratedv1.Reason_REASON_GUEST_SHUTDOWN,
		}
	}
	return m
}

const ms = time.Millisecond

// loud returns a migration of a VM whose name and error have escape sequences.
func loud(id string) *migratedv1.Migration {
	m := at(id, 0, failed, 0)
	m.VmName, m.Error = "db\x1b[2J", &migratedv1.MigrationError{Message: "QEMU says \u009b1m\nand \u202emore"}
	return m
}

// scenes are the messages that Watch sends, by id. A nil message ends the stream
// with UNAVAILABLE; the messages after it are for the next Watch of the id.
var scenes = map[string][]*migratedv1.Migration{
	"db-1": {
		at("db-1", 0, setup, 0), prepared("db-1", 200*ms), at("db-1", 300*ms, device, 0),
		at("db-1", 310*ms, active, 64), at("db-1", 800*ms, active, 60_000), // the second is not printed: less than 1 s later
		at("db-1", 1310*ms, active, 113_000), at("db-1", 2150*ms, completed, 262144),
	},
	"bad-3": {at("bad-3", 0, setup, 0), at("bad-3", 100*ms, device, 0), at("bad-3", 150*ms, failed, 0)},
	// ends-11 ends while it is watched; see Cancel.
	"ends-11": {prepared("ends-11", 0), at("ends-11", 90*ms, cancelled, 0)},
	"loud-12": {loud("loud-12"), loud("loud-12")},
	"old-4":   {at("old-4", 0, setup, 0), at("old-4", 90*ms, cancelled, 0)},
	"paused-5": {
		at("paused-5", 0, active, 9000), at("paused-5", 10*ms, paused, 9000), at("paused-5", 20*ms, resumed, 9000),
		at("paused-5", 30*ms, active, 9000), at("paused-5", 40*ms, completed, 262144),
	},
	"lost-7": {at("lost-7", 0, active, 9000), nil},
	"off-10": {at("off-10", 0, active, 9000), at("off-10", 700*ms, ended, 9000)},
	"slow-8": {limited("slow-8", 1310*ms), at("slow-8", 2150*ms, completed, 262144)},
	"cut-6": {
		at("cut-6", 0, active, 9000), nil,
		at("cut-6", 500*ms, active, 99_000), at("cut-6", 600*ms, completed, 262144),
	},
}

func prepared(id string, after time.Duration) *migratedv1.Migration {
	m := at(id, after, setup, 0)
	m.Prepared = true
	return m
}

func limited(id string, after time.Duration) *migratedv1.Migration {
	m := at(id, after, active, 113_000)
	m.Progress.Bandwidth, m.Progress.SweepBytesPerSecond = 500<<20, 498.3*(1<<20)
	return m
}

func (p *played) Watch(r *migratedv1.WatchRequest, stream grpc.ServerStreamingServer[migratedv1.WatchResponse]) error {
	p.mu.Lock()
	nth := p.watches[r.GetId()]
	p.watches[r.GetId()]++
	p.mu.Unlock()
	switch r.GetId() {
	case "silent-8":
		<-stream.Context().Done()
		return nil
	case "endless-9":
		if err := stream.Send(&migratedv1.WatchResponse{Migration: at(r.GetId(), 0, active, 9000)}); err != nil {
			return err
		}
		<-stream.Context().Done()
		return nil
	case "lost-7":
		if nth > 0 { // the first message has arrived
			go p.server.Stop()
			<-stream.Context().Done()
			return nil
		}
	}
	scene, known := scenes[r.GetId()]
	if !known {
		return notFound(r.GetId())
	}
	cuts := 0
	for _, m := range scene {
		if m == nil {
			cuts++
		}
	}
	skip := min(nth, cuts) // earlier Watches have sent the parts before these cuts
	for _, m := range scene {
		switch {
		case m == nil && skip == 0:
			return status.Error(codes.Unavailable, "stopping")
		case m == nil:
			skip--
		case skip == 0:
			if err := stream.Send(&migratedv1.WatchResponse{Migration: m}); err != nil {
				return err
			}
		}
	}
	return nil
}

func notFound(id string) error {
	return status.Errorf(codes.NotFound, "this daemon knows no migration %q", id)
}

// listed returns the migrations of the list, newest first.
func listed() []*migratedv1.Migration {
	arriving := at("web-2", time.Second, completed, 262144)
	arriving.Role, arriving.VmName = migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION, ""
	arriving.Spec.Labels = map[string]string{"team": "web", "evacuation": "host-a-7"}
	return []*migratedv1.Migration{at("db-1", 800*ms, active, 113_000), arriving, at("bad-3", 150*ms, failed, 0)}
}

// List returns pages of one migration each.
func (p *played) List(_ context.Context, r *migratedv1.ListRequest) (*migratedv1.ListResponse, error) {
	want, err := listing.NewFilter(r.GetFilter())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var all []*migratedv1.Migration
	for _, m := range listed() {
		if want.Matches(m) {
			all = append(all, m)
		}
	}
	answer := &migratedv1.ListResponse{ResourceVersion: "run-7"}
	index := len(r.GetPageToken())
	if index < len(all) {
		answer.Migrations = all[index : index+1]
	}
	if index+1 < len(all) {
		answer.NextPageToken = strings.Repeat("x", index+1)
	}
	return answer, nil
}

// WatchList sends that the first migration has completed, and that the second one was deleted.
func (p *played) WatchList(
	r *migratedv1.WatchListRequest, stream grpc.ServerStreamingServer[migratedv1.WatchListResponse],
) error {
	want, err := listing.NewFilter(r.GetFilter())
	if err != nil || r.GetResourceVersion() != "run-7" {
		return status.Error(codes.InvalidArgument, "another filter, or another version")
	}
	for i, e := range []*migratedv1.WatchListResponse{
		{Event: migratedv1.ListEvent_LIST_EVENT_CHANGED, Migration: at("db-1", 2150*ms, completed, 262144)},
		{Event: migratedv1.ListEvent_LIST_EVENT_BOOKMARK},
		{Event: migratedv1.ListEvent_LIST_EVENT_REMOVED, Migration: listed()[1]},
	} {
		if e.ResourceVersion = fmt.Sprint("run-", 8+i); e.GetMigration() != nil && !want.Matches(e.GetMigration()) {
			continue
		}
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	<-stream.Context().Done()
	return nil
}

func (p *played) Delete(_ context.Context, r *migratedv1.DeleteRequest) (*migratedv1.DeleteResponse, error) {
	switch r.GetId() {
	case "old-4":
		return &migratedv1.DeleteResponse{}, nil
	case "db-1":
		return nil, refusal(codes.FailedPrecondition, "the migration is not over",
			"wait for its end, or cancel it at its source")
	}
	return nil, notFound(r.GetId())
}

func (p *played) Get(_ context.Context, r *migratedv1.GetRequest) (*migratedv1.GetResponse, error) {
	scene, known := scenes[r.GetId()]
	if !known {
		return nil, notFound(r.GetId())
	}
	// The last message but one, which of db-1 is under way.
	m := scene[len(scene)-2]
	if r.GetId() == "bad-3" {
		m = scene[len(scene)-1]
	}
	return &migratedv1.GetResponse{Migration: m}, nil
}

func (p *played) Prepare(_ context.Context, r *migratedv1.PrepareRequest) (*migratedv1.PrepareResponse, error) {
	m, err := begun(r.GetId(), r.GetSpec())
	return &migratedv1.PrepareResponse{Migration: m}, err
}

func (p *played) Start(_ context.Context, r *migratedv1.StartRequest) (*migratedv1.StartResponse, error) {
	m, err := begun(r.GetId(), r.GetSpec())
	return &migratedv1.StartResponse{Migration: m}, err
}

// begun returns the answer to Prepare and Start, with the same spec.
func begun(id string, spec *migratedv1.MigrationSpec) (*migratedv1.Migration, error) {
	if id == "" {
		id = "db-1"
	}
	m := proto.CloneOf(at(id, 0, setup, 0))
	m.Spec = spec
	switch {
	case id == "taken":
		return nil, status.Error(codes.AlreadyExists, "migration taken exists with another specification")
	case spec.GetVm() == "/busy.qmp":
		return nil, refusal(codes.FailedPrecondition, "the VM cannot migrate: its memory is not shared",
			"start it with -object memory-backend-file,share=on")
	case spec.GetDestination() == "away:7600":
		return nil, refusal(codes.Unavailable, "connecting to away:7600: no route to host", "see that its daemon runs")
	}
	return m, nil
}

// refusal returns an error with a remedy, as daemons make it.
func refusal(code codes.Code, message, remedy string) error {
	s, err := status.New(code, message).WithDetails(&migratedv1.MigrationError{
		Remedy: remedy, VmStatus: "it runs at the source, untouched",
	})
	if err != nil {
		return err
	}
	return s.Err()
}

func (p *played) Cancel(_ context.Context, r *migratedv1.CancelRequest) (*migratedv1.CancelResponse, error) {
	switch r.GetId() {
	case "ends-11":
		return &migratedv1.CancelResponse{Migration: prepared("ends-11", 0)}, nil
	case "old-4":
		return &migratedv1.CancelResponse{Migration: at("old-4", 90*ms, cancelled, 0)}, nil
	case "db-1":
		return nil, status.Error(codes.FailedPrecondition, "migration db-1 has switched over: the VM runs at the destination")
	}
	return nil, notFound(r.GetId())
}

func (p *played) SetBandwidth(
	_ context.Context, r *migratedv1.SetBandwidthRequest,
) (*migratedv1.SetBandwidthResponse, error) {
	switch r.GetId() {
	case "db-1": // its daemon has a limit of 1 GiB/s
		return &migratedv1.SetBandwidthResponse{Bandwidth: bandwidth.Lower(r.GetBandwidth(), 1<<30)}, nil
	case "old-4":
		return nil, status.Error(codes.FailedPrecondition, "this migration is over")
	}
	return nil, notFound(r.GetId())
}

func (p *played) Check(_ context.Context, r *migratedv1.CheckRequest) (*migratedv1.CheckResponse, error) {
	source, destination := migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE,
		migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION
	answer := &migratedv1.CheckResponse{Results: []*migratedv1.CheckResult{
		{Subject: "userfaultfd", Status: migratedv1.CheckStatus_CHECK_STATUS_OK,
			Detail: "the kernel has it (6.18)", Host: source},
	}}
	if r.GetDestination() != "" {
		answer.Results = append(answer.Results, &migratedv1.CheckResult{
			Subject: "huge pages", Status: migratedv1.CheckStatus_CHECK_STATUS_WARNING,
			Detail: r.GetDestination() + " has 12 free,\nthe VM uses 16",
			Remedy: "reserve more: sysctl vm.nr_hugepages=20", Host: destination})
	}
	if r.GetVm() != "" {
		answer.Results = append(answer.Results, &migratedv1.CheckResult{
			Subject: "memory backend", Status: migratedv1.CheckStatus_CHECK_STATUS_FAILED,
			Detail: "ram0 of " + r.GetVm() + " is not shared",
			Remedy: "start the VM with\n-object memory-backend-file,share=on", Host: source})
	}
	return answer, nil
}

func (p *played) GetVersion(context.Context, *migratedv1.GetVersionRequest) (*migratedv1.GetVersionResponse, error) {
	return &migratedv1.GetVersionResponse{Version: "1.2.3", Protocol: 1}, nil
}
