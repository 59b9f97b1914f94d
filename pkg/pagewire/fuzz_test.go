// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"bytes"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Both targets check the same: no panic, errors are ErrMalformed, the place of a cut does not matter, and
// what is accepted means the same to the generated code. Their seeds are in testdata/fuzz.

func FuzzDecodeRequest(f *testing.F) {
	f.Fuzz(func(t *testing.T, wire []byte, at int) {
		var whole, pieces Request
		err := Codec{}.Unmarshal(cut(wire), &whole)
		if cutErr := (Codec{}).Unmarshal(cut(wire, at, at+1), &pieces); (cutErr == nil) != (err == nil) {
			t.Fatalf("whole: %v, in pieces: %v", err, cutErr)
		}
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		want := &migratedv1.FetchRequest{}
		if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(wire, want); err != nil {
			t.Fatalf("accepted what protobuf refuses: %v", err)
		}
		if !proto.Equal(generatedRequest(&whole), want) || !proto.Equal(generatedRequest(&pieces), want) {
			t.Fatalf("decoded %+v, in pieces %+v, want %v", whole, pieces, want)
		}
	})
}

func FuzzDecodeReply(f *testing.F) {
	f.Fuzz(func(t *testing.T, wire []byte, at int) {
		var whole, pieces Reply
		err := Codec{}.Unmarshal(cut(wire), &whole)
		if cutErr := (Codec{}).Unmarshal(cut(wire, at, at+1), &pieces); (cutErr == nil) != (err == nil) {
			t.Fatalf("whole: %v, in pieces: %v", err, cutErr)
		}
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		want := &migratedv1.FetchResponse{}
		if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(wire, want); err != nil {
			t.Fatalf("accepted what protobuf refuses: %v", err)
		}
		if whole.Carried() != len(want.GetData()) ||
			whole.Compression() != Compression(want.GetCompression()) && len(whole.Data) > 0 {
			t.Fatalf("%d bytes, %v, want %d, %v",
				whole.Carried(), whole.Compression(), len(want.GetData()), want.GetCompression())
		}
		unpacked(t, want)
		if !proto.Equal(generatedReply(&whole), want) || !proto.Equal(generatedReply(&pieces), want) {
			t.Fatalf("decoded %+v, in pieces %+v", whole, pieces)
		}
		carried := 0
		for _, run := range whole.Runs {
			if run.Carries() {
				carried += int(run.Length)
			}
		}
		if carried != len(whole.Data) || !bytes.Equal(whole.Data, pieces.Data) {
			t.Fatalf("%d bytes of data for runs of %d", len(whole.Data), carried)
		}
	})
}
