// SPDX-License-Identifier: Apache-2.0

package qemu

// Status is the outcome of one check.
type Status int

// The outcomes.
const (
	OK      Status = iota
	Warning        // migration is possible, something is worth knowing
	Failed         // migration is not possible
)

func (s Status) String() string {
	switch s {
	case OK:
		return "ok"
	case Warning:
		return "warning"
	case Failed:
		return "failed"
	}
	return "unknown"
}

// Result is one thing that was looked at, each text a single line.
type Result struct {
	Subject string
	Status  Status
	Detail  string // what was found
	Remedy  string // what to do about it; empty where there is nothing to do
}
