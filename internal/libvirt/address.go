// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// An address of a libvirt domain has one of two forms:
//
//	libvirt:NAME                           a domain of this host's libvirt
//	libvirt+unix:///NAME?socket=PATH       a domain of the libvirt that listens on the socket PATH
//
// NAME is the domain's name or UUID. The second form is a URL, like libvirt's own qemu+unix:///system?socket=PATH.
const (
	scheme       = "libvirt:"
	schemeSocket = "libvirt+unix"
)

// IsAddress says whether a VM's address is that of a libvirt domain, and not the path of a QMP socket.
func IsAddress(vm string) bool {
	return strings.HasPrefix(vm, scheme) || strings.HasPrefix(vm, schemeSocket+":")
}

// CheckAddress says what is wrong with the address of a domain; nil: nothing.
func CheckAddress(vm string) error {
	_, _, err := parseAddress(vm)
	return err
}

// NameIn returns the name or UUID in a domain's address, for virsh.
func NameIn(vm string) string {
	_, name, _ := parseAddress(vm) // empty, if it is no address
	return name
}

// parseAddress returns the parts of an address. socket is empty for this host's libvirt.
func parseAddress(vm string) (socket, name string, err error) {
	if name, short := strings.CutPrefix(vm, scheme); short {
		if name == "" {
			return "", "", fmt.Errorf("%q names no domain", vm)
		}
		return "", name, nil
	}
	u, err := url.Parse(vm)
	if err != nil {
		return "", "", fmt.Errorf("address of libvirt's domain: %w", err)
	}
	socket, name = u.Query().Get("socket"), strings.TrimPrefix(u.Path, "/")
	if u.Scheme != schemeSocket || u.Host != "" || name == "" || !filepath.IsAbs(socket) || len(u.Query()) != 1 {
		return "", "", errors.New("libvirt's domain behind a socket is " + schemeSocket + ":///NAME?socket=/PATH")
	}
	return socket, name, nil
}

// Address returns the address of the domain with that name or UUID, of the libvirt that listens on socket. If socket is
// empty, it is this host's libvirt.
func Address(socket, name string) string {
	if socket == "" {
		return scheme + name
	}
	u := url.URL{Scheme: schemeSocket, Path: "/" + name, RawQuery: url.Values{"socket": {socket}}.Encode()}
	return schemeSocket + "://" + u.EscapedPath() + "?" + u.RawQuery
}

// At adds socket, the configured socket of this host's libvirt, to an address without one. If socket is empty, libvirt
// is at one of its usual sockets, and the address stays as it is.
func At(socket, vm string) string {
	if name, short := strings.CutPrefix(vm, scheme); short && socket != "" {
		return Address(socket, name)
	}
	return vm
}

// parseUUID reads "9fe3ea4e-0c0c-4d3f-9a37-5a0c6e1f8d11".
func parseUUID(text string) (uuid golibvirt.UUID, ok bool) {
	if len(text) != 36 {
		return uuid, false
	}
	n, err := hex.Decode(uuid[:], []byte(strings.ReplaceAll(text, "-", "")))
	return uuid, err == nil && n == len(uuid)
}

// formatUUID returns the text that parseUUID reads.
func formatUUID(id golibvirt.UUID) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}
