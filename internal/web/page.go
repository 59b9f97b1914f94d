// SPDX-License-Identifier: Apache-2.0

package web

import (
	"embed"
	"net/http"
	"path"
)

//go:embed page
var files embed.FS

// kinds are the types of the page's files. The host's mime.types is not used.
var kinds = map[string]string{
	".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
	".json": "application/json", ".svg": "image/svg+xml",
}

// page has the files of the page, by the patterns of their paths.
var page = readPage()

// A file is a file of the page.
type file struct {
	kind string
	data []byte
}

func readPage() map[string]file {
	served := make(map[string]file)
	entries, err := files.ReadDir("page")
	if err != nil {
		panic(err) // impossible: it is embedded
	}
	for _, entry := range entries {
		data, err := files.ReadFile("page/" + entry.Name())
		if err != nil {
			panic(err)
		}
		pattern := "/page/" + entry.Name()
		if entry.Name() == "index.html" {
			pattern = "/{$}"
		}
		served[pattern] = file{kinds[path.Ext(entry.Name())], data}
	}
	return served
}

// ServeHTTP serves the file.
func (f file) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", f.kind)
	_, _ = w.Write(f.data) // fails if the caller has disconnected
}
