// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"net"
	"sync"

	"google.golang.org/grpc/credentials"

	"github.com/migrated-vm/migrated/internal/alive"
	"github.com/migrated-vm/migrated/internal/within"
)

// Listener accepts of l only connections that there is room for; others are closed at once. A gRPC server must use
// Handshake's credentials, another one call Established.
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
			_ = alive.Keep(c) // it is closed already if that fails
			admitted := &conn{Conn: c}
			admitted.established = sync.OnceFunc(func() { l.peers.established(address) })
			admitted.left = sync.OnceFunc(func() { l.peers.left(address) })
			return admitted, nil
		}
		l.peers.refusals.Refused(why, address)
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // a reset: the kernel keeps nothing of it either
		}
		_ = c.Close() // nothing was said
	}
}

// A conn is a connection that counts.
type conn struct {
	net.Conn

	established, left func()
}

// Close gives its place back.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.established()
	c.left()
	return err
}

// NetConn is the connection itself, as tls.Conn has it.
func (c *conn) NetConn() net.Conn { return c.Conn }

// Handshake makes the end of inner's handshake known to the Listener.
func Handshake(inner credentials.TransportCredentials) credentials.TransportCredentials {
	return handshake{inner}
}

type handshake struct {
	credentials.TransportCredentials
}

// ServerHandshake is that of the credentials inside.
func (h handshake) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, info, err := h.TransportCredentials.ServerHandshake(raw)
	if err == nil {
		Established(raw)
	}
	return secure, info, err
}

// Established says that the handshake of a Listener's connection is over, for servers that do not use Handshake.
func Established(c net.Conn) {
	if admitted, ok := within.Conn[*conn](c); ok {
		admitted.established()
	}
}

// Clone copies the credentials inside.
func (h handshake) Clone() credentials.TransportCredentials {
	return handshake{h.TransportCredentials.Clone()}
}
