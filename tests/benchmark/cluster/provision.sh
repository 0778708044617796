#!/usr/bin/env bash
# Installs what `make bench-cluster` measures beside: Ceph's daemons, fio and etcd. Nothing of it is needed by the product
# or by `make test`. While it works a temporary policy-rc.d keeps the packages' services from starting.
set -euo pipefail

PACKAGES=(ceph-mon ceph-mgr ceph-osd ceph-common librbd1 fio etcd-server iproute2)
POLICY=/usr/sbin/policy-rc.d

missing=()
for package in "${PACKAGES[@]}"; do
  state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ]; then
  echo "Packages are missing. Run: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 1
fi
if [ ! -e "$POLICY" ]; then
  trap 'rm -f "$POLICY"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$POLICY"
  chmod 755 "$POLICY"
fi
echo "installing for the benchmark: ${missing[*]} ..."
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --no-install-recommends "${missing[@]}" >/dev/null
