#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, in under 15 minutes:
#
#   bash experiments/gpu.sh OUT_DIR                     all parts
#   bash experiments/gpu.sh OUT_DIR kernels tests       some parts, if a machine gives less time
#
#   kernels   builds the CUDA extension, checks it against fp64, times it     8 minutes at most
#   tests     pytest of the attention backends                                1
#   losses    20 steps in TF32 and bf16, and with the kernels, against fp32   2
#   speed     a step by part, with and without torch.compile                  1
#   train     the default run: rates, minutes                                 4
#
# OUT_DIR gets report.txt, attention.json, metrics.json, samples.png, loss.png. The exit status is
# the number of parts that failed. PYTHON names another interpreter.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu.sh OUT_DIR [part ..]}" && cd "$1" && pwd)
shift
parts=("${@:-kernels tests losses speed train}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

kernels() {
    timeout 480 "$python" -m experiments.attention --json "$out/attention.json"
}

tests() {
    timeout 120 "$python" -m pytest -q tests/test_cuda_attention.py
}

losses() {
    # Heads of 64 (--heads 2), which the kernels are built for. The VAEs are trained once, so that
    # all runs start from the same weights; the learning rates rise slowly, because at their peak
    # even a difference of rounding grows from step to step.
    local flags="--eval_samples 0"
    "$python" train.py --heads 2 --device cpu --procs 1 --bf16 off --text_vae_steps 50 \
        --image_vae_steps 50 --steps 1 $flags --out_dir "$runs/start" >/dev/null || return
    local start="--init_from $runs/start/ckpt.pt --stage mmdit --steps 20 --warmup 1 --cooldown 0"
    "$python" train.py $start --device cpu --procs 1 --bf16 off $flags --out_dir "$runs/fp32" \
        >/dev/null || return
    "$python" train.py $start --device cuda --bf16 off $flags --out_dir "$runs/tf32" >/dev/null \
        || return
    "$python" train.py $start --device cuda --bf16 on $flags --out_dir "$runs/bf16" >/dev/null \
        || return
    "$python" train.py $start --device cuda --bf16 on --attention cuda $flags \
        --out_dir "$runs/kernels" >/dev/null || return
    "$python" - "$runs" <<'PY'
import sys
from checkpoint import read_log

logs = {name: read_log(f"{sys.argv[1]}/{name}/log.jsonl") for name in
        ("fp32", "tf32", "bf16", "kernels")}
terms = [x for x in logs["fp32"][0] if x == "image" or x.startswith("text_")]
worst = {name: max(abs(a[x] - b[x]) / a[x] for a, b in zip(logs["fp32"], log, strict=True)
                   for x in terms) for name, log in logs.items()}
print("20 steps, largest relative difference of a loss from fp32 (expect <= 1e-2):",
      ", ".join(f"{name} {value:.1e}" for name, value in worst.items() if name != "fp32"))
sys.exit(max(worst.values()) > 1e-2)
PY
}

speed() {
    timeout 120 "$python" -m experiments.speed --device cuda &&
        timeout 120 "$python" -m experiments.speed --device cuda --compile
}

train() {
    timeout 420 "$python" train.py --device cuda --out_dir "$runs/default" || return
    cp "$runs"/default/{metrics.json,samples.png,loss.png} "$out"
}

failed=0
for part in ${parts[@]}; do
    echo "== $part"
    began=$SECONDS
    "$part" || { failed=$((failed + 1)); echo "$part FAILED"; }
    echo "== $part: $((SECONDS - began)) s"
done 2>&1 | tee -a "$out/report.txt"
exit "$(grep -c ' FAILED$' "$out/report.txt")"
