#!/usr/bin/env bash
# On the ordinary machine: collects in one ignored folder what a lent GPU machine lacks and cannot fetch.
#
#   benchmarks/gpu/prepare.sh [--python 3.12] [--to .whl] [--recording FILE]
#
# The wheels (pure, or for Linux on x86-64) for that machine's Python, and the hopper recording of the SynthER stages.
# Fails where they and the working tree together are more than the 64 MiB that travel.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=3.12 to=.whl recording=../shared/data/rollouts/hopper_medium-replay-v4.hdf5
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 ;;
    --to) to=$2 ;;
    --recording) recording=$2 ;;
    *) echo "prepare.sh: there is no option $1; expected --python, --to, --recording." >&2; exit 2 ;;
  esac
  shift 2 || { echo "prepare.sh: the last option needs a value." >&2; exit 2; }
done

# What the stages import, less what that machine has (torch, jax, numpy, h5py, safetensors, transformers, pytest ...).
needed=(
  tyro docstring_parser typeguard                # the command line, and what it needs
  platformdirs
  gymnasium Farama-Notifications mujoco glfw     # mazes and hopper (gymnasium imports glfw to draw)
  diffusers importlib_metadata peft torchao      # the stages of fine-tuning (torchao: --optimiser adamw8bit)
  ogbench dm_control dm_env absl-py lxml         # OGBench's
)
mkdir -p "$to"
rm -f "$to"/*.whl
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${name}_x86_64")
done
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$python" \
  --implementation cp "${platforms[@]}" --constraint constraints.txt --dest "$to" "${needed[@]}"
# Of dm_control OGBench needs 3 of its 54 MiB: the rest are bodies and scenes of tasks of its own. Of torchao the
# optimiser needs no compiled kernels, and of mujoco nobody here its studio, a viewer, half of the wheel.
python3 - "$to" << 'PYTHON'
import sys, zipfile
from pathlib import Path

LEFT_OUT = {
    "dm_control": "dm_control/locomotion/ dm_control/suite/ dm_control/entities/ dm_control/manipulation/ "
    "dm_control/mujoco/testing/ dm_control/blender/",
    "mujoco": "mujoco/experimental/",
    "torchao": "torchao/_C_ torchao/prototype/spinquant/ torchao/_models/ torchao/csrc/ test/ benchmarks/",
}
for package, words in LEFT_OUT.items():
    left_out = tuple(words.split())
    (whole,) = Path(sys.argv[1]).glob(f"{package}-*.whl")
    small = whole.with_suffix(".small")
    with zipfile.ZipFile(whole) as read, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as written:
        for name in read.namelist():
            if name.startswith(left_out):
                continue
            content = read.read(name)
            if name.endswith(".dist-info/RECORD"):
                content = b"".join(line for line in content.splitlines(True) if not line.decode().startswith(left_out))
            written.writestr(read.getinfo(name), content)
    small.replace(whole)
PYTHON
if [ -f "$recording" ]; then
  mkdir -p "$to/recordings"
  cp "$recording" "$to/recordings/"
else
  echo "prepare.sh: $recording is not here: the SynthER stages cannot run." >&2
fi

limit=$((64 * 1024 * 1024))
carried=$(du -sb "$to" | cut -f1)
tree=$(git ls-files -co --exclude-standard -z | du -cb --files0-from=- | tail -1 | cut -f1)
(cd "$to" && find . -type f -printf '%9s  %P\n' | sort -k2)
mib() { awk "BEGIN { printf \"%.1f MiB\", $1 / 1048576 }"; }
echo "$to: $(mib "$carried"); the working tree: $(mib "$tree"); of $(mib $limit) that travel."
if [ $((carried + tree)) -gt $limit ]; then
  echo "prepare.sh: together they are $(mib $((carried + tree))): carry less, or ignore what need not travel." >&2
  exit 1
fi
