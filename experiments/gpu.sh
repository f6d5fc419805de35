#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, in under 15 minutes:
#
#   bash experiments/gpu.sh OUT_DIR                     all parts
#   bash experiments/gpu.sh OUT_DIR kernels tests       some parts, if a machine is lent for less
#
#   kernels   builds the kernels, checks them against fp64, times them    6 minutes at most
#   tests     pytest of the kernels, emulated on the CPU                      1
#   losses    20 steps in TF32 and bf16, and with the kernels, against fp32   2
#   speed     a training step by part, and the attention backends             1
#   train     the default run: its rates and minutes; a likelihood            5
#
# OUT_DIR gets report.txt, attention.json, metrics.json, samples.png and loss.png. The exit status
# is the number of parts that failed. PYTHON names another interpreter.
set -uo pipefail
mkdir -p "${1:?usage: gpu.sh OUT_DIR [part ..]}"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

kernels() {
    timeout 360 "$python" -m experiments.attention --budget 240 --json "$out/attention.json"
}

tests() {
    timeout 100 "$python" -m pytest -q tests/cuda
}

# A run of train.py in folder $1, its output in a file; the last lines are shown if it fails.
run() {
    timeout 100 "$python" train.py --eval_samples 0 --out_dir "$runs/$1" "${@:2}" \
        >"$runs/log.txt" 2>&1 || { tail -5 "$runs/log.txt"; return 1; }
}

# Heads of 64 (--heads 2), which the kernels are built for. The VAEs and one step of the prior are
# trained once, so all runs have the same weights at first; the learning rates rise in all 20 steps.
losses() {
    local start=(--init_from "$runs/start/ckpt.pt" --stage mmdit --steps 20 --warmup 1 --cooldown 0)
    run start --device cpu --procs 1 --bf16 off --heads 2 --text_vae_steps 50 \
        --image_vae_steps 50 --steps 1 &&
        run fp32 "${start[@]}" --device cpu --procs 1 --bf16 off &&
        run tf32 "${start[@]}" --device cuda --bf16 off --attention padded &&
        run bf16 "${start[@]}" --device cuda --bf16 on --attention padded &&
        run kernels "${start[@]}" --device cuda --bf16 on --attention cuda &&
        "$python" - "$runs" <<'PY'
import sys
from checkpoint import read_log

fp32, *others = ([{x: value for x, value in step.items() if x == "image" or x.startswith("text_")}
                  for step in read_log(f"{sys.argv[1]}/{name}/log.jsonl")]
                 for name in ("fp32", "tf32", "bf16", "kernels"))
worst = [max(abs(a[x] - b[x]) / a[x] for a, b in zip(fp32, other, strict=True) for x in a)
         for other in others]
print(f"{len(fp32)} steps, largest relative difference of a loss from fp32 (expect <= 1e-2): "
      "tf32 {:.1e}, bf16 {:.1e}, bf16 and kernels {:.1e}".format(*worst))
sys.exit(not max(worst) <= 1e-2)
PY
}

speed() {
    timeout 100 "$python" -m experiments.speed --device cuda
}

train() {
    timeout 420 "$python" train.py --device cuda --out_dir "$runs/default" &&
        cp "$runs"/default/{metrics.json,samples.png,loss.png} "$out" &&
        timeout 60 "$python" likelihood.py "there is a red circle." " the background is gray." \
            --checkpoint "$runs/default/ckpt.pt" --device cuda
}

all() {
    local failed=0
    for part in "$@"; do
        echo "== $part"
        local began=$SECONDS
        "$part" || { failed=$((failed + 1)); echo "== $part FAILED"; }
        echo "== $part took $((SECONDS - began)) s"
    done
    return $failed
}

[ $# -gt 0 ] || set -- kernels tests losses speed train
all "$@" 2>&1 | tee -a "$out/report.txt"
exit "${PIPESTATUS[0]}"
