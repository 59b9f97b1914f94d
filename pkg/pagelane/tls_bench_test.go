// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// pages serves each range with memory of undefined content, because only sending is measured.
func pages(s *Stream) error {
	if err := s.Accept(); err != nil {
		return err
	}
	var request pagewire.Request
	var reply pagewire.Reply
	for {
		if err := s.Recv(&request); err != nil {
			return nil //nolint:nilerr // the client has hung up
		}
		for _, r := range request.Ranges {
			reply.Lease(int(r.Length))
			reply.Runs = append(reply.Runs[:0], pagewire.Run{Block: r.Block, Offset: r.Offset, Length: r.Length})
			if err := s.Send(&reply); err != nil {
				return nil //nolint:nilerr // as above
			}
		}
	}
}

// singly has TLS write each record by itself, as without records.go.
type singly struct {
	credentials.TransportCredentials
}

func (s singly) ClientHandshake(
	ctx context.Context, authority string, c net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	return s.TransportCredentials.ClientHandshake(ctx, authority, c.(*records).socket)
}

func (s singly) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return s.TransportCredentials.ServerHandshake(c.(*records).socket)
}

// way is one of the three kinds of lanes that BenchmarkEncryption compares: a lane for runs, and one for single pages.
type way struct {
	name       string
	bulk, page *Client
	megabytes  []float64 // per second, of each turn
	cpu        []float64 // seconds per GiB, of each turn
	trips      []time.Duration
}

func newWay(b *testing.B, name string, c pair) *way {
	b.Helper()
	address, _ := serve(b, c.server, true, pages)
	w := &way{name: name}
	for _, lane := range []**Client{&w.bulk, &w.page} {
		l, err := open(b, address, c.client, nil)
		if err != nil {
			b.Fatal(err)
		}
		*lane = l
	}
	w.bulk.alone = true
	return w
}

// processTime returns the CPU time of this process, which has both ends.
func processTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// sweep receives so many bytes in runs, with a few requests in flight, as the engine's sweep does.
func (w *way) sweep(b *testing.B, bytes int) {
	b.Helper()
	const run, ahead = 512 << 10, 4
	began, cpu := time.Now(), processTime(b)
	ask := &pagewire.Request{Ranges: []pagewire.Range{{Length: run}}}
	var reply pagewire.Reply
	for i := range bytes/run + ahead {
		if i < bytes/run {
			if err := w.bulk.Send(ask); err != nil {
				b.Fatal(err)
			}
		}
		if i >= ahead {
			if err := w.bulk.Recv(&reply); err != nil {
				b.Fatal(err)
			}
		}
	}
	took := time.Since(began)
	w.megabytes = append(w.megabytes, float64(bytes)/took.Seconds()/1e6)
	w.cpu = append(w.cpu, (processTime(b)-cpu).Seconds()/float64(bytes)*(1<<30))
}

// fault receives n single pages, one after another, and records how long each took.
func (w *way) fault(b *testing.B, n int) {
	b.Helper()
	ask := &pagewire.Request{Ranges: []pagewire.Range{{Length: 4096}}}
	var reply pagewire.Reply
	for range n {
		began := time.Now()
		if err := w.page.Send(ask); err != nil {
			b.Fatal(err)
		}
		if err := w.page.Recv(&reply); err != nil {
			b.Fatal(err)
		}
		w.trips = append(w.trips, time.Since(began))
	}
}

func quantile[T float64 | time.Duration](values []T, q float64) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(int(float64(len(sorted))*q), len(sorted)-1)]
}

// BenchmarkEncryption compares lanes without TLS, with TLS, and with TLS but without records.go. They take turns. b.N
// is the number of turns; ratios need about a dozen: -benchtime 12x. Both ends are in this process, each in threads of
// its own.
func BenchmarkEncryption(b *testing.B) {
	w := secure(b)
	ways := []*way{
		newWay(b, "plain", plaintext()),
		newWay(b, "tls", w),
		newWay(b, "single", pair{singly{w.server}, singly{w.client}}),
	}
	for b.Loop() {
		for _, w := range ways {
			w.sweep(b, 256<<20)
			w.fault(b, 2000)
		}
	}
	const µs = float64(time.Microsecond)
	for _, w := range ways {
		b.ReportMetric(quantile(w.megabytes, 0.5), w.name+"-MB/s")
		b.ReportMetric(quantile(w.cpu, 0.5), w.name+"-cpu-s/GiB")
		b.ReportMetric(float64(quantile(w.trips, 0.5))/µs, w.name+"-p50-µs")
		b.ReportMetric(float64(quantile(w.trips, 0.99))/µs, w.name+"-p99-µs")
	}
	plain := ways[0]
	for _, w := range ways[1:] {
		b.ReportMetric(quantile(w.megabytes, 0.5)/quantile(plain.megabytes, 0.5), w.name+"/plain-MB/s")
		b.ReportMetric(quantile(w.cpu, 0.5)/quantile(plain.cpu, 0.5), w.name+"/plain-cpu")
		b.ReportMetric(float64(quantile(w.trips, 0.5))/float64(quantile(plain.trips, 0.5)), w.name+"/plain-p50")
	}
}

// BenchmarkCipher measures the least that TLS can cost: encrypting and decrypting a page, and a full record, with the
// cipher that Go chooses if both ends have instructions for it.
func BenchmarkCipher(b *testing.B) {
	for _, size := range []int{4096, recordPlain} {
		b.Run(fmt.Sprint("AES-128-GCM/", size), func(b *testing.B) {
			block, err := aes.NewCipher(make([]byte, 16))
			if err != nil {
				b.Fatal(err)
			}
			aead, err := cipher.NewGCM(block)
			if err != nil {
				b.Fatal(err)
			}
			content, nonce := make([]byte, size, size+aead.Overhead()), make([]byte, aead.NonceSize())
			b.SetBytes(int64(size))
			for b.Loop() {
				sealed := aead.Seal(content[:0], nonce, content, nonce[:recordHeader])
				if _, err := aead.Open(sealed[:0], nonce, sealed, nonce[:recordHeader]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
