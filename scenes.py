"""Scenes: a small generated world of pictures and texts, with exact readers that turn both back into facts.

    scene --render--> image --read_image--> scene       scene --caption--> text --read_caption--> description
    scene --question--> question, answer                scene --story--> sentences, any prefix a prompt

A scene is one to three objects (shape, colour, size, place) on a plain background. Places are continuous, as
fractions of the picture's width and height; so a scene can be drawn at any size and aspect ratio. All lengths
below are pixels of a 32 x 32 picture and grow with its shorter side. Objects are named in reading order (rows
from top to bottom, in a row from left to right): with a rule that the picture shows, a caption tells which
object is meant; with an arbitrary order a model mixes up the attributes of the objects.

The readers judge generated pictures and texts, so they refuse what is not of this world: read_image draws
what it has read and compares (analysis by synthesis); read_caption and check_answer accept the grammar alone.
Held-out compositions occur only where they are asked for, to measure generalisation.

Shapes: H, W picture height and width.    Run: python scenes.py   (CPU, 1 s)
"""

import dataclasses
import functools
import itertools
import re

import numpy as np

# Any two of these, backgrounds included, lie at least 121 / 255 apart in RGB.
COLORS = {"red": (205, 0, 40), "green": (0, 160, 50), "blue": (0, 85, 255), "yellow": (250, 235, 50),
          "orange": (255, 125, 0), "purple": (125, 0, 185), "cyan": (70, 225, 255), "pink": (255, 105, 195)}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (10, 10, 25)}
SIZES = {"small": 7.5, "large": 11.5}                     # diameter of the circle, side of the square
SHAPES = {"circle": (0.5, 0.5, 0.5), "square": (0.5, 0.5, 0.5), "triangle": (0.59, 0.68, 0.34),
          "cross": (0.58, 0.58, 0.58), "star": (0.57, 0.6, 0.49)}    # reach sideways, up, down, in diameters
COUNTS = ("one", "two", "three")

HELDOUT_PAIRS = (("green", "circle"), ("yellow", "square"), ("purple", "triangle"))
HELDOUT_COUNT = (3, "star")

ROOM, JITTER = 14.0, 1.0                                  # boxes stay in the inner 14 x 14 of a quadrant of
ROW, CLEAR = 8.0, 4.5                                     # 16, so 2 apart. Heights in one row differ by less
                                                          # than ROW; a relation holds from CLEAR on


@dataclasses.dataclass(frozen=True)
class Object:
    shape: str
    color: str
    size: str
    x: float                                              # centre of its area, fraction of the width
    y: float                                              # and of its height, downwards

    @property
    def attributes(self) -> tuple[str, str, str]:
        return self.size, self.color, self.shape          # in the order in which English names them


@dataclasses.dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Object, ...]                           # in reading order


@dataclasses.dataclass(frozen=True)
class Description:
    """What a caption states: `objects` as (size, color, shape), `relations` as (i, "left of", j)."""
    objects: tuple[tuple[str, str, str], ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str


# ---- Places

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def offset(a: Object, r: str, b: Object) -> float:
    """How far a lies from b in the direction r, as a fraction of the picture's side."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[r]


def holds(a: Object, r: str, b: Object) -> bool:
    """Whether `a r b` is true; both "left of" and "above" are of two objects on a diagonal."""
    return offset(a, r, b) >= CLEAR / 32


def relation(a: Object, b: Object) -> str:
    """The relation that texts state: left of or right of in one row, above or below otherwise."""
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
    """Whether objects contain a held-out composition: one of the pairs, or the count of one shape."""
    count, shape = HELDOUT_COUNT
    return (any((o.color, o.shape) in HELDOUT_PAIRS for o in objects)
            or sum(o.shape == shape for o in objects) >= count)


def _picker(rng):
    return lambda items: items[int(rng.integers(len(items)))]


def sample_scene(rng: np.random.Generator, heldout: bool = False, count: int | None = None) -> Scene:
    """Draw a scene of `count` objects (None: 1, 2 or 3, equally often).

    heldout=False never contains a held-out composition, heldout=True always at least one: a held-out pair,
    or, in a quarter of the scenes of three objects, the held-out count.
    """
    if count not in (None, 1, 2, 3):
        raise ValueError(f"count is {count}, expected 1, 2, 3 or None")
    pick = _picker(rng)
    count = count or int(rng.integers(1, 4))
    while True:
        objects = [Object(pick([*SHAPES]), pick([*COLORS]), pick([*SIZES]), 0, 0) for _ in range(count)]
        if not is_heldout(objects):
            break
    if heldout and count == HELDOUT_COUNT[0] and rng.random() < 0.25:
        objects = [dataclasses.replace(o, shape=HELDOUT_COUNT[1]) for o in objects]
    elif heldout:
        i, (color, shape) = int(rng.integers(count)), pick(HELDOUT_PAIRS)
        objects[i] = dataclasses.replace(objects[i], color=color, shape=shape)
    places = zip(objects, *_place(objects, rng))
    objects = [dataclasses.replace(o, x=float(x) / 32, y=float(y) / 32) for o, x, y in places]
    return Scene(pick(list(BACKGROUNDS)), reading_order(objects))


def _place(objects, rng):
    """A quadrant each, the bounding box jittered about its middle -> x (n,), y (n,) in pixels."""
    side, up, down = (np.array([SHAPES[o.shape] for o in objects]) * [[SIZES[o.size]] for o in objects]).T
    row, column = np.divmod(rng.permutation(4)[:len(objects)], 2)
    u, v = rng.uniform(-1, 1, (2, len(objects)))
    x = 8 + 16 * column + u * np.minimum(JITTER, ROOM / 2 - side)
    y = 8 + 16 * row + v * np.minimum(JITTER, (ROOM - up - down) / 2)               # of the box's middle
    return x, y + (up - down) / 2


# ---- Pictures: drawing

def _inside(shape, u, v):
    """Whether points lie in a shape of diameter 1, its centre of area at 0; u (1, n), v (n, 1) -> (n, n)."""
    if shape == "circle":
        return u * u + v * v <= 0.25
    u, w = abs(u), abs(v)
    if shape == "square":
        return (u <= 0.5) & (w <= 0.5)
    if shape == "triangle":
        return (3 ** 0.5 * u - v <= 0.68) & (v <= 0.34)
    if shape == "cross":
        return (u <= 0.16) & (w <= 0.58) | (w <= 0.16) & (u <= 0.58)
    # A star: with c the projection on the nearest of its points (three, as the left half is folded over), all
    # its edges lie on c + 2.1 |distance from that point's axis| = 0.6.
    c = np.maximum(np.maximum(-v, 0.9511 * u - 0.3090 * v), 0.5878 * u + 0.8090 * v)
    return c + 2.1 * np.sqrt(np.maximum(u * u + v * v - c * c, 0)) <= 0.6


def _reach(size, unit):
    """Pixels to each side of its central pixel that a drawing may touch; unit is the picture's side / 32."""
    return int(0.68 * SIZES[size] * unit) + 1


def _coverage(shape, size, fx, fy, unit, reach):
    """Share of each pixel that a shape covers, by 8 x 8 samples, its centre at (fx, fy) within the central
    pixel -> float32 (2 reach + 1, 2 reach + 1)."""
    n, sub, d = 2 * reach + 1, 8, np.float32(SIZES[size] * unit)
    grid = (np.arange(n * sub, dtype=np.float32) + 0.5) / sub - reach
    hit = _inside(shape, (grid[None] - np.float32(fx)) / d, (grid[:, None] - np.float32(fy)) / d)
    return hit.reshape(n, sub, n, sub).mean((1, 3), dtype=np.float32)


def check_size(H: int, W: int) -> None:
    """ValueError for a picture in which shapes could not be told apart."""
    if min(H, W) < 24:
        raise ValueError(f"a scene needs at least 24 x 24 pixels, got {H} x {W}; choose a larger image size")


def render(scene: Scene, size: int | tuple[int, int] = 32) -> np.ndarray:
    """Draw a scene, anti-aliased: size (side, or height and width, each >= 24) -> uint8 (H, W, 3)."""
    H, W = (size, size) if isinstance(size, int) else size
    check_size(H, W)
    unit, pad = min(H, W) / 32, _reach("large", min(H, W) / 32)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    image = np.tile(background, (H + 2 * pad, W + 2 * pad, 1))         # with a frame, so that no patch is cut
    for o in scene.objects:
        (ix, fx), (iy, fy) = divmod(o.x * W, 1), divmod(o.y * H, 1)
        r = _reach(o.size, unit)
        top, left = int(iy) + pad - r, int(ix) + pad - r
        patch = image[top:top + 2 * r + 1, left:left + 2 * r + 1]
        patch += _coverage(o.shape, o.size, fx, fy, unit, r)[..., None] * (COLORS[o.color] - background)
    return (image[pad:pad + H, pad:pad + W] + 0.5).astype(np.uint8)


# ---- Pictures: reading. The tolerances (colours in 0..1) were set on noise, blur and the reconstructions of
# a small autoencoder, before any prior was trained; results are comparable as long as they stay.

FOREGROUND = 0.27            # distance from the background that makes a pixel part of an object
SPECK = 6                    # pixels; a smaller component is left to the residuals
BACKGROUND_ERROR = 0.1       # of the background's mean colour
COLOR_ERROR = 0.2            # of an object's mean colour; two colours lie at least 0.474 apart
OBJECT_ERROR = 0.17          # squared residual of an object over its squared contrast
AMBIGUITY = 0.02             # by which the best other shape or size must be worse
LOCAL_ERROR = 0.1            # mean squared residual in any 3 x 3 window, over the largest squared contrast
STRAY_ERROR = 0.03           # the same of the background beside the objects, absolute


def read_image(image: np.ndarray) -> Scene | None:
    """Read a picture back: uint8 (H, W, 3) -> Scene, or None if it is not a picture of this world.

    Background by vote; connected components of what differs from it; for each the shape, size and colour
    whose drawing leaves the smallest residual. What the drawing of all does not explain is refused.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 image (H, W, 3), got {image.dtype} {image.shape}")
    (H, W), unit = image.shape[:2], min(image.shape[:2]) / 32
    pixels, backgrounds = image / np.float32(255), _rgb(BACKGROUNDS)
    near = [((pixels - b) ** 2).sum(-1) < FOREGROUND ** 2 for b in backgrounds]   # 3 of (H, W)
    k = int(np.argmax([n.sum() for n in near]))
    signal, colors = pixels - backgrounds[k], _rgb(COLORS) - backgrounds[k]       # (H, W, 3), (8, 3)
    if not near[k].any() or np.linalg.norm(signal[near[k]].mean(0)) > BACKGROUND_ERROR:
        return None
    components = [c for c in _components(~near[k]) if len(c) >= SPECK * unit ** 2]
    if not 1 <= len(components) <= len(COUNTS):
        return None

    pad = _reach("large", unit) + 1
    signal = np.pad(signal, ((pad, pad), (pad, pad), (0, 0)))
    owner = np.zeros(signal.shape[:2], int)                                       # 0: nobody
    for i, component in enumerate(components, 1):
        owner[tuple(np.array(component).T + pad)] = i
    for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):                        # and the faint rim around
        owner = np.where(owner == 0, np.roll(owner, shift, axis), owner)
    objects = [_fit(signal, owner == i, colors, unit) for i in range(1, owner.max() + 1)]
    if None in objects:
        return None
    objects = [dataclasses.replace(o, x=(o.x - pad) / W, y=(o.y - pad) / H) for o in objects]
    scene = Scene(list(BACKGROUNDS)[k], reading_order(objects))

    residual = pixels - _soften(render(scene, (H, W)) / np.float32(255))
    contrast = max((colors[list(COLORS).index(o.color)] ** 2).sum() for o in objects)
    if _worst_window(residual, unit) > LOCAL_ERROR * contrast:
        return None
    return scene if _worst_window(signal * (owner == 0)[..., None], unit) <= STRAY_ERROR else None


def _rgb(table):
    return np.array(list(table.values()), np.float32) / 255


def _components(foreground):
    """4-connected components by flood fill: bool (H, W) -> list of lists of (y, x)."""
    rest, components = set(zip(*(axis.tolist() for axis in np.nonzero(foreground)))), []
    while rest:
        component = [rest.pop()]
        for y, x in component:                                                    # grows while walked
            for p in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if p in rest:
                    rest.remove(p)
                    component.append(p)
        components.append(component)
    return components


@functools.lru_cache(maxsize=128)
def _templates(fx, fy, unit):
    """Every shape and size with its centre at (fx, fy) eighths of the central pixel -> (10, pixels)."""
    reach = _reach("large", unit)
    drawings = [_coverage(shape, size, fx / 8, fy / 8, unit, reach) for shape in SHAPES for size in SIZES]
    return _soften(np.stack(drawings, -1)).reshape(-1, len(drawings)).T


def _soften(image):
    """Blur by half a pixel: as far from a sharp picture as from the softest one that is still to be read."""
    for axis in (0, 1):
        image = (4 * image + np.roll(image, 1, axis) + np.roll(image, -1, axis)) / 6
    return image


def _fit(signal, mine, palette, unit):
    """The object, in pixels of `signal`, whose drawing explains best what lies in the mask `mine`, or None.

    signal (H, W, 3) is the picture less its background, framed; palette (8, 3) the colours less it.
    """
    y, x = np.nonzero(mine)
    s, reach = signal[y, x], _reach("large", unit)                                # (n, 3)
    alpha = np.maximum(s @ (s.T @ (s ** 2).sum(1)), 0)                            # share of its mean colour
    if not alpha.any():
        return None
    cx, cy = alpha @ (x + 0.5) / alpha.sum(), alpha @ (y + 0.5) / alpha.sum()
    signal, energy, best = signal * mine[..., None], (s ** 2).sum(), (np.inf,)
    for dx, dy in itertools.product((-2, 0, 2), repeat=2):                        # eighths of a pixel
        (ix, fx), (iy, fy) = divmod(round(8 * cx) + dx, 8), divmod(round(8 * cy) + dy, 8)
        t = _templates(fx, fy, unit)
        patch = signal[iy - reach:iy + reach + 1, ix - reach:ix + reach + 1].reshape(-1, 3)
        mass, seen = (t ** 2).sum(1, keepdims=True), t @ patch                    # (10, 1), (10, 3)
        drawn = mass * (palette ** 2).sum(1)                                      # (10, 8)
        error = (energy - 2 * seen @ palette.T + drawn) / drawn                   # |s - t c|^2 / |t c|^2
        i, j = np.unravel_index(error.argmin(), error.shape)
        if error[i, j] < best[0]:
            margin, area = np.delete(error, i, 0).min() - error[i, j], t[i].sum()
            best = error[i, j], margin, area, i, j, ix + fx / 8, iy + fy / 8
    error, margin, area, i, j, cx, cy = best
    color = s.sum(0) / area                                       # the same whether sharp or soft
    if error > OBJECT_ERROR or margin < AMBIGUITY or np.linalg.norm(color - palette[j]) > COLOR_ERROR:
        return None
    shape, size = list(itertools.product(SHAPES, SIZES))[i]
    return Object(shape, list(COLORS)[j], size, float(cx), float(cy))


def _worst_window(difference, unit):
    """Largest mean of a squared difference (H, W, 3), summed over channels, in any window of 3 x 3 units."""
    n = max(3, round(3 * unit))
    total = np.pad((difference ** 2).sum(-1, dtype=np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return (total[n:, n:] - total[:-n, n:] - total[n:, :-n] + total[:-n, :-n]).max() / n ** 2


# ---- Captions. One list of templates writes and reads them. a, b, c are the objects as named; their relation
# comes infix (a left of b), as a suffix (a with b to its right) or as a prefix (right of a is b).

SUFFIX = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}
CAPTIONS = {
    1: ("{a} on a {bg} background",
        "on a {bg} background, {a}",
        "there is {a}. the background is {bg}."),
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


def caption(scene: Scene, rng: np.random.Generator, any_order: bool = False,
            wording: int | None = None) -> str:
    """Describe a scene in full, in one of several wordings: a drawn one, or the given one.

    Objects are named in reading order; any_order=True draws another order, and the relations stay true.
    """
    objects = [scene.objects[i] for i in (rng.permutation if any_order else np.arange)(len(scene.objects))]
    words = {"bg": scene.background} | {name: _a(o.attributes) for name, o in zip("abc", objects)}
    for p, q, o1, o2 in zip("ab", "bc", objects, objects[1:]):
        words[p + q], words[q + p] = relation(o1, o2), relation(o2, o1)
        words[q + p + "_suffix"] = SUFFIX[relation(o2, o1)]
    wordings = CAPTIONS[len(objects)]
    return (_picker(rng)(wordings) if wording is None else wordings[wording % len(wordings)]).format(**words)


def read_caption(text: str) -> Description | None:
    """What a caption states, or None if it is not in the grammar (any wording, any order of the objects)."""
    found = next(filter(None, (pattern.fullmatch(text) for pattern in _caption_patterns())), None)
    if found is None:
        return None
    words = found.groupdict()
    if "ba_suffix" in words:
        words["ba"] = next(r for r, suffix in SUFFIX.items() if suffix == words["ba_suffix"])
    pairs = [p for p in ("ab", "ba", "bc", "cb") if p in words]
    return Description(objects=tuple(tuple(words[n].split()[1:]) for n in "abc" if n in words),
                       relations=tuple(("abc".index(p[0]), words[p], "abc".index(p[1])) for p in pairs),
                       background=words["bg"])


@functools.cache
def _caption_patterns():
    noun = f"a {_any(SIZES)} {_any(COLORS)} {_any(SHAPES)}"
    kinds = dict.fromkeys("abc", noun) | dict.fromkeys(("ab", "ba", "bc", "cb"), _any(INVERSE))
    kinds |= {"ba_suffix": _any(SUFFIX.values()), "bg": _any(BACKGROUNDS)}
    groups = {name: f"(?P<{name}>{pattern})" for name, pattern in kinds.items()}
    return [re.compile(t.replace(".", r"\.").format(**groups)) for ts in CAPTIONS.values() for t in ts]


def _any(words):
    return "(?:" + "|".join(words) + ")"


def _a(words):
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _relations_hold(description, objects):
    return all(holds(objects[i], r, objects[j]) for i, r, j in description.relations)


def matches(scene: Scene | None, description: Description) -> dict[str, bool]:
    """Judge a drawn picture, as read (None: refused, nothing matches), against its prompt.

    The attributes are compared as multisets; "relation" asks that all stated relations hold when the
    described objects are assigned to the drawn ones as well as possible (true of one object, which has none);
    "scene" asks for every attribute of every object, the background, and all relations.
    """
    names = ("count", "color", "shape", "size", "relation", "background", "scene")
    if scene is None:
        return dict.fromkeys(names, False)
    told, drawn = description.objects, [o.attributes for o in scene.objects]
    same = {name: sorted(d[k] for d in drawn) == sorted(t[k] for t in told)
            for k, name in enumerate(("size", "color", "shape"))}
    same["count"] = len(drawn) == len(told)
    same["background"] = scene.background == description.background
    same["relation"] = same["scene"] = False
    if same["count"]:
        orders = list(itertools.permutations(scene.objects))
        agree = [sum(d == t for o, ts in zip(order, told) for d, t in zip(o.attributes, ts))
                 for order in orders]
        same["relation"] = any(_relations_hold(description, order)
                               for order, n in zip(orders, agree) if n == max(agree))
        same["scene"] = max(agree) == 3 * len(told) and same["relation"] and same["background"]
    return {name: same[name] for name in names}


def is_exact(description: Description | None, scene: Scene) -> bool:
    """Whether a caption as read (None: it does not parse) describes the same scene, as matches defines it."""
    return description is not None and matches(scene, description)["scene"]


def is_true(description: Description | None, scene: Scene) -> bool:
    """Whether a caption as read states no false fact; it may leave objects out."""
    if description is None or description.background != scene.background:
        return False
    some = itertools.permutations(scene.objects, len(description.objects))
    return any(tuple(o.attributes for o in objects) == description.objects
               and _relations_hold(description, objects) for objects in some)


# ---- Questions

PLURAL = {s: s + ("es" if s.endswith("s") else "s") for s in (*SHAPES, "object")}
THING = f"(?:{_any(SIZES)} )?(?:{_any(COLORS)} )?{_any(SHAPES)}"
THE = f"the ((?:{_any(SIZES)} )?(?:{_any(COLORS)} )?{_any((*SHAPES, 'object'))})"
HOW_MANY = re.compile(rf"how many ((?:{_any(SIZES)} )?(?:{_any(COLORS)} )?)({_any(PLURAL.values())}) "
                      r"are there\?")
ASKED = re.compile(rf"what (color|shape) is {THE}\?|what is ({_any(INVERSE)}) {THE}\?|"
                   rf"is {THE} ({_any(INVERSE)}) {THE}\?")


def _fits(o, phrase):
    return all(word in o.attributes for word in phrase.split() if word != "object")


@functools.lru_cache(maxsize=64)
def _phrases(scene, o):
    """Every phrase, such as "large circle" or "red object", that fits this object of the scene alone."""
    size, color, shape = o.attributes
    subsets = itertools.product(("", size + " "), ("", color + " "), (shape, "object"))
    return [p for p in map("".join, subsets) if sum(_fits(other, p) for other in scene.objects) == 1]


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Ask about a scene -> (question, answer). Colour, shape, count and relation are asked for equally often
    where the scene allows; the answer is unique and can be seen in the picture."""
    pick = _picker(rng)
    for kind in rng.permutation(["color", "shape", "count", "relation"]):   # a count can always be asked for
        o, asked = pick(scene.objects), None
        phrases = _phrases(scene, o)
        if kind == "count":
            things = pick(["objects", "objects", f"{o.color} objects", f"{o.size} objects", PLURAL[o.shape]])
            asked = f"how many {things} are there?"
        elif kind == "color" and rng.random() < 0.2:
            asked = "what color is the background?"
        elif kind in ("color", "shape"):
            if hiding := [p for p in phrases if getattr(o, kind) not in p.split()]:
                asked = f"what {kind} is the {pick(hiding)}?"
        elif others := [(p, its) for p in scene.objects if p is not o and (its := _phrases(scene, p))]:
            other, its = pick(others)
            r = relation(o, other)
            alone = [p for p in scene.objects if holds(p, r, other)] == [o]
            if alone and rng.random() < 0.5:
                asked = f"what is {r} the {pick(its)}?"
            elif phrases:
                asked = f"is the {pick(phrases)} {pick([r, INVERSE[r]])} the {pick(its)}?"
        if asked:
            (answer,) = answers(scene, asked)
            return asked, answer


def answers(scene: Scene, asked: str) -> set[str]:
    """Every true answer; none if the question does not parse, or if "the ..." fits no or several objects."""
    if asked == "what color is the background?":
        return {scene.background + "."}
    if m := HOW_MANY.fullmatch(asked):
        noun = m[1] + next(s for s, plural in PLURAL.items() if plural == m[2])
        return {("none", *COUNTS)[sum(_fits(o, noun) for o in scene.objects)] + "."}
    if not (m := ASKED.fullmatch(asked)):
        return set()
    attribute, a, r, b, c, s, d = m.groups()
    found = [[o for o in scene.objects if _fits(o, phrase)] for phrase in (a, b, c, d) if phrase]
    if any(len(objects) != 1 for objects in found):
        return set()
    first, last = found[0][0], found[-1][0]
    if attribute:
        return {getattr(first, attribute) + "."}
    if r:
        return {_a(o.attributes) + "." for o in scene.objects if holds(o, r, first)}
    return {"yes." if holds(first, s, last) else "no."}


def check_answer(scene: Scene, asked: str, answer_text: str) -> bool:
    """Whether a text is a true answer to a question, in exactly the wording of question()."""
    return answer_text in answers(scene, asked)


# ---- Stories

class _Discourse:
    """The facts that a row of sentences states. An object keeps only the attributes that were told of it."""

    def __init__(self):
        self.objects, self.background, self.count = [], None, None   # objects: dicts such as {"color": "red"}
        self.order = {"left of": set(), "above": set()}              # pairs of indices, transitively closed

    def tell(self, sentence: str) -> bool:
        """Add a sentence -> whether it states a new fact. ValueError (and nothing is added) if it does not
        parse or contradicts a fact."""
        a, r = rf"(?:a(?! o)|an(?= o)) ({THING})", f"({_any(INVERSE)})"
        if m := re.fullmatch(f"the background is ({_any(BACKGROUNDS)})", sentence):
            return self._set(vars(self), "background", m[1])
        if m := re.fullmatch("there (?:is (one) object|are (two|three) objects)", sentence):
            if len(self.objects) > COUNTS.index(m[1] or m[2]) + 1:
                raise ValueError("more objects were named")
            return self._set(vars(self), "count", m[1] or m[2])
        if m := re.fullmatch(f"there is {a}", sentence):
            return self._introduce(m[1]) >= 0
        if m := re.fullmatch(f"{r} the ({THING}) is {a}", sentence):
            j = self._find(m[2])                                       # before the new object can be meant
            return self._relate(self._introduce(m[3]), m[1], j)
        if m := re.fullmatch(f"the ({THING}) is {r} the ({THING})", sentence):
            return self._relate(self._find(m[1]), m[2], self._find(m[3]))
        if m := re.fullmatch(f"the ({THING}) is ({_any((*SIZES, *COLORS))})", sentence):
            return self._set(self.objects[self._find(m[1])], "size" if m[2] in SIZES else "color", m[2])
        raise ValueError("not in the grammar")

    def _set(self, facts, key, value):
        old = facts.get(key)
        if old not in (None, value):
            raise ValueError(f"the {key} was {old}")
        facts[key] = value
        return old is None

    def _find(self, phrase):
        """The only object of which all of "large red circle", "circle", ... was told -> its index."""
        found = [i for i, told in enumerate(self.objects) if set(phrase.split()) <= set(told.values())]
        if len(found) != 1:
            raise ValueError(f"{len(found)} objects are the {phrase}")
        return found[0]

    def _introduce(self, phrase):
        """Add an object -> its index. To be a new one it must differ from every other in a told attribute."""
        new = {"size" if w in SIZES else "color" if w in COLORS else "shape": w for w in phrase.split()}
        if any(all(told.get(key, w) == w for key, w in new.items()) for told in self.objects):
            raise ValueError(f"a {phrase} may have been named before")
        if len(self.objects) == (COUNTS.index(self.count) + 1 if self.count else len(COUNTS)):
            raise ValueError("no more objects are there")
        self.objects.append(new)
        return len(self.objects) - 1

    def _relate(self, i, r, j):
        i, r, j = (i, r, j) if r in self.order else (j, INVERSE[r], i)
        old = self.order[r]
        if i == j or (j, i) in old:
            raise ValueError(f"{r} itself")
        pairs = old | {(i, j)}
        self.order[r] = pairs | {(a, d) for a, b in pairs for c, d in pairs if b == c}
        return (i, j) not in old


def story(scene: Scene, rng: np.random.Generator) -> str:
    """Three to six sentences about a scene, of which each states something new. What one leaves unsaid, a
    later one may tell; objects are called by what was told of them."""
    pick, told, sentences = _picker(rng), _Discourse(), []
    named = []                                                           # named[i] is told.objects[i]
    count, length = COUNTS[len(scene.objects) - 1], int(rng.integers(3, 7))
    phrases = {o: _phrases(scene, o) for o in scene.objects}
    kinds = ["exists", "exists", "attribute", "background", "count"]
    kinds += ["next to", "next to", "relation"] if len(scene.objects) > 1 else []

    def phrase(o):
        """Some words that were told of an object and that single it out, or None."""
        known = told.objects[named.index(o)].values() if o in named else ()
        found = [p for p in phrases[o] if set(p.split()) <= set(known)]
        return pick(found) if found else None

    for i in rng.permutation(8 * len(kinds)).tolist():                   # attempts: three at least succeed
        kind, o, other = kinds[i % len(kinds)], pick(scene.objects), None
        if kind in ("next to", "relation"):
            other = pick(scene.objects)
        subject = phrase(o) if kind in ("attribute", "relation") else ""
        its = phrase(other) if other else ""
        if subject is None or its is None or kind in ("exists", "next to") and o in named:
            continue                                                     # not told of yet, or told of already
        if kind in ("exists", "next to"):
            words = pick([o.size, None]), pick([o.color, o.color, None]), o.shape
            thing = _a([word for word in words if word])
            sentence = f"{relation(o, other)} the {its} is {thing}" if other else f"there is {thing}"
        elif kind == "attribute":
            sentence = f"the {subject} is {pick([o.size, o.color])}"
        elif kind == "relation":
            sentence = f"the {subject} is {relation(o, other)} the {its}"
        elif kind == "background":
            sentence = f"the background is {scene.background}"
        else:
            sentence = "there is one object" if count == "one" else f"there are {count} objects"
        try:
            new = told.tell(sentence)
        except ValueError:                                               # too like an object told of
            continue
        if new:
            sentences.append(sentence + ".")
            named += [o] if kind in ("exists", "next to") else []
        if len(sentences) == length:
            break
    return " ".join(sentences)


def consistent(prefix: str, continuation: str) -> bool:
    """Whether a continuation parses, contradicts no fact of the prefix or its own, and states a new one."""
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
    """n texts of scenes that are not held out (captions, questions, answers, stories), for a tokenizer."""
    texts = []
    while len(texts) < n:
        scene = sample_scene(rng)
        texts += [caption(scene, rng, any_order=True), *question(scene, rng), story(scene, rng)]
    return texts[:n]


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    circle, square = Object("circle", "red", "large", 0.4, 0.3), Object("square", "blue", "small", 0.6, 0.75)
    scene = Scene("gray", (circle, square))
    text = "a large red circle above a small blue square on a gray background"
    read = read_image(render(scene))
    print("drawn and read back (expect large red circle 0.40 0.30, small blue square 0.60 0.75, gray):",
          *(f"{' '.join(o.attributes)} {o.x:.2f} {o.y:.2f}," for o in read.objects), read.background)
    wide = read_image(render(scene, (48, 80)))
    print("drawn at 48 x 80 it is the same scene (expect True):", matches(wide, read_caption(text))["scene"])
    print(f"{text!r} is exact (expect True):", is_exact(read_caption(text), scene))
    print("the same with left of in place of above (expect True, then False):",
          *(is_exact(read_caption(text.replace("above", r)), scene) for r in ("left of", "right of")))
    print("in other words:", caption(scene, rng, any_order=True))
    print("a question and its answer:", *question(scene, rng))
    print("a story:", story(scene, rng))
