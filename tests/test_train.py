"""pytest tests/test_train.py"""
import argparse
import copy
import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import flow
import masks
import sample
import train
from conftest import TINY
from masks import IT2T, T2I, T2T

ROOT = Path(__file__).resolve().parents[1]


def args_for(*flags):
    args = train.parse([*TINY, *flags])
    args.bf16 = "off"
    return args


@pytest.fixture(scope="module")
def system():
    args = args_for()
    dataset = data.GeneratedScenes(0, 32, 64)
    return args, dataset, train.new_model(args, dataset)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def trained(out, *flags, procs):
    """The folder, in which one worker trained, this one, or several that were started."""
    argv = [*flags, "--procs", str(procs), "--out_dir", str(out)]
    status = train.main(argv) if procs == 1 else \
        subprocess.run([sys.executable, ROOT / "train.py", *argv], timeout=120).returncode
    assert status == 0
    return out


# ---- the run and what it leaves ----------------------------------------------------------------------------

def test_files_of_a_run(tiny):
    names = {".lock", "ckpt.pt", "ckpt.prev.pt", "log.jsonl", "metrics.json", "samples.png", "loss.png"}
    assert {p.name for p in tiny.iterdir()} == names
    steps = [(e["stage"], e["step"]) for e in log_of(tiny)]
    stages = {"text_vae": 3, "image_vae": 3, "mmdit": 4}.items()
    assert steps == [(stage, i) for stage, n in stages for i in range(1, n + 1)]
    metrics = json.loads((tiny / "metrics.json").read_text())
    assert set(metrics) == {"n", "seen", "heldout", "ceiling", "seconds", "config"} and metrics["n"] == 2
    attributes = {"count", "color", "shape", "size", "relation", "background"}
    for split in (metrics["seen"], metrics["heldout"]):
        assert set(split["t2i"]) == {"scene", "by_count"} | attributes
        assert set(split["t2i"]["by_count"]) == {"1", "2", "3"}
        assert set(split["it2t"]) == {"exact", "true", "vqa"} and "consistent" in split["t2t"]
    assert set(metrics["ceiling"]) == {"image", "text"}
    for name in ("samples.png", "loss.png"):
        assert np.asarray(Image.open(tiny / name)).std() > 5
    assert "interval" in evaluate.table(metrics)


def test_eval_only_rewrites_the_metrics(tiny, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for name in ("ckpt.pt", "log.jsonl"):
        (out / name).write_bytes((tiny / name).read_bytes())
    before = (out / "ckpt.pt").read_bytes()
    assert train.main([*TINY, "--eval_only", "--out_dir", str(out)]) == 0
    again, first = (json.loads((d / "metrics.json").read_text()) for d in (out, tiny))
    for part in ("seen", "heldout", "ceiling", "n"):
        assert again[part] == first[part]
    assert (out / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("joint", (False, True), ids=["frozen VAE", "joint"])
def test_resume_equals_the_uninterrupted_run(joint, tiny, tmp_path, monkeypatch):
    """Stopped in the middle of stage 2 and continued: weights, average and losses bit for bit."""
    out, straight, flags = tmp_path / "out", tiny, list(TINY)
    if joint:
        flags += ("--vae_lr_ratio 1 --vae_interval 2 1 --lambda_ref 0.1 --w_repa 0.5 --repa_layer 1 --repa_until 1 "
                  "--eval_samples 0").split()
        straight = tmp_path / "straight"
        assert train.main([*flags, "--out_dir", str(straight)]) == 0
    whole = sample.read_checkpoint(straight / "ckpt.pt")
    make, calls = train.Batches.make, []

    def interrupted(self, work):
        calls.append(work)
        if len(calls) == 3:                # two steps are done
            raise KeyboardInterrupt
        return make(self, work)
    monkeypatch.setattr(train.Batches, "make", interrupted)
    assert train.main([*flags, "--save_every", "1", "--out_dir", str(out)]) == 130
    monkeypatch.setattr(train.Batches, "make", make)
    assert sample.read_checkpoint(out / "ckpt.pt")["progress"]["mmdit"] == 2
    assert train.main([*flags, "--resume", "auto", "--out_dir", str(out)]) == 0
    again = sample.read_checkpoint(out / "ckpt.pt")
    for weights in ("model", "ema"):
        for part, state in whole[weights].items():
            for name, value in state.items():
                assert torch.equal(value, again[weights][part][name]), (weights, part, name)
    drop = {"seconds", "data_seconds"}
    strip = lambda entries: [{k: v for k, v in e.items() if k not in drop} for e in entries]
    assert strip(log_of(out)) == strip(log_of(straight))
    assert bool(whole["model"]["repa"]) == joint
    stage2 = [e for e in log_of(out) if e["stage"] == "mmdit"]
    assert [e.get("drift", 0) > 0 for e in stage2] == ([False, True, True, True] if joint else [False] * 4)
    assert ["recon" in e for e in stage2] == ([True, True, False, True] if joint else [False] * 4)
    if joint:                              # it rests in the third step: no closer, no farther
        assert stage2[1]["ref"] > 0 and all(torch.equal(whole["reference"][k], v) for k, v in
                                            again["reference"].items())


def test_resuming_keeps_the_flags_of_the_checkpoint(tiny, capsys):
    args = train.parse(["--out_dir", str(tiny), "--resume", "auto", "--lr", "0.5"])
    _, args = train.prepare(args)
    assert args.width == 32 and args.batch_size == 4 and args.lr == 0.5
    assert train.main(["--out_dir", str(tiny), "--resume", "auto", "--width", "64"]) == 2
    assert "--width 64" in capsys.readouterr().err


def test_the_text_vae_rests_in_its_interval(tiny, tmp_path):
    """Two steps on, two off: after two and after four the weights are the same, in three they are not."""
    weights = []
    for steps in (1, 2, 4, 5):
        out = tmp_path / str(steps)
        flags = f"--vae_lr_ratio 1 --vae_interval 2 2 --cooldown 0 --warmup 0 --steps {steps} --eval_samples 0"
        assert train.main([*TINY, *flags.split(), "--out_dir", str(out)]) == 0
        weights.append(sample.read_checkpoint(out / "ckpt.pt")["model"]["text_vae"]["encoder.final_layer.weight"])
    one, two, four, five = weights
    assert torch.equal(two, four) and not torch.equal(one, two) and not torch.equal(four, five)


def test_stage_2_from_scratch(tmp_path, capsys):
    out = tmp_path / "out"
    flags = [*TINY, "--text_vae_steps", "0", "--eval_samples", "0", "--out_dir", str(out)]
    assert train.main(flags) == 2 and "--vae_lr_ratio 1" in capsys.readouterr().err and not out.exists()
    assert train.main([*flags, "--vae_lr_ratio", "1"]) == 0
    assert {e["stage"] for e in log_of(out)} == {"image_vae", "mmdit"}


def test_a_torn_log_is_mended(tiny, tmp_path):
    """A line cut off costs neither the evaluation nor the picture; resuming drops it, and the steps that will be
    taken again."""
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    for name in ("loss.png", "metrics.json"):
        (out / name).unlink()
    lines = (out / "log.jsonl").read_text().splitlines(True)
    torn = "".join(lines) + lines[-1].replace('"step": 4', '"step": 5') + '{"stage": "mm'
    (out / "log.jsonl").write_text(torn)
    assert train.main([*TINY, "--eval_only", "--out_dir", str(out)]) == 0
    assert (out / "loss.png").exists() and (out / "metrics.json").exists()
    assert (out / "log.jsonl").read_text() == torn
    assert train.main([*TINY, "--resume", "auto", "--steps", "5", "--out_dir", str(out)]) == 0
    steps = [e["step"] for e in log_of(out) if e["stage"] == "mmdit"]
    assert steps == [1, 2, 3, 4, 5]


def test_a_run_of_text_alone(tmp_path, capsys):
    """No image VAE is trained, text alone is judged, and nobody draws with it."""
    out = tmp_path / "out"
    assert train.main([*TINY, "--tasks", "t2t:1,t2i:0", "--text_patch", "2", "--out_dir", str(out)]) == 0
    assert {e["stage"] for e in log_of(out)} == {"text_vae", "mmdit"}
    metrics, shown = json.loads((out / "metrics.json").read_text()), capsys.readouterr().out
    assert metrics["seen"].keys() == {"t2t"} and metrics["ceiling"].keys() == {"text"}
    assert metrics["seen"]["t2t"].keys() == {"consistent"}
    assert "t2t consistent" in shown and "t2i scene" not in shown and "ceiling image" not in shown
    assert sample.main(["t2i", "a circle", "--checkpoint", str(out / "ckpt.pt")]) == 2
    assert "was trained for t2t, not for t2i" in capsys.readouterr().err
    assert train.main(["--eval_only", "--stage", "all", "--procs", "1", "--eval_samples", "2", "--out_dir", str(out)]) == 0
    assert train.main(["--eval_only", "--block_len", "2", "--out_dir", str(out)]) == 2
    assert "--block_len 2 (was 4): --eval_only judges the model as" in capsys.readouterr().err
    assert train.main(["--eval_only", "--time_law", "uniform", "--out_dir", str(out)]) == 2
    assert "--time_law uniform (was logit_normal): --eval_only" in capsys.readouterr().err


@pytest.mark.parametrize("after", (1, 3, 5, 6, 8))
def test_resuming_in_any_stage_equals_the_uninterrupted_run(after, tiny, tmp_path, monkeypatch):
    """Weights and averages, bit for bit, when stopped after so many steps of stages of 3, 3 and 4."""
    out, step, taken = tmp_path / "out", train.Run.step, []

    def stopped(self, *args):
        taken.append(1)
        if len(taken) == after + 1:
            raise KeyboardInterrupt
        return step(self, *args)
    monkeypatch.setattr(train.Run, "step", stopped)
    flags = [*TINY, "--save_every", "1", "--eval_samples", "0", "--resume", "auto", "--out_dir", str(out)]
    assert train.main(flags) == 130
    monkeypatch.setattr(train.Run, "step", step)
    assert train.main(flags) == 0
    whole, again = (sample.read_checkpoint(d / "ckpt.pt") for d in (tiny, out))
    for weights in ("model", "ema"):
        for part, state in whole[weights].items():
            assert all(torch.equal(v, again[weights][part][k]) for k, v in state.items()), (weights, part)


@pytest.mark.parametrize("harm", ("cut", "flip"))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(harm, tiny, tmp_path, capsys):
    """And is not kept as such: after the next save both are whole."""
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    with open(out / "ckpt.pt", "r+b") as file:
        if harm == "cut":
            file.truncate(5000)
        else:
            file.seek(-20000, 2)
            byte = file.read(1)[0]
            file.seek(-20000, 2)
            file.write(bytes([byte ^ 4]))
    assert sample.read_checkpoint(out / "ckpt.prev.pt")["progress"]["mmdit"] == 0       # saved after stage 1b
    assert train.main([*TINY, "--resume", "auto", "--eval_samples", "0", "--out_dir", str(out)]) == 0
    error = capsys.readouterr().err
    assert f"warning: {out}/ckpt.pt" in error and "ckpt.prev.pt" in error
    sample.read_checkpoint(out / "ckpt.prev.pt")
    again, whole = (sample.read_checkpoint(d / "ckpt.pt")["model"]["mmdit"] for d in (out, tiny))
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


def test_a_full_disk_leaves_the_last_checkpoint(tiny, tmp_path, capsys):
    """A file may have half the size that a checkpoint needs."""
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    before = (out / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert train.main([*TINY, "--resume", "auto", "--steps", "6", "--out_dir", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "ckpt.pt.tmp: cannot be written" in error and "is as it was" in error
    assert (out / "ckpt.pt").read_bytes() == before and not (out / "ckpt.pt.tmp").exists()


def test_two_runs_do_not_share_a_folder(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print('held', flush=True); time.sleep(60)", str(out / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        argv = [*TINY, "--resume", "auto", "--steps", "6", "--eval_samples", "0", "--out_dir", str(out)]
        assert train.main(argv) == 2 and "another run is writing there" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    assert train.main(argv) == 0


def test_steps_without_a_number_are_skipped_and_after_too_many_the_run_stops(tmp_path, capsys, monkeypatch):
    out, forward, calls = tmp_path / "out", train.PriorStage.forward, []
    bad = {2, 3}

    def broken(self, batch, counts):
        calls.append(1)
        loss, terms = forward(self, batch, counts)
        return loss * (float("nan") if len(calls) in bad or len(calls) > 5 else 1), terms
    monkeypatch.setattr(train.PriorStage, "forward", broken)
    flags = [*TINY, "--eval_samples", "0", "--out_dir", str(out), "--save_every", "1"]
    assert train.main([*flags, "--steps", "5"]) == 0
    log = [e for e in log_of(out) if e["stage"] == "mmdit"]
    assert [e["skipped"] for e in log] == [0, 1, 2, 0, 0]
    weights = sample.read_checkpoint(out / "ckpt.pt")["model"]["mmdit"]
    assert all(torch.isfinite(v).all() for v in weights.values())
    assert train.main([*flags, "--resume", "auto", "--steps", "60"]) == 2
    error = capsys.readouterr().err
    assert f"{train.LOST} steps in a row, up to step 25, t2t samples" in error and "last good checkpoint" in error
    again = sample.read_checkpoint(out / "ckpt.pt")["model"]["mmdit"]
    assert all(torch.equal(v, again[k]) for k, v in weights.items())


def test_a_prior_never_trained_is_neither_judged_nor_sampled(tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main([*TINY, "--stage", "text_vae", "--out_dir", str(out)]) == 0
    assert train.main([*TINY, "--eval_only", "--stage", "all", "--out_dir", str(out)]) == 0
    assert not (out / "metrics.json").exists() and not (out / "samples.png").exists()
    capsys.readouterr()
    assert sample.main(["t2i", "a circle", "--checkpoint", str(out / "ckpt.pt")]) == 2
    assert "never trained" in capsys.readouterr().err


def test_an_interval_is_that_of_the_samples_behind_it():
    rates = dict(n=50, seen={"t2i": {"relation": 0.5, "color": 0.5}, "t2t": {}}, ceiling={"text": 0.5, "image": 0.5})
    lines = evaluate.table(rates).splitlines()
    show = lambda n: "[{:.3f}, {:.3f}]".format(*evaluate.wilson(0.5, n))
    for word, n in (("t2i relation", 100), ("t2i color", 150), ("ceiling text", 100), ("ceiling image", 50)):
        assert show(n) in next(line for line in lines if line.startswith(word)), word


def test_learning_rate_rises_stays_and_falls(tiny, tmp_path):
    assert train.main([*TINY, "--out_dir", str(tmp_path), "--stage", "mmdit", "--init_from",
                       str(tiny / "ckpt.pt"), "--eval_samples", "0", "--steps", "10", "--warmup", "0.2",
                       "--cooldown", "0.4", "--lr", "0.003"]) == 0
    share = [e["lr"] / 0.003 for e in log_of(tmp_path)]
    assert share == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])


def test_two_workers_equal_one(tmp_path):
    """In 20 steps of all three tasks and of the stages before, of samples that two cannot share evenly, the text VAE
    learning on, every task a pass of its own."""
    flags = [*TINY, "--steps", "20", "--batch_size", "5", "--eval_samples", "0", "--vae_lr_ratio", "0.5", "--accumulate"]
    one, two = (log_of(trained(tmp_path / str(procs), *flags, procs=procs)) for procs in (1, 2))
    for a, b in zip(one, two, strict=True):
        for name in set(a) - {"seconds", "data_seconds"}:
            assert a[name] == b[name] or abs(a[name] - b[name]) < 1e-5 * max(1, abs(a[name])), (a, b, name)


@pytest.mark.slow
@pytest.mark.parametrize("saved, resumed", [(1, 2), (2, 1)])
def test_another_number_of_workers_goes_on(saved, resumed, tiny, tmp_path):
    """Two of them through the kernels' operators."""
    for procs, more in ((saved, ["--save_every", "2"]), (resumed, ["--resume", "auto"])):
        attention = ("padded", "cuda")[procs - 1]
        trained(tmp_path / "out", *TINY, "--eval_samples", "0", "--attention", attention, *more, procs=procs)
        (tmp_path / "out" / "ckpt.pt").unlink()                # go on from the one before, of step 2
    assert [e["step"] for e in log_of(tmp_path / "out")[-2:]] == [3, 4]
    for a, b in zip(log_of(tiny), log_of(tmp_path / "out"), strict=True):
        for name in set(a) - {"seconds", "data_seconds", "stage"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (a["stage"], a["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT, signal.SIGKILL))
def test_signals_end_a_run_of_two_workers(number, tmp_path):
    """Within 10 seconds: SIGTERM and SIGINT with a checkpoint and a message; and nobody outlives a killed launcher."""
    out = tmp_path / "out"
    flags = [*TINY, "--steps", "100000", "--eval_samples", "0", "--out_dir", str(out)]
    flags[flags.index("--procs") + 1] = "2"
    with open(tmp_path / "errors", "w") as errors:
        run = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stderr=errors)
    while run.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    time.sleep(2)
    began = time.monotonic()
    run.send_signal(number)
    code = run.wait(timeout=10)
    with open(out / ".lock") as lock:
        while time.monotonic() - began < 10:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            pytest.fail("a worker lives on and holds the folder")
    assert sample.read_checkpoint(out / "ckpt.pt")["progress"]["image_vae"] == 3
    if number != signal.SIGKILL:
        assert code == 130
        assert "stopped; continue with --resume auto" in (tmp_path / "errors").read_text()
        steps = sample.read_checkpoint(out / "ckpt.pt")["progress"]["mmdit"]
        assert 0 < steps == log_of(out)[-1]["step"]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named(tmp_path):
    flags = [*TINY, "--steps", "100000", "--eval_samples", "0", "--out_dir", str(tmp_path / "out")]
    flags[flags.index("--procs") + 1] = "2"
    run = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (tmp_path / "out" / "log.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)
    os.kill(int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[1]), signal.SIGKILL)
    error = run.communicate(timeout=20)[1]
    assert run.returncode == 1 and "worker 1 was ended by SIGKILL" in error and "Traceback" not in error


@pytest.mark.slow
def test_an_error_of_one_worker_ends_all(tmp_path):
    """A disk that is full for the first; the message comes once."""
    flags = [*TINY, "--eval_samples", "0", "--out_dir", str(tmp_path / "out")]
    flags[flags.index("--procs") + 1] = "2"
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True, timeout=60,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and done.stderr.count("cannot be written") == 1 and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("ckpt*"))


@pytest.mark.slow
def test_sharded_equals_replicated(tmp_path):
    """FSDP2 on two workers: the losses of one that has everything; what it saved half way, one alone carries on, or
    two such workers, accumulating, compiled and through the kernels' operators."""
    def run(name, *more):
        flags = [*TINY, "--optimizer", "adamw", "--vae_lr_ratio", "0.5", "--eval_samples", "0", *more]
        return log_of(trained(tmp_path / name, *flags, procs=1 + ("--fsdp" in more)))
    replicated, fsdp = run("replicated"), run("fsdp", "--fsdp", "--save_every", "2")
    for name in ("sharded", "alone"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "fsdp" / "ckpt.prev.pt", tmp_path / name / "ckpt.pt")
    assert sample.read_checkpoint(tmp_path / "alone" / "ckpt.pt")["progress"]["mmdit"] == 2
    resumed = run("sharded", "--fsdp", "--resume", "auto", "--accumulate", "--attention", "cuda",
                  *["--compile"] * bool(shutil.which("g++"))), run("alone", "--resume", "auto")
    assert [len(r) for r in resumed] == [2, 2]
    few = "--tasks t2t:1,t2i:1 --micro_steps 1 --batch_size 2 --cfg_drop 0.5 --streams 2 --steps 8 --bf16 on".split()
    for a, b in zip(run("few", *few), run("few_sharded", "--fsdp", *few), strict=True):    # often without an image
        assert a.get("image", 0) == pytest.approx(b.get("image", 0), rel=1e-2)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-2), (a["stage"], a["step"])
    for logs in (fsdp, *resumed):
        for a, b in zip(replicated[-len(logs):], logs, strict=True):
            for name in set(a) - {"seconds", "data_seconds", "stage"}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), (a["stage"], a["step"], name)
    want, *others = (sample.read_checkpoint(tmp_path / name / "ckpt.pt") for name in
                     ("replicated", "fsdp", "sharded", "alone"))
    for got in others:
        for weights in ("model", "ema"):
            for part, state in want[weights].items():
                for name, value in state.items():
                    torch.testing.assert_close(value, got[weights][part][name], atol=2e-3, rtol=2e-3)


def test_accumulation_changes_nothing(tiny, tmp_path):
    out = tmp_path / "out"
    assert train.main([*TINY, "--out_dir", str(out), "--eval_samples", "0", "--accumulate"]) == 0
    for a, b in zip(log_of(tiny), log_of(out), strict=True):
        for name in set(a) - {"seconds", "data_seconds"}:
            assert a[name] == b[name] or abs(a[name] - b[name]) < 1e-5 * max(1, abs(a[name])), (a, b, name)


def test_init_from_at_another_size(tiny, tmp_path):
    out = tmp_path / "out"
    assert train.main([*TINY, "--init_from", str(tiny / "ckpt.pt"), "--image_size", "32", "48",
                       "--stage", "mmdit", "--eval_samples", "0", "--out_dir", str(out)]) == 0
    model = sample.load(out / "ckpt.pt")
    assert model.image_hw == (32, 48) and sample.generate_images(model, ["a"])[0].shape == (32, 48, 3)


# ---- batches -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", [T2T, T2I, IT2T], ids=masks.TASKS)
def test_batch_against_its_samples(system, task):
    """Every position of a batch, one by one, from the sample's own tokens, picture, cut and times."""
    args, dataset, model = system
    b = train.Batches(args, dataset, model).make([(task, k) for k in range(40)])
    starts, place = np.cumsum([0, *b.lengths]), {"text": 0, "image": 0}
    texts = [b.ids[s:e].tolist() for s, e in zip(starts, starts[1:])]
    owner = lambda source: int(np.searchsorted(starts, source, side="right")) - 1
    seen_drop = seen_cut = seen_told = False
    for s, k in enumerate(range(40)):
        item = getattr(dataset, masks.TASKS[task])(k)
        mine = (b.layout.sample == s).nonzero()[:, 0]
        segments = "".join(masks.SEGMENTS[x] for x in b.layout.segment[mine])
        text = model.ids(item if task == T2T else item[0] if task == T2I else item[2], end=True)
        prompt = model.ids(item[0], end=False) if task == IT2T else []
        draw = data.rng(0, k, data.DROP)
        drop = draw.random() < args.cfg_drop
        seen_drop |= drop
        n, i, bl = len(text), 16, args.block_len
        told = task == T2I and draw.random() < args.aux_caption
        seen_told |= told and not drop
        cut = int(draw.integers(text.index(model.tokenizer.end) + 1)) if task == T2T else 0
        skip = cut // bl * bl if task == T2T and draw.random() < 0.5 else 0
        whole = {T2T: "C" * (n - bl) + "N" * (n - skip), T2I: "C" * n + "I" * i + "N" * n * told,
                 IT2T: "P" * len(prompt) + "I" * i + "C" * (n - bl) + "N" * n}
        short = {T2T: "N" * (n - skip), T2I: "I" * i, IT2T: "N" * n}
        assert segments == (short if drop else whole)[task]
        for pos in mine.tolist():
            segment, t = int(b.layout.segment[pos]), float(b.t[b.t_index[pos]])
            if segment == masks.I:
                j = place["image"]
                place["image"] += 1
                assert bool(b.loss_image[j]) == (task == T2I) and (t > 0) == (task == T2I)
                continue
            j = place["text"]
            place["text"] += 1
            source, index = int(b.source[j]), int(b.layout.row[pos])
            where = owner(source)
            if segment == masks.P:
                assert texts[where] == prompt and source - starts[where] == index and t == 0
                continue
            index -= len(prompt)
            assert texts[where] == text and source - starts[where] == index
            if segment == masks.C:
                assert t == 0 and not b.noisy[j] and not b.eps_text[j].any()
                continue
            known = index < cut and index // bl == cut // bl
            seen_cut |= known
            assert index >= skip and bool(b.noisy[j]) == (not known) == (t > 0)
    assert seen_drop and (seen_cut or task != T2T) and (seen_told or task != T2I)
    text = [0, 0, 0]
    text[task] = int(b.noisy.sum()) * 16
    assert b.counts()[:4] == [int(b.loss_image.sum()) * 32, *text]


@pytest.mark.parametrize("patch", (1, 2, 4))
@pytest.mark.parametrize("mode", sample.FIRST_BLOCK)
def test_a_cut_text_is_what_sampling_makes_of_its_prefix(mode, patch):
    """Tokens before the cut of a training text: those that generate_text encodes; what end tokens fill up stays clean
    and bears no loss, and behind the cut comes the text."""
    args = args_for("--text_patch", str(patch), "--first_block", mode, "--cfg_drop", "0")
    dataset = data.GeneratedScenes(0, 32, 64)
    model = train.new_model(args, dataset)
    batches, end, seen = train.Batches(args, dataset, model), model.tokenizer.end, set()
    work = [(T2T, k) for k in range(30)]
    b = batches.make(work)
    assert model.first_block == mode and not b.noisy.all()
    for s, (_, k) in enumerate(work):
        draw = data.rng(0, k, data.DROP)
        draw.random()
        ids, cut, filling = batches.cut_text(dataset.t2t(k), draw)
        draw = data.rng(0, k, data.DROP)
        draw.random()
        told = model.tokenizer.encode(dataset.t2t(k))
        at = int(draw.integers(len(told) + 1))
        prefix, length, _ = model.align(told[:at], at)
        assert ids[:cut * patch] == prefix and length == cut * patch
        assert ids[cut * patch:][:len(told) - at] == told[at:] and set(ids[cut * patch + len(told) - at:]) == {end}
        whole = patch * (args.block_len if mode in ("left", "right") else 1)
        assert length % whole == 0 and 0 <= length - at < whole
        ends = [end] * (length - at)
        assert prefix == (told[:at] + ends if mode == "right" else ends + told[:at])
        hold = {i // patch for i in range(length) if prefix[i] == end}             # latents with an end token
        assert set(filling) == (hold if mode != "repaint" else set())
        mine = b.layout.sample == s
        noise = mine & (b.layout.segment == masks.N)
        index, t = b.layout.row[noise], b.t[b.t_index[noise]]
        inside = (index < cut) & (b.layout.block[noise] == cut // args.block_len)
        clean = torch.isin(index, torch.tensor(filling)) | (inside & (mode != "repaint"))
        assert torch.equal(t == 0, clean)
        seen |= {word for word, there in (("filling", filling), ("inside", inside.any())) if there}
    assert ("filling" in seen) == (mode in ("left", "right") or mode == "clean" and patch > 1)
    assert "inside" in seen or mode in ("left", "right")
    told = model.tokenizer.encode(dataset.t2t(0))              # all of it may be given: then it ends
    ids, cut, _ = batches.cut_text(dataset.t2t(0), argparse.Namespace(integers=lambda n: n - 1))
    prefix, length, _ = model.align(told, len(told))
    assert cut * patch == length and ids[:len(prefix)] == prefix and {*ids[len(prefix):]} == {end}


def test_sample_k_does_not_depend_on_its_batch(system):
    args, dataset, model = system
    batches = train.Batches(args, dataset, model)
    for task in (T2T, T2I, IT2T):
        all_, tail = (batches.make([(task, k) for k in r]) for r in (range(6), range(4, 6)))
        mine = all_.layout.sample >= 4
        text, tail_text = mine[all_.layout.segment != masks.I], tail.layout.segment != masks.I
        assert torch.equal(all_.eps_text[text], tail.eps_text)
        assert torch.equal(all_.t[all_.t_index[mine]], tail.t[tail.t_index])
        assert torch.equal(all_.eps_image[mine[all_.layout.segment == masks.I]], tail.eps_image)
        torch.testing.assert_close(all_.z_image[mine[all_.layout.segment == masks.I]], tail.z_image)


@pytest.mark.parametrize("task", [T2T, IT2T], ids=["t2t", "it2t"])
def test_sampling_asks_what_training_taught(system, task):
    """The velocity of a block of noise in a training batch is that of the same noise behind the same context,
    cached as in sampling."""
    args, dataset, model = system
    stage, b = stage_and_batch(system, task, "--cfg_drop", "0")
    passes = []
    stage.mmdit.register_forward_hook(lambda module, inputs, out: passes.append((inputs, out[0])))
    with torch.no_grad():
        stage(b, b.counts())
        (text, image, *_), taught = passes[0]
        layout = b.layout
        v = torch.zeros_like(text).masked_scatter_(b.noisy[:, None], taught)
        is_text = layout.segment != masks.I
        mine = layout.sample == 1
        noise = mine & (layout.segment == masks.N)
        block = int(layout.block[noise].unique()[1])
        now, past = noise & (layout.block == block), mine & (layout.segment != masks.N)
        past &= (layout.segment != masks.C) | (layout.block < block)
        context = sample.Context(dataclasses.replace(model, mmdit=stage.mmdit))
        context.add(text[past[is_text]], image[past[~is_text]], layout.select(past))
        query = layout.select(now)
        times = b.t[b.t_index[now]]
        got, _ = context.velocity(text[now[is_text]], image[:0], times.tolist(), torch.arange(len(times)), query,
                                  context.plan(query))
    moving = b.noisy[now[is_text]]
    assert len(times) == args.block_len and moving.any()
    torch.testing.assert_close(got[moving], v[now[is_text]][moving], atol=1e-4, rtol=1e-4)


def test_times_shift_with_the_size_of_each_image(system, monkeypatch):
    """Not with that of a larger one in the batch: of two images, the second here half as high."""
    args, dataset, model = system
    batches = train.Batches(args, dataset, model)
    z = batches.image_latents([0, 1])
    monkeypatch.setattr(batches, "image_latents", lambda index: [z[0], z[1][:2]])    # 16 and 8 positions
    work = [(T2I, 0), (T2I, 1)]
    plain = batches.make(work)
    monkeypatch.setattr(flow, "image_shift", lambda dims: 2.0 if dims > 8 * 32 else 1.0)
    shifted = batches.make(work)
    large = (plain.layout.segment == masks.I) & (plain.layout.sample == 0)
    t, moved = (b.t[b.t_index] for b in (plain, shifted))
    torch.testing.assert_close(moved[large], flow.shift_time(t[large], 2.0))
    assert torch.equal(moved[~large], t[~large]) and int(large.sum()) == 16


def test_a_text_has_a_time_for_each_block_or_one(system):
    def times(*flags):
        b = train.Batches(args_for("--cfg_drop", "0", *flags), *system[1:]).make([(IT2T, k) for k in range(4)])
        noisy = b.layout.segment == masks.N
        return [b.t[b.t_index][noisy & (b.layout.sample == s)].unique() for s in range(4)]
    assert all(len(t) > 1 for t in times()) and all(len(t) == 1 for t in times("--time_per", "sample"))
    normal = torch.cat(times("--text_loc", "0.5", "--time_scale", "2")).logit().sub(0.5).div(2)
    even = torch.tensor([statistics.NormalDist().cdf(x) for x in normal.tolist()])
    torch.testing.assert_close(torch.cat(times("--time_law", "uniform")), even, atol=1e-4, rtol=0)
    uniform = train.new_model(args_for("--time_law", "uniform", "--image_loc", "2"), system[1])
    assert uniform.image_loc == 0 and train.new_model(args_for("--image_loc", "2"), system[1]).image_loc == 2


def test_tasks_of_a_step_follow_the_ratios():
    args = args_for("--tasks", "t2t:1,t2i:2,it2t:0")
    picked = [train.pick_task(args, (m + 0.37) / 300) for m in range(300)]
    assert picked.count(T2T) == 100 and picked.count(T2I) == 200
    assert train.pick_task(args, 0.9999999) == T2I


# ---- gradients ---------------------------------------------------------------------------------------------

def stage_and_batch(system, task, *flags):
    args, dataset, model = system
    args = args_for("--vae_lr_ratio", "1", "--lambda_vae", "0", *flags)
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    for p in model.mmdit.parameters():
        p.data.normal_(std=0.1)
    batch = train.Batches(args, dataset, model).make([(task, k) for k in range(4)])
    return train.PriorStage(model, args), batch


def test_image_loss_reaches_what_processes_the_caption_but_not_its_latents(system):
    """L_image alone: hidden states of C pass its gradient on; clean latents are detached where they enter."""
    stage, b = stage_and_batch(system, T2I, "--w_text", "0", "--cfg_drop", "0")
    loss, _ = stage(b, b.counts())
    loss.backward()
    assert stage.mmdit.txt_in.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in stage.text_vae.parameters())


def test_text_loss_reaches_the_encoder_through_the_noisy_copy(system):
    stage, b = stage_and_batch(system, T2T)
    loss, _ = stage(b, b.counts())
    loss.backward()
    assert stage.text_vae.encoder.final_layer.weight.grad.abs().sum() > 0


def test_ddp_finds_every_parameter_whatever_the_task(system):
    """Else it refuses the next step."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for task in (T2T, T2I, IT2T):
            stage, b = stage_and_batch(system, task, "--vae_lr_ratio", "0")
            wrapped = DistributedDataParallel(stage)
            for _ in range(2):
                wrapped(b, b.counts())[0].backward()
    finally:
        dist.destroy_process_group()


def test_clean_latents_pass_no_gradient_on(system, monkeypatch):
    stage, b = stage_and_batch(system, T2T, "--cfg_drop", "0")
    latents, seen = stage.text_vae.latents, []
    monkeypatch.setattr(stage.text_vae, "latents", lambda *x: seen.append(latents(*x)) or seen[-1])
    loss, _ = stage(b, b.counts())
    (grad,) = torch.autograd.grad(loss, seen[-1])                                # (Lv, Dz)
    learns = torch.zeros(len(grad), dtype=torch.bool)
    learns[b.source[b.noisy]] = True                       # the others are read as clean context alone
    assert set(b.source[~b.noisy].tolist()) - set(b.source[b.noisy].tolist())
    assert grad[learns].any(-1).all() and not grad[~learns].any()


def test_answers_weigh_more(system):
    args, dataset, model = system
    stage = train.PriorStage(copy.deepcopy(model), args_for("--w_answer", "3"))
    b = train.Batches(args, dataset, model).make([(task, k) for task in (T2T, IT2T) for k in range(4)])
    _, told, _, answered = b.counts()[:4]
    loss, terms = stage(b, b.counts())
    want = (told * terms["text_t2t"] + 3 * answered * terms["text_it2t"]) / (told + 3 * answered)
    torch.testing.assert_close(terms["text"], want)
    torch.testing.assert_close(loss.detach(), want)              # w_text, lambda_fm 1 and a frozen VAE
    assert told and answered and terms["text_t2t"] != terms["text_it2t"]


def test_it2t_has_no_image_loss_and_frozen_vae_no_gradient(system):
    stage, b = stage_and_batch(system, IT2T, "--vae_lr_ratio", "0")
    loss, terms = stage(b, b.counts())
    loss.backward()
    assert "image" not in terms and terms["text"] > 0
    assert all(not p.requires_grad for p in stage.text_vae.parameters())


def test_repa_and_reference_terms(system):
    stage, b = stage_and_batch(system, T2I, "--w_repa", "0.5", "--repa_layer", "1", "--lambda_ref", "1")
    loss, terms = stage(b, b.counts())
    assert 0 < terms["repa"] < 2 and abs(float(terms["ref"])) < 1e-6 and terms["drift"] < 1e-12
    stage.step, stage.steps = 9, 10
    assert "repa" not in stage(b, b.counts())[1]


def test_the_loss_of_stage_2_is_its_equation(system):
    """Eq. 3.18, of a text VAE that has left its reference; and the rates of its groups."""
    weights = dict(beta=0.2, lambda_mask=0.3, lambda_vae=0.4, lambda_fm=2.0, w_text=0.6, lambda_ref=0.7, w_repa=0.8)
    stage, b = stage_and_batch(system, T2I, "--aux_caption", "1", "--vae_lr_ratio", "0.25", "--cfg_drop", "0", "--repa_layer", "1",
                               *(word for name, w in weights.items() for word in (f"--{name}", str(w))))
    for p in stage.text_vae.parameters():
        p.data.add_(0.01)
    loss, t = stage(b, b.counts())
    w = argparse.Namespace(**weights)
    assert min(t[name] for name in ("recon", "mask", "image", "text", "repa", "ref", "drift")) > 0 and t["log_q"]
    torch.testing.assert_close(loss.detach(), w.lambda_vae * (t["recon"] + w.beta * t["log_q"] + w.lambda_mask * t["mask"])
                               + w.lambda_fm * (t["image"] + w.w_text * t["text"] + w.w_repa * t["repa"]) + w.lambda_ref * t["ref"])
    adam, muon = train.optimizers_for(stage.args, stage, 0.1, True)
    vae = {id(p) for p in stage.text_vae.parameters()}
    for group in adam.param_groups + muon.param_groups:
        of_vae = {id(p) in vae for p in group["params"]}
        assert len(of_vae) == 1 and group["lr"] == (0.025 if of_vae == {True} else 0.002 if group in muon.param_groups else 0.1)


@pytest.mark.parametrize("task", [T2T, T2I, IT2T], ids=masks.TASKS)
def test_a_batch_whose_conditions_are_all_dropped(system, task):
    stage, b = stage_and_batch(system, task, "--cfg_drop", "1", "--vae_lr_ratio", "0")
    stage.args.cfg_drop = 1.0
    b = train.Batches(stage.args, system[1], system[2]).make([(task, k) for k in range(4)])
    loss, _ = stage(b, b.counts())
    loss.backward()
    assert torch.isfinite(loss) and loss > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", [T2T, T2I, IT2T], ids=masks.TASKS)
def test_one_batch_overfits(system, task):
    args, dataset, model = system
    args = args_for("--cfg_drop", "0")
    model = copy.deepcopy(model)
    stage = train.PriorStage(model, args)
    b = train.Batches(args, dataset, model).make([(task, k) for k in range(4)])
    optimizers = train.optimizers_for(args, stage, args.lr, True)
    name, losses = "image" if task == T2I else "text", []
    for _ in range(200):
        loss, terms = stage(b, b.counts())
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        losses.append(float(terms[name]))
    assert losses[-1] < 0.25 * losses[0], (losses[0], losses[-1])


# ---- bad input: one line, status 2, nothing touched --------------------------------------------------------

def fails(argv, capsys, *words):
    assert train.main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("train.py: ") and "\n" not in err, err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize("flags, words", [
    (["--aux_caption", "2"], ["--aux_caption 2", "between 0 and 1"]),
    (["--questions", "-1"], ["--questions -1"]),
    (["--w_answer", "0"], ["--w_answer 0", "above 0"]),
    (["--tasks", "t2t:-1,t2i:2"], ["--tasks", "at least 0"]),
    (["--tasks", "t2t:0,t2i:0,it2t:0"], ["not all 0"]),
    (["--tasks", "t2v:1"], ["t2v", "t2t, t2i, it2t"]),
    (["--tasks", "often"], ["--tasks 'often'"]),
    (["--tasks", "t2t:1,t2t:2"], ["named twice"]),
    (["--lr", "nan"], ["--lr nan", "above 0"]),
    (["--muon_lr", "inf"], ["--muon_lr inf"]),
    (["--ema", "2"], ["--ema 2.0", "share"]),
    (["--beta", "-1"], ["--beta -1.0"]),
    (["--text_loc", "nan"], ["--text_loc nan"]),
    (["--guidance", "inf"], ["--guidance inf"]),
    (["--layers", "0"], ["--layers 0", "1 to 1024"]),
    (["--heads", "0"], ["--heads 0"]),
    (["--image_vae_levels", "1", "0"], ["--image_vae_levels 0"]),
    (["--image_size", "100000"], ["--image_size", "pixels"]),
    (["--w_repa", "0.5", "--repa_layer", "2"], ["--repa_layer 2", "--layers 2"]),
    (["--vae_logsnr", "nan"], ["--vae_logsnr nan"]),
    (["--procs", "5"], ["5 workers", "--batch_size"]),
    (["--stage", "mmdit"], ["--stage mmdit", "text_vae", "--init_from"]),
    (["--aspect"], ["--aspect", "--data"]),
    (["--steps", "0"], ["--steps 0", "expected 1 to"]),
    (["--batch_size", "-3"], ["--batch_size -3"]),
    (["--scale", "0"], ["--scale"]),
    (["--vae_logsnr", "loud"], ["--vae_logsnr loud", "learned"]),
    (["--image_size", "33"], ["33"]),
    (["--image_size", "16"], ["24 x 24"]),
    (["--image_size", "4", "--downsample", "4", "--data", "."], ["--image_size 4", "8 pixels"]),
    (["--fsdp"], ["--fsdp", "adamw"]),
    (["--attention", "flex"], ["--attention flex", "padded"]),
    (["--seq_len", "8"], ["--seq_len 8", "raise it to"]),
    (["--first_block", "right", "--block_len", "128"], ["--seq_len 128", "two blocks", "--block_len 128"]),
    (["--text_vae_steps", "0"], ["--vae_lr_ratio 1"]),
    (["--vae_interval", "0", "5"], ["--vae_interval 0"]),
    (["--repaint_share", "2"], ["--repaint_share 2"]),
    (["--image_size", "32", "32", "32"], ["--image_size"]),
    (["--data", "/no/such/folder"], ["/no/such/folder"]),
    (["--text", "/no/such/file.txt"], ["/no/such/file.txt"]),
    (["--init_from", "/no/such/ckpt.pt"], ["/no/such/ckpt.pt", "train.py"]),
    (["--width", "30", "--heads", "4"], ["--width 30"]),
    (["--eval_only"], ["ckpt.pt"]),
])
def test_bad_flags(flags, words, tmp_path, capsys):
    out = tmp_path / "out"
    fails([*TINY, *flags, "--out_dir", str(out)], capsys, *words)
    assert not out.exists()


def test_every_number_is_checked():
    args = train.parse([])
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "streams":            # which argparse checks
            with pytest.raises(ValueError, match=f"--{name} nan"):
                train.check(argparse.Namespace(**vars(args) | {name: float("nan")}))
    train.check(args)


def test_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--batch_sise", "3"])
    assert exit_.value.code == 2 and "did you mean --batch_size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--batch", "3"])           # no abbreviations


def test_an_existing_run_is_not_overwritten(tiny, capsys):
    before = {p.name: p.read_bytes() for p in tiny.iterdir()}
    fails([*TINY, "--out_dir", str(tiny)], capsys, "--resume auto")
    assert {p.name: p.read_bytes() for p in tiny.iterdir()} == before
    for folder in ("", str(tiny / "log.jsonl")):
        fails([*TINY, "--out_dir", folder], capsys, "--out_dir", "expected a folder")


def test_a_finished_run_says_so_and_trains_no_more(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    assert train.main(["--out_dir", str(out), "--resume", "auto", "--eval_samples", "0", "--procs", "1"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert (out / "log.jsonl").read_bytes() == (tiny / "log.jsonl").read_bytes()


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_while_evaluating_stops_at_once(tiny, tmp_path, capsys, monkeypatch, number):
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    monkeypatch.setattr(train.evaluate, "evaluate", lambda *_: (signal.raise_signal(number), time.sleep(9)))
    before = signal.getsignal(number)
    argv = ["--out_dir", str(out), "--resume", "auto", "--eval_samples", "1", "--procs", "1"]
    assert train.main(argv) == 130 and signal.getsignal(number) == before
    assert "--resume auto" in capsys.readouterr().err


def test_bad_checkpoints(tiny, tmp_path, capsys):
    whole, out = (tiny / "ckpt.pt").read_bytes(), tmp_path / "out"
    bad = tmp_path / "bad.pt"
    for content in (whole[:len(whole) // 2], b"", b"hello"):
        bad.write_bytes(content)
        fails([*TINY, "--init_from", str(bad), "--out_dir", str(out)], capsys, str(bad))
    torch.save({"weights": torch.zeros(3)}, bad)
    fails([*TINY, "--init_from", str(bad), "--out_dir", str(out)], capsys, "not a checkpoint of this program")
    torch.save(Path("x"), bad)
    fails([*TINY, "--init_from", str(bad), "--out_dir", str(out)], capsys, str(bad))
    checkpoint = sample.read_checkpoint(tiny / "ckpt.pt")
    checkpoint["config"]["mmdit"]["width"] = 64
    torch.save(checkpoint, bad)
    fails([*TINY, "--init_from", str(bad), "--out_dir", str(out)], capsys, "another architecture")
    assert not out.exists()


def picture_folder(path, texts):
    path.mkdir()
    rows = []
    for i, text in enumerate(texts):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


def test_bad_data(tmp_path, capsys):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    fails([*TINY, "--data", str(empty), "--out_dir", str(out)], capsys, "empty")
    folder = picture_folder(tmp_path / "pictures", ["a cat", "a dog"])
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "../x.png", "text": "a cat"}))
    fails([*TINY, "--data", str(folder), "--out_dir", str(out)], capsys, "../x.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "9.png", "text": "a cat"}))
    fails([*TINY, "--data", str(folder), "--out_dir", str(out)], capsys, "9.png")
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xff\xfe\xff")
    fails([*TINY, "--text", str(text), "--tasks", "t2t:1", "--out_dir", str(out)], capsys, "a.txt")
    text.write_text("words " * 50)
    fails([*TINY, "--text", str(text), "--out_dir", str(out)], capsys, "t2i")
    assert not out.exists()


def test_a_caption_longer_than_the_context_is_refused(tmp_path, capsys):
    folder = picture_folder(tmp_path / "pictures", ["short", "a word and " * 30])
    argv = [*TINY, "--data", str(folder), "--seq_len", "32", "--out_dir", str(tmp_path / "out")]
    fails(argv, capsys, "--seq_len 32", "1.png")


def test_a_folder_with_some_bad_images_trains_on(tmp_path, capsys):
    out = tmp_path / "out"
    folder = picture_folder(tmp_path / "pictures", ["a cat", "a dog", "a cow", "a hen"])
    (folder / "2.png").write_bytes(b"not a picture")
    flags = [*TINY, "--data", str(folder), "--image_size", "32", "--out_dir", str(out)]
    fails([*flags, "--strict_data"], capsys, "2.png")
    assert not out.exists()
    assert train.main(flags) == 0
    said = capsys.readouterr()
    assert "2.png" in said.err and "no metrics.json" in said.out and " it2t a.png " in said.out
    assert any(f"t2i 'a {animal}' --out a.png" in said.out for animal in ("cat", "dog", "hen"))
    assert (out / "samples.png").exists() and len(log_of(out)) == 10


def test_a_dry_run_says_what_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main([*TINY, "--dry_run", "--vae_lr_ratio", "1", "--out_dir", str(out)]) == 0
    shown = capsys.readouterr().out
    model = train.new_model(args_for(), data.GeneratedScenes(0, 32, 64))
    count = sum(p.numel() for p in model.mmdit.parameters())
    assert f"mmdit {count:,}" in shown and "3 micro-steps of 4 samples, 1 workers" in shown
    assert "t2t 0.33, t2i 0.33, it2t 0.33" in shown and "--steps 4" in shown and "t2i  sample 4: " in shown
    assert not out.exists()


def test_help_explains_every_flag(monkeypatch):
    """Those of sample.py too."""
    parsers, made = [], sample.Parser.__init__

    def recorded(self, *args, **kwargs):
        parsers.append(self)
        made(self, *args, **kwargs)
    monkeypatch.setattr(sample.Parser, "__init__", recorded)
    train.parse([])
    sample.parse(["t2t", ""])
    actions = [a for p in parsers for a in p._actions if not isinstance(a, argparse._SubParsersAction)]
    assert len(actions) > 150 and len(parsers) > 6
    assert all(a.help and len(a.help) > 3 for a in actions), [a.dest for a in actions if not a.help]


@pytest.mark.parametrize("backend", ("cuda", "reference"))
def test_attention_backends_train_the_same(backend, tiny, tmp_path, capsys, monkeypatch):
    """Losses are those of the padded backend, also of a run that began with another."""
    monkeypatch.setattr(train.cuda_attention, "chosen", "auto")
    flags = [*TINY, "--attention", backend, "--eval_samples", "0", "--out_dir", str(tmp_path / "out")]
    assert train.main([*flags, "--save_every", "2"]) == 0
    assert f"attention: {backend}, as asked for" in capsys.readouterr().out
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "out" / "ckpt.prev.pt", tmp_path / "resumed" / "ckpt.pt")
    assert train.main(["--resume", "auto", "--procs", "1", "--eval_samples", "0", "--out_dir",
                       str(tmp_path / "resumed")]) == 0
    whole, resumed = log_of(tmp_path / "out"), log_of(tmp_path / "resumed")
    assert [e["step"] for e in resumed] == [3, 4]
    for mine, theirs in zip([*whole, *resumed], [*log_of(tiny), *log_of(tiny)[-2:]], strict=True):
        for name in mine.keys() - {"stage", "seconds", "data_seconds", "norm"}:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), (mine["stage"], mine["step"], name)


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    """The short form of tests/faults.py."""
    import faults
    counts = faults.kill_and_resume(tmp_path, kills=2, steps=20, joint=True)
    assert counts["kills"] == 2 and counts["different"] == 0, counts


@pytest.mark.slow
def test_torchrun_starts_killed_workers_anew(tmp_path):
    import faults
    assert faults.kill_a_worker(tmp_path, kills=1, steps=30) == {"kills": 1, "different": 0}


@pytest.mark.parametrize("number", (0, 3))
def test_every_flag_of_a_checkpoint_comes_back(number):
    """Also one of 0, of False, or of what begins with a dash."""
    def other(value):
        if isinstance(value, bool):
            return not value
        if isinstance(value, list):
            return [other(x) for x in value] or ["-x", "b c"]
        return value if isinstance(value, str) else type(0.0 if value is None else value)(number)
    flags = {name: other(value) for name, value in train.plain(train.parse([])).items()} | {"init_from": "--help"}
    flags["streams"] = 1
    assert train.stored(flags, Path("ckpt.pt")) == flags and flags["cfg_drop"] == number and flags["fsdp"]


@pytest.mark.parametrize("name, value", [
    ("seed", 0.5), ("seed", "0"), ("bf16", "zz"), ("image_size", 32), ("image_size", [32.5]), ("lr", None), ("data", [["a"]]),
    ("time_per", []), ("accumulate", 1), ("text_loc", "1"), ("first_block", ["clean"]), ("batch_size", True)])
def test_a_forged_flag_is_refused(name, value):
    with pytest.raises(ValueError, match=f"ckpt.pt: damaged in its flag --{name}; take"):
        train.stored(train.plain(train.parse([])) | {name: value}, Path("ckpt.pt"))


@pytest.mark.parametrize("forge", (
    lambda s: s["exp_avg"].set_(torch.zeros(())), lambda s: s.update(exp_avg=torch.zeros(1).expand(s["exp_avg"].shape)),
    lambda s: s.pop("exp_avg_sq"), lambda s: s.update(step=torch.zeros(3)), lambda s: s.update(exp_avg=None)))
def test_forged_moments_are_refused_before_a_step_writes_to_them(forge):
    p = torch.nn.Parameter(torch.ones(4, 4))
    make = lambda: torch.optim.AdamW([p], fused=True)
    p.grad, first = torch.ones(4, 4), make()
    first.step()
    state = first.state_dict()
    train.check_optimizers([make()], [state])
    forge(state["state"][0])
    with pytest.raises(ValueError):
        train.check_optimizers([make()], [state])
    for states in (None, [], [3], [{"state": {}}], [state, state]):
        with pytest.raises(ValueError):
            train.check_optimizers([make()], states)


def test_a_flag_that_changes_a_resumed_run_is_told(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    assert train.main(["--resume", "auto", "--procs", "1", "--seed", "7", "--steps", "5", "--eval_samples", "0",
                       "--out_dir", str(out)]) == 0
    assert "warning: goes on with --seed 7 (was 0), --steps 5 (was 4)" in capsys.readouterr().err


def test_a_log_of_another_hand_is_read(tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    with open(out / "log.jsonl", "a") as log:
        log.write('[1]\n{"stage": "x", "step": 1}\n{"step": 3}\n7\n')
    assert train.main(["--resume", "auto", "--procs", "1", "--steps", "5", "--eval_samples", "0", "--out_dir", str(out)]) == 0
    assert [e["step"] for e in log_of(out) if e["stage"] == "mmdit"] == [1, 2, 3, 4, 5]


def test_fewer_samples_than_workers(monkeypatch, capsys, tmp_path):
    """Of the stages that will run; and in which flag."""
    monkeypatch.setenv("WORLD_SIZE", "16"), monkeypatch.setenv("RANK", "0")
    assert train.main(["--batch_size", "10", "--text_vae_batch", "8", "--stage", "mmdit", "--out_dir", str(tmp_path / "o")]) == 2
    assert "--batch_size 10: fewer samples than the 16 workers; say --batch_size 16 or" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["safetensors", "tokenizer.json", "metadata.jsonl", "tar", "checkpoint", "checkpoint's values",
                                  "resumed", "cola_vae", "cola_dit"])
def test_damaged_files_give_clean_errors(name, tmp_path):
    """The short form of tests/fuzz.py."""
    import fuzz
    assert fuzz.fuzz(name, *fuzz.readers(tmp_path)[name], inputs=15 if name == "resumed" else 60, seed=1) == []
