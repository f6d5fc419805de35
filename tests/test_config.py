"""pytest tests/test_config.py"""
import shlex

import pytest

import config
import masks
import sample
from config import DATA, DEFAULTS, FLAG, FLAGS, MODEL, RECIPE, RUN, merge, parse
from conftest import TINY

TRAINED = vars(merge({"text_vae_steps": 7}))         # the flags that a checkpoint holds


def flags(text):
    return merge(parse(text.split()))


def other(name):
    """A value that the flag may have and does not have by default."""
    flag, usual = FLAG[name], TRAINED[name]
    if isinstance(usual, bool):
        return not usual
    if isinstance(usual, list):
        return [16 * x for x in usual] or ["photos"]
    if isinstance(usual, str):
        return next((word for word in flag.allowed or () if word != usual), "1.5")
    return flag.allowed[0] if usual != flag.allowed[0] else flag.allowed[1]

# ---- The table ---------------------------------------------------------------------------------

def test_every_row_is_whole():
    rows = [flag for group in FLAGS.values() for flag in group]
    assert len({flag.name for flag in rows}) == len(rows)
    for flag in rows:
        assert len(flag.why) > 3 and flag.kind in (MODEL, RECIPE, DATA, RUN)
        assert flag.default is not None or "default" in flag.why
    # A resumed run trains all stages, and one from a checkpoint has its own number of steps.
    assert FLAG["stage"].kind == RUN and FLAG["scale"].kind == DATA


def test_defaults_are_allowed_and_those_of_sampling():
    assert merge({}) == merge(parse([]))
    image = {"guidance": "guidance", "image_temperature": "temperature", "image_steps": "steps"}
    assert all(DEFAULTS[name] == getattr(sample.IMAGE, ours) for name, ours in image.items())
    text = {"text_guidance": "guidance", "text_temperature": "temperature", "text_shift": "shift",
            "text_snap": "snap", "text_steps": "steps"}
    text |= {name: name for name in ("repaint_share", "repaint_cycles")}
    assert all(DEFAULTS[name] == getattr(sample.TEXT, ours) for name, ours in text.items())


@pytest.mark.parametrize("name", [n for n, f in FLAG.items()
                                  if f.allowed and not isinstance(f.allowed[0], str)])
def test_numbers_are_checked(name):
    low, high = FLAG[name].allowed
    for x in (low - 1, high + 1, *[float("nan")] * isinstance(low, float)):
        value = [x] * len(FLAG[name].default) if isinstance(FLAG[name].default, list) else x
        with pytest.raises(ValueError, match=f"--{name} "):
            merge({name: value})


def test_shown_flags_are_read_back():
    for text in ("", " ".join(TINY), "--no-text_snap --fsdp --optimizer adamw --image_size 32 64",
                 "--text_loc -1.5 --dual_layers 0 --data a b --aspect --vae_interval 2 3"):
        assert merge(parse(shlex.split(config.show(flags(text)).replace("all as by default", "")))
                     ) == flags(text)


def test_help_and_unknown_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in FLAG)
    for argv in (["--batch_sise", "3"], ["--batch", "3"], ["--device", "tpu"],
                 ["--steps", "1.5"], ["--any_order", "1"]):
        with pytest.raises(SystemExit) as end:
            parse(argv)
        assert end.value.code == 2 and argv[0] in capsys.readouterr().err
    assert parse(["--eval_samples", "3"], "evaluate.py", config.EVALUATE) == {"eval_samples": 3}
    with pytest.raises(SystemExit):
        parse(["--lr", "1"], "evaluate.py", config.EVALUATE)

def test_flags_in_a_file(tmp_path):
    """Several in a line, comments, and explicit flags behind it that win."""
    paper = flags("@paper.flags")
    assert (paper.batch_size * paper.micro_steps, paper.width, paper.layers, paper.heads,
            paper.block_len, paper.lr, paper.text_vae_lr) == \
        (1408, 2048, 24, 16, 16, 1.5e-4, 1.5e-4)
    assert paper.warmup * paper.steps == 5000 and paper.schedule == "cosine" and not paper.ema
    assert paper.w_filler == 1
    assert flags("@paper.flags --width 64").width == 64
    assert flags("--width 64 @paper.flags").width == 2048
    (loop := tmp_path / "loop.flags").write_text(f"@{loop}")
    with pytest.raises(SystemExit, match="2"):
        flags(f"@{loop}")
    with pytest.raises(SystemExit, match="2"):
        parse(["@none.flags"])

# ---- A run that starts from a checkpoint -------------------------------------------------------

@pytest.mark.parametrize("start", ("resume", "init"))
@pytest.mark.parametrize("name", FLAG)
def test_a_flag_comes_from_where_its_kind_says(name, start, monkeypatch):
    monkeypatch.setattr(config, "check", lambda a: None)       # one flag alone may be impossible
    kind, found = FLAG[name].kind, TRAINED | {name: other(name)}
    stored = start == "resume" and kind != RUN or kind in (MODEL, RECIPE)
    assert getattr(merge({}, found, start), name) == (found if stored else TRAINED)[name]
    given = {name: TRAINED[name]}
    if kind == MODEL:
        with pytest.raises(ValueError, match=f"--{'no-' * (given[name] is False)}{name}.*ckpt.pt"):
            merge(given, found, start, "ckpt.pt")
    else:
        assert getattr(merge(given, found, start), name) == given[name]
    assert bool(config.changes(given, found)) == (kind != RUN)

# ---- Values that do not go together ------------------------------------------------------------

@pytest.mark.parametrize("text", [                         # the flag at fault first
    "--init_from a --init_official b", "--image_size 32 32 32", "--aspect",
    "--aspect --data photos --image_size 32 64", "--width 30 --heads 4",
    "--text_vae_width 30 --text_vae_heads 4", "--vae_block_len 3 --block_len 4",
    "--seq_len 8 --block_len 16", "--seq_len 128 --block_len 128 --first_block right",
    "--repa_layer 4 --w_repa 0.5", "--w_repa 0.5 --tasks t2t:1,it2t:1",
    "--repa_features a.npy --aspect --data photos", "--vae_interval 0 5",
    "--attention flex --device cpu",
    "--text_vae_steps 0 --lambda_ref 0", "--text_vae_steps 0 --vae_lr_ratio 1",
    "--text_vae_steps 0 --vae_lr_ratio 1 --lambda_vae 0 --lambda_ref 0",
    "--vae_logsnr nan", "--tasks often", "--tasks t2v:1", "--tasks t2t:1,t2t:2",
    "--tasks t2t:-1,t2i:2", "--tasks t2t:0,t2i:0", "--tasks t2t:inf", "--tasks t2t:nan",
    "--out_dir=", f"--out_dir={__file__}"])
def test_impossible_flags(text):
    name = text.replace("=", " ").split()[0]
    with pytest.raises(ValueError, match=f"^{name} .*$"):
        flags(text)


@pytest.mark.parametrize("text", [
    "--image_size 16 --data photos --aspect",
    "--image_size 16 --text a.txt --tasks t2t:1",
    "--text_vae_steps 0 --vae_lr_ratio 1 --lambda_ref 0",
    # A padded prefix needs a second block, but it2t has no prefix.
    "--tasks it2t:1,t2t:0 --first_block left --block_len 128 --seq_len 128",
    "--first_block left --block_len 64 --seq_len 128"])
def test_possible_flags(text):
    flags(text)


def test_scenes_need_pixels():
    with pytest.raises(ValueError, match="^.*24 x 24.*$"):
        flags("--image_size 23 64")

# ---- Flags that hold more than one number ------------------------------------------------------

def test_readings_of_flags():
    assert config.task_shares("t2t:1, t2i:3") == {"t2t": 0.25, "t2i": 0.75}
    assert config.task_shares("it2t:2,t2t:0") == {"it2t": 1.0}
    assert config.task_shares("all").keys() == {*masks.TASKS}
    assert config.image_hw(flags("--image_size 32")) == (32, 32)
    assert config.image_hw(flags("--image_size 32 64")) == (32, 64)
    assert config.logsnr(flags("--vae_logsnr learned")) is None
    assert config.logsnr(flags("--vae_logsnr -1.5")) == -1.5
    assert config.image_time_loc(flags("--image_loc 2")) == 2
    assert config.image_time_loc(flags("--image_loc 2 --time_law uniform")) == 0
    assert config.stages(flags("--tasks t2t:1,t2i:0")) == ["text_vae", "mmdit"]
    assert config.stages(flags("--stage image_vae")) == ["image_vae"]
    scaled = flags("--scale 0.1 --steps 4 --image_vae_steps 25 --text_vae_steps 0 --vae_lr_ratio 1 "
                   "--lambda_ref 0")
    assert [config.steps(scaled, stage) for stage in config.STAGES] == [0, 2, 1]
