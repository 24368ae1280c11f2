// SPDX-License-Identifier: Apache-2.0

package snapshot

// HasRoutes reports whether a policy that decides sends routes, or will: the
// path of a request then says which servers it may reach.
func (s *Selector) HasRoutes() bool {
	for i := range s.policies {
		if p := &s.policies[i]; !p.shadow && (p.routes != nil || p.pending) {
			return true
		}
	}
	return false
}
