// SPDX-License-Identifier: Apache-2.0

//go:build !race

package postcopy

// raceDetector says whether the tests run with the race detector.
const raceDetector = false
