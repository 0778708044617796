#!/usr/bin/env bash
# Installs the Debian packages that the tests need, only those that are missing.
set -euo pipefail
. "$(dirname "$0")/packages.sh"

find_missing nbdkit fio qemu-utils qemu-system-x86 nbd-client libnbd-bin python3-libnbd nbd-server busybox-static cpio \
  e2fsprogs xfsprogs libssl3 etcd-server etcd-client chromium nftables iproute2
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ]; then
  echo "*** Packages that the tests need are missing; tests that need them will be SKIPPED." >&2
  echo "*** To run them all: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 0
fi
install_missing "the tests"
