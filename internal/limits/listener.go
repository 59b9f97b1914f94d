// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"net"
	"sync"

	"google.golang.org/grpc/credentials"

	"github.com/migrated-vm/migrated/pkg/pagelane/netconn"
	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
)

// Listener returns a listener that accepts the connections of l within the limits and closes others at once. A gRPC
// server on it must use credentials made by Handshake, and another server must call Established.
func (p *Peers) Listener(l net.Listener) net.Listener { return &listener{l, p} }

type listener struct {
	net.Listener

	peers *Peers
}

// Accept waits for a connection that is admitted.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		address := Network(c.RemoteAddr())
		why := l.peers.admit(address)
		if why == "" {
			_ = tcpkeepalive.Keep(c) // it is closed already if that fails
			admitted := &conn{Conn: c}
			admitted.established = sync.OnceFunc(func() { l.peers.established(address) })
			admitted.closed = sync.OnceFunc(func() { l.peers.closed(address) })
			return admitted, nil
		}
		l.peers.refusals.Refused(why, address)
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // close resets the connection, and the kernel keeps nothing of it
		}
		_ = c.Close() // nothing was said
	}
}

// A conn is a connection that is counted. Its functions may be called repeatedly.
type conn struct {
	net.Conn

	established, closed func()
}

// Close closes the connection, which is not counted any more.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.established()
	c.closed()
	return err
}

// NetConn returns the connection inside, as tls.Conn's method does.
func (c *conn) NetConn() net.Conn { return c.Conn }

// Handshake returns credentials that tell the Listener when inner's handshake has ended.
func Handshake(inner credentials.TransportCredentials) credentials.TransportCredentials {
	return handshake{inner}
}

type handshake struct {
	credentials.TransportCredentials
}

// ServerHandshake does the handshake of the credentials inside.
func (h handshake) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, info, err := h.TransportCredentials.ServerHandshake(raw)
	if err == nil {
		Established(raw)
	}
	return secure, info, err
}

// Established tells a Listener that the handshake of its connection c has ended. It is for servers that do not use
// Handshake.
func Established(c net.Conn) {
	if admitted, ok := netconn.Find[*conn](c); ok {
		admitted.established()
	}
}

// Clone copies the credentials inside.
func (h handshake) Clone() credentials.TransportCredentials {
	return handshake{h.TransportCredentials.Clone()}
}
