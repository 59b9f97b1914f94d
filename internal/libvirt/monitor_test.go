// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// TestRefusal: the class of an answer says whether a security module refused.
func TestRefusal(t *testing.T) {
	for _, c := range []struct{ err, want, not error }{
		{errors.New("no descriptor came"), qmp.ErrGeneric, qmp.ErrForbidden},
		{fmt.Errorf("hand it over: %w", inject.ErrForbidden), qmp.ErrForbidden, qmp.ErrGeneric},
	} {
		got := &qmp.Error{Command: "getfd"}
		if err := json.Unmarshal(refusal(c.err).Error, got); err != nil {
			t.Fatal(err)
		}
		if !errors.Is(got, c.want) || errors.Is(got, c.not) || got.Desc != c.err.Error() {
			t.Errorf("%v: %v of class %s", c.err, got, got.Class)
		}
	}
}
