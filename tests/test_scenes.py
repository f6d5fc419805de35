"""Scenes: pictures and texts against their own readers.    Run: pytest tests/test_scenes.py   (15 s)"""

import dataclasses
import itertools
import re

import numpy as np
import pytest

import scenes
from scenes import Object, Scene

RUNNING = "a large red circle above a small blue square on a gray background"
EXAMPLE = Scene("gray", (Object("circle", "red", "large", 0.4, 0.3),
                         Object("square", "blue", "small", 0.6, 0.75)))


def draw(n, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, **kwargs) for _ in range(n)]


def same(a, b):
    """Equal up to measured places."""
    return b is not None and (a.background, [o.attributes for o in a.objects]) == \
        (b.background, [o.attributes for o in b.objects])


def to_uint8(image):
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def blur(image, sigma):
    k = np.exp(-np.arange(-3, 4) ** 2 / (2 * sigma ** 2))
    for axis in (0, 1):
        image = sum(w * np.roll(image, s, axis) for s, w in zip(range(-3, 4), k / k.sum()))
    return image


def bare_words(text):
    return re.findall(r"[a-z]+|[.,?]", text)


# ---- The world

def test_colors_are_apart():
    table = np.array([*scenes.COLORS.values(), *scenes.BACKGROUNDS.values()], float)
    for a, b in itertools.combinations(table, 2):
        assert np.linalg.norm(a - b) >= 120


def test_places_follow_the_rules():
    for scene in draw(600):
        boxes = []
        for o in scene.objects:
            side, up, down = (e * scenes.SIZES[o.size] for e in scenes.SHAPES[o.shape])
            boxes.append((32 * o.x - side, 32 * o.x + side, 32 * o.y - up, 32 * o.y + down))
            assert min(boxes[-1]) >= 1 - 1e-9 and max(boxes[-1]) <= 31 + 1e-9
        for (a, p), (b, q) in itertools.combinations(zip(scene.objects, boxes), 2):
            assert max(p[0] - q[1], q[0] - p[1], p[2] - q[3], q[2] - p[3]) >= 2 - 1e-9
            assert not 4.2 < 32 * abs(a.y - b.y) < 11.8
            assert scenes.holds(a, scenes.relation(a, b), b)         # a is first in reading order
            assert scenes.relation(a, b) in ("left of", "above")
        assert scenes.reading_order(scene.objects[::-1]) == scene.objects


def test_every_value_occurs_equally_often():
    world = draw(3000, seed=1)
    counts = np.bincount([len(s.objects) for s in world], minlength=4)[1:] / 3000
    assert np.allclose(counts, 1 / 3, atol=0.04)
    backgrounds = [np.mean([s.background == b for s in world]) for b in scenes.BACKGROUNDS]
    assert np.allclose(backgrounds, 1 / 3, atol=0.04)
    pairs = {(o.color, o.shape) for s in world for o in s.objects}
    assert len(pairs) == len(scenes.COLORS) * len(scenes.SHAPES) - len(scenes.HELDOUT_PAIRS)
    assert all(len(s.objects) == 2 for s in draw(20, count=2))


def test_held_out_compositions_stay_out_and_come_in():
    colors, shapes = zip(*scenes.HELDOUT_PAIRS)
    assert len(set(colors)) == len(set(shapes)) == len(scenes.HELDOUT_PAIRS)   # none loses two pairs
    assert not any(scenes.is_heldout(s.objects) for s in draw(1500))
    held = draw(600, heldout=True)
    assert all(scenes.is_heldout(s.objects) for s in held)
    found = {(o.color, o.shape) for s in held for o in s.objects}
    assert set(scenes.HELDOUT_PAIRS) <= found
    assert any(len(s.objects) == 3 and {o.shape for o in s.objects} == {"star"} for s in held)


def test_texts_of_seen_scenes_never_name_a_held_out_pair():
    rng = np.random.default_rng(0)
    texts = " | ".join(scenes.corpus(rng, 3000))
    for color, shape in scenes.HELDOUT_PAIRS:
        assert f"{color} {shape}" not in texts
    assert texts.isascii() and texts == texts.lower()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="count is 4"):
        draw(1, count=4)
    with pytest.raises(ValueError, match="24 x 24"):
        scenes.render(EXAMPLE, 16)
    with pytest.raises(ValueError, match="uint8"):
        scenes.read_image(np.zeros((32, 32, 3)))


# ---- Pictures

def test_coverage_is_the_area():
    for shape, area in {"circle": np.pi / 4, "square": 1, "triangle": 1.02 ** 2 / 3 ** 0.5,
                        "cross": 0.32 * (2 * 1.16 - 0.32)}.items():
        for size, d in scenes.SIZES.items():
            m = scenes._coverage(shape, size, 0.3, 0.8, 1, 8)
            assert m.sum() == pytest.approx(area * d * d, rel=0.02)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shapes_have_their_centre_of_area_and_reach(shape):
    grid = (np.arange(1400) + 0.5) / 1000 - 0.7
    hit = scenes._inside(shape, grid[None], grid[:, None])
    v, u = np.nonzero(hit)
    assert abs(grid[u].mean()) < 0.01 and abs(grid[v].mean()) < 0.01
    reach = -grid[u].min(), grid[u].max(), -grid[v].min(), grid[v].max()
    side, up, down = scenes.SHAPES[shape]
    assert reach == pytest.approx((side, side, up, down), abs=0.01)


def test_reader_is_right_on_every_rendered_scene():
    for scene in draw(1900, seed=2) + draw(100, seed=3, heldout=True):
        read = scenes.read_image(scenes.render(scene))
        assert same(scene, read), scene
        for a, b in zip(scene.objects, read.objects):
            assert 32 * max(abs(a.x - b.x), abs(a.y - b.y)) < 0.5


@pytest.mark.parametrize("size", [24, 33, 64, (32, 48), (40, 24)])
def test_any_size_and_aspect_ratio(size):
    for scene in draw(30, seed=4):
        image = scenes.render(scene, size)
        assert image.shape == ((size, size, 3) if isinstance(size, int) else (*size, 3))
        assert image.dtype == np.uint8
        assert same(scene, scenes.read_image(image)), scene


def test_reader_bears_noise_and_blur():
    rng, wrong = np.random.default_rng(5), 0
    for scene in draw(300, seed=5):
        image = scenes.render(scene) / 255
        noisy, soft = image + 0.05 * rng.normal(size=image.shape), blur(image, 0.5)
        wrong += sum(not same(scene, scenes.read_image(to_uint8(x))) for x in (noisy, soft))
    assert wrong <= 1                                    # at most 1 in 1000 in the long run


def changes(scene):
    """The scene with one attribute of one object, or the background, changed in every way."""
    for i, o in enumerate(scene.objects):
        for key, values in (("color", scenes.COLORS), ("shape", scenes.SHAPES), ("size", scenes.SIZES)):
            for value in values:
                if value != getattr(o, key):
                    objects = list(scene.objects)
                    objects[i] = dataclasses.replace(o, **{key: value})
                    yield Scene(scene.background, tuple(objects))
    for background in scenes.BACKGROUNDS:
        if background != scene.background:
            yield Scene(background, scene.objects)


def test_one_changed_attribute_is_rejected():
    rng = np.random.default_rng(6)
    for scene in draw(25, seed=6):
        description = scenes.read_caption(scenes.caption(scene, rng, any_order=True))
        assert scenes.matches(scenes.read_image(scenes.render(scene)), description)["scene"]
        for other in changes(scene):
            assert not scenes.matches(scenes.read_image(scenes.render(other)), description)["scene"]
        if len(scene.objects) > 1:
            turned = [dataclasses.replace(o, x=1 - o.x, y=1 - o.y) for o in scene.objects]
            if len({o.attributes for o in scene.objects}) == len(scene.objects):
                upside = Scene(scene.background, scenes.reading_order(turned))
                assert not scenes.matches(upside, description)["scene"]


def test_malformed_pictures_are_refused():
    rng = np.random.default_rng(7)
    blank = np.full((32, 32, 3), 255, np.uint8)

    def circle(color, x=0.5, size="large"):
        return scenes.render(Scene("white", (Object("circle", color, size, x, 0.5),)))

    half = circle("blue")
    half[:16] = 255
    between = ((circle("red").astype(int) + circle("green")) // 2).astype(np.uint8)
    merged = np.minimum(circle("blue", 0.4), circle("blue", 0.65))
    faint = to_uint8(0.5 * circle("blue") / 255 + 0.5)
    ghost = np.minimum(circle("blue", 0.25, "small"), to_uint8(0.4 * circle("purple", 0.7) / 255 + 0.6))
    two_colors = circle("blue")
    two_colors[16:] = circle("red")[16:]
    four = scenes.render(Scene("black", tuple(Object("circle", "red", "small", x, y)
                                              for x in (0.25, 0.75) for y in (0.25, 0.75))))
    noise = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    blob = to_uint8(1 - blur((rng.random((32, 32, 1)) > 0.8) * np.array([1, 1, 0.0]), 2.0) * 3)
    for image in (blank, half, between, merged, faint, ghost, two_colors, four, noise, blob, blank // 3):
        assert scenes.read_image(image) is None
    assert scenes.read_image(circle("blue")) is not None


def test_reader_survives_any_picture():
    rng = np.random.default_rng(8)
    palette = np.array([*scenes.COLORS.values(), *scenes.BACKGROUNDS.values()], np.uint8)
    for _ in range(60):
        image = palette[rng.integers(len(palette), size=(8, 8))].repeat(4, 0).repeat(4, 1)
        scenes.read_image(np.where(rng.random((32, 32, 1)) < 0.7, palette[-1], image))      # None or a scene


# ---- Captions

def test_captions_parse_to_their_scene():
    rng = np.random.default_rng(9)
    for scene in draw(400, seed=9) + draw(50, seed=10, heldout=True):
        for any_order in (False, True):
            text = scenes.caption(scene, rng, any_order)
            description = scenes.read_caption(text)
            assert scenes.is_exact(description, scene) and scenes.is_true(description, scene), text
            assert len(description.relations) == len(scene.objects) - 1
            assert sum(p.fullmatch(text) is not None for p in scenes._caption_patterns()) == 1
            assert len(bare_words(text)) <= 28
            if not any_order:
                assert list(description.objects) == [o.attributes for o in scene.objects]


def test_running_example():
    description = scenes.read_caption(RUNNING)
    assert description == scenes.Description((("large", "red", "circle"), ("small", "blue", "square")),
                                             ((0, "above", 1),), "gray")
    assert all(scenes.matches(scenes.read_image(scenes.render(EXAMPLE)), description).values())


def test_all_wordings_and_relations_occur():
    rng = np.random.default_rng(11)
    texts = [scenes.caption(s, rng, any_order=True) for s in draw(400, seed=11)]
    hit = [any(p.fullmatch(t) for t in texts) for p in scenes._caption_patterns()]
    assert all(hit) and len(hit) >= 11
    in_order = " ".join(scenes.caption(s, rng) for s in draw(200, seed=12))
    assert all(r in in_order for r in ("left of", "right of", "above", "below"))      # inverse relations too


@pytest.mark.parametrize("text", [
    "", "a red circle", RUNNING + ".", RUNNING.replace("gray", "red"), RUNNING.replace("a small", "small"),
    RUNNING.replace("above", "near"), RUNNING + " " + RUNNING, RUNNING.replace("large", "large large"),
    RUNNING.replace("circle", "circles"), RUNNING.upper(), " " + RUNNING])
def test_other_texts_are_refused(text):
    assert scenes.read_caption(text) is None
    assert not scenes.is_exact(None, EXAMPLE) and not scenes.is_true(None, EXAMPLE)


def test_matches_names_what_differs():
    def judge(old, new):
        verdict = scenes.matches(EXAMPLE, scenes.read_caption(RUNNING.replace(old, new)))
        return {name for name, right in verdict.items() if not right}
    assert judge("red", "green") == {"color", "scene"}
    assert judge("circle", "star") == {"shape", "scene"}
    assert judge("large", "small") == {"size", "scene"}
    assert judge("gray", "white") == {"background", "scene"}
    assert judge("above", "below") == {"relation", "scene"}
    assert judge("above", "right of") == {"relation", "scene"}
    exchanged = scenes.read_caption("a large blue circle above a small red square on a gray background")
    # All multisets agree: only the binding of attributes is wrong.
    assert [k for k, v in scenes.matches(EXAMPLE, exchanged).items() if not v] == ["scene"]
    one = scenes.read_caption("a large red circle on a gray background")
    assert {"count", "scene"} <= {k for k, v in scenes.matches(EXAMPLE, one).items() if not v}
    assert scenes.is_true(one, EXAMPLE) and not scenes.is_exact(one, EXAMPLE)
    assert not any(scenes.matches(None, exchanged).values())


def test_equal_objects_may_be_assigned_either_way():
    row = Scene("white", tuple(Object("star", "red", "small", x, 0.5) for x in (0.2, 0.5, 0.8)))
    text = "a small red star left of a small red star, which is {} a small red star, on a white background"
    assert scenes.is_exact(scenes.read_caption(text.format("left of")), row)
    assert scenes.is_exact(scenes.read_caption(text.format("right of")), row)      # the left one, twice
    assert not scenes.is_exact(scenes.read_caption(text.format("above")), row)


# ---- Questions

def test_questions_have_one_answer_and_kinds_are_balanced():
    rng, kinds, replies = np.random.default_rng(13), [], []
    for scene in draw(1200, seed=13):
        asked, answer = scenes.question(scene, rng)
        assert scenes.answers(scene, asked) == {answer}
        assert scenes.check_answer(scene, asked, answer)
        assert not scenes.check_answer(scene, asked, answer[:-1])
        assert not scenes.check_answer(scene, asked, "")
        assert scenes.check_answer(scenes.read_image(scenes.render(scene)), asked, answer)     # can be seen
        kinds.append("color" if "what color" in asked else "shape" if "what shape" in asked
                     else "count" if "how many" in asked else "relation")
        replies.append(answer)
    rates = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    assert len(rates) == 4 and min(rates.values()) > 0.12 and max(rates.values()) < 0.4
    assert 0.7 < replies.count("yes.") / replies.count("no.") < 1.4


@pytest.mark.parametrize("asked, answer", [
    ("what color is the circle?", "red."), ("what color is the large object?", "red."),
    ("what color is the background?", "gray."), ("what shape is the blue object?", "square."),
    ("how many objects are there?", "two."), ("how many red objects are there?", "one."),
    ("how many stars are there?", "none."), ("what is above the square?", "a large red circle."),
    ("what is right of the red circle?", "a small blue square."),
    ("is the circle below the blue square?", "no."),
    ("is the small square right of the large object?", "yes.")])
def test_answers(asked, answer):
    assert scenes.answers(EXAMPLE, asked) == {answer}


@pytest.mark.parametrize("asked", ["what color is the star?", "what color is the object?", "what is it?", ""])
def test_unclear_questions_have_no_answer(asked):
    assert scenes.answers(EXAMPLE, asked) == set()


# ---- Stories

def test_every_sentence_of_a_story_is_consistent_news():
    rng, lengths = np.random.default_rng(14), []
    for scene in draw(400, seed=14):
        text = scenes.story(scene, rng)
        sentences = [s + "." for s in text[:-1].split(". ")]
        lengths.append(len(bare_words(text)))
        assert 3 <= len(sentences) <= 6
        for i in range(len(sentences)):
            prefix, rest = " ".join(sentences[:i]), " ".join(sentences[i:])
            assert scenes.consistent(prefix, rest) and scenes.consistent(prefix, sentences[i]), text
            assert not scenes.consistent(" ".join(sentences[:i + 1]), sentences[i])   # no news
    assert max(lengths) <= 60 and np.mean(lengths) <= 45


@pytest.mark.parametrize("prefix, continuation, expected", [
    ("there is a red circle.", "the circle is large.", True),
    ("there is a red circle.", "left of the circle is a small blue square. the background is white.", True),
    ("there is a red circle.", "the circle is red.", False),                          # nothing new
    ("there is a red circle.", "the circle is green.", False),                        # contradicts
    ("there is a red circle.", "the square is large.", False),                        # which square?
    ("there is a red circle.", "there is a large circle.", False),                    # the same one, perhaps
    ("there is a red circle.", "there is an orange circle.", True),
    ("there is a red circle.", "there is a orange circle.", False),                   # not English
    ("there is one object. there is a red circle.", "there is a star.", False),
    ("there is a red circle. above the circle is a star.", "there is one object.", False),
    ("there is a red circle. above the circle is a star.", "the circle is above the star.", False),
    ("there is a red circle. above the circle is a star.", "the circle is below the star.", False),
    ("there is a red circle. above the circle is a star.", "above the star is a square.", True),
    ("there is a star. above the star is a cross. above the cross is a square.",
     "the star is above the square.", False),
    ("the background is gray.", "the background is black.", False),
    ("there is a red circle.", "the circle is large", False),                         # has no end
    ("there is a red circle.", "", False),
    ("", "there is a red circle.", True),
    ("once upon a time.", "there is a red circle.", False)])
def test_consistent(prefix, continuation, expected):
    assert scenes.consistent(prefix, continuation) is expected


def test_everything_is_a_function_of_the_generator():
    def make(seed):
        rng = np.random.default_rng(seed)
        scene = scenes.sample_scene(rng)
        return scene, scenes.caption(scene, rng, True), scenes.question(scene, rng), scenes.story(scene, rng)
    assert make(1) == make(1) != make(2)
    assert scenes.corpus(np.random.default_rng(0), 7) == scenes.corpus(np.random.default_rng(0), 7)
