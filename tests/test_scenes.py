"""pytest tests/test_scenes.py"""
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from scenes import language, pictures
from scenes.pictures import COLORS, SHAPES, SIZES, Object, Scene

RUNNING = "a large red circle above a small blue square on a gray background"
EXAMPLE = Scene("gray", (Object("circle", "red", "large", 0.4, 0.3),
                         Object("square", "blue", "small", 0.6, 0.75)))


def draw(n, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [pictures.sample_scene(rng, **kwargs) for _ in range(n)]


def content(scene):
    """All of a scene but its measured places."""
    return scene and (scene.background, [o.attributes for o in scene.objects])


def to_uint8(image):
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)

# ---- Scenes ------------------------------------------------------------------------------------

def test_colors_and_objects_are_apart():
    table = np.array([*COLORS.values(), *pictures.BACKGROUNDS.values()], float)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(table, 2)) >= 120
    for scene in draw(500):
        boxes = []
        for o in scene.objects:
            side, up, down = (e * SIZES[o.size] for e in SHAPES[o.shape])
            boxes.append((32 * o.x - side, 32 * o.x + side, 32 * o.y - up, 32 * o.y + down))
            assert min(boxes[-1]) >= 1 - 1e-9 and max(boxes[-1]) <= 31 + 1e-9
        for (a, p), (b, q) in itertools.combinations(zip(scene.objects, boxes), 2):
            assert max(p[0] - q[1], q[0] - p[1], p[2] - q[3], q[2] - p[3]) >= 2 - 1e-9
            assert pictures.is_relation(a, pictures.main_relation(a, b), b)
            assert pictures.main_relation(a, b) in ("left of", "above")    # a is read first
        assert pictures.reading_order(scene.objects[::-1]) == scene.objects


def test_values_are_equally_frequent_and_compositions_held_out():
    world = draw(3000, seed=1)
    for values, seen in (((1, 2, 3), [len(s.objects) for s in world]),
                         (pictures.BACKGROUNDS, [s.background for s in world])):
        for value in values:
            assert seen.count(value) / 3000 == pytest.approx(1 / 3, abs=0.04)
    pairs = {(o.color, o.shape) for s in world for o in s.objects}
    assert len(pairs) == len(COLORS) * len(SHAPES) - len(pictures.HELDOUT_PAIRS)
    assert not any(pictures.is_heldout(s.objects) for s in world)
    assert all(len(s.objects) == 2 for s in draw(20, count=2))
    held = draw(500, heldout=True)
    assert all(pictures.is_heldout(s.objects) for s in held)
    assert set(pictures.HELDOUT_PAIRS) <= {(o.color, o.shape) for s in held for o in s.objects}
    assert any([o.shape for o in s.objects] == ["star"] * 3 for s in held)
    texts = language.corpus(np.random.default_rng(0), 2000)
    assert len(texts) == 2000
    assert not any(" ".join(pair) in text for pair in pictures.HELDOUT_PAIRS for text in texts)

# ---- Pictures ----------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_their_centroid_extent_and_area(shape):
    grid = (np.arange(1400) + 0.5) / 1000 - 0.7
    hit = pictures.is_inside(shape, grid[None], grid[:, None])
    v, u = np.nonzero(hit)
    assert abs(grid[u].mean()) < 0.01 and abs(grid[v].mean()) < 0.01
    extent = -grid[u].min(), -grid[v].min(), grid[v].max()
    assert extent == pytest.approx(SHAPES[shape], abs=0.01)
    for size, d in SIZES.items():
        covered = pictures.coverage(shape, size, 0.3, 0.8, 1).sum()
        assert covered == pytest.approx(hit.sum() * 1e-6 * d * d, rel=0.02)


@pytest.mark.parametrize("hw", [(32, 32), (24, 24), (33, 33), (64, 64), (32, 48), (40, 24)])
def test_every_rendered_scene_is_read_back(hw):
    n = 900 if hw == (32, 32) else 20
    for scene in draw(n, seed=2) + draw(n // 9, seed=3, heldout=True):
        image = pictures.render(scene, hw)
        assert image.shape == (*hw, 3) and image.dtype == np.uint8
        read = pictures.read_image(image)
        assert content(scene) == content(read), scene
        for a, b in zip(scene.objects, read.objects):
            assert 32 * max(abs(a.x - b.x), abs(a.y - b.y)) < 0.5


def test_the_reader_tolerates_noise_and_blur():
    rng, wrong = np.random.default_rng(5), 0
    for scene in draw(200, seed=5):
        image = pictures.render(scene)
        noisy = to_uint8(image / 255 + 0.05 * rng.normal(size=image.shape))
        soft = np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.5)))
        wrong += sum(content(scene) != content(pictures.read_image(x)) for x in (noisy, soft))
    assert wrong <= 1                                    # about 1 in 1000


def test_one_changed_attribute_is_rejected():
    for scene in draw(15, seed=6):
        description = language.read_caption(language.caption(scene, np.random.default_rng(6)))
        changed = [Scene(b, scene.objects) for b in {*pictures.BACKGROUNDS} - {scene.background}]
        for i, o in enumerate(scene.objects):
            others = [replace(o, **{key: value})
                      for key, values in (("color", COLORS), ("shape", SHAPES), ("size", SIZES))
                      for value in {*values} - {getattr(o, key)}]
            changed += [Scene(scene.background, (*scene.objects[:i], x, *scene.objects[i + 1:]))
                        for x in others]
        if len({o.attributes for o in scene.objects}) > 1:
            turned = [replace(o, x=1 - o.x, y=1 - o.y) for o in scene.objects]
            changed.append(Scene(scene.background, pictures.reading_order(turned)))
        for other in (scene, *changed):
            read = pictures.read_image(pictures.render(other))
            assert language.matches(read, description)["scene"] == (other is scene)


def test_wrong_pictures_are_refused():
    def circle(color, x=0.5, size="large"):
        return pictures.render(Scene("white", (Object("circle", color, size, x, 0.5),)))

    blank, red, blue = np.full((32, 32, 3), 255, np.uint8), circle("red"), circle("blue")
    four = [Object("circle", "red", "small", x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)]
    wrong = {
        "blank": blank,
        "dark": blank // 3,
        "noise": np.random.default_rng(7).integers(0, 256, (32, 32, 3)).astype(np.uint8),
        "half": np.concatenate([blank[:16], blue[16:]]),
        "faint": to_uint8(0.5 * blue / 255 + 0.5),
        "two colors": np.concatenate([blue[:16], red[16:]]),
        "between two colors": to_uint8((red / 255 + circle("green") / 255) / 2),
        "merged": np.minimum(circle("blue", 0.4), circle("blue", 0.65)),
        "ghost": np.minimum(circle("blue", 0.25, "small"),
                            to_uint8(0.4 * circle("purple", 0.7) / 255 + 0.6)),
        "four objects": pictures.render(Scene("black", tuple(four)))}
    assert [name for name, image in wrong.items() if pictures.read_image(image)] == []
    assert pictures.read_image(blue)
    for function, *args in ((pictures.render, EXAMPLE, (16, 16)), (pictures.read_image, red / 255)):
        with pytest.raises(ValueError):
            function(*args)

# ---- Captions ----------------------------------------------------------------------------------

def test_captions_are_read_back_and_other_texts_refused():
    rng, texts = np.random.default_rng(9), []
    for scene in draw(200, seed=9) + draw(50, seed=10, heldout=True):
        for wording in (None, *range(len(language.WORDINGS[len(scene.objects)]))):
            text = language.caption(scene, rng, wording)
            description = language.read_caption(text)
            assert language.is_exact(description, scene) and language.is_true(description, scene)
            assert list(description.objects) == [o.attributes for o in scene.objects]
            assert len(description.relations) == len(scene.objects) - 1
            assert sum(p.fullmatch(text) is not None for p in language.CAPTIONS) == 1
            texts += [text] if wording is None else []
    assert all(any(p.fullmatch(text) for text in texts) for p in language.CAPTIONS)
    assert all(rel in " ".join(texts) for rel in pictures.INVERSE)
    changed = (("gray", "red"), ("a small", "small"), ("above", "near"), ("large", "large large"))
    for text in ("", "a red circle", RUNNING + ".", RUNNING.upper(), " " + RUNNING,
                 RUNNING + " " + RUNNING, *(RUNNING.replace(*words) for words in changed)):
        assert language.read_caption(text) is None, text


@pytest.mark.parametrize("old, new, wrong", [
    ("red", "red", set()), ("red", "green", {"color", "scene"}),
    ("circle", "star", {"shape", "scene"}), ("large", "small", {"size", "scene"}),
    ("gray", "white", {"background", "scene"}), ("above", "below", {"relation", "scene"}),
    ("above", "left of", set()), ("above", "right of", {"relation", "scene"}),
    ("red circle above a small blue", "blue circle above a small red", {"scene"})])
def test_matches_names_what_differs(old, new, wrong):
    verdict = language.matches(EXAMPLE, language.read_caption(RUNNING.replace(old, new)))
    assert {name for name, right in verdict.items() if not right} == wrong


def test_what_is_exact_and_what_is_true():
    """No picture that was refused is; a caption may leave objects out and still be true; equal
    objects are assigned either way."""
    assert not any(language.matches(None, language.read_caption(RUNNING)).values())
    assert not language.is_exact(None, EXAMPLE) and not language.is_true(None, EXAMPLE)
    one = language.read_caption("a large red circle on a gray background")
    assert language.is_true(one, EXAMPLE) and not language.is_exact(one, EXAMPLE)
    assert {k for k, right in language.matches(EXAMPLE, one).items() if right} == {"background"}
    star = Object("star", "red", "small", 0.2, 0.5)
    row = Scene("white", (star, replace(star, x=0.5), replace(star, x=0.8)))
    text = "{0} left of {0}, which is {1} {0}, on a white background"
    for rel, expected in (("left of", True), ("right of", True), ("above", False)):
        description = language.read_caption(text.format("a small red star", rel))
        assert language.is_exact(description, row) is expected

# ---- Questions ---------------------------------------------------------------------------------

def test_questions_have_one_visible_answer_and_balanced_kinds():
    rng, kinds, replies = np.random.default_rng(13), [], []
    for scene in draw(800, seed=13):
        asked, answer = language.question(scene, rng)
        assert language.answers(scene, asked) == {answer}
        assert language.answers(pictures.read_image(pictures.render(scene)), asked) == {answer}
        kinds.append(next((kind for kind in ("what color", "what shape", "how many")
                           if asked.startswith(kind)), "relation"))
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
    ("is the small square right of the large object?", "yes."),
    ("what color is the star?", None), ("what color is the object?", None), ("what is it?", None)])
def test_answers(asked, answer):
    assert language.answers(EXAMPLE, asked) == ({answer} if answer else set())

# ---- Stories -----------------------------------------------------------------------------------

def test_every_sentence_of_a_story_states_something_new():
    rng = np.random.default_rng(14)
    for scene in draw(300, seed=14):
        sentences = [s + "." for s in language.story(scene, rng)[:-1].split(". ")]
        assert 3 <= len(sentences) <= 6
        for i, sentence in enumerate(sentences):
            prefix, rest = " ".join(sentences[:i]), " ".join(sentences[i:])
            assert language.consistent(prefix, rest) and language.consistent(prefix, sentence)
            assert not language.consistent(f"{prefix} {sentence}", sentence)


CIRCLE = "there is a red circle."
ABOVE = CIRCLE + " above the circle is a star."


@pytest.mark.parametrize("prefix, accepted, refused", [
    ("", [CIRCLE], [""]),
    (CIRCLE, ["the circle is large.", "there is an orange circle.",
              "left of the circle is a star. the background is white."],
     ["", "the circle is large", "there is a orange circle.",              # no period; not English
      "the circle is red.", "the circle is green.",                        # not new; contradicts
      "the square is large.", "there is a large circle."]),     # no such object; maybe the same one
    ("there is one object. " + CIRCLE, ["the circle is small."], ["there is a star."]),
    (ABOVE, ["above the star is a square.", "there are two objects.", "the star is pink."],
     ["there is one object.", "the circle is above the star.", "the circle is below the star."]),
    (ABOVE + " above the star is a square.", ["the square is left of the circle."],
     ["the circle is above the square.", "there is a cross."]),            # transitivity; a fourth
    ("the background is gray.", [CIRCLE], ["the background is black.", "the background is gray."]),
    ("once upon a time.", [], [CIRCLE])])
def test_consistent(prefix, accepted, refused):
    assert all(language.consistent(prefix, text) for text in accepted)
    assert not any(language.consistent(prefix, text) for text in refused)


def test_a_refused_sentence_adds_nothing():
    facts = language.Facts()
    facts.add("there is a red circle")
    before = str(vars(facts))
    for sentence, why in (("the circle is green", "color"), ("a circle", "grammar"),
                          ("there is a large circle", "mentioned before"),
                          ("above the star is a cross", "no such object"),
                          ("the circle is above the red circle", "relation to itself")):
        with pytest.raises(ValueError, match=f"^{why}$"):
            facts.add(sentence)
        assert str(vars(facts)) == before and why in language.WRONG


def test_every_reason_is_in_the_list():
    """Of sentences about other scenes, told one after another."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        facts = language.Facts()
        for _ in range(3):
            text = language.story(pictures.sample_scene(rng), rng)
            seen |= {*language.tell(facts, text.replace("the circle", "the square"))}
    assert seen <= {"new", "known", *language.WRONG} and len(seen) >= 10


def test_kinds_of_questions():
    rng = np.random.default_rng(0)
    kinds = {language.question_kind(language.question(pictures.sample_scene(rng), rng)[0])
             for _ in range(300)}
    assert kinds == {"background", "what color", "what shape", "how many", "what is", "is the"}
