"""pytest tests/test_queries.py: visual queries of the experiments"""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import masks
from conftest import TINY
from experiments import queries
from masks import II, IT2T, C, I, J, N, P, Sample, dense, pack
from scenes import edits, pictures


@pytest.fixture
def rules():
    """The masks of queries, for one test."""
    before = masks.RULES.clone()
    yield masks.RULES
    masks.RULES.copy_(before)


def segments(layout):
    return "".join(masks.SEGMENTS[s] for s in layout.segment)


def test_queries_end_each_text_and_spread_over_the_image(rules):
    edit = [Sample(II, image=(4, 6)), Sample(II, 7, (4, 6), turn=1, drawn=(4, 6)),
            Sample(II, 5, turn=2, drawn=(4, 6))]
    packed = pack([edit, Sample(IT2T, prompt=5, image=(1, 2), clean=1, noisy=1, start=5), edit], 1)
    layout = queries.with_queries(packed, 2, (4, 6), torch.tensor([False, True, True]))
    image = 24 * "I"
    turns = [image, "{}{}{}CCCC" + 24 * "J" + image, "{}CCCC" + 24 * "J"]
    plain, hidden = ("".join(turns).format(*4 * letter) for letter in "PN")
    assert segments(layout) == plain + "PPPPPIICN" + hidden
    query = layout.segment == C
    query &= layout.task[layout.sample] == II
    assert layout.row[query].tolist() == [0, 0, 2, 2] * 4
    assert layout.col[query].tolist() == [0, 3, 0, 3] * 4
    assert torch.equal(layout.block, packed.block)

    for only_text in (False, True):
        queries.change_rules(only_text)
        mask = dense(layout, layout)
        of = lambda sample, turn, segment: ((layout.sample == sample) & (layout.block == turn)
                                            & (layout.segment == segment))
        sees = lambda q, k: {bool(x) for x in mask[q][:, k].flatten()}
        for turn in (1, 2):
            drawn, query = (of(0, turn, s) for s in (J, C))
            assert sees(drawn, of(0, turn, P)) == {True}
            assert sees(drawn, query) == {not only_text}
            assert sees(query, of(0, turn, P)) == sees(query, of(0, turn - 1, I)) == {True}
            assert sees(of(2, turn, J), of(2, turn, N)) == {False}
            assert sees(of(2, turn, C), of(2, turn, N)) == {True}
        assert sees(of(0, 2, J) | of(0, 2, C), of(0, 1, C) | of(0, 1, P) | of(0, 1, J)) == {False}


def test_the_loss_of_queries_is_that_of_their_own_place_and_image(rules):
    """Queries of a text without image have none; halves of a batch add up to the whole."""
    edit = [Sample(II, image=(4, 4)), Sample(II, 6, (4, 4), turn=1, drawn=(4, 4)),
            Sample(II, 6, turn=2, drawn=(4, 4))]
    told = [Sample(II, 6, (4, 4)), Sample(II, 6, turn=1, drawn=(4, 4))]
    draw, clean, hidden = torch.Generator().manual_seed(0), [], []
    batch, stage = SimpleNamespace(features=None), SimpleNamespace(repa=torch.nn.Identity(), side=2)

    def loss(samples, hidden, clean, count):
        batch.layout = queries.with_queries(pack(samples, 1), 2, (4, 4))
        batch.z_image = torch.cat(clean)
        asked = int(queries.asked(batch.layout)[0].sum())
        counts = {"queries": count or asked}
        return queries.PriorStage.repa_loss(stage, batch, hidden, counts), asked

    own = [torch.randn(16, 8, generator=draw) for _ in range(7)]
    pooled = [x.view(2, 2, 2, 2, 8).mean((1, 3)).view(4, 8) for x in own]     # 2 x 2 quadrants
    images = [[own[0], own[1], own[1], own[2]], [own[3], own[4]]]             # I J I J, I J
    layout = queries.with_queries(pack([edit, told], 1), 2, (4, 4))
    right = torch.zeros(len(layout), 8)
    is_query = layout.segment == C
    right[is_query] = torch.cat([pooled[1], pooled[2], pooled[6], pooled[4]])  # 6: of no image
    assert loss([edit, told], right, sum(images, []), 0)[0] < 1e-6
    swapped = right.clone()
    swapped[is_query.nonzero()[:8, 0]] = torch.cat([pooled[2], pooled[1]])
    whole, asked = loss([edit, told], swapped, sum(images, []), 0)
    assert whole > 0.1 and asked == 12
    first = layout.sample == 0
    parts = [loss([own], swapped[at], z, asked)[0]
             for own, at, z in ((edit, first, images[0]), (told, ~first, images[1]))]
    torch.testing.assert_close(sum(parts), whole)


def test_a_probe_reads_what_is_linear():
    """Quadrants of a grid of four latents, whose features are shape and size."""
    rng = np.random.default_rng(0)
    scenes = [pictures.sample_scene(rng) for _ in range(200)]
    features, words = np.zeros((200, 4, 16), np.float32), [*pictures.SHAPES, *pictures.SIZES]
    for own, scene in zip(features, scenes):
        for o in scene.objects:
            row, column = edits.quadrant(o)
            own[2 * row + column, [words.index(o.shape), words.index(o.size)]] = 1
    rates = queries.probe(features, scenes, 2)
    assert rates["shape"] == rates["size"] == 1.0 and 0.3 < rates["color"] < 0.7


@pytest.mark.slow
def test_training_with_features_and_evaluation(tiny, tmp_path, capsys):
    flags, out = [*TINY, "--tasks", "t2i:1,ii:2", "--repa_layer", "1"], str(tmp_path / "out")
    file = str(tmp_path / "f.npy")
    assert queries.main("features", file, str(tiny / "ckpt.pt"), *flags) == 0
    assert "a linear map reads" in capsys.readouterr().out
    assert np.load(file).shape == (5 * 64, 16, 32)
    for command in (["train", "2", file, *flags, "--eval_samples", "0"],
                    ["evaluate", "2", "queries", "--eval_samples", "1"]):
        command = [sys.executable, "-m", "experiments.queries", *command, "--out_dir", out]
        assert subprocess.run(command).returncode == 0
    losses = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert 0 < losses[-1]["repa"] < 2 and losses[-1]["image"] > 0


def test_mistakes_are_one_line(tmp_path, capsys):
    missing = str(tmp_path / "no.npy")
    for wrong, words in (([], "expected features"), (["train", "x", "none"], "expected features"),
                         (["train", "2", missing], "no.npy"), (["train", "0", "none"], "train K"),
                         (["evaluate", "2", "neither"], "evaluate K MODE"),
                         (["features", missing, "x.pt", "--data", "."], "leave out --data")):
        assert queries.main(*wrong) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
