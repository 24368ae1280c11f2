#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# fuzz.sh SECONDS [PACKAGE...] runs every fuzz target of these packages, or of
# all, one after the other with one worker; they share the time equally. It says
# how many inputs each target ran, how much processor time that took, and fails
# when one found something: the input then lies in the package's testdata/fuzz,
# where it is a test case from then on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
go=internal/build/go.sh

seconds=${1:-}
case "$seconds" in '' | *[!0-9]*) echo "usage: fuzz.sh SECONDS [PACKAGE...]" >&2; exit 2 ;; esac
shift
[ $# -gt 0 ] || set -- .

targets=()
while IFS=: read -r file line; do
  name=${line#func }
  targets+=("$(dirname "$file") ${name%%(*}")
done < <(grep -rn --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*(' "$@" | sed 's/:[0-9]*:/:/' | sort)
[ ${#targets[@]} -gt 0 ] || { echo "fuzz: no targets in $*" >&2; exit 1; }
each=$((seconds / ${#targets[@]}))
[ "$each" -gt 0 ] || each=1

log=$(mktemp)
clock=$(mktemp)
trap 'rm -f "$log" "$clock"' EXIT

# spent sets cpu to the processor time of all children so far, in seconds. A
# subshell would print that of its own children.
spent() {
  times >"$clock"
  cpu=$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); s += 60 * t[1] + t[2] } printf "%.0f\n", s }' "$clock")
}

failed=()
for t in "${targets[@]}"; do
  read -r dir name <<<"$t"
  spent
  before=$cpu rc=0
  $go test -run '^$' -fuzz "^$name\$" -fuzztime "${each}s" -fuzzminimizetime 200x -parallel 1 "./${dir#./}" >"$log" 2>&1 || rc=$?
  # The fuzzer sometimes calls the end of its time an error.
  if [ "$rc" -ne 0 ] && grep -q 'context deadline exceeded' "$log" && ! grep -q 'Failing input' "$log"; then
    rc=0
  fi
  spent
  runs=$(sed -n 's/.*execs: \([0-9]*\).*/\1/p' "$log" | tail -n 1)
  if [ "$rc" -eq 0 ]; then
    printf 'ok    %s %s: %s inputs, %d s of processor time\n' "$dir" "$name" "${runs:-0}" "$((cpu - before))"
  else
    printf 'FAIL  %s %s\n' "$dir" "$name"
    cat "$log"
    failed+=("$name")
  fi
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "fuzz: failed: $(IFS=,; echo "${failed[*]}")"
  exit 1
fi
spent
echo "fuzz: ${#targets[@]} targets ran clean for $cpu s of processor time"
