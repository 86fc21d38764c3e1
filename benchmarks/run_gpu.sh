#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in one command and under 8 minutes:
#
#     bash benchmarks/run_gpu.sh OUTDIR
#
# builds for the GPU that is there (offline, with the torch and transformers that are there), runs
# the tests marked cuda, compute-sanitizer on small shapes and the GPU benchmarks. A part is left out
# by SKIP, a list of: build tests sanitizer racecheck compress block gemv. QUICK=1 shortens the
# benchmarks. Short tables come last; OUTDIR gets result.json and logs/. PYTHON chooses the
# interpreter, BUDGET the seconds for everything (470): what has not begun by then is left out, and
# benchmarks write what they have after every shape.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash benchmarks/run_gpu.sh OUTDIR" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1/logs"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
quick=${QUICK:+--quick}
failed=()

wanted() { [[ " ${SKIP:-} " != *" $1 "* ]]; }

# part NAME LIMIT COMMAND...: runs it with its output in OUTDIR/logs/NAME.log.
part() {
    local name=$1 limit=$2 status left=$((${BUDGET:-470} - SECONDS))
    shift 2
    wanted "$name" || { echo "$name: skipped"; return 0; }
    [ "$left" -gt 5 ] || { echo "$name: no time left"; failed+=("$name"); return 0; }
    local begin=$SECONDS
    timeout "$((left < limit ? left : limit))" "$@" >"$out/logs/$name.log" 2>&1
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

# A module that does not import would only skip every test.
loads() {
    "$python" -c "import torch; from nowag_ext import _cuda; assert torch.cuda.is_available()"
}

# sanitizer TOOL TESTS: without torch's cache, which hides where an allocation ends.
sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not there"; return 0; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 9 \
        "$python" -m pytest -q -x tests/test_cuda.py -k "${2//$'\n'/ }"
}
# Every kernel at a small shape; graphs cannot be captured without the cache.
memcheck_tests="(normalize or pack or nm or sparse or (kmeans and 70-13)
    or (kmeans_iterations and 2000-300) or (kmeans_seed and 4-256) or (prune_select and shape0)
    or (gemv and 1-7) or vq_dequantize) and not graph"
# Those whose blocks or warps work together.
racecheck_tests="(kmeans_seed and 4-256) or (kmeans_iterations and 2000-300)
    or (vq_gemv and 576-1537 and dtype0) or (test_sparse and dtype2)"
export -f build build_with_pip loads sanitizer
export python

# Both ways of building are tried: pip needs setuptools new enough, CMake only itself.
part build 240 bash -c '(build_with_pip || build) && loads'
part tests 150 "$python" -m pytest -q tests/test_cuda.py
part sanitizer 90 bash -c 'sanitizer memcheck "$1"' - "${memcheck_tests//$'\n'/ }"
export PYTHONPATH=$PWD:$PWD/benchmarks
for bench in compress block gemv; do
    part "$bench" 120 "$python" "benchmarks/bench_gpu_$bench.py" $quick --json "$out/logs/$bench.json"
done
part racecheck 90 bash -c 'sanitizer racecheck "$1"' - "${racecheck_tests//$'\n'/ }"

"$python" - "$out" <<'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = {p.stem: json.loads(p.read_text()) for p in sorted((out / "logs").glob("*.json"))}
machine = next((part["machine"] for part in parts.values()), {})
result = {"machine": machine, "lines": [line for part in parts.values() for line in part["lines"]]}
(out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
PYTHON

for log in tests sanitizer racecheck gemv compress block; do
    [ -f "$out/logs/$log.log" ] && { echo; echo "--- $log"; tail -n 28 "$out/logs/$log.log"; }
done
echo
echo "$SECONDS s; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
