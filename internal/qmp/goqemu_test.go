// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"testing"
	"time"

	goqemu "github.com/digitalocean/go-qemu/qmp"
)

// What is written for go-qemu runs, also when it does not drain its events.
func TestMonitorOfGoQEMU(t *testing.T) {
	c, _ := dialQEMU(t)
	var monitor goqemu.Monitor = c
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := monitor.Events(ctx); err != nil { // nobody receives
		t.Fatal(err)
	}
	events, err := monitor.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	before := time.Now().Unix()
	for _, command := range []string{"stop", "cont", "query-status"} {
		if _, err := monitor.Run([]byte(`{"execute": "` + command + `"}`)); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"STOP", "RESUME"} {
		if e := <-events; e.Event != want || e.Timestamp.Seconds < before {
			t.Errorf("event %+v, want %s", e, want)
		}
	}
	if err := monitor.Disconnect(); err != nil {
		t.Fatal(err)
	}
	if _, open := <-events; open {
		t.Error("an event after the end")
	}
	if _, err := monitor.Events(ctx); err == nil {
		t.Error("events of an ended connection")
	}
}
