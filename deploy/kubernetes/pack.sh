#!/bin/sh
# Packs what each pod of these manifests holds and nobody else may read, from a key folder: OUT/NAMESPACE/SECRET/*.tar.
#
#   deploy/kubernetes/pack.sh KEYS PGPASS OUT
#
# KEYS has the members that docs/containers.md names, PGPASS is libpq's file with the database's password.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
keys=$1 pgpass=$2 out=$3
umask 077
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pack() { # FOLDER NAMESPACE/SECRET NAME
    mkdir -p "$out/$2"
    tar --create --file="$out/$2/$3.tar" --directory="$1" .
}

broker() { # NAME SITE
    mkdir "$work/$1"
    cp -R "$keys/identities/$1" "$work/$1/identity"
    fleetfed broker render --keys "$keys" --site "$2" --config "$here/$1.toml" --at /etc/fleetfed --out "$work/$1"
}

broker cloud-broker _
pack "$work/cloud-broker" fleetfed/broker-files broker

broker north-broker north
cp -R "$keys/identities/b-north" "$work/north-broker/bridge"
pack "$work/north-broker" fleetfed-north/broker-files broker

cp -R "$keys/identities/coordinator" "$work/coordinator"
cp "$pgpass" "$work/coordinator/pgpass"
pack "$work/coordinator" fleetfed/coordinator-identity identity
pack "$keys/identities/g-north" fleetfed-north/gateway-identity identity
pack "$keys/identities/h-two" fleetfed-helper/helper-identity identity
