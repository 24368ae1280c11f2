// SPDX-License-Identifier: Apache-2.0

// Package lab builds small networks out of Linux network namespaces, inside
// one Go process: hosts, veth links between them, programs and sockets in
// them, captures on their interfaces. It is the rig under the end-to-end
// tests and under the demonstration; it needs neither a shell nor iproute2.
//
// Namespaces are anonymous: each is held by a file descriptor of this process
// and by the programs started in it. Close removes everything, and so does the
// death of the process, whatever killed it: the kernel drops a namespace, its
// interfaces and its rules with the last holder, and the programs carry a
// parent-death signal.
//
// The package must not touch the network namespace that it is called in: no
// link, address, route or sysctl is ever made there. It decodes what it
// captures by itself (package ladder) instead of with the module's own packet
// views, so that a fault in these cannot hide from the tests that use the lab.
package lab
