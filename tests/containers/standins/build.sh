#!/bin/sh
# Images that the tests need and may be unable to pull: Debian as Debian makes it, and PostgreSQL and Prometheus from its
# packages under the tags that docker-compose.yml names. What is there is kept.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT

has() { docker image inspect "$1" >/dev/null 2>&1; }

if ! has debian:bookworm-slim && ! docker pull --quiet debian:bookworm-slim 2>/dev/null; then
    mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm - http://deb.debian.org/debian |
        docker import - debian:bookworm-slim
fi
cp "$here"/* "$context"
cp /etc/ssl/certs/ca-certificates.crt "$context"
docker build --quiet --tag fleetfed-test/base --file "$context/base.Dockerfile" "$context"
for each in postgres=postgres:15-bookworm prometheus=prom/prometheus:v2.53.0; do
    tag=${each#*=}
    has "$tag" || docker pull --quiet "$tag" 2>/dev/null ||
        docker build --quiet --tag "$tag" --file "$context/${each%%=*}.Dockerfile" "$context"
done
