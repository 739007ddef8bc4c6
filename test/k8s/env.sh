# shellcheck shell=bash
# Sourced by the scripts here: where everything is, below the test cache.
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export REPO ROOT=${KILN_TEST_CACHE:-$REPO/.work}/k8s
export K8S_ETCD=$ROOT/deb/usr/bin/etcd                # Debian's packages, unpacked and not installed
export K8S_CONTAINERD_DIR=$ROOT/deb/usr/bin           # containerd, shim, ctr
export K8S_RUNC=$ROOT/deb/usr/sbin/runc
export K8S_CNI=$ROOT/deb/usr/lib/cni
export NODE=node1 NODE_IP=10.244.0.1 SVC_IP=10.96.0.1 ETCD_PORT=12379
export VAR=$ROOT/var RUN=$ROOT/run LOG=$ROOT/log ETC=$ROOT/etc PKI=$ROOT/etc/pki BIN=$ROOT/bin/multi
export KUBECONFIG=$ETC/admin.kubeconfig
