// SPDX-License-Identifier: Apache-2.0

package process

import (
	"errors"
	"testing"
)

func TestCheckUser(t *testing.T) {
	here := Credentials{UID: 998, GID: 997, Groups: []uint32{104}}
	if err := here.CheckUser(Credentials{UID: 998, GID: 997}); err != nil {
		t.Error(err)
	}
	var other *UserError
	err := here.CheckUser(Credentials{UID: 999, GID: 997})
	if !errors.As(err, &other) || other.Here.UID != 998 || other.Source.UID != 999 {
		t.Errorf("another user: %v", err)
	}
}
