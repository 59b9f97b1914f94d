// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/e2e/guest/card"
)

// tap is the name of the tap device of the VM's network card i. It is the same on both hosts.
func (c VMConfig) tap(i int) string { return fmt.Sprintf("vm%dnic%d", c.Number, i) }

// nicArgs adds the VM's network cards.
func (c VMConfig) nicArgs(s *slots) {
	for i := range c.NICs {
		s.args = append(s.args,
			"-netdev", fmt.Sprintf("tap,id=net%d,ifname=%s,script=no,downscript=no,vhost=off", i, c.tap(i)))
		s.device(fmt.Sprintf("virtio-net-pci,id=nic%[1]d,netdev=net%[1]d,mac=%[2]v", i, card.MAC(c.Number, i)))
	}
}

// MakeNICs makes the networks of the VM's network cards, unless they exist: on both hosts, for each
// card, a tap device and a bridge that is connected to the client's bridge. Cards with number n have their own network,
// 10.78.n.0/24:
//
//	host a: tap ─ bridge ─ veth ─┐
//	                             bridge of the client, 10.78.n.1
//	host b: tap ─ bridge ─ veth ─┘
//
// When the VM moves, so does its card's hardware address, from one port of the client's bridge to the other.
func (l *Lab) MakeNICs(ctx context.Context, c VMConfig) error {
	for i := range c.NICs {
		if err := l.makeNetwork(ctx, i); err != nil {
			return fmt.Errorf("network %d: %w", i, err)
		}
		tap := c.tap(i)
		if slices.Contains(l.taps, tap) {
			continue
		}
		for _, h := range l.Hosts() {
			if c.Macvtap {
				if err := h.freeForMacvtap(ctx, i); err != nil {
					return err
				}
				continue
			}
			script := fmt.Sprintf("ip tuntap add dev %[1]s mode tap\n"+
				"ip link set %[1]s master net%[2]d addrgenmode none up\n", tap, i)
			if _, err := h.Run(ctx, "sh", "-ec", script); err != nil {
				return err
			}
		}
		l.taps = append(l.taps, tap)
	}
	return nil
}

// freeForMacvtap takes a host's end of the cable to the client off its bridge. A macvtap device with index n is
// /dev/tapn, and both hosts have one /dev: host b gets other indices.
func (h *Host) freeForMacvtap(ctx context.Context, n int) error {
	script := fmt.Sprintf("ip link set up%d nomaster\n", n)
	if h == h.lab.B {
		script += "for i in $(seq 64); do ip link add other type bridge; ip link del other; done\n"
	}
	_, err := h.Run(ctx, "sh", "-ec", script)
	return err
}

// makeNetwork makes the network of the cards with number n. Before the first network it makes the client.
func (l *Lab) makeNetwork(ctx context.Context, n int) error {
	if slices.Contains(l.networks, n) {
		return nil
	}
	if err := l.makeClient(); err != nil {
		return err
	}
	const bridge = "ip link add net%[1]d type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n" +
		"ip link set net%[1]d addrgenmode none up\n"
	var client strings.Builder
	fmt.Fprintf(&client, bridge+"ip addr add %[2]v/24 dev net%[1]d\n", n, card.Client(n))
	for _, h := range l.Hosts() {
		fmt.Fprintf(&client, "ip link add port%[1]d%[2]s type veth peer name up%[1]d netns %[3]d\n"+
			"ip link set port%[1]d%[2]s master net%[1]d addrgenmode none up\n", n, h.Name, h.PID())
	}
	if _, err := l.C.Run(ctx, "sh", "-ec", client.String()); err != nil {
		return err
	}
	for _, h := range l.Hosts() {
		script := fmt.Sprintf(bridge+"ip link set up%[1]d master net%[1]d addrgenmode none up\n", n)
		if _, err := h.Run(ctx, "sh", "-ec", script); err != nil {
			return err
		}
	}
	l.networks = append(l.networks, n)
	return nil
}

// makeClient makes the third host, which has the VMs' clients. It echoes what arrives at card.EchoPort.
func (l *Lab) makeClient() error {
	if l.C != nil {
		return nil
	}
	c, err := l.newHost("c", "")
	if err != nil {
		return err
	}
	l.C = c
	var conn *net.UDPConn
	if err := c.InNetwork(func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: card.EchoPort})
		return err
	}); err != nil {
		return fmt.Errorf("echo of the client: %w", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		echo(conn)
	}()
	l.onClose(func() error {
		err := conn.Close()
		<-done
		return err
	})
	return nil
}

// echo sends back every packet until the socket is closed.
func echo(conn *net.UDPConn) {
	b := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = conn.WriteToUDPAddrPort(b[:n], from) // the guest notices a packet that is lost
		}
	}
}
