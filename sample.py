"""Sample: texts, images and answers from a checkpoint.

    z_1 ~ temperature * N(0, I)                        noise; behind an image, near it (flow.near)
    dz/dt = v(z, t | context),  t from 1 to 0          transport (paper, Sec. 3.2.3, Eq. 10.2)
    v = v_u + w (v_c - v_u)                            guidance: v_c with the context, v_u without
    v = v_u + w_I (v_I - v_u) + w (v_c - v_I)          v_I: with images, without text (2211.09800)
    x = argmax p(x | z_0)                              decode

Clean context (instruction, input image, caption, text so far) passes through the prior once; its
keys and values stay in a cache. An image is one block. Text is generated block by block, and each
finished block joins the context: with "snap" as the posterior mean of its decoded tokens, because
the prior was trained on encoded tokens only; in the paper, as generated.

Run: python sample.py t2i "a large red circle above a small blue square on a gray background"
Shapes: B samples, L positions, Dz and Cz text and image latent channels, bl latents in a block.
"""
import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import cola
import data
import flow
import masks
import release
from cola import Cola
from cuda_attention import Plan, make_plan
from masks import II, IT2T, T2I, T2T, VID, Layout, Sample, pack
from mmdit import Cache


@dataclass
class Settings:
    """How to integrate the flow."""
    steps: int = 16                        # solver steps for an image, or for each block of text
    guidance: float = 1.0                  # w; 1 needs no unconditional velocity
    image_guidance: float = 1.0            # w_I of the images before an image
    interval: tuple[float, float] = (0.0, 1.0)     # flow times at which guidance acts
    solver: str = "euler"                  # one of flow.SOLVERS; repainting always takes euler
    shift: float | None = None             # of the time grid; None: for images as in training
    temperature: float = 1.0               # scale of the initial noise
    repaint_share: float = 1.0             # share of the steps that reset the prefix (flow.repaint)
    repaint_cycles: int = 1                # how often each of these steps is taken
    snap: bool = True                      # condition on the encoding of the decoded tokens
    repetition_penalty: float = 1.0        # of tokens generated before (see likeliest)
    stop: str = ""                         # a special token that ends a text, too
    seed: int = 0


# Guiding an image below t = 0.6 makes colors bleed into each other (cf. 2404.07724). At temperature
# 1 the reader of scenes refuses more images. Text at temperature 1 has outliers, at 0 it repeats
# one story. An edit leaves little to chance: guidance and more steps make it worse.
IMAGE = Settings(steps=8, guidance=2.0, interval=(0.6, 1.0), temperature=0.7)
EDIT = replace(IMAGE, steps=4, guidance=1.0, temperature=0.3)      # an image behind others
TEXT = Settings(steps=4, shift=1.0, temperature=0.4)
RELEASED = Settings(guidance=7.0, shift=1.0, snap=False, repetition_penalty=1.1,
                    stop="<|im_end|>")                         # of the public release

# ---- Transport ---------------------------------------------------------------------------------

class Context:
    """Clean positions that queries attend to, kept as keys and values of every layer."""
    def __init__(self, model: Cola):
        config = model.mmdit.config
        self.model, self.cache = model, Cache()
        self.no_text = torch.zeros(0, config.text_channels, device=model.device)
        self.no_image = torch.zeros(0, config.image_channels, device=model.device)

    def plan(self, layout: Layout) -> Plan:
        """Attention plan of queries in this layout; the same for all their solver steps."""
        past = self.cache.layout
        if past is None:
            return make_plan(layout)
        layout = replace(layout, task=max(layout.task, past.task, key=len))    # of all copies
        return make_plan(layout, masks.concat(past, layout))

    def velocity(self, text: Tensor, image: Tensor, t: list[float], t_index: Tensor,
                 layout: Layout, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """Velocities of text (Lt, Dz) and image (Li, Cz) latents at the times t[t_index]."""
        times = torch.tensor(t, device=text.device, dtype=torch.float32)
        return self.model.mmdit(text, image, times, t_index, layout, plan, self.cache)[:2]

    def add(self, text: Tensor, image: Tensor, layout: Layout) -> None:
        """Appends clean latents to the context, at t = 0."""
        t, index = text.new_zeros(1), torch.zeros_like(layout.segment)
        self.model.mmdit(text, image, t, index, layout, self.plan(layout), self.cache, commit=True)


def transport(context: Context, layout: Layout, z: Tensor, s: Settings, known: Tensor | None = None,
              new_noise: Callable[[], Tensor] | None = None) -> Tensor:
    """Integrates noise z of one modality, (L, Dz) or (L, Cz), to clean latents of the same shape.
    known (L,) bool: positions of z that are clean already. They stay as they are or, if there is
    new_noise, which returns noise of z's shape, are repainted (flow.repaint)."""
    is_image = bool(masks.is_image(layout.segment).any())
    weights = guidances(s, int(layout.task[0])) if context.cache.layout is not None else []
    t_index = torch.ones_like(layout.segment)                                        # (L,)
    if known is not None and new_noise is None:
        t_index[known] = 0                 # the network gets t = 0 there
    single = t_index, layout, context.plan(layout)                   # arguments of prior
    if weights:
        task = masks.TASKS[layout.task[0]]
        if task not in context.model.unconditional:
            data.warn_once(f"guidance of {task}: this model was not trained without its condition, "
                           "which takes --cfg_drop for images, --cfg_drop_text for texts")
        # Copies of every sample, each with fewer conditions: one pass gives all velocities.
        n = len(weights) + 1
        copies = masks.repeat(layout, n)
        every = t_index.repeat(n), copies, context.plan(copies)

    def prior(z: Tensor, t: float, positions: tuple[Tensor, Layout, Plan]) -> Tensor:
        text, image = (context.no_text, z) if is_image else (z, context.no_image)
        v_text, v_image = context.velocity(text, image, [0.0, t], *positions)
        return v_image if is_image else v_text

    def velocity(z: Tensor, t: float) -> Tensor:
        if not weights or not s.interval[0] <= t <= s.interval[1]:
            return prior(z, t, single)                                               # (L, Dz)
        return flow.guide(prior(z.repeat(n, 1), t, every).chunk(n), weights)

    grid = flow.time_grid(s.steps, s.shift or 1.0)
    if new_noise is not None:
        return flow.repaint(velocity, z, grid, known, new_noise, s.repaint_share, s.repaint_cycles)
    return flow.solve(velocity, z, grid, s.solver, known)


def guidances(s: Settings, task: int) -> list[float]:
    """The weights of the conditions that are left out one after another, for guidance: the text
    and, of images in sequence, the images before. Last weights of 1 need no copy."""
    if task in (II, VID) and s.image_guidance != 1.0:
        return [s.guidance, s.image_guidance]
    return [s.guidance] if s.guidance != 1.0 else []


def make_rngs(seed: int, first: int, count: int) -> list[np.random.Generator]:
    """One generator per sample number: a sample is the same alone and in any batch."""
    return [data.rng(seed, first + k, data.Purpose.SAMPLE) for k in range(count)]


def draw_noise(rngs: list[np.random.Generator], length: int, channels: int) -> Tensor:
    """Standard normal noise, `length` positions from each generator. (B length, channels)"""
    return torch.from_numpy(np.concatenate(
        [rng.standard_normal((length, channels), np.float32) for rng in rngs]))

# ---- Images and text ---------------------------------------------------------------------------

@torch.inference_mode()
def generate_images(model: Cola, captions: list[str], settings: Settings = IMAGE,
                    hw: tuple[int, int] | None = None, first: int = 0) -> list[np.ndarray]:
    """Text to image, for B captions with the sample numbers first, first + 1, .. Returns B images,
    uint8 (H, W, 3), of the trained size or of hw. ValueError for a size the VAE cannot take."""
    vae, hw, context = model.image_vae, hw or model.image_hw, Context(model)
    vae.check_size(*hw)
    h, w = (side // vae.downsample for side in hw)
    z_text, lengths = model.encode_text([model.ids(caption, end=True) for caption in captions])
    context.add(z_text, context.no_image,
                pack([Sample(T2I, clean=n) for n in lengths], model.block_len, model.device))
    layout = pack([Sample(T2I, image=(h, w))] * len(captions), model.block_len, model.device)
    rngs = make_rngs(settings.seed, first, len(captions))
    noise = settings.temperature * draw_noise(rngs, h * w, vae.channels).to(model.device)
    settings = with_shift(model, settings, h * w)
    return model.decode_images(transport(context, layout, noise, settings), (h, w))


def with_shift(model: Cola, s: Settings, positions: int, rho: float = 0.0) -> Settings:
    """The settings for an image of so many latents, whose noise is near another one (flow.near):
    by default its time grid is shifted as times are in training, also by image_loc."""
    shift = flow.image_shift(positions * model.image_vae.channels) * flow.near_shift(rho)
    return replace(s, shift=math.exp(model.image_loc) * shift) if s.shift is None else s


@torch.inference_mode()
def generate_turns(model: Cola, given: list[list[np.ndarray]], texts: list[list[str]],
                   settings: Settings = EDIT, task: int = II, first: int = 0
                   ) -> list[list[np.ndarray]]:
    """Images in sequence, for B samples with the sample numbers first, first + 1, .. Each sample
    has a text for every image, "" for none, and the first of its images, uint8 (H, W, 3), are
    given, equally many in all samples. Returns the other images of each sample, drawn in turn; the
    settings are not those of a first image, which is drawn by IMAGE. The task VID takes the images
    as frames of the first text."""
    vae, context, count = model.image_vae, Context(model), len(texts)
    hw = given[0][0].shape[:2] if given[0] else model.image_hw
    h, w = (side // vae.downsample for side in hw)
    rngs, drawn = make_rngs(settings.seed, first, count), []
    copies = 1 + max(len(guidances(s, task)) for s in (settings, settings if given[0] else IMAGE))
    with_images = min(copies, 2)           # copies for guidance: all, without text, without both

    def lay(*samples: list[Sample]) -> masks.Layout:
        """The layout of each copy's samples; further copies have none of these positions."""
        rest = [Sample(task)] * (count * (copies - len(samples)))
        return pack([*sum(samples, []), *rest], model.block_len, model.device)

    for turn, words in enumerate(zip(*texts)):
        if any(words):
            z_text, lengths = model.encode_text([model.ids(text, end=False) for text in words])
            layout = lay([Sample(task, n, turn=turn) for n in lengths])
            context.add(z_text, context.no_image, layout)
        if turn < len(given[0]):
            z = model.encode_images([images[turn] for images in given])              # (B h w, Cz)
        else:
            drawing = [Sample(task, turn=turn, drawn=(h, w))] * count
            layout = pack(drawing, model.block_len, model.device)
            rho = model.image_rho if turn else 0.0
            own = with_shift(model, settings if turn else IMAGE, h * w, rho)
            noise = own.temperature * draw_noise(rngs, h * w, vae.channels).to(model.device)
            z = transport(context, layout, flow.near(z, noise, rho) if turn else noise, own)
            drawn.append(model.decode_images(z, (h, w)))
        if turn + 1 < len(texts[0]):
            image = [Sample(task, image=(h, w), turn=turn)] * count
            context.add(context.no_text, z.repeat(with_images, 1), lay(*[image] * with_images))
    return list(map(list, zip(*drawn)))


@torch.inference_mode()
def generate_text(model: Cola, prefixes: list[str], prompts: list[str] | None = None,
                  images: list[np.ndarray] | None = None, settings: Settings = TEXT,
                  max_tokens: int = 64, first: int = 0) -> list[str]:
    """Text to text; image and text to text where prompts and images, uint8 (H, W, 3) of one size,
    are given. Returns the continuation of each of B prefixes, with the sample numbers first, first
    + 1, .., up to an end token or max_tokens new tokens."""
    context, rngs = Context(model), make_rngs(settings.seed, first, len(prefixes))
    task, bl, patch = T2T, model.block_len, model.text_vae.config.patch_size
    tokenizer, starts = model.tokenizer, [0] * len(prefixes)
    if images is not None:
        task, starts = IT2T, add_instructions(context, prompts, images)
    repaints = task == T2T and model.first_block == "repaint"
    # Each list has one entry per text: tokens, latents (n, Dz), number of latents in the context.
    prefix_ids = [model.align(ids, len(ids))[0] for ids in map(model.tokenizer.encode, prefixes)]
    packed, lengths = model.encode_text(list(map(model.fill, prefix_ids)))           # (sum n, Dz)
    prefix_z = [x[:len(own) // patch] for own, x in zip(prefix_ids, packed.split(lengths))]
    ids, z, done = [*prefix_ids], [*prefix_z], [0] * len(prefixes)
    before = [len(x) // bl * bl * patch for x in z]        # tokens in whole blocks of the prefix
    stop, todo = tokenizer.special.get(settings.stop), range(len(prefixes))
    while todo:
        # Whole blocks join the context: first those of the prefixes, then one block at a time.
        whole = [len(x) // bl * bl if i in todo else done[i] for i, x in enumerate(z)]
        layout = pack([Sample(task, clean=end - begin, start=start, first=begin)
                       for start, begin, end in zip(starts, done, whole)], bl, model.device)
        if len(layout):
            finished = [x[begin:end] for x, begin, end in zip(z, done, whole)]
            context.add(torch.cat(finished), context.no_image, layout)
        done = whole

        layout = pack([Sample(task, noisy=bl * (i in todo), start=starts[i], first=done[i])
                       for i in range(len(prefixes))], bl, model.device)
        known = [z[i][done[i]:] for i in todo]             # a prefix may end inside this block
        blocks = generate_block(context, layout, known, [rngs[i] for i in todo], settings, repaints)
        repaints = False                   # only the first block contains a part of a prefix
        for i, block in zip(todo, blocks):
            z[i] = torch.cat([z[i][:done[i]], block])
        lengths = [len(z[i]) for i in todo]
        logits = model.text_vae.decode(torch.cat([z[i] for i in todo]), lengths)     # (T, V)
        for i, new in zip(todo, logits.split([n * patch for n in lengths])):
            # Decoded tokens never change: only those of the new block are appended.
            seen = ids[i][before[i]:] if len(ids[i]) > len(prefix_ids[i]) else []    # none at first
            ids[i] = ids[i] + likeliest(new[len(ids[i]):], seen, settings.repetition_penalty)
        texts = [own[len(prefix):] for own, prefix in zip(ids, prefix_ids)]
        todo = [i for i in todo
                if not {tokenizer.end, stop} & {*texts[i]} and len(texts[i]) < max_tokens]
        if settings.snap and todo:         # a prefix keeps the latents it has when encoded alone
            packed, lengths = model.encode_text([ids[i] for i in todo])
            for i, x in zip(todo, packed.split(lengths)):
                z[i] = torch.cat([prefix_z[i], x[len(prefix_z[i]):]])
    return [tokenizer.decode(x[:max_tokens], stop) for x in texts]


def add_instructions(context: Context, prompts: list[str], images: list[np.ndarray]) -> list[int]:
    """Adds [P][I] of IT2T to the context. Returns the coordinate of each answer's first latent: the
    number of latents of its instruction."""
    model = context.model
    z, lengths = model.encode_text([model.ids(prompt, end=False) for prompt in prompts])
    h, w = (side // model.image_vae.downsample for side in images[0].shape[:2])
    layout = pack([Sample(IT2T, prompt=n, image=(h, w)) for n in lengths], model.block_len,
                  model.device)
    context.add(z, model.encode_images(images), layout)
    return lengths


def likeliest(logits: Tensor, seen: list[int], penalty: float) -> list[int]:
    """The likeliest tokens by logits (T, V). A logit of a token seen before is divided by the
    penalty if it is positive, else multiplied by it (cf. Keskar et al. 1909.05858)."""
    if penalty != 1.0 and seen:
        index = torch.tensor(sorted({*seen}), device=logits.device)
        x = logits[:, index]
        logits = logits.index_copy(1, index, torch.where(x > 0, x / penalty, x * penalty))
    return logits.argmax(-1).tolist()


def generate_block(context: Context, layout: Layout, known: list[Tensor],
                   rngs: list[np.random.Generator], s: Settings, repaints: bool) -> Tensor:
    """The next block of every text, latents (B, bl, Dz). known: the (n, Dz) at its beginning that
    are clean already, n < bl; repaints: by flow.repaint instead of staying as they are."""
    model = context.model
    bl, dz = model.block_len, model.text_vae.config.latent_dim
    lengths = torch.tensor([len(x) for x in known])
    is_known = (torch.arange(bl) < lengths[:, None]).flatten().to(model.device)      # (B bl,)
    # Known latents get noise of scale 1, not of the temperature (only repainting noises them).
    scale = torch.where(is_known, 1.0, s.temperature)[:, None]                       # (B bl, 1)
    noise = lambda: scale * draw_noise(rngs, bl, dz).to(model.device)                # (B bl, Dz)
    z = noise()
    z[is_known] = torch.cat(known)
    return transport(context, layout, z, s, is_known, noise if repaints else None).view(-1, bl, dz)

# ---- Command line ------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse with exact flags, defaults in the help, and errors of one line."""
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"{self.prog.split()[0]}: {message}\n")


def within(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A `type` for argparse: a number from low to high."""
    def number(text: str) -> float:        # argparse says `invalid number value`
        if not low <= kind(text) <= high:  # also NaN
            raise argparse.ArgumentTypeError(f"{text}: expected {low:g} to {high:g}")
        return kind(text)
    return number


COUNT, REAL = within(1, 4096, int), within(-1e6, 1e6)


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """The flags of every command that takes a model; likelihood.py has them too."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    source = p.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", default="out/ckpt.pt", help="file that train.py wrote")
    source.add_argument("--official", metavar="DIR", help="a public Cola DLM release instead of a "
                   "checkpoint: text alone, with the settings of its own code")
    p.add_argument("--device", choices=devices, default=devices[-1], help="where to run")
    p.add_argument("--seed", type=within(0, data.SEEDS - 1, int), default=0, help="of the noise")


def add_sequence_commands(tasks) -> list[argparse.ArgumentParser]:
    """The commands for images in sequence: edit, story and video."""
    edit = tasks.add_parser("edit", help="change a picture, or combine several")
    edit.add_argument("images", nargs="+", help="pictures of any size: image 1, image 2, ..")
    edit.add_argument("prompt", help="an instruction")
    story = tasks.add_parser("story", help="draw a text as t2i does, then change the image text "
                             "by text; --steps, --guidance, --temperature are for the changes")
    story.add_argument("prompts", nargs="+", help="what to draw, then instructions")
    video = tasks.add_parser("video", help="text to video: a GIF, and .._frames.png in a row")
    video.add_argument("prompt", help="what to show")
    video.add_argument("--images", nargs="+", default=[], help="the first frames, to be continued")
    video.add_argument("--frames", type=COUNT, default=5, help="in all; the scenes have 5")
    for p in (edit, story, video):
        p.add_argument("--image_guidance", type=REAL, help="w_I of the images before, for models "
                       "trained with --image_rho 0")
    return [edit, story, video]


def parse(argv: list[str] | None, of_text: Settings = TEXT) -> argparse.Namespace:
    """The command line, with args.settings. ValueError, one line, if its flags do not fit."""
    parser = Parser(prog="sample.py", description=__doc__.partition("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    t2i = tasks.add_parser("t2i", help="text to image")
    t2i.add_argument("prompt", help="what to draw")
    t2i.add_argument("--size", type=COUNT, nargs="+", metavar="PIXELS",
                     help="height and width, or one number for both; None is the trained size")
    edit, story, video = add_sequence_commands(tasks)
    for p in (t2i, edit, story, video):
        name = "sample.gif" if p is video else "sample.png"
        p.add_argument("--out", type=Path, default=name, help="file to write; --n numbers it")
    it2t = tasks.add_parser("it2t", help="image and text to text")
    it2t.add_argument("image", help="a picture of any size")
    it2t.add_argument("prompt", nargs="?", default="describe the image.", help="or a question")
    t2t = tasks.add_parser("t2t", help="continue a text")
    t2t.add_argument("prompt", help="the text so far")
    for p in (it2t, t2t):
        p.add_argument("--max_tokens", type=COUNT, default=64, help="longest text")
        p.add_argument("--snap", action=argparse.BooleanOptionalAction, help="continue a text from "
                       "its decoded tokens; off, as in the paper, from its latents")
        p.add_argument("--repetition_penalty", type=within(0.01, 100), help="above 1: tokens "
                       "generated before become less likely; the public release has 1.1")
        p.add_argument("--stop", help="a special token of the tokenizer that ends a text, as "
                       "<|im_end|> does in the public release")
    for p in (t2i, edit, story, video, it2t, t2t):
        add_model_flags(p)
        p.add_argument("--n", type=COUNT, default=1, help="samples to draw")
        p.add_argument("--steps", type=COUNT, help="solver steps; fewer is faster and coarser")
        p.add_argument("--guidance", type=REAL, help="w; texts need --cfg_drop_text, and "
                       "edits are best at 1")
        p.add_argument("--solver", choices=flow.SOLVERS, help="heun, rk4: 2 and 4 calls a step")
        p.add_argument("--temperature", type=within(0, 1e6), help="scale of the initial noise")
        p.set_defaults(**asdict(of_text if p in (it2t, t2t) else IMAGE if p is t2i else EDIT))
    args = parser.parse_args(argv)
    if args.official and of_text == TEXT:  # other defaults
        return parse(argv, RELEASED)
    args.settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    if args.n > 1 and args.temperature == 0 and args.task not in ("story", "video"):
        raise ValueError(f"--n {args.n}: at temperature 0 all samples are equal; draw one")
    if args.task in ("it2t", "t2t"):
        return args
    args.prompts = getattr(args, "prompts", None) or [args.prompt]
    if not all(prompt.strip() for prompt in args.prompts):
        raise ValueError("the prompt is empty; say what to draw")
    if args.task == "t2i" and args.size and len(args.size) > 2:
        raise ValueError(f"--size {args.size}: expected one number, or height and width")
    if args.task == "video" and args.out.suffix != ".gif":
        raise ValueError(f"--out {args.out}: expected a .gif")
    if args.task == "video" and len(args.images) >= args.frames:
        raise ValueError(f"--frames {args.frames}: expected more than the pictures given")
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: expected a file in a folder that exists")
    return args


def open_model(args: argparse.Namespace, task: str) -> Cola:
    """The model of --checkpoint or --official. ValueError if it was not trained for the task."""
    model = release.load(args.official) if args.official else cola.load(args.checkpoint)
    if task not in model.tasks:
        raise ValueError(f"this model was trained for {', '.join(model.tasks)}, not for {task}")
    return model.to(args.device)


def read_picture(path: str | Path, model: Cola) -> np.ndarray:
    """A picture of any size, scaled and cropped to that of training, uint8 (H, W, 3)."""
    try:
        with open(path, "rb") as file:
            return data.decode_picture(file, [model.image_hw])
    except ValueError as error:            # an OSError already names the file
        raise ValueError(f"{path}: {error}") from None


def draw(args: argparse.Namespace, model: Cola) -> list[list[np.ndarray]]:
    """The images of each of args.n samples."""
    if args.task == "t2i":
        hw = (args.size[0], args.size[-1]) if args.size else None
        images = generate_images(model, args.prompts * args.n, args.settings, hw)
        return [[image] for image in images]
    given = [read_picture(path, model) for path in getattr(args, "images", [])]
    if args.task == "video":
        texts = args.prompts + [""] * (args.frames - 1)
        drawn = generate_turns(model, [given] * args.n, [texts] * args.n, args.settings, VID)
        return [given + images for images in drawn]
    texts = [""] * len(given) + args.prompts
    return generate_turns(model, [given] * args.n, [texts] * args.n, args.settings)


def write(path: Path, images: list[np.ndarray], caption: str, animated: bool) -> None:
    """Writes images side by side as a PNG file, which contains the caption as text; if they are
    animated, as a GIF, and the PNG as .._frames.png beside it."""
    if animated:
        frames = [Image.fromarray(image) for image in images]
        frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=400, loop=0)
        print(f"{path}  {len(frames)} frames  {caption}")
        path = path.with_name(f"{path.stem}_frames.png")
    strip, info = np.hstack(images), PngImagePlugin.PngInfo()
    info.add_text("caption", caption)
    Image.fromarray(strip).save(path, "PNG", pnginfo=info)
    print(f"{path}  {strip.shape[1]} x {strip.shape[0]}  {caption}")


def run(args: argparse.Namespace) -> None:
    """Prints texts, or writes image files."""
    task = {"edit": "ii", "story": "ii", "video": "vid"}.get(args.task, args.task)
    model = open_model(args, task)
    special, stop = model.tokenizer.special, args.settings.stop
    if stop not in ("", *special) and not (args.official and stop == RELEASED.stop):
        raise ValueError(f"--stop {stop}: expected one of {', '.join(special)}")
    if args.task not in ("it2t", "t2t"):
        for i, images in enumerate(draw(args, model)):
            path = args.out.with_stem(f"{args.out.stem}_{i}") if args.n > 1 else args.out
            write(path, images, " ".join(args.prompts), args.task == "video")
        return
    prompts = [args.prompt] * args.n
    prefixes, questions, images = prompts, None, None
    if args.task == "it2t":
        image = read_picture(args.image, model)
        prefixes, questions, images = [""] * args.n, prompts, [image] * args.n
    texts = generate_text(model, prefixes, questions, images, args.settings, args.max_tokens)
    print(*(prefix + text for prefix, text in zip(prefixes, texts)), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        run(parse(argv))
        return 0
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
