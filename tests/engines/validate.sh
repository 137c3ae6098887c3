#!/bin/bash
# `make engines`: the job files of examples/ against what their engines themselves validate with, in
# environments of their own below .venv-engines: SkyPilot's parser, kubernetes-validate --strict,
# and shellcheck where it is installed. Needs PyPI.
#
#   bash tests/engines/validate.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/../.."
own=.venv-engines
for name in skypilot kubernetes-validate; do
  if [ ! -e "$own/$name/.installed" ]; then
    "${1:-python3}" -m venv "$own/$name"
    "$own/$name/bin/pip" install -q "$name"
    touch "$own/$name/.installed"
  fi
done
mkdir -p "$own/home" "$own/made"
HOME=$PWD/$own/home SKYPILOT_DISABLE_USAGE_COLLECTION=1 "$own/skypilot/bin/python" tests/engines/tasks.py "$own/made" \
  examples/skypilot/*.yaml examples/kubernetes/*.yaml
"$own/kubernetes-validate/bin/kubernetes-validate" --strict "$own"/made/*.yaml
if command -v shellcheck > /dev/null; then
  shellcheck examples/slurm/*.sbatch "$own"/made/*.sh
  echo "shellcheck: ok"
else
  for script in examples/slurm/*.sbatch "$own"/made/*.sh; do bash -n "$script"; done
  echo "SKIPPED: shellcheck is not installed; bash read the scripts"
fi
