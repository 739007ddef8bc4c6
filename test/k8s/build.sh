#!/bin/bash
# Makes what a single-node Kubernetes consists of, below the test cache; takes no time when it is there:
#  - etcd, containerd, runc and the CNI plugins, from Debian's packages, which are unpacked and not installed;
#  - Kubernetes from the Go module proxy, as one program for all its commands (130 MB; five programs would be 400);
#  - the image of the "pause" container that holds a pod's namespaces.
# From nothing: 450 s of a processor and 5 GB of disk, most of them in Go's module and build caches.
set -euo pipefail
. "$(dirname "$0")/env.sh"
KUBE_VERSION=${KUBE_VERSION:-1.36.3} # module k8s.io/kubernetes at v1.x, the k8s.io modules of its staging directory at v0.x
STAGING_VERSION=0.${KUBE_VERSION#1.}
DEBIAN_PACKAGES=(etcd-server containerd runc containernetworking-plugins busybox-static)
export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -trimpath"
mkdir -p "$ROOT" "$KUBE" "$IMAGES"

debian() {
  [ ! -e "$DEB/done" ] || return 0
  rm -rf "$ROOT/debs" "$DEB"
  mkdir -p "$ROOT/debs" "$DEB"
  cd "$ROOT/debs"
  # _apt may have no way into the repository: then apt-get downloads as root, and warns.
  apt-get -q download "${DEBIAN_PACKAGES[@]}" || { apt-get -q update && apt-get -q download "${DEBIAN_PACKAGES[@]}"; }
  for d in *.deb; do dpkg -x "$d" "$DEB"; done
  touch "$DEB/done"
}

# k8s.io/kubernetes cannot be required as it is: its go.mod replaces its staging modules by directories that are not in the
# module. A module of our own replaces them by their releases.
kubernetes() {
  [ ! -e "$KUBE/done-$KUBE_VERSION" ] || return 0
  local src=$ROOT/src/kube gomod ld c
  mkdir -p "$src"
  cp -r "$HERE/src/kube/." "$src/"
  cd "$src"
  go mod download "k8s.io/kubernetes@v$KUBE_VERSION"
  gomod=$(go env GOMODCACHE)/cache/download/k8s.io/kubernetes/@v/v$KUBE_VERSION.mod
  {
    echo "module kubebuild"
    grep -E '^(go|godebug) ' "$gomod"
    echo "require k8s.io/kubernetes v$KUBE_VERSION"
    grep -oE '^\s+k8s.io/[a-z0-9-]+ => ./staging' "$gomod" | awk -v v="v$STAGING_VERSION" '{print "replace " $1 " => " $1 " " v}'
  } > go.mod
  go mod tidy
  ld=k8s.io/component-base/version # or it says v0.0.0, and refuses what is newer than that
  go build -o "$KUBE/kubernetes" -ldflags "-s -w -X $ld.gitVersion=v$KUBE_VERSION -X $ld.gitMajor=1 \
    -X $ld.gitMinor=$(cut -d. -f2 <<< "$KUBE_VERSION") -X $ld.gitTreeState=clean" ./multi
  for c in kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl; do ln -sf kubernetes "$KUBE/$c"; done
  touch "$KUBE/done-$KUBE_VERSION"
}

debian
kubernetes
