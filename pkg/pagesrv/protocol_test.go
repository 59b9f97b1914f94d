// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// TestProtocolOfLanes: a lane is refused, with the reason, if CheckProtocol refuses the version that it names.
func TestProtocolOfLanes(t *testing.T) {
	s := NewServer(Options{CheckProtocol: func(v uint32) error {
		if v != 7 {
			return fmt.Errorf("version %d", v)
		}
		return nil
	}})
	e, err := s.Offer(testID, testToken, openRAM(t, Block{
		ID: "a", Path: ramFile(t, 4096, pattern).Name(), Size: 4096, PageSize: 4096,
	}), isStopped)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	for shown, want := range map[string]codes.Code{
		"none": codes.OK, "7": codes.OK,
		"8": codes.FailedPrecondition, "-1": codes.FailedPrecondition, "x": codes.FailedPrecondition,
	} {
		t.Run(shown, func(t *testing.T) {
			call := metadata.Pairs(pagewire.MigrationIDKey, testID, pagewire.MigrationTokenKey, testToken)
			if shown != "none" {
				call.Set(pagewire.ProtocolKey, shown)
			}
			_, err := s.admit(metadata.NewIncomingContext(t.Context(), call))
			if status.Code(err) != want {
				t.Errorf("%v, want %v", err, want)
			}
		})
	}
}
