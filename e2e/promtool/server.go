// SPDX-License-Identifier: Apache-2.0

package promtool

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.yaml.in/yaml/v4"
)

// A Server is a Prometheus on this machine that scrapes daemons.
type Server struct {
	cmd    *exec.Cmd
	dir    string
	api    string
	began  time.Time
	log    bytes.Buffer
	exited chan struct{}
}

// scrapeEvery is how often a Server scrapes, and how long a scrape may take.
const scrapeEvery = time.Second

// Serve starts a Prometheus that scrapes HOST:PORT addresses, given by the name of the instance, and waits until it has
// scraped each. That is five seconds after the server answers, and no rate shows changes before that. The server is
// from the same package as promtool.
func Serve(ctx context.Context, targets map[string]string) (_ *Server, err error) {
	tool, err := Find(ctx)
	if err != nil {
		return nil, err
	}
	s := &Server{began: time.Now(), exited: make(chan struct{})}
	if s.dir, err = os.MkdirTemp("", "prometheus-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(s.dir))
		}
	}()
	config, err := scrapeConfig(targets)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(s.dir, "prometheus.yml")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	s.api = "http://" + address
	s.cmd = exec.Command(filepath.Join(filepath.Dir(tool), "prometheus"), "--config.file="+file,
		"--storage.tsdb.path="+s.dir, "--web.listen-address="+address, "--log.level=warn")
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.start(); err != nil {
		return nil, err
	}
	for {
		if up, asked := s.up(ctx); asked == nil && up == len(targets) {
			return s, nil
		} else if err = asked; err == nil {
			err = fmt.Errorf("prometheus has scraped %d of %d daemons", up, len(targets))
		}
		select {
		case <-s.exited:
			return nil, fmt.Errorf("prometheus ended: %s", s.log.String())
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err(), s.Close())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// start starts the process, and closes exited when it has ended.
func (s *Server) start() error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // Pdeathsig applies when this thread ends, and the runtime may end any that is not locked
		defer runtime.UnlockOSThread()
		err := s.cmd.Start()
		started <- err
		if err == nil {
			_ = s.cmd.Wait() // it is killed
			close(s.exited)
		}
	}()
	return <-started
}

func scrapeConfig(targets map[string]string) ([]byte, error) {
	type static struct {
		Targets []string          `yaml:"targets"`
		Labels  map[string]string `yaml:"labels"`
	}
	var all []static
	for instance, address := range targets {
		all = append(all, static{[]string{address}, map[string]string{"instance": instance}})
	}
	return yaml.Marshal(map[string]any{
		"global":         map[string]string{"scrape_interval": scrapeEvery.String(), "scrape_timeout": scrapeEvery.String()},
		"scrape_configs": []any{map[string]any{"job_name": "migrated", "static_configs": all}},
	})
}

// freeAddress returns an address of this host at which no process listens now.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// Close ends the server and removes its data.
func (s *Server) Close() error {
	err := s.cmd.Process.Kill()
	<-s.exited
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// up returns how many daemons answered their last scrape.
func (s *Server) up(ctx context.Context) (n int, err error) {
	var answer struct {
		Data struct {
			Result []json.RawMessage
		}
	}
	err = s.get(ctx, "/api/v1/query?"+url.Values{"query": {"up == 1"}}.Encode(), &answer)
	return len(answer.Data.Result), err
}

// get requests a path and decodes the answer into result.
func (s *Server) get(ctx context.Context, path string, result any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.api+path, http.NoBody)
	if err != nil {
		return err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if result != nil {
		if err := json.NewDecoder(answer.Body).Decode(result); err != nil {
			return err
		}
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, answer.Status)
	}
	return nil
}

// Values returns how many values, without NaN, a query has had since the server was started.
func (s *Server) Values(ctx context.Context, query string) (found int, err error) {
	parameters := url.Values{
		"query": {query}, "start": {seconds(s.began)}, "end": {seconds(time.Now())}, "step": {"0.5"},
	}
	var answer struct {
		Error string
		Data  struct {
			Result []struct{ Values [][2]any }
		}
	}
	if err := s.get(ctx, "/api/v1/query_range?"+parameters.Encode(), &answer); err != nil {
		return 0, fmt.Errorf("%w: %s: %s", err, query, answer.Error)
	}
	for _, series := range answer.Data.Result {
		for _, v := range series.Values {
			if text, ok := v[1].(string); ok && !strings.EqualFold(text, "NaN") {
				found++
			}
		}
	}
	return found, nil
}

func seconds(t time.Time) string {
	return strconv.FormatFloat(float64(t.UnixMilli())/1000, 'f', 3, 64)
}
