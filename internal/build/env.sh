# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What the other scripts share: who builds, and with which Go. To be sourced.
#
# Under sudo only what needs root runs as root. Compiling and fetching modules
# is the work of the user who called sudo, so that his caches stay his; a
# checkout in a home that nobody else may enter works, since root may read it
# and the user may write it.

weir_top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

# say writes a line to stderr.
say() { printf '%s\n' "$*" >&2; }

# as_user USER COMMAND... runs the command as USER; only root may name another
# one than himself. The environment stays, less what is root's own.
as_user() {
  local user=$1 entry home gid
  shift
  if [ "$(id -un)" = "$user" ]; then
    "$@"
    return
  fi
  entry=$(getent passwd "$user") || { say "weir: no user named $user"; return 1; }
  home=$(cut -d: -f6 <<<"$entry")
  gid=$(cut -d: -f4 <<<"$entry")
  local run=(env -u TMPDIR -u XDG_RUNTIME_DIR -u XDG_CACHE_HOME -u XDG_CONFIG_HOME -u MAIL
    "HOME=$home" "USER=$user" "LOGNAME=$user" "$@")
  if command -v setpriv >/dev/null 2>&1; then
    # No capability may stay behind: a test that asks whether it has any would
    # otherwise go on and fail.
    setpriv --reuid "$user" --regid "$gid" --init-groups --inh-caps=-all -- "${run[@]}"
  else
    runuser -u "$user" -- "${run[@]}"
  fi
}

# builder prints the user who builds: the one who called sudo or doas, else the
# owner of the checkout, each only if he can write here; else whoever runs this.
builder() {
  local u
  if [ "$(id -u)" -eq 0 ]; then
    for u in "${SUDO_USER:-}" "${DOAS_USER:-}" "$(stat -c %U "$weir_top")"; do
      case "$u" in '' | root | UNKNOWN) continue ;; esac
      getent passwd "$u" >/dev/null || continue
      if as_user "$u" test -w "$weir_top"; then
        echo "$u"
        return
      fi
    done
  fi
  id -un
}

# version_number turns go1.26.8 into 1026008.
version_number() {
  local a b c
  IFS=. read -r a b c <<<"${1#go}"
  b=${b%%[!0-9]*} c=${c%%[!0-9]*}
  printf '%d%03d%03d\n' "$((10#${a:-0}))" "$((10#${b:-0}))" "$((10#${c:-0}))"
}

# go_candidates USER HOME prints the places where people install Go, one a line.
go_candidates() {
  local home=$2 p
  # sudo's secure_path lacks what the user has in his own PATH.
  p=$(command -v go 2>/dev/null) && echo "$p"
  echo /usr/local/go/bin/go
  for p in "$home"/go/bin/go "$home"/.local/go/bin/go "$home"/.local/bin/go "$home"/.local/opt/go/bin/go \
    "$home"/bin/go "$home"/.go/bin/go "$home"/.local/share/go/bin/go \
    "$home"/sdk/go*/bin/go "$home"/go/go*/bin/go "$home"/.gvm/gos/*/bin/go \
    "$home"/.goenv/versions/*/bin/go "$home"/.asdf/installs/golang/*/go/bin/go \
    "$home"/.local/share/mise/installs/go/*/bin/go \
    /usr/local/go*/bin/go /opt/go*/bin/go /usr/lib/go*/bin/go /usr/lib/golang/bin/go /snap/bin/go \
    /home/linuxbrew/.linuxbrew/bin/go; do
    [ "$p" = /usr/local/go/bin/go ] || echo "$p"
  done
}

# find_go USER prints the path of the go command to use: $WEIR_GO if it is set,
# else the first one that is new enough for go.mod, else the newest one that can
# fetch the right toolchain by itself (1.21 and later). It fails with a message
# when there is none.
find_go() {
  local user=$1 home want g v n best='' best_n=0 seen=''
  if [ -n "${WEIR_GO:-}" ]; then
    echo "$WEIR_GO"
    return
  fi
  home=$(getent passwd "$user" | cut -d: -f6)
  want=$(version_number "$(sed -n 's/^go //p' "$weir_top/go.mod")")
  while read -r g; do
    # As root one may see what the builder may not run, and a home that root
    # may enter is looked into with the builder's eyes.
    v=$(cd / && GOTOOLCHAIN=local as_user "$user" "$g" version 2>/dev/null) || continue
    v=$(cut -d' ' -f3 <<<"$v")
    seen+=" $g ($v)"
    n=$(version_number "$v")
    if [ "$n" -ge "$want" ]; then
      echo "$g"
      return
    fi
    if [ "$n" -ge 1021000 ] && [ "$n" -gt "$best_n" ]; then
      best=$g best_n=$n
    fi
  done < <(as_user "$user" bash -c "$(declare -f go_candidates); go_candidates \"\$@\"" _ "$user" "$home")
  if [ -n "$best" ]; then
    echo "$best"
    return
  fi
  say "weir: no usable Go for user $user: go.mod wants $(sed -n 's/^go //p' "$weir_top/go.mod") (1.21 or later can fetch it)."
  say "weir: looked in PATH, /usr/local/go, ~/go, ~/sdk, ~/.local, /usr/lib/go*, /opt, /snap${seen:+; found too old:$seen}"
  say "weir: install Go from https://go.dev/dl/ into /usr/local/go, or name it: make WEIR_GO=/path/to/go"
  return 1
}
