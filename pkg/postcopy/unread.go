// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A source that cannot read a page ends the lane (codes.DataLoss), unless the lane may lose pages. If the sweep asked
// for the page again at once, all memory behind it would never come. So such a page is asked for when all else is in:
//
//	the lane ends ── noteUnread ──► Engine.unread ── setAside ──► swept, but not asked for ── bringBack ──► missing
//
// A fault on the page asks for it all the same, as for every page that is swept.

// noteUnread remembers the page at which the source ended a bulk lane because it could not read it: the first that it
// has not answered, because a source answers in order what it can.
func (s *session) noteUnread(l *lane, err error) {
	if l.bulk == nil || len(l.bulk.owes) == 0 || status.Code(err) != codes.DataLoss {
		return
	}
	r := l.bulk.owes[0]
	b := &s.e.blocks[r.Block]
	s.bulk.mu.Lock()
	defer s.bulk.mu.Unlock()
	if p := b.first + r.Offset>>b.shift; !slices.Contains(s.e.unread, p) {
		s.e.unread = append(s.e.unread, p)
	}
}

// setAside keeps pages that the source could not read from the sweep. The caller holds mu, or is the only user.
func (s *session) setAside() {
	k := &s.bulk
	for _, p := range s.e.unread {
		if s.e.pages.claimSweep(p, 1) == 1 {
			k.aside = append(k.aside, p)
		}
	}
}

// bringBack gives the sweep what was set aside, and says whether that was anything. The caller holds mu.
func (s *session) bringBack() bool {
	k := &s.bulk
	for _, p := range k.aside {
		s.e.pages.swap(p, swept, missing)
	}
	brought := len(k.aside) > 0
	k.aside = nil
	return brought
}
