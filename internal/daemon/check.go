// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/internal/redact"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func (c *controlService) Check(
	ctx context.Context, request *migratedv1.CheckRequest,
) (*migratedv1.CheckResponse, error) {
	// A VM that leaves this host needs no userfaultfd here.
	results := shown(c.daemon.checkHost(ctx, false), migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)
	results = append(results, shown(
		domains(ctx, c.daemon.cfg.LibvirtSocket), migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)...)
	var machine *migratedv1.SourceMachine
	if vm := libvirt.At(c.daemon.cfg.LibvirtSocket, request.GetVm()); vm != "" {
		if err := errors.Join(validateVM(vm), validateXML(vm, request.GetDestinationXml())); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		var found []check.Result
		if id := c.daemon.migrations.underWay(vm); id != "" { // it is connected to the VM's socket
			err := underWayError(id)
			found = []check.Result{{Subject: "VM", Status: check.Failed, Detail: err.Error(), Remedy: migration.Remedy(err)}}
		} else {
			cfg := c.daemon.sourceConfig()
			cfg.Spec, cfg.DestinationXML = &migratedv1.MigrationSpec{Vm: vm}, request.GetDestinationXml()
			found, machine = migration.CheckSource(ctx, cfg)
		}
		results = append(results, shown(found, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)...)
	}
	if destination := request.GetDestination(); destination != "" {
		results = append(results, c.daemon.checkDestination(ctx, request, machine)...)
	}
	if vm := libvirt.At(c.daemon.cfg.LibvirtSocket, request.GetVm()); vm != "" {
		c.daemon.checked.add(vm, request.GetDestination(), results)
	}
	return &migratedv1.CheckResponse{Results: results}, nil
}

// checkHost checks this host and its daemon, without any VM.
func (d *Daemon) checkHost(ctx context.Context, requireSecure bool) []check.Result {
	results := append(check.Host(ctx, requireSecure), checkConfinement())
	return append(results, d.checkCertificates(time.Now())...)
}

// libvirtTimeout is how long a check waits for libvirt.
const libvirtTimeout = 5 * time.Second

// domains returns a result that names the domains of this host's libvirt; none if there is no libvirt.
func domains(ctx context.Context, socket string) []check.Result {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	running, err := libvirt.Domains(ctx, socket)
	var names []string
	for _, one := range running {
		names = append(names, one.Name)
	}
	result := check.Result{Subject: "libvirt", Detail: "no domain runs here"}
	switch {
	case errors.Is(err, libvirt.ErrNoLibvirt):
		return nil
	case err != nil:
		result.Status, result.Detail, result.Remedy = check.Warning, err.Error(), "see whether virsh works on this host"
	case len(names) > 0:
		result.Detail = "domains that run here: " + strings.Join(names, ", ")
	}
	return []check.Result{result}
}

// checkDestination asks a host whether it can be a destination, and whether it can have the VM that machine describes,
// if machine is not nil.
func (d *Daemon) checkDestination(
	ctx context.Context, request *migratedv1.CheckRequest, machine *migratedv1.SourceMachine,
) []*migratedv1.CheckResult {
	address := request.GetDestination()
	result := &migratedv1.CheckResult{
		Subject: "destination daemon", Status: migratedv1.CheckStatus_CHECK_STATUS_OK,
		Detail: address + " answers", Host: migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
	}
	failed := func(err error) []*migratedv1.CheckResult {
		result.Status = migratedv1.CheckStatus_CHECK_STATUS_FAILED
		result.Detail = fmt.Sprintf("%s: %s", address, status.Convert(err).Message())
		result.Remedy = migration.PeerRemedy(address, err)
		return []*migratedv1.CheckResult{result}
	}
	conn, err := d.dial(address)
	if err != nil {
		return failed(err)
	}
	defer func() { _ = conn.Close() }() // only the answer is needed
	peer := migratedv1.NewPeerServiceClient(conn)
	host, err := peer.CheckHost(ctx, &migratedv1.CheckHostRequest{})
	if err != nil {
		return failed(err)
	}
	results := append([]*migratedv1.CheckResult{result}, host.GetResults()...)
	if machine == nil {
		return results
	}
	id := "check-" + strings.ToLower(rand.Text()[:12])
	d.checking.Store(id, nil)
	defer d.checking.Delete(id)
	answer, err := peer.CheckIncoming(ctx, &migratedv1.CheckIncomingRequest{
		Machine: machine, DestinationQmp: request.GetDestinationQmp(), DestinationTemplate: request.GetDestinationTemplate(),
		Id: id, RequireSecure: request.GetRequireSecure(),
	})
	if err == nil {
		return append(results, answer.GetResults()...)
	}
	refused := &migratedv1.CheckResult{
		Subject: "destination QEMU", Status: migratedv1.CheckStatus_CHECK_STATUS_FAILED,
		Detail: status.Convert(err).Message(), Host: migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
		Remedy: "look at the destination's log",
	}
	if status.Code(err) == codes.Unimplemented {
		refused.Status = migratedv1.CheckStatus_CHECK_STATUS_WARNING
		refused.Detail = "the destination's daemon is of a version that cannot compare the two VMs"
		refused.Remedy = "run the same version of migrated on both hosts"
	}
	return append(results, refused)
}

// mostChecks is how many QEMUs may run for checks at once.
const mostChecks = 4

// CheckIncoming starts a QEMU for a VM that may come here, compares the two, and ends the QEMU.
func (p *peerService) CheckIncoming(
	ctx context.Context, request *migratedv1.CheckIncomingRequest,
) (*migratedv1.CheckIncomingResponse, error) {
	if err := p.daemon.maySend(ctx, request.GetMachine().GetName()); err != nil {
		return nil, err
	}
	if _, own := p.daemon.checking.Load(request.GetId()); own && request.GetDestinationQmp() == "" {
		return &migratedv1.CheckIncomingResponse{Results: shown([]check.Result{{
			Subject: "destination daemon", Status: check.Failed,
			Detail: errOwnHost.Error(), Remedy: migration.Remedy(errOwnHost),
		}}, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION)}, nil
	}
	select {
	case p.daemon.checks <- struct{}{}:
		defer func() { <-p.daemon.checks }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	id := "check-" + strings.ToLower(rand.Text()[:12])
	cfg := p.daemon.destinationConfig(filepath.Join(p.daemon.incomingDir(), id))
	cfg.Request = &migratedv1.PrepareIncomingRequest{
		Id: id, Machine: request.GetMachine(), DestinationQmp: request.GetDestinationQmp(),
		DestinationTemplate: request.GetDestinationTemplate(),
		Spec:                &migratedv1.MigrationSpec{RequireSecure: request.GetRequireSecure()},
	}
	found := migration.CheckDestination(ctx, cfg)
	if err := p.daemon.migrations.hasRoom(callerID(ctx), p.daemon.cfg.MaxIncoming); err != nil {
		found = append(found, check.Result{
			Subject: "queue", Status: check.Warning, Detail: "the VM would wait: " + err.Error(), Remedy: remedyCrowded,
		})
	}
	return &migratedv1.CheckIncomingResponse{
		Results: shown(found, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION),
	}, nil
}

// shown converts results into those of the API. Secrets are replaced (package redact).
func shown(results []check.Result, host migratedv1.MigrationRole) []*migratedv1.CheckResult {
	statuses := map[check.Status]migratedv1.CheckStatus{
		check.OK:      migratedv1.CheckStatus_CHECK_STATUS_OK,
		check.Warning: migratedv1.CheckStatus_CHECK_STATUS_WARNING,
		check.Failed:  migratedv1.CheckStatus_CHECK_STATUS_FAILED,
	}
	var all []*migratedv1.CheckResult
	for _, r := range results {
		all = append(all, &migratedv1.CheckResult{
			Subject: r.Subject, Status: statuses[r.Status], Detail: redact.Text(r.Detail), Remedy: r.Remedy, Host: host,
		})
	}
	return all
}
