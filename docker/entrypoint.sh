#!/usr/bin/env bash
# Starts what whet's container is for, as a user who is not root; installed as whet-entrypoint.
#
#   whet-entrypoint               Jupyter Lab and, where SSH_KEY is set, sshd; both are watched
#   whet-entrypoint COMMAND ...   that command instead
#   whet-entrypoint --health      exit 0 when both answer
#
# Reads JUPYTER_PASSWORD, JUPYTER_PORT, SSH_KEY, SSH_PORT, USER_PASSWORD (docs/container.md); what is set to
# nothing counts as unset. Secrets go to files that only this user reads, and out of every environment.
set -euo pipefail

readonly PREFIX=/opt/whet WORKSPACE=/workspace ACCOUNT=whet
readonly STOP_SECONDS=8 # Docker kills what has not ended 10 s after its SIGTERM
readonly DEATHS=3 DEATHS_SECONDS=60
jupyter_port=${JUPYTER_PORT:-8888} ssh_port=${SSH_PORT:-2222}

say() { printf 'whet: %s\n' "$*"; }

# Not on standard output, which may be a command's answer.
warn() { say "$@" >&2; }

fail() {
    warn "$1"
    exit 2
}

# --- before anything runs ------------------------------------------------------------------------

check_port() {
    case $2 in
        '' | 0* | *[!0-9]* | ??????*) ;;
        *) [ "$2" -gt 65535 ] || return 0 ;;
    esac
    fail "$1 must be a number from 1 to 65535; got '$2'"
}

# Each line for itself: sshd passes over one that it cannot read. From standard input, ssh-keygen takes no
# private key, which would serve nobody and should not be here.
check_ssh_key() {
    local line number=0
    while IFS= read -r line; do
        number=$((number + 1))
        case $line in '' | $'\r' | '#'*) continue ;; esac
        ssh-keygen -l -f - <<<"$line" >/dev/null 2>&1 \
            || fail "SSH_KEY must hold public keys, one a line, as in ~/.ssh/id_ed25519.pub; line $number is none"
    done <<<"$SSH_KEY"
}

check_settings() {
    check_port JUPYTER_PORT "$jupyter_port"
    check_port SSH_PORT "$ssh_port"
    [ -n "${SSH_KEY:-}" ] || return 0
    [ "$jupyter_port" != "$ssh_port" ] || fail "JUPYTER_PORT and SSH_PORT must differ; both are $ssh_port"
}

# Root only sets sudo's password and is root no more.
drop_root() {
    whet-sudo-password <<<"${USER_PASSWORD:-}" \
        || [ -z "${USER_PASSWORD:-}" ] || fail "USER_PASSWORD cannot be set; leave it out for no sudo"
    unset USER_PASSWORD
    export HOME=/home/$ACCOUNT
    exec setpriv --reuid="$ACCOUNT" --regid="$ACCOUNT" --init-groups --inh-caps=-all "$0" "$@"
}

# Closes the door to sudo, or gives it its password (docker/sudo-password.sh).
settle_sudo() {
    local told
    if [ "$(id -u)" = "$(id -u "$ACCOUNT")" ]; then
        if told=$(sudo -n /usr/local/sbin/whet-sudo-password 2>&1 <<<"${USER_PASSWORD:-}"); then return; fi
    else
        told="sudo knows only the user $ACCOUNT; start without another user"
    fi
    [ -z "${USER_PASSWORD:-}" ] || fail "USER_PASSWORD cannot be set (${told##*$'\n'}); leave it out for no sudo"
}

# The account is 'whet' for whatever uid the container was started with, without a write to /etc.
name_user() {
    local uid gid
    uid=$(id -u) gid=$(id -g)
    [ "$(id -un 2>/dev/null)" != "$ACCOUNT" ] || return 0
    grep -v -e "^$ACCOUNT:" -e "^[^:]*:[^:]*:$uid:" /etc/passwd >"$state/passwd"
    printf '%s:x:%s:%s::%s:/bin/bash\n' "$ACCOUNT" "$uid" "$gid" "$HOME" >>"$state/passwd"
    cp /etc/group "$state/group"
    getent group "$gid" >/dev/null || printf '%s-%s:x:%s:\n' "$ACCOUNT" "$gid" "$gid" >>"$state/group"
    export NSS_WRAPPER_PASSWD=$state/passwd NSS_WRAPPER_GROUP=$state/group LD_PRELOAD=libnss_wrapper.so
}

make_state() {
    umask 022
    state=$(mktemp -d "${TMPDIR:-/tmp}/whet-XXXXXX") \
        || fail "the folder ${TMPDIR:-/tmp} cannot be written; give the container one (--tmpfs /tmp)"
    if [ ! -w "${HOME:-/}" ] || [ "${HOME:-/}" = / ]; then
        export HOME=$state/home
        mkdir "$HOME"
    fi
    export JUPYTER_RUNTIME_DIR=$state/jupyter
}

# The work goes on without; what is to be kept needs the folders.
check_folders() {
    local folder
    for folder in work models; do
        [ ! -w "$WORKSPACE/$folder" ] || continue
        warn "$WORKSPACE/$folder cannot be written by uid $(id -u);" \
            "mount a folder there that this uid owns, or start with --user and its owner's uid"
    done
    if mkdir -p "$WORKSPACE/work/runs" 2>/dev/null; then return; fi
    case ${XDG_CACHE_HOME:-} in "$WORKSPACE"/work/*) export XDG_CACHE_HOME=$HOME/.cache ;; esac
}

prepare_jupyter() {
    local how
    how=$(JUPYTER_PORT=$jupyter_port "$PREFIX/bin/python" - "$state/jupyter_server_config.json" "$WORKSPACE" <<'PYTHON'
import json
import os
import secrets
import sys

from jupyter_server.auth import passwd

file, workspace = sys.argv[1:]
port = os.environ["JUPYTER_PORT"]
password = os.environ.get("JUPYTER_PASSWORD", "").strip()  # as the log-in form does
token = "" if password else secrets.token_hex(24)
config = {
    "ServerApp": {
        "ip": "0.0.0.0",
        "port": int(port),
        "port_retries": 0,  # another port than the one that was asked for is of no use to anybody
        "open_browser": False,
        "root_dir": workspace,
        "allow_remote_access": True,
    },
    "IdentityProvider": {"token": token},
}
if password:
    config["PasswordIdentityProvider"] = {"hashed_password": passwd(password)}
with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out:
    json.dump(config, out)
print("/lab, with JUPYTER_PASSWORD" if password else f"/lab?token={token}")
PYTHON
    ) || fail "Jupyter's settings could not be written; the reason is above"
    say "Jupyter Lab: http://127.0.0.1:$jupyter_port$how"
}

# The host key is kept with the work, so that a new container is the same host to those who know it.
prepare_sshd() {
    local keys=$WORKSPACE/work/.ssh-host environment=() name
    printf '%s\n' "$SSH_KEY" >"$state/authorized_keys"
    if ! mkdir -p "$keys" 2>/dev/null || [ ! -w "$keys" ]; then
        keys=$state/ssh-host
        mkdir "$keys"
    fi
    chmod 700 "$keys"
    [ -f "$keys/ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C '' -f "$keys/ed25519" </dev/null
    # What the container was given, a session has too; but for secrets and for what log-in sets itself.
    for name in $(compgen -e); do
        case $name in
            JUPYTER_PASSWORD | USER_PASSWORD | SSH_KEY) ;;
            _ | LOGNAME | MAIL | OLDPWD | PWD | SHELL | SHLVL | TERM | USER) ;;
            *) case ${!name} in *[\"\\]* | *$'\n'*) ;; *) environment+=("$name=${!name}") ;; esac ;;
        esac
    done
    # StrictModes would refuse any file below /tmp, though this folder is this user's alone.
    cat >"$state/sshd_config" <<CONFIG
Port $ssh_port
HostKey $keys/ed25519
AuthorizedKeysFile $state/authorized_keys
StrictModes no
PidFile none
UsePAM no
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
AllowUsers $ACCOUNT
X11Forwarding no
Subsystem sftp internal-sftp
SetEnv $(printf '"%s" ' "${environment[@]}")
CONFIG
    say "SSH: port $ssh_port, user $ACCOUNT, host key $(ssh-keygen -l -f "$keys/ed25519.pub" | cut -d' ' -f2)"
}

# --- while it runs -------------------------------------------------------------------------------

declare -A pid_of=() deaths_of=()
ending=""

start() {
    local at=$state
    case $1 in
        jupyter) "$PREFIX/bin/jupyter" lab --config="$at/jupyter_server_config.json" 2>&1 & ;;
        sshd) /usr/sbin/sshd -D -e -f "$at/sshd_config" 2>&1 & ;;
    esac
    pid_of[$1]=$!
}

# Ends everything that was started, and this script with the exit code and for the reason that are given.
end() {
    [ -z "$ending" ] || return 0
    ending=yes
    local pids=("${pid_of[@]}") tenth pid left=""
    [ ${#pids[@]} = 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true
    for ((tenth = 0; tenth < STOP_SECONDS * 10; tenth++)); do
        left=""
        for pid in "${pids[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then left+=" $pid"; fi
        done
        [ -n "$left" ] || break
        sleep 0.1
    done
    if [ -n "$left" ]; then
        say "still there after $STOP_SECONDS s and killed: process$left"
        # The variable is a list of numbers.
        # shellcheck disable=SC2086
        kill -KILL $left 2>/dev/null || true
    fi
    say "ended${2:+: $2}"
    exit "$1"
}

reason_of() {
    if [ "$1" -gt 128 ]; then printf 'killed by SIG%s' "$(kill -l $(($1 - 128)))"; else printf 'exit code %s' "$1"; fi
}

# Starts a dead process again, or ends the container when it does not stay.
revive() {
    local name=$1 why=$2 times=() time
    for time in ${deaths_of[$name]:-}; do
        if ((SECONDS - time < DEATHS_SECONDS)); then times+=("$time"); fi
    done
    times+=("$SECONDS")
    deaths_of[$name]=${times[*]}
    unset "pid_of[$name]"
    if [ ${#times[@]} -ge $DEATHS ]; then
        end 1 "$name died ${#times[@]} times within $DEATHS_SECONDS s ($why); its own words are above"
    fi
    say "$name ended ($why); starting it again"
    start "$name"
}

supervise() {
    state=$1
    trap 'end 0' TERM INT
    start jupyter
    if [ -f "$state/sshd_config" ]; then start sshd; fi
    local name status tick
    # A pipe that nobody writes to: reading it waits, and a signal ends the wait at once. `wait -n` would not do:
    # it never tells of a process that ended while another was being started.
    exec {tick}<> <(:)
    while true; do
        for name in "${!pid_of[@]}"; do
            if kill -0 "${pid_of[$name]}" 2>/dev/null; then continue; fi
            status=0
            wait "${pid_of[$name]}" || status=$?
            revive "$name" "$(reason_of "$status")"
        done
        read -r -t 1 -u "$tick" || true
    done
}

# --- health --------------------------------------------------------------------------------------

check_health() {
    local line=""
    exec 3<>"/dev/tcp/127.0.0.1/$jupyter_port" || return 1
    printf 'GET /api HTTP/1.0\r\n\r\n' >&3
    IFS= read -r -t 4 line <&3 || true
    case $line in *' 200 '*) ;; *) say "Jupyter answers '${line%$'\r'}'"; return 1 ;; esac
    [ -n "${SSH_KEY:-}" ] || return 0
    exec 4<>"/dev/tcp/127.0.0.1/$ssh_port" || return 1
    line=""
    IFS= read -r -t 4 line <&4 || true
    case $line in SSH-2.0-*) ;; *) say "sshd answers '${line%$'\r'}'"; return 1 ;; esac
}

# -------------------------------------------------------------------------------------------------

case ${1:-} in
    --health) check_health; exit ;;
    --supervise) supervise "$2" ;;
esac
check_settings
[ "$(id -u)" != 0 ] || drop_root "$@"
settle_sudo
make_state
name_user
check_folders
[ -z "${SSH_KEY:-}" ] || check_ssh_key # which needs a user with a name
without_secrets=(env -u JUPYTER_PASSWORD -u USER_PASSWORD -u SSH_KEY)
[ $# = 0 ] || exec "${without_secrets[@]}" tini -s -- "$@"
prepare_jupyter
if [ -n "${SSH_KEY:-}" ]; then prepare_sshd; else say "SSH is off: SSH_KEY is not set"; fi
cd "$WORKSPACE"
# tini passes signals on and reaps what kernels and shells leave behind.
exec "${without_secrets[@]}" tini -s -- "$0" --supervise "$state"
