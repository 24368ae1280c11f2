#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# deps.sh [--soft] [PACKAGE...]
#
# Installs the Debian packages whose programs the tests use, and those named,
# without starting any of their services. Only what is missing is installed;
# when nothing is, nothing happens. With --soft a failure is reported and
# forgiven: the tests then skip what they cannot do.
#
# WEIR_POLICY_RC_D names another place for policy-rc.d; only its test uses it.
set -euo pipefail

policy=${WEIR_POLICY_RC_D:-/usr/sbin/policy-rc.d}
marker='# placed by deps.sh of Weir; may be deleted'

say() { printf 'deps: %s\n' "$*" >&2; }

soft=''
if [ "${1:-}" = --soft ]; then
  soft=yes
  shift
fi

fail() {
  say "$*"
  [ -n "$soft" ] && exit 0
  exit 1
}

# have PROGRAM: also where an unprivileged PATH does not look.
have() { PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }

missing=()
# need PROGRAM PACKAGE
need() { have "$1" || missing+=("$2"); }
need nginx nginx-light # the servers behind the router
need apache2 apache2-bin
need haproxy haproxy # what the comparisons compare with
need lighttpd lighttpd # one more server that has to agree on framing
need curl curl         # clients
need ab apache2-utils
need wrk wrk
need nft nftables # foreign tables, and what ours looks like from outside
need iptables-nft iptables
need keepalived keepalived # two routers that take over from each other
need sysctl procps
need tc iproute2
need protoc protobuf-compiler # the example of a plugin in Python
if ! /usr/bin/python3 -c 'import grpc, google.protobuf' >/dev/null 2>&1; then
  missing+=(python3-grpcio python3-protobuf)
fi
need tshark tshark             # another reader of captures
need promtool prometheus       # alert rules
need systemd-analyze systemd   # the packaged unit
need gcc gcc # the race detector
if have gcc && ! [ -e /usr/include/stdlib.h ] || ! have gcc; then
  missing+=(libc6-dev)
fi
for p in "$@"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done

if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
  fail "missing, and this is no Debian: install what corresponds to: ${missing[*]}"
fi
if [ "$(id -u)" -ne 0 ]; then
  fail "missing: ${missing[*]}; to install: sudo make deps"
fi

# One at a time, or the second one would find the first one's policy.
exec 9>"${TMPDIR:-/tmp}/weir-deps.lock"
flock 9

# Debian starts a service when it is installed, unless policy-rc.d says 101. One
# that exists belongs to the administrator: it is asked, never replaced.
ours=''
cleanup() { [ -z "$ours" ] || rm -f "$policy"; }
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

if grep -qsxF "$marker" "$policy"; then
  ours=yes # a run that was killed left it
else
  tmp=$(mktemp "$policy.XXXXXX")
  printf '#!/bin/sh\n%s\nexit 101\n' "$marker" >"$tmp"
  chmod 755 "$tmp"
  # A hard link is made only where nothing is.
  if ln "$tmp" "$policy" 2>/dev/null; then
    ours=yes
  fi
  rm -f "$tmp"
fi
if [ -z "$ours" ]; then
  for service in nginx apache2 haproxy lighttpd prometheus; do
    rc=0
    "$policy" "$service" start >/dev/null 2>&1 || rc=$?
    if [ "$rc" -ne 101 ]; then
      fail "$policy exists and would let $service start; install by hand: ${missing[*]}"
    fi
  done
fi

apt() { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@" </dev/null >&2; }
known() {
  local p
  for p in "${missing[@]}"; do
    apt-cache show --no-all-versions "$p" >/dev/null 2>&1 || return 1
  done
}
updated=''
if ! known; then
  updated=yes
  apt -qq update || fail "apt-get update failed; missing: ${missing[*]}"
fi
# Newer Debians have nginx-light only as a name for nginx.
if ! apt-cache show --no-all-versions nginx-light >/dev/null 2>&1; then
  missing=("${missing[@]/#nginx-light/nginx}")
fi
say "installing ${missing[*]}"
install() { apt -qq install -y --no-install-recommends "${missing[@]}"; }
if ! install; then
  # A stale list names versions that the mirror no longer has.
  [ -z "$updated" ] || fail "apt-get install failed; missing: ${missing[*]}"
  apt -qq update || fail "apt-get update failed; missing: ${missing[*]}"
  install || fail "apt-get install failed; missing: ${missing[*]}"
fi
