# Everything that a developer runs. The lab's own targets need root, because
# they make network namespaces; each says so.

CARGO ?= cargo
BIN = target/debug
RELEASE = target/release

.PHONY: build release install workload demo test unit lint bench chaos soak clean

build:
	$(CARGO) build --workspace

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
	$(MAKE) release workload
	$(RELEASE)/limosa-lab demo

test: unit workload build
	$(BIN)/limosa-lab stories

unit:
	scripts/install-packages test
	$(CARGO) test --workspace

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny --all-features check; \
	else echo "cargo-deny is not installed: deny.toml was not checked"; fi

# Against stock QEMU on the same link; figures, not assertions.
bench: release workload
	scripts/install-packages test
	$(RELEASE)/limosa-lab bench

# Moves with faults that are drawn; prints the seed of one that fails.
chaos: build workload
	scripts/install-packages test
	$(BIN)/limosa-lab chaos --seed 1 --runs 300

# Hours of moves and faults.
soak: release workload
	scripts/install-packages test
	$(RELEASE)/limosa-lab soak

clean:
	-test ! -x $(BIN)/limosa-lab || $(BIN)/limosa-lab down
	$(CARGO) clean
	rm -rf .lab
