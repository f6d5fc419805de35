"""pytest tests/test_workers.py: sharing, signals, folders, and workers that die."""
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

import cola
import config
import train
import workers
from experiments import faults
from masks import IT2T, T2I, T2T
from test_train import QUIET, ROOT, fails, log_of, stage_and_batch, system, trained
from workers import Worker


def started(out):
    """A run of two workers that has taken its first steps."""
    argv = [sys.executable, ROOT / "train.py", *QUIET, "--steps", "100000", "--procs", "2",
            "--out_dir", str(out)]
    run = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while run.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.05)
    time.sleep(1.5)
    return run


def test_workers_share_every_task_within_one_sample():
    """Of 8 workers, and of more workers than a micro-step has samples."""
    work = [(task, k) for task in range(6) for k in range(10)]
    for world in (2, 3, 8, 20):
        shares = [Worker(rank, world).share(work) for rank in range(world)]
        assert sorted(sum(shares, [])) == work
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for task in range(6):
            counts = [sum(t == task for t, _ in share) for share in shares]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("flags, most", [
    ([], 32), (["--stage", "mmdit"], 120), (["--accumulate"], 20), (["--batch_size", "1"], 6)])
def test_fewer_samples_than_workers(flags, most, monkeypatch, capsys, tmp_path):
    """Twenty and more workers may share the micro-steps of twenty samples."""
    monkeypatch.setenv("WORLD_SIZE", str(most + 1))
    monkeypatch.setenv("RANK", "0")
    fails([*flags, "--device", "cpu", "--out_dir", str(tmp_path / "o")], capsys,
          f"{most + 1} workers", f"samples for {most}", "--batch_size")


def test_ddp_leaves_what_no_sample_used_without_a_gradient(system):
    """Whatever the task: DDP would refuse the next step if it waited for a parameter."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for task in (T2T, T2I, IT2T):
            stage, b = stage_and_batch(system, task, "--vae_lr_ratio", "0")
            wrapped = workers.wrap(stage, Worker(world=2), stage.args)
            for _ in range(2):
                wrapped(b, b.counts())[0].backward()
            unused = {name for name, p in stage.named_parameters() if p.grad is None and
                      p.requires_grad}
            assert ("mmdit.image_out.weight" in unused) == (task != T2I)
            assert ("mmdit.image_in.weight" in unused) == (task == T2T)
            assert "mmdit.text_in.weight" not in unused
    finally:
        dist.destroy_process_group()


def test_a_gpu_may_use_tf32_where_it_does_not_use_bfloat16():
    torch.set_float32_matmul_precision("highest")
    workers.join(config.merge({"device": "cpu", "procs": 1}))
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("rows", [0, 1, 64, 100])
def test_linear_maps_in_bfloat16_on_a_cpu(rows):
    """Outputs and gradients in float32, equal to the exact ones up to the rounding of bfloat16."""
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 8, bias=False))
    x, results = torch.randn(rows, 48, requires_grad=True), []
    for bf16 in (False, True):
        with workers.autocast(stage, bf16, "cpu"):
            y = stage(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *stage.parameters()])])
    for exact, rounded in zip(*results):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() <= 0.01 * exact.norm()
        assert rows == 0 or not torch.equal(rounded, exact)


def test_two_runs_do_not_share_a_folder(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    flags = [*QUIET, "--resume", "auto", "--steps", "6"]
    with open(out / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails([*flags, "--out_dir", str(out)], capsys, "another run is writing there")
    trained(out, *flags)

def test_an_error_of_one_worker_after_the_set_up_has_a_line(monkeypatch, capsys):
    """In the set-up all workers of a machine err alike, and the first one prints it."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    worker = Worker(rank=1, world=2)
    assert worker.leave(OSError("no space")) == 2 and capsys.readouterr().err == ""
    with pytest.raises(OSError), workers.signals(worker):
        raise OSError("no space")
    assert worker.leave(OSError("no space")) == 2 and "no space" in capsys.readouterr().err

# ---- Signals -----------------------------------------------------------------------------------

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize("numbers, saved", [([TERM] * 5, 3), ([INT], 3), ([TERM, INT, TERM], 3),
                                            ([INT, INT], 1)])
def test_signals_while_saving_leave_a_whole_checkpoint(numbers, saved, tmp_path, monkeypatch,
                                                       capsys):
    """They come while the checkpoint of the second step of stage 2 is being written. The third is
    the last; but a second SIGINT breaks off at once, with the checkpoint before."""
    out, write, before = tmp_path / "out", torch.save, signal.getsignal(TERM)

    def interrupted(found, file):
        if found["progress"]["mmdit"] == 2:
            for number in numbers:
                signal.raise_signal(number)
        write(found, file)
    monkeypatch.setattr(torch, "save", interrupted)
    assert train.main([*QUIET, "--save_every", "1", "--out_dir", str(out)]) == 130
    assert "--resume auto" in capsys.readouterr().err
    assert cola.read(out / "ckpt.pt")["progress"]["mmdit"] == saved
    assert log_of(out)[-1]["step"] == max(saved, 2) and signal.getsignal(TERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("rank, number", [(0, TERM), (0, INT), (0, signal.SIGKILL),
                                          (1, signal.SIGKILL)])
def test_signals_end_a_run_of_two_workers(rank, number, tmp_path):
    """Within 10 seconds; SIGTERM and SIGINT with a checkpoint and a line. Nobody outlives a killed
    worker 0, and a killed worker 1 is named."""
    out = tmp_path / "out"
    run = started(out)
    other = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().strip()
    os.kill(int(other) if rank else run.pid, number)
    error = run.communicate(timeout=10)[1]
    end = time.monotonic() + 10
    while Path(f"/proc/{other}").exists():
        assert time.monotonic() < end, "a worker lives on"
        time.sleep(0.1)
    progress = cola.read(out / "ckpt.pt")["progress"]
    assert progress["image_vae"] == 3 and "Traceback" not in error
    if rank:
        assert run.returncode == 1 and "a worker was killed" in error
    elif number != signal.SIGKILL:
        assert run.returncode == 130 and error.count("continue with --resume auto") == 1
        assert 0 < progress["mmdit"] == log_of(out)[-1]["step"]


@pytest.mark.slow
def test_a_full_disk_of_one_worker_ends_all(tmp_path):
    """With one line and status 2."""
    argv = [sys.executable, ROOT / "train.py", *QUIET, "--procs", "2", "--out_dir",
            str(tmp_path / "out")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("cannot be written") == 1
    assert "Traceback" not in done.stderr and not list((tmp_path / "out").glob("ckpt*"))


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    """The short form of experiments/faults.py."""
    counts = faults.kill_and_resume(tmp_path, kills=2, steps=20, joint=True)
    assert counts["kills"] == 2 and counts["different"] == 0, counts


@pytest.mark.slow
def test_torchrun_starts_killed_workers_anew(tmp_path):
    assert faults.kill_a_worker(tmp_path, kills=1, steps=30) == {"kills": 1, "different": 0}
