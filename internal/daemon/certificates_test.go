// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/pkg/mtls/mtlstest"
)

// TestCertificatesExpire: the log and a check warn before a certificate expires, the authority's included.
func TestCertificatesExpire(t *testing.T) {
	const (
		day  = 24 * time.Hour
		soon = `msg="a certificate expires soon" setting=`
		over = `msg="a certificate has expired: no connection is made with it" setting=`
	)
	ca, err := mtlstest.NewAuthorityUntil(t.TempDir(), time.Now().Add(100*day))
	if err != nil {
		t.Fatal(err)
	}
	files, err := ca.IssueUntil(time.Now().Add(60*day+time.Hour), "host", "host")
	if err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.TLSCertificate, cfg.TLSKey, cfg.TLSCA = files.Certificate, files.Key, files.CA
	var log bytes.Buffer
	d := &Daemon{cfg: cfg, log: slog.New(slog.NewTextHandler(&log, nil))}
	for name, c := range map[string]struct {
		after  time.Duration
		status check.Status
		detail string
		logged string // empty: nothing
	}{
		"far":           {0, check.OK, "in 60 days (tls_certificate)", ""},
		"soon":          {31 * day, check.Warning, "in 29 days (tls_certificate)", soon + "tls_certificate"},
		"over":          {61 * day, check.Failed, "expired on ", over + "tls_certificate"},
		"authority too": {80 * day, check.Failed, "expired on ", soon + "tls_ca"},
	} {
		t.Run(name, func(t *testing.T) {
			log.Reset()
			now := time.Now().Add(c.after)
			d.logCertificates(now)
			if said := log.String(); c.logged == "" && said != "" || !strings.Contains(said, c.logged) {
				t.Errorf("logged: %s", said)
			}
			results := d.checkCertificates(now)
			if len(results) != 1 {
				t.Fatalf("checked: %+v", results)
			}
			r := results[0]
			if r.Status != c.status || !strings.Contains(r.Detail, c.detail) || (r.Remedy == "") != (c.status == check.OK) {
				t.Errorf("checked: %+v", r)
			}
		})
	}
	old, err := mtlstest.NewAuthorityUntil(t.TempDir(), time.Now().Add(10*day))
	if err != nil {
		t.Fatal(err)
	}
	oldFiles, err := old.Issue("old", "old")
	if err != nil {
		t.Fatal(err)
	}
	both, err := os.ReadFile(oldFiles.CA)
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile(files.CA)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files.CA, append(both, own...), 0o600); err != nil {
		t.Fatal(err)
	}
	log.Reset()
	d.logCertificates(time.Now().Add(20 * day)) // one authority is enough
	results := d.checkCertificates(time.Now().Add(20 * day))
	if len(results) != 1 || results[0].Status != check.Warning || results[0].Remedy != authorityRemedy ||
		strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), "one of several authorities") {
		t.Errorf("with an authority that has expired and one that has not: %+v, logged %s", results, log.String())
	}
	if err := os.Remove(files.CA); err != nil {
		t.Fatal(err)
	}
	results = d.checkCertificates(time.Now())
	if len(results) != 1 || results[0].Status != check.Failed || !strings.Contains(results[0].Remedy, "tls_ca") {
		t.Errorf("without the authority's file: %+v", results)
	}
	d.cfg = config.Default()
	if results := d.checkCertificates(time.Now()); results != nil {
		t.Errorf("without TLS: %+v", results)
	}
}
