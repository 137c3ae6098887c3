#!/usr/bin/env bash
# Every test that needs a GPU, with its output kept as it comes.
#
#   benchmarks/gpu_tests.sh [PYTEST OPTION ...]     TEST_DEVICE=cpu tries the tests without a GPU
#
# Output goes to the terminal and to gpu_tests.txt in $OUT, else benchmarks/results/on_gpu-DATE.
# A test that hangs ends after two minutes; one that fails does not end the rest.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${OUT:-$here/results/on_gpu-$(date -u +%F)}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
cd "$here/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mapfile -t files < <(grep -l "mark\.gpu" tests/test_*.py)
"${PYTHON:-python3}" -m pytest -m gpu -v --durations=20 -p no:cacheprovider -o timeout=120 \
  "${files[@]}" "$@" 2>&1 | tee "$folder/gpu_tests.txt"
exit "${PIPESTATUS[0]}"
