#!/bin/sh
# Sets the password for sudo, once in a container's life; installed as whet-sudo-password.
#
# The entrypoint runs as the user whet, who may run this as root without a password: on standard input
# comes USER_PASSWORD, or nothing. Either closes the door: the account's '*' of the fresh image becomes a
# hash, or '!', and from then on this script changes nothing, whoever runs it.
set -eu

field=$(getent shadow whet | cut -d: -f2)
[ "$field" = '*' ] || exit 0
[ -w /etc/shadow ] || {
    echo '/etc cannot be written' >&2
    exit 1
}
IFS= read -r password || true
if [ -n "$password" ]; then
    printf 'whet:%s\n' "$password" | chpasswd
else
    usermod --password '!' whet
fi
