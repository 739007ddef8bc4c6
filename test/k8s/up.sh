#!/bin/bash
# Starts the node, with nothing in it; about 10 seconds. The API server is at https://10.96.0.1:443, from the machine and
# from pods; KUBECONFIG is etc/admin.kubeconfig, logs are in log/ and process ids in run/ of the k8s directory in the test
# cache. down.sh ends it.
set -euo pipefail
. "$(dirname "$0")/env.sh"
start=$EPOCHREALTIME
say() { printf '%6d ms  %s\n' $(((${EPOCHREALTIME/./} - ${start/./}) / 1000)) "$*"; }
fail() {
  echo "up.sh: $*" >&2
  exit 1
}

[ ${#CONTAINERD_SOCKET} -lt 90 ] || fail "$ROOT is too long a path for a socket: set KILN_TEST_CACHE to a shorter one"
! ip link show "$BRIDGE" > /dev/null 2>&1 || fail "a node runs already (bridge $BRIDGE): down.sh of its repository ends it"
! ip -4 route get "$NODE_IP" | grep -q '^local ' || fail "this machine has the address $NODE_IP: a cluster of its own?"
! ip -4 route get "$SVC_IP" | grep -q '^local ' || fail "this machine has the address $SVC_IP: a cluster of its own?"

rm -rf "$VAR" "$RUN"
mkdir -p "$VAR" "$RUN" "$LOG" "$ETC"
"$HERE/pki.sh"
say certificates

kubeconfig() { # NAME
  cat > "$ETC/$1.kubeconfig" << K
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://$SVC_IP:443", certificate-authority: $PKI/ca.crt}}]
users: [{name: u, user: {client-certificate: $PKI/$1.crt, client-key: $PKI/$1.key}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
K
}
for u in admin controller-manager scheduler kubelet; do kubeconfig "$u"; done

# In sessions of their own, so that a ^C in the terminal is for down.sh to answer; 9 is test.sh's lock.
launch() { # NAME COMMAND...
  setsid "${@:2}" > "$LOG/$1.log" 2>&1 < /dev/null 9>&- &
  echo $! > "$RUN/$1.pid"
}
wait_for() { # NAME COMMAND...: also an idle machine takes seconds, a busy one a minute
  local i
  for ((i = 0; i < 600; i++)); do
    if "${@:2}" > /dev/null 2>&1; then
      say "$1"
      return
    fi
    sleep 0.3
  done
  echo "up.sh: no $1 in 3 minutes or more; the ends of the logs:" >&2
  tail -n 8 "$LOG"/*.log >&2
  exit 1
}

# The kubelet sets these for the whole machine; down.sh puts back what they were.
for f in vm/overcommit_memory kernel/panic kernel/panic_on_oops; do echo "$f $(cat /proc/sys/$f)"; done > "$RUN/sysctl.saved"

# One bridge is the pods' network. It also carries the address of the service "kubernetes", so that pods reach the API server
# without kube-proxy and iptables. Nothing is forwarded or translated: pods reach this machine, and nothing beyond it.
ip link add "$BRIDGE" type bridge
ip addr add "$NODE_IP/24" dev "$BRIDGE"
ip addr add "$SVC_IP/32" dev "$BRIDGE"
ip link set "$BRIDGE" up

launch etcd etcd --name e --data-dir "$VAR/etcd" \
  --listen-client-urls "http://127.0.0.1:$ETCD_PORT" --advertise-client-urls "http://127.0.0.1:$ETCD_PORT" \
  --listen-peer-urls "http://127.0.0.1:$((ETCD_PORT + 1))" --initial-advertise-peer-urls "http://127.0.0.1:$((ETCD_PORT + 1))" \
  --initial-cluster "e=http://127.0.0.1:$((ETCD_PORT + 1))"
launch apiserver kube-apiserver --etcd-servers="http://127.0.0.1:$ETCD_PORT" \
  --bind-address="$SVC_IP" --advertise-address="$NODE_IP" --secure-port=443 --endpoint-reconciler-type=none \
  --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/ca.crt" \
  --authorization-mode=Node,RBAC --kubelet-preferred-address-types=InternalIP --kubelet-certificate-authority="$PKI/ca.crt" \
  --kubelet-client-certificate="$PKI/apiserver-kubelet.crt" --kubelet-client-key="$PKI/apiserver-kubelet.key" \
  --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$PKI/sa.pub" \
  --service-account-signing-key-file="$PKI/sa.key" --service-cluster-ip-range=10.96.0.0/24 \
  --allow-privileged=true --cert-dir="$VAR/apiserver" # privileged pods are allowed here, so that only Pod Security refuses them
wait_for "API server ready" kubectl get --raw /readyz

authn() { printf -- '--%s=%s\n' kubeconfig "$1" authentication-kubeconfig "$1" authorization-kubeconfig "$1"; }
mapfile -t args < <(authn "$ETC/controller-manager.kubeconfig")
launch controller-manager kube-controller-manager "${args[@]}" --bind-address=127.0.0.1 --secure-port=10257 --leader-elect=false \
  --use-service-account-credentials=true --service-account-private-key-file="$PKI/sa.key" --root-ca-file="$PKI/ca.crt" \
  --kube-api-qps=500 --kube-api-burst=1000 --cert-dir="$VAR/controller-manager" # or service accounts take 4 s more to appear
mapfile -t args < <(authn "$ETC/scheduler.kubeconfig")
launch scheduler kube-scheduler "${args[@]}" --bind-address=127.0.0.1 --secure-port=10259 --leader-elect=false --cert-dir="$VAR/scheduler"
launch node "$HERE/node.sh"
wait_for "containerd ready" containerd_ctl version
for t in "$IMAGES"/*.tar; do
  containerd_ctl images import "$t" >> "$LOG/images.log" 2>&1 || {
    tail -n 3 "$LOG/images.log" >&2
    exit 1
  }
done
say "images imported"
wait_for "node registered" kubectl get node "$NODE"
wait_for "node ready" kubectl wait --for=condition=Ready "node/$NODE" --timeout=60s
