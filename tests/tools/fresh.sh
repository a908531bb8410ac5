#!/usr/bin/env bash
# make fresh-test: what a newcomer does, in a Debian that has nothing yet.  As root; needs debootstrap.
#
#   tests/tools/fresh.sh trixie|bookworm
#
# In a folder that debootstrap makes, a user clones the last commit and runs make test.  Before that,
# root types the README's line of packages.  Of this machine it has the network, and whom to trust.
set -euo pipefail
cd "$(dirname "$0")/../.."
base=$1
cache=/var/cache/facerecognition-fresh
[ "$(id -u)" = 0 ] || { echo "Only root can do that: sudo make fresh-test"; exit 1; }
command -v debootstrap > /dev/null || { echo "debootstrap is missing: apt install debootstrap"; exit 1; }

# Mounts are made, and go, in a namespace of their own.  So what deletes the folder never meets them.
if [ $# = 1 ]; then
    root=$(mktemp -d -p /var/tmp fresh.XXXXXX)
    unshare --mount --pid --fork --kill-child "$0" "$base" "$root" &
    trap '{ kill -KILL $!; wait $!; } 2> /dev/null || true; rm -rf "$root"' EXIT
    trap 'exit 130' INT TERM HUP
    wait $!
    exit
fi
root=$2

[ -d "$cache/$base" ] || {
    echo "Making a bare Debian, $base, once"
    mkdir -p "$cache"
    rm -rf "$cache/part"
    debootstrap --variant=minbase --include=ca-certificates "$base" "$cache/part" > "$cache/log" ||
        { tail "$cache/log"; exit 1; }
    mv "$cache/part" "$cache/$base"
}
cp -a "$cache/$base/." "$root"
for folder in dev sys; do mount --rbind --make-rslave /$folder "$root/$folder"; done
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
cat /etc/resolv.conf > "$root/etc/resolv.conf"
cat /etc/hosts > "$root/etc/hosts"
apt-config dump 2> /dev/null | grep -i '^acquire::https\?::proxy' > "$root/etc/apt/apt.conf.d/proxy" || true
: "${PIP_INDEX_URL:=$(python3 -m pip config get global.index-url 2> /dev/null || true)}"
useradd --root "$root" --create-home --shell /bin/bash newcomer
commit=$(git rev-parse HEAD)  # the last one may be another, later
cp -r .git "$root/var/tmp/repository.git"
chroot "$root" chown -R newcomer /var/tmp/repository.git

inside() {
    local names=(HOME=/home/newcomer PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin CI=true LANG=C.UTF-8)
    for name in http_proxy {https,no}_proxy {HTTPS,NO}_PROXY PIP_INDEX_URL; do
        [ -z "${!name:-}" ] || names+=("$name=${!name}")
    done
    chroot "$@" env -i "${names[@]}" DEBIAN_FRONTEND=noninteractive bash -euo pipefail -s
}

packages=$(sed -n 's/^sudo apt install //p' README.md | head -1)
echo "Installing $packages, and what tests use"
inside "$root" > "$root/var/tmp/log" 2>&1 << END || { tail -20 "$root/var/tmp/log"; exit 1; }
apt-get update
apt-get install -y $packages
apt-get install -y --no-install-recommends nginx qemu-user-static openssl binutils procps
END
cat /etc/ssl/certs/ca-certificates.crt > "$root/etc/ssl/certs/ca-certificates.crt"
inside --userspec=newcomer "$root" << END
cd ~
git clone -q /var/tmp/repository.git facerecognition-external-model
cd facerecognition-external-model
git checkout -q $commit
make test
END
