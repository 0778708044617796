# Sourced by what installs Debian packages: find_missing PACKAGE... fills `missing`; install_missing WHAT-FOR installs those,
# as root. While it works a temporary policy-rc.d keeps the packages' services from starting; a policy-rc.d that was there
# before stays as it was.
POLICY=/usr/sbin/policy-rc.d
missing=()

find_missing() {
  local package state
  for package in "$@"; do
    state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
  done
}

install_missing() {
  log=$(mktemp)
  own_policy=
  trap clean_up EXIT
  if [ ! -e "$POLICY" ]; then
    own_policy=yes
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
  fi
  echo "installing for $1: ${missing[*]} ..."
  # The package lists may be missing or old: fetch them only when the installation fails without.
  if ! install_quietly >"$log" 2>&1 && ! { apt-get -qq update && install_quietly; } >"$log" 2>&1; then
    cat "$log" >&2
    echo "The packages could not be installed; see above. Needed for $1: ${missing[*]}" >&2
    exit 1
  fi
}

install_quietly() { DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "${missing[@]}"; }

clean_up() { rm -f "$log"; [ -z "$own_policy" ] || rm -f "$POLICY"; }
