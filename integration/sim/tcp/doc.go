// SPDX-License-Identifier: Apache-2.0

// Package tcp is a small deterministic model of a TCP endpoint: what stands at
// both ends of the simulator's wires. It behaves as RFC 9293 and its companions
// say, with Linux's choice where they leave one, and its habits can be drawn:
// options, buffer, delayed acknowledgments, Nagle, the form of a window probe.
//
// It exists to disbelieve the engine, so it shares nothing with it but the
// bytes of packets (module/packet crafts and parses them): positions in the
// streams are 64 bits wide here and sequence numbers appear only in headers.
// It must not read a clock, start a goroutine or draw a random number: time and
// every choice come from outside, so that a run is repeated exactly.
package tcp
