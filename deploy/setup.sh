#!/usr/bin/env bash
# Build .venv from the pinned lists:  deploy/setup.sh cpu [dev]
#
# Safe to run again: a list that is already installed is known by its stamp and costs nothing.
# Everything pip says is kept in .venv/setup.log; the screen gets one line per step.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly LISTS=("${@:-cpu}")

say() { printf '%s\n' "setup: $*" >&2; }
die() { say "$*"; exit 1; }

is_python_311() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
        if is_python_311 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "needs Python 3.11 and found none (looked for python3.11, python3, python).
setup: Install it (apt install python3.11 python3.11-venv, or pyenv install 3.11), or name one: PYTHON=/path/to/python3.11 make ..."
}

# Debian splits ensurepip off into python3.11-venv; a pip of its own can then stand in.
create_venv() {
    local python
    python=$(find_python)
    say "creating $VENV with $("$python" --version)"
    if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        "$python" -m venv --clear "$VENV"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear --without-pip "$VENV"
        "$python" -m pip --python "$VENV/bin/python" install --quiet pip
    else
        die "$python can make no environment with pip in it. Install it: apt install python3.11-venv"
    fi
}

# One line per package on the screen, everything in the log, without pip's noise about index
# locations that do not exist.
show_progress() {
    awk -v total="$1" -v log_file="$VENV/setup.log" '
        /^WARNING: Location .* is ignored: it is / { next }
        { print >> log_file; fflush(log_file) }
        /^(Collecting|Processing) / { sub(".*/", "", $2); printf "setup: [%3d/%d] %s\n", ++n, total, $2 }
        /^Installing collected packages/ && total > 9 { print "setup: unpacking (a minute or two)" }
        { fflush() }' >&2
}

pip_install() {
    local total=$1
    shift
    PYTHONUNBUFFERED=1 "$VENV/bin/python" -m pip install --no-deps --no-input \
        --disable-pip-version-check --progress-bar off "$@" 2>&1 | show_progress "$total"
}

# Networks fail; once more is often enough.
install_twice() {
    pip_install "$@" && return
    say "that failed; trying once more in 5 s"
    sleep 5
    pip_install "$@" || {
        tail -n 15 "$VENV/setup.log" >&2
        die "could not install. The whole story is in $VENV/setup.log; run the same command again to go on."
    }
}

# The CPU build of torch is not on the ordinary package index. Some machines are set up to find it
# all the same; elsewhere PyTorch's own index is asked, for this one package and nothing else.
install_torch() {
    local pin
    pin=$(grep '^torch==' deploy/requirements/cpu.txt)
    if pip_install 1 "$pin"; then
        return
    fi
    say "$pin is not on the configured index; asking $TORCH_CPU_INDEX"
    install_twice 1 --extra-index-url "$TORCH_CPU_INDEX" "$pin"
}

# A list is installed if nothing that decided the installation has changed since, this directory included
# (the scripts in .venv/bin name it).
hash_of() {
    { cat "deploy/requirements/$1.txt" pyproject.toml deploy/setup.sh; pwd; } | sha256sum
}

is_installed() {
    [[ -x $VENV/bin/python && -f $VENV/.installed-$1 && $(<"$VENV/.installed-$1") == "$(hash_of "$1")" ]]
}

install_list() {
    local list=deploy/requirements/$1.txt total
    total=$(grep -c '^[A-Za-z]' "$list")
    say "installing $list ($total packages)"
    [[ $1 == cpu ]] && install_torch
    install_twice "$total" -r "$list"
    [[ $1 == cpu ]] && install_twice 1 --no-build-isolation --editable .
    hash_of "$1" >"$VENV/.installed-$1"
    say "$list is installed"
}

main() {
    local list missing=()
    for list in "${LISTS[@]}"; do
        [[ -f deploy/requirements/$list.txt ]] || die "there is no list deploy/requirements/$list.txt"
        is_installed "$list" || missing+=("$list")
    done
    [[ ${#missing[@]} == 0 ]] && return
    if ! is_python_311 "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        create_venv
        missing=("${LISTS[@]}")
    fi
    for list in "${missing[@]}"; do
        install_list "$list"
    done
}

main
