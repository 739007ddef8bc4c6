#!/bin/bash
# Installs what the tests need from Debian, by purpose: deps.sh [base] [unit] [oracle] [e2e] [race] [k8s] (all but k8s by default).
# Not as root: says what is missing and fails.
set -euo pipefail
declare -A PACKAGES=(
  [base]="mmdebstrap ca-certificates xz-utils"                      # base images
  [unit]="busybox-static tmux erofs-utils git zstd bzip2 xz-utils"    # what the packages' tests compare with
  [oracle]="runc skopeo umoci buildah git openssh-client"            # BuildKit's runtime, second opinions
  [e2e]="bzip2 xz-utils git openssh-client attr libcap2-bin"                        # test contexts and assertions
  [race]="gcc libc6-dev"                                             # the race detector
  [k8s]="openssl iproute2"                                           # a node of Kubernetes
)
want=()
for p in "${@:-base unit oracle e2e race}"; do
  for q in $p; do
    [ -n "${PACKAGES[$q]:-}" ] || { echo "deps.sh: no purpose $q; there are: ${!PACKAGES[*]}" >&2; exit 2; }
    want+=(${PACKAGES[$q]})
  done
done
missing=()
for p in "${want[@]}"; do
  dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
[ ${#missing[@]} = 0 ] && exit 0
if [ "$(id -u)" != 0 ]; then
  echo "deps.sh: missing Debian packages: ${missing[*]}" >&2
  echo "deps.sh: install them as root: apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
if ! apt-cache show "${missing[@]}" > /dev/null 2>&1; then apt-get -q update; fi
apt-get -q install -y --no-install-recommends "${missing[@]}" || { apt-get -q update; apt-get -q install -y --no-install-recommends "${missing[@]}"; }
