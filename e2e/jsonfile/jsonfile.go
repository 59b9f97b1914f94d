// SPDX-License-Identifier: Apache-2.0

// Package jsonfile writes the reports of the commands below e2e.
package jsonfile

import (
	"encoding/json"
	"os"
)

// Write writes v to a file as indented JSON, for people and programs.
func Write(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
