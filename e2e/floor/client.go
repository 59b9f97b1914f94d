// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/postcopy"
)

// client runs the role of a process that asks the source for pages and discards them.
func client(ctx context.Context, j job) (err error) {
	var s sample
	switch j.Lane {
	case "plain":
		s, err = plainTrips(ctx, j)
	case "trips":
		s, err = withLane(ctx, j, laneTrips)
	case "bulk":
		s, err = withLane(ctx, j, bulk)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(s)
}

func withLane(ctx context.Context, j job, f func(job, postcopy.Lane) (sample, error)) (sample, error) {
	l, err := dial(ctx, 1, tcpDialer(addresses(j).grpc, insecure.NewCredentials()))
	if err != nil {
		return sample{}, err
	}
	defer l.close()
	return f(j, l.demand[0])
}

// times measures n round trips, one after the other.
func times(n uint64, trip func(i uint64) error) (sample, error) {
	all := make([]int64, n)
	began := time.Now()
	for i := range n {
		before := time.Now()
		if err := trip(i); err != nil {
			return sample{}, err
		}
		all[i] = int64(time.Since(before))
	}
	wall := int64(time.Since(began))
	slices.Sort(all)
	return sample{
		N: int64(n), P50: all[n/2], P90: all[n*9/10], P99: all[n*99/100], Bytes: int64(n) * pageSize, Wall: wall,
	}, nil
}

func laneTrips(j job, lane postcopy.Lane) (sample, error) {
	request := pagewire.Request{Ranges: make([]pagewire.Range, 1)}
	var reply pagewire.Reply
	defer reply.Release()
	return times(j.Pages, func(i uint64) error {
		request.Ranges[0] = pagewire.Range{Offset: i * pageSize, Length: pageSize}
		if err := lane.Send(&request); err != nil {
			return err
		}
		return lane.Recv(&reply)
	})
}

func plainTrips(ctx context.Context, j job) (sample, error) {
	address := addresses(j).plain
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return sample{}, err
	}
	defer conn.Close()
	ask, page := make([]byte, askBytes), make([]byte, pageSize)
	return times(j.Pages, func(i uint64) error {
		binary.NativeEndian.PutUint64(ask, i*pageSize)
		if _, err := conn.Write(ask); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, page)
		return err
	})
}

func offsetOf(ask []byte) int64 { return int64(binary.NativeEndian.Uint64(ask)) }

// bulk fetches all of RAM as the sweep does, with as much in flight.
func bulk(j job, lane postcopy.Lane) (sample, error) {
	const run, window = 512 << 10, 4 << 20
	total := int64(j.Size * pageSize)
	request := pagewire.Request{Ranges: []pagewire.Range{{Length: run}}}
	asked, got := int64(0), int64(0)
	var reply pagewire.Reply
	defer reply.Release()
	began := time.Now()
	for got < total {
		for asked < total && asked-got < window {
			request.Ranges[0].Offset = uint64(asked)
			if err := lane.Send(&request); err != nil {
				return sample{}, err
			}
			asked += run
		}
		if err := lane.Recv(&reply); err != nil {
			return sample{}, err
		}
		if len(reply.Data) == 0 {
			return sample{}, fmt.Errorf("a reply without data at %#x", got)
		}
		got += int64(len(reply.Data))
	}
	return sample{Bytes: got, Wall: int64(time.Since(began))}, nil
}
