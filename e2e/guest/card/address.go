// SPDX-License-Identifier: Apache-2.0

// Package card is the guest's work on its network cards: it gives them their addresses, so that its kernel answers
// pings, and sends messages to a remote client, which sends them back. It defines the addresses for both ends.
package card

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
)

// EchoPort is the UDP port at which a client sends back what it receives.
const EchoPort = 7007

// The numbers of VMs, and of a VM's cards, are below these.
const (
	MaxVMs   = 200
	MaxCards = 64
)

// firstHost is the last byte of the address of VM 0.
const firstHost = 10

// maker has the first bytes of the hardware addresses: QEMU's range, with the byte 78.
var maker = []byte{0x52, 0x54, 0x00, 0x78}

// MAC returns the hardware address of a card.
func MAC(vm, card int) net.HardwareAddr {
	return append(bytes.Clone(maker), byte(vm), byte(card))
}

// ErrForeign says that a card's address is none of MAC's.
var ErrForeign = errors.New("not a card of the lab")

// Of returns the VM whose card has that hardware address, and the number of the card.
func Of(mac net.HardwareAddr) (vm, card int, err error) {
	if len(mac) != 6 || !bytes.HasPrefix(mac, maker) {
		return 0, 0, ErrForeign
	}
	return int(mac[4]), int(mac[5]), nil
}

// Addr returns the address of a VM's card. All cards with the same number are in one network, of 24 bits.
func Addr(vm, card int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 78, byte(card), byte(firstHost + vm)})
}

// Client returns the address of the client in the network of the cards with that number.
func Client(card int) netip.Addr { return netip.AddrFrom4([4]byte{10, 78, byte(card), 1}) }
