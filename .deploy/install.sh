#!/usr/bin/env bash
# As root: has systemd run the service from this folder, with what HOST, PORT, FACE_MODEL and
# API_KEY say.  It runs as the folder's owner or, if that is root, as a user of its own.
#
#   install.sh       sets up what is missing, and starts it now and after every boot
#   install.sh undo  stops it, and removes it from systemd
#   install.sh units only writes the units, into the folder UNITS
set -euo pipefail
cd "$(dirname "$0")/.."
units=${UNITS:-/etc/systemd/system}
owner=$(stat -c %U .)
[ "$owner" = root ] && user=facerecognition || user=$owner

# The units, and beside each what is special here, as systemctl edit would write it.
write_units() {
    local host=${HOST:+$HOST:}
    [[ $host != *:*: ]] || host="[$HOST]:"
    install -D -m 644 -t "$units" .deploy/facerecognition.{socket,service}
    install -D -m 644 /dev/stdin "$units/facerecognition.socket.d/install.conf" <<- END
		[Socket]
		ListenStream=
		ListenStream=$host${PORT:-5000}
	END
    install -D -m 644 /dev/stdin "$units/facerecognition.service.d/install.conf" <<- END
		[Service]
		User=$user
		WorkingDirectory=${PWD//%/%%}
		Environment=FACE_MODEL=${FACE_MODEL:-1}
	END
}

[ "${1:-}" != units ] || { write_units; exit; }
[ "$(id -u)" = 0 ] || { echo "Only root can do that: sudo make ..."; exit 1; }
[ -d /run/systemd/system ] || { echo "No systemd runs here: README.md tells other ways to keep it running"; exit 1; }
if [ "${1:-}" = undo ]; then
    systemctl disable --now facerecognition.{service,socket} || true
    rm -f "$units"/facerecognition.{service,socket}{,.d/install.conf}
    rmdir --ignore-fail-on-non-empty "$units"/facerecognition.{service,socket}.d 2> /dev/null || true
    systemctl daemon-reload
    exit
fi

id "$user" > /dev/null 2>&1 || useradd --system --no-create-home "$user"
runuser -u "$user" -- test -r "$PWD/Makefile" || { # by its whole path, as systemd opens it
    echo "The service's user, $user, can't read $PWD: move it, to /opt for example"
    exit 1
}
# As the owner, so that nothing here belongs to root that the owner can't change later.
HOME=$(getent passwd "$owner" | cut -d: -f6) runuser -u "$owner" -- make --no-print-directory setup api.key
runuser -u "$user" -- "$PWD/.venv/bin/python" -c "" || {
    echo "The service's user, $user, can't run this Python: make clean, and install again with PYTHON=/usr/bin/python3"
    exit 1
}
[ -z "${API_KEY:-}" ] || printf '%s\n' "$API_KEY" > api.key
chmod 600 api.key
chown "$user" api.key
write_units
systemctl daemon-reload
systemctl enable facerecognition.{socket,service}
systemctl restart facerecognition.{socket,service}
address=${HOST:-localhost}
[[ $address != *:* ]] || address="[$address]"
if curl -sf --noproxy '*' -m 60 -o /dev/null "http://$address:${PORT:-5000}/welcome"; then
    echo "The service runs now, and after every boot: journalctl -fu facerecognition"
else
    echo "The service does not answer.  Its journal says:"
    journalctl -u facerecognition -n 10 --no-pager -o cat
    exit 1
fi
