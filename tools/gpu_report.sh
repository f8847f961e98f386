#!/usr/bin/env bash
# Measure everything on a new GPU, in two to three hours, into results/gpu: bash tools/gpu_report.sh
#
# Each step has a log and a mark when it is done; a second call goes on with what is missing or has failed. What is slow comes
# last. PYTHON chooses the interpreter. The table of crossings is written beside the others: copy its entry "triton" into
# taylorvit/ops/crossovers.json to let form="auto" use it.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
out=results/gpu
mkdir -p "$out"
failed=()
step() { # name, expected minutes, arguments of Python
    local name=$1 minutes=$2
    shift 2
    if [ -e "$out/$name.done" ]; then
        echo "$name: done before"
        return
    fi
    echo "$name: about $minutes min, see $out/$name.log"
    if "$python" "$@" > "$out/$name.log" 2>&1; then
        touch "$out/$name.done"
    else
        echo "$name: FAILED with code $?"
        failed+=("$name")
    fi
}
attention() {
    local limits=()
    [ -e "$out/limits.done" ] && limits=(--limits "$out/limits.json")
    step "$1" "$2" tools/bench_attention.py --device cuda --seconds 0.2 --min_rounds 30 --out "$out/$1" "${limits[@]}" "${@:3}"
}
model() { step "$1" "$2" tools/bench_model.py --device cuda --seconds 1 --out "$out/$1" "${@:3}"; }

ours=(taylor_direct_triton taylor_efficient_triton taylor_auto sdpa sdpa_cudnn sdpa_flash)
shapes=(--batch_size 16 --width 192 --head_dim 64 32 16 --num_tokens 197 577 1025 4097)
softmax=(taylorshift softmax_cudnn softmax_flash softmax)

step verify 45 -m pytest -q -m "" tests/test_gpu*.py tests/test_operators.py
step limits 2 tools/gpu_limits.py --out "$out/limits.json"
attention peers_forward 10 "${shapes[@]}" --memory
attention peers_training 15 "${shapes[@]}" --memory --pass training
attention layout_separate 3 "${shapes[@]}" --candidates "${ours[@]}" --layout separate --pass forward training
attention deterministic 3 "${shapes[@]}" --candidates "${ours[@]}" --pass training --deterministic
attention sweep 10 --batch_size 4 --width 384 --head_dim 16 32 64 128 --pass forward training --candidates "${ours[@]}" \
    --num_tokens 64 128 256 512 1024 2048 4096 8192 16384
step crossovers 8 tools/calibrate.py --device cuda --seconds 0.2 --out "$out/crossovers.json"
for mode in eager cuda_graph compile; do
    model "models_$mode" 8 --mode "$mode" --batch_size 16 --img_size 224 384 512 1024 --attention "${softmax[@]}" \
        --pass inference training --memory
    model "heads_$mode" 6 --mode "$mode" --batch_size 16 --img_size 224 512 1024 --num_heads 24 --attention "${softmax[@]}" \
        --pass inference training
done
model training_throughput 8 --batch_size best --img_size 224 512 --pass training --memory --attention taylorshift softmax

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
