// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// jsonLine returns a message as one line of JSON. It has fields that are zero as
// well, so that scripts need no defaults.
func jsonLine(m proto.Message) ([]byte, error) {
	data, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encoding the answer as JSON: %w", err)
	}
	// protojson varies its white space on purpose.
	var line bytes.Buffer
	if err := json.Compact(&line, data); err != nil {
		return nil, fmt.Errorf("encoding the answer as JSON: %w", err)
	}
	return line.Bytes(), nil
}

// printJSON prints a message as JSON on one line.
func (a *app) printJSON(m proto.Message) error {
	line, err := jsonLine(m)
	if err != nil {
		return err
	}
	a.printf("%s\n", line)
	return nil
}

// printMessage is printJSON for a display. It ignores the error, because only
// strings that are not UTF-8 could cause one, and gRPC does not transfer those.
func (a *app) printMessage(m *migratedv1.Migration) { _ = a.printJSON(m) }
