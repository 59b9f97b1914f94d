// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/config"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// runUntil runs a daemon until do returns. do gets a client of it.
func runUntil(t *testing.T, cfg config.Config, do func(migratedv1.ControlServiceClient)) {
	t.Helper()
	_, stop, ended := runDaemon(t, cfg)
	conn, err := grpc.NewClient("unix://"+cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	do(migratedv1.NewControlServiceClient(conn))
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// TestReportsOfEarlierRuns: a restarted daemon has the reports of failed migrations, as many as report_keep says. The
// error for an unknown id lists them.
func TestReportsOfEarlierRuns(t *testing.T) {
	dir := t.TempDir()
	cfg := config.Default()
	cfg.Listen, cfg.Socket, cfg.StateDir = "127.0.0.1:0", filepath.Join(dir, "s"), filepath.Join(dir, "state")
	cfg.LogDir = dir
	cfg.ReportKeep = 2
	vm := filepath.Join(dir, "qmp.sock")
	ask := func(
		client migratedv1.ControlServiceClient, id string, role migratedv1.MigrationRole,
	) (*migratedv1.Report, error) {
		answer, err := client.Report(t.Context(), &migratedv1.ReportRequest{Id: id, Role: role})
		return answer.GetReport(), err
	}
	const either = migratedv1.MigrationRole_MIGRATION_ROLE_UNSPECIFIED
	reports := make(map[string]*migratedv1.Report)
	runUntil(t, cfg, func(client migratedv1.ControlServiceClient) {
		if _, err := ask(client, "m1", either); status.Code(err) != codes.NotFound ||
			!strings.Contains(err.Error(), "no other reports") {
			t.Errorf("before there was one: %v", err)
		}
		if _, err := client.Check(t.Context(), &migratedv1.CheckRequest{Vm: vm}); err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{"m1", "m2", "m3"} {
			spec := &migratedv1.MigrationSpec{Vm: vm, Destination: "127.0.0.1:1"}
			if _, err := client.Start(t.Context(), &migratedv1.StartRequest{Id: id, Spec: spec}); err != nil {
				t.Fatal(err)
			}
			failed := awaitEnd(t, client, id)
			r, err := ask(client, id, either)
			if err != nil || !proto.Equal(r.GetMigration(), failed) || r.GetSource().GetDaemon() != "v-test" ||
				r.GetSource().GetKernel() == "" {
				t.Errorf("%s: reported is %v, and watched was %v (%v)", id, r, failed, err)
			}
			if found := r.GetCheck().GetResults(); len(found) == 0 ||
				found[len(found)-1].GetStatus() != migratedv1.CheckStatus_CHECK_STATUS_FAILED {
				t.Errorf("%s: checked before was %v", id, found)
			}
			reports[id] = r
		}
	})
	runUntil(t, cfg, func(client migratedv1.ControlServiceClient) {
		for id, want := range reports {
			r, err := ask(client, id, either)
			switch {
			case id == "m1":
				if status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "m3, m2") {
					t.Errorf("the oldest is there: %v, %v", r, err)
				}
				continue
			case err != nil:
				t.Fatal(err)
			}
			r.Time, want.Time = nil, nil
			if !proto.Equal(r, want) {
				t.Errorf("%s: reported is\n%v\nand was\n%v", id, r, want)
			}
			_, err = ask(client, id, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION)
			if status.Code(err) != codes.NotFound {
				t.Errorf("%s: as a destination: %v", id, err)
			}
		}
		if _, err := ask(client, "../reports/m2", either); status.Code(err) != codes.NotFound {
			t.Errorf("a path: %v", err)
		}
	})
}

func TestChecked(t *testing.T) {
	var c checked
	found := func(subject string) []*migratedv1.CheckResult {
		return []*migratedv1.CheckResult{
			{Subject: "fine", Status: migratedv1.CheckStatus_CHECK_STATUS_OK},
			{Subject: subject, Status: migratedv1.CheckStatus_CHECK_STATUS_WARNING},
		}
	}
	for i := range mostChecked {
		c.add(fmt.Sprint("/vm", i), "", found("old"))
	}
	c.add("/vm1", "b:1", found("with b"))
	c.add("/vm2", "", found("again"))
	for _, want := range []struct{ vm, destination, subject string }{
		{"/vm0", "b:1", ""}, // is the oldest, and there were too many
		{"/vm1", "b:1", "with b"},
		{"/vm1", "c:1", "old"},
		{"/vm2", "b:1", "again"},
		{"/vm3", "b:1", "old"},
		{"/vm", "b:1", ""},
	} {
		of := c.of(want.vm, want.destination)
		if (of != nil) != (want.subject != "") ||
			of != nil && (len(of.GetResults()) != 1 || of.GetResults()[0].GetSubject() != want.subject) {
			t.Errorf("%s to %s: %v, want %q", want.vm, want.destination, of, want.subject)
		}
	}
}
