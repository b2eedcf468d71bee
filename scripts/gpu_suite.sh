#!/usr/bin/env bash
# Tests, checks and benchmarks on a GPU, from the source tree, with the python3, torch and CuPy that are there.
# Needs no network and installs nothing. Writes OUTDIR/DEVICE.json and the logs it was made from.
#
#   scripts/gpu_suite.sh OUTDIR [--tests SECONDS] [--check SECONDS] [--bench SECONDS] [-- BENCH OPTIONS...]
#
# SECONDS is the time limit of a part (default 270, 60 and 180, under nine minutes in all); 0 leaves it out.
# PYTHON names another interpreter. Exit status 0 if every part that ran did so to its end and found nothing wrong.
set -uo pipefail
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }

out=${1:-}
case $out in
    "" | -*) usage; [ "$out" = --help ]; exit ;;
esac
shift
declare -A limit=([tests]=270 [check]=60 [bench]=180)
while [ $# -gt 0 ]; do
    case $1 in
        --tests | --check | --bench) limit[${1#--}]=${2:?$1 needs a number of seconds}; shift 2 ;;
        --) shift; break ;;
        *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export TORCHINDUCTOR_COMPILE_THREADS=1 # its pool of processes outlives the tests, which then never end
python=${PYTHON:-python3}

parts=()
part() { # part NAME COMMAND...: its output to OUT/NAME.log; stopped as by Ctrl-C, so that pytest still reports
    local name=$1 start=$SECONDS status
    [ "${limit[$name]}" -gt 0 ] || return
    timeout --signal=INT --kill-after=10 "${limit[$name]}" "${@:2}" >"$out/$name.log" 2>&1 </dev/null
    status=$?
    parts+=("$name:$status:$((SECONDS - start)):${limit[$name]}")
    echo "$name: exit status $status after $((SECONDS - start)) s; the end of $name.log:"
    tail -n 12 "$out/$name.log"
}
# Most of their time is compilation: on several processes where pytest-xdist is installed. Each takes GPU memory.
"$python" -c 'import xdist' 2>/dev/null && workers=(-n $(($(nproc) < 14 ? $(nproc) : 14))) || workers=()
part tests "$python" -m pytest "${workers[@]}" -m gpu --require-gpu -p no:cacheprovider -q -rs --durations=10 \
    --junitxml="$out/tests.xml" tests
part check "$python" scripts/check.py --backend cuda
part bench "$python" scripts/bench.py --device cuda --json "$out/bench.json" --seconds $((limit[bench] - 15)) "$@"
"$python" scripts/gpu_report.py "$out" "${parts[@]}"
