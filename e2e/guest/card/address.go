// SPDX-License-Identifier: Apache-2.0

// Package card is the guest's work on its network cards: it gives them their addresses, so that its kernel answers
// pings, and has a client far away send back what it sends. The addresses are agreed upon here, for both ends.
package card

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
)

// EchoPort is the UDP port at which a client sends back whatever comes.
const EchoPort = 7007

// Numbers of VMs and of a VM's cards are below these.
const (
	MaxVMs   = 200
	MaxCards = 64
)

// firstHost is the last byte of the address of VM 0.
const firstHost = 10

// maker begins the hardware addresses: of QEMU's, those with the byte 78.
var maker = []byte{0x52, 0x54, 0x00, 0x78}

// MAC is the hardware address of a card.
func MAC(vm, card int) net.HardwareAddr {
	return append(bytes.Clone(maker), byte(vm), byte(card))
}

// ErrForeign says that a card is none of those that MAC names.
var ErrForeign = errors.New("not a card of the lab")

// Of returns which VM's card has that hardware address, and which of its cards it is.
func Of(mac net.HardwareAddr) (vm, card int, err error) {
	if len(mac) != 6 || !bytes.HasPrefix(mac, maker) {
		return 0, 0, ErrForeign
	}
	return int(mac[4]), int(mac[5]), nil
}

// Addr is the address of a VM's card. Each card is in a network of its own, of 24 bits, with the cards of the same
// number that other VMs have.
func Addr(vm, card int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 78, byte(card), byte(firstHost + vm)})
}

// Client is the address of the client in the network of the cards with that number.
func Client(card int) netip.Addr { return netip.AddrFrom4([4]byte{10, 78, byte(card), 1}) }
