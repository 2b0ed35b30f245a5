#!/usr/bin/env bash
# On the GPU machine: installs the carried wheels, then runs the stages (README.md beside this file).
#
#   bash benchmarks/gpu/run.sh [--budget SECONDS] [--only STAGE,STAGE] [--restore FOLDER] [--rehearse]
#
# $OUT: where results go. $DIFFRL_GPU_WORK: where runs, data and compiled code stay, also for a second call on the same
# machine. $DIFFRL_GPU_WHEELS: what prepare.sh made; needed once a machine. $PYTHON: the interpreter with PyTorch.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${DIFFRL_GPU_WORK:-/tmp/diffrl-gpu}
wheels=${DIFFRL_GPU_WHEELS:-.whl}
python=${PYTHON:-python3}
out=${OUT:-benchmarks/gpu/out}
site=$work/site
mkdir -p "$work" "$out"

if compgen -G "$wheels/*.whl" > /dev/null; then
  listed=$(cd "$wheels" && ls ./*.whl)
  if [ "$listed" != "$(cat "$site.installed" 2> /dev/null)" ]; then
    rm -rf "$site"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
      --target "$site" "$wheels"/*.whl
    echo "$listed" > "$site.installed"
  fi
  if [ -d "$wheels/recordings" ]; then cp -r "$wheels/recordings" "$work/"; fi
elif [ ! -f "$site.installed" ]; then
  echo "run.sh: there are no wheels in $wheels: make them with benchmarks/gpu/prepare.sh, and carry the folder." >&2
  exit 2
fi

export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" benchmarks/gpu/drive.py --out "$out" --work "$work" --spent "$SECONDS" "$@"
