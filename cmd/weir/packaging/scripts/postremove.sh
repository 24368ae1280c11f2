#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
set -e

[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || true
