// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"time"
)

// Certificates returns the certificates in a PEM file. It is an error if there is none.
func Certificates(path string) (all []*x509.Certificate, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		all = append(all, certificate)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no PEM certificate", path)
	}
	return all, nil
}

// Expiry returns when the first and the last of the certificates in a PEM file expire.
func Expiry(path string) (first, last time.Time, err error) {
	all, err := Certificates(path)
	if err != nil {
		return time.Time{}, time.Time{}, err
	}
	for _, certificate := range all {
		if first.IsZero() || certificate.NotAfter.Before(first) {
			first = certificate.NotAfter
		}
		if certificate.NotAfter.After(last) {
			last = certificate.NotAfter
		}
	}
	return first, last, nil
}
