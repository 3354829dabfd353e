#!/usr/bin/env bash
# Makes a Debian 12 for another processor in a folder, ".arm" by default, with a device and a gateway in it. Debian only, as
# root, with mmdebstrap, qemu-user-static and binfmt-support installed. Run it again to install changed code.
#
#   tests/arm/install.sh arm64|armhf [FOLDER]
#
# Nothing is emulated in here, where it would take an hour: Debian's packages are unpacked and not configured, and wheels
# are chosen for that processor and unpacked by this machine's pip.
set -euo pipefail
arch=$1
here=$(cd "$(dirname "$0")/../.." && pwd)
root=$(realpath -m "${2:-$here/.arm}")/$arch
python=${PYTHON:-python3}
debian=ca-certificates,coreutils,dash,libstdc++6,python3
case $arch in
  arm64) machine=aarch64 ;;
  # PyPI has no wheels of these for 32-bit ARM.
  armhf) machine=armv7l debian+=,python3-msgpack,python3-nacl,python3-numpy,python3-zstandard ;;
  *) echo "$arch: arm64 or armhf" >&2; exit 2 ;;
esac

if [ ! -e "$root/usr/bin/python3" ]; then
  mkdir -p "$(dirname "$root")"
  mmdebstrap --quiet --variant=extract --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --arch="$arch" \
    --include="$debian" bookworm "$root" http://deb.debian.org/debian
fi
# What Debian's scripts would have done that is needed: mount points, and which BLAS is used.
mkdir -p "$root"/{dev,proc,root,tmp}
for each in blas lapack; do
  for library in "$root"/usr/lib/*/"$each/lib$each.so.3"; do
    [ ! -e "$library" ] || ln -sf "$each/lib$each.so.3" "$(dirname "$(dirname "$library")")/"
  done
done

unpack() {
  local place=$root/opt/fleetfed platforms=(--platform "manylinux2014_$machine") glibc
  # Debian 12 has glibc 2.36; pip takes no tag of an older one for granted.
  for glibc in 17 26 27 28 31 34 35 36; do platforms+=(--platform "manylinux_2_${glibc}_$machine"); done
  rm -rf "$place"
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile --target "$place" --python-version 3.11 \
    --only-binary :all: "${platforms[@]}" --platform any "$@"
}
rm -rf "$root/wheels"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$root/wheels" "$here"
wheel=$(echo "$root"/wheels/*.whl)
if [ "$arch" = armhf ]; then
  # By name: this pip would follow the markers of the processor that it runs on.
  unpack --no-deps "$wheel" 'aiomqtt>=2.5,<2.6' 'paho-mqtt>=2.2,<2.3' 'securesystemslib>=1.3,<2' \
    'tflite-runtime>=2.14' 'tuf>=7,<8' urllib3
else
  unpack "fleetfed[device,gateway] @ file://$wheel"
fi
