#!/usr/bin/env bash
# Unpacks the brokers that these tests start. Debian only; needs no root, installs nothing and starts no service.
#   install.sh [FOLDER]                   this Debian's RabbitMQ and NATS, into ".brokers" by default
#   install.sh --suite SUITE [FOLDER]     another Debian's (trixie, testing, sid), and its Mosquitto, with all the
#                                         libraries they need down to libc, into ".brokers/SUITE"
# FLEETFED_BROKERS=FOLDER then tells the tests to take those. MIRROR is where a suite comes from.
set -euo pipefail
suite=""
if [[ ${1:-} == --suite ]]; then
  suite=${2:?"--suite needs a name, such as trixie"}
  shift 2
fi
into=$(realpath -m "${1:-$(dirname "$0")/../../.brokers${suite:+/$suite}}")

# What the brokers bring that is not installed here. Erlang's packages are named because apt leaves out what is installed
# already, and a half of Erlang elsewhere would not be found from here.
fetch_from_here() {
  packages=(nats-server rabbitmq-server socat)
  packages+=($(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances rabbitmq-server | grep -o '^erlang-[a-z0-9-]*' | grep -v hipe | sort -u))
  apt-get download -qq "${packages[@]}"
}

# An apt of its own, which knows that suite alone and of nothing installed. It looks at signatures as ever, but not at how
# long they are good for: a mirror that stands still, such as snapshot.debian.org, will do.
fetch_from_suite() {
  mkdir -p apt/lists/partial apt/archives/partial
  : >apt/status
  cat >apt/sources.list <<SOURCE
deb [check-valid-until=no signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${MIRROR:-http://deb.debian.org/debian} $suite main
SOURCE
  cat >apt/apt.conf <<CONF
Dir::State "$PWD/apt";
Dir::State::status "$PWD/apt/status";
Dir::Cache "$PWD/apt";
Dir::Etc::sourcelist "$PWD/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::main "/dev/null";
APT::Sandbox::User "";
Acquire::Languages "none";
CONF
  export APT_CONFIG=$PWD/apt/apt.conf
  apt-get update -qq
  apt-get install -qq --yes --download-only --no-install-recommends mosquitto nats-server rabbitmq-server >/dev/null
  mv apt/archives/*.deb .
}

# A program of another Debian wants another libc: a script in its place starts it with the loader and the libraries that
# came with it. The shell is replaced by the program, so that signals reach it.
bring_own_libraries() {
  local loader library program
  loader=$(echo "$into"/usr/lib/*-linux-gnu*/ld-linux*.so.*)
  library=$(dirname "$loader")
  # Some packages leave the link by a library's short name to whoever installs them.
  PATH=$PATH:/sbin ldconfig -n "$library"
  for program in "$into"/usr/sbin/{mosquitto,nats-server} "$into"/usr/lib/erlang/{bin,erts-*/bin,lib/*/priv/bin}/*; do
    [[ -f $program && ! -L $program && $(head -c 4 "$program" | tr -d '\0') == $'\x7fELF' ]] || continue
    mv "$program" "$program.elf"
    printf '#!/bin/sh\nexec "%s" --library-path "%s" --argv0 "$0" "%s.elf" "$@"\n' \
      "$loader" "$library" "$program" >"$program"
    chmod +x "$program"
  done
}

if [[ -n $suite && -e $into/usr ]]; then
  echo "$into holds brokers already, and another version's must not lie among them: delete it first" >&2
  exit 1
fi
mkdir -p "$into/debs"
cd "$into/debs"
if [[ -n $suite ]]; then fetch_from_suite; else fetch_from_here; fi
for each in *.deb; do dpkg -x "$each" "$into"; done
cd "$into"
rm -r "$into/debs"
# Erlang's launchers know only the place where Debian installs it.
sed -i "s#ROOTDIR=/usr/lib/erlang\$#ROOTDIR=$into/usr/lib/erlang#" "$into"/usr/lib/erlang/bin/{erl,start} \
  "$into"/usr/lib/erlang/erts-*/bin/{erl,start} 2>/dev/null || true
if [[ -n $suite ]]; then
  bring_own_libraries
  # It ends with another status than 0 in some versions.
  "$into/usr/sbin/mosquitto" -h 2>/dev/null | head -n 1 || true
fi
"$into/usr/sbin/nats-server" --version
echo "rabbitmq-server $(basename "$into"/usr/lib/rabbitmq/lib/rabbitmq_server-* | cut -d- -f2)"
