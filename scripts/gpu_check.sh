#!/bin/sh
# Usage: gpu_check.sh VENV_BIN REPORT, from the repository root.
# Runs the tests marked gpu and writes one report file.
bin=$1
report=$2
root=$(pwd)
mkdir -p build/tests "$(dirname "$report")"
(
  echo "# tbfast gpu-check, $(date -u '+%Y-%m-%d %H:%M UTC'), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null ||
    echo "no NVIDIA GPU on this machine: tests that need one are skipped"
  "$bin/python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  cd build/tests && "$bin/pytest" -c "$root/pyproject.toml" "$root/tests" -m gpu
) >"$report" 2>&1
status=$?
if [ "$status" -eq 5 ]; then # pytest's "nothing collected"
  echo "no test is marked gpu yet: nothing to check" >>"$report"
  status=0
fi
cat "$report"
echo "report: $report"
exit "$status"
