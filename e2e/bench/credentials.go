// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/pki"
)

// credentials are what both hosts need for mutual TLS, in a directory that both see. The certificates are those of
// 'migrated pki'. QEMU gets the same ones with one more key usage.
type credentials struct{ dir string }

// certificateDays is longer than any run. The authority gets one day more, because it must outlive what it signs.
const certificateDays = 2

// certify makes an authority, and a certificate for each host.
func certify(hosts ...*lab.Host) (c *credentials, err error) {
	dir, err := os.MkdirTemp("", "bench-tls")
	if err != nil {
		return nil, err
	}
	c = &credentials{dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.remove())
		}
	}()
	authority, err := pki.Create(c.authority(), "bench", certificateDays+1)
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		r := pki.Request{Name: "host-" + h.Name, Addresses: []string{h.Addr}, Days: certificateDays}
		if _, err := authority.Issue(c.of(h), r); err != nil {
			return nil, err
		}
		if err := c.issueForQEMU(h); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *credentials) remove() error { return os.RemoveAll(c.dir) }

// authority returns the authority's directory, of the directory of a host's daemons, and ofQEMU that of its QEMUs.
func (c *credentials) authority() string         { return filepath.Join(c.dir, "authority") }
func (c *credentials) of(h *lab.Host) string     { return filepath.Join(c.dir, h.Name) }
func (c *credentials) ofQEMU(h *lab.Host) string { return filepath.Join(c.dir, h.Name+"-qemu") }

// issueForQEMU makes the files that QEMU's tls-creds-x509 looks for, for both endpoints. The key is the host's. QEMU
// 10.0 refuses a server's certificate whose usage lacks key encipherment, although TLS 1.3 never uses that.
func (c *credentials) issueForQEMU(h *lab.Host) error {
	files := pki.FilesIn(c.of(h))
	host, err := tls.LoadX509KeyPair(files.Certificate, files.Key)
	if err != nil {
		return err
	}
	authority, err := tls.LoadX509KeyPair(
		filepath.Join(c.authority(), "ca.pem"), filepath.Join(c.authority(), "ca-key.pem"),
	)
	if err != nil {
		return err
	}
	template := host.Leaf
	template.KeyUsage |= x509.KeyUsageKeyEncipherment
	der, err := x509.CreateCertificate(rand.Reader, template, authority.Leaf, template.PublicKey, authority.PrivateKey)
	if err != nil {
		return err
	}
	dir := c.ofQEMU(h)
	certificate := filepath.Join(dir, "server-cert.pem")
	err = errors.Join(os.Mkdir(dir, 0o700),
		os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	for name, file := range map[string]string{
		"ca-cert.pem": files.CA, "server-key.pem": files.Key, "client-cert.pem": certificate, "client-key.pem": files.Key,
	} {
		err = errors.Join(err, os.Symlink(file, filepath.Join(dir, name)))
	}
	return err
}

// serve returns the TLS arguments of a host's daemon.
func (c *credentials) serve(h *lab.Host) []string {
	files := pki.FilesIn(c.of(h))
	return []string{"--tls-certificate", files.Certificate, "--tls-key", files.Key, "--tls-ca", files.CA}
}
