// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Announcement is a frame by which a network card tells all switches where it is now.
type Announcement struct {
	At   time.Time
	RARP bool // QEMU sent it; otherwise it is a gratuitous ARP of the guest
}

// listener receives the announcements of one card at the client's bridge.
type listener struct {
	mac    net.HardwareAddr
	socket *socket
	done   chan struct{}
	mu     sync.Mutex // of heard
	heard  []Announcement
}

// Offsets in bytes in an Ethernet frame with ARP for IPv4 (RFC 826 and RFC 903).
const (
	frameSource   = 6
	frameType     = 12
	arpSenderIP   = 28
	arpTargetIP   = 38
	arpFrame      = 42 // bytes
	frameMaxBytes = 1514
)

// listen starts a listener for the card with that hardware address in the network with that number.
func (l *Lab) listen(mac net.HardwareAddr, network int) (*listener, error) {
	program, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: frameType, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_ARP, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_RARP, SkipTrue: 1},
		bpf.RetConstant{Val: frameMaxBytes},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return nil, err
	}
	filters := make([]unix.SockFilter, len(program))
	for i, p := range program {
		filters[i] = unix.SockFilter{Code: p.Op, Jt: p.Jt, Jf: p.Jf, K: p.K}
	}
	s, err := l.C.openSocket(unix.AF_PACKET, unix.SOCK_RAW, 0, func(fd int) error {
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(filters)), Filter: &filters[0]}); err != nil {
			return err
		}
		bridge, err := net.InterfaceByName(fmt.Sprintf("net%d", network))
		if err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}) // in network order
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: bridge.Index})
	})
	if err != nil {
		return nil, fmt.Errorf("hear %v: %w", mac, err)
	}
	h := &listener{mac: mac, socket: s, done: make(chan struct{})}
	go h.run()
	return h, nil
}

func (h *listener) run() {
	defer close(h.done)
	frame := make([]byte, frameMaxBytes)
	for {
		n, at, err := h.socket.receive(frame)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil {
			continue // the bridge is down at the moment
		}
		if rarp, ok := announces(frame[:n], h.mac); ok {
			h.mu.Lock()
			h.heard = append(h.heard, Announcement{At: at, RARP: rarp})
			h.mu.Unlock()
		}
	}
}

// announces reports whether a frame is an announcement of that card, and whether it is a RARP.
func announces(frame []byte, mac net.HardwareAddr) (rarp, ok bool) {
	if len(frame) < arpFrame || !bytes.Equal(frame[frameSource:frameType], mac) {
		return false, false
	}
	switch binary.BigEndian.Uint16(frame[frameType:]) {
	case unix.ETH_P_RARP:
		return true, true
	case unix.ETH_P_ARP:
		return false, bytes.Equal(frame[arpSenderIP:arpSenderIP+4], frame[arpTargetIP:arpTargetIP+4])
	default:
		return false, false
	}
}

func (h *listener) announcements() []Announcement {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Announcement(nil), h.heard...)
}

func (h *listener) close() error {
	err := h.socket.end()
	<-h.done
	return errors.Join(err, h.socket.file.Close())
}
