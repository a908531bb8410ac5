#!/usr/bin/env bash
# As root: has systemd run the service from this folder, with what HOST, PORT, FACE_MODEL and
# API_KEY say.  It runs as the folder's owner or, if that is root, as a user of its own.
#
#   install.sh       sets up what is missing, and starts it now and after every boot
#   install.sh undo  stops it, and removes it from systemd
#   install.sh units only writes the two units, into the folder UNITS
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD
units=${UNITS:-/etc/systemd/system}
owner=$(stat -c %U .)
user=$owner
[ "$owner" != root ] || user=facerecognition

write_units() {
    local host=${HOST:-}
    [[ $host != *:* ]] || host="[$host]"
    sed "s|^ListenStream=.*|ListenStream=${host:+$host:}${PORT:-5000}|" \
        .deploy/facerecognition.socket > "$units/facerecognition.socket"
    sed -e "s|/opt/facerecognition-external-model|$folder|" -e "s|^User=.*|User=$user|" \
        -e "s|^Environment=FACE_MODEL=.*|Environment=FACE_MODEL=${FACE_MODEL:-1}|" \
        .deploy/facerecognition.service > "$units/facerecognition.service"
}

if [ "${1:-}" = units ]; then
    write_units
    exit
fi
if [ "$(id -u)" != 0 ]; then
    echo "Only root can do that: sudo make ..."
    exit 1
fi
if [ "${1:-}" = undo ]; then
    systemctl disable --now facerecognition.service facerecognition.socket || true
    rm -f "$units"/facerecognition.{service,socket}
    systemctl daemon-reload
    exit
fi

# As the owner, so that nothing here belongs to root that the owner can't change later.
HOME=$(getent passwd "$owner" | cut -d: -f6) runuser -u "$owner" -- \
    make --no-print-directory setup api.key
id "$user" > /dev/null 2>&1 || useradd --system --no-create-home "$user"
if ! runuser -u "$user" -- test -x "$folder/.venv/bin/python"; then
    echo "The service's user, $user, can't read this folder: move it, to /opt for example"
    exit 1
fi
[ -z "${API_KEY:-}" ] || printf '%s\n' "$API_KEY" > api.key
chmod 600 api.key
chown "$user" api.key
write_units
systemctl daemon-reload
systemctl enable facerecognition.socket facerecognition.service
systemctl restart facerecognition.socket facerecognition.service
