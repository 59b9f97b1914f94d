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
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/redact"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func (c *controlService) Check(ctx context.Context, request *migratedv1.CheckRequest) (*migratedv1.CheckResponse, error) {
	// What leaves this host needs no userfaultfd here.
	results := shown(c.daemon.checkHost(ctx, false), migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)
	results = append(results, shown(domains(ctx, c.daemon.cfg.LibvirtSocket), migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)...)
	var machine *migratedv1.SourceMachine
	if vm := libvirt.At(c.daemon.cfg.LibvirtSocket, request.GetVm()); vm != "" {
		if err := errors.Join(validateVM(vm), validateXML(vm, request.GetDestinationXml())); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		var found []qemu.Result
		if id := c.daemon.migrations.under(vm); id != "" { // which has the VM's socket
			err := underWay(id)
			found = []qemu.Result{{Subject: "VM", Status: qemu.Failed, Detail: err.Error(), Remedy: migration.Remedy(err)}}
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

// checkHost looks at this host and its daemon, without any VM.
func (d *Daemon) checkHost(ctx context.Context, requireSecure bool) []qemu.Result {
	results := append(qemu.CheckHost(ctx, requireSecure), checkConfinement())
	return append(results, d.checkCertificates(time.Now())...)
}

// libvirtPatience is how long a check waits for libvirt.
const libvirtPatience = 5 * time.Second

// domains names the VMs of this host's libvirt, where there is one.
func domains(ctx context.Context, socket string) []qemu.Result {
	ctx, cancel := context.WithTimeout(ctx, libvirtPatience)
	defer cancel()
	names, err := libvirt.Names(ctx, socket)
	result := qemu.Result{Subject: "libvirt", Detail: "no domain runs here"}
	switch {
	case errors.Is(err, libvirt.ErrNoLibvirt):
		return nil
	case err != nil:
		result.Status, result.Detail, result.Remedy = qemu.Warning, err.Error(), "see whether virsh works on this host"
	case len(names) > 0:
		result.Detail = "domains that run here: " + strings.Join(names, ", ")
	}
	return []qemu.Result{result}
}

// checkDestination asks a host whether it can be a destination, and where machine is not nil, whether it can be that
// VM's.
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
		result.Remedy = "start 'migrated serve' on the destination with a --listen address that this host reaches"
		return []*migratedv1.CheckResult{result}
	}
	conn, err := d.dial(address)
	if err != nil {
		return failed(err)
	}
	defer func() { _ = conn.Close() }() // the answer is all we want
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
		refused.Detail = "the destination's daemon is of a version that cannot tell what it would have another than the source"
		refused.Remedy = "run the same version of migrated on both hosts"
	}
	return append(results, refused)
}

// mostChecks is how many QEMUs checks have at a time.
const mostChecks = 4

// CheckIncoming has the host start the QEMU of a VM that may come, and end it.
func (p *peerService) CheckIncoming(
	ctx context.Context, request *migratedv1.CheckIncomingRequest,
) (*migratedv1.CheckIncomingResponse, error) {
	if err := p.daemon.maySend(ctx, request.GetMachine().GetName()); err != nil {
		return nil, err
	}
	if err := p.mayComeNow(ctx, request); err != nil {
		return &migratedv1.CheckIncomingResponse{Results: shown([]qemu.Result{{
			Subject: "destination daemon", Status: qemu.Failed, Detail: err.Error(), Remedy: migration.Remedy(err),
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
	return &migratedv1.CheckIncomingResponse{Results: shown(found, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION)}, nil
}

// mayComeNow is what PrepareIncoming refuses before it starts a QEMU.
func (p *peerService) mayComeNow(ctx context.Context, request *migratedv1.CheckIncomingRequest) error {
	if _, own := p.daemon.checking.Load(request.GetId()); own && request.GetDestinationQmp() == "" {
		return errOwnHost
	}
	if err := p.daemon.migrations.hasRoom(callerID(ctx), p.daemon.cfg.MaxIncoming); err != nil {
		return migration.WithRemedy(err, remedyCrowded)
	}
	return nil
}

func shown(results []qemu.Result, host migratedv1.MigrationRole) []*migratedv1.CheckResult {
	statuses := map[qemu.Status]migratedv1.CheckStatus{
		qemu.OK:      migratedv1.CheckStatus_CHECK_STATUS_OK,
		qemu.Warning: migratedv1.CheckStatus_CHECK_STATUS_WARNING,
		qemu.Failed:  migratedv1.CheckStatus_CHECK_STATUS_FAILED,
	}
	var all []*migratedv1.CheckResult
	for _, r := range results {
		all = append(all, &migratedv1.CheckResult{
			Subject: r.Subject, Status: statuses[r.Status], Detail: redact.Text(r.Detail), Remedy: r.Remedy, Host: host,
		})
	}
	return all
}
