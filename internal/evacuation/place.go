// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Needs is how much memory a VM takes: bytes, by the size of its pages in bytes.
type Needs map[uint64]uint64

// sum returns the bytes of all sizes of pages.
func (n Needs) sum() (bytes uint64) {
	for _, b := range n {
		bytes += b
	}
	return bytes
}

// Errors of placing a VM.
var (
	errNoHost   = errors.New("no destination can take the VM")
	errNoMemory = errors.New("not enough memory")
	errApart    = errors.New("--apart forbids the host of another VM")
)

// A placer chooses destinations by the memory that they have left. Several goroutines may use it at once.
type placer struct {
	mu       sync.Mutex
	hosts    []*room             // in the order of the specification
	apart    map[string][]string // by VM: the VMs that must not be on the same host
	placed   map[string]string   // by VM: its host
	pageSize uint64              // of a small page, in bytes
}

// A room is the memory that one destination has left.
type room struct {
	address string
	left    Needs // nil: unknown
}

func newPlacer(pageSize uint64) *placer {
	return &placer{apart: make(map[string][]string), placed: make(map[string]string), pageSize: pageSize}
}

// addHost adds a destination. If has is nil, it counts as one with room for any VM: its capacity is checked again
// before a VM is moved.
func (p *placer) addHost(address string, has *migratedv1.HostRoom) {
	r := &room{address: address}
	if has != nil {
		r.left = Needs{p.pageSize: has.GetMemory()}
		for _, h := range has.GetHugePages() {
			r.left[h.GetPageSize()] = h.GetFree()
		}
	}
	p.hosts = append(p.hosts, r)
}

// keepApart makes place put no two of these VMs on the same host.
func (p *placer) keepApart(vms []string) {
	for _, vm := range vms {
		for _, other := range vms {
			if other != vm {
				p.apart[vm] = append(p.apart[vm], other)
			}
		}
	}
}

// place chooses a host for a VM, and reduces the host's room: the host with the most memory left among those that can
// have the VM and for which avoid returns nil. The error has a reason for each host, and is errNoHost.
func (p *placer) place(vm string, needs Needs, avoid func(host string) error) (host string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var best *room
	reasons := []error{errNoHost}
	for _, h := range p.hosts {
		if err := cmp.Or(avoid(h.address), p.mayHave(h, vm, needs)); err != nil {
			reasons = append(reasons, fmt.Errorf("%s: %w", h.address, err))
			continue
		}
		if best == nil || h.left == nil || best.left != nil && h.left[p.pageSize] > best.left[p.pageSize] {
			best = h
		}
	}
	if best == nil {
		return "", errors.Join(reasons...)
	}
	p.put(vm, needs, best)
	return best.address, nil
}

// mayHave says why a host cannot have a VM; nil: it can. The caller holds mu.
func (p *placer) mayHave(h *room, vm string, needs Needs) error {
	for _, other := range p.apart[vm] {
		if p.placed[other] == h.address {
			return fmt.Errorf("%w (%s)", errApart, other)
		}
	}
	for size, bytes := range needs {
		if h.left == nil || bytes <= h.left[size] {
			continue
		}
		pages := ""
		if size != p.pageSize {
			pages = fmt.Sprintf(" in pages of %d KiB", size>>10)
		}
		return fmt.Errorf("%w: %d MiB%s are needed, and %d MiB are left", errNoMemory, bytes>>20, pages, h.left[size]>>20)
	}
	return nil
}

// put puts a VM on a host, and reduces the host's room. The caller holds mu.
func (p *placer) put(vm string, needs Needs, h *room) {
	p.placed[vm] = h.address
	for size, bytes := range needs {
		if h.left != nil {
			h.left[size] -= min(bytes, h.left[size])
		}
	}
}

// restore puts a VM on the host that an earlier placer chose. moved says that the host has the VM already: the memory
// that the host has left then does not include the VM's.
func (p *placer) restore(vm string, needs Needs, host string, moved bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.hosts, func(h *room) bool { return h.address == host })
	if moved || i < 0 {
		p.placed[vm] = host
		return
	}
	p.put(vm, needs, p.hosts[i])
}

// remove undoes place.
func (p *placer) remove(vm string, needs Needs) {
	p.mu.Lock()
	defer p.mu.Unlock()
	host := p.placed[vm]
	delete(p.placed, vm)
	for _, h := range p.hosts {
		if h.address != host || h.left == nil {
			continue
		}
		for size, bytes := range needs {
			h.left[size] += bytes
		}
	}
}
