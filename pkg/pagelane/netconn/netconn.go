// SPDX-License-Identifier: Apache-2.0

// Package netconn unwraps connections.
package netconn

import "net"

// Find unwraps c with NetConn, as tls.Conn has it, and returns the first connection of type C. It may be c itself.
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
