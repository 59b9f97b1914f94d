// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
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

// authorityRemedy is the remedy for one of several authorities that has expired, or will soon.
const authorityRemedy = `leave it out of the file when no host has a certificate of it any more`

// A certificateFile is a file with certificates that this daemon uses.
type certificateFile struct {
	setting, path string
	expires       time.Time // when no connection is made with it any more
	first         time.Time // when the first certificate in it expires: of several authorities one is enough
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
		var last time.Time
		f.first, last, f.err = mtls.Expiry(f.path)
		if f.expires = f.first; f.setting == "tls_ca" {
			f.expires = last
		}
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
		case f.first.Sub(now) < expiresSoon:
			d.log.Warn("one of several authorities expires soon, or has expired: certificates of it are not accepted then",
				"setting", f.setting, "file", f.path, "expires", f.first, "remedy", authorityRemedy)
		}
	}
}

// checkCertificates returns a result about the worst of the files: of those that are alike the one that expires first.
// None if TLS is not set.
func (d *Daemon) checkCertificates(now time.Time) (results []check.Result) {
	files := d.certificates()
	slices.SortStableFunc(files, func(a, b certificateFile) int { return a.expires.Compare(b.expires) })
	for _, f := range files { // a file that cannot be read has no time, and comes first
		results = append(results, f.check(now))
	}
	if len(results) == 0 {
		return nil
	}
	return []check.Result{slices.MaxFunc(results, func(a, b check.Result) int { return cmp.Compare(a.Status, b.Status) })}
}

func (f certificateFile) check(now time.Time) check.Result {
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
	case f.first.Sub(now) < expiresSoon:
		r.Status, r.Remedy = check.Warning, authorityRemedy
		r.Detail = fmt.Sprintf("an authority in %s expires on %s, others later (%s)",
			f.path, f.first.Format(time.DateOnly), f.setting)
	}
	return r
}

func wholeDays(d time.Duration) int { return int(d / (24 * time.Hour)) }
