// SPDX-License-Identifier: Apache-2.0

// Package version has the versions of all that one daemon leaves to another: what two of them say to each other, and the
// files that a daemon leaves to the one that is started after it.
//
// A version rises with a change that a daemon of the version before would misunderstand. A new field is no such change if
// its zero value says what its absence said. Who raises one keeps the reader of the version before, and the files in
// testdata that hold it to that: an upgrade is a restart in the middle of migrations, one host at a time.
package version

import "fmt"

const (
	// Protocol is the newest version of the protocol (proto/migrated/v1/peer.proto and pages.proto) that this daemon speaks.
	// For each migration the destination chooses the newest that both speak, and both keep to it, also when they are
	// started anew with a newer one.
	Protocol = 2 + raised
	// OldestToBegin is the oldest in which it begins a migration. With protocol 1 QEMU's own migration carried the state
	// of the devices, and x-ignore-shared kept RAM out of it.
	OldestToBegin = 2
	// OldestProtocol is the oldest in which it goes on with a migration that another daemon began: how pages are fetched
	// has not changed.
	OldestProtocol = 1

	// State is the version of the files that this daemon writes (internal/migration: kept.go, record.go). A file keeps its
	// version for as long as it exists, so that the daemon that began a migration can also end it.
	State = 1 + raised
	// OldestState is the oldest that it reads still.
	OldestState = 1
)

// An Error says that something is of a version that this daemon does not know.
type Error struct {
	Of             string // what is
	Oldest, Newest uint32 // its versions; one for a file
	Known          [2]uint32
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s is of %s, and this daemon knows %s", e.Of, versions(e.Oldest, e.Newest), versions(e.Known[0], e.Known[1]))
}

func versions(oldest, newest uint32) string {
	if oldest == newest {
		return fmt.Sprintf("version %d", newest)
	}
	return fmt.Sprintf("versions %d to %d", oldest, newest)
}

// AgreeOnProtocol returns the newest version in which this daemon and one that speaks oldest to newest can both begin a
// migration. The error is an *Error.
func AgreeOnProtocol(with string, oldest, newest uint32) (uint32, error) {
	if agreed := min(newest, Protocol); agreed >= max(oldest, OldestToBegin) {
		return agreed, nil
	}
	return 0, &Error{"the protocol of " + with, oldest, newest, [2]uint32{OldestToBegin, Protocol}}
}

// CheckProtocol says whether this daemon can go on with a migration of version v. The error is an *Error.
func CheckProtocol(of string, v uint32) error {
	if v < OldestProtocol || v > Protocol {
		return &Error{"the protocol of " + of, v, v, [2]uint32{OldestProtocol, Protocol}}
	}
	return nil
}

// CheckState says whether this daemon reads a file of version v. The error is an *Error.
func CheckState(file string, v uint32) error {
	if v < OldestState || v > State {
		return &Error{file, v, v, [2]uint32{OldestState, State}}
	}
	return nil
}
