// SPDX-License-Identifier: Apache-2.0

package web

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	gateway "github.com/migrated-vm/migrated/proto/gateway/migrated/v1"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// printed writes messages in the form that commands use for --json.
var printed = protojson.MarshalOptions{EmitDefaultValues: true}

// streamed writes JSON. A stream has one object on each line.
type streamed struct{ runtime.JSONPb }

// StreamContentType returns the type of newline-delimited JSON.
func (*streamed) StreamContentType(any) string { return "application/x-ndjson" }

// newGateway returns a handler that turns requests into calls over conn. It refuses unknown fields, and passes no
// header on as metadata but those of a trace.
func newGateway(conn *grpc.ClientConn) (http.Handler, error) {
	mux := runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, &streamed{runtime.JSONPb{MarshalOptions: printed}}),
		runtime.WithIncomingHeaderMatcher(traceHeaders),
		runtime.WithOutgoingHeaderMatcher(noHeaders),
		runtime.WithOutgoingTrailerMatcher(noHeaders),
		runtime.WithDisablePathLengthFallback(),
		runtime.WithDisableHTTPMethodOverride(),
		runtime.WithRoutingErrorHandler(notRouted))
	return mux, errors.Join(
		gateway.RegisterControlServiceHandler(context.Background(), mux, conn),
		gateway.RegisterEvacuationServiceHandler(context.Background(), mux, conn))
}

// traceHeaders passes on only the headers of W3C's trace context.
func traceHeaders(name string) (string, bool) {
	switch name {
	case "Traceparent", "Tracestate":
		return name, true
	}
	return "", false
}

func noHeaders(string) (string, bool) { return "", false }

// notRouted answers a request that is not a call of the control API.
func notRouted(
	_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, httpStatus int,
) {
	code := codes.NotFound
	if httpStatus == http.StatusMethodNotAllowed {
		code = codes.Unimplemented
	}
	refuse(w, httpStatus, code, r.Method+" "+r.URL.Path+" is no call of the control API", "docs/http.md has all of them")
}

// Refuse answers a caller who is not allowed to call.
func Refuse(w http.ResponseWriter, err error) {
	refuse(w, http.StatusForbidden, codes.PermissionDenied, err.Error(),
		"operators in the daemon's configuration says who may")
}

// refuse answers with an error in the form of calls' errors: a google.rpc.Status with a MigrationError.
func refuse(w http.ResponseWriter, httpStatus int, code codes.Code, message, remedy string) {
	st := status.New(code, message)
	if detailed, err := st.WithDetails(&migratedv1.MigrationError{Message: message, Remedy: remedy}); err == nil {
		st = detailed
	}
	text, err := printed.Marshal(st.Proto())
	if err != nil { // message is not valid UTF-8
		text, _ = json.Marshal(map[string]any{"code": code, "message": remedy})
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(httpStatus)
	_, _ = w.Write(append(text, '\n')) // fails if the caller has disconnected
}
