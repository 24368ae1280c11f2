#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
set -e

if [ "${1:-}" = purge ]; then
	rm -rf /run/weir /var/log/weir
fi
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || true
