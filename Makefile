# Every target is a script or one go command; nothing here is needed to build Kiln: CGO_ENABLED=0 go build ./cmd/kiln
export CGO_ENABLED ?= 0

.PHONY: all build test unit race e2e conformance frontend buildkit lint fuzz bench base-images demo docs test-k8s ci clean

all: build

build:            ## the builder, static and stripped, as bin/kiln (without cgo, with which the sandbox cannot run)
	go build -trimpath -ldflags '-s -w' -o bin/kiln ./cmd/kiln

test:             ## everything but lint; installs what it needs
	scripts/test

unit race e2e conformance frontend buildkit: ## one phase of it
	scripts/test $@

lint:             ## gofumpt, go vet, staticcheck, layering
	scripts/lint

fuzz:             ## every fuzz target for FUZZTIME (5s)
	scripts/fuzz $(or $(FUZZTIME),5s)

bench:            ## W1 to W7 with Kiln and BuildKit side by side; as root. BENCH='-n 3 W1 W2' for its arguments
	go run ./bench $(or $(BENCH),-oracle)

base-images:      ## the images that tests start from
	scripts/base-images.sh

demo:             ## the README's first command
	scripts/demo

docs:             ## the command reference, from the commands themselves
	go run ./docs/gen

test-k8s:         ## W1 and W2 in a pod of a real Kubernetes that enforces restricted; 10 minutes and 5 GB when cold
	test/k8s/test.sh

ci:               ## what CI runs
	.ci/run

clean:            ## what the tests keep
	rm -rf .work bin
