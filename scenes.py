"""Scenes: a small generated world of pictures and texts, with exact readers that turn both back into facts.

    scene --render--> image --read_image--> scene          scene --caption--> text --read_caption--> description
    scene --question--> (question, answer)                 scene --story--> sentences, each prefix a valid prompt

A scene is one to three objects (shape, colour, size, place) on a plain background. Positions are continuous; x runs
right and y down, both as fractions of the picture's width and height, so a scene can be drawn at any size and aspect
ratio. All lengths below are pixels of a 32 x 32 picture and grow with its shorter side. Objects are named in reading
order (rows top to bottom, in a row left to right), a rule the picture shows: with an arbitrary order a caption is half
noise, and a model that must guess it mixes up the attributes of the objects.

The readers judge generated pictures and texts, so they refuse what is not of this world: read_image draws what it has
read and compares (analysis by synthesis), read_caption accepts exactly the grammar. Some compositions never occur
unless they are asked for (HELDOUT_PAIRS, HELDOUT_COUNT), so that generalisation can be measured.

Shapes: H, W picture height and width.    Run: python scenes.py   (CPU, 1 s)
"""

import dataclasses
import functools
import itertools
import re

import numpy as np

# Any two of these colours (objects and backgrounds together) are at least 120 / 255 apart in RGB.
COLORS = {"red": (205, 0, 40), "green": (0, 160, 50), "blue": (0, 85, 255), "yellow": (250, 235, 50),
          "orange": (255, 125, 0), "purple": (125, 0, 185), "cyan": (70, 225, 255), "pink": (255, 105, 195)}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (10, 10, 25)}
SIZES = {"small": 7.5, "large": 11.5}                  # diameter of the circle
SHAPES = {"circle": (0.5, 0.5, 0.5), "square": (0.5, 0.5, 0.5), "triangle": (0.59, 0.68, 0.34),
          "cross": (0.58, 0.58, 0.58), "star": (0.57, 0.6, 0.49)}    # extent sideways, up, down, in diameters
COUNTS = ("one", "two", "three")

HELDOUT_PAIRS = (("green", "circle"), ("yellow", "square"), ("purple", "triangle"))
HELDOUT_COUNT = (3, "star")

MARGIN, GAP = 1.0, 2.0                                 # to the border, between bounding boxes
SAME_ROW, OTHER_ROW = 3.0, 6.0                         # vertical centre distances lie outside this interval ...
ROW = 4.5                                              # ... so this threshold tells rows apart


@dataclasses.dataclass(frozen=True)
class Object:
    shape: str
    color: str
    size: str
    x: float                                           # centre of area, fraction of the width
    y: float                                           # and of the height, downwards

    @property
    def attributes(self):
        return self.size, self.color, self.shape       # in the order in which English names them


@dataclasses.dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Object, ...]                        # in reading order


# ---------------------------------------------------------------------------------------------------------------------
# Geometry

HOLDS = {"left of": lambda a, b: b.x - a.x >= ROW / 32, "right of": lambda a, b: a.x - b.x >= ROW / 32,
         "above": lambda a, b: b.y - a.y >= ROW / 32, "below": lambda a, b: a.y - b.y >= ROW / 32}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def relation(a, b) -> str:
    """The relation that captions state: "left of" or "right of" in one row, "above" or "below" otherwise."""
    if abs(a.y - b.y) < ROW / 32:
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def reading_order(objects) -> tuple[Object, ...]:
    """Rows from top to bottom (a row hangs on its topmost object), in a row from left to right."""
    order, rest = [], sorted(objects, key=lambda o: o.y)
    while rest:
        row = [o for o in rest if o.y - rest[0].y < ROW / 32]
        order += sorted(row, key=lambda o: o.x)
        rest = rest[len(row):]
    return tuple(order)


def is_heldout(objects) -> bool:
    """Whether the objects contain a held-out composition: one of the pairs, or the count of one shape."""
    count, shape = HELDOUT_COUNT
    return (any((o.color, o.shape) in HELDOUT_PAIRS for o in objects)
            or sum(o.shape == shape for o in objects) >= count)


def sample_scene(rng: np.random.Generator, heldout: bool = False, count: int | None = None) -> Scene:
    """Draw a scene of `count` objects (None: 1, 2 or 3, equally often).

    heldout=False never contains a held-out composition; heldout=True always contains at least one: a held-out pair,
    or in a quarter of the scenes of three objects the held-out count.
    """
    pick = lambda names: names[rng.integers(len(names))]
    count = int(rng.integers(1, 4)) if count is None else count
    while True:
        objects = [Object(pick(list(SHAPES)), pick(list(COLORS)), pick(list(SIZES)), 0, 0) for _ in range(count)]
        if not is_heldout(objects):
            break
    if heldout and count == HELDOUT_COUNT[0] and rng.random() < 0.25:
        objects = [dataclasses.replace(o, shape=HELDOUT_COUNT[1]) for o in objects]
    elif heldout:
        color, shape = pick(HELDOUT_PAIRS)
        i = rng.integers(count)
        objects[i] = dataclasses.replace(objects[i], color=color, shape=shape)
    x, y = _place(objects, rng)
    objects = [dataclasses.replace(o, x=float(a), y=float(b)) for o, a, b in zip(objects, x, y)]
    return Scene(pick(list(BACKGROUNDS)), reading_order(objects))


def _place(objects, rng):
    """Rejection sampling, 256 proposals at a time: boxes GAP apart, rows either clearly equal or clearly different."""
    extent = np.array([SHAPES[o.shape] for o in objects]) * [[SIZES[o.size]] for o in objects]       # (n, 3)
    side, up, down = extent.T
    i, j = np.triu_indices(len(objects), 1)
    while True:
        u = rng.random((2, 256, len(objects)))
        x = side + MARGIN + u[0] * (32 - 2 * (side + MARGIN))                                        # (256, n)
        y = up + MARGIN + u[1] * (32 - up - down - 2 * MARGIN)
        dx, dy = x[:, i] - x[:, j], y[:, i] - y[:, j]                                                # (256, pairs)
        apart = (np.abs(dx) >= side[i] + side[j] + GAP) | (dy >= up[i] + down[j] + GAP) | (-dy >= up[j] + down[i] + GAP)
        rows = (np.abs(dy) <= SAME_ROW) | (np.abs(dy) >= OTHER_ROW)
        valid = np.flatnonzero((apart & rows).all(1))
        if len(valid):
            return x[valid[0]] / 32, y[valid[0]] / 32


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def _inside(shape, u, v):
    """Whether points lie in a shape of diameter 1 with its centre of area at the origin; u (1, n), v (n, 1) -> (n, n)."""
    if shape == "circle":
        return u * u + v * v <= 0.25
    u, w = abs(u), abs(v)
    if shape == "square":
        return (u <= 0.5) & (w <= 0.5)
    if shape == "triangle":
        return (3 ** 0.5 * u - v <= 0.68) & (v <= 0.34)
    if shape == "cross":
        return (u <= 0.16) & (w <= 0.58) | (w <= 0.16) & (u <= 0.58)
    # A star: with c the projection on the nearest of its five points (three, with the left half folded over), every
    # edge is the line c + 2.1 |distance from that axis| = 0.6.
    c = np.maximum(np.maximum(-v, 0.9511 * u - 0.3090 * v), 0.5878 * u + 0.8090 * v)
    return c + 2.1 * np.sqrt(np.maximum(u * u + v * v - c * c, 0)) <= 0.6


def _reach(size, unit):
    """Pixels on either side of an object's central pixel that its drawing may touch; unit = picture side / 32."""
    return int(0.68 * SIZES[size] * unit) + 1


def _coverage(shape, size, fx, fy, unit, reach, sub=8):
    """Share of each pixel that the shape covers, by sub x sub sampling, its centre at (fx, fy) in the central pixel
    -> float32 (2 reach + 1, 2 reach + 1)."""
    n = 2 * reach + 1
    grid = (np.arange(n * sub, dtype=np.float32) + 0.5) / sub - reach
    d = np.float32(SIZES[size] * unit)
    hit = _inside(shape, (grid[None] - np.float32(fx)) / d, (grid[:, None] - np.float32(fy)) / d)
    return hit.reshape(n, sub, n, sub).mean((1, 3), dtype=np.float32)


def render(scene: Scene, size: int | tuple[int, int] = 32) -> np.ndarray:
    """Draw a scene, anti-aliased: size (side, or height and width, each >= 24) -> uint8 (H, W, 3)."""
    H, W = (size, size) if isinstance(size, int) else size
    if min(H, W) < 24:
        raise ValueError(f"a scene needs at least 24 x 24 pixels, got {H} x {W}; choose a larger image size")
    unit, pad = min(H, W) / 32, _reach("large", min(H, W) / 32)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    image = np.tile(background, (H + 2 * pad, W + 2 * pad, 1))            # with a margin, so that no patch is cut
    for o in scene.objects:
        (ix, fx), (iy, fy) = ((int(p), p % 1) for p in (o.x * W, o.y * H))
        r = _reach(o.size, unit)
        patch = image[iy + pad - r:iy + pad + r + 1, ix + pad - r:ix + pad + r + 1]
        patch += _coverage(o.shape, o.size, fx, fy, unit, r)[..., None] * (COLORS[o.color] - background)
    return (image[pad:pad + H, pad:pad + W] + 0.5).astype(np.uint8)


# The reader's tolerances, in units of the colour range 0..1. They were fixed before any model was trained.
FOREGROUND = 0.27            # distance from the background that makes a pixel part of an object
BACKGROUND_ERROR = 0.1       # of the background's median colour
COLOR_ERROR = 0.2            # of an object's mean colour; half the smallest distance of two colours is 0.237
OBJECT_ERROR = 0.15          # squared residual of an object over its squared contrast
SPECK = 6.0                  # pixels; a smaller component is left to the residual
LOCAL_ERROR = 0.15           # mean squared residual in any 3 x 3 window, over the largest squared contrast
STRAY_ERROR = 0.04           # the same of the background beside the objects, absolute
AMBIGUITY = 0.02             # by which the second best shape or size must explain an object worse


def read_image(image: np.ndarray) -> Scene | None:
    """Read a picture back into its scene: uint8 (H, W, 3) -> Scene, or None if it is not a picture of this world.

    Background by vote; connected components of what differs from it; for each the shape, size and colour whose drawing
    leaves the smallest residual. What the drawing of the whole scene does not explain is refused.
    """
    H, W, _ = image.shape
    unit, pad = min(H, W) / 32, _reach("large", min(H, W) / 32) + 1
    pixels = image.astype(np.float32) / 255
    near = [((pixels - b) ** 2).sum(-1) < FOREGROUND ** 2 for b in _rgb(BACKGROUNDS)]
    k = int(np.argmax([n.sum() for n in near]))
    background, signal = _rgb(BACKGROUNDS)[k], pixels - _rgb(BACKGROUNDS)[k]              # (H, W, 3)
    if not near[k].any() or np.linalg.norm(np.median(signal[near[k]], 0)) > BACKGROUND_ERROR:
        return None
    components = [c for c in _components(~near[k]) if len(c) >= SPECK * unit ** 2]
    if not 1 <= len(components) <= len(COUNTS):
        return None
    owner = np.zeros((H + 2 * pad, W + 2 * pad), int)                                     # 0: nobody
    for i, c in enumerate(components, 1):
        y, x = np.array(c).T + pad
        for dy, dx in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):                         # with its anti-aliased rim
            owner[y + dy, x + dx] = i
    residual = np.pad(signal, ((pad, pad), (pad, pad), (0, 0)))
    objects, contrast = [], 0.0
    for i in range(1, len(components) + 1):
        fit = _fit(residual, owner == i, _rgb(COLORS) - background, unit, pad)
        if fit is None:
            return None
        objects.append(Object(*fit[:3], (fit[3] - pad) / W, (fit[4] - pad) / H))
    explained = render(Scene(list(BACKGROUNDS)[k], tuple(objects)), (H, W)) / np.float32(255)
    contrast = max(((_rgb(COLORS)[list(COLORS).index(o.color)] - background) ** 2).sum() for o in objects)
    alone = owner[pad:-pad, pad:-pad] == 0
    if (_worst_window((pixels - explained) ** 2, unit) > LOCAL_ERROR * contrast
            or _worst_window(np.where(alone[..., None], signal, 0) ** 2, unit) > STRAY_ERROR):
        return None
    return Scene(list(BACKGROUNDS)[k], reading_order(objects))


def _worst_window(error, unit):
    """Largest mean of a squared error (H, W, 3), summed over the channels, in any window of 3 x 3 pixels times unit."""
    n = max(3, round(3 * unit))
    total = np.pad(error.sum(-1, dtype=np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return (total[n:, n:] - total[:-n, n:] - total[n:, :-n] + total[:-n, :-n]).max() / n ** 2


def _rgb(table):
    return np.array(list(table.values()), np.float32) / 255


def _components(foreground):
    """4-connected components by flood fill: bool (H, W) -> list of lists of (y, x)."""
    rest, components = set(zip(*(axis.tolist() for axis in np.nonzero(foreground)))), []
    while rest:
        component = [rest.pop()]
        for y, x in component:                                                            # grows while it is walked
            for p in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if p in rest:
                    rest.remove(p)
                    component.append(p)
        components.append(component)
    return components


@functools.lru_cache(maxsize=128)
def _templates(fx, fy, unit, reach):
    """Drawings of every shape and size with the centre at (fx, fy) / 8 of a pixel -> (shapes * sizes, pixels), and
    their squared sums."""
    t = np.stack([_coverage(shape, size, fx / 8, fy / 8, unit, reach, sub=4).ravel()
                  for shape in SHAPES for size in SIZES])
    return t, (t ** 2).sum(1)


def _fit(signal, mine, palette, unit, pad):
    """The (shape, size, color, cx, cy) whose drawing explains the pixels `mine` best, or None if none does.

    signal (H, W, 3) is the picture less its background, with a margin `pad`; palette (8, 3) the colours less it.
    """
    ys, xs = np.nonzero(mine)
    s = signal[ys, xs]                                                                    # (n, 3)
    c = ((s ** 2).sum(1) @ s) / (s ** 2).sum()                                            # rough colour
    alpha = s @ c
    cx, cy = alpha @ (xs + 0.5) / alpha.sum(), alpha @ (ys + 0.5) / alpha.sum()
    reach, total, best = pad - 1, (s ** 2).sum(), (np.inf,)
    masked = np.where(mine[..., None], signal, 0)
    for dx, dy in itertools.product((-2, 0, 2), repeat=2):                                # eighths of a pixel
        (ix, fx), (iy, fy) = divmod(round(8 * cx) + dx, 8), divmod(round(8 * cy) + dy, 8)
        patch = masked[iy - reach:iy + reach + 1, ix - reach:ix + reach + 1].reshape(-1, 3)
        t, mass = _templates(fx, fy, unit, reach)
        seen, energy = t @ patch, mass[:, None] * (palette ** 2).sum(1)                   # (10, 3), (10, 8)
        error = (total - 2 * seen @ palette.T + energy) / energy                          # (10, 8): |s - t c|^2 / |t c|^2
        i, j = np.unravel_index(error.argmin(), error.shape)
        if error[i, j] < best[0]:
            second = np.delete(error, i, 0).min()
            best = error[i, j], second, np.linalg.norm(seen[i] / mass[i] - palette[j]), i, j, ix + fx / 8, iy + fy / 8
    error, second, color_error, i, j, cx, cy = best
    if error > OBJECT_ERROR or second - error < AMBIGUITY or color_error > COLOR_ERROR:
        return None
    return list(SHAPES)[i // 2], list(COLORS)[j], list(SIZES)[i % 2], cx, cy


# ---------------------------------------------------------------------------------------------------------------------
# Captions. One list of templates both writes and reads them. a, b, c are objects as named; a relation between a and b
# comes as infix (a left of b), as suffix (a with b to its right) or as prefix (right of a is b).

SUFFIX = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}
CAPTIONS = {
    1: ("{a} on a {bg} background", "on a {bg} background, {a}", "there is {a}. the background is {bg}."),
    2: ("{a} {ab} {b} on a {bg} background",
        "on a {bg} background, {a} {ab} {b}",
        "{a} is {ab} {b}. the background is {bg}.",
        "{a} with {b} {ba_suffix}, on a {bg} background",
        "{ba} {a} is {b}. the background is {bg}."),
    3: ("{a} {ab} {b}, which is {bc} {c}, on a {bg} background",
        "on a {bg} background, {a} {ab} {b}, which is {bc} {c}",
        "{a} is {ab} {b}, which is {bc} {c}. the background is {bg}.",
        "{a} with {b} {ba_suffix} and {c} {cb} that, on a {bg} background",
        "{ba} {a} is {b}. {cb} that is {c}. the background is {bg}."),
}


@dataclasses.dataclass(frozen=True)
class Description:
    """What a caption states: objects as (size, color, shape), relations as (i, relation, j), the background."""
    objects: tuple[tuple[str, str, str], ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str


def _any(names):
    return "(?:" + "|".join(names) + ")"


def _noun(attributes):
    return " ".join(("a",) + attributes)


def caption(scene: Scene, rng: np.random.Generator, any_order: bool = False) -> str:
    """Describe a scene in full, in one of several wordings.

    The first-named object comes first in reading order; any_order=True draws another order, the relations stay true.
    """
    objects = list(scene.objects)
    if any_order:
        objects = [objects[i] for i in rng.permutation(len(objects))]
    words = {"bg": scene.background}
    for name, o in zip("abc", objects):
        words[name] = _noun(o.attributes)
    for (p, q), (o1, o2) in zip(("ab", "bc"), zip(objects, objects[1:])):
        words[p + q], words[q + p] = relation(o1, o2), relation(o2, o1)
        words[q + p + "_suffix"] = SUFFIX[relation(o2, o1)]
    templates = CAPTIONS[len(objects)]
    return templates[rng.integers(len(templates))].format(**words)


@functools.cache
def _caption_patterns():
    noun = f"a {_any(SIZES)} {_any(COLORS)} {_any(SHAPES)}"
    groups = {name: f"(?P<{name}>{noun})" for name in "abc"}
    groups |= {pair: f"(?P<{pair}>{_any(HOLDS)})" for pair in ("ab", "ba", "bc", "cb")}
    groups |= {"ba_suffix": f"(?P<ba_suffix>{_any(SUFFIX.values())})", "bg": f"(?P<bg>{_any(BACKGROUNDS)})"}
    return [re.compile(t.replace(".", r"\.").format(**groups)) for ts in CAPTIONS.values() for t in ts]


def read_caption(text: str) -> Description | None:
    """What a caption states, or None if it is not in the grammar (any wording, any order of the objects)."""
    for pattern in _caption_patterns():
        if found := pattern.fullmatch(text):
            words = found.groupdict()
            objects = tuple(tuple(words[n].split()[1:]) for n in "abc" if n in words)
            relations = []
            for key, phrase in words.items():
                if key == "ba_suffix":
                    key, phrase = "ba", next(r for r, s in SUFFIX.items() if s == phrase)
                if len(key) == 2 and key != "bg":
                    relations.append(("abc".index(key[0]), phrase, "abc".index(key[1])))
            return Description(objects, tuple(relations), words["bg"])
    return None


def _relations_hold(description, objects):
    return all(HOLDS[r](objects[i], objects[j]) for i, r, j in description.relations)


def matches(scene: Scene | None, description: Description) -> dict[str, bool]:
    """Judge a generated picture: its scene as read (None: refused, nothing matches) against its prompt.

    Each attribute compares multisets; "relation" asks for all stated relations, under the best assignment of described
    to drawn objects (true of one object); "scene" for every attribute of every object, the background and relations.
    """
    names = ("count", "color", "shape", "size", "relation", "background", "scene")
    if scene is None:
        return dict.fromkeys(names, False)
    drawn, told = scene.objects, description.objects
    same = {name: sorted(o.attributes[k] for o in drawn) == sorted(t[k] for t in told)
            for k, name in enumerate(("size", "color", "shape"))}
    same["count"] = len(drawn) == len(told)
    same["background"] = scene.background == description.background
    same["relation"] = same["scene"] = False
    if same["count"]:
        orders = list(itertools.permutations(drawn))
        agree = [sum(x == y for o, t in zip(order, told) for x, y in zip(o.attributes, t)) for order in orders]
        same["relation"] = any(_relations_hold(description, order)
                               for order, n in zip(orders, agree) if n == max(agree))
        same["scene"] = max(agree) == 3 * len(told) and same["relation"] and same["background"]
    return {name: same[name] for name in names}


def is_exact(description: Description | None, scene: Scene) -> bool:
    """Whether a caption as read (None: it does not parse) describes the same scene."""
    return description is not None and matches(scene, description)["scene"]


def is_true(description: Description | None, scene: Scene) -> bool:
    """Whether a caption as read states no false fact about the scene; it may leave objects out."""
    if description is None or description.background != scene.background:
        return False
    return any(all(o.attributes == t for o, t in zip(chosen, description.objects)) and
               _relations_hold(description, chosen)
               for chosen in itertools.permutations(scene.objects, len(description.objects)))


# ---------------------------------------------------------------------------------------------------------------------
# Questions

PLURAL = {s: s + ("es" if s == "cross" else "s") for s in SHAPES} | {"object": "objects"}
_REF = rf"(?:{_any(SIZES)} )?(?:{_any(COLORS)} )?{_any([*SHAPES, 'object'])}"


def _fits(o, reference):
    """Whether an object is what "large red circle", "red object", ... refers to."""
    return all(word in o.attributes for word in reference.split() if word != "object")


def _references(scene, o, hide=None):
    """Every phrase that singles out one object of the scene without telling the attribute `hide`."""
    size, color, shape = o.attributes
    phrases = (" ".join(filter(None, words))
               for words in itertools.product((size, None), (color, None), (shape, "object")))
    return [p for p in phrases if (hide is None or getattr(o, hide) not in p.split())
            and sum(_fits(other, p) for other in scene.objects) == 1]


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Ask about a scene: -> (question, answer). Kinds colour, shape, count, relation, equally often where possible;
    the answer is unique and can be seen in the picture."""
    pick = lambda items: items[rng.integers(len(items))]
    kinds = list(rng.permutation(["color", "shape", "count", "relation"]))
    while True:
        kind, asked = kinds.pop(0), None
        o = pick(scene.objects)
        if kind == "count":
            noun = pick(["objects", o.color + " objects", o.size + " objects", PLURAL[o.shape]])
            asked = f"how many {noun} are there?"
        elif kind == "relation" and len(scene.objects) > 1:
            other = pick([p for p in scene.objects if p is not o])
            mine, its = _references(scene, o), _references(scene, other)
            r = relation(o, other)
            lenient = [p for p in scene.objects if _towards(r, p, other) > SAME_ROW / 32]
            if rng.random() < 0.5 and mine and its:
                asked = f"is the {pick(mine)} {pick([r, INVERSE[r]])} the {pick(its)}?"
            elif its and lenient == [o]:
                asked = f"what is {r} the {pick(its)}?"
        elif kind in ("color", "shape"):
            if kind == "color" and rng.random() < 0.2:
                asked = "what color is the background?"
            elif phrases := _references(scene, o, hide=kind):
                asked = f"what {kind} is the {pick(phrases)}?"
        if asked:
            return asked, sorted(answers(scene, asked))[0]


def _towards(r, a, b):
    """How far a lies from b in the direction of a relation, as a fraction of the side."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[r]


def answers(scene: Scene, asked: str) -> set[str]:
    """Every true answer to a question; empty if it is not in the grammar or names nothing, or too much."""
    def only(reference):
        found = [o for o in scene.objects if _fits(o, reference)]
        return found[0] if len(found) == 1 else None

    if asked == "what color is the background?":
        return {scene.background + "."}
    if m := re.fullmatch(rf"what (color|shape) is the ({_REF})\?", asked):
        o = only(m[2])
        return {getattr(o, m[1]) + "."} if o else set()
    if m := re.fullmatch(rf"how many ((?:{_any(SIZES)} )?(?:{_any(COLORS)} )?)({_any(PLURAL.values())}) are there\?", asked):
        noun = m[1] + next(s for s, p in PLURAL.items() if p == m[2])
        n = sum(_fits(o, noun) for o in scene.objects)
        return {("no", *COUNTS)[n] + "."}
    if m := re.fullmatch(rf"what is ({_any(HOLDS)}) the ({_REF})\?", asked):
        o = only(m[2])
        return {_noun(p.attributes) + "." for p in scene.objects if o and p is not o and HOLDS[m[1]](p, o)}
    if m := re.fullmatch(rf"is the ({_REF}) ({_any(HOLDS)}) the ({_REF})\?", asked):
        a, b = only(m[1]), only(m[3])
        return {"yes." if HOLDS[m[2]](a, b) else "no."} if a and b else set()
    return set()


def check_answer(scene: Scene, question: str, answer_text: str) -> bool:
    """Whether a text is a true answer, in exactly the wording of question()."""
    return answer_text in answers(scene, question)


# ---------------------------------------------------------------------------------------------------------------------
# Stories

_THING = rf"(?:{_any(SIZES)} )?(?:{_any(COLORS)} )?{_any(SHAPES)}"


class _Discourse:
    """What the sentences so far state. Objects keep only the attributes that were told."""

    def __init__(self):
        self.objects, self.background, self.count = [], None, None     # objects: list of dict attribute -> word
        self.order = {"left of": set(), "above": set()}                # pairs (i, j), transitively closed

    def tell(self, sentence: str) -> bool:
        """Add a sentence -> whether it states a new fact. ValueError if it does not parse or contradicts one."""
        if m := re.fullmatch(rf"the background is ({_any(BACKGROUNDS)})", sentence):
            return self._set("background", m[1])
        if m := re.fullmatch(r"there (?:is (one) object|are (two|three) objects)", sentence):
            if COUNTS.index(m[1] or m[2]) + 1 < len(self.objects):
                raise ValueError("fewer objects than were named")
            return self._set("count", m[1] or m[2])
        if m := re.fullmatch(rf"there is a ({_THING})", sentence):
            return self._introduce(m[1]) is not None
        if m := re.fullmatch(rf"({_any(HOLDS)}) the ({_THING}) is a ({_THING})", sentence):
            i = self.find(m[2])
            return self._relate(self._introduce(m[3]), m[1], i)
        if m := re.fullmatch(rf"the ({_THING}) is ({_any([*SIZES, *COLORS])})", sentence):
            o, key = self.objects[self.find(m[1])], "size" if m[2] in SIZES else "color"
            if o.get(key, m[2]) != m[2]:
                raise ValueError(f"the {m[1]} is {o[key]}")
            new = key not in o
            o[key] = m[2]
            return new
        if m := re.fullmatch(rf"the ({_THING}) is ({_any(HOLDS)}) the ({_THING})", sentence):
            return self._relate(self.find(m[1]), m[2], self.find(m[3]))
        raise ValueError("not in the grammar")

    def find(self, words):
        """Index of the only object that was told to be all of this."""
        found = [i for i, o in enumerate(self.objects) if set(words.split()) <= set(o.values())]
        if len(found) != 1:
            raise ValueError(f"{len(found)} objects were told to be a {words}")
        return found[0]

    def _set(self, key, value):
        if getattr(self, key) not in (None, value):
            raise ValueError(f"another {key} was told")
        new = getattr(self, key) is None
        setattr(self, key, value)
        return new

    def _introduce(self, words):
        told = {("size" if w in SIZES else "color" if w in COLORS else "shape"): w for w in words.split()}
        # What could be an object named before is not known to be a new one: it must differ in an attribute.
        if any(all(o.get(key, w) == w for key, w in told.items()) for o in self.objects):
            raise ValueError("may have been named before")
        if len(self.objects) == (COUNTS.index(self.count) + 1 if self.count else len(COUNTS)):
            raise ValueError("more objects than there are")
        self.objects.append(told)
        return len(self.objects) - 1

    def _relate(self, i, r, j):
        if r in ("right of", "below"):
            i, r, j = j, INVERSE[r], i
        if i == j or (j, i) in self.order[r]:
            raise ValueError("contradicts an order")
        new = (i, j) not in self.order[r]
        pairs = self.order[r] | {(i, j)}
        self.order[r] = pairs | {(a, d) for a, b in pairs for c, d in pairs if b == c}
        return new


def story(scene: Scene, rng: np.random.Generator) -> str:
    """Three to six sentences about a scene, each a new fact; what is left unsaid early may come later."""
    pick = lambda items: items[rng.integers(len(items))]
    told, named, sentences = _Discourse(), [], []
    target = rng.integers(3, 7)
    for _ in range(60):
        if len(sentences) == target:
            break
        kind, o = pick(["exists", "next", "is", "relation", "background", "count"]), pick(scene.objects)
        size, color, shape = o.attributes
        words = [w for w in (pick([size, None]), pick([color, color, None]), shape) if w]
        if not named and kind in ("next", "is", "relation"):
            kind = "exists"
        if kind == "background":
            sentence = f"the background is {scene.background}"
        elif kind == "count":
            n = len(scene.objects)
            sentence = "there is one object" if n == 1 else f"there are {COUNTS[n - 1]} objects"
        elif kind == "exists":
            sentence = f"there is a {' '.join(words)}"
        else:
            known = pick(range(len(named)))
            other = named[known]
            phrases = [p for p in _references(scene, other) if set(p.split()) <= set(told.objects[known].values())]
            if not phrases or kind != "is" and other is o:
                continue
            if kind == "next":
                sentence = f"{relation(o, other)} the {pick(phrases)} is a {' '.join(words)}"
            elif kind == "is":
                sentence = f"the {pick(phrases)} is {pick([other.size, other.color])}"
            else:
                mine = [p for i, n in enumerate(named) if n is o
                        for p in _references(scene, o) if set(p.split()) <= set(told.objects[i].values())]
                if not mine:
                    continue
                sentence = f"the {pick(mine)} is {relation(o, other)} the {pick(phrases)}"
        if any(o is n for n in named) and kind in ("exists", "next"):
            continue
        try:
            new = told.tell(sentence)
        except ValueError:
            continue
        if new:
            sentences.append(sentence + ".")
            if kind in ("exists", "next"):
                named.append(o)
    return " ".join(sentences)


def consistent(prefix: str, continuation: str) -> bool:
    """Whether a continuation parses, contradicts no fact of the prefix or its own, and states at least one new one."""
    told = _Discourse()
    try:
        for sentence in _sentences(prefix):
            told.tell(sentence)
        return any([told.tell(sentence) for sentence in _sentences(continuation)])
    except ValueError:
        return False


def _sentences(text):
    text = text.strip()
    if text and not text.endswith("."):
        raise ValueError("the last sentence has no end")
    return text[:-1].split(". ") if text else []


def corpus(rng: np.random.Generator, n: int) -> list[str]:
    """n texts of seen scenes (captions, questions, answers, stories, in turn) for training a tokenizer."""
    texts = []
    while len(texts) < n:
        scene = sample_scene(rng)
        texts += [caption(scene, rng, any_order=True), *question(scene, rng), story(scene, rng)]
    return texts[:n]


if __name__ == "__main__":
    scene = Scene("gray", (Object("circle", "red", "large", 0.4, 0.3), Object("square", "blue", "small", 0.6, 0.75)))
    text = "a large red circle above a small blue square on a gray background"
    print("read the picture back:", read_image(render(scene)))
    print("the caption is exact: ", is_exact(read_caption(text), scene), "(expect True)")
