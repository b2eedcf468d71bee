# Sourced by the other scripts: `setup_venv EXTRA` makes .venv in the checkout, installs the package into it
# (editable, with that extra and the versions of constraints.txt) and sets $python to its interpreter.
# What is already installed is kept: a second call returns at once.
#
# PYTHON      interpreter that makes the .venv; python3 if unset
# PIP_...     pip's own settings, such as another index or a folder with a CPU-only torch

setup_venv() {
    local extra=$1 base=${PYTHON:-python3} root stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    python=$root/.venv/bin/python
    stamp=$root/.venv/.installed-$extra
    # The folder belongs to it: an environment that was moved no longer finds the package.
    wanted=$(cd "$root" && { pwd; cat setup.cfg pyproject.toml constraints.txt; } | cksum)

    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$python" -c pass; then
        return
    fi

    if ! "$python" -c 'import pip' 2>/dev/null; then
        command -v "$base" >/dev/null ||
            stop "no '$base' found: install Python 3.10 or newer, or set PYTHON to its path"
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            stop "Python 3.10 or newer is needed, '$base' is $("$base" -V 2>&1): set PYTHON to a newer one"
        "$base" -c 'import ensurepip, venv' 2>/dev/null ||
            stop "'$base' has no venv or ensurepip module: install it (Debian, Ubuntu: apt install python3-venv)" \
                 "or set PYTHON to another Python"
        echo "Creating .venv with $("$base" -V 2>&1)"
        "$base" -m venv --clear "$root/.venv" || stop "could not create $root/.venv, see above"
    fi

    echo "Installing l1attn_cupy[$extra] into .venv (the first time this takes minutes: torch is large)"
    # Without isolation the build uses the pinned setuptools, and so needs it first.
    (cd "$root" &&
        "$python" -m pip install --disable-pip-version-check --no-input -c constraints.txt setuptools &&
        "$python" -m pip install --disable-pip-version-check --no-input -c constraints.txt \
            --no-build-isolation -e ".[$extra]") ||
        stop "the installation failed, see above; a network connection to a Python package index is needed"
    echo "$wanted" >"$stamp"
}

stop() {
    echo "error: $*" >&2
    exit 1
}
