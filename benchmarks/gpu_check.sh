#!/usr/bin/env bash
# Everything that only a GPU can show, into one folder: its tests, then the benchmarks at 224 and 380 pixels, then the
# report. Goes on past a failure and ends with a status that tells of it. `make gpu-check` calls it.
set -uo pipefail
bin=${1:?the folder with python and pytest} out=${2:?the folder to write into}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
failed=()

step() {
    local name=$1
    shift
    echo "== $name: $*"
    # A step that hangs leaves time for the others.
    timeout 600 "$@" 2>&1 | tee "$out/$name.txt" || failed+=("$name")
}

"$bin/python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu-check: PyTorch sees no CUDA device here" >&2
    exit 2
}
nvidia-smi >"$out/nvidia-smi.txt"
step tests "$bin/pytest" "$here/../tests" -m gpu -rs --durations=10
step throughput "$bin/python" "$here/throughput.py" --sizes 224 380 --batch 256 --sweep 128 512 --out "$out/throughput.jsonl"
step kernels "$bin/python" "$here/kernels.py" --batch 256 65536 --classes 1000 --out "$out/kernels.jsonl"
step loaders-224 "$bin/python" "$here/loaders.py" --size 224 --out "$out/loaders.jsonl"
step loaders-380 "$bin/python" "$here/loaders.py" --size 380 --out "$out/loaders.jsonl"
step report "$bin/python" "$here/report.py" "$out/throughput.jsonl" "$out/loaders.jsonl" --plot "$out/throughput.png"
echo "everything lies in $out"
if ((${#failed[@]})); then
    echo "gpu-check: failed: ${failed[*]}" >&2
    exit 1
fi
