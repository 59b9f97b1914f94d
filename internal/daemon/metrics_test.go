// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// get returns the status and the body of an answer.
func get(t *testing.T, client *http.Client, url string) (int, string) {
	t.Helper()
	answer, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(body)
}

// httpsAs returns a client with the certificate in files, or without one if files is nil.
func httpsAs(t *testing.T, files *mtls.Files, ca string) *http.Client {
	t.Helper()
	text, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	secure := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS13}
	secure.RootCAs.AppendCertsFromPEM(text)
	if files != nil {
		certificate, err := tls.LoadX509KeyPair(files.Certificate, files.Key)
		if err != nil {
			t.Fatal(err)
		}
		secure.Certificates = []tls.Certificate{certificate}
	}
	transport := &http.Transport{TLSClientConfig: secure}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// TestMetricsForThoseNamed: only those in metrics_clients of the current configuration can scrape, and not operators.
func TestMetricsForThoseNamed(t *testing.T) {
	cfg, ca := withTLS(t)
	issue := func(file, name string) *mtls.Files {
		files, err := ca.Issue(file, name)
		if err != nil {
			t.Fatal(err)
		}
		return &files
	}
	cfg.MetricsListen = freeAddress(t)
	cfg.Operators, cfg.MetricsClients = []string{"operator.example"}, []string{"prometheus.example"}
	d, _ := startConfigured(t, cfg)
	url := "https://" + cfg.MetricsListen
	prometheus := httpsAs(t, issue("prometheus", "prometheus.example"), cfg.TLSCA)
	operator := httpsAs(t, issue("operator", "operator.example"), cfg.TLSCA)

	code, text := get(t, prometheus, url+"/metrics")
	if code != http.StatusOK || !strings.Contains(text, `migrated_build_info{protocol=`) ||
		!strings.Contains(text, `migrated_certificate_expiry_timestamp_seconds{setting="tls_certificate"}`) ||
		!strings.Contains(text, `migrated_certificate_expiry_timestamp_seconds{setting="tls_ca"}`) {
		t.Errorf("the scrape has status %d and is\n%s", code, text)
	}
	if code, _ := get(t, operator, url+"/metrics"); code != http.StatusForbidden {
		t.Errorf("an operator has status %d", code)
	}
	if _, text := get(t, prometheus, url+"/metrics"); !strings.Contains(
		text, "migrated_refusals_total{kind=\"caller\"} 1\n",
	) {
		t.Errorf("the refusal is not counted:\n%s", text)
	}
	if code, _ := get(t, prometheus, url+"/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles are served without having been asked for: %d", code)
	}
	if answer, err := httpsAs(t, nil, cfg.TLSCA).Get(url + "/metrics"); err == nil {
		_ = answer.Body.Close()
		t.Error("a client without a certificate gets in")
	}
	if answer, err := http.Get("http://" + cfg.MetricsListen + "/metrics"); err == nil {
		_ = answer.Body.Close()
		if answer.StatusCode == http.StatusOK {
			t.Error("a client without TLS gets in")
		}
	}
	next := d.cfg
	next.MetricsClients = []string{"operator.example"}
	if err := d.Reload(next); err != nil {
		t.Fatal(err)
	}
	if code, _ := get(t, prometheus, url+"/metrics"); code != http.StatusForbidden {
		t.Errorf("who is listed no more has status %d on a connection that is older", code)
	}
	if code, _ := get(t, operator, url+"/metrics"); code != http.StatusOK {
		t.Errorf("who is listed now has status %d", code)
	}
}

// TestMetricsAtASocket: only root may use a Unix socket for metrics. It serves profiles if the configuration says so.
func TestMetricsAtASocket(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.MetricsListen, cfg.Pprof = "127.0.0.1:0", filepath.Join(t.TempDir(), "metrics.sock"), true
	startConfigured(t, cfg)
	if info, err := os.Stat(cfg.MetricsListen); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", cfg.MetricsListen)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	client := &http.Client{Transport: transport}
	for path, has := range map[string]string{
		"/metrics": "migrated_build_info", "/debug/pprof/goroutine?debug=1": "goroutine profile",
	} {
		if code, text := get(t, client, "http://daemon"+path); code != http.StatusOK || !strings.Contains(text, has) {
			t.Errorf("%s: status %d, %.200q", path, code, text)
		}
	}
}
