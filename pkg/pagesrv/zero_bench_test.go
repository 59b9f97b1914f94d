// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// isZeroWords and isZeroShifted are other ways to write isZero, which is compared with them.
func isZeroWords(page []byte) bool {
	for ; len(page) >= 32; page = page[32:] {
		if binary.NativeEndian.Uint64(page)|binary.NativeEndian.Uint64(page[8:])|
			binary.NativeEndian.Uint64(page[16:])|binary.NativeEndian.Uint64(page[24:]) != 0 {
			return false
		}
	}
	return true
}

func isZeroShifted(page []byte) bool {
	return page[0] == 0 && bytes.Equal(page[1:], page[:len(page)-1])
}

func BenchmarkZeroDetection(b *testing.B) {
	for _, way := range []struct {
		name string
		zero func([]byte) bool
	}{{"equal", isZero}, {"words", isZeroWords}, {"shifted", isZeroShifted}} {
		b.Run(way.name, func(b *testing.B) {
			run := make([]byte, 512<<10)
			b.SetBytes(int64(len(run)))
			for b.Loop() {
				for at := 0; at < len(run); at += 4096 {
					if !way.zero(run[at : at+4096]) {
						b.Fatal("a zero page was taken for data")
					}
				}
			}
		})
	}
}
