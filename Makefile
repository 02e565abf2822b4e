# `make run` starts a server for trying out, `make test` runs everything that CI runs but the lints.
# Everything installs what it needs, is quiet about what is there already, and needs no terminal.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
CARGO_DENY_VERSION := 0.20.2
CARGO_DEB_VERSION := 3.8.0
CLIENTS := tests/clients
BROWSER := tests/browser
API := tests/api
# The tests that leave the number of workers open: all but those in which processes die.
ANY_WORKERS = $(filter-out %/cluster.test.js %/faults.test.js,$(wildcard $(CLIENTS)/*.test.js))
PEER := benches/chat
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
# What is installed in a folder stays until its lock file says something else.
define npm-ci
stamp=$(1)/node_modules/.installed
if ! cmp -s $(1)/package-lock.json "$$stamp"; then
	(cd $(1) && npm ci --no-audit --no-fund --loglevel=error </dev/null)
	cp $(1)/package-lock.json "$$stamp"
fi
endef
# Where `make install` puts things; DESTDIR goes before all of it.
PREFIX := /usr/local
BIN := $(TARGET_DIR)/release/banter
# The Python environment of `make test-api`.
SCHEMATHESIS := $(TARGET_DIR)/schemathesis
# Root needs no sudo; without a terminal sudo must not ask.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)

.PHONY: help run build install deb test test-unit test-clients test-api test-redis test-systemd test-browser test-compose nix-check bench fmt lint advisories install-node install-test-deps install-browser-deps install-bench-deps

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

run: ## Build and run a server on port 8000 (make run ARGS="--port 9000 --workers 2")
	@exec $(CARGO) run --release --locked -- serve $(ARGS)

build: ## Build the binary that the client tests run
	@$(CARGO) build --locked

test: test-unit test-clients test-api test-redis test-systemd test-browser ## Run all tests

test-unit: install-redis-server ## Run the tests of the crate
	@log=$$(mktemp)
	trap 'rm -f "$$log"' EXIT
	$(CARGO) test --locked 2>&1 | tee "$$log"
	passed=$$(awk '/^test result:/ { sum += $$4 } END { print sum + 0 }' "$$log")
	echo "crate: $$passed tests passed"
	[ "$$passed" -gt 0 ] || { echo "make test-unit: no test ran" >&2; exit 1; }

test-clients: install-test-deps build ## Run real Socket.IO clients of four major versions against the binary
	@export BANTER_BIN="$${BANTER_BIN:-$(abspath $(TARGET_DIR))/debug/banter}"
	node $(CLIENTS)/run.js $(FILES)

test-api: install-test-deps install-schemathesis build ## Hold REST's answers against docs/openapi.json, with requests that schemathesis makes up
	@export BANTER_BIN="$${BANTER_BIN:-$(abspath $(TARGET_DIR))/debug/banter}" SCHEMATHESIS="$(abspath $(SCHEMATHESIS))/bin/schemathesis"
	node $(CLIENTS)/run.js $(wildcard $(API)/*.test.js)

test-redis: install-test-deps build ## Run them with Redis as the store, which misbehaves; on one, two and four workers
	@export BANTER_BIN="$${BANTER_BIN:-$(abspath $(TARGET_DIR))/debug/banter}" BANTER_TEST_STORE=redis
	BANTER_TEST_WORKERS=2 node $(CLIENTS)/run.js $(FILES)
	[ -z "$(FILES)" ] || exit 0
	# Beside each other: for the most part they wait.
	log=$$(mktemp) four= failed=
	trap 'kill $$four 2>/dev/null || true; rm -f "$$log"' EXIT
	BANTER_TEST_WORKERS=4 node $(CLIENTS)/run.js $(ANY_WORKERS) >"$$log" 2>&1 & four=$$!
	BANTER_TEST_WORKERS=1 node $(CLIENTS)/run.js $(ANY_WORKERS) || failed=1
	wait $$four || failed=1
	echo "on four workers:"
	cat "$$log"
	[ -z "$$failed" ]

test-systemd: install-test-deps install-systemd-container install-cargo-deb install-python build ## Run the units under a real systemd, on machines of their own (root)
	@export BANTER_BIN="$${BANTER_BIN:-$(abspath $(TARGET_DIR))/debug/banter}"
	# cargo, which makes the package, finds its toolchain by HOME.
	$(SUDO) env "PATH=$$PATH" "HOME=$$HOME" BANTER_BIN="$$BANTER_BIN" node tests/systemd/run.js $(FILES)

test-browser: install-test-deps install-browser-deps build ## Use the chat page in a real browser; pictures of it are left in target/browser
	@export BANTER_BIN="$${BANTER_BIN:-$(abspath $(TARGET_DIR))/debug/banter}"
	node $(CLIENTS)/run.js $(or $(FILES),$(wildcard $(BROWSER)/*.test.js))

nix-check: install-nix ## Check what there is for Nix; NIXPKGS_LIB=/path/of/a/nixpkgs evaluates it too
	@command -v python3 >/dev/null || $(MAKE) install-python
	NIXPKGS_LIB="$(NIXPKGS_LIB)" python3 -B tests/nix/check.py

test-compose: install-test-deps ## Run docker-compose.yml (needs a Docker engine; not part of `test`)
	@docker version >/dev/null || { echo "make test-compose: needs a Docker engine, and Compose; on Debian: apt-get install docker.io docker-compose" >&2; exit 1; }
	node --test --test-reporter=spec tests/compose/compose.test.js

install-node: ## Install Node.js where it is missing
	@if ! { command -v node && command -v npm; } >/dev/null; then
		$(MAKE) apt-install PACKAGES="nodejs npm"
	fi
	node -e 'const [a, b] = process.versions.node.split("."); if (a < 18 || (a == 18 && b < 19)) { console.error("Node.js 18.19 or newer is needed, this is " + process.version); process.exit(1); }'

install-test-deps: install-node install-redis-server install-proxies ## Install what the tests need, where it is missing
	@$(call npm-ci,$(CLIENTS))

# Without a font for emoji the pictures show boxes.
install-browser-deps: install-node ## Install a browser, and what drives it, where they are missing
	@missing=
	[ -x "$${CHROMIUM:-/usr/bin/chromium}" ] || missing="chromium"
	[ -e /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ] || missing="$$missing fonts-noto-color-emoji"
	[ -z "$$missing" ] || $(MAKE) apt-install PACKAGES="$$missing"
	$(call npm-ci,$(BROWSER))

install-bench-deps: install-node ## Install the benchmark's peer
	@$(call npm-ci,$(PEER))

bench: install-bench-deps install-redis-server ## Measure the store, and the server beside a peer (four minutes, after the build)
	@$(CARGO) build --release --locked
	$(CARGO) bench --locked --bench store
	BANTER_BIN="$(abspath $(TARGET_DIR))/release/banter" node $(PEER)/run.js

install: $(BIN) ## Install binary and units (PREFIX=/usr/local, DESTDIR=); README says what to do then
	@lib="$(DESTDIR)$(PREFIX)/lib" etc="$(DESTDIR)/etc/banter"
	install -Dm 755 -s "$(BIN)" "$(DESTDIR)$(PREFIX)/bin/banter"
	for unit in systemd/*.service systemd/*.socket systemd/*.target; do
		install -Dm 644 "$$unit" -t "$$lib/systemd/system"
		sed -i 's#/usr/bin/banter#$(PREFIX)/bin/banter#' "$$lib/systemd/system/$${unit##*/}"
	done
	install -Dm 644 systemd/sysusers.conf "$$lib/sysusers.d/banter.conf"
	install -Dm 644 systemd/tmpfiles.conf "$$lib/tmpfiles.d/banter.conf"
	install -Dm 644 systemd/redis-tcp.conf -t "$(DESTDIR)$(PREFIX)/share/doc/banter/examples"
	install -Dm 644 README.md CHANGELOG.md LICENSE -t "$(DESTDIR)$(PREFIX)/share/doc/banter"
	# An operator's settings stay.
	[ -e "$$etc/banter.conf" ] || install -Dm 640 systemd/banter.conf "$$etc/banter.conf"

deb: install-cargo-deb ## Build a Debian package, in target/debian
	@$(CARGO) deb --locked

$(TARGET_DIR)/release/banter:
	@$(CARGO) build --release --locked

.PHONY: install-redis-server install-systemd-container install-cargo-deb install-python install-schemathesis install-nix install-proxies apt-install
# Unoptimised, and without what is not needed, it builds in half a minute; the work is xz's and strip's.
install-cargo-deb:
	@command -v dpkg-shlibdeps >/dev/null || $(MAKE) apt-install PACKAGES=dpkg-dev
	if [ "$$($(CARGO) deb --version 2>/dev/null)" != "cargo-deb $(CARGO_DEB_VERSION)" ]; then
		echo "installing cargo-deb $(CARGO_DEB_VERSION)"
		$(CARGO) install --locked --quiet --debug --no-default-features cargo-deb --version $(CARGO_DEB_VERSION) --config profile.dev.debug=0
	fi

install-systemd-container:
	@command -v systemd-nspawn >/dev/null || $(MAKE) apt-install PACKAGES=systemd-container

# The machines of the tests have only the system's own.
install-python:
	@PATH=/usr/local/bin:/usr/bin:/bin command -v python3 >/dev/null || $(MAKE) apt-install PACKAGES=python3

install-schemathesis:
	@stamp=$(SCHEMATHESIS)/.installed
	if ! cmp -s $(API)/requirements.txt "$$stamp"; then
		echo "installing schemathesis in $(SCHEMATHESIS)"
		python3 -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) apt-install PACKAGES=python3-venv
		rm -rf $(SCHEMATHESIS)
		python3 -m venv $(SCHEMATHESIS)
		$(SCHEMATHESIS)/bin/pip install --quiet --disable-pip-version-check --no-input -r $(API)/requirements.txt
		cp $(API)/requirements.txt "$$stamp"
	fi

install-nix:
	@command -v nix-instantiate >/dev/null || $(MAKE) apt-install PACKAGES=nix-bin

install-redis-server:
	@command -v redis-server >/dev/null || $(MAKE) apt-install PACKAGES=redis-server

install-proxies:
	@PATH="$$PATH:/usr/sbin"
	missing=
	for program in nginx haproxy caddy; do
		command -v "$$program" >/dev/null || missing="$$missing $${program/#nginx/nginx-light}"
	done
	[ -z "$$missing" ] || $(MAKE) apt-install PACKAGES="$${missing# }"

apt-install:
	@command -v apt-get >/dev/null || { echo "these are missing, and there is no apt-get to install them with: $(PACKAGES)" >&2; exit 1; }
	echo "installing $(PACKAGES)"
	export DEBIAN_FRONTEND=noninteractive
	# Debian starts a service as soon as it is installed; the tests start their own.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e "$$policy" ]; then
		trap '$(SUDO) rm -f "$$policy"' EXIT
		printf '#!/bin/sh\nexit 101\n' | $(SUDO) tee "$$policy" >/dev/null
		$(SUDO) chmod 755 "$$policy"
	fi
	$(SUDO) apt-get update -qq </dev/null >/dev/null
	$(SUDO) apt-get install -y -qq --no-install-recommends $(PACKAGES) </dev/null >/dev/null


fmt: ## Format the code
	@$(CARGO) fmt

lint: ## Check formatting, lints, licences and sources of dependencies
	@$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(MAKE) deny CHECKS="bans licenses sources"

advisories: ## Check dependencies for known vulnerabilities (needs the advisory database)
	@$(MAKE) deny CHECKS=advisories

.PHONY: deny
deny:
	@if ! $(CARGO) deny --version >/dev/null 2>&1; then
		echo "installing cargo-deny $(CARGO_DENY_VERSION)"
		$(CARGO) install --locked --quiet cargo-deny --version $(CARGO_DENY_VERSION)
	fi
	$(CARGO) deny --log-level error check --hide-inclusion-graph $(CHECKS)
