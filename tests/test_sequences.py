"""pytest tests/test_sequences.py: images in sequence, as sample.py draws them"""
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import experiments.edits
import flow
import masks
import sample
from cuda_attention import make_plan, padded
from masks import II, VID, J, Sample, pack
from scenes import edits
from test_sample import BLOCK, S, close, latents, model, picture  # noqa: F401


def packed_velocities(model, given, texts, drawn, noise, task):
    """Those of the images drawn, (turns, B h w, Cz), which begin as noise, in the pass of training
    at t = 1; one picture of each sample is given."""
    ids = [[model.ids(text, end=False) for text in own] for own in texts]
    first = model.encode_images([picture for picture, in given])
    clean, turns = [first, *drawn], range(len(texts[0]))
    layout = pack([[Sample(task, len(x), (4, 4), turn=turn, drawn=(4, 4) if turn else (0, 0))
                    for turn, x in enumerate(own)] for own in ids], BLOCK)
    z = [x[b * 16:b * 16 + 16] for b in range(len(texts)) for turn in turns
         for x in ([noise[turn - 1]] if turn else []) + [clean[turn]]]
    t_index = (layout.segment == J).long()
    with torch.no_grad():
        v = model.mmdit(model.encode_text(sum(ids, []))[0], torch.cat(z), torch.tensor([0.0, 1.0]),
                        t_index, layout, make_plan(layout))[1]
    own = v[t_index[masks.is_image(layout.segment)] == 1].view(len(texts), len(drawn), 16, -1)
    return own.transpose(0, 1).flatten(1, 2)


@pytest.fixture
def begun(monkeypatch):
    """The noise of each image."""
    noise, solve = [], flow.solve
    monkeypatch.setattr(flow, "solve", lambda f, z, *rest: noise.append(z) or solve(f, z, *rest))
    return noise


@pytest.mark.parametrize("task", [II, VID])
def test_images_in_sequence_equal_the_packed_pass_of_training(model, latents, begun, task):
    """With one Euler step, an image is its noise minus the velocity at t = 1."""
    given, texts = [[picture(0)], [picture(1)]], [["a cat", "remove it.", ""],
                                                  ["", "make the circle blue.", "add a star."]]
    s = replace(S, steps=1)
    images = sample.generate_turns(model, given, texts, s, task)
    assert [[image.shape for image in drawn] for drawn in images] == [[(32, 32, 3)] * 2] * 2
    noise, clean = torch.stack(begun), torch.stack(latents)               # (turns, B h w, Cz)
    close(noise - clean, packed_velocities(model, given, texts, clean, noise, task))
    sample.generate_turns(model, given[1:], texts[1:], s, task, first=1)   # alone, the same
    close(torch.stack(latents[2:]), torch.stack(latents[:2])[:, 16:])


@pytest.mark.parametrize("name", ["causal_texts", "late_sources", "texts_so_far"])
def test_changed_masks_of_experiments(model, latents, begun, monkeypatch, name):
    """Under each change, edits are drawn as they are trained, and otherwise than without it."""
    given, texts = [[picture(0)], [picture(1)]], [["", "remove it."], ["", "make it blue."]]
    if name == "texts_so_far":
        texts = [["a cat", *own[1:]] for own in texts]
    s = replace(S, steps=1)
    sample.generate_turns(model, given, texts, s)
    for owner, value in ((padded, "padded_mask"), (edits.Sequences, "edits"),
                         (sample.Context, "add")):
        monkeypatch.setattr(owner, value, getattr(owner, value))            # to be restored
    rules = masks.RULES.clone()
    try:
        experiments.edits.CHANGES[name]()
        sample.generate_turns(model, given, texts, s)
        noise, drawn = begun[1:], latents[1:]
        close(noise[0] - drawn[0], packed_velocities(model, given, texts, drawn, noise, II)[0])
        assert (drawn[0] - latents[0]).abs().max() > 1e-3
    finally:
        masks.RULES.copy_(rules)


def test_an_image_begins_near_the_one_before(model, latents, monkeypatch):
    begun, solve = [], flow.solve
    monkeypatch.setattr(flow, "solve", lambda f, z, grid, *rest: begun.append((z, grid))
                        or solve(f, z, grid, *rest))
    for rho in (0.0, 0.9):
        sample.generate_turns(replace(model, image_rho=rho), [[picture(0)], [picture(1)]],
                              [["a cat", "make it blue.", ""]] * 2, replace(S, steps=4))
    before = [model.encode_images([picture(0), picture(1)]), latents[2]]
    for z, (far, grid), (near, later) in zip(before, begun[:2], begun[2:]):
        close(near, flow.near(z, far, 0.9))
        close(later, flow.shift_time(grid, flow.near_shift(0.9)))
    sample.generate_turns(replace(model, image_rho=0.9), [[]], [["a cat"]], replace(S, steps=4))
    sample.generate_turns(model, [[]], [["a cat"]], replace(S, steps=4))
    assert torch.equal(begun[4][0], begun[5][0]) and torch.equal(begun[4][1], begun[5][1])


@pytest.mark.parametrize("turn", [1, 2])
def test_guidance_by_text_and_by_images(model, latents, turn):
    """Each weight moves along its own difference of velocities; the copies never meet. Without
    text, a copy keeps the images before; those drawn before the last are given."""
    given = [[picture(b + 2 * i) for i in range(turn)] for b in range(2)]
    texts = [["a cat", "make it blue.", "remove it."], ["", "make it red.", "add a star."]]
    texts = [own[:turn + 1] for own in texts]
    for w, w_image in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (3.0, 1.0), (3.0, 1.5)):
        s = replace(S, steps=1, guidance=w, image_guidance=w_image)
        sample.generate_turns(model, given, texts, s)
    both, image, none, by_text, guided = latents
    sample.generate_turns(model, given, [[""] * (turn + 1)] * 2, replace(S, steps=1))
    close(image, latents[-1])
    assert min((both - image).abs().max(), (image - none).abs().max()) > 1e-2
    close(by_text, image + 3.0 * (both - image))
    close(guided, none + 1.5 * (image - none) + 3.0 * (both - image))


def test_a_drawn_image_joins_the_context_of_every_copy_that_has_images(model, latents):
    """What a second image is drawn from does not depend on whether the first was given."""
    texts = [["a cat", "make it blue."]]
    for w, w_image in ((3.0, 1.0), (3.0, 1.5)):
        s = replace(S, steps=1, guidance=w, image_guidance=w_image)
        sample.generate_turns(model, [[]], texts, s)
        first, second = latents[-2:]
        encode, model.encode_images = model.encode_images, lambda images: first
        rngs = sample.make_rngs(0, 0, 1)
        sample.draw_noise(rngs, 16, 32)                    # of the first image
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "make_rngs", lambda *given: rngs)
            sample.generate_turns(model, [[picture(0)]], texts, s)
        model.encode_images = encode
        close(latents[-1], second)


@pytest.mark.parametrize("task", [II, VID])
def test_the_first_image_is_drawn_as_text_to_image_is(model, latents, task):
    """By its guidance and temperature, whatever the settings of the others."""
    given, text = [[picture(0)]], [["a cat", "make it red."]]
    for s in (replace(S, steps=1), replace(S, steps=1, guidance=3.0, temperature=0.5)):
        sample.generate_turns(model, [[]], text, s, task)
        sample.generate_turns(model, given, text, s, task)
    close(latents[0], latents[3])
    assert (latents[2] - latents[5]).abs().max() > 1e-2       # a second image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "IMAGE", replace(sample.IMAGE, guidance=1.0))
        sample.generate_turns(model, [[]], text, replace(S, steps=1), task)
    assert (latents[0] - latents[6]).abs().max() > 1e-2


def test_edits_stories_and_clips(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(sample, "open_model", lambda args, task: asked.append(task) or model)
    for name in ("a", "b"):
        Image.fromarray(picture(0, (40, 60))).save(f"{name}.png")
    for line, files in (
            ("edit a.png 'make it blue.' --out c.png", {"c.png": (32, 32)}),
            ("edit a.png b.png 'put it here.' --n 2", {"sample_0.png": (32, 32),
                                                       "sample_1.png": (32, 32)}),
            ("story 'a cat' 'make it blue.' --out s.png --image_guidance 1.5", {"s.png": (64, 32)}),
            ("video 'a cat' --out v.gif", {"v.gif": (32, 32), "v_frames.png": (160, 32)}),
            ("video 'a cat' --images a.png b.png --frames 3 --out w.gif",
             {"w_frames.png": (96, 32)})):
        assert sample.main([*shlex.split(line), "--steps", "1"]) == 0
        for file, size in files.items():
            assert Image.open(file).size == size
    assert asked == ["ii", "ii", "ii", "vid", "vid"] and Image.open("v.gif").n_frames == 5
    assert Image.open("s.png").text["caption"] == "a cat make it blue."
    shown = np.asarray(Image.open("w_frames.png"))                # a.png and b.png are the same
    assert np.array_equal(shown[:, :32], shown[:, 32:64])


def test_the_table_of_changes(tmp_path, capsys):
    metrics = {"samples": {"seen.ii.scene": 4}, "seen": {"ii": {"scene": 0.25}}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    experiments.edits.table(str(tmp_path))
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert {len(cells) for cells in lines} == {1 + len(experiments.edits.RATES)}
    assert [cell.strip() for cell in lines[2]] == [tmp_path.name, "0.250"] + [""] * 11


def test_the_table_of_guidances(model, capsys, monkeypatch):
    monkeypatch.setattr(sample, "open_model", lambda args, task: model)
    asked = []
    monkeypatch.setattr(sample, "generate_turns", lambda model, given, texts, s, **rest: (
        asked.append((s.guidance, s.image_guidance)) or given))         # each source as it is
    experiments.edits.guidance("a", n=16)
    assert asked == [(1.0, 1.0), (1.0, 1.5), (2.0, 1.0), (2.0, 1.5), (3.0, 1.0), (3.0, 1.5)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "text 1, images 1.5: scene 0.000 done 0.000 kept 1.000"


@pytest.mark.parametrize("line, why", [
    ("guidance missing", "no such checkpoint"), ("guidance", "expected baselines"),
    ("table missing", "No such file"), ("table .", "not the rates of a run"), ("what", "expected")])
def test_experiments_of_edits_refuse_in_one_line(line, why, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("metrics.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["edits.py", *line.split()])
    assert experiments.edits.main() == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and why in error


def test_guidance_refuses_a_model_without_edits(model, monkeypatch):
    monkeypatch.setattr(sample.cola, "load", lambda checkpoint: replace(model, tasks=("t2i",)))
    with pytest.raises(ValueError, match="trained for t2i, not for ii"):
        experiments.edits.guidance("a", n=16)
