#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# go.sh ARGUMENTS...        runs the go command with them, as the user who builds
# go.sh --as-builder CMD... runs another command as that user
# go.sh --builder           prints his name
# go.sh --which             prints the go command
set -euo pipefail
# shellcheck source=internal/build/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

user=$(builder)
case "${1:-}" in
--builder)
  echo "$user"
  exit
  ;;
--as-builder)
  shift
  as_user "$user" "$@"
  exit
  ;;
esac

go=$(find_go "$user")
if [ "${1:-}" = --which ]; then
  echo "$go"
  exit
fi

# Weir has no cgo; only the race detector needs it, and says so.
export CGO_ENABLED="${CGO_ENABLED:-0}"
# Where git does not answer for this checkout (no commit yet, another owner, no
# git), go build would fail instead of leaving the revision out.
if [ -e "$weir_top/.git" ] && ! as_user "$user" git -C "$weir_top" log -1 --format= >/dev/null 2>&1; then
  export GOFLAGS="${GOFLAGS:-} -buildvcs=false"
fi
# The go command finds its own tools beside itself; what it starts should find
# the same go.
export PATH="$(dirname "$go"):$PATH"
as_user "$user" "$go" "$@"
