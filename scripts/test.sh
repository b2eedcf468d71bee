#!/usr/bin/env bash
# Sets up .venv if needed, then runs ruff, mypy and pytest (doctests included). Any failure gives exit status 1.
# Arguments go to pytest:  ./scripts/test.sh -k backward
# Two processes share the test files; with -n 0 among the arguments one does it all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh
setup_venv test

failed=""
step() { # step NAME COMMAND...: the later steps run even if this one fails
    echo "--- $1"
    "${@:2}" || failed="$failed '$1'"
}
step "ruff check" "$python" -m ruff check .
step "ruff format" "$python" -m ruff format --check .
step "mypy" "$python" -m mypy
step "pytest" "$python" -m pytest -rs -n 2 --dist loadfile "$@"

[ -z "$failed" ] || stop "failed:$failed"
echo "All passed."
