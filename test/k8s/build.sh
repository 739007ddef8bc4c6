#!/bin/bash
# Builds a single-node Kubernetes into the test cache: Debian's etcd, containerd, runc and CNI plugins unpacked, and one
# multi-call binary of Kubernetes from the Go module proxy. About 8 minutes and 5 GB on two cores; nothing when it is there.
set -euo pipefail
. "$(dirname "$0")/env.sh"
HERE=$REPO/test/k8s
KV=${KV:-1.36.3} # k8s.io/kubernetes v$KV, staging modules v0.${KV#1.}
export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -trimpath"
mkdir -p "$ROOT"/{src,bin/multi,log,images,debs,deb}

missing=()
for p in openssl iproute2 bc; do dpkg-query -W "$p" > /dev/null 2>&1 || missing+=("$p"); done
[ ${#missing[@]} = 0 ] || apt-get -q install -y --no-install-recommends "${missing[@]}"
if [ ! -x "$K8S_ETCD" ]; then
  (cd "$ROOT/debs" && { apt-get -q download etcd-server containerd runc containernetworking-plugins busybox-static ||
    { apt-get -q update && apt-get -q download etcd-server containerd runc containernetworking-plugins busybox-static; }; })
  for d in "$ROOT"/debs/*.deb; do dpkg -x "$d" "$ROOT/deb"; done
fi

if [ ! -e "$ROOT/bin/multi/done-$KV" ]; then
  cp -r "$HERE/src/kube" "$ROOT/src/"
  cd "$ROOT/src/kube"
  printf 'module kubebuild\n' > go.mod
  go mod download "k8s.io/kubernetes@v$KV"
  m=$(go env GOMODCACHE)/cache/download/k8s.io/kubernetes/@v/v$KV.mod
  { echo "module kubebuild"; echo; grep -E '^(go|godebug) ' "$m"; echo; echo "require k8s.io/kubernetes v$KV"; echo; echo "replace ("
    grep -oE '^\s+k8s.io/[a-z0-9-]+ => ./staging' "$m" | awk -v v="v0.${KV#1.}" '{print "\t"$1" => "$1" "v}'; echo ")"; } > go.mod
  go mod tidy
  go build -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=v$KV -X k8s.io/component-base/version.gitMajor=1 \
    -X k8s.io/component-base/version.gitMinor=$(echo "$KV" | cut -d. -f2) -X k8s.io/component-base/version.gitTreeState=clean" \
    -o "$ROOT/bin/multi/multi" ./multi
  for c in kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl; do ln -sf multi "$ROOT/bin/multi/$c"; done
  touch "$ROOT/bin/multi/done-$KV"
fi

cd "$REPO"
w=$(mktemp -d)
trap 'rm -rf "$w"' EXIT
go build -ldflags '-s -w' -o "$w/pause" "$HERE/src/pause/main.go"
go run ./test/cmd/mkimage "$ROOT/images/pause.tar" docker.io/local/pause:1 "$w" /pause
