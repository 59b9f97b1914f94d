// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/evacuation"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type evacuateCmd struct {
	To        []string          `placeholder:"HOST[:PORT]" help:"Daemon of a host that VMs may go to (default port: ${port}); may be repeated, or several with commas."`
	VM        []string          `name:"vm" placeholder:"NAME|PATH" help:"VM to move, by its name or as \"migrated vms\" shows it; may be repeated. Without it: all of this host."`
	Except    []string          `placeholder:"NAME|PATH" help:"VM that stays; may be repeated."`
	Plan      bool              `help:"Make the plan, show it, and move nothing."`
	AtOnce    uint32            `placeholder:"N" help:"How many VMs are moved at once (default: the daemon's max_outgoing)."`
	Bandwidth string            `placeholder:"BYTES/S" help:"Highest rate at which memory of all of them together, without pages that they wait for, may cross the network, in bytes a second as QEMU writes them: 500M are 500 MiB. The daemon's host_bandwidth applies if it is lower."`
	Weight    map[string]uint32 `placeholder:"NAME=N" help:"A VM's share of that rate, relative to other VMs, which have 1; may be repeated."`
	Apart     []string          `sep:"none" placeholder:"NAME,NAME…" help:"VMs of which no two may go to the same host; may be repeated for other VMs."`

	Overcommit     bool           `help:"Plan with the memory that VMs use now, not with all that they may use."`
	ID             string         `name:"id" placeholder:"ID" help:"Name of the evacuation; without one the daemon makes one up."`
	Detach         bool           `help:"Return once the daemon has taken the evacuation on."`
	Template       string         `placeholder:"NAME" help:"As for migrate, for all."`
	KeepSource     bool           `help:"As for migrate, for all."`
	Persistent     bool           `help:"As for migrate, for all domains of libvirt's."`
	UndefineSource bool           `help:"As for migrate, for all domains of libvirt's."`
	RequireSecure  bool           `help:"As for migrate, for all."`
	NoEarlyLoad    bool           `help:"As for migrate, for all."`
	FreezeLimit    time.Duration  `placeholder:"DURATION" help:"As for migrate, for each."`
	QueueLimit     *time.Duration `placeholder:"DURATION" help:"As for migrate, for each."`
}

func (evacuateCmd) Help() string {
	return `Moves all VMs of this host to others. It finds them, checks each and the hosts that have room for it, and ` +
		`prints the plan; then it moves them, some at a time, and goes on with the others when one fails. What fails while ` +
		`the VM is still here is tried again, at another host if there is one. The daemon does the work: interrupting the ` +
		`command does not interrupt the evacuation, and a daemon that is started again goes on with it.

Exit code 0 says that every VM that was to go has left; 9 that some have not, or it is not known; the summary says why.

Examples:

    # What would go where, and what cannot
    migrated evacuate --to host-b --to host-c --plan

    migrated evacuate --to host-b --to host-c

    # Leave half of a 10 Gbit/s link to others; the database first in line for the rest
    migrated evacuate --to host-b,host-c --bandwidth 600M --weight db=4

    # Two that are each other's standby must not meet
    migrated evacuate --to host-b,host-c --apart db,db-standby

    migrated evacuation pause evacuation-k3v9x2aa`
}

func (c *evacuateCmd) Run(a *app) error {
	spec, err := c.spec(a.daemon)
	if err != nil {
		return err
	}
	return a.withClient(func(ctx context.Context, cl *daemonClient) error {
		answer, err := cl.Evacuate(ctx, &migratedv1.EvacuateRequest{Id: c.ID, Spec: spec})
		if err != nil {
			return cl.explainEvacuation(err)
		}
		view := answer.GetEvacuation()
		switch {
		case c.Detach && a.json:
			return a.printJSON(view)
		case c.Detach:
			a.printf("%s has begun; \"migrated evacuation watch %s\" follows it\n", view.GetId(), view.GetId())
			return nil
		}
		return cl.followEvacuation(view.GetId())
	})
}

func (c *evacuateCmd) spec(daemon string) (*migratedv1.EvacuationSpec, error) {
	wrong := func(format string, args ...any) error {
		return &failure{exit: exitUsage, message: fmt.Sprintf(format, args...),
			remedy: `see "migrated evacuate --help" for examples`}
	}
	if len(c.To) == 0 {
		return nil, wrong("--to is needed, at least once")
	}
	limit, err := parseBandwidth(c.Bandwidth)
	if err != nil {
		return nil, wrong("--%v", err)
	}
	common := &migratedv1.MigrationSpec{
		DestinationTemplate: c.Template, KeepSource: c.KeepSource, Persistent: c.Persistent, UndefineSource: c.UndefineSource,
		RequireSecure: c.RequireSecure, NoEarlyLoad: c.NoEarlyLoad,
	}
	if c.FreezeLimit != 0 {
		common.FreezeLimit = durationpb.New(c.FreezeLimit)
	}
	if c.QueueLimit != nil {
		common.QueueLimit = durationpb.New(*c.QueueLimit)
	}
	spec := &migratedv1.EvacuationSpec{
		Vms: namesOrPaths(daemon, c.VM), Except: namesOrPaths(daemon, c.Except), AtOnce: c.AtOnce, Bandwidth: limit,
		Weights: c.Weight, Overcommit: c.Overcommit, PlanOnly: c.Plan, Migration: common,
	}
	for _, to := range c.To {
		address, err := withPort(to)
		if err != nil {
			return nil, wrong("--to %s: %v", to, err)
		}
		spec.Destinations = append(spec.Destinations, address)
	}
	for _, names := range c.Apart {
		group := namesOrPaths(daemon, strings.Split(names, ","))
		if len(group) < 2 {
			return nil, wrong("--apart %s: it takes two names at least", names)
		}
		spec.Apart = append(spec.Apart, &migratedv1.Apart{Vms: group})
	}
	return spec, nil
}

// namesOrPaths makes paths absolute, as for --vm of migrate. A text without a slash is a name.
func namesOrPaths(daemon string, texts []string) (all []string) {
	for _, text := range texts {
		if strings.Contains(text, "/") {
			text = localPath(daemon, text)
		}
		all = append(all, text)
	}
	return all
}

// explainEvacuation is explain for calls that are about an evacuation.
func (c *daemonClient) explainEvacuation(err error) error {
	if err == nil {
		return nil
	}
	code := status.Code(err)
	err = c.explain("", err)
	var f *failure
	if errors.As(err, &f) {
		switch code {
		case codes.NotFound, codes.FailedPrecondition:
			f.remedy = `"migrated evacuation list" shows the evacuations that this daemon knows`
		case codes.AlreadyExists:
			f.remedy = `choose another --id, or see what it is with "migrated evacuation status ID"`
		}
	}
	return err
}

// followEvacuation shows an evacuation until it is over, even if the daemon restarts meanwhile.
func (c *daemonClient) followEvacuation(id string) (err error) {
	a := c.app
	display := &evacuationLines{app: a}
	var last *migratedv1.Evacuation
	for n := range 1 + maxReconnects {
		a.pauseBefore(n)
		var seen *migratedv1.Evacuation
		seen, err = c.watchEvacuation(id, display, last != nil)
		if seen != nil {
			last = seen
		}
		switch {
		case err == nil:
			return display.outcome(last)
		case a.ctx.Err() != nil:
			return &failure{exit: exitInterrupted, message: fmt.Sprintf("stopped watching; evacuation %s goes on", id),
				remedy: fmt.Sprintf("\"migrated evacuation watch %s\" follows it again, "+
					"\"migrated evacuation cancel %s\" ends it", id, id)}
		case last == nil || status.Code(err) != codes.Unavailable:
			return c.explainEvacuation(err)
		}
	}
	return c.explainEvacuation(err)
}

// watchEvacuation follows an evacuation over one stream. It returns nil if the evacuation is over, and the last message
// in any case. With again, it waits for a daemon that cannot be reached.
func (c *daemonClient) watchEvacuation(
	id string, display *evacuationLines, again bool,
) (last *migratedv1.Evacuation, err error) {
	ctx, cancel := context.WithCancel(c.app.ctx)
	defer cancel()
	unanswered := time.AfterFunc(c.app.timeout, cancel)
	defer unanswered.Stop()
	stream, err := c.WatchEvacuation(ctx, &migratedv1.WatchEvacuationRequest{Id: id}, grpc.WaitForReady(again))
	for err == nil {
		var answer *migratedv1.WatchEvacuationResponse
		if answer, err = stream.Recv(); err != nil {
			break
		}
		unanswered.Stop()
		last = answer.GetEvacuation()
		display.show(last)
		if evacuation.Over(last.GetState()) {
			return last, nil
		}
	}
	if last == nil && ctx.Err() != nil && c.app.ctx.Err() == nil {
		err = status.Error(codes.DeadlineExceeded, "no answer")
	}
	return last, err
}

type evacuationCmd struct {
	List   evacuationListCmd   `cmd:"" help:"List the evacuations that the daemon knows."`
	Status evacuationStatusCmd `cmd:"" help:"Show one evacuation."`
	Watch  evacuationWatchCmd  `cmd:"" help:"Follow an evacuation to its end."`
	Pause  evacuationPauseCmd  `cmd:"" help:"Let no more of its migrations begin."`
	Resume evacuationResumeCmd `cmd:"" help:"Go on with one that is paused."`
	Cancel evacuationCancelCmd `cmd:"" help:"End one; VMs that have not been handed over stay here."`
}

type evacuationListCmd struct{}

func (evacuationListCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.ListEvacuations(ctx, &migratedv1.ListEvacuationsRequest{})
		switch {
		case err != nil:
			return c.explainEvacuation(err)
		case a.json:
			return a.printJSON(answer)
		}
		return a.printEvacuations(answer.GetEvacuations())
	})
}

// evacuationID is the argument of the commands about one evacuation.
type evacuationID struct {
	ID string `arg:"" help:"The evacuation."`
}

type evacuationStatusCmd struct{ evacuationID }

func (e *evacuationStatusCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.GetEvacuation(ctx, &migratedv1.GetEvacuationRequest{Id: e.ID})
		return a.showEvacuation(c, answer.GetEvacuation(), err)
	})
}

type evacuationWatchCmd struct{ evacuationID }

func (e *evacuationWatchCmd) Run(a *app) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	return c.followEvacuation(e.ID)
}

type evacuationPauseCmd struct{ evacuationID }

func (evacuationPauseCmd) Help() string {
	return `Lets no more migrations of the evacuation begin. Those under way go on.`
}

func (e *evacuationPauseCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.PauseEvacuation(ctx, &migratedv1.PauseEvacuationRequest{Id: e.ID})
		return a.showEvacuation(c, answer.GetEvacuation(), err)
	})
}

type evacuationResumeCmd struct{ evacuationID }

func (e *evacuationResumeCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.ResumeEvacuation(ctx, &migratedv1.ResumeEvacuationRequest{Id: e.ID})
		return a.showEvacuation(c, answer.GetEvacuation(), err)
	})
}

type evacuationCancelCmd struct{ evacuationID }

func (evacuationCancelCmd) Help() string {
	return `Ends an evacuation: no more of its migrations begin, and those whose VMs have not been handed over are ` +
		`cancelled, so that these go on here. VMs that were handed over are moved to their end; ` +
		`"migrated evacuation watch" follows them.`
}

func (e *evacuationCancelCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.CancelEvacuation(ctx, &migratedv1.CancelEvacuationRequest{Id: e.ID})
		return a.showEvacuation(c, answer.GetEvacuation(), err)
	})
}

func (a *app) showEvacuation(c *daemonClient, view *migratedv1.Evacuation, err error) error {
	switch {
	case err != nil:
		return c.explainEvacuation(err)
	case a.json:
		return a.printJSON(view)
	}
	a.printf("%s: %s\n", view.GetId(), evacuationMeaning(view))
	return a.printPlan(view)
}

// weightText returns the weight of a VM for a plan; empty: it has no weight of its own.
func weightText(spec *migratedv1.EvacuationSpec, vm *migratedv1.EvacuatedVM) string {
	for _, name := range []string{vm.GetName(), vm.GetVm()} {
		if w := spec.GetWeights()[name]; w != 0 {
			return strconv.FormatUint(uint64(w), 10)
		}
	}
	return ""
}
