// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Peer is a daemon that is allowed to connect, and the VMs that it may send here.
type Peer struct {
	Name string   // in its certificate
	VMs  []string // patterns of VM names, as in path.Match; empty means all
}

// ParsePeer parses "NAME" or "NAME PATTERN...".
func ParsePeer(text string) (Peer, error) {
	fields := strings.Fields(text)
	if len(fields) == 0 {
		return Peer{}, errors.New("the entry is empty; it must begin with a name from a certificate")
	}
	for _, pattern := range fields[1:] {
		if _, err := path.Match(pattern, ""); err != nil {
			return Peer{}, fmt.Errorf("%q is no pattern of VM names: %w", pattern, err)
		}
	}
	return Peer{Name: fields[0], VMs: fields[1:]}, nil
}

// Peers are the allowed peers. If there are none, every peer with a certificate of the authorities is allowed.
type Peers []Peer

// Allow accepts the peers in the list. It is an mtls.Allow.
func (p Peers) Allow(names []string) error {
	if len(p) == 0 {
		return nil
	}
	allowed := make([]string, len(p))
	for i := range p {
		allowed[i] = p[i].Name
	}
	return AnyOf(allowed)(names)
}

// MaySend returns nil if the peer with these names may send that VM here, and otherwise an error that says why not.
func (p Peers) MaySend(names []string, vm string) error {
	if len(p) == 0 {
		return nil
	}
	for _, peer := range p {
		if slices.Contains(names, peer.Name) && peer.takes(vm) {
			return nil
		}
	}
	return fmt.Errorf("%w to send VM %q: %q", ErrStranger, vm, names)
}

func (p Peer) takes(vm string) bool {
	return len(p.VMs) == 0 || slices.ContainsFunc(p.VMs, func(pattern string) bool {
		matches, err := path.Match(pattern, vm)
		return err == nil && matches
	})
}
