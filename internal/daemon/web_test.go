// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// atSocket returns a client of a server at a Unix socket.
func atSocket(t *testing.T, path string) *http.Client {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// post sends JSON.
func post(t *testing.T, client *http.Client, url, body string) (code int, text string) {
	t.Helper()
	answer, err := client.Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	got, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(got)
}

// TestHTTPAtASocket: the control API over HTTP does the same, at a socket that root and a group may use.
func TestHTTPAtASocket(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.HTTPListen = "127.0.0.1:0", filepath.Join(t.TempDir(), "http.sock")
	if os.Geteuid() == 0 {
		cfg.SocketGroup = "65534"
	}
	startConfigured(t, cfg)
	mode := os.FileMode(0o600)
	if cfg.SocketGroup != "" {
		mode = 0o660
	}
	if info, err := os.Stat(cfg.HTTPListen); err != nil || info.Mode().Perm() != mode {
		t.Errorf("the socket: %v, %v", info, err)
	}
	client := atSocket(t, cfg.HTTPListen)
	for path, want := range map[string]struct {
		code int
		text string
	}{
		"/v1/version":      {http.StatusOK, `"version":"v-test"`},
		"/v1/migrations/x": {http.StatusNotFound, "this daemon knows no migration"},
	} {
		code, text := get(t, client, "http://localhost"+path)
		if code != want.code || !strings.Contains(text, want.text) {
			t.Errorf("%s: %d %s", path, code, text)
		}
	}
	long, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://localhost/v1/version", nil)
	if err != nil {
		t.Fatal(err)
	}
	long.Header.Set("X", strings.Repeat("x", 2*limits.HeaderBytes))
	if answer, err := client.Do(long); err != nil {
		t.Error(err)
	} else if _ = answer.Body.Close(); answer.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("long headers: %s", answer.Status)
	}
	if code, text := get(t, client, "http://evil.example/v1/version"); code != http.StatusMisdirectedRequest {
		t.Errorf("another name: %d %s", code, text)
	}
	start := `{"id": "m", "spec": {"vm": "/nowhere/qmp.sock", "destination": "127.0.0.1:1", "labels": {"team": "db"}}}`
	code, started := post(t, client, "http://localhost/v1/migrations", start)
	if code != http.StatusOK || !strings.Contains(started, `"id":"m"`) {
		t.Errorf("start: %d %s", code, started)
	}
	answer, err := client.Get("http://localhost/v1/migrations/m:watch")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body) // to its end
	if err != nil || !strings.Contains(string(text), `"state":"MIGRATION_STATE_FAILED"`) {
		t.Errorf("watch: %v\n%s", err, text)
	}
	for query, listed := range map[string]bool{
		"": true, "?filter.labels[team]=db": true, "?filter.labels[team]=web": false, "?filter.underWay=true": false,
		"?pageSize=1": true,
	} {
		code, text := get(t, client, "http://localhost/v1/migrations"+query)
		if code != http.StatusOK || strings.Contains(text, `/nowhere/qmp.sock`) != listed {
			t.Errorf("list%s: %d %s", query, code, text)
		}
	}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, "http://localhost/v1/migrations/m", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	deleted, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	_ = deleted.Body.Close()
	code, _ = get(t, client, "http://localhost/v1/migrations/m")
	if deleted.StatusCode != http.StatusOK || code != http.StatusNotFound {
		t.Errorf("delete: %s, and then %d", deleted.Status, code)
	}
}

// TestHTTPForOperators: over TLS only operators of the current configuration may call, and nobody without a
// certificate.
func TestHTTPForOperators(t *testing.T) {
	cfg, ca := withTLS(t)
	cfg.HTTPListen, cfg.Operators = freeAddress(t), []string{"operator.example"}
	d, _ := startConfigured(t, cfg)
	url := "https://" + cfg.HTTPListen
	as := func(name string) *http.Client {
		files, err := ca.Issue(name, name)
		if err != nil {
			t.Fatal(err)
		}
		return httpsAs(t, &files, cfg.TLSCA)
	}
	operator, stranger := as("operator.example"), as("stranger.example")
	for _, path := range []string{"/v1/version", "/v1/migrations/m:watch", "/"} {
		if code, text := get(t, operator, url+path); code == http.StatusForbidden {
			t.Errorf("%s to an operator: %s", path, text)
		}
		code, text := get(t, stranger, url+path)
		if code != http.StatusForbidden || !strings.Contains(text, `"code":7`) {
			t.Errorf("%s to a stranger: %d %s", path, code, text)
		}
	}
	if n := d.refusals.ByKind()[string(limits.Caller)]; n != 3 {
		t.Errorf("%d refusals are counted, of 3", n)
	}
	if answer, err := httpsAs(t, nil, cfg.TLSCA).Get(url + "/v1/version"); err == nil {
		_ = answer.Body.Close()
		t.Error("a client without a certificate gets in")
	}
	next := d.cfg
	next.Operators = []string{"stranger.example"}
	if err := d.Reload(next); err != nil {
		t.Fatal(err)
	}
	if code, _ := get(t, operator, url+"/v1/version"); code != http.StatusForbidden {
		t.Errorf("who is an operator no more has status %d", code)
	}
	if code, _ := get(t, stranger, url+"/v1/version"); code != http.StatusOK {
		t.Errorf("who is an operator now has status %d", code)
	}
}

// TestOpenPagesDoNotHoldUp: a daemon stops while a page is open, and the page receives an event about it.
func TestOpenPagesDoNotHoldUp(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.HTTPListen = "127.0.0.1:0", filepath.Join(t.TempDir(), "http.sock")
	cfg.StateDir, cfg.LogDir, cfg.Socket = t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "control.sock")
	_, stop, ended := runDaemon(t, cfg)
	client := atSocket(t, cfg.HTTPListen)
	answer, err := client.Get("http://localhost/events")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	await := func(line string) {
		for lines.Scan() {
			if lines.Text() == line {
				return
			}
		}
		t.Fatalf("no %q: %v", line, lines.Err())
	}
	await("event: migrations")
	stop()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	await("event: end")
}

// TestIncomingIsItsSources: an incoming migration is shown to operators and to callers with its token, and to no other
// peer.
func TestIncomingIsItsSources(t *testing.T) {
	cfg := config.Default()
	cfg.Listen = "127.0.0.1:0"
	d, conn := startConfigured(t, cfg)
	prepare := &migratedv1.PrepareIncomingRequest{Id: "m", Token: "secret"}
	if _, err := d.expectIncoming(t.Context(), prepare); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.migrations.destination("m").Abort("the test is over") })
	peer := migratedv1.NewPeerServiceClient(connect(t, d, honest))
	ask := func(token string) error {
		ctx := metadata.AppendToOutgoingContext(t.Context(), pagewire.MigrationTokenKey, token)
		_, err := peer.ShowIncoming(ctx, &migratedv1.ShowIncomingRequest{Id: "m"})
		return err
	}
	_, err := peer.ShowIncoming(t.Context(), &migratedv1.ShowIncomingRequest{Id: "m"})
	wantCode(t, "without a token", err, codes.NotFound)
	wantCode(t, "with another token", ask("guess"), codes.NotFound)
	wantCode(t, "with the token", ask("secret"), codes.FailedPrecondition) // no memory has arrived
	client := migratedv1.NewControlServiceClient(conn)
	_, err = client.GetIncoming(t.Context(), &migratedv1.GetIncomingRequest{Id: "m"})
	wantCode(t, "by an operator", err, codes.FailedPrecondition)
	_, err = client.GetIncoming(t.Context(),
		&migratedv1.GetIncomingRequest{Id: "m", Role: migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE})
	wantCode(t, "as the source that this host is not", err, codes.NotFound)
}
