// SPDX-License-Identifier: Apache-2.0

// Package netconn finds the connection that others are wrapped around.
package netconn

import "net"

// Find returns the outermost connection of type C that c is, or that c is wrapped around: whoever wraps one says so by
// NetConn, as tls.Conn does.
func Find[C net.Conn](c net.Conn) (found C, ok bool) {
	for {
		if found, ok = c.(C); ok {
			return found, true
		}
		around, wraps := c.(interface{ NetConn() net.Conn })
		if !wraps {
			return found, false
		}
		c = around.NetConn()
	}
}
