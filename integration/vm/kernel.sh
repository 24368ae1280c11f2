#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# kernel.sh DIRECTORY
#
# Puts Debian's kernel for virtual machines, with its modules, into the
# directory: boot/vmlinuz-* and lib/modules/*. The package is unpacked, not
# installed; what is there already is kept.
set -euo pipefail

dir=${1:?usage: kernel.sh DIRECTORY}
if compgen -G "$dir/boot/vmlinuz-*" >/dev/null; then
  exit 0
fi
mkdir -p "$dir"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
meta=linux-image-cloud-amd64
find_package() {
  apt-cache depends --no-recommends --no-suggests "$meta" 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }'
}
package=$(find_package)
# A machine that had all else installed may have no lists.
if [ -z "$package" ] && [ "$(id -u)" -eq 0 ]; then
  apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null >&2 || true
  package=$(find_package)
fi
if [ -z "$package" ]; then
  echo "kernel.sh: apt knows no $meta; run: apt-get update" >&2
  exit 1
fi
(cd "$tmp" && apt-get download "$package" 2>&1 | grep -v '^W:' >&2)
dpkg -x "$tmp"/*.deb "$tmp/x"
mkdir -p "$dir/boot" "$dir/lib"
cp "$tmp"/x/boot/vmlinuz-* "$dir/boot/"
# Debian has moved /lib below /usr.
if [ -d "$tmp/x/usr/lib/modules" ]; then cp -r "$tmp/x/usr/lib/modules" "$dir/lib/"; else cp -r "$tmp/x/lib/modules" "$dir/lib/"; fi
echo "kernel.sh: $package in $dir" >&2
