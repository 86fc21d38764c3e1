#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in one command: bash benchmarks/run_gpu.sh OUTDIR.
# What it does, and the variables that it obeys: benchmarks/run_gpu.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/run_gpu.py" "$@"
