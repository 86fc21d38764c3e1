#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in one command and under 8 minutes:
#
#     bash benchmarks/run_gpu.sh OUTDIR
#
# builds for the GPU that is there (offline, with the torch and transformers that are there), runs
# the tests marked cuda, compute-sanitizer on small shapes and the GPU benchmarks. A part is left out
# by SKIP, a list of: build tests sanitizer gemv compress block. QUICK=1 shortens the benchmarks.
# Short tables come last; OUTDIR gets the logs and result.json. PYTHON chooses the interpreter.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash benchmarks/run_gpu.sh OUTDIR" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
quick=${QUICK:+--quick}
failed=()

wanted() { [[ " ${SKIP:-} " != *" $1 "* ]]; }

# part NAME LIMIT COMMAND...: runs it with its output in OUTDIR/NAME.log.
part() {
    local name=$1 limit=$2 status
    shift 2
    wanted "$name" || { echo "$name: skipped"; return 0; }
    local begin=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: $([ $status -eq 0 ] && echo ok || echo "failed ($status)"), $((SECONDS - begin)) s"
    [ $status -eq 0 ] || failed+=("$name")
    return 0
}

build() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    [ -n "$capability" ] || { echo "nvidia-smi names no GPU"; return 1; }
    "$python" -m pybind11 --cmakedir >/dev/null || { echo "pybind11 is needed to build"; return 1; }
    cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DNOWAG_CUDA=1 \
        -DNOWAG_CUDA_ARCHS="$capability-real" -DPython_EXECUTABLE="$(command -v "$python")" &&
        cmake --build build/gpu &&
        cmake --install build/gpu --prefix nowag_ext
}

build_with_pip() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    NOWAG_CUDA=1 NOWAG_CUDA_ARCHS="$capability-real" \
        "$python" -m pip install --no-index --no-build-isolation --no-deps -e .
}

sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not there"; return 0; }
    "$tool" --error-exitcode 9 "$python" -m pytest -q -x tests/test_cuda.py \
        -k "normalize or pack or nm or sparse or (kmeans and 70-13) or (gemv and 1-7)"
}
export -f build build_with_pip sanitizer
export python

begin=$SECONDS
# Both ways of building are tried: pip needs setuptools new enough, CMake only itself.
part build 240 bash -c 'build_with_pip || build'
part tests 150 "$python" -m pytest -q -m cuda tests
part sanitizer 90 bash -c sanitizer
export PYTHONPATH=$PWD:$PWD/benchmarks
for bench in gemv compress block; do
    part "$bench" 120 "$python" "benchmarks/bench_gpu_$bench.py" $quick --json "$out/$bench.json"
done

"$python" - "$out" <<'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = {p.stem: json.loads(p.read_text()) for p in sorted(out.glob("*.json")) if p.stem != "result"}
machine = next((part["machine"] for part in parts.values()), {})
result = {"machine": machine, "lines": [line for part in parts.values() for line in part["lines"]]}
(out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
PYTHON

for log in tests sanitizer gemv compress block; do
    [ -f "$out/$log.log" ] && { echo; echo "--- $log"; tail -n 28 "$out/$log.log"; }
done
echo
echo "$((SECONDS - begin)) s; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
