// SPDX-License-Identifier: Apache-2.0

// Package pki is the certificate authority of a small site: a key and a certificate in a directory, which sign the
// certificates of hosts and operators. The certificates are made for package mtls: both ends of a connection have one,
// and a host's certificate has its DNS names and addresses.
//
// All keys are ECDSA keys on P-256. Only Renew overwrites a file.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/internal/atomicfile"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// The names of the files.
const (
	caFile          = "ca.pem" // the authority's own, and the copy beside each certificate
	caKeyFile       = "ca-key.pem"
	certificateFile = "cert.pem"
	keyFile         = "key.pem"
)

// The longest that certificates may be valid, in days.
const (
	MostAuthorityDays   = 7300
	MostCertificateDays = 825
)

// skew is how much the clocks of two hosts may differ: a certificate is valid from so long before it is made.
const skew = time.Hour

// ErrExists says that a file exists already, and is not overwritten.
var ErrExists = errors.New("it exists")

// An Authority signs certificates.
type Authority struct {
	Certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// Create makes an authority in a directory, and the directory if it is missing.
func Create(dir, name string, days int) (*Authority, error) {
	if err := checkDays(days, MostAuthorityDays); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("the authority's key: %w", err)
	}
	template, err := newTemplate(name, days)
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("the authority's certificate: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// The key first: it is the file that must never be overwritten.
	if err := writeKey(filepath.Join(dir, caKeyFile), key); err != nil {
		return nil, err
	}
	if err := writeNew(filepath.Join(dir, caFile), encode(der), 0o644); err != nil {
		return nil, err
	}
	return Open(dir)
}

// Open reads the authority in a directory.
func Open(dir string) (*Authority, error) {
	a := &Authority{}
	found, err := mtls.Certificates(filepath.Join(dir, caFile))
	if err != nil {
		return nil, err
	}
	a.Certificate = found[0]
	if a.key, err = readKey(filepath.Join(dir, caKeyFile)); err != nil {
		return nil, err
	}
	if !a.key.PublicKey.Equal(a.Certificate.PublicKey) || !a.Certificate.IsCA {
		return nil, fmt.Errorf("%s: the key is not that of the authority in %s", filepath.Join(dir, caKeyFile), caFile)
	}
	return a, nil
}

// A Request describes the certificate to be issued.
type Request struct {
	Name      string   // a DNS name, the first of the certificate's
	Addresses []string // IP addresses and further DNS names
	Client    bool     // for an operator or Prometheus, to which nobody connects
	Days      int
}

// Issue makes a key and a certificate in a directory, and puts the authority's certificate beside them.
func (a *Authority) Issue(dir string, r Request) (*x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("the key of %s: %w", r.Name, err)
	}
	if err := checkDays(r.Days, MostCertificateDays); err != nil {
		return nil, err
	}
	template, err := newTemplate(r.Name, r.Days)
	if err != nil {
		return nil, err
	}
	for _, name := range append([]string{r.Name}, r.Addresses...) {
		ip := net.ParseIP(name)
		switch {
		case ip != nil:
			template.IPAddresses = append(template.IPAddresses, ip)
		case dnsName.MatchString(name):
			template.DNSNames = append(template.DNSNames, name)
		default:
			return nil, fmt.Errorf("%q is neither a DNS name nor an IP address", name)
		}
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if !r.Client {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	der, err := a.sign(template, &key.PublicKey)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	files := FilesIn(dir)
	for _, path := range []string{files.Key, files.Certificate, files.CA} { // all or none
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", path, errors.Join(ErrExists, err))
		}
	}
	err = errors.Join(writeKey(files.Key, key), writeNew(files.Certificate, encode(der), 0o644),
		writeNew(files.CA, encode(a.Certificate.Raw), 0o644))
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// Renew replaces the certificate in a directory by one with the same names for the same key. It replaces only that
// file, and atomically, so that certificate and key always match.
func (a *Authority) Renew(dir string, days int) (*x509.Certificate, error) {
	if err := checkDays(days, MostCertificateDays); err != nil {
		return nil, err
	}
	files := FilesIn(dir)
	found, err := mtls.Certificates(files.Certificate)
	if err != nil {
		return nil, err
	}
	old := found[0]
	key, err := readKey(files.Key)
	if err != nil {
		return nil, err
	}
	if err := old.CheckSignatureFrom(a.Certificate); err != nil {
		return nil, fmt.Errorf("%s is not of this authority: %w", files.Certificate, err)
	}
	template, err := newTemplate(old.Subject.CommonName, days)
	if err != nil {
		return nil, err
	}
	template.DNSNames, template.IPAddresses, template.ExtKeyUsage = old.DNSNames, old.IPAddresses, old.ExtKeyUsage
	der, err := a.sign(template, &key.PublicKey)
	if err != nil {
		return nil, err
	}
	if err := atomicfile.Write(files.Certificate, encode(der), 0o644); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// sign makes a certificate. It refuses one that would outlive the authority: it would stop working with the authority,
// before its own date.
func (a *Authority) sign(template *x509.Certificate, public *ecdsa.PublicKey) ([]byte, error) {
	if end := a.Certificate.NotAfter; template.NotAfter.After(end) {
		return nil, fmt.Errorf("the authority itself expires on %s, in %d days: ask for fewer, or make a new authority",
			end.Format(time.DateOnly), int(time.Until(end).Hours()/24))
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, a.Certificate, public, a.key)
	if err != nil {
		return nil, fmt.Errorf("signing the certificate: %w", err)
	}
	return der, nil
}

// FilesIn returns the paths of the files that Issue makes in a directory.
func FilesIn(dir string) mtls.Files {
	return mtls.Files{
		Certificate: filepath.Join(dir, certificateFile),
		Key:         filepath.Join(dir, keyFile),
		CA:          filepath.Join(dir, caFile),
	}
}

// Names returns all names in a certificate: DNS names, addresses and URIs.
func Names(c *x509.Certificate) []string {
	names := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	for _, uri := range c.URIs {
		names = append(names, uri.String())
	}
	return names
}

// dnsName matches DNS names without wildcards. They can be used as names of directories.
var dnsName = regexp.MustCompile(`^` + label + `(\.` + label + `)*$`)

const label = `[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?`

// CheckName says why no certificate can be issued for a name; nil: one can.
func CheckName(name string) error {
	if !dnsName.MatchString(name) || net.ParseIP(name) != nil || len(name) > 253 {
		return fmt.Errorf("%q is no name of a host, as in host-a or host-a.example.com", name)
	}
	return nil
}

func checkDays(days, most int) error {
	if days < 1 || days > most {
		return fmt.Errorf("%d days: it must be 1 to %d", days, most)
	}
	return nil
}

// newTemplate returns a template of a certificate that is valid for days from now on.
func newTemplate(name string, days int) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("a serial number: %w", err)
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-skew), NotAfter: now.AddDate(0, 0, days),
	}, nil
}

func encode(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writeNew(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("%s has no PEM private key", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s has a %T, and no ECDSA key", path, key)
	}
	return ec, nil
}

// writeNew writes and syncs a file. It fails with ErrExists if the file exists.
func writeNew(path string, content []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", path, ErrExists)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
}
