// SPDX-License-Identifier: Apache-2.0

package version_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// testdata/wire-vN has messages of version N of the protocol. A change that needs other files raises version.Protocol.
var writeGolden = flag.Bool("write-golden", false, "write testdata/wire-vN for a new version.Protocol")

func golden(t *testing.T, v int, name string, present []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", fmt.Sprintf("wire-v%d", v), name)
	if _, err := os.Lstat(path); err != nil && *writeGolden {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, present, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return want
}

// TestFieldsStay: a field of a message between daemons keeps its number, its type and its name (which kept files have),
// as long as a version with it is supported. Fields may be added, because older daemons skip them.
func TestFieldsStay(t *testing.T) {
	present := fieldsBetweenDaemons()
	for v := version.OldestProtocol; v <= version.Protocol; v++ {
		for line := range strings.Lines(string(golden(t, v, "fields.txt", []byte(strings.Join(present, ""))))) {
			if !slices.Contains(present, line) {
				t.Errorf("version %d has %q, and the present one has not", v, strings.TrimSpace(line))
			}
		}
	}
}

// fieldsBetweenDaemons returns a line for each call between daemons, and for each field of their messages.
func fieldsBetweenDaemons() (lines []string) {
	seen := map[protoreflect.FullName]bool{}
	var message func(protoreflect.MessageDescriptor)
	message = func(m protoreflect.MessageDescriptor) {
		if seen[m.FullName()] || !strings.HasPrefix(string(m.FullName()), "migrated.") {
			return
		}
		seen[m.FullName()] = true
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			kind := f.Kind().String()
			if f.Message() != nil {
				kind = string(f.Message().FullName())
				message(f.Message())
			}
			lines = append(lines, fmt.Sprintf("%s %d %s %s %s\n", m.FullName(), f.Number(), f.Cardinality(), kind, f.Name()))
			if f.Enum() != nil {
				for i := range f.Enum().Values().Len() {
					value := f.Enum().Values().Get(i)
					lines = append(lines, fmt.Sprintf("%s %d %s\n", f.Enum().FullName(), value.Number(), value.Name()))
				}
			}
		}
	}
	for _, service := range []protoreflect.ServiceDescriptor{
		migratedv1.File_migrated_v1_peer_proto.Services().ByName("PeerService"),
		migratedv1.File_migrated_v1_pages_proto.Services().ByName("PageService"),
	} {
		for i := range service.Methods().Len() {
			m := service.Methods().Get(i)
			lines = append(lines, fmt.Sprintf("%s(%s) %s, streams %t %t\n",
				m.FullName(), m.Input().FullName(), m.Output().FullName(), m.IsStreamingClient(), m.IsStreamingServer()))
			message(m.Input())
			message(m.Output())
		}
	}
	slices.Sort(lines)
	return slices.Compact(lines)
}

// encoded returns a message as it is sent.
func encoded(t *testing.T, message any) []byte {
	t.Helper()
	sent, err := pagewire.Codec{}.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	defer sent.Free()
	return sent.Materialize()
}

// received returns a message as gRPC's library passes it to a codec.
func received(message []byte) mem.BufferSlice { return mem.BufferSlice{mem.SliceBuffer(message)} }

// TestFramesOfEveryVersionAreRead: frames of all supported versions are read, and those of the present version are
// written as before.
func TestFramesOfEveryVersionAreRead(t *testing.T) {
	request := &pagewire.Request{
		Ranges: []pagewire.Range{{Block: 1, Offset: 4096, Length: 8192}, {Offset: 1 << 40, Length: 4096}},
	}
	reply := &pagewire.Reply{
		Runs: []pagewire.Run{{Block: 1, Offset: 4096, Length: 4096, Zero: true}, {Block: 1, Offset: 8192, Length: 8}},
		Data: []byte("page of8"),
	}
	generated := &migratedv1.FetchRequest{}
	for _, r := range request.Ranges {
		generated.Ranges = append(generated.Ranges, &migratedv1.PageRange{Block: r.Block, Offset: r.Offset, Length: r.Length})
	}
	sent := map[string][]byte{"request": encoded(t, request), "reply": encoded(t, reply)}
	for v := version.OldestProtocol; v <= version.Protocol; v++ {
		for name, present := range sent {
			if want := golden(t, v, name, present); v == version.Protocol && !bytes.Equal(present, want) {
				t.Errorf("a %s is sent as %x, in version %d it was %x", name, present, v, want)
			}
		}
		var gotRequest pagewire.Request
		if err := (pagewire.Codec{}).Unmarshal(received(golden(t, v, "request", nil)), &gotRequest); err != nil ||
			!slices.Equal(gotRequest.Ranges, request.Ranges) {
			t.Errorf("version %d: request %v, %v", v, gotRequest, err)
		}
		var gotReply pagewire.Reply
		if err := (pagewire.Codec{}).Unmarshal(received(golden(t, v, "reply", nil)), &gotReply); err != nil ||
			!slices.Equal(gotReply.Runs, reply.Runs) || !bytes.Equal(gotReply.Data, reply.Data) {
			t.Errorf("version %d: reply %v, %v", v, &gotReply, err)
		}
		gotReply.Release()
		if got := new(migratedv1.FetchRequest); proto.Unmarshal(golden(t, v, "request", nil), got) != nil ||
			!proto.Equal(got, generated) {
			t.Errorf("version %d: the generated code reads %v", v, got)
		}
	}
}
