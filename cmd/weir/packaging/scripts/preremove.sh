#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Debian calls this with "remove" or "upgrade", RPM with the number of versions
# that stay.
set -e

case "${1:-}" in
remove | deconfigure | 0) ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
	systemctl disable --now weir.service || true
fi
# What an instance that was killed left: rules, sysctls, files.
/usr/bin/weir cleanup || echo "weir: not everything could be cleaned up; see above" >&2
