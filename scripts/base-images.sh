#!/bin/bash
# Makes the base images of tests, examples and benchmarks from Debian's packages and this machine's Go and Node,
# into $KILN_TEST_CACHE (default .work in the repository); a second run takes no time.
#   base-images.sh [-partial] [-push HOST:PORT]
# debian, golang and node take root once (mmdebstrap); an ordinary user can then use them from the cache.
# -partial: succeed with what can be made here (without root: busybox and golang:1.26-busybox).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" = 0 ]; then scripts/deps.sh base >&2; fi
CGO_ENABLED=0 exec go run ./test/cmd/base-images "$@"
