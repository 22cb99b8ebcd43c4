#!/usr/bin/env bash
# Everything that only a GPU can show: its tests, then the benchmarks at 224 and 380 pixels, then the report.
#
#     benchmarks/gpu_check.sh BIN OUT [STAGE ...]      # `make gpu-check` runs `first`, `second` and the report
#
# BIN holds python and pytest; OUT gets at most 8 files, each written as its figures come. A stage that fails or takes
# longer than LIMIT seconds (default 540) leaves the others their turn, and the status tells of it. IMAGES (default
# /tmp/mealfast-images) keeps the JPEGs that all stages read, 1.8 GB; compiled code is kept in OUT. Nothing needs a
# network.
#
# Where time on the GPU is rationed, run them in the order of their worth. Minutes on 16 cores and one H100, estimated
# and never measured:
#
#     first   one slot of ten minutes, from the images to the figures that matter: smoke 1, loaders 1, kernels 1,
#             quick-224 3, quick-380 3 (teachers' layouts not tuned, no stages)
#     second  tests 4 (on as many workers as pytest-xdist has, if it is there), step-graph 3
#     third   throughput-224 7, throughput-380 6 (tuned, with stages), decoder 4, batches 5, labels 3
#
# Each of these stages can be named alone too. Without a network install with
# `pip install --no-deps --no-build-isolation -e .`. The kernels' stages need no DALI.
set -uo pipefail
bin=${1:?the folder with python and pytest} out=${2:?the folder to write into}
shift 2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
images=${IMAGES:-${TMPDIR:-/tmp}/mealfast-images}
first=(smoke loaders kernels quick-224 quick-380)
second=(tests step-graph)
third=(throughput-224 throughput-380 decoder batches labels)
failed=()
export PYTHONUNBUFFERED=1

step() {
    local name=$1 began=$SECONDS
    shift
    {
        echo "== $name: $*"
        timeout -k 20 "${LIMIT:-540}" "$@"
    } 2>&1 | tee -a "$out/log.txt" || failed+=("$name")
    echo "== $name took $((SECONDS - began)) s" | tee -a "$out/log.txt"
}

# -v -s: a test that hangs is named, and the bounds that were measured are shown.
gpu_tests=(-m gpu -v -s -rs --durations=10 -o faulthandler_timeout=180)
"$bin/python" -c 'import xdist' 2>/dev/null && parallel=(-n 4) || parallel=()

throughput() {
    local file=$1
    shift
    step "$stage" "$bin/python" "$here/throughput.py" --data "$images" --rounds 3 --seconds 2 --out "$out/$file" \
        --compile-cache "$out/compiled.bin" "$@"
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
stages=()
for name in "${@:-first second report}"; do
    for one in $name; do
        case $one in
        first) stages+=("${first[@]}") ;;
        second) stages+=("${second[@]}") ;;
        third) stages+=("${third[@]}") ;;
        *) stages+=("$one") ;;
        esac
    done
done
{
    date
    nvidia-smi
    df -h /dev/shm "${TMPDIR:-/tmp}"
    "$bin/python" -m pip list
} >>"$out/log.txt" 2>&1
for stage in "${stages[@]}"; do
    case $stage in
    smoke | tests | kernels | report) ;;
    *)
        [ -d "$images/val" ] || step images "$bin/python" -c "import sys; sys.path.insert(0, '$here')
from pathlib import Path
from throughput import synthetic
synthetic(Path('$images'), 16384, 0)"
        ;;
    esac
    case $stage in
    smoke) step "$stage" "$bin/pytest" "$here"/../tests/kernels/test_kernels_gpu.py "${gpu_tests[@]}" \
        -k 'host_sync or cuda_graph or launches' ;;
    tests) step "$stage" "$bin/pytest" "$here/../tests" "${gpu_tests[@]}" "${parallel[@]}" ;;
    quick-224 | quick-380) throughput throughput.jsonl --sizes "${stage#quick-}" --no-stages --no-tune-teachers \
        --batch "$([ "$stage" = quick-224 ] && echo 256 || echo 128)" --names baseline mealfast mealfast-replayed ;;
    throughput-224) throughput throughput.jsonl --sizes 224 --batch 256 ;;
    throughput-380) throughput throughput.jsonl --sizes 380 --batch 128 ;;
    step-graph) throughput more.jsonl --sizes 224 --batch 256 --cuda-graphs step --no-stages \
        --names mealfast mealfast-replayed mealfast-cached ;;
    batches) throughput more.jsonl --sizes 224 --batch 256 --sweep 128 512 --no-stages --names mealfast-replayed ;;
    loaders)
        loaders loaders.jsonl --size 224 --rounds 3 --seconds 2 --names bare-dali mealfast-dali torchvision
        loaders loaders.jsonl --size 380 --rounds 3 --seconds 2 --names bare-dali mealfast-dali
        ;;
    decoder) loaders more.jsonl --sweep --names mealfast-dali --rounds 2 --seconds 1 ;;
    kernels) step "$stage" "$bin/python" "$here/kernels.py" --batch 256 65536 --classes 1000 --teachers 2 --dtype bf16 \
        --out "$out/kernels.jsonl" ;;
    labels) step "$stage" "$bin/python" "$here/label_cache.py" --device cuda --data "$images/train" --rounds 5 \
        --seconds 3 --out "$out/labels.jsonl" ;;
    report) step "$stage" "$bin/python" "$here/report.py" "$out/throughput.jsonl" "$out/loaders.jsonl" \
        --plot "$out/throughput.png" ;;
    *)
        echo "gpu-check: no stage $stage; they are: first second third ${first[*]} ${second[*]} ${third[*]} report" >&2
        exit 2
        ;;
    esac
done
echo "everything lies in $out"
if ((${#failed[@]})); then
    echo "gpu-check: failed: ${failed[*]}" >&2
    exit 1
fi
