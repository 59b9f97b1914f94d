// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// vnetHeader is the size of struct virtio_net_hdr, which precedes every packet
// of a TUN device with IFF_VNET_HDR. It is what the kernel's network stack
// tells a network card about the packet, in the machine's byte order.
const vnetHeader = 10

// maxPacket is the size of the largest packet that a TUN device reads or
// writes: the limit of an IP header's length field.
const maxPacket = vnetHeader + 1<<16

// InNetwork runs f on a thread that is in the host's network. A socket that f
// makes stays in that network. A goroutine that f starts is not in it.
func (h *Host) InNetwork(f func() error) error {
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	theirs, err := os.Open(h.ns("net"))
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer theirs.Close()
	if err := unix.Setns(int(theirs.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the network of host %s (is this root?): %w", h.Name, err)
	}
	failed := f()
	// The thread must leave the network again. It may be the process's first, whose
	// namespace counts as that of the process when the host's processes are ended. A
	// thread that cannot leave stays locked to this goroutine, and no other gets it.
	if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); err != nil {
		return errors.Join(failed, fmt.Errorf("leave the network of host %s: %w", h.Name, err))
	}
	runtime.UnlockOSThread()
	return failed
}

// openTUN makes the device "cable" on the host and returns its other end, which
// is non-blocking. The device is removed when fd is closed. The kernel passes TCP
// packets of up to 64 KiB through it whole, as through a network card that cuts
// them into segments when it sends and joins them when it receives.
func (h *Host) openTUN() (fd int, err error) {
	err = h.InNetwork(func() error {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open /dev/net/tun: %w: if it is missing, mknod /dev/net/tun c 10 200; "+
				"else the kernel needs CONFIG_TUN, or modprobe tun", err)
		}
		return nil
	})
	if err != nil {
		return -1, err
	}
	request, err := unix.NewIfreq("cable")
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request) // makes the device in the network in which fd was opened
	}
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6)
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("TUN device of host %s: %w", h.Name, err), unix.Close(fd))
	}
	return fd, nil
}

// wireBytes is the number of bytes of a packet on an Ethernet cable. The packet
// is cut into segments, each with its own headers and 38 bytes of preamble, Ethernet
// header, checksum and gap. Without these 38, a segment has at least 46 bytes.
func wireBytes(packet []byte) int64 {
	const framing, shortest = 38, 46
	size := len(packet) - vnetHeader
	segment := int(binary.NativeEndian.Uint16(packet[4:])) // gso_size
	if packet[1] == unix.VIRTIO_NET_HDR_GSO_NONE || segment == 0 {
		return int64(max(size, shortest) + framing)
	}
	// The kernel's hdr_len is only a hint. TCP's header begins at csum_start and
	// contains its length: the headers end there.
	headers := int(binary.NativeEndian.Uint16(packet[6:]))
	if tcpLength := vnetHeader + headers + 12; tcpLength < len(packet) {
		headers += int(packet[tcpLength]>>4) * 4
	}
	segments := (size - headers + segment - 1) / segment
	return int64(size + (segments-1)*headers + segments*framing)
}
