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
SHAPES = {"circle": (0.5, 0.5, 0.5), "square": (0.47, 0.47, 0.47), "triangle": (0.59, 0.68, 0.34),
          "cross": (0.55, 0.55, 0.55), "star": (0.57, 0.6, 0.49)}    # extent sideways, up, down, in diameters
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
    """Whether points lie in a shape of diameter 1 with its centre of area at the origin; u (1, n), v (m, 1) -> (m, n)."""
    if shape == "circle":
        return u * u + v * v <= 0.25
    if shape == "square":
        return (abs(u) <= 0.47) & (abs(v) <= 0.47)
    if shape == "triangle":
        return (3 ** 0.5 * abs(u) - v <= 0.68) & (v <= 0.34)
    if shape == "cross":
        return (abs(u) <= 0.17) & (abs(v) <= 0.55) | (abs(v) <= 0.17) & (abs(u) <= 0.55)
    # A star of outer radius 0.6: fold the plane onto half a point, where one straight edge remains.
    angle = np.abs((np.arctan2(u, -v) / (0.4 * np.pi) + 0.5) % 1 - 0.5) * (0.4 * np.pi)
    return np.hypot(u, v) * (np.cos(angle) + 1.064 * np.sin(angle)) <= 0.6


def _coverage(shape, size, cx, cy, unit, H, W, sub=8):
    """Share of each pixel that the shape covers, by sub x sub sampling -> (m, n) and the slices of its box.

    cx, cy in pixels, unit in pixels of this picture per pixel of a 32 x 32 one.
    """
    d = SIZES[size] * unit
    r = 0.62 * max(SHAPES[shape]) / 0.6 * d + 1
    x0, x1 = max(int(cx - r), 0), min(int(cx + r) + 1, W)
    y0, y1 = max(int(cy - r), 0), min(int(cy + r) + 1, H)
    u = (np.arange(x0 * sub, x1 * sub) + 0.5) / sub - cx
    v = (np.arange(y0 * sub, y1 * sub) + 0.5) / sub - cy
    hit = _inside(shape, u[None] / d, v[:, None] / d)                                     # (m * sub, n * sub)
    return hit.reshape(y1 - y0, sub, x1 - x0, sub).mean((1, 3)), (slice(y0, y1), slice(x0, x1))


def render(scene: Scene, size: int | tuple[int, int] = 32) -> np.ndarray:
    """Draw a scene, anti-aliased: size (side, or height and width, each >= 24) -> uint8 (H, W, 3)."""
    H, W = (size, size) if isinstance(size, int) else size
    if min(H, W) < 24:
        raise ValueError(f"a scene needs at least 24 x 24 pixels, got {H} x {W}; choose a larger image size")
    background = np.array(BACKGROUNDS[scene.background], float)
    image = np.tile(background, (H, W, 1))
    for o in scene.objects:
        m, box = _coverage(o.shape, o.size, o.x * W, o.y * H, min(H, W) / 32, H, W)
        image[box] += m[..., None] * (COLORS[o.color] - background)
    return (image + 0.5).astype(np.uint8)


# The reader's tolerances, in units of the colour range 0..1. They were fixed before any model was trained.
FOREGROUND = 0.27            # distance from the background that makes a pixel part of an object
BACKGROUND_ERROR = 0.1       # of the background's median colour
COLOR_ERROR = 0.2            # of an object's mean colour; half the smallest distance of two colours is 0.237
OBJECT_ERROR = 0.15          # squared residual of an object over its squared contrast
LOCAL_ERROR = 0.2            # mean squared residual in any 3 x 3 window, over the largest squared contrast


def read_image(image: np.ndarray) -> Scene | None:
    """Read a picture back into its scene: uint8 (H, W, 3) -> Scene, or None if it is not a picture of this world.

    Background by vote; connected components of what differs from it; for each the shape, size and colour whose
    drawing at the measured centre leaves the smallest residual. What the whole drawing does not explain is refused.
    """
    H, W, _ = image.shape
    unit = min(H, W) / 32
    pixels = image.astype(np.float64) / 255
    votes = [(((pixels - b) ** 2).sum(-1) < FOREGROUND ** 2).sum() for b in _rgb(BACKGROUNDS)]
    background = list(BACKGROUNDS)[int(np.argmax(votes))]
    b = _rgb(BACKGROUNDS)[int(np.argmax(votes))]
    signal = pixels - b                                                                   # (H, W, 3)
    foreground = (signal ** 2).sum(-1) > FOREGROUND ** 2                                  # (H, W)
    if foreground.all() or np.linalg.norm(np.median(signal[~foreground], 0)) > BACKGROUND_ERROR:
        return None
    label = _components(foreground)
    area = np.bincount(label.ravel())
    found = [k for k in range(1, len(area)) if area[k] >= 6 * unit ** 2]                  # less is a speck of noise
    if not 1 <= len(found) <= len(COUNTS):
        return None
    objects, residual, contrast = [], signal.copy(), 0.0
    for k in found:
        fit = _fit(np.where(np.isin(label, [j for j in found if j != k])[..., None], 0, signal), label == k, b, unit)
        if fit is None:
            return None
        shape, size, color, cx, cy = fit
        m, box = _coverage(shape, size, cx, cy, unit, H, W)
        c = np.array(COLORS[color]) / 255 - b
        residual[box] -= m[..., None] * c
        contrast = max(contrast, c @ c)
        objects.append(Object(shape, color, size, cx / W, cy / H))
    window = max(3, round(3 * unit))
    total = np.zeros((H + 1, W + 1))
    total[1:, 1:] = (residual ** 2).sum(-1).cumsum(0).cumsum(1)
    local = total[window:, window:] - total[:-window, window:] - total[window:, :-window] + total[:-window, :-window]
    if local.max() / window ** 2 > LOCAL_ERROR * contrast:
        return None
    return Scene(background, reading_order(objects))


def _rgb(table):
    return np.array(list(table.values())) / 255


def _components(foreground):
    """4-connected components by flood fill: bool (H, W) -> int (H, W), 0 outside."""
    label = np.zeros(foreground.shape, int)
    rest, k = set(zip(*(axis.tolist() for axis in np.nonzero(foreground)))), 0
    while rest:
        k += 1
        stack = [rest.pop()]
        while stack:
            y, x = stack.pop()
            label[y, x] = k
            for p in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if p in rest:
                    rest.remove(p)
                    stack.append(p)
    return label


def _fit(signal, member, b, unit):
    """The (shape, size, color, cx, cy) that explains one component best, or None if none explains it."""
    H, W = member.shape
    ys, xs = np.nonzero(member)
    box = slice(max(ys.min() - 2, 0), ys.max() + 3), slice(max(xs.min() - 2, 0), xs.max() + 3)
    s = signal[box]                                                                       # (m, n, 3)
    weight = (s ** 2).sum(-1) * member[box]
    c = (weight[..., None] * s).sum((0, 1)) / weight.sum()                                # rough colour, less background
    alpha = s @ c                                                                         # (m, n), noise averages out
    y, x = np.mgrid[box[0].start:box[0].start + len(s), box[1].start:box[1].start + s.shape[1]] + 0.5
    cx, cy = (alpha * x).sum() / alpha.sum(), (alpha * y).sum() / alpha.sum()
    if not (0 < cx < W and 0 < cy < H):
        return None
    palette, best = _rgb(COLORS) - b, (np.inf,)
    for shape, size in itertools.product(SHAPES, SIZES):
        m, where = _coverage(shape, size, cx, cy, unit, H, W, sub=4)
        energy = (signal[where] ** 2).sum() + (s ** 2).sum() - 0
        mass = (m ** 2).sum()
        mean = (m[..., None] * signal[where]).sum((0, 1)) / mass                          # least-squares colour
        # |signal - m color|^2 / (m^2 color^2) for every colour at once; signal outside the drawing counts too
        error = ((s ** 2).sum() - 2 * mass * palette @ mean + mass * (palette ** 2).sum(1)) / (mass * (palette ** 2).sum(1))
        k = int(error.argmin())
        if error[k] < best[0]:
            best = error[k], shape, size, list(COLORS)[k], np.linalg.norm(mean - palette[k])
    if best[0] > OBJECT_ERROR or best[4] > COLOR_ERROR:
        return None
    return *best[1:4], cx, cy


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
