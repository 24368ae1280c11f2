#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Nothing is started: a new installation needs its addresses first. An instance
# that runs goes over to the new version and keeps its connections; if it cannot,
# the old version serves on.
set -e

[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || true
if systemctl --quiet is-active weir.service; then
	/usr/bin/weir upgrade ||
		echo "weir: the running instance is still the old version; when it suits: systemctl restart weir"
fi
