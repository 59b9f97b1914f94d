// SPDX-License-Identifier: Apache-2.0

package check

// Status is the outcome of one check.
type Status int

// The possible outcomes of a check.
const (
	OK      Status = iota
	Warning        // migration is possible; the operator should know something
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

// A Result is the outcome of one check. Each text is a single line.
type Result struct {
	Subject string
	Status  Status
	Detail  string // what was found
	Remedy  string // what to do about it; empty if nothing
}
