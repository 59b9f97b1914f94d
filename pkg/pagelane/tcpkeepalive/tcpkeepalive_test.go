// SPDX-License-Identifier: Apache-2.0

package tcpkeepalive

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKeep(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := Keep(c); err != nil {
		t.Fatal(err)
	}
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for option, want := range map[int]int{
		unix.TCP_KEEPIDLE: 10, unix.TCP_KEEPINTVL: 5, unix.TCP_KEEPCNT: 1, unix.TCP_USER_TIMEOUT: 15_000,
		unix.TCP_THIN_LINEAR_TIMEOUTS: 1, unix.TCP_RTO_MAX_MS: 1000,
	} {
		var got int
		controlErr := raw.Control(func(fd uintptr) { got, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option) })
		if option == unix.TCP_RTO_MAX_MS && errors.Is(err, unix.ENOPROTOOPT) {
			t.Log("this kernel has no TCP_RTO_MAX_MS, which came with Linux 6.15")
			continue
		}
		if controlErr != nil || err != nil || got != want {
			t.Errorf("option %d is %d, want %d (%v, %v)", option, got, want, controlErr, err)
		}
	}
}

func TestKeepLeavesOthersAlone(t *testing.T) {
	one, two := net.Pipe()
	defer one.Close()
	defer two.Close()
	if err := Keep(one); err != nil {
		t.Error(err)
	}
}
