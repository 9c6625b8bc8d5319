#!/usr/bin/env bash
# The two commands of the README: `./run.sh demo` and `./run.sh test`.
# Sets up .venv in this checkout first; needs Python 3.11 or later and a package index.
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

# $1: the extras to install. Runs pip only when pyproject.toml or the extras have changed.
set_up() {
    local python stamp
    python=$(find_python)
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null || install_venv "$python"
        "$python" -m venv .venv
    fi
    stamp="$1 $(cksum <pyproject.toml)"
    if [ "$(cat .venv/ds4mlx-stamp 2>/dev/null || true)" != "$stamp" ]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$1]"
        echo "$stamp" >.venv/ds4mlx-stamp
    fi
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

case "${1:-}" in
demo)
    set_up cpu
    .venv/bin/ds4mlx generate -p "Write a function that adds two numbers." --max-tokens 60 --seed 1
    ;;
test)
    set_up cpu,test,notebooks
    install_clang
    install_aids
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
