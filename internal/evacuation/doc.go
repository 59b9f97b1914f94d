// SPDX-License-Identifier: Apache-2.0

// Package evacuation moves all VMs of a host to others.
//
// An evacuation first makes a plan, which changes nothing: it finds the VMs of the host, checks whether each can be
// moved, chooses a destination with room for it, and asks that destination to check the VM as well. Then it starts a
// migration for each VM, as many at once as are allowed, and follows them until each VM has its last state:
//
//	PLANNING ──► RUNNING ◄──► PAUSED        a VM:  WAITING ──► MOVING ──► MOVED
//	   │            │            │                    │  ▲         │
//	   │            └── cancel ──┴──► CANCELLING      │  └─ the VM is still here: tried again, elsewhere if possible
//	   ├──► FAILED       │                 │          │            │
//	   └──► PLANNED     DONE           CANCELLED      └──► CANNOT_MOVE, CANCELLED, FAILED, ENDED
//
// The evacuation is written to a file whenever a state changes, and before a migration begins, so that a
// restarted daemon continues it (manager.go). It then finds out where each VM is: from its migration,
// which was taken up; from the report of a migration that is over; or from the VMs of this host. If none
// of them knows the VM, its location is unknown.
//
// Files: plan.go makes the plan, place.go chooses destinations, run.go starts migrations, follow.go
// follows them to their end, manager.go keeps evacuations.
package evacuation
