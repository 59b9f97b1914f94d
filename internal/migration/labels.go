// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"unicode/utf8"

	"github.com/migrated-vm/migrated/internal/printable"
)

// Limits on labels, as in MigrationSpec.
const (
	mostLabels   = 32
	longestValue = 256 // bytes
)

var labelKey = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,63}$`)

// CheckLabels returns an error if the labels of a specification or of a filter are not valid.
func CheckLabels(labels map[string]string) error {
	if n := len(labels); n > mostLabels {
		return fmt.Errorf("labels: there are %d, more than %d", n, mostLabels)
	}
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		value := labels[key]
		switch {
		case !labelKey.MatchString(key):
			return fmt.Errorf("labels: the key %q is not 1 to 63 letters, digits, '.', '_', '/' and '-'", key)
		case len(value) > longestValue:
			return fmt.Errorf("labels: the value of %s has %d bytes, more than %d", key, len(value), longestValue)
		case !utf8.ValidString(value) || printable.Line(value) != value:
			return fmt.Errorf("labels: the value of %s, %q, is no printable text", key, value)
		}
	}
	return nil
}
