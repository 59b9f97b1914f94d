// SPDX-License-Identifier: Apache-2.0

package report

import "time"

// Late returns by how much b followed a later than it should, by the guest's clock, if the guest reports each period.
// The guest's kernel may wait for a page, and that stops all work, not only a visit to memory. A line that the switch
// cut in two is missing between them, which Late allows for.
func Late(a, b *Window, period time.Duration) time.Duration {
	if b.Seq <= a.Seq { // the lines from the other host in between are lost
		return 0
	}
	return time.Duration(b.UptimeMS-a.UptimeMS)*time.Millisecond - time.Duration(b.Seq-a.Seq)*period
}
