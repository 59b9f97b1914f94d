// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A peer stands in for the destination daemon in tests around the commit point, where a real daemon cannot be made to
// answer as the test needs. The source and its QEMU are real.
type peer struct {
	migratedv1.UnimplementedPeerServiceServer

	load func(context.Context) error // called when the whole device state has come; nil: it loads
	run  func(attempt int) (*migratedv1.RunResponse, error)
	// abort answers AbortIncoming; nil: the peer gives up.
	abort func(attempt int) error

	early bool // loads the device state early
	// earlyAnswer answers LoadEarlyState, where sent says whether a state came; nil: it loads that.
	earlyAnswer func(sent bool) *migratedv1.LoadEarlyStateResponse
	endless     bool // the last page never arrives
	// watch answers WatchIncoming after the peer was told to run the VM.
	watch        func(grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error
	limit        uint64                    // of the last LimitIncoming
	bandwidth    uint64                    // of the last PrepareIncoming
	incoming     *migratedv1.MemoryMap     // the answer to ShowIncoming
	earlyMisses  bool                      // LoadEarlyState fails because a page is missing
	earlyCalls   int                       // number of calls of LoadEarlyState
	spec         *migratedv1.MigrationSpec // of the migration, without VM and destination; nil: the default
	prepareCalls int                       // number of calls of PrepareIncoming
	log          slog.Handler              // of the source; nil: its log is discarded
	emulator     string                    // the source's QEMU; empty: the installed one

	mu          sync.Mutex
	runs        int                    // number of calls of Run
	runRequest  *migratedv1.RunRequest // came with the device state; nil: none
	runAnswered bool                   // runRequest was answered
	aborts      int                    // number of calls of AbortIncoming
	aborted     bool                   // answered that it has given up
	bytes       uint64                 // of device state
}

func (p *peer) PrepareIncoming(
	_ context.Context, r *migratedv1.PrepareIncomingRequest,
) (*migratedv1.PrepareIncomingResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prepareCalls++
	p.bandwidth = r.GetBandwidth()
	return &migratedv1.PrepareIncomingResponse{
		Protocol: r.GetProtocol(), RamBlocks: r.GetMachine().GetRamBlocks(), Early: p.early && r.GetEarly(),
	}, nil
}

func (p *peer) LoadEarlyState(
	stream grpc.ClientStreamingServer[migratedv1.LoadEarlyStateRequest, migratedv1.LoadEarlyStateResponse],
) error {
	answer := &migratedv1.LoadEarlyStateResponse{}
	p.mu.Lock()
	p.earlyCalls++
	p.mu.Unlock()
	sent := false
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if p.earlyAnswer != nil {
				answer = p.earlyAnswer(sent)
			}
			return stream.SendAndClose(answer)
		}
		if err != nil {
			return err
		}
		sent = sent || len(m.GetSections()) > 0
		switch {
		case len(m.GetSections()) == 0:
		case p.earlyMisses:
			answer.Reason, answer.Missed = "a page is missing", []*migratedv1.Memory{{}}
		default:
			answer.Loaded = true
		}
	}
}

func (p *peer) LoadDeviceState(
	stream grpc.ClientStreamingServer[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse],
) error {
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if p.load != nil {
				if err := p.load(stream.Context()); err != nil {
					return err
				}
			}
			answer := &migratedv1.LoadDeviceStateResponse{Bytes: p.bytes}
			p.mu.Lock()
			if p.runRequest != nil {
				answer.Run, _ = runAtOnce(0)
				p.runAnswered = true
			}
			p.mu.Unlock()
			return stream.SendAndClose(answer)
		}
		if err != nil {
			return err
		}
		p.mu.Lock()
		if run := m.GetRun(); run != nil {
			p.runRequest = run
		}
		p.bytes += uint64(len(m.GetData()))
		p.mu.Unlock()
	}
}

func (p *peer) Run(context.Context, *migratedv1.RunRequest) (*migratedv1.RunResponse, error) {
	p.mu.Lock()
	p.runs++
	attempt := p.runs
	p.mu.Unlock()
	return p.run(attempt)
}

func (p *peer) WatchIncoming(
	_ *migratedv1.WatchIncomingRequest, stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse],
) error {
	p.mu.Lock()
	told := p.runs > 0 || p.runAnswered
	wait, watch := !told || p.endless, p.watch
	p.mu.Unlock()
	if told && watch != nil {
		return watch(stream)
	}
	if wait { // it stays prepared, or stays in post-copy
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	return stream.Send(&migratedv1.WatchIncomingResponse{
		State:    migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		Progress: &migratedv1.Progress{PagesTotal: 1, PagesPresent: 1},
	})
}

func (p *peer) AbortIncoming(
	context.Context, *migratedv1.AbortIncomingRequest,
) (*migratedv1.AbortIncomingResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.aborts++
	if p.abort != nil {
		if err := p.abort(p.aborts); err != nil {
			return nil, err
		}
	}
	p.aborted = true
	return &migratedv1.AbortIncomingResponse{}, nil
}

func runAtOnce(int) (*migratedv1.RunResponse, error) {
	return &migratedv1.RunResponse{
		ResumeTime: durationpb.New(time.Millisecond), ServeTime: durationpb.New(time.Millisecond),
	}, nil
}

// A stage is a source with a real QEMU and a peer.
type stage struct {
	source  *Source
	peer    *peer
	records *Records
	vm      string // QMP socket for the source
	other   string // QMP socket for somebody who interferes
	pages   *pagesrv.Server
	qemu    *exec.Cmd
}

func newStage(
	t *testing.T, ctx context.Context, //nolint:revive // t first, as everywhere
	run func(attempt int) (*migratedv1.RunResponse, error),
) *stage {
	t.Helper()
	return newStageWith(t, ctx, &peer{run: run})
}

func newStageWith(
	t *testing.T, ctx context.Context, p *peer, devices ...string, //nolint:revive // t first, as everywhere
) *stage {
	t.Helper()
	dir := t.TempDir()
	ram, err := os.CreateTemp("/dev/shm", "handover-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(ram.Name()) })
	if err := ram.Close(); err != nil { // else it would not be removed as one that nobody needs
		t.Fatal(err)
	}
	s := &stage{
		peer: p, vm: filepath.Join(dir, "qmp.sock"), other: filepath.Join(dir, "other.sock"),
		pages: pagesrv.NewServer(pagesrv.Options{}),
	}
	s.qemu = exec.Command(cmp.Or(p.emulator, "qemu-system-x86_64"), append([]string{
		"-machine", "q35,memory-backend=ram0", "-accel", "tcg", "-m", "32M",
		"-object", "memory-backend-file,id=ram0,size=32M,share=on,mem-path=" + ram.Name(),
		"-nodefaults", "-display", "none",
		"-qmp", "unix:" + s.other + ",server=on,wait=off", "-qmp", "unix:" + s.vm + ",server=on,wait=off",
	}, devices...)...)
	s.qemu.Stderr = os.Stderr
	if err := s.qemu.Start(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() {
		_ = s.qemu.Process.Kill()
		_ = s.qemu.Wait() // it was killed, or quit
	})
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		client, err := qmp.Dial(t.Context(), s.vm) // the source waits less for it than QEMU may need to start
		if err == nil {
			_ = client.Disconnect()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("QEMU does not come up: %v", err)
		}
	}

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	migratedv1.RegisterPeerServiceServer(server, s.peer)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)

	if s.records, err = OpenRecords(filepath.Join(dir, "records")); err != nil {
		t.Fatal(err)
	}
	// A busy machine may take longer than the default of freeze_limit.
	spec := &migratedv1.MigrationSpec{FreezeLimit: durationpb.New(2 * time.Minute)}
	if p.spec != nil {
		spec = p.spec
	}
	spec.Vm, spec.Destination = s.vm, listener.Addr().String()
	if p.log == nil {
		p.log = slog.DiscardHandler
	}
	s.source = NewSource(ctx, SourceConfig{
		ID: "m1", Spec: spec,
		Pages: s.pages, Records: s.records,
		Dial: dialPlain,
		Log:  slog.New(p.log),
	})
	t.Cleanup(func() {
		s.source.cancel(errors.New("the test is over"))
		<-s.source.Done()
	})
	return s
}

func dialPlain(address string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	return grpc.NewClient(address, options...)
}

// command executes a QMP command at QEMU's other monitor, as somebody else would.
func (s *stage) command(t *testing.T, name string, arguments, answer any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	client, err := qmp.Dial(ctx, s.other)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(client.Do(ctx, name, arguments, answer), client.Disconnect()); err != nil {
		t.Fatal(err)
	}
}

// vmRuns asks QEMU whether the VM runs.
func (s *stage) vmRuns(t *testing.T) bool {
	t.Helper()
	var state struct {
		Running bool `json:"running"`
	}
	s.command(t, "query-status", nil, &state)
	return state.Running
}

// handedOver reports whether there is a committed record of the VM.
func (s *stage) handedOver(t *testing.T) bool {
	t.Helper()
	_, found, err := s.records.ForVM(s.qemu.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// expect waits for the end of the migration, and fails the test unless it ended in state want with words in its error.
func (s *stage) expect(t *testing.T, want migratedv1.MigrationState, words string) {
	t.Helper()
	<-s.source.Done()
	view, _ := s.source.Snapshot()
	e := view.GetError()
	if view.GetState() != want || !strings.Contains(e.GetMessage()+e.GetRemedy()+e.GetVmStatus(), words) {
		t.Fatalf("migration is %v, %v; want %v and %q", view.GetState(), e, want, words)
	}
}
