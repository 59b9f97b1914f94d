// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"encoding/base64"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The names of gRPC's own fields: the protocol's document PROTOCOL-HTTP2.md.
const (
	statusField  = "grpc-status"
	messageField = "grpc-message"
	detailsField = "grpc-status-details-bin"
)

// ended returns the error that the trailers of a call stand for; io.EOF for status OK.
func ended(f *http2.MetaHeadersFrame) error {
	code, message, details := codes.Unknown, "", ""
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
		case detailsField:
			details = field.Value
		}
	}
	if code == codes.OK {
		return io.EOF
	}
	return withDetails(status.New(code, message), details).Err()
}

// withDetails returns the status with the details in field. It ignores details that it cannot decode.
func withDetails(st *status.Status, field string) *status.Status {
	coded, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(field, "="))
	if err != nil || len(coded) == 0 {
		return st
	}
	full := status.New(codes.OK, "").Proto()
	if proto.Unmarshal(coded, full) != nil || codes.Code(full.GetCode()) != st.Code() {
		return st
	}
	return status.FromProto(full)
}

// detailsOf returns the field with the details of a status, or nothing if it has none.
func detailsOf(st *status.Status) []hpack.HeaderField {
	full := st.Proto()
	if len(full.GetDetails()) == 0 {
		return nil
	}
	coded, err := proto.Marshal(full)
	if err != nil {
		return nil // the code and the message say it, too
	}
	return []hpack.HeaderField{{Name: detailsField, Value: base64.RawStdEncoding.EncodeToString(coded)}}
}

// escaped percent-encodes, for a header, % and all bytes that are not printable ASCII.
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
