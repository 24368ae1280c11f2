// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

var (
	// ErrClosed is returned by a queue or emitter after Close.
	ErrClosed = errors.New("divert: closed")
	// ErrQueueInUse means that another socket is bound to the queue's number.
	ErrQueueInUse = errors.New("in use by another program")
	// ErrPermission means that the process lacks a capability.
	ErrPermission = errors.New("permission denied, CAP_NET_ADMIN and CAP_NET_RAW are needed")
	// ErrNotHeld means that a socket that was handed over does not hold the
	// queue.
	ErrNotHeld = errors.New("the socket that was handed over does not hold it")
	// ErrUnsupported means that the kernel lacks a feature.
	ErrUnsupported = errors.New("not supported by this kernel")
)

// QueueError says which queue could not be opened and why. It wraps one of the
// errors above where the reason is known, and the kernel's error.
type QueueError struct {
	Queue  uint16
	Op     string // what was tried
	Reason error  // ErrQueueInUse, ErrNotHeld, ErrPermission, ErrUnsupported or nil
	Err    error  // the error underneath
}

// Error returns one sentence.
func (e *QueueError) Error() string {
	if e.Reason != nil {
		return fmt.Sprintf("divert: queue %d: %s: %v (%v)", e.Queue, e.Op, e.Reason, e.Err)
	}
	return fmt.Sprintf("divert: queue %d: %s: %v", e.Queue, e.Op, e.Err)
}

// Unwrap gives errors.Is and errors.As both the reason and the cause.
func (e *QueueError) Unwrap() []error {
	if e.Reason == nil {
		return []error{e.Err}
	}
	return []error{e.Reason, e.Err}
}

// openError classifies an error met while a socket is made and the kernel is
// asked whether it knows queues at all, which is before any queue is named.
func openError(queue uint16, op string, err error) error {
	e := &QueueError{Queue: queue, Op: op, Err: err}
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		e.Reason = ErrPermission
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT),
		errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOPROTOOPT):
		e.Reason = ErrUnsupported
	}
	return e
}

// bindError classifies an error met while the queue is bound. The kernel
// answers EPERM when another socket holds the queue and EBUSY when this one
// does; a lack of privileges has been found before (see probe).
func bindError(queue uint16, err error) error {
	e := &QueueError{Queue: queue, Op: "bind", Err: err}
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		e.Reason = ErrQueueInUse
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		e.Reason = ErrUnsupported
	}
	return e
}
