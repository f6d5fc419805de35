"""pytest tests/test_train.py: losses and gradients of the stages, Muon, the loop, equal runs."""
import argparse
import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cola
import config
import cuda_attention
import data
import masks
import sample
import train
from batches import Batches
from checkpoint import new_model
from conftest import TINY
from masks import IT2T, T2I, T2T
from mmdit import MMDiTConfig
from test_data import image_folder
from workers import Worker

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"seconds", "data_seconds"}
QUIET = [*TINY, "--eval_samples", "0"]                    # no report at the end


def args_for(*flags):
    return config.merge(config.parse([*TINY, *flags]))


@pytest.fixture(scope="module")
def system():
    args = args_for()
    dataset = data.open_data(args)
    return args, dataset, new_model(args, dataset)


def log_of(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]      # no NaN


def trained(out, *flags, procs=1):
    """The folder of a run: one worker in this process, or several in their own."""
    argv = [*flags, "--procs", str(procs), "--out_dir", str(out)]
    status = train.main(argv) if procs == 1 else \
        subprocess.run([sys.executable, ROOT / "train.py", *argv], timeout=120).returncode
    assert status == 0
    return out


def assert_same_log(one, two, tolerance):
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and (a["stage"], a["step"]) == (b["stage"], b["step"])
        for name in a.keys() - TIMES - {"stage"}:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a, b, name)


def stage_and_batch(system, task, *flags):
    """A stage 2 with random weights and a batch of four samples of a task."""
    _, dataset, model = system
    args, model = args_for("--vae_lr_ratio", "1", "--lambda_vae", "0", *flags), copy.deepcopy(model)
    torch.manual_seed(1)
    for p in model.mmdit.parameters():
        p.data.normal_(std=0.1)
    make = Batches(args, dataset, model)
    return (train.PriorStage(model, args, make.feature_channels),
            make.prior([(task, k) for k in range(4)]))

# ---- Losses and gradients ----------------------------------------------------------------------

def test_image_loss_reaches_what_processes_the_caption_but_not_its_latents(system):
    """L_image alone: hidden states of C pass its gradient on; clean latents are detached."""
    stage, b = stage_and_batch(system, T2I, "--w_text", "0", "--cfg_drop", "0")
    stage(b, b.counts())[0].backward()
    assert stage.mmdit.text_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in stage.text_vae.parameters())


def test_text_loss_reaches_the_encoder_through_the_noisy_copy_alone(system, monkeypatch):
    stage, b = stage_and_batch(system, T2T)
    scale, seen = stage.text_vae.scale_latents, []
    monkeypatch.setattr(stage.text_vae, "scale_latents",
                        lambda *x: seen.append(scale(*x)) or seen[-1])
    loss, _ = stage(b, b.counts())
    (grad,) = torch.autograd.grad(loss, seen[-1], retain_graph=True)             # (Lv, Dz)
    learns = torch.zeros(len(grad), dtype=torch.bool)
    learns[b.source[b.text_moves]] = True                  # the others are clean context only
    assert set(b.source[~b.text_moves].tolist()) - set(b.source[b.text_moves].tolist())
    assert grad[learns].any(-1).all() and not grad[~learns].any()
    loss.backward()
    assert stage.text_vae.encoder.final_layer.weight.grad.abs().sum() > 0


def test_answers_weigh_more(system):
    stage, _ = stage_and_batch(system, T2T, "--w_answer", "3")
    b = Batches(stage.args, *system[1:]).prior([(task, k) for task in (T2T, IT2T) for k in (1, 2)])
    n = b.counts()
    _, terms = stage(b, n)
    want = (n["t2t"] * terms["text_t2t"] + 3 * n["it2t"] * terms["text_it2t"]) \
        / (n["t2t"] + 3 * n["it2t"])
    torch.testing.assert_close(terms["text"], want)
    assert n["t2t"] and n["it2t"] and terms["text_t2t"] != terms["text_it2t"]


def test_the_loss_of_stage_2_is_its_equation(system):
    """Eq. 3.18: where the stage begins the text VAE is its reference, and here it has left it."""
    w = argparse.Namespace(beta=0.2, lambda_mask=0.3, lambda_vae=0.4, lambda_fm=2.0, w_text=0.6,
                           lambda_ref=0.7, w_repa=0.8)
    weights = [word for name, x in vars(w).items() for word in (f"--{name}", str(x))]
    stage, b = stage_and_batch(system, T2I, "--aux_caption", "1", "--vae_lr_ratio", "0.25",
                               "--cfg_drop", "0", "--repa_layer", "1", *weights)
    _, t = stage(b, b.counts())
    assert abs(float(t["ref"])) < 1e-6
    for p in stage.text_vae.parameters():
        p.data.add_(0.01)
    loss, t = stage(b, b.counts())
    assert min(t[x] for x in ("recon", "mask", "image", "text", "repa", "ref")) > 0
    torch.testing.assert_close(
        loss.detach(),
        w.lambda_vae * (t["recon"] + w.beta * t["log_q"] + w.lambda_mask * t["mask"])
        + w.lambda_fm * (t["image"] + w.w_text * t["text"] + w.w_repa * t["repa"])
        + w.lambda_ref * t["ref"])
    stage.step, stage.steps = 9, 10
    assert t["repa"] < 2 and "repa" not in stage(b, b.counts())[1]


@pytest.mark.parametrize("ratio, weight", ((1.0, 0.01), (1.0, 0.0), (0.0, 0.01)))
def test_the_reference_runs_only_if_it_bears_loss(system, ratio, weight):
    flags = f"--vae_lr_ratio {ratio} --lambda_ref {weight}"
    stage, b = stage_and_batch(system, T2T, *flags.split())
    _, terms = stage(b, b.counts())
    holds = ratio * weight > 0
    assert ("ref" in terms) == (stage.ref is not None) == holds


def test_filler_weighs_less(system):
    """L_text is the mean of the errors under the weights of the batch."""
    stage, b = stage_and_batch(system, IT2T, "--block_len", "8", "--w_filler", "0.25")
    errors = []
    for weight in (b.text_weight, b.text_weight.ceil(), (b.text_weight == 1).float()):
        one = dataclasses.replace(b, text_weight=weight)
        errors.append((stage(one, n := one.counts())[1]["text_it2t"].item(), n["it2t"]))
    (mixed, n), (all_, n_all), (real, n_real) = errors
    assert n == n_real + 0.25 * (n_all - n_real) and n_real < n < n_all
    filler = (all_ * n_all - real * n_real) / (n_all - n_real)
    assert mixed * n == pytest.approx(real * n_real + 0.25 * filler * (n_all - n_real), rel=1e-4)


def test_learning_rates(system):
    """The text VAE has its own; Muon has none of its weights."""
    stage, _ = stage_and_batch(system, T2T, "--vae_lr_ratio", "0.25")
    adamw, muon = (o.param_groups for o in train.make_optimizers(stage.args, stage, 0.1, True))
    assert [group["lr"] for group in (*adamw, *muon)] == [0.1, 0.025, 0.002]
    assert {*adamw[1]["params"]} == {*stage.text_vae.parameters()}
    args = args_for("--warmup", "0.2", "--cooldown", "0.4")
    share = [train.schedule(args, step, 10) for step in range(10)]
    assert share == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    args = args_for("--schedule", "cosine", "--warmup", "0.005")           # of the paper, in 1e-4
    rate = [1.5 * train.schedule(args, step, 10**6) for step in (0, 2500, 5000, 502_500, 10**6)]
    assert rate == pytest.approx([0, 0.75, 1.5, 0.8, 0.1], abs=1e-3)


@pytest.mark.parametrize("task", range(5), ids=masks.TASKS)
def test_a_batch_whose_conditions_are_all_dropped(system, task):
    """Under a frozen text VAE; t2t and it2t have no image to learn."""
    stage, b = stage_and_batch(system, task, "--cfg_drop", "1", "--cfg_drop_text", "1",
                               "--vae_lr_ratio", "0")
    loss, terms = stage(b, b.counts())
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    draws = task not in (T2T, IT2T)
    assert ("image" in terms) == draws and (draws or terms["text"] > 0)
    assert all(not p.requires_grad for p in stage.text_vae.parameters())


def test_a_batch_in_which_nothing_moves_has_a_gradient_of_0(system):
    stage, b = stage_and_batch(system, T2T, "--vae_lr_ratio", "0")
    b = dataclasses.replace(b, targets=b.targets[:0], text_moves=torch.zeros_like(b.text_moves),
                            text_weight=torch.zeros_like(b.text_weight),
                            t_index=torch.zeros_like(b.t_index))
    loss, terms = stage(b, b.counts())
    loss.backward()
    assert loss == 0 and not terms and not stage.mmdit.text_in.weight.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("task", [T2T, T2I, IT2T, masks.II], ids=masks.TASKS[:4])
def test_one_batch_overfits(system, task):
    stage, b = stage_and_batch(system, task, "--cfg_drop", "0", "--vae_lr_ratio", "0")
    optimizers = train.make_optimizers(stage.args, stage, stage.args.lr, True)
    losses = []
    for _ in range(200):
        loss, terms = stage(b, b.counts())
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        losses.append(float(terms["text" if task in (T2T, IT2T) else "image"]))
    assert losses[-1] < 0.25 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("task", [T2T, IT2T], ids=["t2t", "it2t"])
def test_sampling_asks_what_training_taught(system, task):
    """The velocity of a block of noise in a training batch is that of the same noise behind the
    same context, cached as in sampling."""
    args, dataset, model = system
    stage, b = stage_and_batch(system, task)
    passes = []
    stage.mmdit.register_forward_hook(lambda module, given, out: passes.append((given, out[0])))
    with torch.no_grad():
        stage(b, b.counts())
        (text, image, *_), taught = passes[0]
        layout, is_text = b.layout, b.layout.segment != masks.I
        v = torch.zeros_like(text).masked_scatter_(b.text_moves[:, None], taught)
        mine = layout.sample == 1
        noise = mine & (layout.segment == masks.N)
        block = int(layout.block[noise].unique()[1])
        now, past = noise & (layout.block == block), mine & (layout.segment != masks.N)
        past &= (layout.segment != masks.C) | (layout.block < block)
        context = sample.Context(dataclasses.replace(model, mmdit=stage.mmdit))
        context.add(text[past[is_text]], image[past[~is_text]], layout.select(past))
        query, times = layout.select(now), b.t[b.t_index[now]]
        got, _ = context.velocity(text[now[is_text]], image[:0], times.tolist(),
                                  torch.arange(len(times)), query, context.plan(query))
    moving = b.text_moves[now[is_text]]
    assert len(times) == args.block_len and moving.any()
    torch.testing.assert_close(got[moving], v[now[is_text]][moving], atol=1e-4, rtol=1e-4)

# ---- Attention on a GPU ------------------------------------------------------------------------

def test_stage_2_takes_the_fastest_attention(monkeypatch, capsys):
    """Where --attention auto has a GPU, for which a stand-in does; for all workers, that of the
    first; and until the stage ends."""
    monkeypatch.setattr(train, "choose", lambda *given: seen.append(given) or ("cuda", "a line"))
    layout, seen = argparse.Namespace(to=lambda device: "layout"), []
    run = argparse.Namespace(args=args_for("--bf16", "on"), worker=Worker(
        device=torch.device("cuda"), world=2), model=argparse.Namespace(
        mmdit=argparse.Namespace(config=MMDiTConfig())))
    monkeypatch.setattr(Worker, "gather", lambda self, mine: ["flex", *mine])
    with train.attention_of(run, lambda step: [argparse.Namespace(layout=layout)]):
        assert cuda_attention.default_backend == "flex"
    assert cuda_attention.default_backend != "flex" and seen == [("layout", 8, 16, 4, True)]
    assert capsys.readouterr().out == "a line\n"
    for run.args.attention, run.worker.device in (("auto", torch.device("cpu")),
                                                  ("padded", torch.device("cuda"))):
        with train.attention_of(run, None):
            assert cuda_attention.default_backend != "flex" and len(seen) == 1

# ---- Muon --------------------------------------------------------------------------------------

def test_muon_is_that_of_pytorch(monkeypatch):
    """In float32, over 20 steps, for matrices of any shape; one without a gradient stays."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 24), (16, 16), (5, 40)]
    ours, theirs = ([torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i)))
                     for i, s in enumerate(shapes)] for _ in range(2))
    mine = train.Muon(ours, lr=0.02, weight_decay=0.1, steps=5)
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, ns_steps=5)
    rest = ours[4].detach().clone()
    for _ in range(20):
        for a, b in zip(ours[:4], theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        mine.step()
        peer.step()
    for a, b in zip(ours[:4], theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[4], rest) and ours[4] not in mine.state

# ---- The loop ----------------------------------------------------------------------------------

def test_files_of_a_run(tiny):
    assert {p.name for p in tiny.iterdir()} == {".lock", "ckpt.pt", "ckpt.prev.pt", "log.jsonl",
                                                "metrics.json", "samples.png", "loss.png"}
    steps = [(e["stage"], e["step"]) for e in log_of(tiny)]
    stages = {"text_vae": 3, "image_vae": 3, "mmdit": 4}.items()
    assert steps == [(stage, i) for stage, n in stages for i in range(1, n + 1)]


def test_steps_without_a_number_are_skipped_and_too_many_end_the_run(tmp_path, capsys, monkeypatch):
    """Their losses are null in the log, which stays JSON. A checkpoint before the first finite step
    has no moments, and is resumed."""
    out, forward, calls = tmp_path / "out", train.PriorStage.forward, []

    def broken(self, batch, counts):
        calls.append(1)
        loss, terms = forward(self, batch, counts)
        bad = float("nan") if len(calls) in (1, 2, 4) or len(calls) > 5 else 1
        return loss * bad, {name: term * bad for name, term in terms.items()}
    monkeypatch.setattr(train.PriorStage, "forward", broken)
    trained(out, *QUIET, "--steps", "2")
    assert not cola.read(out / "ckpt.pt")["moments"]
    trained(out, *QUIET, "--resume", "auto", "--steps", "5")
    log = [e for e in log_of(out) if e["stage"] == "mmdit"]
    assert [e["skipped"] for e in log] == [1, 2, 0, 1, 0] and log[1]["text"] is None
    weights = cola.read(out / "ckpt.pt")["model"]
    assert all(torch.isfinite(v).all() for v in weights.values())
    flags = [*QUIET, "--resume", "auto", "--save_every", "1", "--out_dir", str(out)]
    assert train.main([*flags, "--steps", "60"]) == 2
    assert "mmdit: no finite gradient" in (error := capsys.readouterr().err) and "to 25" in error
    again = cola.read(out / "ckpt.pt")["model"]
    assert all(torch.equal(v, again[k]) for k, v in weights.items() if k.startswith("mmdit"))


def test_the_host_waits_once_a_step(tmp_path, monkeypatch):
    """Loss terms stay on the device until the sum of the step; the counts are on the CPU."""
    calls = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        def counted(self, *rest, old=getattr(torch.Tensor, name)):
            if sys._getframe(1).f_globals["__name__"] in ("train", "workers"):
                calls.append(1)
            return old(self, *rest)
        monkeypatch.setattr(torch.Tensor, name, counted)
    trained(tmp_path / "out", *QUIET)
    assert len(calls) <= 2 * 10 + 3                        # of 10 steps, one of them for counts


def test_a_run_of_text_alone_from_scratch(tmp_path, capsys):
    """No VAE is trained before the prior, text alone is judged, and no image can be drawn."""
    flags = "--tasks t2t:1,t2i:0 --text_patch 2 --text_vae_steps 0 --vae_lr_ratio 1 --lambda_ref 0"
    out = trained(tmp_path / "out", *TINY, *flags.split())
    assert {e["stage"] for e in log_of(out)} == {"mmdit"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["seen"].keys() == {"t2t"} and metrics["ceiling"].keys() == {"text"}
    argv = ["t2i", "a circle", "--checkpoint", str(out / "ckpt.pt")]
    fails(argv, capsys, "t2i", main=sample.main)

# ---- Equal runs --------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, tolerance", [
    ("--accumulate", 1e-5), ("--attention cuda", 1e-4), ("--attention reference", 1e-4)])
def test_flags_that_change_nothing(flags, tolerance, tiny, tmp_path):
    out = trained(tmp_path / "out", *QUIET, *flags.split())
    assert_same_log(log_of(tiny), log_of(out), tolerance)


def test_two_workers_equal_one(tmp_path):
    """In 20 steps of all three tasks, of samples that two cannot share evenly; the text VAE learns
    on, and every step takes three passes."""
    flags = [*QUIET, "--steps", "20", "--batch_size", "5", "--vae_lr_ratio", "0.5", "--accumulate"]
    one, two = (trained(tmp_path / str(n), *flags, procs=n) for n in (1, 2))
    assert_same_log(log_of(one), log_of(two), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("saved, resumed", [(1, 2), (2, 1)])
def test_another_number_of_workers_goes_on(saved, resumed, tmp_path):
    """Two of them through the kernels' operators, which change only rounding."""
    flags = [*QUIET, "--warmup", "0", "--cooldown", "0"]
    whole = trained(tmp_path / "whole", *flags)
    for procs, more in ((saved, ["--steps", "2"]), (resumed, ["--resume", "auto", "--steps", "4"])):
        attention = ("padded", "cuda")[procs - 1]
        trained(tmp_path / "out", *flags, "--attention", attention, *more, procs=procs)
    assert_same_log(log_of(whole), log_of(tmp_path / "out"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_equals_replicated(optimizer, tmp_path):
    """FSDP2 on two workers: the losses and weights of one that has everything. What they saved half
    way one carries on alone, or two, accumulating, compiled, through the kernels' operators."""
    flags = [*QUIET, "--optimizer", optimizer, "--vae_lr_ratio", "0.5", "--warmup", "0",
             "--cooldown", "0"]
    want = trained(tmp_path / "one", *flags)
    half = trained(tmp_path / "two", *flags, "--fsdp", "--steps", "2", procs=2)
    shutil.copytree(half, tmp_path / "alone")
    more = ["--accumulate", "--attention", "cuda", *["--compile"] * bool(shutil.which("g++"))]
    sharded = trained(half, *flags, "--fsdp", "--resume", "auto", "--steps", "4", *more, procs=2)
    alone = trained(tmp_path / "alone", *flags, "--resume", "auto", "--steps", "4")
    for out in (sharded, alone):
        assert_same_log(log_of(want), log_of(out), 1e-4)
        a, b = (cola.read(x / "ckpt.pt") for x in (want, out))
        for weights in ("model", "ema"):
            for name, value in a[weights].items():
                torch.testing.assert_close(value, b[weights][name], atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_sharded_steps_without_an_image(tmp_path):
    """Workers whose samples differ gather the same blocks. The weights hardly move, because a
    weight that no sample uses has a gradient of 0 under FSDP2, and none on one worker."""
    few = "--tasks t2t:1,t2i:1 --micro_steps 1 --batch_size 2 --cfg_drop 0.5 --steps 8"
    flags = [*QUIET, *few.split(), *"--bf16 on --optimizer adamw --lr 1e-6".split()]
    one = log_of(trained(tmp_path / "one", *flags))
    two = log_of(trained(tmp_path / "two", *flags, "--fsdp", procs=2))
    assert {"image" in e for e in one if e["stage"] == "mmdit"} == {True, False}
    for a, b in zip(one, two, strict=True):
        assert a.get("image", 0) == pytest.approx(b.get("image", 0), rel=1e-2)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-2), (a["stage"], a["step"])

# ---- Mistakes in the data: one line, status 2, nothing written ----------------------------------

def fails(argv, capsys, *words, main=train.main):
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(word in error for word in words), error


def test_bad_data(tmp_path, capsys):
    out, empty, text, bad = (tmp_path / name for name in ("out", "empty", "a.txt", "bad.txt"))
    empty.mkdir()
    text.write_text("words " * 50)
    bad.write_bytes(b"\xff\xfe\xff")
    folder = image_folder(tmp_path / "pictures")
    with open(folder / "metadata.jsonl", "a") as rows:
        rows.write(json.dumps({"file_name": "1.png", "text": "a word and " * 30}))
    for flags, words in ((["--data", empty], ["empty"]),
                         (["--text", bad, "--tasks", "t2t:1"], ["bad.txt"]),
                         (["--text", text], ["t2i"]),
                         (["--data", folder, "--seq_len", "32"], ["--seq_len 32", "1.png"]),
                         (["--image_size", "36"], ["36"])):
        fails([*TINY, *map(str, flags), "--out_dir", str(out)], capsys, *words)
    assert not out.exists()


def test_a_folder_with_a_bad_image_trains_on(tmp_path, capsys):
    folder = image_folder(tmp_path / "pictures")
    (folder / "2.png").write_bytes(b"not a picture")
    out = trained(tmp_path / "out", *TINY, "--data", str(folder), "--image_size", "32")
    assert "2.png" in capsys.readouterr().err
    assert (out / "samples.png").exists() and len(log_of(out)) == 10
    assert not (out / "metrics.json").exists()


def test_a_dry_run_writes_nothing_even_where_a_run_is(tiny, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in tiny.iterdir()}
    assert train.main([*TINY, "--dry_run", "--vae_lr_ratio", "1", "--out_dir", str(tiny)]) == 0
    assert {p.name: p.read_bytes() for p in tiny.iterdir()} == before
    assert "mmdit: " in capsys.readouterr().out
    assert train.main([*TINY, "--dry_run", "--out_dir", str(tmp_path / "new")]) == 0
    assert not (tmp_path / "new").exists()
