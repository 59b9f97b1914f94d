// SPDX-License-Identifier: Apache-2.0

//go:build raised

package version

// raised makes this a daemon of the next version, for the end-to-end tests of upgrades (e2e/upgrade_test.go).
const raised = 1
