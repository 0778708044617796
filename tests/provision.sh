#!/usr/bin/env bash
# Installs the Debian packages that the tests need, only those that are missing. While it works a temporary policy-rc.d keeps
# the packages' services from starting; a policy-rc.d that was there before stays as it was.
set -euo pipefail

PACKAGES=(nbdkit fio qemu-utils qemu-system-x86 nbd-client libnbd-bin python3-libnbd nbd-server busybox-static cpio
  e2fsprogs xfsprogs libssl3 etcd-server etcd-client chromium nftables iproute2)
POLICY=/usr/sbin/policy-rc.d

missing=()
for package in "${PACKAGES[@]}"; do
  state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
  echo "*** Packages that the tests need are missing; tests that need them will be SKIPPED." >&2
  echo "*** To run them all: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 0
fi

log=$(mktemp)
own_policy=
clean_up() { rm -f "$log"; [ -z "$own_policy" ] || rm -f "$POLICY"; }
trap clean_up EXIT
if [ ! -e "$POLICY" ]; then
  own_policy=yes
  printf '#!/bin/sh\nexit 101\n' >"$POLICY"
  chmod 755 "$POLICY"
fi

export DEBIAN_FRONTEND=noninteractive
install() { apt-get -qq install --no-install-recommends "${missing[@]}"; }

echo "installing for the tests: ${missing[*]} ..."
# The package lists may be missing or old: fetch them only when the installation fails without.
if ! install >"$log" 2>&1 && ! { apt-get -qq update && install; } >"$log" 2>&1; then
  cat "$log" >&2
  echo "The packages could not be installed; see above. The tests need: ${missing[*]}" >&2
  exit 1
fi
