// SPDX-License-Identifier: Apache-2.0

package listing

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// MostOfPage is the most migrations on a page.
	MostOfPage = 1000
	// mostOfMessage bounds a page in bytes. Clients accept messages of up to 4 MiB by default.
	mostOfMessage = 2 << 20
)

// A position is the end of the previous page.
type position struct {
	Version string                   `json:"v"` // of the first page
	Created int64                    `json:"t"` // Unix time, nanoseconds
	ID      string                   `json:"id"`
	Role    migratedv1.MigrationRole `json:"r"`
}

// Page returns a page of the migrations that a filter selects. It has at most size of them, or MostOfPage if size is 0.
// after is the token of the previous page, or empty for the first page. The error is ErrListAgain if after is from
// another run of the daemon.
func (l *List) Page(want Filter, size uint32, after string) (*migratedv1.ListResponse, error) {
	if size > MostOfPage {
		return nil, fmt.Errorf("page_size: %d is more than %d", size, MostOfPage)
	}
	if size == 0 {
		size = MostOfPage
	}
	from, err := l.parsePosition(after)
	if err != nil {
		return nil, err
	}
	views, version := l.All(want)
	page := &migratedv1.ListResponse{ResourceVersion: l.Text(version)}
	if after != "" {
		page.ResourceVersion = from.Version // of the first page: a watcher from there sees all changes since
	}
	last := &migratedv1.Migration{Id: from.ID, Role: from.Role, CreateTime: timestamppb.New(time.Unix(0, from.Created))}
	bytes := 0
	for _, view := range views {
		if after != "" && newestFirst(view, last) <= 0 {
			continue
		}
		bytes += proto.Size(view)
		if n := len(page.Migrations); n == int(size) || n > 0 && bytes > mostOfMessage {
			end := page.Migrations[n-1]
			next := position{page.ResourceVersion, end.GetCreateTime().AsTime().UnixNano(), end.GetId(), end.GetRole()}
			page.NextPageToken = next.token()
			break
		}
		page.Migrations = append(page.Migrations, view)
	}
	return page, nil
}

func (p position) token() string {
	text, _ := json.Marshal(p) // strings and numbers can always be encoded
	return base64.RawURLEncoding.EncodeToString(text)
}

// mostOfToken bounds a token in bytes. Those that this package makes have about 150.
const mostOfToken = 1 << 10

func (l *List) parsePosition(token string) (p position, err error) {
	if token == "" {
		return p, nil
	}
	if len(token) > mostOfToken {
		return p, errors.New("page_token: it is too long")
	}
	text, err := base64.RawURLEncoding.DecodeString(token)
	if err == nil {
		err = json.Unmarshal(text, &p)
	}
	if err == nil {
		_, err = l.Parse(p.Version)
	}
	if err != nil {
		return p, fmt.Errorf("page_token: %w", err)
	}
	return p, nil
}
