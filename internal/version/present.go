// SPDX-License-Identifier: Apache-2.0

//go:build !raised

package version

// raised is 0 unless raised.go is built instead.
const raised = 0
