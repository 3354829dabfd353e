#!/bin/sh
# What each image adds to the base that it was built from, in MB, and its largest folders.
#
#   tests/containers/sizes.sh [BASE] [TAG]
set -eu
base=${1:-debian:bookworm-slim} tag=${2:-0.1.0}
size() { docker image inspect --format '{{.Size}}' "$1"; }
own=$(size "$base")
printf '%-12s %8s %8s\n' image all added
for role in broker gateway helper device coordinator; do
    all=$(size "fleetfed/$role:$tag")
    printf '%-12s %8d %8d\n' "$role" $((all / 1000000)) $(((all - own) / 1000000))
done
