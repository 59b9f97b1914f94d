// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Element N of QEMU's is [2^N, 2^(N+1)) µs.
func TestQEMUBuckets(t *testing.T) {
	for d, want := range map[time.Duration]int{
		0: 0, 500 * time.Nanosecond: 0, time.Microsecond: 0, 1999 * time.Nanosecond: 0, 2 * time.Microsecond: 1,
		255 * time.Microsecond: 7, 256 * time.Microsecond: 8, 511 * time.Microsecond: 8, time.Second: 19, -time.Second: 0,
	} {
		if got := qemuBucket(d); got != want {
			t.Errorf("%v is in bucket %d, want %d", d, got, want)
		}
	}
	bucket := func(longest time.Duration, count uint64) *migratedv1.LatencyBucket {
		return &migratedv1.LatencyBucket{Longest: durationpb.New(longest), Count: count}
	}
	got := inQEMUBuckets([]*migratedv1.LatencyBucket{
		bucket(800*time.Nanosecond, 1), bucket(1900*time.Nanosecond, 2),
		bucket(9*time.Microsecond, 4), bucket(15*time.Microsecond, 8),
	})
	if want := []uint64{3, 0, 0, 12}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if none := inQEMUBuckets(nil); none == nil || len(none) != 0 {
		t.Errorf("a move without a fault has %#v: it has told", none)
	}
	if name := bucketName(8); name != "256µs–512µs" {
		t.Error(name)
	}
	if sum := addFaults(addFaults(nil, []uint64{1, 2}), []uint64{1, 1, 1}); !slices.Equal(sum, []uint64{2, 3, 1}) {
		t.Errorf("sum %v", sum)
	}
}

func TestLinkUse(t *testing.T) {
	begin := time.Now()
	const rate = 8e6 // a byte a µs
	var seen []carried
	bytes := int64(0)
	for at := -100; at <= 2000; at += 25 { // half of the rate for a second, then 95 %
		seen = append(seen, carried{begin.Add(time.Duration(at) * time.Millisecond), bytes})
		if bytes += 12500; at >= 1000 {
			bytes += 11250
		}
	}
	end := begin.Add(2 * time.Second)
	if got := use(seen, begin, end, rate); !near(got, 0.725) {
		t.Errorf("used %v", got)
	}
	if got := use(seen, begin, begin.Add(time.Second), rate); !near(got, 0.5) {
		t.Errorf("used %v of the first second", got)
	}
	if got := steadyUse(seen, begin.Add(time.Second), end, rate); !near(got, 0.95) {
		t.Errorf("steadily %v of the second one", got)
	}
	// A ninth of the first quarter of a second with 90 % was still slow.
	if got := usedWellAfter(seen, begin, end, rate); got != 975*time.Millisecond && got != time.Second {
		t.Errorf("used well after %v", got)
	}
	if got := usedWellAfter(seen, begin, begin.Add(time.Second), rate); got != time.Second {
		t.Errorf("never used well, so for all of it: %v", got)
	}
	if use(nil, begin, end, rate) != 0 || steadyUse(nil, begin, end, rate) != 0 {
		t.Error("nobody looked, and something was used")
	}
}

// If the path changes, only what comes after the change counts.
func TestWireOfPath(t *testing.T) {
	resumed := time.Now()
	at := func(s float64) time.Time { return resumed.Add(time.Duration(s * float64(time.Second))) }
	w := &wireWatch{network: network{link: &lab.Link{Rate: 8e6}, becomes: &lab.Link{Rate: 16e6}}, changed: at(1)}
	for s := 0.0; s <= 3; s += 0.25 {
		w.seen = append(w.seen, carried{at(s), int64(s * 1e6)}) // as fast as the first link allows
	}
	var f figures
	f.ofWire(w, resumed, at(3))
	if !near(f.LinkUse, 0.5) || !near(f.LinkSteady, 0.5) || f.UsedWellAfter != 2*time.Second {
		t.Errorf("%+v", f)
	}
	var early figures
	early.ofWire(w, resumed, at(0.5))
	early.ofWire(nil, resumed, at(3))
	if early.LinkUse != 0 || early.UsedWellAfter != 0 {
		t.Errorf("of a move that ended before the path changed: %+v", early)
	}
}

// Both QEMU and the daemons find their files, and each host has its own.
func TestCertify(t *testing.T) {
	a, b := &lab.Host{Name: "a", Addr: "10.77.0.1"}, &lab.Host{Name: "b", Addr: "10.77.0.2"}
	c, err := certify(a, b)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem",
	} {
		if _, err := os.Stat(filepath.Join(c.ofQEMU(a), name)); err != nil {
			t.Error(err)
		}
	}
	for _, endpoint := range []string{"server", "client"} {
		pair, err := tls.LoadX509KeyPair(
			filepath.Join(c.ofQEMU(a), endpoint+"-cert.pem"), filepath.Join(c.ofQEMU(a), endpoint+"-key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		const uses = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment
		if pair.Leaf.KeyUsage != uses ||
			!slices.ContainsFunc(pair.Leaf.IPAddresses, func(ip net.IP) bool { return ip.String() == a.Addr }) {
			t.Errorf("%s: for %b, addresses %v", endpoint, pair.Leaf.KeyUsage, pair.Leaf.IPAddresses)
		}
		roots := x509.NewCertPool()
		authority, err := os.ReadFile(filepath.Join(c.ofQEMU(a), "ca-cert.pem"))
		if err != nil || !roots.AppendCertsFromPEM(authority) {
			t.Fatalf("authority: %v", err)
		}
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{
			Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		}); err != nil {
			t.Error(err)
		}
	}
	if args := c.serve(b); len(args) != 6 || args[1] == c.serve(a)[1] {
		t.Errorf("serve %v", args)
	}
	if err := c.remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(c.dir); !os.IsNotExist(err) {
		t.Errorf("the keys are left: %v", err)
	}
}
