// SPDX-License-Identifier: Apache-2.0

// Package policypb is the contract between Weir and its policy plugins, as
// generated from policy.proto, which is where it is documented. It holds no
// other code; package policies has what a plugin's author works with.
package policypb
