#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# packages.sh [OUTPUT-DIRECTORY]
#
# Makes the Debian and RPM packages in build/packages, or in that directory.
# WEIR_ARCHES and WEIR_FORMATS make fewer of them, WEIR_VERSION names the
# version; without it, it is that of the last tag.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=${1:-build/packages}
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$top"
go=internal/build/go.sh
if [ "$(id -u)" = 0 ] && [ "$($go --builder)" != "$(id -un)" ]; then
  exec $go --as-builder internal/build/packages.sh "$out"
fi
# One version for everybody, so that all make the same packages.
nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.43.4

if [ -z "${WEIR_VERSION:-}" ]; then
  WEIR_VERSION=$(git describe --tags --dirty 2>/dev/null | sed 's/^v//' || true)
fi
export WEIR_VERSION=${WEIR_VERSION:-0.0.0-dev}

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir -p "$stage/man" "$stage/completion" "$out"

plugins=$($go list -f '{{if eq .Name "main"}}{{.ImportPath}}{{end}}' ./plugins/...)

# build DIRECTORY: with GOOS and GOARCH from the environment
build() {
  mkdir -p "$1/plugins"
  $go build -trimpath -ldflags '-s -w' -o "$1/weir" ./cmd/weir
  # shellcheck disable=SC2086
  $go build -trimpath -ldflags '-s -w' -o "$1/plugins/" $plugins
}

# The manual pages and completions come out of the program of this machine.
build "$stage/here"
"$stage/here/weir" man --dir "$stage/man" >/dev/null
"$stage/here/weir" completion bash >"$stage/completion/weir.bash"
"$stage/here/weir" completion zsh >"$stage/completion/_weir"
GOBIN=$stage/nfpm-dir $go install "$nfpm" || exit 3 # the caller may want to know

for arch in ${WEIR_ARCHES:-amd64 arm64}; do
  if [ "$arch" = "$($go env GOARCH)" ]; then
    dir=$stage/here
  else
    dir=$stage/$arch
    GOOS=linux GOARCH=$arch build "$dir"
  fi
  rm -rf "$stage/root"
  mkdir -p "$stage/root"
  cp -r "$dir/weir" "$dir/plugins" "$stage/man" "$stage/completion" "$stage/root/"
  for format in ${WEIR_FORMATS:-deb rpm}; do
    WEIR_ARCH=$arch WEIR_STAGE=$stage/root "$stage/nfpm-dir/nfpm" package \
      --config cmd/weir/packaging/nfpm.yaml --packager "$format" --target "$out/"
  done
done
