"""Batches: sample number k becomes an example, and examples become a packed batch.

    task   given (clean)                       predicted (noisy)               unconditional
    t2t    [C] the text before each block      [N] each block                  [N]
    t2i    [C] the caption                     [I] the image, sometimes [N]    [I]
    it2t   [P][I] instruction and image,       [N] each block of the answer    [N]
           [C] the answer before each block
    ii,    [P] its text, [I] the images        [J] each image                  [I][J] without text,
    vid    before it                                                           [J] without both

Everything random about sample k, but for the offset of its times, which belongs to the step, is
drawn from (seed, k, purpose): it depends neither on its batch nor on the number of workers, and a
resumed run draws the same. DROP: the dropped condition, the cut of a text, the predicted caption.
TIME: the cells of its times (TIMES). NOISE: eps of the image, then of the text, then the image's
posterior sample. POSTERIOR: that of the text. MASK: tokens that the masking loss hides. In stages 1
and 1b: TASK, the task of text k; PICK, image k. For step k of stage 2: TASK, its tasks; GRID, the
offset of its times in their cells.

Shapes: T tokens, Lv latents of all texts; L positions of the prior, Lt text, Li image; U times; Dz,
Cz text and image channels; B images, H x W pixels, h x w latents.    Run: python batches.py
"""
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import config
import data
import flow
import masks
from cola import Cola, Tokenizer, pad_to_multiple, to_float
from cuda_attention import make_plan
from data import Purpose
from image_vae import ImageVAE, ImageVAEConfig
from masks import II, IT2T, T2I, T2T, TASKS, VID, C, I, J, Layout, N
from mmdit import MMDiT, MMDiTConfig
from text_vae import TextVAE, TextVAEConfig

# [0, 1] has this many cells. The uniform numbers behind the times of a step have one value in each
# cell, all at the same offset. So texts have few different times, and images of one size and kind
# of noise, too: the adaLN maps are computed once for each time.
TIMES = 64

# ---- What the three stages train on ------------------------------------------------------------

@dataclass
class TextBatch:
    """Texts for stage 1, one after another."""
    ids: Tensor                        # (T,)
    lengths: list[int]                 # latents of each text
    posterior_noise: Tensor            # (Lv, Dz) of the posterior sample
    masked: Tensor                     # (T,) bool, tokens that the masking loss hides

    def counts(self) -> dict[str, float]:
        """What a step sums over its batches: positions, and the numbers that divide its losses."""
        return {"positions": sum(self.lengths), "tokens": self.ids.numel(),
                "masked": int(self.masked.sum())}


@dataclass
class ImageBatch:
    """Images of one size for stage 1b."""
    x: Tensor                          # (B, 3, H, W) in [-1, 1]
    noise: Tensor                      # (B, Cz, h, w) of the posterior sample

    def counts(self) -> dict[str, float]:
        return {"positions": self.noise[:, 0].numel(), "images": len(self.x)}


@dataclass
class Batch(TextBatch):
    """Samples of stage 2, of any tasks, packed. The text VAE may be training, so the batch holds
    its texts; the image VAE is frozen, so it holds image latents. A position moves if its t > 0;
    only these bear loss."""
    layout: Layout                     # of the L positions
    targets: Tensor                    # (n,) positions that move: others need no velocity
    source: Tensor                     # (Lt,) which of the Lv latents stands at a text position
    text_task: Tensor                  # (Lt,) task of its sample
    text_moves: Tensor                 # (Lt,) bool: it moves
    text_weight: Tensor                # (Lt,) its weight in L_text, 0 if it does not move
    eps_text: Tensor                   # (Lt, Dz) noise, 0 in P and C
    z_image: Tensor                    # (Li, Cz) clean latents
    image_moves: Tensor                # (Li,) bool: it moves, bears L_image
    eps_image: Tensor                  # (Li, Cz) noise
    features: Tensor | None            # (Li, F) of --repa_features
    t: Tensor                          # (U,) distinct times; t[0] = 0 is clean
    t_index: Tensor                    # (L,) which of them a position has

    def __post_init__(self):
        self.plan = make_plan(self.layout)     # attention of all positions, and of the targets
        self.target_plan = make_plan(self.layout.select(self.targets), self.layout)

    def counts(self) -> dict[str, float]:
        """image: positions with L_image, times channels; by task: the weights of L_text, too."""
        text = torch.bincount(self.text_task, self.text_weight, minlength=len(TASKS))
        text = dict(zip(TASKS, (text * self.eps_text.shape[1]).tolist()))
        image = int(self.image_moves.sum()) * self.eps_image.shape[1]
        return super().counts() | text | {"image": image, "positions": len(self.layout)}

# ---- One sample of stage 2 ---------------------------------------------------------------------

@dataclass
class Example:
    """One sample, before it is packed."""
    turns: list[masks.Sample]          # its task, and the number of positions in each segment
    texts: list[list[int]]             # tokens of the texts that the text VAE encodes for it
    images: list[int]                  # numbers in the dataset of its images, one for each J and I
    source: np.ndarray                 # (text positions,) which latent of these texts stands there
    clean: np.ndarray                  # (positions of N,) bool, t = 0: a given part of the text
    weight: np.ndarray                 # (positions of N,) in L_text
    u: np.ndarray                      # (turns + blocks,) uniform, for times of images and blocks
    eps_text: np.ndarray               # (positions of N, Dz) noise
    eps_image: np.ndarray              # (positions of J and I, Cz) noise
    image_noise: np.ndarray            # (positions of J and I, Cz) of the posterior samples
    posterior_noise: np.ndarray        # (latents of its texts, Dz)
    masked: np.ndarray                 # (tokens of its texts,) bool


def pick_task(shares: dict[str, float], u: float) -> int:
    """The task at u in [0, 1), if the tasks divide this interval by their shares."""
    ends = np.cumsum([shares.get(name, 0.0) for name in TASKS])
    return int(np.searchsorted(ends / ends[-1], u, side="right"))     # ends[-1] may round below 1


def step_tasks(args: Namespace, step: int) -> list[int]:
    """The task of each micro-step of a step of stage 2, by systematic sampling of the shares."""
    shares = config.task_shares(args.tasks)
    offset = data.rng(args.seed, step, Purpose.TASK).random()
    return [pick_task(shares, (m + offset) / args.micro_steps) for m in range(args.micro_steps)]


def step_samples(args: Namespace, step: int) -> list[tuple[int, int]]:
    """Task and number of every sample of a step of stage 2."""
    tasks = np.repeat(step_tasks(args, step), args.batch_size).tolist()
    return list(zip(tasks, range(step * len(tasks), (step + 1) * len(tasks))))


class Batches:
    """Sample numbers -> batches, from a dataset of data.open_data, for one system."""
    def __init__(self, args: Namespace, dataset, model: Cola):
        self.args, self.dataset, self.model = args, dataset, model
        self.rng = lambda k, purpose: data.rng(args.seed, k, purpose)
        self.shares = config.task_shares(args.tasks)
        self.block_len, self.patch_size = model.block_len, model.text_vae.config.patch_size
        self.dz, self.cz = model.text_vae.config.latent_dim, model.mmdit.config.image_channels
        loc = args.text_loc
        self.text_loc = flow.text_loc(self.dz, self.block_len) if loc is None else loc
        self.features = self.open_features() if args.w_repa and args.repa_features else None
        self.feature_channels = self.cz if self.features is None else self.features.shape[-1]

    def t2t(self, k: int) -> Example:
        """The text is cut at random. What is before the cut is given, as a prefix in sampling."""
        rng = self.rng(k, Purpose.DROP)
        dropped = rng.random() < self.args.cfg_drop_text
        ids, cut, padded = self.cut_text(self.dataset.t2t(k), rng)
        n = len(ids) // self.patch_size
        index = np.arange(n)
        # In half of the samples N begins at the block of the cut, as in sampling after a prefix.
        skip = cut // self.block_len * self.block_len if rng.random() < 0.5 else 0
        texts, source = [ids], index
        if cut and self.model.text_vae.config.block_len > 1:
            # In sampling, the prefix is encoded before the rest of its VAE block is known.
            texts = [ids, self.model.fill(ids[:cut * self.patch_size])]
            source = np.where(index < cut, n + index, index)
        # No position sees the last block of C.
        sample = masks.Sample(T2T, clean=0 if dropped else n - self.block_len, noisy=n, skip=skip)
        clean = self.model.stays_clean(index, cut, padded)
        return self.complete(k, [sample], max(cut, self.end_of(ids)), texts, source, clean)

    def t2i(self, k: int) -> Example:
        """A share aux_caption of the samples also predicts the caption, block by block."""
        caption, image = self.dataset.t2i(k)
        chances = self.args.cfg_drop, self.args.aux_caption
        dropped, auxiliary = self.rng(k, Purpose.DROP).random(2) < chances
        ids = [] if dropped else self.text_ids(caption)
        n = len(ids) // self.patch_size
        sample = masks.Sample(T2I, image=self.grid(image), clean=n, noisy=n if auxiliary else 0)
        return self.complete(k, [sample], self.end_of(ids), [ids], np.arange(n), np.zeros(n, bool),
                             [image])

    def it2t(self, k: int) -> Example:
        """Without its condition, an answer keeps the coordinates it has behind the instruction."""
        prompt, image, answer = self.dataset.it2t(k)
        prompt_ids, ids = self.model.ids(prompt, end=False), self.text_ids(answer)
        p, n = len(prompt_ids) // self.patch_size, len(ids) // self.patch_size
        sample = masks.Sample(IT2T, p, self.grid(image), clean=n - self.block_len, noisy=n, start=p)
        images = [image]
        if self.rng(k, Purpose.DROP).random() < self.args.cfg_drop_text:
            sample, prompt_ids, images = masks.Sample(IT2T, noisy=n, start=p), [], []
        return self.complete(k, [sample], self.end_of(ids), [prompt_ids, ids],
                             sample.prompt + np.arange(n), np.zeros(n, bool), images)

    def ii(self, k: int, task: int = II) -> Example:
        """Each image that is drawn is predicted from its text and the images before it. A share
        cfg_drop of the samples has no text, for guidance; half of these have no images before."""
        found = getattr(self.dataset, TASKS[task])(k)
        drop = self.rng(k, Purpose.DROP).random()
        no_text, no_images = drop < self.args.cfg_drop, drop < self.args.cfg_drop / 2
        turns, texts, images = [], [], []
        for turn, (text, image, drawn) in enumerate(found):
            grid, ids = self.grid(image), [] if no_text else self.model.ids(text, end=False)
            given = not no_images and turn < len(found) - 1        # the last one is drawn
            turns.append(masks.Sample(task, len(ids) // self.patch_size, grid if given else (0, 0),
                                      turn=turn, drawn=grid if drawn else (0, 0)))
            texts.append(ids)
            images += [image] * (drawn + given)
        no_noisy_text = np.arange(0), np.zeros(0, bool)
        return self.complete(k, turns, 0, texts, *no_noisy_text, images)

    def vid(self, k: int) -> Example:
        return self.ii(k, VID)

    def complete(self, k: int, turns: list[masks.Sample], end: int, texts: list[list[int]],
                 source: np.ndarray, clean: np.ndarray, images: Sequence[int] = ()) -> Example:
        """Adds the weights, the noise and the draws for the times. end: the latent with the first
        end token of the predicted text; source (n,): the number of each of its latents among those
        of `texts`; clean (n,) bool: whether it is clean in N."""
        sample, count = turns[-1], len(turns)
        prompts, kept = sum(s.prompt for s in turns), slice(sample.skip, sample.noisy)
        in_images = sum(math.prod(s.drawn) + math.prod(s.image) for s in turns)    # positions
        cell = self.rng(k, Purpose.TIME).integers(TIMES, size=count + len(source) // self.block_len)
        if self.args.time_per == "sample":
            cell[count:] = cell[-1]
        step = k // (self.args.batch_size * self.args.micro_steps)
        u = (cell + self.rng(step, Purpose.GRID).random()) / TIMES
        noise = self.rng(k, Purpose.NOISE)
        eps_image = noise.standard_normal((in_images, self.cz), np.float32)
        eps_text = noise.standard_normal((sample.noisy, self.dz), np.float32)[kept]
        image_noise = noise.standard_normal((in_images, self.cz), np.float32)
        source = np.concatenate([np.arange(prompts), source[:sample.clean], source[kept]])
        weight = np.where(np.arange(len(clean)) > end, self.args.w_filler, 1.0)
        return Example(turns, texts, [*images], source, clean[kept], (weight * ~clean)[kept], u,
                       eps_text, eps_image, image_noise, *self.vae_noise(k, texts))

    def end_of(self, ids: list[int]) -> int:
        """The latent with the first end token behind a text; filler follows it."""
        text = np.flatnonzero(np.array(ids) != self.model.tokenizer.end)
        return (text.max(initial=-1) + 1) // self.patch_size

    def whole_blocks(self, ids: list[int]) -> list[int]:
        """Adds at least one end token, up to whole blocks, and keeps those within seq_len."""
        block = self.block_len * self.patch_size
        longest = self.args.seq_len // block * block
        return pad_to_multiple(ids, block, self.model.tokenizer.end)[:longest]

    def text_ids(self, text: str) -> list[int]:
        return self.whole_blocks(self.model.tokenizer.encode(text))

    def cut_text(self, text: str, rng: np.random.Generator) -> tuple[list[int], int, range]:
        """A text cut at random: its ids, latents before the cut, padded latents (Cola.align)."""
        ids = self.model.tokenizer.encode(text)
        cut = int(rng.integers(min(len(ids) + 1, len(self.whole_blocks(ids)))))
        ids, cut, padded = self.model.align(ids, cut)
        ids = self.whole_blocks(ids)
        return ids, min(cut, len(ids)) // self.patch_size, padded

    def vae_noise(self, k: int, texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Posterior noise (latents, Dz) of texts, and bool (tokens,): which of them to hide."""
        tokens = sum(map(len, texts))
        shape = tokens // self.patch_size, self.dz
        noise = self.rng(k, Purpose.POSTERIOR).standard_normal(shape, np.float32)
        return noise, self.rng(k, Purpose.MASK).random(tokens) < 0.15        # as in BERT

    def grid(self, image: int) -> tuple[int, int]:
        """Rows and columns of the latents of an image."""
        (h, w), side = self.dataset.image_hw(image), self.model.image_vae.downsample
        return h // side, w // side

    def open_features(self) -> np.ndarray:
        """The array of --repa_features, (images, h w, F), which stays on the disk."""
        path, images = self.args.repa_features, self.dataset.num_images
        if not images:
            raise ValueError("--repa_features: these data have no images")
        shape = images, math.prod(self.grid(0))
        try:
            features = np.lib.format.open_memmap(path, "r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: not a whole .npy file of numbers ({error})") from None
        if features.dtype.kind != "f" or features.shape[:2] != shape or features.ndim != 3:
            raise ValueError(f"{path}: {features.dtype} {features.shape}; expected floats of shape "
                             f"({shape[0]} images, {shape[1]} latents of an image, channels)")
        return features

    @torch.no_grad()
    def image_latents(self, images: list[int]) -> Tensor:
        """Clean latents of these images, packed (Li, Cz), on the CPU; one pass per size."""
        different, latents = sorted({*images}), {}
        pixels = dict(zip(different, self.dataset.images(different) if images else []))
        for hw in {x.shape[:2] for x in pixels.values()}:
            group = [i for i, x in pixels.items() if x.shape[:2] == hw]
            z = self.model.encode_images([pixels[i] for i in group])              # (B h w, Cz)
            latents |= zip(group, z.cpu().chunk(len(group)))
        return torch.cat([torch.zeros(0, self.cz), *(latents[i] for i in images)])

    def text(self, numbers: range) -> TextBatch:
        """Texts for stage 1: those that the text VAE will encode in stage 2, in the same shares."""
        texts, noise = [], []
        for k in numbers:
            task = pick_task(self.shares, self.rng(k, Purpose.TASK).random())
            if task == T2T:
                new = [self.cut_text(self.dataset.t2t(k), self.rng(k, Purpose.DROP))[0]]
            elif task == T2I:
                new = [self.text_ids(self.dataset.t2i(k)[0])]
            elif task in (II, VID):
                turns = getattr(self.dataset, TASKS[task])(k)
                new = [self.model.ids(turn.text, end=False) for turn in turns]
            else:
                prompt, _, answer = self.dataset.it2t(k)
                new = [self.text_ids(answer), self.model.ids(prompt, end=False)]
            texts += new
            noise.append(self.vae_noise(k, new))
        noise, masked = (torch.from_numpy(np.concatenate(x)) for x in zip(*noise))
        return TextBatch(*self.packed(texts), noise, masked)

    def images(self, numbers: range) -> list[ImageBatch]:
        """Images for stage 1b, in one batch per size."""
        count, batches = self.dataset.num_images, []
        image = {k: int(self.rng(k, Purpose.PICK).integers(count)) for k in numbers}
        for hw in sorted({self.dataset.image_hw(i) for i in image.values()}):
            group = [k for k, i in image.items() if self.dataset.image_hw(i) == hw]
            x = to_float(np.stack(self.dataset.images([image[k] for k in group])))    # (B, 3, H, W)
            shape = self.model.image_vae.channels, *self.grid(image[group[0]])
            noise = [self.rng(k, Purpose.POSTERIOR).standard_normal(shape, np.float32)
                     for k in group]                                            # B of (Cz, h, w)
            batches.append(ImageBatch(x, torch.from_numpy(np.stack(noise))))
        return batches

    def pixels(self, numbers: range) -> Iterator[Tensor]:
        """The pixels of such images on the model's device, (B, 3, H, W), at most 32 at a time."""
        for start in range(0, len(numbers), 32):
            for batch in self.images(numbers[start:start + 32]):
                yield batch.x.to(self.model.device)

    def prior(self, work: list[tuple[int, int]]) -> Batch:
        """The packed batch of these samples, each a task and a number."""
        examples = [getattr(self, TASKS[task])(k) for task, k in work]

        def join(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(e, name) for e in examples]))

        images = [image for e in examples for image in e.images]
        features = self.features
        if features is not None:
            features = features[images].reshape(-1, features.shape[-1])       # (Li, F)
            features = torch.from_numpy(features.astype(np.float32))
        z_image = self.image_latents(images)                                  # (Li, Cz)
        if self.args.image_posterior == "sample":
            z_image += join("image_noise") * self.model.image_vae.normalized_posterior_std().cpu()
        layout = masks.pack([e.turns for e in examples], self.block_len)
        task, is_image = layout.task[layout.sample], masks.is_image(layout.segment)   # (L,) each
        moving = is_image & (task == T2I) | (layout.segment == J)             # t > 0
        moving[layout.segment == N] = ~join("clean")
        eps_text, weight = torch.zeros(len(layout), self.dz), torch.zeros(len(layout))
        eps_text[layout.segment == N] = join("eps_text")
        weight[layout.segment == N] = join("weight").float()
        ids, lengths = self.packed([text for e in examples for text in e.texts])
        first_latent = torch.tensor([0, *(len(e.posterior_noise) for e in examples[:-1])]).cumsum(0)
        # Of each example the times of its images, then those of its blocks.
        times, turns = torch.tensor([(len(e.u), len(e.turns)) for e in examples]).T
        first_time = times.cumsum(0) - times
        in_block = (layout.segment == C) | (layout.segment == N)
        own_time = (first_time[layout.sample] + layout.block
                    + torch.where(in_block, turns[layout.sample], 0))
        eps_image, image_shift = self.first_noise(examples, z_image, join("eps_image"))
        loc = torch.where(is_image, self.model.image_loc, self.text_loc)                # (L,)
        shift = torch.ones(len(layout), dtype=torch.float64).masked_scatter(is_image, image_shift)
        u = join("u")[own_time]    # float64: numbers of one cell become the same float32 time
        drawn = flow.sample_time(u, self.args.time_law, loc, self.args.time_scale, shift).float()
        t, t_index = torch.cat([torch.zeros(1), drawn * moving]).unique(return_inverse=True)
        return Batch(
            ids, lengths, join("posterior_noise"), join("masked"), layout, moving.nonzero()[:, 0],
            source=first_latent[layout.sample[~is_image]] + join("source"),
            text_task=task[~is_image], text_moves=moving[~is_image],
            text_weight=weight[~is_image], eps_text=eps_text[~is_image],
            z_image=z_image, image_moves=moving[is_image],
            eps_image=eps_image, features=features,
            t=t, t_index=t_index[1:])

    def first_noise(self, examples: list[Example], z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The noise (Li, Cz) of images with the latents z, made of eps, and the shift (Li,) of
        their times. The noise of a J behind a clean image of its size is near that image."""
        sizes, is_near = [], []            # of each J and I
        for e in examples:
            grids = [(segment, hw) for turn in e.turns
                     for segment, hw in ((J, turn.drawn), (I, turn.image)) if hw[0]]
            sizes += [math.prod(hw) for _, hw in grids]
            is_near += [now == J and before == (I, hw)
                        for before, (now, hw) in zip([None, *grids], grids)]
        rho, size = self.model.image_rho, torch.tensor(sizes, dtype=torch.long)
        shift = [flow.image_shift(n * self.cz) * (flow.near_shift(rho) if x else 1.0)
                 for n, x in zip(sizes, is_near)]
        shift = torch.tensor(shift, dtype=torch.float64).repeat_interleave(size)
        at = torch.tensor(is_near, dtype=torch.bool).repeat_interleave(size).nonzero()[:, 0]
        eps = eps.clone()
        eps[at] = flow.near(z[at - size.repeat_interleave(size)[at]], eps[at], rho)
        return eps, shift

    def packed(self, texts: list[list[int]]) -> tuple[Tensor, list[int]]:
        """Tokens (T,) of all texts, and latents of each but the empty ones (a dropped caption)."""
        ids = torch.tensor([token for text in texts for token in text], dtype=torch.long)
        return ids, [len(text) // self.patch_size for text in texts if text]

# ---- Ahead of the device -----------------------------------------------------------------------

def to_device(batch, device: torch.device):
    """The batch with its tensors on the device, and its attention plans built there."""
    counts = batch.counts()        # on a GPU it would wait for the running step
    batch = replace(batch, **{name: x.to(device) for name, x in vars(batch).items()
                              if isinstance(x, Tensor | Layout)})
    batch.counts = lambda: counts                          # computed once, on the CPU
    if isinstance(batch, Batch):
        batch.plan.build()
        batch.target_plan.build()
    return batch


def ahead(make: Callable, steps: range, device: torch.device) -> Iterator[tuple[int, list, float]]:
    """(step, its batches on the device, seconds waited for them), made one step ahead in a thread.
    make(step) -> the batches of a step, on the CPU. steps: at least one."""

    def prepare(step: int) -> list:
        return [to_device(batch, device) for batch in make(step)]

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(prepare, steps[0])
        for step in steps:
            began = time.perf_counter()
            batches = coming.result()
            waited = time.perf_counter() - began
            if step + 1 in steps:
                coming = thread.submit(prepare, step + 1)
            yield step, batches, waited


if __name__ == "__main__":
    args = config.merge(config.parse(["--pool", "64", "--cfg_drop", "0", "--block_len", "4"]))
    dataset = data.open_data(args)
    tokenizer = Tokenizer.train(dataset.corpus(500), 512)
    vae = TextVAE(TextVAEConfig(tokenizer.n_vocab))
    model = Cola(vae, ImageVAE(ImageVAEConfig()), MMDiT(MMDiTConfig()), tokenizer, 4, (32, 32), 1.0)
    print("sample 0 of each task; expect time 0 in P and C, and in I except for t2i")
    for task, name in enumerate(TASKS):
        batch = Batches(args, dataset, model).prior([(task, 0)])
        print(f"{name}: {tokenizer.decode(batch.ids)}")
        for segment in batch.layout.segment.unique():
            t = batch.t[batch.t_index[batch.layout.segment == segment]]
            print(f"  {masks.SEGMENTS[segment]}: {len(t)} positions, latest time {t.max():.2f}")
