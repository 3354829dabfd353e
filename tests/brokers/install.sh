#!/usr/bin/env bash
# Unpacks the brokers that these tests start into a folder, ".brokers" by default. Debian only; needs no root, installs
# nothing and starts no service: `apt-get download` and `dpkg -x`.
set -euo pipefail
into=$(realpath -m "${1:-$(dirname "$0")/../../.brokers}")

mkdir -p "$into/debs"
cd "$into/debs"
# What the brokers bring that is not installed here. Erlang's packages are named because apt leaves out what is installed
# already, and a half of Erlang elsewhere would not be found from here.
packages=(nats-server rabbitmq-server socat)
packages+=($(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
  --no-enhances rabbitmq-server | grep -o '^erlang-[a-z0-9-]*' | grep -v hipe | sort -u))
apt-get download -qq "${packages[@]}"
for each in *.deb; do dpkg -x "$each" "$into"; done
rm -r "$into/debs"
# Erlang's launchers know only the place where Debian installs it.
sed -i "s#ROOTDIR=/usr/lib/erlang\$#ROOTDIR=$into/usr/lib/erlang#" "$into"/usr/lib/erlang/bin/{erl,start} \
  "$into"/usr/lib/erlang/erts-*/bin/{erl,start} 2>/dev/null || true
"$into/usr/sbin/nats-server" --version
echo "rabbitmq-server $(basename "$into"/usr/lib/rabbitmq/lib/rabbitmq_server-* | cut -d- -f2)"
