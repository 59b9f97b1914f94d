// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
)

// A family is a metric and its labels.
type family struct {
	name, kind string // gauge, counter or histogram
	help       string
	labels     []string
	desc       *prometheus.Desc
}

// families are all families of a scrape, in the order of docs/metrics.md.
var families []*family

// newFamily adds a family to families.
func newFamily(kind, name, help string, labels ...string) *family {
	name = "migrated_" + name
	f := &family{name, kind, help, labels, prometheus.NewDesc(name, help, labels, nil)}
	families = append(families, f)
	return f
}

// one has the labels of a single migration. At a destination vm is the -name of its QEMU, which may be empty.
var one = []string{"migration", "vm", "role"}

var (
	buildInfo = newFamily("gauge", "build_info",
		"1, with the version of the daemon and the newest version of the protocol between daemons that it speaks.",
		"version", "protocol")

	underWay = newFamily("gauge", "migrations",
		"Migrations that are not over, by the side that this host plays and their state.", "role", "state")
	ended = newFamily("counter", "migrations_ended_total",
		"Migrations that are over, by the state that they ended in.", "role", "state")
	downtime = newFamily("histogram", "migration_downtime_seconds",
		"From the VM's stop at the source to its running at the destination, of each migration that switched over.", "role")

	remaining = newFamily("gauge", "migration_data_remaining_bytes",
		"The VM's memory that is not at the destination yet. Pages are counted: an estimate where blocks have pages of "+
			"several sizes.", one...)
	memory = newFamily("gauge", "migration_memory_bytes", "All of the VM's memory.", one...)
	onWire = newFamily("gauge", "migration_received_bytes",
		"Bytes of pages that have come, as packed, without framing.", one...)
	inState = newFamily("gauge", "migration_phase_seconds",
		"How long the migration was in a state, so far. Shown for ten minutes after its end.", append(one[:3:3], "phase")...)
	pause = newFamily("gauge", "migration_paused_seconds",
		"How long the connection to the memory that a VM lacks has been lost. 0: it is not, or no memory is lacking.", one...)

	faultLatency = newFamily("histogram", "fault_latency_seconds",
		"From a page fault's message being read to its page being there: native, and in QEMU's buckets "+
			"(postcopy-latency-dist), exact to 1/16.")
	faults = newFamily("counter", "faults_total",
		"Page faults of VMs that came here, by what was known of the page: missing, swept (on its way with the sweep), "+
			"ahead (prefetched), waiting (for another thread), zero or present.", "cause")
	pages = newFamily("counter", "pages_total",
		"Pages that came, by the lane that brought them: demand or sweep.", "kind")
	zeroPages = newFamily("counter", "pages_zero_total",
		"Pages that were known to be zero, and had no bytes on the wire.")
	guessedPages = newFamily("counter", "pages_guessed_total",
		"Pages that were prefetched because a thread's faults predicted them.")
	touchedPages = newFamily("counter", "pages_touched_total",
		"Pages that another process touched before their content came, and that were overwritten with it.")
	unexplainedPages = newFamily("counter", "pages_unexplained_total",
		"Pages that existed before their content came, and could not be overwritten: the VM may have zeros there.")
	lostPages = newFamily("counter", "pages_lost_total",
		"Pages that their sources could not read. The VM gets a machine check when it touches one.")
	received = newFamily("counter", "received_bytes_total",
		"Bytes of pages that came, as packed, by the lane that brought them: demand or sweep.", "kind")
	lostLanes = newFamily("counter", "bulk_lanes_lost_total",
		"Connections of the sweep that were lost while others of the same migration went on.")
	discarded  = newFamily("counter", "discarded_bytes_total", "Memory that VMs gave up while it moved.")
	reconnects = newFamily("counter", "lane_reconnects_total",
		"How often the page lanes of a migration were opened again, after they were lost or the daemon was started anew.")

	waitingVMs = newFamily("gauge", "vms_waiting_for_pages",
		"VMs on this host that have no connection to the memory that they lack.")
	stoppedVMs = newFamily("gauge", "vms_stopped_committed",
		"VMs of this host that were handed over, and are not known to run at the destination: they stand still here "+
			"until an answer comes or an operator decides.")

	queued = newFamily("gauge", "migrations_queued",
		"Migrations away from this host that wait for their turn, here or at their destinations. Their VMs run here.")
	overdue = newFamily("gauge", "migrations_overdue",
		"Migrations past the switch whose total_limit has passed, and whose memory is not all at the destination.", "role")

	refusals = newFamily("counter", "refusals_total",
		"Connections, callers, calls and VMs of other hosts that were refused, by kind.", "kind")
	expiry = newFamily("gauge", "certificate_expiry_timestamp_seconds",
		"When a certificate expires, in Unix time, by the setting that names its file. Of several in a file the first that "+
			"expires, of authorities the last.", "setting")
)
