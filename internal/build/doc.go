// SPDX-License-Identifier: Apache-2.0

// Package build holds the scripts behind the Makefile: who builds and with which
// Go (env.sh, go.sh), the packages that the tests use (deps.sh), and the checks
// of make lint (lint.sh). It has no Go code but the tests of the scripts; they
// must not change anything outside their temporary directories.
package build
