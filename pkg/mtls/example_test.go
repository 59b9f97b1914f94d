// SPDX-License-Identifier: Apache-2.0

package mtls_test

import (
	"fmt"

	"google.golang.org/grpc"

	"github.com/migrated-vm/migrated/pkg/mtls"
)

// connect makes a client of a daemon whose certificate must have one of two names.
func connect(address string) (*grpc.ClientConn, error) {
	files := mtls.Files{
		Certificate: "/etc/migrated/tls/cert.pem", Key: "/etc/migrated/tls/key.pem", CA: "/etc/migrated/tls/ca.pem",
	}
	creds, err := files.Client(address, mtls.AnyOf([]string{"spiffe://example.com/host-a", "host-a.example.com"}))
	if err != nil {
		return nil, err
	}
	return grpc.NewClient(address, grpc.WithTransportCredentials(creds))
}

// A server with none of the names is refused.
func ExampleFiles_Client() {
	_, err := connect("host-a.example.com:7600")
	fmt.Println(err != nil) // the files are missing here
	// Output: true
}
