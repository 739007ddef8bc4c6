#!/bin/bash
# Builds gofumpt, staticcheck and govulncheck at the versions of test/tools/go.mod, and prints the directory they are in.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${KILN_TEST_CACHE:-$PWD/.work}
dir=$cache/bin/tools-$(cat test/tools/go.mod test/tools/go.sum | sha256sum | cut -c1-12)-$(go env GOVERSION)
if [ ! -e "$dir/done" ]; then
  mkdir -p "$dir"
  (cd test/tools && CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -trimpath -ldflags '-s -w' -o "$dir/" tool) >&2
  touch "$dir/done"
fi
echo "$dir"
