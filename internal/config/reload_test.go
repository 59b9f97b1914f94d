// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReload(t *testing.T) {
	running := Default()
	encrypt(&running)
	running.Peers = []string{"a.example web-*"}
	next := running
	next.Peers, next.Operators, next.MetricsClients, next.Bandwidth =
		[]string{"b.example"}, []string{"o.example"}, []string{"m.example"}, "500M"
	want := next
	next.Listen, next.MaxIncoming = "127.0.0.1:7700", 3
	changed, waiting, err := running.Reload(next)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, changed); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"listen", "max_incoming"}, waiting); diff != "" {
		t.Errorf("what waits (-want +got):\n%s", diff)
	}
	if running.Peers[0] != "a.example web-*" {
		t.Error("the running configuration is another one now")
	}
}

// TestReloadTogether: a list that is valid with other keys of the new file is refused if it is not valid with the
// values that these keys keep.
func TestReloadTogether(t *testing.T) {
	next := Default()
	encrypt(&next)
	next.Peers = []string{"a.example"}
	_, _, err := Default().Reload(next)
	var refused *ValueError
	if !errors.As(err, &refused) || refused.Key != "peers" {
		t.Errorf("peers without encryption: %v", err)
	}
}
