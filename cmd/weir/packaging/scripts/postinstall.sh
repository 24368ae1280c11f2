#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Nothing is started and nothing is restarted: a new installation needs its
# addresses first, and an instance that runs keeps its connections.
set -e

[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || true
if systemctl --quiet is-active weir.service; then
	echo "weir: the running instance is still the old version; when it suits: systemctl restart weir"
fi
