// SPDX-License-Identifier: Apache-2.0

// Package limits bounds what other hosts can make a daemon spend before it knows, or cares, who they are: connections,
// handshakes and calls, each in all and by address. Whoever is refused is so by a closed connection or by
// codes.ResourceExhausted, and it is counted and logged, but not at the pace of who knocks (refusals.go).
//
// The numbers are no settings. They leave room for the 16 migrations at once that a daemon takes by default between each two
// hosts, and for three such hosts, while the worst that 512 connections can hold is about 1 GiB: for each, the buffers of
// gRPC (0.3 MiB), and Streams whose window is full and whom nobody reads (pagewire.ServerOptions, 256 KiB each).
package limits

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// Connections are all of a listener's.
	Connections = 512
	// ConnectionsPerPeer are those of one address. A migration has one for each lane, nine by default, and one for calls.
	ConnectionsPerPeer = 192
	// Handshakes are connections that nobody has shown a certificate on yet. Each costs the CPU a millisecond.
	Handshakes = 128
	// HandshakesPerPeer are those of one address.
	HandshakesPerPeer = 32
	// HandshakeTime is what TLS and HTTP/2 may take until the first call can come.
	HandshakeTime = 5 * time.Second
	// Streams are the calls under way on one connection. A daemon needs four.
	Streams = 8
	// IdleTime is how long a connection without a call is kept.
	IdleTime = time.Minute
	// HeaderBytes are the most of one call's metadata; a token and an id are a hundred.
	HeaderBytes = 16 << 10
	// MessageBytes are the most of one message to a daemon. The largest has a QEMU's command line.
	MessageBytes = 256 << 10

	// New connections of one peer a second, and at once: all lanes of its migrations when a network is back.
	connectionRate  = 32
	connectionBurst = ConnectionsPerPeer
	// Expensive calls of one peer a second, and at once.
	callRate  = 4
	callBurst = 32

	// rememberedPeers bounds how many addresses have a rate remembered that are not connected.
	rememberedPeers = 4096
)

// Peers counts what each address has of one listener.
type Peers struct {
	refusals *Refusals

	mu          sync.Mutex
	connections int
	handshakes  int
	byAddress   map[netip.Prefix]*account
}

// An account is what one address has.
type account struct {
	connections int
	handshakes  int
	accepted    *rate.Limiter
	calls       *rate.Limiter
}

// NewPeers begins to count.
func NewPeers(refusals *Refusals) *Peers {
	return &Peers{refusals: refusals, byAddress: make(map[netip.Prefix]*account)}
}

// Network is what an address counts as: an IPv4 address itself, and of IPv6 the 64 bits that a host does not choose.
func Network(address net.Addr) netip.Prefix { return NetworkOf(address.String()) }

// NetworkOf is Network of a HOST:PORT.
func NetworkOf(address string) netip.Prefix {
	parsed, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.Prefix{} // all such are one
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

// of returns the peer with that address. The caller holds mu.
func (p *Peers) of(address netip.Prefix) *account {
	if known := p.byAddress[address]; known != nil {
		return known
	}
	if len(p.byAddress) >= rememberedPeers {
		p.forget()
	}
	fresh := &account{
		accepted: rate.NewLimiter(connectionRate, connectionBurst),
		calls:    rate.NewLimiter(callRate, callBurst),
	}
	p.byAddress[address] = fresh
	return fresh
}

// forget drops who is not connected: at worst somebody with thousands of addresses is as fast as all of them.
func (p *Peers) forget() {
	for address, known := range p.byAddress {
		if known.connections == 0 {
			delete(p.byAddress, address)
		}
	}
}

// admit counts a new connection of address, or says why there must be none.
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

// established ends the handshake of a connection, left the connection.
func (p *Peers) established(address netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handshakes--
	p.of(address).handshakes--
}

func (p *Peers) left(address netip.Prefix) {
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
