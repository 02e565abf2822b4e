# Banter in a container: `banter serve`, the master and its workers. Builds with BuildKit and without.
# docker-compose.yml runs it beside a Redis; README.md says how.

FROM rust:1-bookworm AS build
WORKDIR /banter
# The dependencies, in a layer that stays while only Banter's own sources change. Cargo wants to see
# every target that Cargo.toml names.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src benches \
 && touch src/lib.rs \
 && echo 'fn main() {}' | tee src/main.rs benches/store.rs >/dev/null \
 && cargo build --release --locked --bin banter
COPY src src
# Sources keep the dates of the checkout, which may be older than what was built of the stand-ins.
RUN touch src/lib.rs src/main.rs \
 && cargo build --release --locked --bin banter \
 && install -s target/release/banter /usr/local/bin/banter

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="Banter" \
      org.opencontainers.image.description="A self-hosted chat server: REST and Socket.IO, one master and its worker processes" \
      org.opencontainers.image.licenses="MIT"
# tini, because process 1 must take in orphans, which Banter does not. Certificates for rediss://.
RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends ca-certificates tini \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/debconf/*-old
# Where the embedded store is, if no REDIS_URL is given: mount a volume there to keep it.
RUN install -d -m 700 -o 10001 -g 10001 /var/lib/banter
ENV BANTER_STATE_DIR=/var/lib/banter
COPY LICENSE /usr/share/doc/banter/copyright
COPY --from=build /usr/local/bin/banter /usr/local/bin/banter
# A number, so that Kubernetes and others can see that it is not root.
USER 10001:10001
EXPOSE 8000
# Longer than the 5 s that `banter health` itself waits.
HEALTHCHECK --interval=5s --timeout=8s --start-period=30s --retries=3 CMD ["banter", "health"]
ENTRYPOINT ["tini", "--", "banter"]
CMD ["serve"]
