// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"path/filepath"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func (c *controlService) Check(ctx context.Context, request *migratedv1.CheckRequest) (*migratedv1.CheckResponse, error) {
	// What leaves this host needs no userfaultfd here.
	results := shown(append(qemu.CheckHost(ctx, false), checkConfinement()), migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)
	if vm := request.GetVm(); vm != "" {
		if !filepath.IsAbs(vm) {
			return nil, status.Errorf(codes.InvalidArgument, "vm: %q is no absolute path of a QMP socket", vm)
		}
		results = append(results, checkVM(ctx, vm)...)
	}
	if destination := request.GetDestination(); destination != "" {
		results = append(results, c.daemon.checkDestination(ctx, destination)...)
	}
	return &migratedv1.CheckResponse{Results: results}, nil
}

func checkVM(ctx context.Context, path string) []*migratedv1.CheckResult {
	vm, err := qemu.Attach(ctx, path)
	if err != nil {
		return []*migratedv1.CheckResult{{
			Subject: "QMP socket", Status: migratedv1.CheckStatus_CHECK_STATUS_FAILED, Detail: err.Error(),
			Remedy: "give the path of a QMP Unix socket of the VM that no other client is connected to",
			Host:   migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE,
		}}
	}
	defer func() { _ = vm.Close() }() // nothing was changed
	return shown(qemu.CheckVM(ctx, vm), migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)
}

func (d *Daemon) checkDestination(ctx context.Context, address string) []*migratedv1.CheckResult {
	result := &migratedv1.CheckResult{
		Subject: "destination daemon", Status: migratedv1.CheckStatus_CHECK_STATUS_OK,
		Detail: address + " answers", Host: migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
	}
	answer, err := d.askDestination(ctx, address)
	if err != nil {
		result.Status = migratedv1.CheckStatus_CHECK_STATUS_FAILED
		result.Detail = err.Error()
		result.Remedy = "start 'migrated serve' on the destination with a --listen address that this host reaches"
	}
	return append([]*migratedv1.CheckResult{result}, answer.GetResults()...)
}

func (d *Daemon) askDestination(ctx context.Context, address string) (*migratedv1.CheckHostResponse, error) {
	conn, err := d.dial(address)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }() // the answer is all we want
	answer, err := migratedv1.NewPeerServiceClient(conn).CheckHost(ctx, &migratedv1.CheckHostRequest{})
	if err != nil {
		return nil, fmt.Errorf("%s: %s", address, status.Convert(err).Message())
	}
	return answer, nil
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
			Subject: r.Subject, Status: statuses[r.Status], Detail: r.Detail, Remedy: r.Remedy, Host: host,
		})
	}
	return all
}
