// SPDX-License-Identifier: Apache-2.0

// Package guest holds the tests that run inside the virtual machine of package
// vm, on a kernel with the native queue expression and netem and without
// owned tables and tcx. Elsewhere they are skipped.
package guest
