// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

const (
	// expiresSoon is how long before its end a certificate is warned about.
	expiresSoon = 30 * 24 * time.Hour
	// certificateCheckInterval is how often the files are read.
	certificateCheckInterval = 12 * time.Hour
)

// certificateRemedy is the remedy for a certificate that has expired, or will soon.
const certificateRemedy = `put a renewed one in its place ("migrated pki issue NAME --renew", or as yours are made): ` +
	`it is used at once, without a restart`

// A certificateFile is a file with certificates that this daemon uses.
type certificateFile struct {
	setting, path string
	expires       time.Time // of the certificate in it that expires first
	err           error     // why it cannot be read
}

// certificates returns the files that the configuration names; none if TLS is not set.
func (d *Daemon) certificates() (all []certificateFile) {
	files, encrypted := d.cfg.TLS()
	if !encrypted {
		return nil
	}
	for _, f := range []certificateFile{
		{setting: "tls_certificate", path: files.Certificate}, {setting: "tls_ca", path: files.CA},
	} {
		f.expires, f.err = mtls.Expiry(f.path)
		all = append(all, f)
	}
	return all
}

// watchCertificates logs certificates that have expired or will soon, until ctx ends.
func (d *Daemon) watchCertificates(ctx context.Context) {
	for {
		d.logCertificates(time.Now())
		select {
		case <-ctx.Done():
			return
		case <-time.After(certificateCheckInterval):
		}
	}
}

func (d *Daemon) logCertificates(now time.Time) {
	for _, f := range d.certificates() {
		attributes := []any{"setting", f.setting, "file", f.path, "expires", f.expires}
		switch left := f.expires.Sub(now); {
		case f.err != nil:
			d.log.Warn("when a certificate expires is not known", "setting", f.setting, "error", f.err)
		case left < 0:
			d.log.Error("a certificate has expired: no connection is made with it",
				append(attributes, "remedy", certificateRemedy)...)
		case left < expiresSoon:
			d.log.Warn("a certificate expires soon",
				append(attributes, "days", wholeDays(left), "remedy", certificateRemedy)...)
		}
	}
}

// checkCertificates returns a result about the certificate that expires first; none if TLS is not set.
func (d *Daemon) checkCertificates(now time.Time) (results []check.Result) {
	files := d.certificates()
	slices.SortStableFunc(files, func(a, b certificateFile) int { return a.expires.Compare(b.expires) })
	if len(files) == 0 {
		return nil
	}
	f := files[0] // a file that cannot be read has no time, and comes first
	r := check.Result{Subject: "certificates"}
	left, day := f.expires.Sub(now), f.expires.Format(time.DateOnly)
	r.Detail = fmt.Sprintf("%s expires on %s, in %d days (%s)", f.path, day, wholeDays(left), f.setting)
	switch {
	case f.err != nil:
		r.Status, r.Detail, r.Remedy = check.Failed, f.err.Error(), "correct "+f.setting+" or its file"
	case left < 0:
		r.Status, r.Remedy = check.Failed, certificateRemedy
		r.Detail = fmt.Sprintf("%s expired on %s (%s)", f.path, day, f.setting)
	case left < expiresSoon:
		r.Status, r.Remedy = check.Warning, certificateRemedy
	}
	return []check.Result{r}
}

func wholeDays(d time.Duration) int { return int(d / (24 * time.Hour)) }
