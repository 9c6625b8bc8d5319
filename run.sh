#!/usr/bin/env bash
# The two commands of the README: `./run.sh demo` and `./run.sh test`.
# Sets up .venv in this checkout first; needs Python 3.11 or later, or uv, and a package index.
# The tests of the kernels need clang 18 or later, except on a Mac, which runs them on Metal.
set -euo pipefail
cd "$(dirname "$0")"

find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$name"
            return
        fi
    done
    echo "run.sh: Python 3.11 or later is needed" >&2
    exit 1
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# Some systems package venv apart from Python.
install_venv() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if command -v apt-get >/dev/null; then
        as_root apt-get update -qq
        as_root apt-get install -qq -y "python$version-venv" || as_root apt-get install -qq -y python3-venv
    else
        echo "run.sh: Python's venv module is missing; install it and run this again" >&2
        exit 1
    fi
}

# $1: a uv to use, $2: the extras. Installs what uv.lock names, and leaves alone what else is there.
sync() {
    local extra options=()
    for extra in ${2//,/ }; do options+=(--extra "$extra"); done
    UV_PROJECT_ENVIRONMENT=.venv "$1" sync --quiet --frozen --inexact --no-default-groups "${options[@]}"
}

# uv may be unable to reach the index that pip is set up for. $1: the extras.
install_by_pip() {
    echo "run.sh: uv could not install what uv.lock names; trying pip" >&2
    .venv/bin/python .ci/pins.py >.venv/pins.txt
    .venv/bin/python -m pip install --quiet -c .venv/pins.txt -e ".[$1]" ||
        .venv/bin/python -m pip install --quiet -e ".[$1]"
}

make_venv() {
    local python
    [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null || install_venv "$python"
    "$python" -m venv .venv
}

# $1: the extras to install. Does nothing while pyproject.toml, uv.lock and the extras are the same.
set_up() {
    local stamp
    stamp="$1 $(cat pyproject.toml uv.lock | cksum)"
    [ "$(cat .venv/ds4mlx-stamp 2>/dev/null || true)" = "$stamp" ] && return
    if ! { command -v uv >/dev/null && sync uv "$1"; }; then
        make_venv
        { .venv/bin/python -m pip install --quiet uv && sync .venv/bin/uv "$1"; } || install_by_pip "$1"
    fi
    echo "$stamp" >.venv/ds4mlx-stamp
}

# The kernels' Metal text is compiled and run on the CPU, which takes clang.
install_clang() {
    local name
    [ "$(uname)" = Darwin ] && return
    [ -n "${METALSIM_CLANG:-}" ] && return
    for name in clang-19 clang-20 clang-21 clang-18; do
        command -v "$name" >/dev/null && return
    done
    if command -v apt-get >/dev/null; then
        as_root apt-get update -qq
        for name in clang-19 clang-20 clang-18; do
            as_root apt-get install -qq -y "$name" >/dev/null && return
        done
    fi
    echo "run.sh: clang 18 or later is needed for the tests; install it as clang-19 or name it in" \
        "METALSIM_CLANG" >&2
    exit 1
}

# One test records the system calls of a save, which takes strace; without OpenBLAS MLX is slow on a
# Linux CPU. The tests do without either.
install_aids() {
    if command -v apt-get >/dev/null && ! { command -v strace && ldconfig -p | grep libopenblas; } >/dev/null; then
        { as_root apt-get update -qq && as_root apt-get install -qq -y strace libopenblas0; } >/dev/null 2>&1 || true
    fi
}

# The server's page is tried in a browser, which is looked for by the same names in the tests.
install_chromium() {
    local name
    for name in chromium google-chrome chromium-browser; do
        command -v "$name" >/dev/null && return
    done
    if command -v apt-get >/dev/null; then
        { as_root apt-get update -qq && as_root apt-get install -qq -y chromium; } >/dev/null 2>&1 || true
    fi
}

case "${1:-}" in
demo)
    set_up cpu
    .venv/bin/ds4mlx generate -p "Write a function that adds two numbers." --max-tokens 60 --seed 1
    ;;
test)
    set_up cpu,test,notebooks,server
    install_clang
    install_aids
    install_chromium
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/basedpyright
    .venv/bin/python -m pytest "${@:2}"
    ;;
*)
    echo "usage: ./run.sh demo | ./run.sh test [pytest arguments]" >&2
    exit 2
    ;;
esac
