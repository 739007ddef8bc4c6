#!/bin/bash
# Builds W1 and W2 with Kiln in pods of a real single-node Kubernetes, in a namespace that enforces Pod Security "restricted",
# and pushes to a registry on the node. As root on Debian 12; ten minutes and 5 GB of disk the first time, two minutes after.
#   test.sh [WORKLOAD]...      KILN: another binary to test.  KEEP=1: leave the cluster running (down.sh ends it).
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "test-k8s: needs root, to run a node" >&2; exit 1; }
. "$(dirname "$0")/env.sh"
HERE=$REPO/test/k8s
cd "$REPO"
export CGO_ENABLED=0 KILN_TEST_CACHE=${KILN_TEST_CACHE:-$REPO/.work}
workloads=("${@:-W1-hello-go}")
[ $# -gt 0 ] || workloads=(W1-hello-go W2-apt-python)

scripts/base-images.sh > /dev/null
"$HERE/build.sh"
work=$(mktemp -d)
registry=
finish() {
  [ -z "$registry" ] || kill "$registry" 2> /dev/null || true
  [ -n "${KEEP:-}" ] || "$HERE/down.sh"
  rm -rf "$work"
}
trap finish EXIT

# The image: the static binary, busybox for a shell, and the build contexts.
mkdir -p "$work"/image/{bin,usr/local/bin,tmp,etc,workloads}
if [ -n "${KILN:-}" ]; then cp "$KILN" "$work/image/usr/local/bin/kiln"; else
  go build -trimpath -ldflags '-s -w' -o "$work/image/usr/local/bin/kiln" ./cmd/kiln; fi
cp "$(find "$ROOT/deb" -name busybox -type f | head -n 1)" "$work/image/bin/busybox"
for a in sh cat ls id grep; do ln -s busybox "$work/image/bin/$a"; done
for w in "${workloads[@]}"; do cp -r "test/workloads/$w" "$work/image/workloads/"; done
chmod -R go+rX "$work/image"
go run ./test/cmd/mkimage "$ROOT/images/kiln.tar" docker.io/local/kiln:1 "$work/image" /usr/local/bin/kiln

"$HERE/down.sh" > /dev/null 2>&1 || true
"$HERE/up.sh"
go build -o "$work/registry" ./test/cmd/registry
"$work/registry" -addr "$NODE_IP:5000" -proxy "$NODE_IP:3128" > "$work/registry.log" 2>&1 &
registry=$!
for _ in $(seq 300); do ! grep -q ^ready "$work/registry.log" || break; sleep 0.2; done
grep -q ^ready "$work/registry.log" || { cat "$work/registry.log"; exit 1; }

export PATH=$BIN:$PATH
kubectl apply -f - <<K
apiVersion: v1
kind: Namespace
metadata:
  name: builds
  labels: {pod-security.kubernetes.io/enforce: restricted, pod-security.kubernetes.io/enforce-version: latest}
K
for _ in $(seq 100); do ! kubectl -n builds get sa default > /dev/null 2>&1 || break; sleep 0.1; done
# The enforcement is there: a pod that does not give up its privileges is refused.
if kubectl -n builds run refused --image local/kiln:1 > "$work/refused" 2>&1; then echo "restricted is not enforced"; exit 1; fi
grep -q 'violates PodSecurity "restricted' "$work/refused" || { cat "$work/refused"; exit 1; }

status=0
for w in "${workloads[@]}"; do
  pod=$(echo "$w" | tr '[:upper:]' '[:lower:]')
  ref=$NODE_IP:5000/k8s/$pod:latest
  start=$SECONDS
  kubectl apply -f - <<K
apiVersion: v1
kind: Pod
metadata: {name: $pod, namespace: builds}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  securityContext: {runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: kiln
    image: local/kiln:1
    imagePullPolicy: Never
    args: [build, --root, /store, --progress, plain, --push, --insecure-registry, "$NODE_IP:5000", --build-arg, "REGISTRY=$NODE_IP:5000",
      --build-arg, "http_proxy=http://$NODE_IP:3128", -t, "$ref", /workloads/$w]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, readOnlyRootFilesystem: true}
    volumeMounts: [{name: store, mountPath: /store}, {name: tmp, mountPath: /tmp}]
  volumes: [{name: store, emptyDir: {}}, {name: tmp, emptyDir: {}}]
K
  phase=
  for _ in $(seq 600); do
    phase=$(kubectl -n builds get pod "$pod" -o 'jsonpath={.status.phase}')
    case $phase in Succeeded | Failed) break ;; esac
    sleep 1
  done
  if [ "$phase" = Succeeded ] && "$work/registry" -check "$ref"; then
    echo "$w: built and pushed from a restricted pod in $((SECONDS - start)) s"
  else
    status=1
    echo "$w: FAILED ($phase)"
    kubectl -n builds describe pod "$pod" | tail -n 20
    kubectl -n builds logs "$pod" --tail 60 || true
  fi
done
exit $status
