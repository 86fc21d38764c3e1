#!/usr/bin/env bash
# Every CPU benchmark, one after another, with nothing else running (three quarters of an hour on two cores):
#
#     bash benchmarks/run_cpu.sh [OUTDIR]        (default: benchmarks/results/cpu)
#
# OUTDIR gets <name>.json and logs/; avx2/ in it the same for the kernels at NOWAG_SIMD=avx2. Then
# render.py writes benchmarks/README.md and its plots. A part is left out by SKIP, a list of: kmeans
# kmeans_seed prune vq_gemv sparse_gemv layers model decode avx2 render. QUICK=1 only shows that
# everything runs: few cases and repeats, rendered into a copy, OUTDIR/README.md. PYTHON chooses the
# interpreter.
set -uo pipefail
[ $# -le 1 ] || { echo "usage: bash benchmarks/run_cpu.sh [OUTDIR]" >&2; exit 2; }
[ -z "${QUICK:-}" ] || [ $# -eq 1 ] || { echo "QUICK=1 needs an OUTDIR of its own" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-$here/results/cpu}"
out=$(cd "${1:-$here/results/cpu}" && pwd)
cd "$here/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD
failed=()

declare -A full=([prune]="--seconds 2" [vq_gemv]="--seconds 0.5" [sparse_gemv]="--seconds 0.5")
# 65536 entries take minutes without AVX-512.
declare -A narrow=([kmeans]="--only 4096x4096\ d=6 4096x4096\ d=4")
declare -A quick=(
    [kmeans]="--only 4096x4096\ d=4"
    [kmeans_seed]="--only q_proj\ d=4"
    [prune]="--seconds 0.02"
    [vq_gemv]="--seconds 0.02"
    [sparse_gemv]="--seconds 0.02"
    [model]="vq:d=4,bits=2,iters=5 --window 128 --windows 1 --rounds 1 --new-tokens 8"
    [decode]="--shape smollm2 --rounds 1 --new-tokens 8"
)

wanted() { [[ " ${SKIP:-} " != *" $1 "* ]]; }

# part LABEL COMMAND...: runs it with its output in OUTDIR/logs/LABEL.log.
part() {
    local label=$1 status
    shift
    local begin=$SECONDS
    mkdir -p "$(dirname "$out/logs/$label")"
    "$@" >"$out/logs/$label.log" 2>&1
    status=$?
    echo "$label: $([ $status -eq 0 ] && echo ok || echo "failed ($status)"), $((SECONDS - begin)) s"
    [ $status -eq 0 ] || failed+=("$label")
}

# bench NAME FOLDER: one benchmark, its figures in OUTDIR/FOLDER.
bench() {
    local options narrowed=
    [ -z "${2:-}" ] || narrowed=${narrow[$1]:-}
    [ -n "${QUICK:-}" ] && options=${quick[$1]:-} || options=${narrowed:-${full[$1]:-}}
    eval "options=($options)"
    part "$2$1" "$python" "benchmarks/bench_$1.py" "${options[@]}" --json "$out/$2$1.json"
}

render() {
    local readme=benchmarks/README.md
    [ -z "${QUICK:-}" ] || { cp "$readme" "$out/README.md" && readme=$out/README.md; }
    "$python" benchmarks/render.py "$out" --readme "$readme"
}

begin=$SECONDS
for name in kmeans kmeans_seed prune vq_gemv sparse_gemv layers model decode; do
    if wanted "$name"; then bench "$name" ""; else echo "$name: skipped"; fi
done
for name in kmeans prune vq_gemv sparse_gemv; do
    if wanted avx2 && wanted "$name"; then
        NOWAG_SIMD=avx2 bench "$name" avx2/
    else
        echo "avx2/$name: skipped"
    fi
done
if wanted render; then part render render; else echo "render: skipped"; fi

echo "$((SECONDS - begin)) s; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
