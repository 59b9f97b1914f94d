// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/migrated-vm/migrated/internal/pki"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

type pkiCmd struct {
	Init  pkiInitCmd  `cmd:"" help:"Make the certificate authority of a site."`
	Issue pkiIssueCmd `cmd:"" help:"Make or renew the certificate of a host or an operator."`
	Show  pkiShowCmd  `cmd:"" help:"Show who certificates are for and when they expire."`
}

// installed is the directory for the files of a certificate on its host.
const installed = "/etc/migrated/tls"

type pkiInitCmd struct {
	Directory string `name:"dir" default:"pki" predictor:"file" placeholder:"DIR" help:"Where the authority is made (default: ${default})."`
	Name      string `default:"migrated" help:"What the authority is called in its certificate (default: ${default})."`
	Days      int    `default:"3650" help:"How long it is valid, at most ${authority_days} days (default: ${default})."`
}

func (pkiInitCmd) Help() string {
	return `Makes a key and a certificate that sign the certificates of all hosts of a site. Anyone with ca-key.pem ` +
		`can issue certificates that all hosts trust: keep it on another machine or offline. The command needs ` +
		`neither a daemon nor root. It does not overwrite an existing authority.

Example:

    migrated pki init`
}

func (i *pkiInitCmd) Run(a *app) error {
	authority, err := pki.Create(i.Directory, i.Name, i.Days)
	if err != nil {
		return pkiFailure(err, "name another directory with --dir; without its key the certificates of the old "+
			"authority cannot be renewed")
	}
	if a.json {
		return a.showCertificates([]shownCertificate{show(filepath.Join(i.Directory, "ca.pem"), authority.Certificate)})
	}
	a.printf("The authority is in %s, and valid until %s.\n", i.Directory, dayText(authority.Certificate.NotAfter))
	a.printf("Keep %s secret. Then, for each host: migrated pki issue HOST --address IP\n",
		filepath.Join(i.Directory, "ca-key.pem"))
	return nil
}

type pkiIssueCmd struct {
	Name      string   `arg:"" help:"The host's DNS name, or the name of an operator."`
	Addresses []string `name:"address" placeholder:"IP|DNS" help:"Another name that hosts reach it by: an address of the migration network; may be repeated."`
	Client    bool     `help:"For an operator or Prometheus, who connect to daemons, and whom nobody connects to."`
	Renew     bool     `help:"Replace the certificate that is there by one of the same names, for the same key."`
	Days      int      `default:"365" help:"How long it is valid, at most ${certificate_days} days (default: ${default})."`
	Directory string   `name:"dir" default:"pki" predictor:"file" placeholder:"DIR" help:"Where the authority is (default: ${default})."`
	Out       string   `placeholder:"DIR" predictor:"file" help:"Where the files are made (default: the directory of that name beside the authority)."`
}

func (pkiIssueCmd) Help() string {
	return `Makes cert.pem, key.pem and ca.pem of a host, and prints what to set in its configuration. Others connect ` +
		`to a host by an address or a DNS name that must be in its certificate, unless their peers name it. With --renew ` +
		`the key stays, and only cert.pem is replaced; daemons read it for each connection, so that none has to be restarted.

Examples:

    migrated pki issue host-a --address 192.0.2.1
    migrated pki issue host-a --renew

    # For "migrated --daemon HOST:PORT", and for Prometheus
    migrated pki issue --client alice`
}

func (i *pkiIssueCmd) Run(a *app) error {
	if err := pki.CheckName(i.Name); err != nil {
		return &failure{exit: exitUsage, message: err.Error(), remedy: "give addresses with --address"}
	}
	if i.Renew && (len(i.Addresses) > 0 || i.Client) {
		return &failure{exit: exitUsage, message: "a certificate is renewed as it is, with the names that it has",
			remedy: "leave --address and --client out; for other names make another certificate, with --out"}
	}
	authority, err := pki.Open(i.Directory)
	if err != nil {
		return pkiFailure(err, `make an authority with "migrated pki init", or name its directory with --dir`)
	}
	out := i.Out
	if out == "" {
		out = filepath.Join(i.Directory, i.Name)
	}
	var certificate *x509.Certificate
	if i.Renew {
		certificate, err = authority.Renew(out, i.Days)
	} else {
		request := pki.Request{Name: i.Name, Addresses: i.Addresses, Client: i.Client, Days: i.Days}
		certificate, err = authority.Issue(out, request)
	}
	if err != nil {
		return pkiFailure(err, "renew what is there with --renew, or name another directory with --out")
	}
	if a.json {
		return a.showCertificates([]shownCertificate{show(pki.FilesIn(out).Certificate, certificate)})
	}
	i.sayWhatToDo(a, out, certificate)
	return nil
}

// sayWhatToDo prints what to do with the new files.
func (i *pkiIssueCmd) sayWhatToDo(a *app, out string, certificate *x509.Certificate) {
	made, files := pki.FilesIn(out), pki.FilesIn(installed)
	names := strings.Join(pki.Names(certificate), ", ")
	a.printf("# %s is for %s, and valid until %s.\n", made.Certificate, names, dayText(certificate.NotAfter))
	switch {
	case i.Renew:
		a.printf("# Copy it to where the old one is in use. Nothing has to be restarted.\n")
	case i.Client:
		a.printf("# Name %[1]s in the operators (or metrics_clients) of each daemon, and give %[1]s the three files:\n",
			i.Name)
		a.printf("migrated list --daemon HOST:PORT --tls-certificate %s --tls-key %s --tls-ca %s\n",
			made.Certificate, made.Key, made.CA)
	default:
		a.printf("# Copy the three files to %s on that host, for root alone, and set in its migrated.yaml:\n", installed)
		a.printf("tls_certificate: %s\ntls_key: %s\ntls_ca: %s\n", files.Certificate, files.Key, files.CA)
	}
}

type pkiShowCmd struct {
	Files  []string `arg:"" optional:"" predictor:"file" help:"Certificates, PEM files; those of this host's daemon where none is named."`
	Config *string  `placeholder:"PATH" predictor:"file" help:"Configuration file of the daemon (default: ${config_path} if there is one)."`
}

func (pkiShowCmd) Help() string {
	return `Shows of each certificate in each file the names and when it expires. It fails, with exit code 4, where one ` +
		`has expired.

Examples:

    migrated pki show
    migrated pki show pki/*/cert.pem pki/ca.pem`
}

func (s *pkiShowCmd) Run(a *app) error {
	files := s.Files
	if len(files) == 0 {
		cfg, err := loadConfig(s.Config)
		if err != nil {
			return &failure{exit: exitFailed, message: err.Error(), remedy: "correct the configuration, or name files"}
		}
		if cfg.TLSCertificate == "" {
			return &failure{exit: exitFailed, message: "this host's daemon has no certificate",
				remedy: "set tls_certificate, tls_key and tls_ca in its configuration, or name files"}
		}
		files = []string{cfg.TLSCertificate, cfg.TLSCA}
	}
	var all []shownCertificate
	for _, file := range files {
		found, err := mtls.Certificates(file)
		if err != nil {
			return pkiFailure(err, "name PEM files with certificates")
		}
		for _, c := range found {
			all = append(all, show(file, c))
		}
	}
	if err := a.showCertificates(all); err != nil {
		return err
	}
	for _, c := range all {
		if c.DaysLeft < 0 {
			return &failure{exit: exitCheck, message: c.File + " has expired",
				remedy: `renew it with "migrated pki issue NAME --renew", where its authority is`}
		}
	}
	return nil
}

// shownCertificate is the JSON form of a certificate.
type shownCertificate struct {
	File      string    `json:"file"`
	Names     []string  `json:"names"`
	Authority bool      `json:"authority"`
	NotAfter  time.Time `json:"notAfter"`
	DaysLeft  int       `json:"daysLeft"` // whole days; below 0: it has expired
}

func show(file string, c *x509.Certificate) shownCertificate {
	left := time.Until(c.NotAfter)
	days := int(left / (24 * time.Hour))
	if left < 0 {
		days--
	}
	names := pki.Names(c)
	if len(names) == 0 {
		names = []string{c.Subject.CommonName}
	}
	return shownCertificate{file, names, c.IsCA, c.NotAfter, days}
}

func (a *app) showCertificates(all []shownCertificate) error {
	if a.json {
		line, err := json.Marshal(map[string][]shownCertificate{"certificates": all})
		if err != nil {
			return fmt.Errorf("encoding the certificates as JSON: %w", err)
		}
		a.printf("%s\n", line)
		return nil
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FILE\tFOR\tEXPIRES\tDAYS LEFT")
	for _, c := range all {
		owner := strings.Join(c.Names, ", ")
		if c.Authority {
			owner = "authority " + owner
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\n", c.File, owner, dayText(c.NotAfter), c.DaysLeft)
	}
	return w.Flush()
}

func dayText(t time.Time) string { return t.Local().Format(time.DateOnly) }

// pkiFailure returns the failure for an error about files. It has the remedy if a file exists, or does not exist.
func pkiFailure(err error, remedy string) error {
	f := &failure{exit: exitFailed, message: err.Error()}
	if errors.Is(err, pki.ErrExists) || errors.Is(err, fs.ErrNotExist) {
		f.remedy = remedy
	}
	return f
}
