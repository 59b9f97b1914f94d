// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/mtls/mtlstest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const nameA, nameB = "spiffe://lab/host/a", "spiffe://lab/host/b"

// identity issues the certificates of a lab's daemons.
type identity struct {
	t  *testing.T
	ca *mtlstest.Authority
}

func newIdentity(t *testing.T) identity {
	t.Helper()
	ca, err := mtlstest.NewAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return identity{t, ca}
}

// args returns the flags with which a daemon uses TLS under a name and accepts those peers.
func (i identity) args(name, file string, peers ...string) []string {
	i.t.Helper()
	files, err := i.ca.Issue(file, name)
	if err != nil {
		i.t.Fatal(err)
	}
	args := []string{"--tls-certificate", files.Certificate, "--tls-key", files.Key, "--tls-ca", files.CA}
	for _, peer := range peers {
		args = append(args, "--peers", peer)
	}
	return args
}

// TestMutualTLS moves a VM there and back between two daemons that accept each other's certificates. Their calls, the
// device state and the pages all use TLS.
func TestMutualTLS(t *testing.T) {
	t.Parallel()
	l, id := newHosts(t), newIdentity(t)
	startDaemon(t, l.A, id.args(nameA, "a", nameB)...)
	startDaemon(t, l.B, id.args(nameB, "b", nameA+" gu*")...)
	s := newScene(t, l)
	moveMetal(t, s.vm, l.A, l.B)
	moveMetal(t, s.vm, l.B, l.A)
}

// TestStrangersAreRefused: a migration fails if the destination does not accept the source, or if the source does not
// accept the destination. The VM continues at the source, which says why.
func TestStrangersAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		source, destination func(id, other identity) []string
		says                string
	}{
		"source is no peer": {
			func(id, _ identity) []string { return id.args(nameA, "a", nameB) },
			func(id, _ identity) []string { return id.args(nameB, "b", "spiffe://lab/host/c") },
			"no name in the certificate is allowed",
		},
		"source may not send this VM": {
			func(id, _ identity) []string { return id.args(nameA, "a", nameB) },
			func(id, _ identity) []string { return id.args(nameB, "b", nameA+" web-*") }, `send VM "guest"`,
		},
		"destination is another": {
			func(id, _ identity) []string { return id.args(nameA, "a", "spiffe://lab/host/c") },
			func(id, _ identity) []string { return id.args(nameB, "b", nameA) }, nameB,
		},
		"another authority": {
			func(_, other identity) []string { return other.args(nameA, "a", nameB) },
			func(id, _ identity) []string { return id.args(nameB, "b", nameA) }, "certificate",
		},
		"source without TLS": {
			func(identity, identity) []string { return nil },
			func(id, _ identity) []string { return id.args(nameB, "b", nameA) }, "TLS",
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, id, other := newHosts(t), newIdentity(t), newIdentity(t)
			startDaemon(t, l.A, c.source(id, other)...)
			startDaemon(t, l.B, c.destination(id, other)...)
			s := newScene(t, l)
			m := migrateSpec(t, l.A, "stranger", &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: l.B.DaemonAddr()})
			s.failed(m, stateFailed, c.says)
			s.stillCounting()
		})
	}
}
