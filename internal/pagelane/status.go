// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The names of gRPC's own fields: the protocol's document PROTOCOL-HTTP2.md.
const (
	statusField  = "grpc-status"
	messageField = "grpc-message"
)

// ended makes an error of the fields that end a call; io.EOF where it ended well.
func ended(f *http2.MetaHeadersFrame) error {
	code, message := codes.Unknown, ""
	for _, field := range f.RegularFields() {
		switch field.Name {
		case statusField:
			n, err := strconv.ParseUint(field.Value, 10, 32)
			if err != nil {
				return fmt.Errorf("%w: status %q", ErrBroken, field.Value)
			}
			code = codes.Code(n)
		case messageField:
			message = field.Value
			if text, err := url.PathUnescape(message); err == nil {
				message = text
			}
		}
	}
	if code == codes.OK {
		return io.EOF
	}
	return status.Error(code, message)
}

// escaped is text as it may stand in a header: what is not printable ASCII, and %, percent-encoded.
func escaped(text string) string {
	var out strings.Builder
	for _, b := range []byte(text) {
		if b < ' ' || b > '~' || b == '%' {
			fmt.Fprintf(&out, "%%%02X", b)
		} else {
			out.WriteByte(b)
		}
	}
	return out.String()
}
