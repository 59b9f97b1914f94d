# SPDX-License-Identifier: Apache-2.0
#
# 'make demo' and 'make test' set up what they need by themselves. Variables, given as in
# 'make unit PKG=./pkg/uffd/...':
#
#   COMPARE=1   demo: also run QEMU's own post-copy and compare; chaos: nothing but that
#   ARGS=...    demo, bench, memorybench, monitoringcost, figure, downtime, soak, chaos, microbench: further arguments
#   BENCH=...   bench: look, one round of one case; full, all, 150 minutes at most instead of 25; or devices, VMs with many
#   CASE=...    bench, downtime: only cases whose NETWORK/GUEST matches; bench also has microbench and balloon
#   QEMU=...    bench, memorybench, downtime, soak: which version of QEMU, of those that lab.QEMUVersions names; bench: A,B
#   PKG=...     unit, e2e, kernel: which packages
#   RUN=...     unit, e2e, kernel: only tests whose name matches
#   KERNEL=...  kernel: only this version of Linux, 6.12 or 7.3
#   N=500       chaos: how many cases (100); soak: how many moves (200); bench, downtime, figure, monitoringcost: of each
#   DEVICES=... soak: how many disks and network cards, each (8)
#   SEED=...    chaos: which sequence of cases (1); its cases are always the same
#   FUZZTIME=   fuzz: how long each target (1m)
#   ONLY=...    chaos: only the case with this index
#   LIBVIRT=1   demo, chaos: of VMs that are domains of libvirt's; downtime: of one, beside virsh migrate --postcopy
#   VERSION=... build, packages: what the program and the packages say they are (packages: scripts/version)
#   E2E_RACE=0  e2e: run the daemon without the race detector
#   CI=true     test: go on after what has failed; a test that cannot run fails instead of being skipped

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# The steps share two files, the build cache and the machine; the output is to be read from top to bottom.
.NOTPARALLEL:

E2E_RACE ?= 1
# What demo, downtime and chaos do with LIBVIRT=1, and what they need.
BY_LIBVIRT = $(filter-out 0,$(LIBVIRT))
SETUP = scripts/setup $(if $(BY_LIBVIRT),libvirt,demo)
RUN_BENCH = MIGRATED_BINARY='$(CURDIR)/build/migrated' go run ./e2e/bench $(if $(QEMU),--qemu '$(QEMU)')
TEST_FLAGS = -count=1 -shuffle=on $(if $(RUN),-run '$(RUN)')

### First use

.PHONY: help
help: ## list the targets
	@sed -nE -e 's/^### (.*)/\n\1:/p' -e 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | \
	  expand -t 20

.PHONY: demo
demo: ## move a running virtual machine between two daemons on this machine, and show it
	@$(SETUP)
	@$(MAKE) build
	@MIGRATED_BINARY='$(CURDIR)/build/migrated' go run ./e2e/demo $(if $(BY_LIBVIRT),--libvirt) $(if $(filter-out 0,$(COMPARE)),--compare) $(ARGS)

.PHONY: build
build: ## build build/migrated, a static binary
	@CGO_ENABLED=0 go build -trimpath $(if $(VERSION),-ldflags '-X main.version=$(VERSION)') -o build/migrated ./cmd/migrated

### Inner loop

# The inner loop. Without -count, so that Go tests again only what a change can have broken.
.PHONY: quick
quick: fmt-check ## format, go vet, and the tests that take seconds and need no VM
	@go vet ./...
	@go test $$(scripts/test-packages quick)

# One package at a time: several reserve huge pages and give them back, which is a setting of the machine.
.PHONY: unit
unit: ## run the tests of all packages but e2e, with the race detector, and without where it would disturb them
	@echo '== unit tests'
	@packages=$(or $(if $(PKG),'$(PKG)'),$$(scripts/test-packages unit)); \
	  go test -race -p 1 -timeout 15m $(TEST_FLAGS) $$packages
	@packages=$(or $(if $(PKG),'$(PKG)'),$$(scripts/test-packages norace)); \
	  go test -p 1 -timeout 15m $(TEST_FLAGS) $$packages

.PHONY: e2e
e2e: build $(if $(filter-out 0,$(E2E_RACE)),build-race) ## run the end-to-end tests: real QEMU, real networks
	@echo '== end-to-end tests'
	@packages=$(or $(if $(PKG),'$(PKG)'),$$(scripts/test-packages e2e)); \
	  MIGRATED_BINARY='$(CURDIR)/build/$(if $(filter-out 0,$(E2E_RACE)),race/)migrated' \
	  go test -p 1 -timeout 70m $(TEST_FLAGS) $$packages

.PHONY: kernel
kernel: ## build the kernels of kernel/ and run the tests in them; kernel/Makefile has more
	@echo '== kernel'
	@$(MAKE) -C kernel test

# What is left of 'make -C kernel test' once the kernels are there: their build would take longer than a
# test may.
.PHONY: kernel-tests
kernel-tests:
	@packages=$(or $(if $(PKG),'$(PKG)'),$$(scripts/test-packages kernel)); \
	  go test -p 1 -timeout 60m $(TEST_FLAGS) $$packages

.PHONY: fmt
fmt: ## format the Go code
	@gofmt -w .

.PHONY: lint
lint: ## go vet, golangci-lint, staticcheck, shellcheck
	@echo '== lint'
	@go vet ./...
	@scripts/tool golangci-lint run ./...
	@scripts/tool staticcheck ./...
	@shellcheck --external-sources .ci/run scripts/* kernel/build kernel/check kernel/boot kernel/boot-init
	@shellcheck --shell=dash deploy/packages/{preinst,postinst,prerm,postrm}

.PHONY: generate
generate: ## write the generated code anew
	@scripts/generate

### Everything, as in CI

# The kernels, which take long where the cache has none, are built with what the tests leave of the processors; 'kernel'
# waits for that (kernel/build has a lock), and builds what is missing. In CI all runs, whatever has failed.
.PHONY: test
test: ## everything CI runs
	@scripts/setup test
	@mkdir -p build
	@failed=0; $(MAKE) $(if $(CI),--keep-going) fmt-check build lint proto generate-check mod || \
	    { failed=$$?; [[ -n '$(CI)' ]] || exit $$failed; }; \
	  nice -n 19 $(MAKE) -C kernel build >build/kernels.log 2>&1 & trap "kill $$! 2>/dev/null || true" EXIT; \
	  $(MAKE) $(if $(CI),--keep-going) unit e2e kernel || failed=$$?; exit $$failed

.PHONY: fmt-check
fmt-check: ## check format and licence lines
	@echo '== format'
	@unformatted=$$(gofmt -l .); \
	if [[ -n $$unformatted ]]; then printf 'not formatted (make fmt):\n%s\n' "$$unformatted" >&2; exit 1; fi
	@scripts/spdx-check

.PHONY: proto
proto: ## lint proto/, and compare it with the newest release for breaking changes
	@echo '== proto'
	@scripts/tool buf lint
	@scripts/breaking

.PHONY: generate-check
generate-check: ## check that the generated code is up to date
	@echo '== generated code'
	@scripts/generate-check

.PHONY: mod
mod: ## check go.mod, go.sum and the downloaded modules
	@echo '== modules'
	@go mod tidy -diff
	@go mod verify >/dev/null

### Figures

.PHONY: bench
bench: ## compare with QEMU's own post-copy, in turns, and with the targets: build/bench/report.html (docs/benchmarks.md)
	@scripts/setup demo
	@$(MAKE) build
	@$(RUN_BENCH) --size $(or $(BENCH),short) $(if $(CASE),--case '$(CASE)') $(if $(N),--rounds $(N)) $(ARGS)

.PHONY: memorybench
memorybench: ## compare private memory with shared memory, in turns: build/bench/memory.json
	@scripts/setup demo
	@$(MAKE) build
	@$(RUN_BENCH) --memory $(ARGS)

.PHONY: monitoringcost
monitoringcost: ## compare moves that are scraped, or on a page, with moves that nobody watches, in turns: build/bench/monitoring.json
	@scripts/setup demo
	@$(MAKE) build
	@$(RUN_BENCH) --monitoring $(if $(N),--rounds $(N)) $(ARGS)

.PHONY: figure
figure: ## draw the downtime by the number of devices, with each version of QEMU: build/bench/figure.svg (docs/downtime.md)
	@scripts/setup demo
	@$(MAKE) build
	@$(RUN_BENCH) --figure $(if $(N),--rounds $(N)) $(ARGS)

.PHONY: downtime
downtime: ## say where the downtime goes, step by step, for VMs with devices: build/bench/steps.json (docs/downtime.md)
	@$(SETUP)
	@$(MAKE) build
	@$(RUN_BENCH) $(if $(BY_LIBVIRT),--libvirt,--steps) $(if $(CASE),--case '$(CASE)') $(if $(N),--rounds $(N)) $(ARGS)

.PHONY: microbench
microbench: ## measure how far the engine is from what the machine can do (docs/fault-budget.md)
	@scripts/setup test
	@go run ./e2e/floor $(ARGS)

# In a mount namespace of its own; both ways in turns, twice.
.PHONY: hugebench
hugebench: ## measure what huge pages are worth for memory that UFFDIO_COPY filled, and cost (docs/huge-pages.md)
	@scripts/setup test
	@mkdir -p build
	@cc -O2 -Wall -Wextra -Werror -pthread -o build/huge e2e/floor/testdata/huge.c
	@unshare --mount sh -ec 'mount -t tmpfs -o size=1200m tmpfs /mnt; for way in pidfd file pidfd file; do build/huge $$way /mnt/ram; done'

### What may go wrong

.PHONY: soak
soak: ## move a VM with many busy devices there and back N times and count what goes wrong: build/bench/soak.json
	@scripts/setup demo
	@$(MAKE) build
	@$(RUN_BENCH) --soak $(or $(N),200) $(if $(DEVICES),--devices $(DEVICES)) $(ARGS)

.PHONY: chaos
chaos: ## break migrations in every way that is known and look for the VM: build/chaos/report.json (docs/faults.md)
	@$(SETUP)
	@go run ./e2e/chaos $(if $(BY_LIBVIRT),--libvirt) $(if $(N),--n $(N)) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY)) $(if $(filter-out 0,$(COMPARE)),--compare) $(ARGS)

.PHONY: fuzz
fuzz: ## fuzz every decoder for FUZZTIME each, and keep the inputs that reached new code
	@scripts/setup test
	@scripts/fuzz $(or $(FUZZTIME),1m)

### Programs and packages

.PHONY: build-race
build-race: ## build build/race/migrated, with the race detector
	@go build -race -o build/race/migrated ./cmd/migrated

.PHONY: packages
packages: ## build a deb and an rpm: build/packages (deploy/README.md)
	@version=$${VERSION:-$$(scripts/version)}; $(MAKE) build VERSION="$$version"; scripts/packages "$$version"

### Clean

.PHONY: clean
clean: ## remove what was built here (not the caches outside)
	@rm -rf build
