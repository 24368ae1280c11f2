#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# install.sh DIRECTORY: the test of the installed package, run by install_test.go
# in namespaces of its own. DIRECTORY has weir.deb. Exit code 77: this kernel
# cannot do it.
set -euo pipefail
dir=$1

fail() { echo "FAIL: $*"; exit 1; }

# A root in which everything may be changed, and of which nothing is left. No
# service manager runs in it, and its processes are of this namespace.
mount --make-rprivate / || exit 77
mount -t tmpfs -o size=1g tmpfs "$dir/root" || exit 77
mkdir "$dir/root/up" "$dir/root/work" "$dir/root/all"
root=$dir/root/all
mount -t overlay -o "lowerdir=/,upperdir=$dir/root/up,workdir=$dir/root/work" overlay "$root" || exit 77
mount -t proc proc "$root/proc" || exit 77
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/etc" && rm -rf "$root/etc/weir" "$root/usr/lib/weir"
cp "$dir/weir.deb" "$root/tmp/weir.deb"
inside() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }

# A router with the addresses of the configuration that the package brings.
inside ip link set lo up
inside ip link add dmz type veth peer name far
inside ip addr add 198.51.100.1/24 dev dmz
inside ip link set dmz up
inside ip link set far up
inside ip addr add 203.0.113.10/32 dev lo
echo 1 >"$root/proc/sys/net/ipv4/ip_forward"
before=$(inside nft list ruleset; cat "$root"/proc/sys/net/ipv4/conf/*/{rp_filter,accept_local} "$root/proc/sys/net/ipv4/ip_local_reserved_ports")

inside dpkg --install --force-depends /tmp/weir.deb
[ "$(inside dpkg-query -W -f '${db:Status-Status}' weir)" = installed ] || fail "dpkg does not know it as installed"
echo "installed"
[ -z "$(inside nft list ruleset)" ] || fail "the installation made rules"
echo "no instance was started"
inside weir check
inside weir doctor || fail "the doctor finds something on a router that is made for it"

run() {
  inside weir run --supervise >"$dir/log" 2>&1 &
  for _ in $(seq 200); do
    if inside weir status >/dev/null 2>&1; then return; fi
    sleep 0.05
  done
  fail "it does not serve: $(cat "$dir/log")"
}
# The pid as this namespace counts it.
pid() { inside weir status -o json | sed -n 's/^  "pid": \([0-9]*\),$/\1/p'; }
run
grep -o 'msg=serving' "$dir/log" | sed 's/msg=//'
# With a plugin of the package.
cat >>"$root/etc/weir/weir.yaml" <<'EOF'
    policies: [{use: path, config: {routes: [{prefix: /sales/, servers: [s1]}]}}]
EOF
inside weir reload
inside weir plugins | grep -q ' up ' || fail "the packaged plugin is not up: $(inside weir plugins)"
inside weir man >/dev/null
inside bash -n /usr/share/bash-completion/completions/weir

# An upgrade keeps the configuration and what runs.
first=$(pid)
inside dpkg --install --force-depends --force-confold /tmp/weir.deb
[ "$(pid)" = "$first" ] || fail "an upgrade ended the instance"
grep -q '/sales/' "$root/etc/weir/weir.yaml" || fail "an upgrade overwrote the configuration"
inside weir upgrade || fail "weir upgrade: $(cat "$dir/log")"
second=$(pid)
[ -n "$second" ] && [ "$second" != "$first" ] || fail "process $first serves on after weir upgrade"
inside weir plugins | grep -q ' up ' || fail "the plugin is not up after the upgrade: $(inside weir plugins)"
echo "is upgraded while it runs"

# A running instance is not cleaned away.
if inside weir cleanup 2>"$dir/said"; then fail "a running instance was cleaned away"; fi
grep -q 'stop it first' "$dir/said" || fail "weir cleanup says: $(cat "$dir/said")"

# All its processes at once; the plugins go with them.
victims=()
for p in "$root"/proc/[0-9]*; do
  if [ "$(cat "$p/comm" 2>/dev/null)" = weir ]; then victims+=("${p##*/}"); fi
done
kill -KILL "${victims[@]}"
wait || true
inside nft list tables >"$dir/tables"
grep -q 'inet weir' "$dir/tables" && echo "killed: the rules stand"

inside dpkg --remove weir
after=$(inside nft list ruleset; cat "$root"/proc/sys/net/ipv4/conf/*/{rp_filter,accept_local} "$root/proc/sys/net/ipv4/ip_local_reserved_ports")
[ "$after" = "$before" ] || fail "the removal left rules or sysctls: $(diff <(echo "$before") <(echo "$after"))"
[ -e "$root/usr/bin/weir" ] && fail "the program is still there"
[ -e "$root/etc/weir/weir.yaml" ] || fail "a removal takes the configuration away"
echo "removed"
inside dpkg --purge weir
for f in /etc/weir /usr/lib/weir /run/weir /var/log/weir; do
  [ ! -e "$root$f" ] || fail "$f is left: $(find "$root$f")"
done
echo "purged"
