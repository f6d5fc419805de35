"""pytest tests/test_checkpoint.py: saving, resuming bit for bit, starting from another run."""
import itertools
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import checkpoint
import cola
import evaluate
import sample
import train
from conftest import TINY
from test_train import QUIET, assert_same_log, fails, log_of, trained

RESUMED = ["--resume", "auto", "--eval_samples", "0"]


@pytest.fixture
def copied(tiny, tmp_path):
    """The folder of a whole run, to be changed."""
    return shutil.copytree(tiny, tmp_path / "copied")


def test_a_checkpoint_is_read_without_the_compiler(tiny):
    """Its import takes seconds, at every start of sample.py."""
    code = f"import sys, cola; cola.load({str(tiny / 'ckpt.pt')!r}); " \
           "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def assert_equal(one, two):
    """Two runs have the same weights and losses, bit for bit; their stages may change places."""
    a, b = (cola.read(x / "ckpt.pt") for x in (one, two))
    for kind in ("model", "ema", "extra"):
        assert a[kind].keys() == b[kind].keys()
        for name, value in a[kind].items():
            assert torch.equal(value, b[kind][name]), (kind, name)
    assert_same_log(*(sorted(log_of(x), key=lambda e: e["stage"]) for x in (one, two)), 0)

# ---- Resuming ----------------------------------------------------------------------------------

@pytest.mark.parametrize("after", (1, 3, 5, 6, 8))
def test_a_resumed_run_equals_the_uninterrupted_one(after, tiny, tmp_path, monkeypatch):
    """Weights, averages and losses bit for bit, stopped after so many of 3 + 3 + 4 steps."""
    out, step, calls = tmp_path / "out", train.forward_backward, itertools.count()

    def stopped(*args):
        if next(calls) == after:
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(train, "forward_backward", stopped)
    flags = [*QUIET, "--save_every", "1", "--resume", "auto", "--out_dir", str(out)]
    assert train.main(flags) == 130
    assert sum(cola.read(out / "ckpt.pt")["progress"].values()) == after
    assert train.main(flags) == 0
    assert_equal(tiny, out)


def test_a_joint_run_resumes_bit_for_bit(tmp_path):
    """With a text VAE that rests in step 3, a reference encoder and L_REPA; at a constant learning
    rate 2 steps, 1 and 1 are 4, so a finished run can be extended."""
    flags = [*QUIET, *("--vae_lr_ratio 1 --vae_interval 2 1 --lambda_ref 0.1 --w_repa 0.5 "
                       "--repa_layer 1 --repa_until 1 --warmup 0 --cooldown 0 --ema 0").split()]
    straight, out = trained(tmp_path / "straight", *flags), tmp_path / "out"
    found = [cola.read(trained(out, *flags, "--resume", "auto", "--steps", n) / "ckpt.pt")
             for n in "234"]
    assert_equal(straight, out)
    stage2 = [e for e in log_of(out) if e["stage"] == "mmdit"]
    assert [e["ref"] > 1e-6 for e in stage2 if "ref" in e] == [False, True, True]
    for name in ("recon", "ref"):
        assert [name in e for e in stage2] == [True, True, False, True]
    name = "text_vae.encoder.final_layer.weight"
    two, three, four = (x["moments"][name] | {"weight": x["model"][name]} for x in found)
    assert three["step"] == 2 and all(torch.equal(x, three[key]) for key, x in two.items())
    assert not torch.equal(three["weight"], four["weight"])


def test_more_steps_leave_the_stages_that_a_later_one_has_learned_from(tiny, copied, capsys):
    trained(copied, *RESUMED, "--scale", "2")
    a, b = (cola.read(x / "ckpt.pt") for x in (tiny, copied))
    assert b["progress"] == {"text_vae": 3, "image_vae": 3, "mmdit": 8}
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]) or name.startswith("mmdit."), name
    assert "text_vae, image_vae" in capsys.readouterr().out


def test_one_stage_and_then_the_others(tiny, tmp_path, capsys):
    """--stage is not inherited: the resumed run trains what is left, and is a run in one go. A VAE
    may come second; the prior may not come first."""
    out = tmp_path / "out"
    fails([*QUIET, "--stage", "mmdit", "--out_dir", str(tmp_path / "no")], capsys, "not trained")
    trained(out, *QUIET, "--stage", "image_vae")
    argv = ["t2i", "a", "--checkpoint", str(out / "ckpt.pt")]
    fails(argv, capsys, "never trained", main=sample.main)
    trained(out, *RESUMED)
    assert_equal(tiny, out)


def test_a_resumed_run_keeps_its_flags_and_names_those_that_change(tiny, copied, capsys):
    """Without a change a finished run trains no more; no other run overwrites it."""
    trained(copied, *RESUMED)
    fails([*TINY, "--out_dir", str(copied)], capsys, "--resume auto")
    for path in tiny.iterdir():
        assert (copied / path.name).read_bytes() == path.read_bytes() or path.suffix == ".png"
    args, found = checkpoint.begin({"out_dir": str(copied), "resume": "auto", "lr": 0.5})
    assert (args.width, args.batch_size, args.lr) == (32, 4, 0.5) and found["args"]["lr"] == 0.005
    fails(["--out_dir", str(copied), "--resume", "auto", "--width", "64"], capsys, "--width 64")
    trained(copied, *RESUMED, "--seed", "7", "--steps", "5")
    shown = capsys.readouterr().out
    assert "--seed 7 (was 0)" in shown and "--steps 5 (was 4)" in shown
    assert "changed: --out_dir" not in shown


def test_a_run_can_drop_its_averages(copied, capsys):
    """Then only the weights can be evaluated."""
    trained(copied, *RESUMED, "--ema", "0", "--steps", "5")
    assert cola.read(copied / "ckpt.pt")["ema"] == {}
    argv = ["--out_dir", str(copied), "--procs", "1", "--device", "cpu"]
    fails([*argv, "--ema", "0.5"], capsys, "no averaged weights", main=evaluate.main)


def test_tasks_of_a_model_are_those_of_all_its_runs(tmp_path):
    out = trained(tmp_path / "out", *QUIET, "--tasks", "t2t:1")
    trained(out, *RESUMED, "--tasks", "t2i:1", "--steps", "6")
    assert [e["stage"] for e in log_of(out)].count("image_vae") == 3      # the first to need it
    assert set(cola.load(out / "ckpt.pt").tasks) == {"t2t", "t2i"}

# ---- Starting from another run -----------------------------------------------------------------

def test_init_from_takes_the_averages_and_trains_the_prior_alone(tiny, tmp_path):
    """At another size and learning rate 0: every weight is the average of the run before."""
    flags = "--image_size 32 48 --steps 1 --lr 1e-12 --muon_lr 1e-12".split()
    out = trained(tmp_path / "out", *QUIET, "--init_from", str(tiny / "ckpt.pt"), *flags)
    assert {e["stage"] for e in log_of(out)} == {"mmdit"}
    found, before = (cola.read(x / "ckpt.pt") for x in (out, tiny))
    assert any(not torch.equal(x, before["model"][name]) for name, x in before["ema"].items())
    for name, value in (before["model"] | before["ema"]).items():
        torch.testing.assert_close(found["model"][name], value, atol=1e-9, rtol=1e-9)
    model = cola.load(out / "ckpt.pt")
    assert sample.generate_images(model, ["a"])[0].shape == (32, 48, 3)
    trained(out, *RESUMED, "--steps", "2")       # still the prior alone
    assert {e["stage"] for e in log_of(out)} == {"mmdit"}


def test_init_from_trains_a_vae_that_is_asked_for_by_name(tiny, tmp_path):
    flags = ["--init_from", str(tiny / "ckpt.pt"), "--stage", "image_vae"]
    out = trained(tmp_path / "out", *QUIET, *flags)
    assert {e["stage"] for e in log_of(out)} == {"image_vae"}
    trained(out, *RESUMED)
    assert {e["stage"] for e in log_of(out)} == {"image_vae", "mmdit"}


def test_bad_checkpoints(tiny, tmp_path, capsys):
    """Those of test_cola.py end a run with one line."""
    out, bad = tmp_path / "out", tmp_path / "bad.pt"
    argv = [*TINY, "--init_from", str(bad), "--out_dir", str(out)]
    fails(argv, capsys, str(bad))                          # no such file
    found = cola.read(tiny / "ckpt.pt")
    found["config"]["mmdit"]["width"] = 64
    torch.save(found, bad)
    fails(argv, capsys, "another architecture")
    assert not out.exists()

# ---- Saving and the log ------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tiny, copied):
    with open(copied / "ckpt.pt", "r+b") as file:
        file.truncate(5000)
    assert cola.read(copied / "ckpt.prev.pt")["progress"]["mmdit"] == 0   # saved after stage 1b
    trained(copied, *RESUMED)
    assert_equal(tiny, copied)


def test_a_full_disk_leaves_the_last_checkpoint(copied, capsys):
    """A file may have half the size that a checkpoint needs."""
    before = (copied / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert train.main([*QUIET, *RESUMED, "--steps", "6", "--out_dir", str(copied)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ckpt.pt.tmp" in capsys.readouterr().err
    assert (copied / "ckpt.pt").read_bytes() == before and not (copied / "ckpt.pt.tmp").exists()


def test_a_log_line_that_was_cut_off(copied):
    """It costs nothing; resuming drops it, and the steps that will be taken again."""
    log = copied / "log.jsonl"
    lines = log.read_text().splitlines(True)
    log.write_text("".join(lines) + lines[-1].replace('"step": 4', '"step": 5') + '{"stage": "mm')
    torn = log.read_bytes()
    (copied / "loss.png").unlink()
    assert evaluate.main(["--out_dir", str(copied), "--eval_samples", "0", "--procs", "1"]) == 0
    assert (copied / "loss.png").exists() and log.read_bytes() == torn
    trained(copied, *RESUMED, "--steps", "5")
    assert [e["step"] for e in log_of(copied) if e["stage"] == "mmdit"] == [1, 2, 3, 4, 5]


def test_moments_are_restored_by_name():
    """Those of another optimizer, or of no parameter, are left out: it begins with fresh ones."""
    weights = {name: torch.nn.Parameter(torch.ones(4, 6)) for name in "abc"}
    kinds = [lambda: train.Muon([*weights.values()], 0.1, 0.0),
             lambda: torch.optim.AdamW(weights.values(), fused=True)]
    for name in "ab":
        weights[name].grad = torch.randn(4, 6)
    for kind, other in (kinds, kinds[::-1]):
        first, second, third = kind(), kind(), other()
        first.step()
        saved = checkpoint.moments([first], weights)
        assert saved.keys() == {"a", "b"}
        checkpoint.restore_moments([second, third], weights, saved | {"x": saved["a"]})
        again = checkpoint.moments([second], weights)
        torch.testing.assert_close(again, saved, atol=0, rtol=0)
        assert not third.state
