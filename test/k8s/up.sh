#!/bin/bash
# up.sh api   : etcd + kube-apiserver on 127.0.0.1:6443
# up.sh node  : + controller-manager, scheduler, containerd, kubelet: pods really run; API on https://10.96.0.1:443
#               (bridge kbr0 carries the service IP, so pods reach `kubernetes.default` without kube-proxy)
# KUBECONFIG=$ROOT/etc/admin.kubeconfig ; logs in $ROOT/log ; pids in $ROOT/run/*.pid ; stop: down.sh
set -euo pipefail
. "$(dirname "$0")/env.sh"
MODE=${1:-node}; T0=$(date +%s.%N)
say() { printf '%6.2fs %s\n' "$(echo "$(date +%s.%N) - $T0" | bc)" "$*"; }
mkdir -p $VAR $RUN $LOG $ETC; "$(dirname "$0")/pki.sh"; say pki
if [ $MODE = api ]; then HOST=127.0.0.1 PORT=6443; else HOST=$SVC_IP PORT=443; fi
kc() { # name -> kubeconfig
  cat > $ETC/$1.kubeconfig <<K
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://$HOST:$PORT", certificate-authority: $PKI/ca.crt}}]
users: [{name: u, user: {client-certificate: $PKI/$1.crt, client-key: $PKI/$1.key}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
K
}
for u in admin kcm sched kubelet; do kc $u; done
start() { n=$1; shift; setsid "$@" > $LOG/$n.log 2>&1 < /dev/null & echo $! > $RUN/$n.pid; }
wait_for() { local i; for i in $(seq 1 300); do if "${@:2}" >/dev/null 2>&1; then say "$1 ready"; return; fi; sleep 0.1; done; say "$1 NOT ready"; exit 1; }

if [ $MODE != api ]; then
  # the kubelet sets these on the machine; down.sh puts them back
  [ -e $RUN/sysctl.saved ] || for f in vm/overcommit_memory kernel/panic kernel/panic_on_oops; do echo "$f $(cat /proc/sys/$f)"; done > $RUN/sysctl.saved
  ip link show kbr0 >/dev/null 2>&1 || ip link add kbr0 type bridge
  ip addr replace $NODE_IP/24 dev kbr0; ip addr replace $SVC_IP/32 dev kbr0; ip link set kbr0 up
fi
rm -rf $VAR/etcd   # a fresh cluster each time
start etcd $K8S_ETCD --name e --data-dir $VAR/etcd --listen-client-urls http://127.0.0.1:$ETCD_PORT --advertise-client-urls http://127.0.0.1:$ETCD_PORT \
  --listen-peer-urls http://127.0.0.1:$((ETCD_PORT+1)) --initial-advertise-peer-urls http://127.0.0.1:$((ETCD_PORT+1)) --initial-cluster e=http://127.0.0.1:$((ETCD_PORT+1)) ${ETCD_ARGS:-}
A=(); [ $MODE = api ] && A=(--disable-admission-plugins=ServiceAccount)   # no controller-manager makes the default ServiceAccounts
start apiserver $BIN/kube-apiserver --etcd-servers=http://127.0.0.1:$ETCD_PORT --bind-address=$HOST --advertise-address=${NODE_IP} --secure-port=$PORT \
  --endpoint-reconciler-type=${RECONCILER:-none} \
  --tls-cert-file=$PKI/apiserver.crt --tls-private-key-file=$PKI/apiserver.key --client-ca-file=$PKI/ca.crt --authorization-mode=Node,RBAC \
  --kubelet-client-certificate=$PKI/apiserver-kubelet.crt --kubelet-client-key=$PKI/apiserver-kubelet.key --kubelet-certificate-authority=$PKI/ca.crt \
  --kubelet-preferred-address-types=InternalIP \
  --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=$PKI/sa.pub --service-account-signing-key-file=$PKI/sa.key \
  --service-cluster-ip-range=10.96.0.0/24 --allow-privileged=true --cert-dir=$VAR/apiserver ${A[@]+"${A[@]}"} ${APISERVER_ARGS:-}
wait_for apiserver $BIN/kubectl get --raw /readyz
[ $MODE = api ] && exit 0

start kcm $BIN/kube-controller-manager --kubeconfig=$ETC/kcm.kubeconfig --authentication-kubeconfig=$ETC/kcm.kubeconfig --authorization-kubeconfig=$ETC/kcm.kubeconfig \
  --bind-address=127.0.0.1 --secure-port=10257 --leader-elect=false --use-service-account-credentials=true --kube-api-qps=500 --kube-api-burst=1000 --cert-dir=$VAR/kcm \
  --service-account-private-key-file=$PKI/sa.key --root-ca-file=$PKI/ca.crt --cluster-signing-cert-file=$PKI/ca.crt --cluster-signing-key-file=$PKI/ca.key
start sched $BIN/kube-scheduler --kubeconfig=$ETC/sched.kubeconfig --authentication-kubeconfig=$ETC/sched.kubeconfig --authorization-kubeconfig=$ETC/sched.kubeconfig \
  --bind-address=127.0.0.1 --secure-port=10259 --leader-elect=false --cert-dir=$VAR/sched
start node "$(dirname "$0")/node.sh"
wait_for containerd $K8S_CONTAINERD_DIR/ctr -a $RUN/containerd.sock version
for t in $ROOT/images/*.tar; do $K8S_CONTAINERD_DIR/ctr -a $RUN/containerd.sock -n k8s.io images import --snapshotter ${SNAPSHOTTER:-overlayfs} $t >> $LOG/images.log 2>&1 || { tail -3 $LOG/images.log; exit 1; }; done; say images imported
wait_for node-registered $BIN/kubectl get node $NODE
wait_for node $BIN/kubectl wait --for=condition=Ready node/$NODE --timeout=60s
wait_for serviceaccount $BIN/kubectl -n default get sa default
