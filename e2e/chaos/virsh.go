// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// noticedWithin is how long libvirt may take to show what QEMU does. It may have just been started, or it hears from
// QEMU only when QEMU has got its last pages.
const noticedWithin = 20 * time.Second

// domainState returns what virsh says of a domain, or its error; empty: it knows none.
func domainState(ctx context.Context, h *lab.Host, name string) string {
	state, err := virsh(ctx, h, "domstate", name)
	switch {
	case err == nil:
		return state
	case lab.IsNoDomain(err):
		return ""
	default:
		return err.Error()
	}
}

// truth returns what virsh should say of the machine on a host, whose domain is transient. It asks QEMU and not
// libvirt.
func (m *machine) truth(ctx context.Context, h *lab.Host) string {
	client := m.copies.client(h)
	switch {
	case !m.exists(h):
		return ""
	case client == nil:
		return "a QEMU that does not speak"
	}
	runs, err := lab.Runs(ctx, client)
	switch {
	case err != nil:
		return err.Error()
	case runs:
		return "running"
	default:
		return "paused"
	}
}

// checkVirsh compares what virsh says of all machines, on both hosts, with the truth. Nothing happens to them now.
func (s *stage) checkVirsh(ctx context.Context, res *result) {
	if len(s.libvirtds) == 0 {
		return
	}
	for _, m := range s.guests {
		for _, h := range m.hosts {
			var says, is string
			if !await(ctx, noticedWithin, func() bool {
				says, is = domainState(ctx, h, m.name), m.truth(ctx, h)
				return says == is
			}) {
				res.virshIsWrong(fmt.Errorf("virsh is wrong on host %s: it says %q of domain %s, which is %q",
					h.Name, says, m.name, is))
			}
		}
	}
}

// watchVirsh watches what virsh says of a machine during a case, until end.
func (s *stage) watchVirsh(ctx context.Context, m *machine, res *result) (end func()) {
	if len(s.libvirtds) == 0 {
		return func() {}
	}
	w := watchVirsh(ctx, m)
	return func() { res.virshIsWrong(w.stop()) }
}

func (r *result) virshIsWrong(err error) {
	if err != nil {
		r.VirshWrong = true
		r.fail(err)
	}
}
