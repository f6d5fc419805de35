"""Edits: changed scenes with the instruction that asks for the change, clips, and their judges.

    scene --edit--> instruction, target scene        "make the circle blue."
    two scenes --reference--> instruction, target    "put the circle of image 1 left of the star .."
    scene --episode--> edits, one after another
    scene --clip--> caption, scenes of its frames    "a large red circle moves right on a .."

What an edit does not name stays where it is. The places of changed objects follow from the source:
an object that changes stays, pulled in as far as its new size needs; one that moves goes to the
middle of its new quadrant.

Run: python -m scenes.edits   (CPU, 1 s)
"""
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from scenes.language import caption, unique_phrases, with_article
from scenes.pictures import (BACKGROUNDS, COLORS, INVERSE, JITTER, ROOM, SHAPES, SIZES, Object,
                             Scene, is_heldout, pick, reading_order, sample_scene)

KINDS = ("color", "size", "shape", "background", "remove", "add", "move", "swap")
TRIED = (*KINDS, "add", "move", "move", "swap", "swap")    # moves and swaps fit fewer scenes
PUT_BACK = "put back what was removed."
STILL = 0.75 / 32            # an object stands still if its place changes by at most this
WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}        # of x and y
SPEEDS = (2, 3, 4)           # of a clip, in units a frame
FRAMES = 5                   # of a clip


class Edit(NamedTuple):
    """An instruction and what it makes of a scene."""
    instruction: str
    target: Scene
    kept: tuple[Object, ...]           # objects of the scene that stay as they are

# ---- Places ------------------------------------------------------------------------------------

def quadrant(o: Object) -> tuple[int, int]:
    """Row and column."""
    return int(o.y >= 0.5), int(o.x >= 0.5)


def put(o: Object, at: tuple[int, int], dx: float = 0.0, dy: float = 0.0) -> Object:
    """The object with the middle of its box (dx, dy) units from that of a quadrant, or as near to
    it as the quadrant has room."""
    side, up, down = (extent * SIZES[o.size] for extent in SHAPES[o.shape])
    x = np.clip(dx, *(sign * min(JITTER, ROOM / 2 - side) for sign in (-1, 1)))
    y = np.clip(dy, *(sign * min(JITTER, (ROOM - up - down) / 2) for sign in (-1, 1)))
    return replace(o, x=float(8 + 16 * at[1] + x) / 32,
                   y=float(8 + 16 * at[0] + y + (up - down) / 2) / 32)


def changed(o: Object, **attributes: str) -> Object:
    """The object with other attributes, where it was, as far as it fits."""
    row, column = quadrant(o)
    _, up, down = (extent * SIZES[o.size] for extent in SHAPES[o.shape])
    return put(replace(o, **attributes), (row, column), 32 * o.x - 8 - 16 * column,
               32 * o.y - 8 - 16 * row - (up - down) / 2)


def beside(o: Object, rel: str, objects) -> tuple[int, int] | None:
    """The quadrant next to that of o, if there is one and no object is in it."""
    row, column = quadrant(o)
    at = {"left of": (row, column - 1), "right of": (row, column + 1),
          "above": (row - 1, column), "below": (row + 1, column)}[rel]
    inside = 0 <= min(at) and max(at) <= 1
    return at if inside and at not in map(quadrant, objects) else None

# ---- Edits -------------------------------------------------------------------------------------

def edit(scene: Scene, rng: np.random.Generator, kind: str, heldout=False) -> Edit | None:
    """A random edit of a kind, or None if a random choice does not fit the scene. The target is of
    a seen, or with heldout of a held-out composition."""
    if kind == "background":
        background = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
        said, new, touched = f"make the background {background}.", (), ()
    else:
        background = scene.background
        o, other = pick(rng, scene.objects), pick(rng, scene.objects)
        names = {p: unique_phrases(scene, p) for p in (o, other)}
        if not all(names.values()):
            return None
        the = {p: "the " + pick(rng, names[p]) for p in (o, other)}
        found = change(scene, rng, kind, o, other, the)
        if found is None:
            return None
        said, new, touched = found
    kept = tuple(p for p in scene.objects if p not in touched)
    target = Scene(background, reading_order([*kept, *new]))
    return Edit(said, target, kept) if is_heldout(target.objects) == heldout else None


def change(scene: Scene, rng: np.random.Generator, kind: str, o: Object, other: Object,
           the: dict[Object, str]) -> tuple[str, tuple, tuple] | None:
    """An edit of objects: instruction, new objects, and those of the scene that they replace; None
    if it does not fit. the: what o and other are called."""
    if kind in ("color", "size", "shape"):
        values = {"color": COLORS, "size": SIZES, "shape": SHAPES}[kind]
        value = pick(rng, [v for v in values if v != getattr(o, kind)])
        said = f"turn {the[o]} into {with_article([value])}." if kind == "shape" else \
            f"make {the[o]} {value}."
        return said, (changed(o, **{kind: value}),), (o,)
    if kind == "remove":
        return (f"remove {the[o]}.", (), (o,)) if len(scene.objects) > 1 else None
    if kind == "swap":
        new = put(o, quadrant(other)), put(other, quadrant(o))
        return (f"swap {the[o]} and {the[other]}.", new, (o, other)) if o != other else None
    rel = pick(rng, INVERSE)
    at = beside(other, rel, scene.objects)
    if at is None or kind == "move" and o == other or kind == "add" and len(scene.objects) > 2:
        return None
    if kind == "move":
        return f"move {the[o]} {rel} {the[other]}.", (put(o, at),), (o,)
    new = put(Object(pick(rng, SHAPES), pick(rng, COLORS), pick(rng, SIZES), 0, 0), at)
    return f"add {with_article(new.attributes)} {rel} {the[other]}.", (new,), ()


def draw_edit(rng: np.random.Generator, kind: str, heldout=False) -> tuple[Scene, Edit]:
    """A random scene and an edit of a kind of it."""
    while True:
        scene = sample_scene(rng, heldout)
        if found := edit(scene, rng, kind, heldout):
            return scene, found


def any_edit(scene: Scene, rng: np.random.Generator, heldout=False) -> Edit:
    """An edit of a kind of TRIED, or of the next if ten do not fit. A background can always be
    changed. heldout: whether the scene is of a held-out composition, as its target must be."""
    for kind in rng.permutation(TRIED):
        for _ in range(10):
            if found := edit(scene, rng, kind, heldout):
                return found


def episode(scene: Scene, rng: np.random.Generator, heldout=False, length: int = 3) -> list[Edit]:
    """Edits, each of the target of the one before."""
    before, edits = None, []
    for _ in range(length):
        edits.append(next_edit(before, scene, rng, heldout))
        before, scene = scene, edits[-1].target
    return edits


def next_edit(before: Scene | None, scene: Scene, rng: np.random.Generator, heldout=False) -> Edit:
    """An edit of a scene that was made of another one. What was removed is put back half of the
    time, for which a model has to look at the image before the last."""
    if before and len(before.objects) > len(scene.objects) and rng.random() < 0.5:
        return Edit(PUT_BACK, before, scene.objects)
    return any_edit(scene, rng, heldout)


def reference(a: Scene, b: Scene, rng: np.random.Generator, heldout=False) -> Edit | None:
    """An object of scene a, put into scene b; None if a random choice does not fit."""
    o, other, rel = pick(rng, a.objects), pick(rng, b.objects), pick(rng, INVERSE)
    names, others = unique_phrases(a, o), unique_phrases(b, other)
    if not names or not others:
        return None
    said = f"put the {pick(rng, names)} of image 1 {rel} the {pick(rng, others)} of image 2."
    return follow(said, a, b, heldout)


def follow(said: str, a: Scene, b: Scene, heldout=False) -> Edit | None:
    """What the instruction of a reference asks for with scenes a and b, or None if it does not
    fit."""
    name, rest = said.removeprefix("put the ").removesuffix(" of image 2.").split(" of image 1 ")
    rel = next(rel for rel in INVERSE if rest.startswith(rel + " the "))
    (o, other), = [(o, other) for o in a.objects if name in unique_phrases(a, o)
                   for other in b.objects if rest[len(rel) + 5:] in unique_phrases(b, other)
                   ] or [(None, None)]
    at = beside(other, rel, b.objects) if other and len(b.objects) < 3 else None
    if at is None:
        return None
    target = Scene(b.background, reading_order([*b.objects, put(o, at)]))
    return Edit(said, target, b.objects) if is_heldout(target.objects) == heldout else None


def judge(found: Scene | None, source: Scene, e: Edit) -> dict[str, bool]:
    """A picture, as read (None: refused), against an edit of the source. done: the background, the
    number of objects, every new or changed object in its quadrant (wherever in it), and none that
    had to go. kept: each other object where it was. scene: both."""
    if found is None:
        return dict.fromkeys(("scene", "done", "kept"), False)
    seen, wanted, were = ({(o.attributes, quadrant(o)) for o in scene.objects}
                          for scene in (found, e.target, source))
    touched = wanted - {(o.attributes, quadrant(o)) for o in e.kept}
    done = (found.background == e.target.background and touched <= seen
            and not seen & (were - wanted) and len(found.objects) == len(e.target.objects))
    kept = all(any(is_still(o, p) for p in found.objects) for o in e.kept)
    return {"scene": done and kept, "done": done, "kept": kept}


def is_still(o: Object, p: Object) -> bool:
    """Whether p is o, in the same place."""
    return o.attributes == p.attributes and max(abs(o.x - p.x), abs(o.y - p.y)) <= STILL

# ---- Clips -------------------------------------------------------------------------------------

class Clip(NamedTuple):
    """A clip in which the first of the objects moves."""
    caption: str
    way: str
    frames: list[Scene]


def clip(rng: np.random.Generator, heldout=False, count: int | None = None) -> Clip:
    """One object moves towards a free quadrant, at a constant speed; another one may stand."""
    while True:
        scene = sample_scene(rng, heldout, count or int(rng.integers(1, 3)))
        o, way = pick(rng, scene.objects), pick(rng, WAYS)
        rel = {"right": "right of", "left": "left of", "down": "below", "up": "above"}[way]
        different = len({p.attributes for p in scene.objects}) == len(scene.objects)
        if different and beside(o, rel, scene.objects):
            break
    (dx, dy), speed = WAYS[way], pick(rng, SPEEDS) / 32
    others = [p for p in scene.objects if p is not o]
    moved = [replace(o, x=o.x + i * speed * dx, y=o.y + i * speed * dy) for i in range(FRAMES)]
    stand = "".join(f" and {with_article(p.attributes)} stands still" for p in others)
    said = f"{with_article(o.attributes)} moves {way}{stand} on a {scene.background} background"
    return Clip(said, way, [Scene(scene.background, (p, *others)) for p in moved])


def judge_clip(found: list[Scene | None], c: Clip, given: int) -> dict[str, bool]:
    """The frames of a clip, as read, of which the first `given` were given. first: the attributes
    of the first frame; clip: of all frames; motion: a straight way at one speed, to a unit;
    steady: the other object stands still; scene: all of these. With two frames or more given,
    prediction: the object that moves is where it must be in the last frame, to a unit."""
    told = sorted(o.attributes for o in c.frames[0].objects)
    same = [f is not None and f.background == c.frames[0].background
            and sorted(o.attributes for o in f.objects) == told for f in found]
    right = {"first": same[0], "clip": all(same)}
    if not all(same):
        return right | dict.fromkeys(["motion", "steady", "scene"] + ["prediction"] * (given > 1),
                                     False)
    places = {o.attributes: np.array([next((p.x, p.y) for p in f.objects if p.attributes ==
                                           o.attributes) for f in found])
              for o in c.frames[0].objects}                                       # (frames, 2) each
    mover, last = c.frames[0].objects[0].attributes, c.frames[-1].objects[0]
    moved = 32 * (places[mover] - places[mover][0])                               # (frames, 2)
    path = np.arange(len(found))[:, None] * WAYS[c.way]
    right["motion"] = any(abs(moved - speed * path).max() <= 1 for speed in SPEEDS)
    right["steady"] = all(abs(x - x[0]).max() <= STILL for o, x in places.items() if o != mover)
    right["scene"] = all(right.values())
    if given > 1:
        right["prediction"] = abs(places[mover][-1] - (last.x, last.y)).max() <= 1 / 32
    return right

# ---- Sequences of images -----------------------------------------------------------------------

class Turn(NamedTuple):
    """An image of a sequence."""
    text: str                          # what asks for it, "" if nothing does
    image: int                         # its number
    drawn: bool                        # whether it is to be drawn; else it is given


class Sequences:
    """Sequences 0 .. pool - 1 of each kind. Images below `pool` are the scenes `scene_of`; image
    pool + i, 2 pool + i and 3 pool + i are those of episode i, which begins with scene i, image
    4 pool + i that of reference i, and image (5 + f) pool + i is frame f of clip i.
    rng(n): the generator of a number n; each sequence has its own."""
    def __init__(self, pool: int, scene_of: Callable[[int], Scene],
                 rng: Callable[[int], np.random.Generator]):
        self.pool, self.scene_of = pool, scene_of
        self._episode = cache(lambda i: episode(scene_of(i), rng(i)))
        self._reference = cache(lambda i: self._draw_reference(rng(pool + i)))
        self._clip = cache(lambda i: clip(rng(2 * pool + i)))

    def _draw_reference(self, rng: np.random.Generator) -> tuple[int, int, Edit] | None:
        """Two scenes, and an object of the first put into the second; None if few scenes fit."""
        for _ in range(100):
            a, b = map(int, rng.integers(self.pool, size=2))
            if found := reference(self.scene_of(a), self.scene_of(b), rng):
                return a, b, found
        return None

    def scene(self, image: int) -> Scene:
        """The scene of an image from `pool` on."""
        kind, i = divmod(image, self.pool)
        if kind <= 3:
            return self._episode(i)[kind - 1].target
        return self._reference(i)[2].target if kind == 4 else self._clip(i).frames[kind - 5]

    def edits(self, i: int, rng: np.random.Generator) -> list[Turn]:
        """An edit of episode i, an edit of two pictures, or the whole episode with a caption."""
        kind = rng.random()
        if kind < 0.25 and self._reference(i):
            a, b, found = self._reference(i)
            last = Turn(found.instruction, 4 * self.pool + i, True)
            return [Turn("", a, False), Turn("", b, False), last]
        said = ["", *(found.instruction for found in self._episode(i))]
        if kind < 0.75:
            step = int(rng.integers(1, 4))
            step = 1 if said[step] == PUT_BACK else step
            before = Turn("", (step - 1) * self.pool + i, False)
            return [before, Turn(said[step], step * self.pool + i, True)]
        said[0] = caption(self.scene_of(i), rng)
        return [Turn(text, turn * self.pool + i, True) for turn, text in enumerate(said)]

    def clip(self, i: int, rng: np.random.Generator) -> list[Turn]:
        """The frames of clip i; the first has the caption. Each is drawn from true ones before it,
        so a model of them continues given frames, too. Half of the samples are the first frame
        alone, which takes longer to learn."""
        count = FRAMES if rng.random() < 0.5 else 1
        return [Turn(self._clip(i).caption * (frame == 0), (5 + frame) * self.pool + i, True)
                for frame in range(count)]


def corpus(rng: np.random.Generator, n: int) -> list[str]:
    """n instructions and captions of clips, none held out, to train a tokenizer on."""
    texts = [PUT_BACK]
    while len(texts) < n:
        a, b = sample_scene(rng), sample_scene(rng, count=1)
        texts += [any_edit(a, rng).instruction, clip(rng).caption]
        if found := reference(a, b, rng):
            texts.append(found.instruction)
    return texts[:n]


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, count=2)
    for kind in KINDS:
        while not (found := edit(scene, rng, kind)):
            pass
        right = judge(found.target, scene, found)["scene"]
        print(f"{found.instruction:48} the target is right: {right} (expect True), "
              f"the source: {judge(scene, scene, found)['scene']} (expect False)")
    print("a clip:", clip(rng).caption)
