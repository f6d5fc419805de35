"""pytest tests/test_checkpoint.py: saving, resuming bit for bit, starting from another run."""
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

import checkpoint
import cola
import config
import evaluate
import sample
import train
from conftest import TINY
from test_train import fails, log_of, trained


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


def assert_equal(a, b, kinds=("model", "ema", "extra")):
    """Two checkpoints have the same weights, bit for bit."""
    a, b = (cola.read(x / "ckpt.pt") for x in (a, b))
    for kind in kinds:
        assert a[kind].keys() == b[kind].keys()
        for name, value in a[kind].items():
            assert torch.equal(value, b[kind][name]), (kind, name)


def strip(entries):
    return [{k: v for k, v in e.items() if k not in ("seconds", "data_seconds")} for e in entries]

# ---- Resuming ----------------------------------------------------------------------------------

@pytest.mark.parametrize("after", (1, 3, 5, 6, 8))
def test_a_resumed_run_equals_the_uninterrupted_one(after, tiny, tmp_path, monkeypatch):
    """Weights, averages and losses bit for bit, stopped after so many of 3 + 3 + 4 steps."""
    out, step, calls = tmp_path / "out", train.forward_backward, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(train, "forward_backward", stopped)
    flags = [*TINY, "--save_every", "1", "--eval_samples", "0", "--resume", "auto",
             "--out_dir", str(out)]
    assert train.main(flags) == 130
    monkeypatch.setattr(train, "forward_backward", step)
    assert sum(cola.read(out / "ckpt.pt")["progress"].values()) == after
    assert train.main(flags) == 0
    assert_equal(tiny, out)
    assert strip(log_of(out)) == strip(log_of(tiny))


def test_a_joint_run_resumes_bit_for_bit(tmp_path):
    """With a text VAE that rests, a reference encoder and L_REPA; at a constant learning rate 2
    steps and then 2 are 4, so a finished run can be extended."""
    flags = [*TINY, *("--vae_lr_ratio 1 --vae_interval 2 1 --lambda_ref 0.1 --w_repa 0.5 "
                      "--repa_layer 1 --repa_until 1 --warmup 0 --cooldown 0 "
                      "--eval_samples 0").split()]
    straight = trained(tmp_path / "straight", *flags)
    out = trained(tmp_path / "out", *flags, "--steps", "2")
    trained(out, "--resume", "auto", "--steps", "4", "--eval_samples", "0")
    assert_equal(straight, out)
    assert strip(log_of(out)) == strip(log_of(straight))
    stage2 = [e for e in log_of(out) if e["stage"] == "mmdit"]
    assert [e["drift"] > 0 for e in stage2] == [False, True, True, True]
    assert ["recon" in e for e in stage2] == [True, True, False, True]


def test_a_checkpoint_before_the_first_finite_step_is_resumed(tmp_path, monkeypatch):
    """It has no moments yet."""
    forward = train.PriorStage.forward
    flags = [*TINY, "--eval_samples", "0", "--save_every", "1", "--out_dir", str(tmp_path / "out")]

    def broken(self, batch, counts):
        loss, terms = forward(self, batch, counts)
        return loss * float("nan"), terms
    monkeypatch.setattr(train.PriorStage, "forward", broken)
    assert train.main([*flags, "--steps", "1"]) == 0
    monkeypatch.setattr(train.PriorStage, "forward", forward)
    assert not cola.read(tmp_path / "out" / "ckpt.pt")["moments"]
    assert train.main([*flags, "--resume", "auto", "--steps", "3"]) == 0
    assert log_of(tmp_path / "out")[-1]["skipped"] == 0


def test_more_steps_leave_the_stages_that_a_later_one_has_learned_from(tiny, tmp_path, capsys):
    out = copy_of(tiny, tmp_path / "out")
    assert train.main(["--resume", "auto", "--scale", "2", "--procs", "1", "--eval_samples", "0",
                       "--out_dir", str(out)]) == 0
    a, b = (cola.read(x / "ckpt.pt") for x in (tiny, out))
    assert b["progress"] == {"text_vae": 3, "image_vae": 3, "mmdit": 8}
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]) or name.startswith("mmdit."), name
    assert "not trained further" in capsys.readouterr().out


def test_one_stage_and_then_the_others(tiny, tmp_path, capsys):
    """--stage is not inherited: the resumed run trains what is left, and is a run in one go. A VAE
    may come second; the prior may not come first."""
    out = tmp_path / "out"
    flags = [*TINY, "--eval_samples", "0", "--out_dir", str(out)]
    fails([*flags, "--stage", "mmdit"], capsys, "text_vae is not trained")
    shutil.rmtree(out)
    assert train.main([*flags, "--stage", "image_vae"]) == 0
    assert sample.main(["t2i", "a", "--checkpoint", str(out / "ckpt.pt")]) == 2
    assert "never trained" in capsys.readouterr().err
    assert train.main([*flags, "--resume", "auto"]) == 0
    assert_equal(tiny, out)


def test_a_finished_run_trains_no_more(tiny, tmp_path):
    out = copy_of(tiny, tmp_path / "out")
    trained(out, "--resume", "auto", "--eval_samples", "0")
    assert (out / "log.jsonl").read_bytes() == (tiny / "log.jsonl").read_bytes()
    assert (out / "ckpt.pt").read_bytes() == (tiny / "ckpt.pt").read_bytes()


def test_a_resumed_run_keeps_its_flags_and_names_those_that_change(tiny, tmp_path, capsys):
    out = copy_of(tiny, tmp_path / "out")
    args, found = checkpoint.begin({"out_dir": str(out), "resume": "auto", "lr": 0.5})
    assert (args.width, args.batch_size, args.lr) == (32, 4, 0.5) and found["args"]["lr"] == 0.005
    fails(["--out_dir", str(out), "--resume", "auto", "--width", "64"], capsys, "--width 64")
    trained(out, "--resume", "auto", "--seed", "7", "--steps", "5", "--eval_samples", "0")
    shown = capsys.readouterr().out
    assert "--seed 7 (was 0)" in shown and "--steps 5 (was 4)" in shown
    assert "changed: --out_dir" not in shown


def test_an_existing_run_is_not_overwritten(tiny, capsys):
    before = {p.name: p.read_bytes() for p in tiny.iterdir()}
    fails([*TINY, "--out_dir", str(tiny)], capsys, "--resume auto")
    assert {p.name: p.read_bytes() for p in tiny.iterdir()} == before


def test_tasks_of_a_model_are_those_of_all_its_runs(tmp_path):
    out = trained(tmp_path / "out", *TINY, "--tasks", "t2t:1", "--eval_samples", "0")
    trained(out, "--resume", "auto", "--tasks", "t2i:1", "--steps", "6", "--eval_samples", "0")
    assert [e["stage"] for e in log_of(out)].count("image_vae") == 3      # the first to need it
    assert set(cola.load(out / "ckpt.pt").tasks) == {"t2t", "t2i"}

# ---- Starting from another run -----------------------------------------------------------------

def test_init_from_takes_the_averages_and_trains_the_prior_alone(tiny, tmp_path):
    """At another size and learning rate 0: every weight is the average of the run before."""
    out = trained(tmp_path / "out", *TINY, "--init_from", str(tiny / "ckpt.pt"), "--image_size",
                  "32", "48", "--steps", "1", "--lr", "1e-12", "--muon_lr", "1e-12",
                  "--eval_samples", "0")
    assert {e["stage"] for e in log_of(out)} == {"mmdit"}
    found, before = (cola.read(x / "ckpt.pt") for x in (out, tiny))
    assert any(not torch.equal(x, before["model"][name]) for name, x in before["ema"].items())
    for name, value in (before["model"] | before["ema"]).items():
        torch.testing.assert_close(found["model"][name], value, atol=1e-9, rtol=1e-9)
    model = cola.load(out / "ckpt.pt")
    assert sample.generate_images(model, ["a"])[0].shape == (32, 48, 3)
    trained(out, "--resume", "auto", "--steps", "2", "--eval_samples", "0")      # still the prior
    assert {e["stage"] for e in log_of(out)} == {"mmdit"}


def test_init_from_trains_a_vae_that_is_asked_for_by_name(tiny, tmp_path):
    out = trained(tmp_path / "out", *TINY, "--init_from", str(tiny / "ckpt.pt"), "--stage",
                  "image_vae", "--eval_samples", "0")
    assert {e["stage"] for e in log_of(out)} == {"image_vae"}
    trained(out, "--resume", "auto", "--eval_samples", "0")
    assert {e["stage"] for e in log_of(out)} == {"image_vae", "mmdit"}


def test_bad_checkpoints(tiny, tmp_path, capsys):
    whole, out, bad = (tiny / "ckpt.pt").read_bytes(), tmp_path / "out", tmp_path / "bad.pt"
    argv = [*TINY, "--init_from", str(bad), "--out_dir", str(out)]
    fails(argv, capsys, str(bad))                          # no such file
    for content in (whole[:len(whole) // 2], b"", b"hello"):
        bad.write_bytes(content)
        fails(argv, capsys, str(bad))
    torch.save({"weights": torch.zeros(3)}, bad)
    fails(argv, capsys, "not a checkpoint of this program")
    torch.save(Path("x"), bad)                             # an object that could run code
    fails(argv, capsys, str(bad))
    found = cola.read(tiny / "ckpt.pt")
    found["config"]["mmdit"]["width"] = 64
    torch.save(found, bad)
    fails(argv, capsys, "another architecture")
    assert not out.exists()

# ---- Saving and the log ------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tiny, tmp_path):
    out = copy_of(tiny, tmp_path / "out")
    with open(out / "ckpt.pt", "r+b") as file:
        file.truncate(5000)
    assert cola.read(out / "ckpt.prev.pt")["progress"]["mmdit"] == 0      # saved after stage 1b
    trained(out, *TINY, "--resume", "auto", "--eval_samples", "0")
    assert_equal(tiny, out)


def test_a_full_disk_leaves_the_last_checkpoint(tiny, tmp_path, capsys):
    """A file may have half the size that a checkpoint needs."""
    out = copy_of(tiny, tmp_path / "out")
    before = (out / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert train.main([*TINY, "--resume", "auto", "--steps", "6", "--out_dir", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ckpt.pt.tmp" in capsys.readouterr().err
    assert (out / "ckpt.pt").read_bytes() == before and not (out / "ckpt.pt.tmp").exists()


def test_a_log_line_that_was_cut_off(tiny, tmp_path):
    """It costs nothing; resuming drops it, and the steps that will be taken again."""
    out = copy_of(tiny, tmp_path / "out")
    lines = (out / "log.jsonl").read_text().splitlines(True)
    torn = "".join(lines) + lines[-1].replace('"step": 4', '"step": 5') + '{"stage": "mm'
    (out / "log.jsonl").write_text(torn)
    (out / "loss.png").unlink()
    assert evaluate.main(["--out_dir", str(out), "--eval_samples", "0", "--procs", "1"]) == 0
    assert (out / "loss.png").exists() and (out / "log.jsonl").read_text() == torn
    trained(out, *TINY, "--resume", "auto", "--steps", "5", "--eval_samples", "0")
    assert [e["step"] for e in log_of(out) if e["stage"] == "mmdit"] == [1, 2, 3, 4, 5]


def test_moments_are_restored_by_name():
    """Those of another optimizer, or of no parameter, are left out: it begins with fresh ones."""
    def optimizer(kind):
        torch.manual_seed(0)
        weights = {name: torch.nn.Parameter(torch.randn(4, 6)) for name in "abc"}
        return weights, [torch.optim.AdamW(weights.values(), fused=True) if kind == "adamw" else
                         train.Muon([*weights.values()], 0.1, 0.0)]

    def step(weights, optimizers, names):
        for name in names:
            weights[name].grad = torch.ones(4, 6)
        optimizers[0].step()
        optimizers[0].zero_grad()

    for kind, other in (("adamw", "muon"), ("muon", "adamw")):
        weights, first = optimizer(kind)
        step(weights, first, "ab")
        saved = checkpoint.moments(first, weights)
        assert saved.keys() == {"a", "b"}
        again, second = optimizer(kind)
        for name, p in again.items():
            p.data.copy_(weights[name].data)
        checkpoint.restore_moments(second, again, saved)
        for w, o in ((weights, first), (again, second)):
            step(w, o, "abc")
        assert all(torch.equal(weights[name], again[name]) for name in "abc")
        checkpoint.restore_moments((third := optimizer(other))[1], third[0], saved)
        assert not third[1][0].state
