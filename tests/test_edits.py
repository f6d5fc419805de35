"""pytest tests/test_edits.py"""
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from scenes import edits
from scenes.language import unique_phrases
from scenes.pictures import COLORS, Scene, is_heldout, read_image, render, sample_scene


def draw(kind, seed, n, heldout=False):
    """n edits of a kind, each with its scene."""
    rng = np.random.default_rng(seed)
    return [edits.draw_edit(rng, kind, heldout) for _ in range(n)]


def changes(scene):
    """Scenes that differ in one color, one place, one object, or the background."""
    for i, o in enumerate(scene.objects):
        others = scene.objects[:i], scene.objects[i + 1:]
        color = next(c for c in COLORS if c != o.color)
        for other in (replace(o, color=color), replace(o, x=(o.x + 0.5) % 1)):
            yield Scene(scene.background, (*others[0], other, *others[1]))
        yield Scene(scene.background, others[0] + others[1])
    yield Scene("gray" if scene.background != "gray" else "black", scene.objects)


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("kind", edits.KINDS)
def test_drawn_targets_are_right_and_other_scenes_are_not(kind, heldout):
    for scene, e in draw(kind, 0, 40, heldout):
        assert is_heldout(e.target.objects) == heldout
        found = read_image(render(e.target))
        assert edits.judge(found, scene, e) == {"scene": True, "done": True, "kept": True}
        assert not edits.judge(scene, scene, e)["done"] and edits.judge(scene, scene, e)["kept"]
        assert not any(edits.judge(None, scene, e).values())
        for wrong in changes(e.target):
            assert not edits.judge(wrong, scene, e)["scene"]


def test_what_is_kept_must_stand_still():
    scene, e = next((s, e) for s, e in draw("color", 1, 20) if e.kept)
    for shift, right in ((0.7, True), (0.8, False)):
        objects = [replace(o, x=o.x + shift / 32) if o in e.kept else o for o in e.target.objects]
        moved = Scene(e.target.background, tuple(objects))
        assert edits.judge(moved, scene, e) == {"scene": right, "done": True, "kept": right}


def test_instructions_name_one_object():
    for kind in edits.KINDS:
        for scene, e in draw(kind, 2, 30):
            names = [phrase for o in scene.objects for phrase in unique_phrases(scene, o)]
            words = e.instruction.removesuffix(".").split(" the ")[1:]
            if kind != "background":
                assert words and all(any(w.startswith(name) for name in names) for w in words)


def test_all_kinds_of_edits_are_drawn_often():
    """Moves fit few scenes; a kind that does not fit at once is tried again."""
    rng = np.random.default_rng(3)
    found = Counter()
    for _ in range(600):
        words = edits.any_edit(sample_scene(rng), rng).instruction.split()
        found[words[0] + words[2] * (words[0] == "make")] += 1
    rare = [found[kind] / 600 for kind in ("add", "move", "swap", "remove")]
    assert min(rare) > 0.04 and found["move"] > 60 and found["swap"] > 75      # 34, 52 of KINDS


def test_episodes_put_back_what_was_removed():
    rng, kinds = np.random.default_rng(3), Counter()
    for _ in range(300):
        scenes = [sample_scene(rng)]
        for e in edits.episode(scenes[-1], rng):
            removed = len(scenes) > 1 and len(scenes[-1].objects) < len(scenes[-2].objects)
            if e.instruction == edits.PUT_BACK:
                assert removed and e.target == scenes[-2] and e.kept == scenes[-1].objects
            kinds[removed, e.instruction == edits.PUT_BACK] += 1
            assert not is_heldout(e.target.objects)
            scenes.append(e.target)
    assert 0.3 < kinds[True, True] / (kinds[True, True] + kinds[True, False]) < 0.7


def test_references_put_an_object_into_the_second_scene():
    rng = np.random.default_rng(4)
    for _ in range(200):
        a, b = sample_scene(rng), sample_scene(rng)
        if e := edits.reference(a, b, rng):
            (new,) = (o for o in e.target.objects if o not in b.objects)
            assert new.attributes in [o.attributes for o in a.objects]
            assert e.kept == b.objects and e.target.background == b.background
            assert edits.judge(read_image(render(e.target)), b, e)["scene"]
            assert edits.follow(e.instruction, a, b) == e
    a, b = ((Scene("gray", (o,))) for o in sample_scene(rng, count=2).objects)
    said = "put the object of image 1 above the object of image 2."
    a, b = (Scene(s.background, (edits.put(s.objects[0], (1, i)),)) for i, s in enumerate((a, b)))
    first, second = edits.follow(said, a, b), edits.follow(said, b, a)
    assert edits.judge(first.target, b, first)["scene"]
    assert not edits.judge(second.target, b, first)["scene"]      # the pictures exchanged


def test_clips_are_read_and_wrong_ones_are_not_right():
    rng = np.random.default_rng(5)
    for _ in range(40):
        c = edits.clip(rng, count=2)
        found = [read_image(render(frame)) for frame in c.frames]
        for given in (0, 2):
            assert all(edits.judge_clip(found, c, given).values())
        frozen = edits.judge_clip([found[0]] * 5, c, 2)
        backwards = edits.judge_clip(found[::-1], c, 0)
        assert frozen["clip"] and frozen["steady"] and not frozen["motion"]
        assert not frozen["prediction"] and not backwards["motion"] and backwards["clip"]
        lost = edits.judge_clip([*found[:4], None], c, 2)
        assert lost["first"] and not lost["clip"] and not lost["scene"] and not lost["prediction"]
        drift = []
        for i, f in enumerate(c.frames):
            o, *others = f.objects
            o = replace(o, x=o.x + 0.99 * i / 32, y=o.y + 0.99 * i / 32)
            drift.append(Scene(f.background, (o, *others)))
        assert not edits.judge_clip(drift, c, 0)["motion"]          # though each step is near
        both = [Scene(f.background, tuple(replace(o, x=o.x + i / 32) for o in f.objects))
                for i, f in enumerate(found)]
        assert not edits.judge_clip(both, c, 0)["steady"]
    assert all(edits.clip(rng, heldout=True).frames for _ in range(20))


def test_sequences_are_functions_of_their_number():
    rng = lambda n: np.random.default_rng(n)
    scenes = [sample_scene(rng(1000 + i)) for i in range(50)]
    first, again = (edits.Sequences(50, scenes.__getitem__, rng) for _ in range(2))
    kinds = Counter()
    for k in range(200):
        turns = first.edits(k % 50, rng(k))
        assert turns == again.edits(k % 50, rng(k))
        kinds["".join("IJ"[turn.drawn] for turn in turns)] += 1
        scene = [scenes[t.image] if t.image < 50 else again.scene(t.image) for t in turns]
        if not turns[0].drawn:                             # an edit of the last of those given
            kept = {*scene[-1].objects} & {*scene[-2].objects}
            assert scene[-1] != scene[-2] and len(kept) >= len(scene[-2].objects) - 2
        assert [bool(turn.text) for turn in turns] == [turn.drawn for turn in turns]
    assert kinds.keys() == {"IJ", "IIJ", "JJJJ"}
    assert 70 < kinds["IJ"] < 130 and 30 < kinds["IIJ"] < 70 and 30 < kinds["JJJJ"] < 70
    assert {len(first.clip(7, rng(k))) for k in range(9)} == {1, 5}
    clip = next(turns for k in range(9) if len(turns := first.clip(7, rng(k))) == 5)
    assert [turn.drawn for turn in clip] == [True] * 5 and clip[0].text and not clip[1].text
    assert len({again.scene(turn.image).objects[0] for turn in clip}) == 5
