"""pytest tests/test_evaluate.py"""
import json
import shutil

import numpy as np
import pytest
import torch

import cola
import data
import evaluate
import sample
from masks import II, VID
from scenes import edits, language, pictures
from scenes.pictures import read_image, render
from test_train import args_for, fails
from workers import Worker

METRICS = {"t2i": {"count", "color", "shape", "size", "relation", "background", "scene",
                   "by_count"},
           "it2t": {"exact", "true", "vqa", "by_kind"},
           "t2t": {"consistent", "by_sentences", "sentence", "length", "wrong"}}


def test_right_answers_have_rate_1(tiny, monkeypatch):
    """From generators that know the scenes. The VAEs, trained for 3 steps, do not reach 1."""
    groups, draw = [], evaluate.draw_scenes

    def texts(model, prefixes, prompts=None, **more):
        scenes = groups[-1].scenes
        if prompts is None:                                # the rest of the story
            stories = map(language.story, scenes, groups[-1].rngs(data.Purpose.WINDOW))
            return [story[len(prefix):] for story, prefix in zip(stories, prefixes)]
        if prompts[0] == "describe the image.":
            return [language.caption(s, np.random.default_rng(0)) for s in scenes]
        return [min(language.answers(s, prompt)) for s, prompt in zip(scenes, prompts)]
    monkeypatch.setattr(evaluate, "draw_scenes",
                        lambda *given, **more: groups.append(draw(*given, **more)) or groups[-1])
    monkeypatch.setattr(sample, "generate_images", lambda *given, **more: [
        evaluate.pictures.render(s, (32, 32)) for s in groups[-1].scenes])
    monkeypatch.setattr(sample, "generate_text", texts)
    model = cola.load(tiny / "ckpt.pt")
    metrics = evaluate.rates(model, args_for("--eval_samples", "5"), {*METRICS}, Worker())
    assert metrics.keys() == {"n", "samples", "seen", "heldout", "ceiling"} and metrics["n"] == 5
    for path, n in (("seen.t2i.scene", 15), ("heldout.t2i.by_count.2", 5), ("seen.it2t.vqa", 5),
                    ("seen.t2i.relation", 10), ("ceiling.text", 10), ("ceiling.image", 5)):
        assert metrics["samples"][path] == n, path
    for split in ("seen", "heldout"):
        assert {task: set(names) for task, names in metrics[split].items()} == METRICS
        assert metrics[split]["t2i"].pop("by_count") == dict.fromkeys("123", 1.0)
        assert {*metrics[split]["t2t"].pop("by_sentences").values()} == {1.0}
        assert {*metrics[split]["it2t"].pop("by_kind").values()} == {1.0}
        assert metrics[split]["t2t"].pop("wrong") == dict.fromkeys(language.WRONG, 0.0)
        assert {rate for rates in metrics[split].values() for rate in rates.values()} == {1.0}
    assert metrics["ceiling"].keys() == {"image", "text"} and metrics["ceiling"]["text"] < 1


@pytest.mark.parametrize("right", [True, False])
def test_edits_series_and_clips_are_judged(right, tiny, monkeypatch):
    """Drawn by one who knows what every instruction asks for, or returns what was given."""
    model, made = cola.load(tiny / "ckpt.pt"), {}
    for name in ("edit", "follow", "next_edit"):
        def record(*given, make=getattr(edits, name), **more):
            found = make(*given, **more)
            sources = given[1:3] if isinstance(given[0], str) else \
                [given[0] if isinstance(given[1], np.random.Generator) else given[1]]
            if found:
                made[found.instruction, *map(content, sources)] = found.target
            return found
        monkeypatch.setattr(edits, name, record)
    content = lambda scene: frozenset((o.attributes, edits.quadrant(o)) for o in scene.objects)
    said, clip, clips = language.caption, edits.clip, {}
    monkeypatch.setattr(language, "caption", lambda scene, *more: made.setdefault(
        ((text := said(scene, *more)),), scene) and text)
    monkeypatch.setattr(edits, "clip", lambda *given: clips.setdefault(
        (c := clip(*given)).caption, c) and c)

    def turns(model, given, texts, settings, task=II, first=0):
        drawn = []
        for images, own in zip(given, texts):
            if not right:
                count = edits.FRAMES - len(images) if task == VID else 1
                drawn.append([np.zeros((32, 32, 3), np.uint8), *images][-1:] * count)
            elif task == VID:
                drawn.append([render(f) for f in clips[own[0]].frames[len(images):]])
            else:
                sources = images if own[-1].startswith("put the") else images[-1:]
                before = map(content, map(read_image, sources))
                drawn.append([render(made[own[-1], *before])])
        return drawn

    monkeypatch.setattr(sample, "generate_turns", turns)
    args = args_for("--eval_samples", "8")
    metrics = evaluate.rates(model, args, {"ii", "vid"}, Worker())
    for split in ("seen", "heldout"):
        found = metrics[split]
        assert {*found["ii"].pop("by_kind")} == {*edits.KINDS}
        kept, put_back = found["ii"].pop("kept"), found["ii"].pop("put_back", None)
        assert found["vid"].keys() == {"first", "clip", "motion", "steady", "scene", "prediction"}
        flat = [found["ii"].pop(name) for name in ("turns", "true_history")] + [found["ii"]]
        assert [len(rates) for rates in flat] == [4, 3, 4] and kept == 1.0
        assert put_back in (None, right)                   # few series have it
        rates = {rate for rates in (*flat, found["vid"]) for rate in rates.values()}
        assert rates == {float(right)}
    n = metrics["samples"]
    assert (n["seen.ii.scene"], n["seen.ii.by_kind.add"], n["seen.ii.turns.3"]) == (24, 3, 8)


def test_stories_are_judged_by_sentence_and_length(monkeypatch):
    """Of a group whose data go on for five sentences: three are said, two of them true."""
    told = ["there is a red circle. a. b. c.", "there is a red circle. d. e."]
    texts = ["", " the background is gray. the circle is small. the circle is blue."]
    monkeypatch.setattr(language, "story", lambda scene, words: told[scene])
    monkeypatch.setattr(sample, "generate_text", lambda *given, **more: texts)

    class Words:
        integers = staticmethod(lambda low, high: low)     # prefixes of one sentence
    group = type("Group", (), {"scenes": [0, 1], "numbers": [0], "rngs": lambda *_: [Words] * 2})()
    found = list(evaluate.judge_stories(None, group, None))
    values = lambda name: [value for path, value in found if path == f"t2t.{name}"]
    assert values("sentence") == [True, True, False] and values("consistent") == [False, False]
    assert values("wrong.color") == [False, False, True]
    assert values("by_sentences.0") == values("by_sentences.3") == [False]
    assert sum(values("length")) / 2 == pytest.approx(3 / 5)


def test_wrong_answers_and_captions_are_false(tiny, monkeypatch):
    """Each text is true of its image alone where log p says so: the first one of every list."""
    scenes, lists = [], []

    def log_answers(model, prompt, image, texts, steps):
        scene = pictures.read_image(image)
        true = (language.answers(scene, prompt) if prompt != "describe the image." else
                {x for x in texts if language.is_exact(language.read_caption(x), scene)})
        scenes.append(scene)
        lists.append(texts)
        assert len({*texts}) == len(texts)
        return [float(text in true) for text in texts]
    monkeypatch.setattr(evaluate.likelihood, "log_answers", log_answers)
    group = evaluate.draw_scenes(0, range(30), heldout=False)
    found = list(evaluate.judge_likelihoods(cola.load(tiny / "ckpt.pt"), group))
    assert len(found) == 60 and all(right for _, right in found)
    assert {name for name, _ in found} == {"it2t.ranked.answer", "it2t.ranked.caption"}
    assert all(len(texts) == 8 for texts in lists[1::2]) and {len(x) for x in lists[::2]} >= {2, 8}


def test_answers_and_captions_are_ranked(tiny):
    args = args_for("--eval_samples", "0", "--rank_samples", "1")
    metrics = evaluate.rates(cola.load(tiny / "ckpt.pt"), args, {"it2t"}, Worker())
    assert metrics["seen"]["it2t"]["ranked"].keys() == {"answer", "caption"}
    assert metrics["samples"]["heldout.it2t.ranked.answer"] == 1


def test_workers_share_the_samples(tiny, monkeypatch):
    """Two workers have the verdicts of one, and no scene twice."""
    model, args = cola.load(tiny / "ckpt.pt"), args_for("--eval_samples", "5")
    monkeypatch.setattr(evaluate, "GROUP_SIZE", 2)
    verdicts = {}

    class Part(Worker):
        def gather(self, items):
            verdicts.setdefault(self.world, []).extend(items)
            return verdicts[self.world]

    one = evaluate.rates(model, args, {*METRICS}, Part())
    evaluate.rates(model, args, {*METRICS}, Part(0, 2))
    two = evaluate.rates(model, args, {*METRICS}, Part(1, 2))
    assert one == two and sorted(verdicts[1]) == sorted(verdicts[2])


def test_intervals_are_of_the_samples_behind_a_rate():
    samples = {"seen.t2i.color": 150, "heldout.t2i.color": 50, "ceiling.text": 100}
    half = {"t2i": {"color": 0.5}}
    rates = {"samples": samples, "seen": half, "heldout": half, "ceiling": {"text": 0.5}}
    _, color, text = evaluate.table(rates).splitlines()
    for line, n in ((color, 150), (color, 50), (text, 100)):
        low, high = evaluate.wilson(0.5, n)
        assert f"[{low:.3f}, {high:.3f}]" in line
    assert color.startswith("t2i color") and text.startswith("ceiling text")
    assert evaluate.wilson(0.5, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert evaluate.wilson(0.0, 10)[0] == 0.0 and evaluate.wilson(1.0, 10)[1] == 1.0


def test_pictures():
    cells = [(np.full((32, 48, 3), 9, np.uint8), "a caption of many words " * 9)] * 7
    grid = np.asarray(evaluate.captioned_grid(cells))
    assert grid.shape == (2 * 240, 6 * 168, 3) and (grid[:106, :160] == 9).all()
    log = [{"step": i + 1, "loss": 2.0 / (i + 1), "recon": None, "lr": 0.1} for i in range(120)]
    plot = evaluate.loss_plot("text_vae", log)
    assert (255, 0, 0) in [color for _, color in plot.getcolors()]       # the curve of the loss
    evaluate.loss_plot("mmdit", [{"step": 1, "loss": None}])             # no curve


def changed(tiny, out, group, name, value):
    """A folder with the checkpoint of a run in which one entry is another."""
    out.mkdir()
    found = torch.load(tiny / "ckpt.pt", weights_only=True)
    found[group][name] = value
    torch.save(found, out / "ckpt.pt")
    return ["--out_dir", str(out), "--procs", "1", "--device", "cpu"]


def test_the_command_repeats_the_report_of_the_run(tiny, tmp_path):
    """With the same metrics whatever --bf16 the run had, and without a change of the checkpoint."""
    out = tmp_path / "out"
    argv = changed(tiny, out, "args", "bf16", "on")
    shutil.copy(tiny / "log.jsonl", out)
    before = (out / "ckpt.pt").read_bytes()
    few = "--eval_samples 2 --image_steps 2 --text_steps 2".split()
    assert evaluate.main([*argv, *few]) == 0
    again, first = (json.loads((folder / "metrics.json").read_text()) for folder in (out, tiny))
    assert all(again[key] == first[key] for key in ("n", "seen", "heldout", "ceiling"))
    assert again["config"]["bf16"] == "on" and again["config"]["width"] == 32
    assert (out / "ckpt.pt").read_bytes() == before
    assert (out / "samples.png").exists() and (out / "loss.png").exists()


def test_a_prior_that_was_never_trained_is_not_judged(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    argv = changed(tiny, out, "progress", "mmdit", 0)
    assert evaluate.main(argv) == 0 and {path.name for path in out.iterdir()} == {"ckpt.pt"}
    fails([*argv, "--out_dir", str(tmp_path / "none")], capsys, "none", main=evaluate.main)
