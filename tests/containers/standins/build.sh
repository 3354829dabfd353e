#!/bin/sh
# Images that the tests need and may be unable to pull: Debian as Debian makes it, and PostgreSQL and Prometheus from its
# packages under the tags that docker-compose.yml names. What is there is kept.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT

has() { docker image inspect "$1" >/dev/null 2>&1; }

if ! has debian:bookworm-slim && ! docker pull --quiet debian:bookworm-slim 2>/dev/null; then
    command -v mmdebstrap >/dev/null || {
        echo "cannot pull debian:bookworm-slim, and cannot make it: install mmdebstrap (Debian's package)" >&2
        exit 1
    }
    # Not through a pipe: a half image would stay and be kept.
    mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$context/debian.tar" \
        http://deb.debian.org/debian
    docker import "$context/debian.tar" debian:bookworm-slim
    rm "$context/debian.tar"
fi
cp "$here"/* "$context"
cp /etc/ssl/certs/ca-certificates.crt "$context"
docker build --quiet --tag fleetfed-test/base --file "$context/base.Dockerfile" "$context"
for each in postgres=postgres:15-bookworm prometheus=prom/prometheus:v2.53.0; do
    tag=${each#*=}
    has "$tag" || docker pull --quiet "$tag" 2>/dev/null ||
        docker build --quiet --tag "$tag" --file "$context/${each%%=*}.Dockerfile" "$context"
done
