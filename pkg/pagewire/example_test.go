// SPDX-License-Identifier: Apache-2.0

package pagewire_test

import (
	"fmt"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// A request crosses as Protocol Buffers, which any gRPC program reads.
func ExampleCodec() {
	sent, err := pagewire.Codec{}.Marshal(&pagewire.Request{
		Ranges: []pagewire.Range{{Block: 1, Offset: 8192, Length: 4096}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer sent.Free()
	var got pagewire.Request
	err = pagewire.Codec{}.Unmarshal(sent, &got)
	fmt.Println(sent.Len(), got.Ranges, err)
	// Output: 10 [{1 8192 4096}] <nil>
}
