#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# lint.sh runs every check to its end, says which failed, and changes no file.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
go=internal/build/go.sh
staticcheck=honnef.co/go/tools/cmd/staticcheck@v0.8.2
failed=()

# check NAME COMMAND...: the command fails or prints something: the check failed.
check() {
  local name=$1 out rc=0
  shift
  out=$("$@" 2>&1) || rc=$?
  if [ "$rc" -ne 0 ] || [ -n "$out" ]; then
    printf 'FAIL  %s\n%s\n' "$name" "$out"
    failed+=("$name")
  else
    printf 'ok    %s\n' "$name"
  fi
}

# Fetching modules prints lines that are no findings.
fetched() { grep -vE '^go: downloading ' || true; }

formatting() { find . \( -path ./build -o -path ./bin -o -path ./.git \) -prune -o -name '*.go' -print0 |
  xargs -0 "$($go env GOROOT)/bin/gofmt" -l; }
vet() { $go vet ./... 2>&1 | fetched; }
static() { $go run "$staticcheck" ./... 2>&1 | fetched; }
structure() { $go test -count=1 ./internal/structure 2>&1 | fetched | grep -v '^ok '; [ "${PIPESTATUS[0]}" -eq 0 ]; }
tidy() { $go mod tidy -diff 2>&1 | fetched; }
scripts() { local s; for s in internal/build/*.sh .ci/run; do bash -n "$s"; done; }

# Work that was left open, and places of one machine, have no business in files
# that are shipped. Each word is written so that it does not find itself.
words() {
  grep -rnIE --include='*.go' --include='*.sh' --include='*.proto' --include=Makefile \
    '\b(TO''DO|FIX''ME|X''XX)\b|not implement''ed|["` ]/(ho''me|wo''rk|ro''ot)/' \
    --exclude-dir=build --exclude-dir=bin --exclude-dir=.git --exclude='*.pb.go' --exclude=env.sh .
  return 0
}

# Generated code must be what the generator makes: in a copy of the tree
# everything is made anew, and no file of the copy may change by it.
generated() {
  local copy rc=0
  copy=$($go --as-builder mktemp -d) || return
  $go --as-builder sh -c 'tar cf - --exclude=./build --exclude=./bin --exclude=./.git . | tar xf - -C "$1"' _ "$copy/" || rc=$?
  if [ "$rc" -eq 0 ]; then
    (
      cd "$copy" || exit
      sums() { find . -type f -exec sha256sum {} + | sort -k 2; }
      before=$(sums)
      internal/build/go.sh generate ./... 2>&1 | fetched
      [ "${PIPESTATUS[0]}" -eq 0 ] || exit
      diff <(echo "$before") <(sums) | sed -n 's/^[<>] [0-9a-f]*  /make generate changes /p' | sort -u
    ) || rc=$?
  fi
  rm -rf "$copy"
  return "$rc"
}

check gofmt formatting
check "go vet" vet
check staticcheck static
check "house rules (internal/structure)" structure
check words words
check "go mod tidy" tidy
check "shell scripts" scripts
if command -v protoc >/dev/null 2>&1; then
  check "generated code" generated
else
  echo "skip  generated code: protoc is not installed"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "lint: ${#failed[@]} failed: $(IFS=,; echo "${failed[*]}")"
  exit 1
fi
echo "lint: clean"
