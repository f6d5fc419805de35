"""Sample: texts, images and answers from a checkpoint.

    z_1 ~ temperature * N(0, I)                        noise
    dz/dt = v(z, t | context),  t from 1 to 0          transport (paper, Sec. 3.2.3, Eq. 10.2)
    v = v_u + w (v_c - v_u)                            guidance: v_c with the context, v_u without
    x = argmax p(x | z_0)                              decode

Clean context (instruction, input image, caption, text so far) is encoded by its posterior mean. It
passes through the prior once, at t = 0; its keys and values stay in a cache. An image is one block.
Text is generated block by block, and each finished block joins the context. By default it joins as
the posterior mean of the tokens it decodes to ("snap", cf. the clamping of Diffusion-LM,
2205.14217), because the prior was trained on encoded tokens only; the paper goes on from the
generated latents. If a prefix ends inside a block, its last latents keep their value while the rest
of that block is generated (clean repaint, Sec. 5.2); Cola.align has the paper's other strategies.

Run:
    python sample.py t2i  "a large red circle above a small blue square on a gray background"
    python sample.py it2t sample.png "describe the image."
    python sample.py t2t  "there is a red circle."

Shapes: B samples, L positions, Dz and Cz text and image latent channels, bl latents in a block.
"""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
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
from masks import IT2T, T2I, T2T, Layout, Sample, pack
from mmdit import Cache


@dataclass
class Settings:
    """How to integrate the flow. The defaults of images and of text are below."""
    steps: int = 16                        # solver steps for an image, or for each block of text
    guidance: float = 1.0                  # w; 1 needs no unconditional velocity
    interval: tuple[float, float] = (0.0, 1.0)     # flow times at which guidance acts
    solver: str = "euler"                  # one of flow.SOLVERS; repainting always takes euler
    shift: float | None = None             # of the time grid; None: for images as in training
    temperature: float = 1.0               # scale of the initial noise; at 0 all samples are equal
    repaint_share: float = 1.0             # share of the steps that set the prefix (flow.repaint)
    repaint_cycles: int = 1                # how often each of these steps is taken
    snap: bool = True                      # finished text joins the context as encoded tokens
    seed: int = 0


# Guiding an image below t = 0.6 makes colours bleed into each other (cf. 2404.07724). Text at
# temperature 1 has outliers, at 0 it repeats one story, and guidance makes it too uniform.
IMAGE = Settings(guidance=2.0, interval=(0.6, 1.0))
TEXT = Settings(shift=3.0, temperature=0.3)
RELEASED = Settings(guidance=7.0, shift=1.0, snap=False)       # the paper's, for the public release


# ---- Transport ---------------------------------------------------------------------------------

class Context:
    """Clean positions that later queries attend to, kept as keys and values of every layer."""
    def __init__(self, model: Cola):
        config, device = model.mmdit.config, model.device
        self.model, self.cache = model, Cache()
        self.no_text = torch.zeros(0, config.text_channels, device=device)
        self.no_image = torch.zeros(0, config.image_channels, device=device)

    def plan(self, layout: Layout) -> Plan:
        """Attention plan of queries in this layout; the same for all their solver steps."""
        if self.cache.layout is None:
            return make_plan(layout)
        return make_plan(layout, masks.concat(self.cache.layout, layout))

    def velocity(self, text: Tensor, image: Tensor, t: list[float], t_index: Tensor,
                 layout: Layout, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """Velocities of text (Lt, Dz) and image (Li, Cz) latents at the times t[t_index]."""
        times = torch.tensor(t, device=text.device, dtype=torch.float32)
        v_text, v_image, _ = self.model.mmdit(text, image, times, t_index, layout, plan, self.cache)
        return v_text, v_image

    def add(self, text: Tensor, image: Tensor, layout: Layout) -> None:
        """Appends clean latents to the context, at t = 0."""
        t, t_index = text.new_zeros(1), torch.zeros_like(layout.segment)
        self.model.mmdit(text, image, t, t_index, layout, self.plan(layout), self.cache,
                         commit=True)


def transport(context: Context, layout: Layout, z: Tensor, s: Settings, known: Tensor | None = None,
              fresh_noise: Callable[[], Tensor] | None = None) -> Tensor:
    """Integrates noise z of one modality to clean latents. Both are (L, Dz), or (L, Cz) for images.

    known (L,) bool: positions of z that are clean already. They stay as they are. With fresh_noise,
    a function that returns new noise of z's shape, they are repainted instead (flow.repaint)."""
    is_image = bool((layout.segment == masks.I).any())
    is_guided = s.guidance != 1.0 and context.cache.layout is not None
    # t_index: 0 at known positions (t = 0), 1 where z moves. Repainting moves all of them.
    keeps = known is not None and fresh_noise is None
    t_index = (~known).long() if keeps else torch.ones_like(layout.segment)          # (L,)
    single = t_index, layout, context.plan(layout)
    if is_guided:
        # Every sample twice, the second time without context: one pass gives v_c and v_u.
        both = masks.duplicate(layout)
        double = torch.cat([t_index, t_index]), both, context.plan(both)

    def prior(z: Tensor, t: float, positions: tuple[Tensor, Layout, Plan]) -> Tensor:
        if is_image:
            return context.velocity(context.no_text, z, [0.0, t], *positions)[1]
        return context.velocity(z, context.no_image, [0.0, t], *positions)[0]

    def velocity(z: Tensor, t: float) -> Tensor:
        if not is_guided or not s.interval[0] <= t <= s.interval[1]:
            return prior(z, t, single)                                               # (L, Dz)
        v_c, v_u = prior(torch.cat([z, z]), t, double).chunk(2)                      # (L, Dz) each
        return flow.guide(v_c, v_u, s.guidance)

    grid = flow.time_grid(s.steps, s.shift or 1.0)
    if fresh_noise is not None:
        return flow.repaint(velocity, z, grid, known, fresh_noise, s.repaint_share,
                            s.repaint_cycles)
    return flow.solve(velocity, z, grid, s.solver, known)


def generators(seed: int, first: int, count: int) -> list[np.random.Generator]:
    """One generator per sample number: a sample is the same alone and in any batch."""
    return [data.rng(seed, first + k, data.Purpose.SAMPLE) for k in range(count)]


def draw_noise(sources: list[np.random.Generator], length: int, channels: int) -> Tensor:
    """Standard normal noise, `length` positions from each generator. (B length, channels)"""
    return torch.from_numpy(np.concatenate(
        [g.standard_normal((length, channels), np.float32) for g in sources]))


# ---- Images ------------------------------------------------------------------------------------

@torch.inference_mode()
def generate_images(model: Cola, captions: list[str], settings: Settings = IMAGE,
                    hw: tuple[int, int] | None = None, first: int = 0) -> list[np.ndarray]:
    """Text to image. Returns B images, uint8 (H, W, 3).

    captions: of B samples, whose numbers are first, first + 1, ..; hw: height and width in pixels,
    by default the trained size. ValueError for a size the image VAE cannot take."""
    height, width = hw or model.image_hw
    model.image_vae.check_size(height, width)
    h, w = height // model.image_vae.downsample, width // model.image_vae.downsample
    channels = model.image_vae.channels
    context = Context(model)
    z_text, lengths = model.encode_text([model.ids(caption, end=True) for caption in captions])
    context.add(z_text, context.no_image,
                pack([Sample(T2I, clean=n) for n in lengths], model.block_len, model.device))
    layout = pack([Sample(T2I, image=(h, w))] * len(captions), model.block_len, model.device)
    sources = generators(settings.seed, first, len(captions))
    noise = settings.temperature * draw_noise(sources, h * w, channels).to(model.device)
    if settings.shift is None:             # as in training, where image_loc shifts times as well
        shift = math.exp(model.image_loc) * flow.image_shift(h * w * channels)
        settings = replace(settings, shift=shift)
    z = transport(context, layout, noise, settings)                                  # (B h w, Cz)
    return model.decode_images(z, (h, w))


# ---- Text --------------------------------------------------------------------------------------

@dataclass
class State:
    """B texts in the making. Every list has one entry per text."""
    context: Context
    task: int                              # T2T or IT2T
    starts: list[int]                      # coordinate of the first latent, after the instruction
    given: list[list[int]]                 # tokens of the prefixes, in whole latents
    z_given: list[Tensor]                  # (n, Dz) their latents
    ids: list[list[int]]                   # tokens so far, prefixes included
    z: list[Tensor]                        # (n, Dz) latents so far, prefixes included
    block: list[int]                       # index of the block that is generated next
    sources: list[np.random.Generator]     # of the noise
    repaint: bool                          # whether the next block repaints its known latents

    def pack_block(self, **segment: int) -> Layout:
        """The layout of the current block of every text; segment: clean=bl or noisy=bl."""
        model = self.context.model
        return pack([Sample(self.task, start=start, first=block * model.block_len, **segment)
                     for start, block in zip(self.starts, self.block)],
                    model.block_len, model.device)


@torch.inference_mode()
def generate_text(model: Cola, prefixes: list[str], prompts: list[str] | None = None,
                  images: list[np.ndarray] | None = None, settings: Settings = TEXT,
                  max_tokens: int = 64, first: int = 0) -> list[str]:
    """Text to text; image and text to text where prompts and images are given.

    Continues each of B prefixes, whose numbers are first, first + 1, .., until an end token or
    max_tokens new tokens. images: uint8 (H, W, 3) of one size. Returns the continuations alone."""
    sources = generators(settings.seed, first, len(prefixes))
    state = prefill(model, prefixes, prompts, images, sources)
    while True:
        generate_block(state, settings)
        new = [ids[len(given):] for ids, given in zip(state.ids, state.given)]
        if all(model.tokenizer.end in ids or len(ids) >= max_tokens for ids in new):
            return [model.tokenizer.decode(ids[:max_tokens]) for ids in new]
        add_block(state, settings.snap)


def prefill(model: Cola, prefixes: list[str], prompts: list[str] | None,
            images: list[np.ndarray] | None, sources: list[np.random.Generator]) -> State:
    """A new context with instruction, image and the whole blocks of every prefix."""
    context, task, bl = Context(model), T2T if images is None else IT2T, model.block_len
    starts = [0] * len(prefixes)
    if task == IT2T:
        z_prompt, starts = model.encode_text([model.ids(prompt, end=False) for prompt in prompts])
        h, w = (side // model.image_vae.downsample for side in images[0].shape[:2])
        layout = pack([Sample(IT2T, prompt=n, image=(h, w)) for n in starts], bl, model.device)
        context.add(z_prompt, model.encode_images(images), layout)

    tokens = [model.tokenizer.encode(prefix) for prefix in prefixes]
    given = [model.align(ids, len(ids))[0] for ids in tokens]
    z_given, lengths = model.encode_text(given)                                      # (sum n, Dz)
    z = list(z_given.split(lengths))
    block = [n // bl for n in lengths]
    if any(block):
        layout = pack([Sample(task, clean=b * bl, start=start) for b, start in zip(block, starts)],
                      bl, model.device)
        whole = torch.cat([x[:b * bl] for x, b in zip(z, block)])
        context.add(whole, context.no_image, layout)
    repaint = model.first_block == "repaint" and task == T2T
    return State(context, task, starts, given, z, given, z, block, sources, repaint)


def generate_block(state: State, s: Settings) -> None:
    """Generates the next block of every text: its latents, and from them its tokens."""
    model = state.context.model
    B, bl, dz = len(state.z), model.block_len, model.text_vae.config.latent_dim
    z = s.temperature * draw_noise(state.sources, bl, dz).to(model.device).view(B, bl, dz)
    known = torch.zeros(B, bl, dtype=torch.bool, device=model.device)
    for i in range(B):                     # a prefix may end inside this block
        rest = state.z[i][state.block[i] * bl:]
        z[i, :len(rest)] = rest
        known[i, :len(rest)] = True
    z, known = z.flatten(0, 1), known.flatten()                          # (B bl, Dz), (B bl,)

    # Known latents get the full noise of their time, whatever the temperature of the others.
    scale = torch.where(known, 1.0, s.temperature)[:, None]                          # (B bl, 1)
    fresh_noise = lambda: scale * draw_noise(state.sources, bl, dz).to(model.device)
    z = transport(state.context, state.pack_block(noisy=bl), z, s, known,
                  fresh_noise if state.repaint else None)
    state.repaint = False                  # only the first block contains a part of a prefix

    state.z = [torch.cat([past[:b * bl], new])
               for past, b, new in zip(state.z, state.block, z.view(B, bl, dz))]
    lengths = [len(x) for x in state.z]
    tokens = model.text_vae.decode(torch.cat(state.z), lengths).argmax(-1)
    tokens = tokens.split([n * model.text_vae.config.patch_size for n in lengths])
    # Decoded tokens never change: only those of the new block are appended.
    state.ids = [old + all_[len(old):].tolist() for old, all_ in zip(state.ids, tokens)]


def add_block(state: State, snap: bool) -> None:
    """Adds the block that was just generated to the context, and moves on to the next."""
    model, bl = state.context.model, state.context.model.block_len
    if snap:                               # a prefix keeps the latents it has when encoded alone
        z, lengths = model.encode_text(state.ids)
        state.z = [torch.cat([given, x[len(given):]])
                   for given, x in zip(state.z_given, z.split(lengths))]
    finished = torch.cat([x[b * bl:] for x, b in zip(state.z, state.block)])         # (B bl, Dz)
    state.context.add(finished, state.context.no_image, state.pack_block(clean=bl))
    state.block = [b + 1 for b in state.block]


# ---- Command line ------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse without abbreviations of flags, and with errors of one line."""
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog.split()[0]}: {message}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A `type` for argparse: an int or a float from low to high."""
    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:       # also NaN
            raise argparse.ArgumentTypeError(f"{text}: expected {low:g} to {high:g}")
        return value
    convert.__name__ = kind.__name__       # argparse calls the type by its name in errors
    return convert


COUNT, SHARE, POSITIVE = number(int, 1, 1e9), number(float, 0, 1), number(float, 1e-6, 1e6)


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """The flags of every command that takes a model; likelihood.py has them too."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    p.add_argument("--checkpoint", default="out/ckpt.pt", help="file that train.py wrote")
    p.add_argument("--official", default="", help="folder of a public Cola DLM release instead of "
                   "a checkpoint: text alone, sampled with the paper's settings")
    p.add_argument("--device", choices=devices, default=devices[-1], help="where to run")
    p.add_argument("--seed", type=number(int, 0, data.SEEDS - 1), default=0,
                   help="same seed, same samples")


def add_settings(p: argparse.ArgumentParser, default: Settings) -> None:
    """One flag for each field of Settings. Flags that are not given do not appear in the result."""
    def flag(name: str, why: str, **options) -> None:
        p.add_argument(f"--{name}", default=argparse.SUPPRESS, **options,
                       help=f"{why} (default: {getattr(default, name)})")
    flag("steps", "solver steps; fewer is faster and coarser", type=COUNT)
    flag("guidance", "w; 1 is conditional, more follows the prompt more",
         type=number(float, -1e6, 1e6))
    flag("interval", "flow times between which guidance acts; narrower is faster", type=SHARE,
         nargs=2, metavar=("LOW", "HIGH"))
    flag("solver", "heun and rk4 call the model 2 and 4 times a step", choices=flow.SOLVERS)
    flag("shift", "shift of the time grid; more takes more steps near noise; None shifts by the "
         "size of the image", type=POSITIVE)
    flag("temperature", "scale of the initial noise", type=number(float, 0, 1e6))
    flag("snap", "continue a text from its decoded tokens; off, as in the paper, from its latents",
         action=argparse.BooleanOptionalAction)
    flag("repaint_share", "for models trained with --first_block repaint: share of the steps that "
         "set the prefix", type=SHARE)
    flag("repaint_cycles", "and how often each of these steps is taken", type=COUNT)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. args.settings: the Settings of the task, with the flags that are given."""
    parser = Parser(prog="sample.py", description=__doc__.partition("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, default, what in (("t2i", IMAGE, "text to image"), ("t2t", TEXT, "continue a text"),
                                ("it2t", TEXT, "image and text to text")):
        p = tasks.add_parser(task, help=what)
        if task == "it2t":
            p.add_argument("image", help="a picture of any size")
            p.add_argument("prompt", nargs="?", default="describe the image.", help="or a question")
        else:
            p.add_argument("prompt", help="what to draw" if task == "t2i" else "the text so far")
        if task == "t2i":
            p.add_argument("--out", type=Path, default="sample.png", help="PNG file to write; "
                           "with --n, a number is added to its name")
            p.add_argument("--size", type=COUNT, nargs=2, metavar=("HEIGHT", "WIDTH"),
                           help="in pixels (default: the trained size)")
        else:
            p.add_argument("--max_tokens", type=COUNT, default=64, help="longest text (default 64)")
        p.add_argument("--n", type=COUNT, default=1, help="samples to draw (default 1)")
        add_model_flags(p)
        add_settings(p, default)
    args = parser.parse_args(argv)
    default = IMAGE if args.task == "t2i" else RELEASED if args.official else TEXT
    args.settings = replace(default, **{f.name: getattr(args, f.name) for f in fields(Settings)
                                        if hasattr(args, f.name)})
    if args.settings.interval[0] > args.settings.interval[1]:
        parser.error(f"--interval: {args.settings.interval} does not rise")
    return args


def open_model(args: argparse.Namespace, task: str) -> Cola:
    """The model of --checkpoint or --official. ValueError if it was not trained for the task."""
    model = release.load(args.official) if args.official else cola.load(args.checkpoint)
    if task not in model.tasks:
        raise ValueError(f"{args.official or args.checkpoint} was trained for "
                         f"{', '.join(model.tasks)}, not for {task}")
    return model.to(args.device)


def draw(model: Cola, args: argparse.Namespace) -> None:
    """Command t2i: writes PNG files, with the caption in their text chunk."""
    images = generate_images(model, [args.prompt] * args.n, args.settings, args.size)
    for i, image in enumerate(images):
        path = args.out.with_stem(f"{args.out.stem}_{i}") if args.n > 1 else args.out
        info = PngImagePlugin.PngInfo()
        info.add_text("caption", args.prompt)
        Image.fromarray(image).save(path, "PNG", pnginfo=info)
        print(f"{path}  {image.shape[1]} x {image.shape[0]}  {args.prompt}")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        args = parse(argv)
        model = open_model(args, args.task)
        if args.task == "t2i":
            draw(model, args)
        elif args.task == "it2t":
            images = [data.load_image(args.image, model.image_hw)] * args.n
            print(*generate_text(model, [""] * args.n, [args.prompt] * args.n, images,
                                 args.settings, args.max_tokens), sep="\n")
        else:
            texts = generate_text(model, [args.prompt] * args.n, settings=args.settings,
                                  max_tokens=args.max_tokens)
            print(*(args.prompt + text for text in texts), sep="\n")
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
