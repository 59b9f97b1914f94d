// SPDX-License-Identifier: Apache-2.0

package card

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// up gives the card with that number its address and turns it on. It returns the card's name and its VM.
func up(number int) (name string, vm int, err error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return "", 0, err
	}
	for _, i := range interfaces {
		of, n, err := Of(i.HardwareAddr)
		if err != nil || n != number {
			continue
		}
		// Without IPv6 the kernel makes no addresses of its own and looks for no routers.
		knob := "/proc/sys/net/ipv6/conf/" + i.Name + "/disable_ipv6"
		if err := os.WriteFile(knob, []byte("1"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", 0, err
		}
		return i.Name, of, configure(i.Name, of, number)
	}
	return "", 0, fmt.Errorf("%d interfaces, and none has its hardware address: is there such a virtio-net-pci, "+
		"and its driver in the initramfs?", len(interfaces))
}

// configure does what ifconfig(8) does, see netdevice(7).
func configure(name string, vm, number int) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	for _, step := range []struct {
		what    string
		request uint
		address []byte
	}{
		{"address", unix.SIOCSIFADDR, Addr(vm, number).AsSlice()},
		{"netmask", unix.SIOCSIFNETMASK, []byte{255, 255, 255, 0}},
	} {
		request, err := unix.NewIfreq(name)
		if err == nil {
			err = request.SetInet4Addr(step.address)
		}
		if err == nil {
			err = unix.IoctlIfreq(socket, step.request, request)
		}
		if err != nil {
			return fmt.Errorf("%s of %s: %w", step.what, name, err)
		}
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_UP | unix.IFF_BROADCAST | unix.IFF_MULTICAST)
		err = unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, request)
	}
	if err != nil {
		return fmt.Errorf("turn %s on: %w", name, err)
	}
	return nil
}
