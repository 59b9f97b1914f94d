// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"strings"
)

// A Limit bounds what a definition from another host may contain.
type Limit struct {
	// MayRun returns an error if a QEMU binary may not be started.
	MayRun func(binary string) error
	// Root allows the definition to say which user QEMU runs as, and how a security module confines it.
	Root bool
}

// Check refuses a definition that would give its sender more of this host than a VM.
func (l Limit) Check(definition string) error {
	_, root, err := parse(definition)
	if err != nil {
		return err
	}
	emulator := root.FindElement("devices/emulator")
	if emulator == nil {
		return errors.New("the domain's definition names no emulator")
	}
	if err := l.MayRun(strings.TrimSpace(emulator.Text())); err != nil {
		return err
	}
	for _, child := range root.ChildElements() {
		if child.Space != "" {
			return fmt.Errorf("the domain's definition has <%s>, which can pass any option to QEMU",
				child.FullTag())
		}
	}
	for _, script := range root.FindElements("devices/interface/*") {
		if script.Tag == "script" || script.Tag == "downscript" {
			return errors.New("the domain's definition has an interface with a script, which libvirt would run as root")
		}
	}
	for _, label := range root.FindElements("seclabel") {
		if label.SelectAttrValue("model", "") == "dac" && !l.Root {
			return errors.New("the domain's definition says whom QEMU runs as (<seclabel model='dac'>)")
		}
		if kind := label.SelectAttrValue("type", ""); kind != "" && kind != "dynamic" && !l.Root {
			return fmt.Errorf("the domain's definition says how QEMU is confined (<seclabel type='%s'>)", kind)
		}
	}
	return nil
}
