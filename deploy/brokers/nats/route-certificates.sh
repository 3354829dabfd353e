#!/usr/bin/env bash
# An authority and one certificate for the routes between the nodes of a NATS cluster: a node is server and client there,
# which a broker's identity is not, and nobody of the fleet shall be taken for a node.
#   route-certificates.sh FOLDER HOST…     writes FOLDER/{ca,cert,key}.pem, valid for ten years, for these nodes
set -euo pipefail
folder=$1
shift
names=""
for host in "$@"; do
  if [[ $host =~ ^[0-9.]+$|: ]]; then names+=",IP:$host"; else names+=",DNS:$host"; fi
done
umask 077
mkdir -p "$folder"
cd "$folder"
new=(openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 3650)
"${new[@]}" -subj "/CN=nats routes" -keyout ca.key -out ca.pem 2>/dev/null
"${new[@]}" -subj "/CN=nats node" -keyout key.pem -out cert.pem -CA ca.pem -CAkey ca.key \
  -addext "subjectAltName=${names#,}" -addext "extendedKeyUsage=serverAuth,clientAuth" \
  -addext "basicConstraints=critical,CA:false" 2>/dev/null
rm ca.key
