# shellcheck shell=bash
# Sourced by the scripts here: where everything is, all of it below the test cache.
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export REPO HERE=$REPO/test/k8s
KILN_TEST_CACHE=$(realpath -m "${KILN_TEST_CACHE:-$REPO/.work}")
export KILN_TEST_CACHE
export ROOT=$KILN_TEST_CACHE/k8s

# What build.sh made, and stays.
export DEB=$ROOT/deb                  # Debian's packages, unpacked and not installed
export KUBE=$ROOT/bin                 # kube-apiserver, kubelet, kubectl, ...: links to one program
export IMAGES=$ROOT/images            # archives that up.sh imports
# What one run leaves: down.sh removes $RUN and $VAR, the logs stay.
export ETC=$ROOT/etc VAR=$ROOT/var RUN=$ROOT/run LOG=$ROOT/log
export PKI=$ETC/pki KUBECONFIG=$ETC/admin.kubeconfig
export CONTAINERD_SOCKET=$RUN/containerd.sock

export NODE=node1 BRIDGE=kiln-k8s0
export NODE_IP=10.244.0.1             # of the bridge: the node's address, and the pods' gateway
export SVC_IP=10.96.0.1               # of the service "kubernetes": the API server listens on it
export ETCD_PORT=12379
export CGROUP=kiln-test-k8s           # all pods' cgroups are below this one
export PATH=$KUBE:$DEB/usr/bin:$DEB/usr/sbin:$PATH

containerd_ctl() { ctr -a "$CONTAINERD_SOCKET" -n k8s.io "$@"; }
