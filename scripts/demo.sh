#!/usr/bin/env bash
# Sets up .venv if needed, checks L1 attention against the naive formula, then trains on handwritten digits.
# Arguments go to the training:  ./scripts/demo.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh
setup_venv demo

case " $* " in
    *" -h "* | *" --help "*) exec "$python" scripts/train_digits.py --help ;;
esac
"$python" scripts/check.py || stop "the check failed (see above), so there is no training"
echo
"$python" scripts/train_digits.py "$@"
