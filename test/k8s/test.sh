#!/bin/bash
# Builds workloads with Kiln in pods of a real single-node Kubernetes, in a namespace that enforces Pod Security "restricted",
# and pushes them to `kiln registry` on the node; then pulls them and compares the digests. README.md tells more.
#   test.sh [WORKLOAD]...   directories of test/workloads; default: W1-hello-go W2-apt-python
# KILN: test this binary, not the repository's.  KEEP=1: leave the node running; down.sh ends it.
set -euo pipefail
if [ "$(id -u)" != 0 ]; then
  echo "test-k8s: not run: needs root"
  exit 0
fi
. "$(dirname "$0")/env.sh"
cd "$REPO"
export CGO_ENABLED=0
workloads=("$@")
[ $# -gt 0 ] || workloads=(W1-hello-go W2-apt-python)
REGISTRY=$NODE_IP:5000 PROXY=$NODE_IP:3128
POD_TIMEOUT=600 # seconds, for a busy machine
WORK=$ROOT/work

die() {
  echo "test-k8s: $*" >&2
  exit 1
}
pids=()
finish() {
  local status=$?
  trap '' INT TERM HUP # the second ^C has to wait as well
  for p in "${pids[@]}"; do kill -- "-$p" 2> /dev/null || true; done
  if [ -n "${KEEP:-}" ]; then
    echo "test-k8s: KEEP is set: export KUBECONFIG=$KUBECONFIG PATH=$KUBE:\$PATH; test/k8s/down.sh ends the node"
  else
    "$HERE/down.sh"
  fi
  rm -rf "$WORK"
  echo "test-k8s: ended after $SECONDS s, $([ $status = 0 ] && echo ok || echo "FAILED ($status)")"
  exit $status
}
# background LOG COMMAND...: in a process group of its own, for finish to end
background() {
  setsid "${@:2}" > "$LOG/$1.log" 2>&1 < /dev/null 9>&- &
  pids+=($!)
}
# await SECONDS COMMAND...
await() {
  local end=$((SECONDS + $1))
  until "${@:2}" > /dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.5
  done
}
step() { echo "=== $SECONDS s: $*"; }

mkdir -p "$ROOT" "$LOG"
exec 9> /run/lock/kiln-test-k8s # addresses, bridge and cgroup are the machine's: one node at a time
flock -n 9 || { echo "test-k8s: waiting for another run on this machine"; flock 9; }
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
"$HERE/down.sh" # what a killed run may have left
rm -rf "$WORK" "$LOG"
mkdir -p "$WORK" "$LOG"

step "making Kubernetes (nothing to do if cached), Kiln and the images"
scripts/deps.sh base k8s
background build nice -n 10 "$HERE/build.sh"
build=$!
kiln=$WORK/kiln
if [ -n "${KILN:-}" ]; then cp "$KILN" "$kiln"; else go build -trimpath -ldflags '-s -w' -o "$kiln" ./cmd/kiln; fi
go build -trimpath -ldflags '-s -w' -o "$WORK/" ./test/k8s/src/{pause,nodeproxy,verify}
scripts/base-images.sh > /dev/null
wait "$build" || {
  tail -n 30 "$LOG/build.log" >&2
  die "cannot make Kubernetes"
}

# Kiln makes the image that it will be in.
root=$WORK/image/rootfs
mkdir -p "$root"/{bin,workloads}
cp "$WORK/pause" "$WORK/image/pause"
cp "$kiln" "$DEB/bin/busybox" "$root/bin/"
for a in awk cat id kill sed sh sleep sort tail; do ln -s busybox "$root/bin/$a"; done
cp test/k8s/image/build.sh "$root/"
for w in "${workloads[@]}"; do cp -r "test/workloads/$w" "$root/workloads/"; done
chmod -R go+rX "$WORK/image"
for i in pause kiln; do
  "$kiln" build -q --root "$WORK/store" -f test/k8s/image/Dockerfile --target "$i" -t "docker.io/local/$i:1" \
    -o "type=docker,dest=$IMAGES/$i.tar" "$WORK/image" > /dev/null
done

step "starting the node"
"$HERE/up.sh"
background registry "$kiln" registry --addr "$REGISTRY" --root "$WORK/registry"
background nodeproxy "$WORK/nodeproxy" "$PROXY"
await 60 grep -q "^Registry on $REGISTRY" "$LOG/registry.log" || { cat "$LOG/registry.log"; die "kiln registry does not start"; }
await 60 grep -q ^ready "$LOG/nodeproxy.log" || { cat "$LOG/nodeproxy.log"; die "the proxy does not start"; }
scripts/base-images.sh -push "$REGISTRY" > /dev/null

step "a namespace that enforces restricted"
kubectl apply -f - << K
apiVersion: v1
kind: Namespace
metadata:
  name: builds
  labels: {pod-security.kubernetes.io/enforce: restricted, pod-security.kubernetes.io/enforce-version: latest}
K
await 120 kubectl -n builds get serviceaccount default || die "no service account appears in the namespace"
await 120 kubectl -n default get serviceaccount default || die "no service account appears in the default namespace"
cat > "$WORK/privileged.yaml" << K
apiVersion: v1
kind: Pod
metadata: {name: privileged}
spec:
  containers: [{name: c, image: local/kiln:1, imagePullPolicy: Never, securityContext: {privileged: true}}]
K
# In the default namespace the same pod is admitted: it is Pod Security that refuses it.
kubectl -n default create --dry-run=server -f "$WORK/privileged.yaml" > /dev/null || die "a privileged pod is refused everywhere"
if kubectl -n builds create -f "$WORK/privileged.yaml" > "$WORK/refused" 2>&1; then die "a privileged pod is admitted: restricted is not enforced"; fi
grep -q 'violates PodSecurity "restricted:latest": privileged (' "$WORK/refused" || { cat "$WORK/refused"; die "a privileged pod is refused for another reason"; }
sed -E 's/^/refused, as it has to be: /; s/, allowPrivilegeEscalation.*/, .../' "$WORK/refused"

pod_yaml() { # NAME WORKLOAD REF
  cat << K
apiVersion: v1
kind: Pod
metadata: {name: $1, namespace: builds}
spec:
  restartPolicy: Never
  activeDeadlineSeconds: $POD_TIMEOUT
  automountServiceAccountToken: false
  enableServiceLinks: false
  dnsPolicy: Default
  securityContext: {runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: kiln
    image: local/kiln:1
    imagePullPolicy: Never
    args:
    - --progress=plain
    - --push
    - --insecure-registry=$REGISTRY
    - --build-arg=REGISTRY=$REGISTRY
    - --build-arg=http_proxy=http://$PROXY
    - --build-arg=https_proxy=http://$PROXY
    - --tag=$3
    - /workloads/$2
    securityContext:
      allowPrivilegeEscalation: false
      capabilities: {drop: [ALL]}
      readOnlyRootFilesystem: true
    volumeMounts: [{name: store, mountPath: /store}, {name: tmp, mountPath: /tmp}]
  volumes: [{name: store, emptyDir: {}}, {name: tmp, emptyDir: {}}]
K
}
get() { kubectl -n builds get pod "$1" -o "jsonpath={$2}"; } # POD PATH
ended() { case $(get "$1" .status.phase) in Succeeded | Failed) ;; *) return 1 ;; esac }

# The pod is as restricted as it is said to be, by what its own kernel tells it.
CONFINED=("uid 1000" "CapPrm 0000000000000000" "CapEff 0000000000000000" "CapBnd 0000000000000000"
  "NoNewPrivs 1" "Seccomp 2" "root file system read-only")

build_in_pod() { # WORKLOAD
  local pod=${1,,} log ref said pulled c t
  ref=$REGISTRY/k8s/$pod:latest log=$LOG/pod-$pod.log
  pod_yaml "$pod" "$1" "$ref" | kubectl apply -f - || return 1
  await $((POD_TIMEOUT + 60)) ended "$pod" || echo "$1: the pod has not ended"
  kubectl -n builds logs "$pod" > "$log" || true
  [ "$(get "$pod" .status.phase)" = Succeeded ] || return 1
  for c in "${CONFINED[@]}"; do grep -qx "pod: $c" "$log" || { echo "$1: the pod does not say $c"; return 1; }; done
  said=$(sed -nE 's/^digest (sha256:[0-9a-f]{64})$/\1/p' "$log")
  pulled=$("$WORK/verify" "$ref") || return 1
  [ "$said" = "$pulled" ] || { echo "$1: the pod's log says $said, the registry has $pulled"; return 1; }
  t=.status.containerStatuses[0].state.terminated
  echo "$1: built in a restricted pod and pushed as $ref@$pulled"
  echo "$1: $(($(date +%s -d "$(get "$pod" $t.finishedAt)") - $(date +%s -d "$(get "$pod" .metadata.creationTimestamp)"))) s from" \
    "creation to end, $(($(date +%s -d "$(get "$pod" $t.finishedAt)") - $(date +%s -d "$(get "$pod" $t.startedAt)"))) s of them in the container"
  sed -nE "s/^pod: (sandbox|cpu|memory)/$1: \1/p" "$log"
}

failed=()
for w in "${workloads[@]}"; do
  step "$w"
  build_in_pod "$w" && continue
  failed+=("$w")
  echo "--- $w FAILED; the pod:"
  kubectl -n builds describe pod "${w,,}" || true
  echo "--- its log:"
  kubectl -n builds logs "${w,,}" --tail 200 || true
done
[ ${#failed[@]} = 0 ] || die "failed: ${failed[*]}"
