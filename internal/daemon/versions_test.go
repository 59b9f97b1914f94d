// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestSourceOfAnotherProtocol: a source without a common version of the protocol is refused before anything is made for
// it. The status has a reason for programs.
func TestSourceOfAnotherProtocol(t *testing.T) {
	d := startPlain(t)
	client := migratedv1.NewPeerServiceClient(connect(t, d, honest))
	for name, c := range map[string]struct {
		oldest, newest uint32
		reason         migratedv1.Reason
	}{
		"too new": {version.Protocol + 1, version.Protocol + 2, migratedv1.Reason_REASON_VERSION},
		"too old": {version.OldestToBegin - 1, version.OldestToBegin - 1, migratedv1.Reason_REASON_VERSION},
		// It is refused, too, but not for its version: it has no machine.
		"newer, and knows ours": {version.OldestToBegin, version.Protocol + 1, migratedv1.Reason_REASON_UNSPECIFIED},
	} {
		t.Run(name, func(t *testing.T) {
			id := "m-" + name[:3]
			_, err := client.PrepareIncoming(t.Context(), &migratedv1.PrepareIncomingRequest{
				Id: id, Protocol: c.newest, OldestProtocol: c.oldest, Machine: &migratedv1.SourceMachine{Name: "vm"},
			})
			wantCode(t, name, err, codes.FailedPrecondition)
			var reason migratedv1.Reason
			for _, detail := range status.Convert(err).Details() {
				if told, ok := detail.(*migratedv1.MigrationError); ok {
					reason = told.GetReason()
				}
			}
			if refused := reason == migratedv1.Reason_REASON_VERSION; refused != (c.reason == migratedv1.Reason_REASON_VERSION) {
				t.Errorf("the reason is %v: %v", reason, err)
			}
			if c.reason != migratedv1.Reason_REASON_VERSION {
				return
			}
			if _, err := os.Stat(filepath.Join(d.incomingDir(), id)); !os.IsNotExist(err) {
				t.Errorf("something was made for it: %v", err)
			}
			if d.migrations.destination(id) != nil {
				t.Error("the daemon remembers it")
			}
		})
	}
}
