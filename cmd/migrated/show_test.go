// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// What status says of the userfaultfd, in each state it can be in.
func TestStatusOfUserfaultfd(t *testing.T) {
	for _, test := range []struct {
		supervision migratedv1.Supervision
		label, want string
	}{
		{migratedv1.Supervision_SUPERVISION_UNSPECIFIED, "", ""},
		{migratedv1.Supervision_SUPERVISION_UNSUPERVISED, "", "unsupervised"},
		{migratedv1.Supervision_SUPERVISION_LABELLED, "u:object_r:uffd_t:s0", "labelled u:object_r:uffd_t:s0"},
		{migratedv1.Supervision_SUPERVISION_FLAG, "", "flag"},
		{migratedv1.Supervision_SUPERVISION_FLAG, "u:object_r:uffd_t:s0", "flag, labelled u:object_r:uffd_t:s0"},
	} {
		m := at("db-1", 0, active, 64)
		m.Supervision, m.UserfaultfdLabel, m.Spec.RequireSecure = test.supervision, test.label, true
		var out bytes.Buffer
		if err := printStatus(&out, m); err != nil {
			t.Fatal(err)
		}
		facts := map[string]string{}
		for line := range strings.Lines(out.String()) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "  ")
			facts[name] = strings.TrimSpace(value)
		}
		if got := facts["Userfaultfd"]; got != test.want || facts["Required"] != "a supervised userfaultfd" {
			t.Errorf("status of %v, %q: %q; want %q\n%s", test.supervision, test.label, got, test.want, out.String())
		}
	}
}
