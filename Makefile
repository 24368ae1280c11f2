# SPDX-License-Identifier: Apache-2.0
#
# Only what needs root runs as root: under sudo, everything that compiles or
# fetches modules runs as the user who called sudo (internal/build/env.sh).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build
.NOTPARALLEL:

# All of these may be given on the command line: make test WEIR_REQUIRE=netns
export WEIR_GO WEIR_REQUIRE WEIR_SEED WEIR_SOAK WEIR_FRESH

GO := internal/build/go.sh
AS_BUILDER := $(GO) --as-builder
LDFLAGS ?= -s -w

# Arguments for the test runner, such as: make test TEST='-only module/packet -v'
TEST ?=

.PHONY: build demo test soak bench fuzz lint deps generate packages clean help dirs runtests

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

# What an earlier run of root's left behind must not stop the builder.
dirs:
	@builder=$$($(GO) --builder); \
	for d in bin build; do \
	  if [ -L $$d ]; then echo "make: $$d is a symbolic link; remove it" >&2; exit 1; fi; \
	  if [ "$$(id -u)" = 0 ] && [ -d $$d ]; then chown -hR "$$builder" $$d; fi; \
	done
	@$(AS_BUILDER) mkdir -p bin/plugins build

build: dirs ## bin/weir and bin/plugins/*
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/weir ./cmd/weir
	@plugins=$$($(GO) list -f '{{if eq .Name "main"}}{{.ImportPath}}{{end}}' ./plugins/...); \
	if [ -n "$$plugins" ]; then \
	  echo $(GO) build -o bin/plugins/ $$plugins; \
	  $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/plugins/ $$plugins; \
	fi

demo: build ## the live demonstration; needs root
	@if [ "$$(id -u)" != 0 ]; then echo "make: the demo makes network namespaces: sudo make demo" >&2; exit 1; fi
	bin/weir demo $(SCENE)

runtests: dirs
	@$(GO) build -o build/runtests ./internal/cmd/runtests

test: build runtests ## all tests; without root, those that need none
	@internal/build/deps.sh --soft
	$(GO) vet ./...
	@WEIR_BIN=$(CURDIR)/bin build/runtests -go $(GO) $(TEST)

soak: build runtests ## the tests in their full sizes
	@internal/build/deps.sh --soft
	@WEIR_SOAK=1 WEIR_BIN=$(CURDIR)/bin build/runtests -go $(GO) -timeout 3h -total 12h $(TEST)

bench: build ## the comparisons
	$(GO) build -trimpath -o build/bench ./integration/bench
	build/bench $(BENCH)
	$(GO) build -C integration/bench/scanners -trimpath -o $(CURDIR)/build/scanners .
	build/scanners $(SCANNERS)
	$(GO) test -run '^$$' -bench Choose -benchtime 200ms ./policies/snapshot

# Times that each micro-benchmark is measured, and figures to compare with.
COUNT ?= 6
OLD ?=

.PHONY: micro
micro: dirs ## micro-benchmarks to build/micro.txt; OLD=FILE compares
	$(GO) test -run '^$$' -bench 'Parse|Rewrite|Hash|Lookup|Translate|Exchange|Choose|Request|Response' -benchtime 100ms -cpu 1 -count $(COUNT) \
	  ./module/packet ./module/flowstore ./module/engine ./module/http1 ./policies/snapshot | tee build/micro.txt
	$(GO) run golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da $(OLD) build/micro.txt

# Seconds that all fuzz targets share.
FUZZ ?= 60

fuzz: dirs ## every fuzz target, FUZZ=60 seconds in all
	internal/build/fuzz.sh $(FUZZ)

lint: dirs ## formatting, vet, staticcheck, house rules, generated code
	@internal/build/lint.sh

deps: ## install the Debian packages that the tests use
	@internal/build/deps.sh

generate: dirs ## generated code anew
	$(GO) generate ./...

packages: dirs ## .deb and .rpm for amd64 and arm64 in build/packages
	@$(AS_BUILDER) internal/build/packages.sh build/packages

clean: ## remove bin and build
	rm -rf bin build

.PHONY: test-vm
# The kernel of Debian in QEMU, without KVM; needs root only to install QEMU.
test-vm: build ## end-to-end tests on a stock kernel in a virtual machine
	@internal/build/deps.sh qemu-system-x86 cpio
	integration/vm/kernel.sh build/vm
	WEIR_VM=$(CURDIR)/build/vm WEIR_REQUIRE=vm,qemu-system-x86_64,cpio $(GO) test -count=1 -timeout 12m -v ./integration/vm
