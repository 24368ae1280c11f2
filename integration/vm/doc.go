// SPDX-License-Identifier: Apache-2.0

// Package vm runs weir on a kernel that nobody of ours has configured: the one
// of a stock Debian, in QEMU without hardware virtualisation. It makes an
// initial RAM disk with the kernel's own modules, weir, and the tests of
// package guest, boots it, and reads the result from the serial console.
//
// What this kernel has that the host's may lack: the native queue expression,
// netem, modules that are loaded on demand; and what it lacks, as older
// routers do: tables that can be owned, and tcx.
//
// Speed means nothing here; nothing in it measures time.
package vm
