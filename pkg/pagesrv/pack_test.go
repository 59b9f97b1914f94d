// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/stamp"
	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// alike fills a file with all kinds of pages next to each other: holes, zeros, data that packs, and data that does not.
func alike(page int64) []byte {
	if page%10 < 2 {
		return stamped(stamp.Random)(page)
	}
	return mixed(page)
}

// seen counts what the replies of a lane had: how many with which compression, and bytes as sent and unpacked.
type seen struct {
	how              map[pagewire.Compression]int
	carried, content uint64
}

// fetchAll requests the whole file on a lane, in runs of so many bytes, and compares it.
func fetchAll(t *testing.T, lane testLane, file string, run uint32) seen {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s := seen{how: map[pagewire.Compression]int{}}
	got := make([]byte, len(content))
	var reply pagewire.Reply
	defer reply.Release()
	for at := uint64(0); at < uint64(len(content)); at += uint64(run) {
		if err := lane.SendMsg(&pagewire.Request{Ranges: []pagewire.Range{{Offset: at, Length: run}}}); err != nil {
			t.Fatal(err)
		}
		for left := run; left > 0; {
			if err := lane.RecvMsg(&reply); err != nil {
				t.Fatal(err)
			}
			if len(reply.Data) > 0 {
				s.how[reply.Compression()]++
			}
			s.carried += uint64(reply.Carried())
			s.content += uint64(len(reply.Data))
			data := reply.Data
			for _, r := range reply.Runs {
				left -= r.Length
				if !r.Zero {
					copy(got[r.Offset:], data[:r.Length])
					data = data[r.Length:]
				}
			}
		}
	}
	if !bytes.Equal(got, content) {
		t.Error("what came is not the file")
	}
	return s
}

// TestOnlyWhatIsAnnounced: a lane gets only compressions that it announced, whether packing pays or not, and all pages
// come as they are.
func TestOnlyWhatIsAnnounced(t *testing.T) {
	const size = 2 << 20
	f := ramFile(t, size, alike)
	for _, run := range []uint32{4 << 10, 64 << 10, 512 << 10} {
		for _, test := range []struct {
			unpackable []string
			s2, zstd   bool
		}{
			{nil, false, false},
			{[]string{"lz9"}, false, false},
			{[]string{"s2"}, true, false},
			{[]string{"zstd"}, false, run >= bulkReply/2}, // half of the pages are zero, so a reply has half as many bytes
			{[]string{pagewire.Unpackable}, true, run >= bulkReply/2},
		} {
			t.Run(fmt.Sprint(run>>10, "KiB/", test.unpackable), func(t *testing.T) {
				e, lane := offer(t, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: size, PageSize: 4096}), test.unpackable...)
				e.link.ps.Store(allPays)
				s := fetchAll(t, lane, f.Name(), run)
				if s.how[pagewire.S2] > 0 && !test.s2 || s.how[pagewire.Zstd] > 0 && !test.zstd {
					t.Errorf("replies by compression: %v", s.how)
				}
				if (s.how[pagewire.S2]+s.how[pagewire.Zstd] > 0) != (test.s2 || test.zstd && run >= 2*bulkReply) {
					t.Errorf("replies by compression: %v", s.how)
				}
				if got := e.Stats(); got.Bytes != s.carried || got.PageBytes != s.content {
					t.Errorf("counted %d of %d bytes, received %d of %d", got.Bytes, got.PageBytes, s.carried, s.content)
				}
				if s.how[pagewire.None] == 0 && run < 64<<10 {
					t.Errorf("no page was sent raw: %v", s.how)
				}
			})
		}
	}
}

// TestStampedMemory: noise is sent raw, and other memory packed, on a link on which all packing pays.
func TestStampedMemory(t *testing.T) {
	const size = 4 << 20
	for _, test := range []struct {
		fill      stamp.Fill
		numerator uint64 // of 20 bytes of content, how many are sent at most
	}{{stamp.Random, 20}, {stamp.ZeroMix, 20}, {stamp.Compressible, 1}} {
		for _, run := range []uint32{4 << 10, 512 << 10} {
			t.Run(fmt.Sprint(test.fill, "/", run>>10, "KiB"), func(t *testing.T) {
				f := ramFile(t, size, stamped(test.fill))
				e, lane := offer(t, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: size, PageSize: 4096}), pagewire.Unpackable)
				e.link.ps.Store(allPays)
				s := fetchAll(t, lane, f.Name(), run)
				if s.carried*20 > s.content*test.numerator {
					t.Errorf("%d bytes for %d", s.carried, s.content)
				}
				if test.fill != stamp.Compressible && (s.carried != s.content || s.how[pagewire.None] == 0 || len(s.how) > 1) {
					t.Errorf("%d bytes for %d of noise: %v", s.carried, s.content, s.how)
				}
			})
		}
	}
}
