#!/bin/sh
# Starts the image's command.  As root it reads the key, which may be root's alone, and goes on as the
# user facerecognition; or as it is, if it has no capability to change the user (--cap-drop ALL).
if [ "$(id -u)" = 0 ]; then
    if [ -z "$API_KEY" ] && [ -f api.key ]; then
        API_KEY=$(cat api.key)
        export API_KEY
    fi
    as_user="setpriv --reuid facerecognition --regid facerecognition --clear-groups --no-new-privs"
    if $as_user true 2> /dev/null; then
        exec $as_user "$@"
    fi
fi
exec "$@"
