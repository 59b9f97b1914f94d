// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestMonitorOfGoQEMU runs what code for go-qemu does, also where nobody receives its events.
func TestMonitorOfGoQEMU(t *testing.T) {
	c, _ := dialQEMU(t)
	monitor := c.Monitor(testContext(t))
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

// TestTyped runs the generated commands that the product uses.
func TestTyped(t *testing.T) {
	c, _ := dialQEMU(t, "-uuid", "9fe3ea4e-0c0c-4d3f-9a37-5a0c6e1f8d11")
	typed := c.Typed(testContext(t))
	if uuid, err := typed.QueryUUID(); err != nil || uuid.UUID != "9fe3ea4e-0c0c-4d3f-9a37-5a0c6e1f8d11" {
		t.Errorf("query-uuid: %+v, %v", uuid, err)
	}
	if kvm, err := typed.QueryKVM(); err != nil || kvm.Enabled {
		t.Errorf("query-kvm: %+v, %v", kvm, err)
	}
	// The machine "none" has no slots for CPUs, and QEMU's refusal keeps its class.
	if _, err := typed.QueryHotpluggableCpus(); !errors.Is(err, ErrGeneric) {
		t.Errorf("query-hotpluggable-cpus: %v", err)
	}
}

// TestTypedObeysContext gives up waiting for a QEMU that does not answer.
func TestTypedObeysContext(t *testing.T) {
	c, qemu := dialFake(t)
	ctx, cancel := context.WithCancelCause(testContext(t))
	gaveUp := errors.New("gave up")
	result := make(chan error)
	go func() {
		_, err := c.Typed(ctx).QueryKVM()
		result <- err
	}()
	qemu.command("query-kvm")
	cancel(gaveUp)
	if err := <-result; !errors.Is(err, gaveUp) {
		t.Errorf("abandoned command: %v", err)
	}
}
