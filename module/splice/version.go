// SPDX-License-Identifier: Apache-2.0

//go:build !weir_next

package splice

// next makes the program one of the following record version, for the tests of
// upgrades.
const next = 0
