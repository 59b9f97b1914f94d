// SPDX-License-Identifier: Apache-2.0

package config

import (
	"reflect"
	"slices"
)

// reloaded are the keys that Reload takes over.
var reloaded = []string{"peers", "operators", "metrics_clients", "bandwidth", "host_bandwidth"}

// Reload returns c with next's values of the keys that can change while the daemon runs. waiting are the other keys
// that differ: they change when the daemon is started again. If the result is not valid, Reload returns the error of
// Validate.
func (c Config) Reload(next Config) (changed Config, waiting []string, err error) {
	changed = c
	to, from := reflect.ValueOf(&changed).Elem(), reflect.ValueOf(next)
	for i := range to.NumField() {
		key := to.Type().Field(i).Tag.Get("yaml")
		switch {
		case reflect.DeepEqual(to.Field(i).Interface(), from.Field(i).Interface()):
		case slices.Contains(reloaded, key):
			to.Field(i).Set(from.Field(i))
		default:
			waiting = append(waiting, key)
		}
	}
	if err := changed.Validate(); err != nil {
		return Config{}, nil, err
	}
	return changed, waiting, nil
}
