// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guide"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// httpSocket is the socket at which daemons with --http-listen serve the page and the API over HTTP.
const httpSocket = "/run/migrated/http.sock"

// TestCurl runs the commands of docs/http.md, which check a VM, move it and follow the migration with curl.
func TestCurl(t *testing.T) {
	t.Parallel()
	page, err := guide.Read("docs/http.md")
	blocks := blocksOf(t, page, err)
	l := newHosts(t)
	startDaemon(t, l.A, "--http-listen", httpSocket)
	startDaemon(t, l.B)
	s := newScene(t, l)
	awaitFile(t, l.A.Path(httpSocket))
	here := strings.NewReplacer("/run/qemu/db.qmp", lab.QMPPath, "host-b:7600", l.B.DaemonAddr())
	says := [][]string{
		{`"version":"`, `"protocol":`, `"migrations":[]`},
		{`"results":[`, `"id":"db-1"`, `"state":"MIGRATION_STATE_SETUP"`},
		{`{"result":{"migration":{"id":"db-1"`, `"state":"MIGRATION_STATE_COMPLETED"`, `"blocks":[`, `"findings":`},
		{`{"code":9,`, `"message":"this migration is over"`},
	}
	if len(blocks) != len(says) {
		t.Fatalf("%d blocks of commands, %d expected", len(blocks), len(says))
	}
	for i, b := range blocks {
		script := here.Replace(b.Text)
		if i < len(blocks)-1 { // the last one shows an error
			script = strings.ReplaceAll(script, "curl ", "curl --fail-with-body ")
		}
		out, err := l.A.Run(testContext(t), "sh", "-ec", script)
		if err != nil {
			t.Fatalf("docs/http.md:%d: %v\n%s", b.Line, err, out)
		}
		for _, text := range says[i] {
			if !strings.Contains(out, text) {
				t.Errorf("docs/http.md:%d does not say %s:\n%s", b.Line, text, out)
			}
		}
	}
	s.arrived()
}
