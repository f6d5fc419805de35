"""Flags of a run of seconds, and the folder that such a run leaves."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

TINY = ("--text_vae_width 24 --text_vae_heads 2 --text_vae_layers 1 --text_vae_steps 3 "
        "--text_vae_batch 8 --image_vae_width 16 --image_vae_steps 3 --image_vae_batch 8 "
        "--width 32 --heads 2 --layers 2 --dual_layers 1 --block_len 4 --steps 4 --batch_size 4 "
        "--micro_steps 3 --cooldown 1 --muon_lr 0.002 --tasks t2t:1,t2i:1,it2t:1 --pool 64 "
        "--procs 1 --device cpu --eval_samples 2 --image_steps 2 --text_steps 2 --vocab_size 300 "
        "--bf16 off --ema 0.9999").split()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than a few seconds; run by .ci/run")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a whole run."""
    import train
    out = tmp_path_factory.mktemp("tiny") / "out"
    assert train.main([*TINY, "--out_dir", str(out)]) == 0
    return out
