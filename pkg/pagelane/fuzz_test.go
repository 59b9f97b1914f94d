// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// scripted is a connection that reads from says and discards what is written.
type scripted struct {
	net.Conn
	says io.Reader
}

func (s *scripted) Read(p []byte) (int, error)  { return s.says.Read(p) }
func (s *scripted) Write(p []byte) (int, error) { return len(p), nil }

// FuzzServer serves a client that sends anything. It must return.
func FuzzServer(f *testing.F) {
	hello, err := greeting("source", metadata.Pairs(pagewire.MigrationIDKey, "m1", pagewire.MigrationTokenKey, "secret"))
	if err != nil {
		f.Fatal(err)
	}
	said := bytes.NewBuffer(hello)
	frames := http2.NewFramer(said, nil)
	for _, err := range []error{
		frames.WriteData(stream, false, request(f, 1, 4096)), frames.WritePing(false, [8]byte{}),
		frames.WriteWindowUpdate(stream, 10), frames.WriteData(stream, true, request(f, 2, 8192)),
	} {
		if err != nil {
			f.Fatal(err)
		}
	}
	f.Add(hello[len(http2.ClientPreface):])
	f.Add(said.Bytes()[len(http2.ClientPreface):])
	f.Fuzz(func(t *testing.T, says []byte) {
		c := &scripted{says: io.MultiReader(bytes.NewReader([]byte(http2.ClientPreface)), bytes.NewReader(says))}
		s := newStream(nil, c, bufio.NewReaderSize(c, readBuffer))
		md, err := s.greet()
		if err != nil {
			return
		}
		s.ctx = metadata.NewIncomingContext(t.Context(), md)
		var asked pagewire.Request
		var reply pagewire.Reply
		for s.Recv(&asked) == nil {
			reply.Lease(512)
			reply.Runs = append(reply.Runs[:0], pagewire.Run{Length: 512})
			if s.Send(&reply) != nil {
				return
			}
		}
	})
}

// FuzzClient reads from a server that sends anything. It must return.
func FuzzClient(f *testing.F) {
	var said bytes.Buffer
	nobody := &scripted{Conn: nil, says: nil}
	t := newStream(&socket{Conn: nobody}, nobody, nil)
	t.Conn = &recorded{to: &said}
	var reply pagewire.Reply
	reply.Lease(4096)
	reply.Runs = append(reply.Runs, pagewire.Run{Length: 4096})
	if err := t.Accept(); err != nil {
		f.Fatal(err)
	}
	if err := t.Send(&reply); err != nil {
		f.Fatal(err)
	}
	t.finish(io.ErrUnexpectedEOF)
	f.Add(said.Bytes())
	f.Fuzz(func(_ *testing.T, says []byte) {
		c := &scripted{says: bytes.NewReader(says)}
		l := &Client{conn: newConn(c, bufio.NewReaderSize(c, readBuffer), wholeWindow), cancel: func() {}}
		l.side = l
		var reply pagewire.Reply
		for {
			message, err := l.message(pagewire.MaxReplyBytes)
			if err != nil || reply.Decode(message) != nil {
				return
			}
		}
	})
}

// recorded is a connection that keeps what is written.
type recorded struct {
	net.Conn
	to io.Writer
}

func (r *recorded) Write(p []byte) (int, error) { return r.to.Write(p) }
