// SPDX-License-Identifier: Apache-2.0

// Package version has the versions of the protocol between daemons, and of the files that a daemon leaves to the next
// one.
//
// A change that a daemon of the previous version would misunderstand raises a version. A new field is no such change if
// its zero value means the same as its absence. Whoever raises a version keeps the code that reads the previous one,
// and the files in testdata that test it: an upgrade restarts daemons in the middle of migrations, one host at a time.
package version

import "fmt"

const (
	// Protocol is the newest version of the protocol (proto/migrated/v1/peer.proto and pages.proto) that this daemon
	// supports. For each migration the destination chooses the newest version that both daemons support. Both keep to it,
	// also after one was restarted as a newer release.
	Protocol = 2 + raised
	// OldestToBegin is the oldest version in which this daemon begins a migration. With version 1, QEMU's own migration
	// transferred the state of the devices, and x-ignore-shared kept RAM out of it.
	OldestToBegin = 2
	// OldestProtocol is the oldest version in which this daemon continues a migration that another release began. The
	// fetching of pages has not changed since.
	OldestProtocol = 1

	// State is the version of the files that this daemon writes (internal/migration: kept.go, record.go). A file keeps its
	// version as long as it exists, so that the release that began a migration can also end it.
	State = 1 + raised
	// OldestState is the oldest version of files that this daemon reads.
	OldestState = 1
)

// An Error says that something is of a version that this daemon does not know.
type Error struct {
	Of             string    // what has the version
	Oldest, Newest uint32    // its versions; equal for a file
	Known          [2]uint32 // the oldest and the newest that this daemon knows
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s is of %s, and this daemon knows %s",
		e.Of, versions(e.Oldest, e.Newest), versions(e.Known[0], e.Known[1]))
}

func versions(oldest, newest uint32) string {
	if oldest == newest {
		return fmt.Sprintf("version %d", newest)
	}
	return fmt.Sprintf("versions %d to %d", oldest, newest)
}

// AgreeOnProtocol returns the newest version in which this daemon and one that supports oldest to newest can both begin
// a migration. with names the other daemon for the error, which is an *Error.
func AgreeOnProtocol(with string, oldest, newest uint32) (uint32, error) {
	if agreed := min(newest, Protocol); agreed >= max(oldest, OldestToBegin) {
		return agreed, nil
	}
	return 0, &Error{"the protocol of " + with, oldest, newest, [2]uint32{OldestToBegin, Protocol}}
}

// CheckProtocol returns an *Error if this daemon cannot continue a migration of version v.
func CheckProtocol(of string, v uint32) error {
	if v < OldestProtocol || v > Protocol {
		return &Error{"the protocol of " + of, v, v, [2]uint32{OldestProtocol, Protocol}}
	}
	return nil
}

// CheckState returns an *Error if this daemon cannot read a file of version v.
func CheckState(file string, v uint32) error {
	if v < OldestState || v > State {
		return &Error{file, v, v, [2]uint32{OldestState, State}}
	}
	return nil
}
