// SPDX-License-Identifier: Apache-2.0

package report

import "time"

// Late is how much later than it had to b follows a, by the guest's clock, where the guest reports each period: a page that
// the guest's kernel waits for keeps it from all work, not from a visit to its memory alone. A line that the switch cut in
// two is missing between them.
func Late(a, b *Window, period time.Duration) time.Duration {
	if b.Seq <= a.Seq { // what ran on the other host in between is lost
		return 0
	}
	return time.Duration(b.UptimeMS-a.UptimeMS)*time.Millisecond - time.Duration(b.Seq-a.Seq)*period
}
