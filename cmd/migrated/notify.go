// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"os"
)

// notify tells the service manager the daemon's state, sd_notify(3): one
// datagram to the socket in NOTIFY_SOCKET. Without a service manager, or with
// one that does not listen, there is nobody to tell and nothing to be done.
func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	// A leading @ means the abstract name space, in Go as in the protocol.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = conn.Write([]byte(state))
}
