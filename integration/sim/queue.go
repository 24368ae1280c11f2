// SPDX-License-Identifier: Apache-2.0

package sim

import "github.com/weirgate/weir/integration/sim/tcp"

// happening is something that is to happen at a time. Exactly one of the
// fields after order is set.
type happening struct {
	at    int64
	order uint64 // of those at one time the first one that was asked for comes first
	conn  *tcp.Conn
	wire  *wire
	p     *parcel
	do    func()
}

// queue is a binary heap of happenings.
type queue struct {
	items []happening
	n     uint64
}

func (q *queue) before(i, j int) bool {
	a, b := &q.items[i], &q.items[j]
	return a.at < b.at || a.at == b.at && a.order < b.order
}

func (q *queue) push(h happening) {
	q.n++
	h.order = q.n
	q.items = append(q.items, h)
	i := len(q.items) - 1
	for i > 0 {
		up := (i - 1) / 2
		if !q.before(i, up) {
			return
		}
		q.items[i], q.items[up] = q.items[up], q.items[i]
		i = up
	}
}

func (q *queue) pop() happening {
	h := q.items[0]
	last := len(q.items) - 1
	q.items[0] = q.items[last]
	q.items[last] = happening{}
	q.items = q.items[:last]
	i := 0
	for {
		least := i
		for k := 2*i + 1; k <= 2*i+2 && k < last; k++ {
			if q.before(k, least) {
				least = k
			}
		}
		if least == i {
			return h
		}
		q.items[i], q.items[least] = q.items[least], q.items[i]
		i = least
	}
}
