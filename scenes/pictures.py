"""Pictures: random scenes, drawn as images, and a hand-written reader from image to scene.

    scene --render--> image --read_image--> scene, or None if the image is not of this world

A scene is one to three objects (shape, color, size, place) on a plain background. Places are
fractions of the width and height, so a scene can be drawn at any size. Lengths are in units: a unit
is 1 / 32 of the shorter side (where places are compared, of the side along which they differ). The
reader judges generated pictures: it draws the scene that it has read and refuses a picture that
differs too much from the drawing.

Run: python -m scenes.pictures   (CPU, 1 s)
"""
import dataclasses
import functools
import itertools

import numpy as np

# RGB, 0..255. Any two of the eleven colors have a distance of at least 120.
COLORS = {"red": (205, 0, 40), "green": (0, 160, 50), "blue": (0, 85, 255),
          "yellow": (250, 235, 50), "orange": (255, 125, 0), "purple": (125, 0, 185),
          "cyan": (70, 225, 255), "pink": (255, 105, 195)}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (10, 10, 25)}
SIZES = {"small": 7.5, "large": 11.5}         # diameter of the circle, side of the square, in units
# How far a shape extends from its centroid: to each side, upwards, downwards; in diameters.
SHAPES = {"circle": (0.5, 0.5, 0.5), "square": (0.5, 0.5, 0.5), "triangle": (0.59, 0.68, 0.34),
          "cross": (0.58, 0.58, 0.58), "star": (0.57, 0.6, 0.49)}
COUNTS = ("one", "two", "three")              # the possible numbers of objects

# Only scenes sampled with heldout=True have these, to measure generalization to new compositions.
HELDOUT_PAIRS = (("green", "circle"), ("yellow", "square"), ("purple", "triangle"))
HELDOUT_TRIPLE = "star"                       # three of this shape in one scene

ROOM = 14.0         # units; each object stays in the inner 14 x 14 of a quadrant of 16 x 16
JITTER = 1.0        # units by which an object's box may move from the middle of its quadrant
ROW = 8.0           # units; two objects whose heights differ by less are in one row
CLEAR = 4.5         # units; a relation is true from this distance on


@dataclasses.dataclass(frozen=True)
class Object:
    shape: str
    color: str
    size: str
    x: float                                  # of its centroid, as a fraction of the width
    y: float                                  # as a fraction of the height, downwards

    @property
    def attributes(self) -> tuple[str, str, str]:
        return self.size, self.color, self.shape          # the order of an English noun phrase


@dataclasses.dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Object, ...]               # in reading order

# ---- Places ------------------------------------------------------------------------------------

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def is_relation(a: Object, rel: str, b: Object) -> bool:
    """Whether `a rel b` is true. Two relations are true of objects on a diagonal."""
    return {"left of": b.x - a.x, "right of": a.x - b.x,
            "above": b.y - a.y, "below": a.y - b.y}[rel] >= CLEAR / 32


def main_relation(a: Object, b: Object) -> str:
    """The relation that texts use: left of or right of in one row, else above or below."""
    if abs(a.y - b.y) < ROW / 32:
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def reading_order(objects) -> tuple[Object, ...]:
    """Sort objects by rows from top to bottom, and each row from left to right."""
    order, rest = [], sorted(objects, key=lambda o: o.y)
    while rest:                               # the next row: all less than ROW below the topmost
        row = [o for o in rest if o.y - rest[0].y < ROW / 32]
        order += sorted(row, key=lambda o: o.x)
        rest = rest[len(row):]
    return tuple(order)


def is_heldout(objects) -> bool:
    return (any((o.color, o.shape) in HELDOUT_PAIRS for o in objects)
            or [o.shape for o in objects] == [HELDOUT_TRIPLE] * 3)


def pick(rng: np.random.Generator, items):
    """One of the items of a list or a tuple, or of the keys of a dict, all equally likely."""
    return list(items)[int(rng.integers(len(items)))]


def sample_scene(rng: np.random.Generator, heldout=False, count: int | None = None) -> Scene:
    """Sample a scene of 1, 2 or 3 objects (count=None: equally likely).

    heldout=True: a held-out pair or, in a quarter of the scenes with three objects, the triple."""
    count = count or int(rng.integers(1, 4))
    objects = []
    while not objects or is_heldout(objects):
        objects = [Object(pick(rng, SHAPES), pick(rng, COLORS), pick(rng, SIZES), 0, 0)
                   for _ in range(count)]
    if heldout and count == 3 and rng.random() < 0.25:
        objects = [dataclasses.replace(o, shape=HELDOUT_TRIPLE) for o in objects]
    elif heldout:
        i, (color, shape) = int(rng.integers(count)), pick(rng, HELDOUT_PAIRS)
        objects[i] = dataclasses.replace(objects[i], color=color, shape=shape)
    objects = reading_order(place(objects, rng))
    return Scene(pick(rng, BACKGROUNDS), objects)


def place(objects, rng: np.random.Generator) -> list[Object]:
    """Put each object into a quadrant of its own, its bounding box near the quadrant's middle."""
    extents = np.array([SHAPES[o.shape] for o in objects]) * [[SIZES[o.size]] for o in objects]
    side, up, down = extents.T                                              # (count,) each, units
    row, column = np.divmod(rng.permutation(4)[:len(objects)], 2)
    u, v = rng.uniform(-1, 1, (2, len(objects)))
    x = 8 + 16 * column + u * np.minimum(JITTER, ROOM / 2 - side)
    y = 8 + 16 * row + v * np.minimum(JITTER, (ROOM - up - down) / 2)       # the middle of the box
    return [dataclasses.replace(o, x=float(x) / 32, y=float(y) / 32)        # of the centroid
            for o, x, y in zip(objects, x, y + (up - down) / 2)]

# ---- Drawing -----------------------------------------------------------------------------------

def is_inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points lie in a shape, diameter 1, centroid at 0: u (1, n), v (n, 1) -> (n, n)."""
    if shape == "circle":
        return u * u + v * v <= 0.25
    u, w = abs(u), abs(v)
    if shape == "square":
        return (u <= 0.5) & (w <= 0.5)
    if shape == "triangle":
        return (3 ** 0.5 * u - v <= 0.68) & (v <= 0.34)
    if shape == "cross":
        return (u <= 0.16) & (w <= 0.58) | (w <= 0.16) & (u <= 0.58)
    # A star: c is the projection on the nearest of the five axes from the center to a tip (three,
    # as u >= 0); the square root is the distance d from it; the tip's edges are c + 2.1 d = 0.6.
    c = np.maximum(np.maximum(-v, 0.9511 * u - 0.3090 * v), 0.5878 * u + 0.8090 * v)
    return c + 2.1 * np.sqrt(np.maximum(u * u + v * v - c * c, 0)) <= 0.6


def reach_of(unit: float) -> int:
    """Pixels to each side of its central pixel that an object may touch; unit in pixels."""
    return int(0.68 * SIZES["large"] * unit) + 1             # 0.68: the largest extent in SHAPES


def coverage(shape: str, size: str, fx: float, fy: float, unit: float) -> np.ndarray:
    """Fraction of each pixel (n, n) that a shape covers; (fx, fy): centroid in the middle pixel."""
    reach, points, diameter = reach_of(unit), 8, np.float32(SIZES[size] * unit)
    n = 2 * reach + 1
    grid = (np.arange(n * points, dtype=np.float32) + 0.5) / points - reach
    u, v = (grid[None] - np.float32(fx)) / diameter, (grid[:, None] - np.float32(fy)) / diameter
    inside = is_inside(shape, u, v).reshape(n, points, n * points).sum(1, dtype=np.uint8)
    return inside.reshape(n, n, points).sum(2, dtype=np.uint8) / np.float32(points * points)


def check_size(H: int, W: int) -> None:
    if min(H, W) < 24:                        # smaller shapes cannot be told apart
        raise ValueError(f"a scene needs at least 24 x 24 pixels, got {H} x {W}; enlarge the image")


def render(scene: Scene, hw: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Draw a scene with smooth edges -> uint8 (H, W, 3). ValueError below 24 x 24 pixels."""
    check_size(*hw)
    (H, W), unit = hw, min(hw) / 32
    reach = reach_of(unit)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    # With a frame of `reach` pixels, every patch is whole and begins at (row, column).
    image = np.tile(background, (H + 2 * reach, W + 2 * reach, 1))
    for o in scene.objects:
        (column, fx), (row, fy) = divmod(o.x * W, 1), divmod(o.y * H, 1)
        share = coverage(o.shape, o.size, fx, fy, unit)[..., None]                  # (n, n, 1)
        patch = image[int(row):, int(column):][:len(share), :len(share)]            # a view
        patch += share * (COLORS[o.color] - background)
    return (image[reach:reach + H, reach:reach + W] + 0.5).astype(np.uint8)

# ---- Reading -----------------------------------------------------------------------------------

# Tolerances (colors in 0..1). Rates are comparable only while they stay the same.
FOREGROUND = 0.27            # distance from the background color of a pixel of an object
SPECK = 6                    # square units; a smaller component is no object: STRAY_ERROR judges it
BACKGROUND_ERROR = 0.1       # of the background's mean color
COLOR_ERROR = 0.2            # of an object's mean color; two colors are at least 0.474 apart
OBJECT_ERROR = 0.17          # squared residual of an object, over its squared contrast
AMBIGUITY = 0.02             # least difference in error to the best other shape or size
LOCAL_ERROR = 0.1            # mean squared residual in a window, over the largest contrast^2
STRAY_ERROR = 0.03           # mean square of what lies outside all objects in a window: 3 x 3 units

RGB = {name: np.array(c, np.float32) / 255 for name, c in (COLORS | BACKGROUNDS).items()}


def read_image(image: np.ndarray) -> Scene | None:
    """uint8 (H, W, 3) -> its Scene, or None if it is not a picture of this world.

    Each connected component that differs from the background becomes the best-fitting object."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 image (H, W, 3), got {image.dtype} {image.shape}")
    H, W, unit = *image.shape[:2], min(image.shape[:2]) / 32
    pixels = image / np.float32(255)
    background = background_of(pixels)
    if background is None:
        return None
    frame = reach_of(unit) + 1                # pixels added around the picture
    signal = np.pad(pixels - RGB[background], ((frame, frame), (frame, frame), (0, 0)))
    foreground = (signal ** 2).sum(-1) >= FOREGROUND ** 2
    owner = label_components(foreground, SPECK * unit ** 2)            # 0: no object
    if not 1 <= owner.max() <= len(COUNTS):
        return None
    for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):      # adds the faint rim of each object
        owner = np.where(owner == 0, np.roll(owner, shift, axis), owner)
    palette = np.stack([RGB[color] - RGB[background] for color in COLORS])          # (8, 3)
    objects = [fit(signal, owner == i, palette, unit) for i in range(1, owner.max() + 1)]
    if None in objects:
        return None
    objects = [dataclasses.replace(o, x=(o.x - frame) / W, y=(o.y - frame) / H) for o in objects]
    scene = Scene(background, reading_order(objects))
    residual = pixels - soften(render(scene, (H, W)) / np.float32(255))             # (H, W, 3)
    contrast = max(((RGB[o.color] - RGB[background]) ** 2).sum() for o in objects)
    stray = signal * (owner == 0)[..., None]                           # outside all objects
    explained = (worst_window(residual, unit) <= LOCAL_ERROR * contrast
                 and worst_window(stray, unit) <= STRAY_ERROR)
    return scene if explained else None


def background_of(pixels: np.ndarray) -> str | None:
    """The background color near which most pixels are; None if their mean is too far from it."""
    signals = {name: pixels - RGB[name] for name in BACKGROUNDS}
    near = {name: s[(s ** 2).sum(-1) < FOREGROUND ** 2] for name, s in signals.items()}
    name = max(near, key=lambda name: len(near[name]))                 # near: (pixels, 3) each
    is_close = len(near[name]) and np.linalg.norm(near[name].mean(0)) <= BACKGROUND_ERROR
    return name if is_close else None


def label_components(foreground: np.ndarray, smallest: float) -> np.ndarray:
    """Number the 4-connected components of `smallest` or more pixels: bool (H, W) -> int (H, W)."""
    rest = set(map(tuple, np.argwhere(foreground).tolist()))
    labels = np.zeros(foreground.shape, int)                           # 0: no component
    while rest:
        component = [rest.pop()]
        for y, x in component:                # the list grows while the loop runs over it
            neighbors = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & rest
            component += neighbors
            rest -= neighbors
        if len(component) >= smallest:
            labels[tuple(np.array(component).T)] = labels.max() + 1
    return labels


@functools.lru_cache(maxsize=128)
def templates(fx: int, fy: int, unit: float) -> np.ndarray:
    """Every shape in every size, centroid (fx, fy) eighths into its pixel -> (10, patch pixels)."""
    drawings = [coverage(shape, size, fx / 8, fy / 8, unit)
                for shape, size in itertools.product(SHAPES, SIZES)]
    return soften(np.stack(drawings, -1)).reshape(-1, len(drawings)).T


def soften(image: np.ndarray) -> np.ndarray:
    """Blur by half a pixel: between a sharp picture and the softest one that should be read."""
    for axis in (0, 1):
        image = (4 * image + np.roll(image, 1, axis) + np.roll(image, -1, axis)) / 6
    return image


def fit(signal: np.ndarray, mask: np.ndarray, palette: np.ndarray, unit: float) -> Object | None:
    """The object whose drawing leaves the smallest residual in the mask, or None if none fits.

    signal (H, W, 3), palette (8, 3): minus the background color. x, y of the result: in pixels."""
    y, x = np.nonzero(mask)
    s = signal[y, x]                                                                # (n, 3)
    # (n,) projections on the object's energy-weighted mean color
    weight = np.maximum(s @ (s.T @ (s ** 2).sum(1)), 0)
    if not weight.any():
        return None
    cx, cy = weight @ (x + 0.5) / weight.sum(), weight @ (y + 0.5) / weight.sum()
    centers = [(round(8 * cx) + dx, round(8 * cy) + dy)                  # in eighths of a pixel
               for dx, dy in itertools.product((-2, 0, 2), repeat=2)]
    masked, energy = signal * mask[..., None], (s ** 2).sum()
    reach, errors = reach_of(unit), []
    for cx, cy in centers:
        t = templates(cx % 8, cy % 8, unit)                                         # (10, p)
        patch = masked[cy // 8 - reach:cy // 8 + reach + 1, cx // 8 - reach:cx // 8 + reach + 1]
        product = t @ patch.reshape(-1, 3) @ palette.T                 # <s, t c>, (10, 8)
        drawn = (t ** 2).sum(1, keepdims=True) * (palette ** 2).sum(1)             # |t c|^2
        errors.append((energy - 2 * product + drawn) / drawn)          # |s - t c|^2 / |t c|^2
    errors = np.stack(errors)                                                       # (9, 10, 8)
    k, i, j = np.unravel_index(errors.argmin(), errors.shape)
    error, (cx, cy) = errors[k, i, j], centers[k]
    margin = np.delete(errors[k], i, 0).min() - error
    color = s.sum(0) / templates(cx % 8, cy % 8, unit)[i].sum()     # its mean, sharp or soft alike
    is_wrong_color = np.linalg.norm(color - palette[j]) > COLOR_ERROR
    if error > OBJECT_ERROR or margin < AMBIGUITY or is_wrong_color:
        return None
    shape, size = list(itertools.product(SHAPES, SIZES))[i]
    return Object(shape, list(COLORS)[j], size, cx / 8, cy / 8)


def worst_window(difference: np.ndarray, unit: float) -> float:
    """Largest mean of a squared difference (H, W, 3), summed over channels, in 3 x 3 units."""
    n = max(3, round(3 * unit))
    squares = (difference ** 2).sum(-1, dtype=np.float64)                           # (H, W)
    return np.lib.stride_tricks.sliding_window_view(squares, (n, n)).mean((2, 3)).max()


if __name__ == "__main__":
    scene = Scene("gray", (Object("circle", "red", "large", 0.4, 0.3),
                           Object("square", "blue", "small", 0.6, 0.75)))
    for hw in ((32, 32), (48, 80)):
        read = read_image(render(scene, hw))
        found = [f"{o.color} {o.shape} {o.x:.2f} {o.y:.2f}" for o in read.objects]
        print(f"read at {hw}: {found} (expect red circle 0.40 0.30, blue square 0.60 0.75)")
    half = render(scene)
    half[:10] = BACKGROUNDS["gray"]
    print("a picture with half a circle is refused (expect None):", read_image(half))
