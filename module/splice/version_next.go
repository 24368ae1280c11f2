// SPDX-License-Identifier: Apache-2.0

//go:build weir_next

package splice

const next = 1
