#!/usr/bin/env bash
# Everything that only a GPU can show: its tests, then the benchmarks at 224 and 380 pixels, then the report.
#
#     benchmarks/gpu_check.sh BIN OUT [STAGE ...]      # `make gpu-check` runs the first line of stages below
#
# BIN holds python and pytest; OUT gets at most 8 files, each written as its figures come. A stage that fails or takes
# longer than LIMIT seconds (default 900) leaves the others their turn, and the status tells of it. IMAGES (default
# OUT/images) keeps the JPEGs that all stages read, 1.8 GB. Nothing needs a network.
#
# Where time on the GPU is rationed, run a stage or two at a time, the most telling first; compiled kernels, layouts and
# images are kept between them. Minutes on 16 cores and one H100, estimated and never measured; the second line's stages
# run on request:
#
#     kernel-tests 2, tests 4, throughput-224 7, loaders 3, step-graph 3, throughput-380 6, kernels 2, report
#     decoder 4, batches 5, labels 3
#
# Without a network install with `pip install --no-deps --no-build-isolation -e .`. The kernels' two stages need no DALI.
set -uo pipefail
bin=${1:?the folder with python and pytest} out=${2:?the folder to write into}
shift 2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
images=${IMAGES:-$out/images}
usual=(kernel-tests tests throughput-224 loaders step-graph throughput-380 kernels report)
more=(decoder batches labels)
failed=()
export PYTHONUNBUFFERED=1

step() {
    local name=$1 began=$SECONDS
    shift
    {
        echo "== $name: $*"
        timeout -k 20 "${LIMIT:-900}" "$@"
    } 2>&1 | tee -a "$out/log.txt" || failed+=("$name")
    echo "== $name took $((SECONDS - began)) s" | tee -a "$out/log.txt"
}

# -v -s: a test that hangs is named, and the bounds that were measured are shown.
gpu_tests=(-m gpu -v -s -rs --durations=10 -o faulthandler_timeout=180)

throughput() {
    local file=$1
    shift
    step "$stage" "$bin/python" "$here/throughput.py" --data "$images" --rounds 3 --seconds 2 --out "$out/$file" "$@"
}

loaders() {
    local file=$1
    shift
    step "$stage $*" "$bin/python" "$here/loaders.py" --data "$images/train" --out "$out/$file" "$@"
}

"$bin/python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu-check: PyTorch sees no CUDA device here" >&2
    exit 2
}
if (($# == 0)); then
    set -- "${usual[@]}"
fi
{
    date
    nvidia-smi
    df -h /dev/shm "${TMPDIR:-/tmp}"
    "$bin/python" -m pip list
} >>"$out/log.txt" 2>&1
for stage; do
    case $stage in
    kernel-tests | tests | kernels | report) ;;
    *)
        [ -d "$images/val" ] || step images "$bin/python" -c "import sys; sys.path.insert(0, '$here')
from pathlib import Path
from throughput import synthetic
synthetic(Path('$images'), 16384, 0)"
        ;;
    esac
    case $stage in
    kernel-tests) step "$stage" "$bin/pytest" "$here"/../tests/kernels/test_kernels*.py "${gpu_tests[@]}" ;;
    tests) step "$stage" "$bin/pytest" "$here/../tests" "${gpu_tests[@]}" --ignore-glob='*/test_kernels*' ;;
    throughput-224) throughput throughput.jsonl --sizes 224 --batch 256 ;;
    throughput-380) throughput throughput.jsonl --sizes 380 --batch 128 ;;
    step-graph) throughput more.jsonl --sizes 224 --batch 256 --cuda-graphs step --no-stages \
        --names mealfast mealfast-replayed mealfast-cached ;;
    batches) throughput more.jsonl --sizes 224 --batch 256 --sweep 128 512 --no-stages --names mealfast-replayed ;;
    loaders)
        loaders loaders.jsonl --size 224 --rounds 3 --seconds 2
        loaders loaders.jsonl --size 380 --rounds 3 --seconds 2
        ;;
    decoder) loaders more.jsonl --sweep --names mealfast-dali --rounds 2 --seconds 1 ;;
    kernels) step "$stage" "$bin/python" "$here/kernels.py" --batch 256 65536 --classes 1000 --teachers 2 \
        --out "$out/kernels.jsonl" ;;
    labels) step "$stage" "$bin/python" "$here/label_cache.py" --device cuda --data "$images/train" --rounds 5 \
        --seconds 3 --out "$out/labels.jsonl" ;;
    report) step "$stage" "$bin/python" "$here/report.py" "$out/throughput.jsonl" "$out/loaders.jsonl" \
        --plot "$out/throughput.png" ;;
    *)
        echo "gpu-check: no stage $stage; they are: ${usual[*]} ${more[*]}" >&2
        exit 2
        ;;
    esac
done
echo "everything lies in $out"
if ((${#failed[@]})); then
    echo "gpu-check: failed: ${failed[*]}" >&2
    exit 1
fi
