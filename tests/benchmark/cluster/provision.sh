#!/usr/bin/env bash
# Installs what `make bench-cluster` measures beside: Ceph's daemons, fio and etcd. Nothing of it is needed by the product
# or by `make test`.
set -euo pipefail
. "$(dirname "$0")/../../packages.sh"

find_missing ceph-mon ceph-mgr ceph-osd ceph-common librbd1 fio etcd-server iproute2
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ]; then
  echo "Packages are missing. Run: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 1
fi
install_missing "the benchmark"
