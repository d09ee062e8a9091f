# Everything that a developer runs. The lab's own targets need root, because
# they make network namespaces; each says so.

CARGO ?= cargo
BIN = target/debug
RELEASE = target/release
# Builds for tests have fault points, at which agents fail; releases have none.
FAULTS = --features limosa-agent/faults

# In the order that is written; cargo uses all processors by itself.
.NOTPARALLEL:

.PHONY: build release install workload demo test unit lint audit bench chaos soak clean root

build:
	$(CARGO) build --workspace $(FAULTS)

release:
	$(CARGO) build --workspace --release

# What `make release` built, with man pages, completions, the unit and, unless
# there is one, the sample configuration. Under DESTDIR it makes a package.
PREFIX ?= /usr/local
DEST = $(DESTDIR)$(PREFIX)
BASH_COMPLETIONS = $(DEST)/share/bash-completion/completions
ZSH_COMPLETIONS = $(DEST)/share/zsh/site-functions
FISH_COMPLETIONS = $(DEST)/share/fish/vendor_completions.d

install:
	install -D -m 755 -t $(DEST)/bin $(RELEASE)/limosad $(RELEASE)/limosa
	install -d $(DEST)/share/man/man1 $(BASH_COMPLETIONS) $(ZSH_COMPLETIONS) $(FISH_COMPLETIONS)
	for program in limosa limosad; do \
		$(RELEASE)/$$program man $(DEST)/share/man/man1 && \
		$(RELEASE)/$$program completions bash > $(BASH_COMPLETIONS)/$$program && \
		$(RELEASE)/$$program completions zsh > $(ZSH_COMPLETIONS)/_$$program && \
		$(RELEASE)/$$program completions fish > $(FISH_COMPLETIONS)/$$program.fish || exit 1; \
	done
	install -d $(DEST)/lib/systemd/system
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' packaging/systemd/limosad.service \
		> $(DEST)/lib/systemd/system/limosad.service
	chmod 644 $(DEST)/lib/systemd/system/limosad.service
	test -e $(DESTDIR)/etc/limosa/limosad.toml || \
		install -D -m 644 packaging/limosad.toml $(DESTDIR)/etc/limosa/limosad.toml

# The program inside the tiny guest: static, for it is alone there. In a target
# folder of its own, so that its flags disturb no other build.
workload:
	RUSTFLAGS="-C target-feature=+crt-static" CARGO_PROFILE_RELEASE_STRIP=symbols \
		$(CARGO) build -p limosa-workload --release --target-dir target/guest

# Two hosts, one VM with a disk and a client; there and back again.
demo:
	scripts/install-packages demo
	$(MAKE) root release workload
	$(RELEASE)/limosa-lab demo

test: root unit workload build
	$(BIN)/limosa-lab scenarios

# Said before anything is built.
root:
	@test "$$(id -u)" = 0 || \
		{ echo "the lab makes network namespaces: run make as root (sudo make ...)" >&2; exit 1; }

unit:
	scripts/install-packages test
	$(CARGO) test --workspace $(FAULTS)

# The fuzz targets are only checked: to link them, libFuzzer and a nightly compiler
# are needed, and any file serves for a library that nobody links.
lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets $(FAULTS) -- -D warnings
	$(CARGO) clippy --workspace -- -D warnings
	CUSTOM_LIBFUZZER_PATH=$(CURDIR)/fuzz/Cargo.toml $(CARGO) clippy --manifest-path fuzz/Cargo.toml \
		--target-dir target -- -D warnings
	TIDY_STRICT=1 $(CARGO) test -q -p limosa-tidy

# Licences, sources and bans of dependencies (deny.toml), and dependencies that nothing
# uses. Not part of lint: the first run builds both tools, which takes minutes.
audit:
	command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	command -v cargo-machete >/dev/null || $(CARGO) install --locked cargo-machete
	$(CARGO) deny --all-features check bans licenses sources
	$(CARGO) machete

# Against stock QEMU on the same link; figures, not assertions.
bench: root release workload
	scripts/install-packages test
	$(RELEASE)/limosa-lab bench

# Moves with faults that are drawn; prints the seed of one that fails.
chaos: root build workload
	scripts/install-packages test
	$(BIN)/limosa-lab chaos --seed 1 --runs 300

# Hours of moves and faults.
soak: root workload
	scripts/install-packages test
	$(CARGO) build --workspace --release $(FAULTS)
	$(RELEASE)/limosa-lab soak

clean:
	-test ! -x $(BIN)/limosa-lab || $(BIN)/limosa-lab down
	$(CARGO) clean
	rm -rf .lab
