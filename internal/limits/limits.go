// SPDX-License-Identifier: Apache-2.0

// Package limits bounds what other hosts can make a daemon spend before they are authenticated: connections, handshakes
// and calls, in total and for each address. A refused connection is closed, and a refused call fails with
// codes.ResourceExhausted. Refusals are counted, and logged at a bounded rate (refusals.go).
//
// The limits cannot be configured. They leave room for the 16 migrations at once between two hosts that a
// daemon allows by default, with three such hosts. In the worst case 512 connections hold about 1 GiB: for
// each, the buffers of gRPC (0.3 MiB), and Streams calls whose windows are full because nobody reads
// (pagewire.ServerOptions, 256 KiB each).
package limits

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// Connections is the most connections of one listener.
	Connections = 512
	// ConnectionsPerPeer is the most connections of one address. A migration has one for each lane, nine by default, and
	// one for calls.
	ConnectionsPerPeer = 192
	// Handshakes is the most connections whose handshake is not finished. A handshake costs a millisecond of CPU time.
	Handshakes = 128
	// HandshakesPerPeer is the most unfinished handshakes of one address.
	HandshakesPerPeer = 32
	// HandshakeTime bounds the handshakes of TLS and HTTP/2, up to the first call.
	HandshakeTime = 5 * time.Second
	// Streams is the most calls under way on one connection. A daemon needs four.
	Streams = 8
	// IdleTime is how long a connection without a call is kept.
	IdleTime = time.Minute
	// HeaderBytes is the largest metadata of a call. A token and an id take about a hundred bytes.
	HeaderBytes = 16 << 10
	// MessageBytes is the largest message to a daemon. The largest that is needed has the command line of a QEMU.
	MessageBytes = 256 << 10

	// New connections from one address: a second, and at once. When a network works again, all lanes of a host's
	// migrations connect at once.
	connectionRate  = 32
	connectionBurst = ConnectionsPerPeer
	// Expensive calls from one address: a second, and at once.
	callRate  = 4
	callBurst = 32

	// rememberedPeers is how many addresses are remembered before those without a connection are forgotten.
	rememberedPeers = 4096
)

// Peers counts the connections and calls of each address at one listener.
type Peers struct {
	refusals *Refusals

	mu          sync.Mutex
	connections int
	handshakes  int
	byAddress   map[netip.Prefix]*account
}

// An account has the counts and rates of one address.
type account struct {
	connections int
	handshakes  int
	accepted    *rate.Limiter
	calls       *rate.Limiter
}

// NewPeers returns Peers without connections. Refusals are counted in refusals.
func NewPeers(refusals *Refusals) *Peers {
	return &Peers{refusals: refusals, byAddress: make(map[netip.Prefix]*account)}
}

// Network returns the prefix that an address is counted by: an IPv4 address itself, and the first 64 bits of an IPv6
// address, because a host chooses the rest itself.
func Network(address net.Addr) netip.Prefix { return NetworkOf(address.String()) }

// NetworkOf is Network of a HOST:PORT.
func NetworkOf(address string) netip.Prefix {
	parsed, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.Prefix{} // addresses that cannot be parsed are counted as one
	}
	ip := parsed.Addr().Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	prefix, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return prefix
}

// of returns the account of an address, and makes it if there is none. The caller holds mu.
func (p *Peers) of(address netip.Prefix) *account {
	if known := p.byAddress[address]; known != nil {
		return known
	}
	if len(p.byAddress) >= rememberedPeers {
		p.forget()
	}
	added := &account{
		accepted: rate.NewLimiter(connectionRate, connectionBurst),
		calls:    rate.NewLimiter(callRate, callBurst),
	}
	p.byAddress[address] = added
	return added
}

// forget drops the accounts of addresses without a connection, and with them their rates. Only somebody with thousands
// of addresses can gain from that.
func (p *Peers) forget() {
	for address, known := range p.byAddress {
		if known.connections == 0 {
			delete(p.byAddress, address)
		}
	}
}

// admit counts a new connection of an address, or says why it is refused.
func (p *Peers) admit(address netip.Prefix) (refused Kind) {
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.of(address)
	switch {
	case p.connections >= Connections:
		return AllConnected
	case known.connections >= ConnectionsPerPeer:
		return Connected
	case p.handshakes >= Handshakes:
		return AllShaking
	case known.handshakes >= HandshakesPerPeer:
		return Shaking
	case !known.accepted.Allow():
		return Connecting
	}
	p.connections++
	p.handshakes++
	known.connections++
	known.handshakes++
	return ""
}

// established counts the end of a connection's handshake.
func (p *Peers) established(address netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handshakes--
	p.of(address).handshakes--
}

// closed counts the end of a connection.
func (p *Peers) closed(address netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.connections--
	p.of(address).connections--
}

// mayCall says whether address may make one more expensive call now.
func (p *Peers) mayCall(address netip.Prefix) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.of(address).calls.Allow()
}
