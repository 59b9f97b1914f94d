// SPDX-License-Identifier: Apache-2.0

//go:build raised

package version

// raised makes the daemon that comes after the present one, for the end-to-end tests of upgrades (e2e/upgrade_test.go).
const raised = 1
