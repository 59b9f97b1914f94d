// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A lost network can make a migration change its state once a second, for days. The first and the last changes tell
// how it went.
const (
	firstChanges = 16
	lastChanges  = 48
)

// A timeline holds the states that a migration was in. The zero value is empty.
type timeline struct {
	began   time.Time // time of the first state
	first   []*migratedv1.StateChange
	last    []*migratedv1.StateChange // a ring when it is full
	oldest  int                       // index of the ring's oldest change
	leftOut uint32
}

// add appends the state that view shows, entered at now.
func (t *timeline) add(view *migratedv1.Migration, now time.Time) {
	if t.began.IsZero() {
		t.began = now
	}
	change := &migratedv1.StateChange{
		State: view.GetState(), Reason: view.GetError().GetReason(),
		Time: timestamppb.New(now), SinceStart: durationpb.New(now.Sub(t.began)),
	}
	switch {
	case len(t.first) < firstChanges:
		t.first = append(t.first, change)
	case len(t.last) < lastChanges:
		t.last = append(t.last, change)
	default:
		t.last[t.oldest] = change
		t.oldest = (t.oldest + 1) % lastChanges
		t.leftOut++
	}
}

// shown returns a copy for the API.
func (t *timeline) shown() *migratedv1.Timeline {
	shown := &migratedv1.Timeline{LeftOut: t.leftOut}
	if t.leftOut > 0 {
		shown.LeftOutAfter = firstChanges
	}
	for _, part := range [][]*migratedv1.StateChange{t.first, t.last[t.oldest:], t.last[:t.oldest]} {
		for _, change := range part {
			shown.Changes = append(shown.Changes, proto.CloneOf(change))
		}
	}
	return shown
}
