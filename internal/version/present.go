// SPDX-License-Identifier: Apache-2.0

//go:build !raised

package version

// raised is 0 but in raised.go.
const raised = 0
