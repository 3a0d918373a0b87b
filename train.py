"""Train the denoiser on cached latents.

    python train.py                                              # the drawn shapes, on a CPU
    torchrun --nproc_per_node=8 train.py --dataset flowers       # --batch_size is of all
    python train.py --resume                                     # go on, or start
    python train.py --distill out/shapes                         # then: draw in one pass

Encodes the dataset first, if need be. Writes ckpt.pt, log.csv, curve.png and samples/ to
out/<dataset>/. Interrupting a run, or splitting it over devices, changes nothing; Ctrl-C
saves before it stops.
"""
import argparse
import copy
import csv
import functools
import io
import math
import shlex
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import fid
from encode import (
    CHUNK, CODECS, RANK, SMALL_CODECS, WORLD, Cache, Dataset, UserError, autocast, barrier,
    cache_key, can_compile, check_writable, expanded, find_dataset, fingerprint, from_first,
    in_turn, join, latent_shape, load_state, locate, make_parser, open_cache, prepare_codec,
    run, to_float, with_the_others, within, write_file)
from model import (
    PRESETS, Denoiser, Distillation, ModelConfig, distribution_matching, flops, generate,
    guidance_scales, imitation, largest_angle, losses, noise_angle, sampling_angles)
from sample import (
    CHECKPOINT_FORMAT, SAMPLING, draw_batches, draw_curves, find_checkpoint, grid_rows,
    load_checkpoint, load_codec_of, make_grid, seconds, split_batches, write_picture)


# ========================================================================= the settings

def flag(help, default=MISSING, **options):
    """A field of Settings that is a flag, too; options: of argparse."""
    return field(default=default, metadata=dict(help=help, **options))


YES_OR_NO = argparse.BooleanOptionalAction


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What makes a run what it is: every field is a flag, and is stored in the checkpoint.

    A field without a default stands in every block below.
    """

    # The data.
    dataset: str = flag("shapes, flowers, afhq, imagenet, or a folder of images", type=expanded)
    codec: str = flag("the frozen autoencoder", choices=CODECS)
    flip: bool = flag("train on mirrored images, too", False, action=YES_OR_NO)

    # The network, and the noise that it learns to remove.
    preset: str = flag("size of the network", choices=PRESETS)
    sphere: bool = flag("project noisy latents onto the sphere", True, action=YES_OR_NO)
    max_angle: float = flag("the largest noise angle, degrees; 0: by the latent's size", 0.0,
                            type=within(float, 0, 89.99))
    angle_mean: float = flag("mean of the logit-normal law of the noise", 0.0, type=float)
    angle_std: float = flag("spread of that law", 1.0, type=within(float, 0.01))

    # The optimizer. The learning rate rises for `warmup` steps, stays until half of the
    # run, and falls by a cosine to a hundredth.
    batch_size: int = flag("images a step, over all devices", type=within(int, 1))
    max_steps: int = flag("steps of the whole run", type=within(int, 1))
    optimizer: str = flag("muon: for the matrices of the blocks", choices=["adamw", "muon"])
    lr: float = flag("peak learning rate", type=within(float, 0))
    warmup: int = flag("steps of linear warm-up", type=within(int, 1))
    weight_decay: float = flag("decoupled, as in AdamW", type=within(float, 0))
    beta1: float = flag("AdamW's average of gradients", 0.9, type=within(float, 0, 1))
    beta2: float = flag("AdamW's average of their squares", 0.95, type=within(float, 0, 1))
    grad_clip: float = flag("largest norm of the gradient", 1.0, type=within(float, 0))
    ema_decay: float = flag("of the moving average of the weights", type=within(float, 0, 1))
    accumulate: int = flag("passes that a device's share of a batch is split into", 1,
                           type=within(int, 1))
    seed: int = flag("of weights, order and noise", 0, type=within(int, 0))

    # The losses.
    label_dropout: float = flag("share of labels left out, for guidance", 0.1,
                                type=within(float, 0, 1))
    consistency_weight: float = flag("weight of that loss; 0 saves its pass",
                                     type=within(float, 0))

    # Other beginnings than random weights.
    init_from: str = flag("checkpoint to start from, with its codec", "", metavar="CKPT",
                          type=expanded)
    distill: str = flag("checkpoint to make a one-step generator of", "", metavar="CKPT",
                        type=expanded)
    imitate_steps: int = flag("of distillation: first steps, which imitate the sampler", 0,
                              type=within(int, 0))
    imitate_lr: float = flag("peak learning rate of those", 1e-3, type=within(float, 0))
    teacher_steps: int = flag("steps of the sampler that is imitated", 4, type=within(int, 1))
    teacher_cfg: float = flag("guidance of the denoiser that is distilled", 1.5,
                              type=within(float, 0, 20))

    # How images are drawn from it.
    steps: int = flag("sampling steps", type=within(int, 1))
    cfg_scale: float = flag("guidance of sampling, 1 for none", type=within(float, 0, 20))
    cfg_skip: int = flag("first sampling steps without guidance", type=within(int, 0))
    same_noise: bool = flag("one noise for all sampling steps", action=YES_OR_NO)

    # What happens every so many steps.
    log_every: int = flag("steps between log lines", type=within(int, 1))
    save_every: int = flag("steps between checkpoints", type=within(int, 1))
    sample_every: int = flag("steps between sample grids", type=within(int, 1))
    eval_every: int = flag("steps between evaluations; 0: none", 0, type=within(int, 0))
    eval_images: int = flag("samples of an evaluation", 1000, type=within(int, 2))
    eval_ref: str = flag("images or statistics they are compared with; default: the dataset",
                         "", metavar="REF", type=expanded)
    eval_features: str = flag("network that compares them", "codec",
                              choices=["codec", "inception"])

    def sampling(self):
        """The options of sample.py's functions."""
        return {name: getattr(self, name) for name in SAMPLING}


# A run uses one of these blocks with the flags laid over it, and nothing else. What is not
# known of the paper's settings follows RAE, Sphere Encoder and assets/results.md.

SHAPES = Settings(                  # five minutes on a CPU
    dataset="shapes", codec="small", preset="tiny",
    batch_size=128, max_steps=1700,
    optimizer="muon", lr=3e-3, warmup=100, weight_decay=0.01, ema_decay=0.999,
    consistency_weight=0.0,         # at equal time it lost
    steps=4, cfg_scale=2.0, cfg_skip=1,
    same_noise=False,               # new noise is better for drawings, worse for photographs
    log_every=50, save_every=500, sample_every=500)

FOLDER = Settings(                  # any folder of images, at 32 pixels
    dataset="", codec="small", preset="tiny",
    batch_size=128, max_steps=1700,
    optimizer="muon", lr=3e-3, warmup=100, weight_decay=0.01, ema_decay=0.999,
    consistency_weight=0.0,
    steps=4, cfg_scale=2.0, cfg_skip=1, same_noise=True,
    log_every=50, save_every=500, sample_every=500)

FLOWERS = Settings(                 # 1,000 epochs
    dataset="flowers", codec="rae", preset="B",
    batch_size=256, max_steps=32_000,
    optimizer="adamw", lr=2e-4, warmup=1000, weight_decay=0.0, ema_decay=0.9995,
    consistency_weight=0.1,         # the paper has this loss; its weight is unpublished
    steps=4, cfg_scale=1.5, cfg_skip=0, same_noise=True,
    log_every=100, save_every=2500, sample_every=5000)

AFHQ = Settings(                    # 1,000 epochs
    dataset="afhq", codec="rae", preset="B",
    batch_size=256, max_steps=57_000,
    optimizer="adamw", lr=2e-4, warmup=1000, weight_decay=0.0, ema_decay=0.9995,
    consistency_weight=0.1,
    steps=4, cfg_scale=1.5, cfg_skip=0, same_noise=True,
    log_every=100, save_every=2500, sample_every=5000)

IMAGENET = Settings(                # 400 epochs
    dataset="imagenet", codec="rae", preset="XL",
    batch_size=1024, max_steps=500_000,
    optimizer="adamw", lr=2e-4, warmup=1000, weight_decay=0.0, ema_decay=0.9995,
    consistency_weight=0.1,
    steps=4, cfg_scale=1.5, cfg_skip=0, same_noise=True,
    log_every=100, save_every=5000, sample_every=5000)

DISTILL = Settings(                 # dataset, codec, preset and noise are the checkpoint's
    dataset="shapes", codec="small", preset="tiny",
    batch_size=64, max_steps=700, imitate_steps=400, imitate_lr=1e-3, teacher_cfg=1.5,
    optimizer="adamw", lr=1.5e-4, warmup=1, weight_decay=0.0, ema_decay=0.99,
    beta1=0.0, beta2=0.99,          # momentum makes matching collapse
    label_dropout=0.0, consistency_weight=0.0,
    steps=1, cfg_scale=1.0, cfg_skip=0, same_noise=True,
    log_every=50, save_every=100, sample_every=100)

BLOCKS = {"shapes": SHAPES, "flowers": FLOWERS, "afhq": AFHQ, "imagenet": IMAGENET}

# What a run takes from the checkpoint that it starts from, and what it keeps when resumed.
INHERITED = ("codec", "preset", "sphere", "max_angle", "angle_mean", "angle_std")
KEPT = (*INHERITED, "flip", "batch_size", "optimizer", "seed", "imitate_steps")


def choose_settings(flags, start=None):
    """The settings of a new run, from flags (a dict); start: the checkpoint it starts from."""
    dataset = flags.get("dataset", "shapes")
    if flags.get("distill"):
        block = DISTILL
    elif dataset in BLOCKS:
        block = BLOCKS[dataset]
    else:
        block = replace(FOLDER, dataset=dataset)
    if start is None:
        return replace(block, **flags)

    theirs = start["settings"]
    source = flags.get("distill") or flags.get("init_from")
    refuse_changes(flags, theirs, INHERITED, source)
    block = replace(block, **{name: theirs[name] for name in INHERITED})
    if flags.get("distill"):
        if theirs["distill"] or not theirs["sphere"]:
            raise UserError(f"{source}: is distilled already, or was trained with --no-sphere")
        block = replace(block, dataset=theirs["dataset"])
    return replace(block, **flags)


def refuse_changes(flags, saved, names, path):
    """Raise UserError if a flag differs from what a checkpoint has."""
    for name in names:
        if name in flags and flags[name] != saved[name]:
            raise UserError(f"{path}: has --{name} {saved[name]}; drop yours")


def parse_args():
    """The command line: what does not belong to the settings, and the settings given (a dict)."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=expanded, help="where to write; default: out/<dataset>")
    add("--resume", action="store_true", help="go on with the run in out_dir, or start it")
    add("--live", action="store_true", help="encode each batch as it is needed, without a cache")
    add("--fit_steps", type=within(int, 1), default=1500,
        help="steps to fit a small codec, if there is none; default: 1500")
    add("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    add("--compile", default="auto", choices=["auto", "on", "off"],
        help="torch.compile; auto (the default): on CUDA, and for long runs on a CPU")
    add("--bench", action="store_true", help="time the steps of such a run instead")
    group = parser.add_argument_group(
        "settings", "in brackets the defaults for shapes; those of other runs are in train.py")
    for setting in fields(Settings):
        options = dict(setting.metadata)
        options["help"] += f" ({getattr(SHAPES, setting.name)})"
        group.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, **options)
    args = parser.parse_args()
    flags = {name: vars(args)[name] for name in Settings.__annotations__ if name in args}
    return args, flags


def plan_run(flags, out_dir, resume, data_dir):
    """Decide what a command asks for: its Settings, its checkpoint's path, and where it starts.

    Returns (settings, path, the path of the checkpoint to start from or None, whether that is
    the run's own).
    """
    source = flags.get("distill") or flags.get("init_from")
    if out_dir is None:
        out_dir = default_out_dir(flags, source, data_dir)
    path = Path(out_dir) / "ckpt.pt"

    if resume and path.exists():
        saved = load_checkpoint(path)["settings"]
        refuse_changes(flags, saved, KEPT, path)
        return Settings(**{**saved, **flags}), path, path, True
    if resume:
        print(f"{path}: is not there, so this run starts from the beginning")
    if source:
        source = find_checkpoint(source)
        settings = choose_settings(flags, load_checkpoint(source))
    else:
        settings = choose_settings(flags)

    if WORLD * settings.accumulate > 1 and settings.batch_size % (WORLD * settings.accumulate):
        raise UserError(f"--batch_size: must be a multiple of {WORLD * settings.accumulate}")
    if settings.distill and settings.accumulate > 1:
        raise UserError("--accumulate: not with --distill; use a smaller --batch_size")
    check_writable(out_dir, "--out_dir")
    _, folder = locate(settings.dataset, data_dir)
    if Path(out_dir).resolve() == folder.resolve():
        raise UserError(f"--out_dir {out_dir}: holds the images; use another folder")
    return settings, path, source, False


def default_out_dir(flags, source, data_dir):
    """out/<dataset>; a distilled run goes beside its source, and so does one tuned further."""
    if flags.get("distill"):
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        return Path(f"{folder}-distilled")
    name, _ = locate(flags.get("dataset", "shapes"), data_dir)
    out_dir = Path("out") / name
    if source and find_checkpoint(source).resolve() == (out_dir / "ckpt.pt").resolve():
        return Path(f"{out_dir}-tuned")
    return out_dir


# ============================================================================= the data

# A thread reads the next batch while the network learns from this one. It leaves torch's
# operations to the main thread: in a second thread they slow down every step on a CPU, and can
# crash on MPS.

def move(array, device):
    """A numpy array or tensor, on the device.

    On CUDA the program does not wait for the copy. On MPS, it would then read freed memory.
    """
    return torch.as_tensor(array).to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class CachedLatents:
    """A run's data from the cache: on the card, in memory, or read from disk."""

    cache: Cache
    device: torch.device
    latents: torch.Tensor       # (N, T, C) float16 on the card or in memory, or None

    @property
    def labels(self):
        return self.cache.labels

    def on_card(self):
        return self.latents is not None and self.device.type == "cuda"

    def read(self, indexes):
        """In the thread: (B, T, C) float16; or the indexes, if the latents are on the card."""
        if self.on_card():
            return indexes
        # Only from pinned memory are large copies to the card not waited for.
        x = torch.empty(len(indexes), *self.cache.shape, dtype=torch.float16,
                        pin_memory=self.device.type == "cuda")
        if self.latents is None:
            self.cache.read(indexes, x.numpy())
        else:
            np.take(self.latents.numpy(), indexes, axis=0, out=x.numpy(), mode="clip")
        return x

    def place(self, x):
        """In the main thread: latents (B, T, C) float32 on the device."""
        x = move(x, self.device)
        return (self.latents[x] if self.on_card() else x).float()


@dataclass(frozen=True)
class LiveLatents:
    """A run's data straight from the images, encoded batch by batch."""

    dataset: Dataset
    labels: np.ndarray          # (N,), or (2 N,) with the mirrored images
    codec: torch.nn.Module
    device: torch.device
    dtype: str
    pool: ThreadPoolExecutor    # decodes image files

    def read(self, indexes):
        """In the thread: images (B, S, S, 3) uint8."""
        load = functools.partial(self.dataset.load, size=self.codec.image_size)
        return np.stack(list(self.pool.map(load, indexes)))

    def place(self, x):
        """In the main thread: latents (B, T, C) float32 on the device."""
        with torch.no_grad(), autocast(self.device, self.dtype):
            z = self.codec.encode(to_float(x, self.device))
        return z.half().float()     # rounded as in the cache


def load_latents(cache, device):
    """All latents of a cache, on a CUDA card or in memory; None where there is no room."""
    on_card = device.type == "cuda"
    room = torch.cuda.mem_get_info(device)[0] / 3 if on_card else 2**30
    shape = len(cache.labels), *cache.shape
    if 2 * math.prod(shape) > room:
        return None
    latents = torch.empty(shape, dtype=torch.float16, device=device if on_card else "cpu")
    for k in cache.chunks():
        latents[k * CHUNK:(k + 1) * CHUNK] = torch.tensor(cache.chunk(k))
    return latents


@functools.lru_cache(maxsize=2)
def permutation(n, epoch, seed):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indexes(n, batch_size, step, seed):
    """Which of n images a step takes: epochs follow one another, each in an order of its own."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(places, n)
    parts = [permutation(n, int(epoch), seed)[places[epochs == epoch]]
             for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def read_batch(data, usable, step, rows, settings):
    """In the thread: what a step needs of the data, for rows (a slice) of its batch.

    usable: the indexes of the images that could be read. Returns what `data.place` makes
    latents of, and the labels (B,).
    """
    chosen = batch_indexes(len(usable), settings.batch_size, step, settings.seed)
    indexes = usable[chosen[rows]]
    return data.read(indexes), data.labels[indexes]


# ============================================================================== a step

NOISE_BLOCK = 16        # images whose noise is drawn together


def generator_for(device, *key):
    """A random generator that depends on the numbers of the key alone."""
    seed = np.random.SeedSequence(key).generate_state(1)
    return torch.Generator(device).manual_seed(int(seed[0]))


def draw_gaussian(step, stream, rows, settings, config, device):
    """Noise (B, T, C) for rows (a slice) of a step's batch, the same however it is split."""
    blocks = range(rows.start // NOISE_BLOCK, math.ceil(rows.stop / NOISE_BLOCK))
    shape = (NOISE_BLOCK, config.tokens, config.channels)
    noise = []
    for block in blocks:
        generator = generator_for(device, settings.seed, step, stream, block)
        noise.append(torch.randn(shape, generator=generator, device=device))
    first = rows.start % NOISE_BLOCK
    return torch.cat(noise)[first:first + rows.stop - rows.start]


def draw(step, rows, settings, config, device):
    """The random numbers of a step for rows (a slice) of its batch.

    Returns noise (B, T, C), angle (B,) radians, share (B,) in [0, 1), dropped (B,) bool.
    """
    generator = generator_for(device, settings.seed, step, 0)
    u = torch.rand(3, settings.batch_size, generator=generator, device=device)

    # Spread evenly over the batch, the angles make the loss vary less.
    place = (torch.arange(settings.batch_size, device=device) + u[0]) / settings.batch_size
    angle = noise_angle(place, config.max_angle, settings.angle_mean, settings.angle_std)
    noise = draw_gaussian(step, 1, rows, settings, config, device)
    return noise, angle[rows], u[1, rows], u[2, rows] < settings.label_dropout


def learning_rate(step, steps, peak, warmup=1):
    """Linear warm-up, then constant to half of the steps, then a cosine down to a hundredth."""
    decayed = max(0.0, 2 * step / steps - 1)                    # 0 to half, then up to 1
    cosine = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * decayed))
    return peak * min(1.0, (step + 1) / warmup) * cosine


class FloatMuon(torch.optim.Muon):
    """torch.optim.Muon in float32, and all matrices of one shape at once.

    torch's iterates in bf16, which takes many times as long on most CPUs.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                updates = orthogonalize(self.momentum(weights, group), group)
                size = 0.2 * math.sqrt(max(shape))              # "match_rms_adamw"
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates), alpha=-group["lr"] * size)

    def momentum(self, weights, group):
        """Nesterov's average of the gradients: (n, rows, columns)."""
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        return torch.stack(gradients).lerp(torch.stack(averages), group["momentum"])


def orthogonalize(x, group):
    """Newton and Schulz's iteration: pulls the singular values of (n, r, c) towards 1."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(group["eps"])
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(denoiser, settings, device):
    """AdamW for all weights; or Muon for the matrices of attention and MLP, AdamW for the rest.

    Muon takes twice the rate. Both measure steps alike, so that one rate serves both.
    """
    matrices, others = [], []
    for name, weight in denoiser.named_parameters():
        matrix = name.startswith("blocks") and weight.ndim == 2 and "adaln" not in name
        if matrix and settings.optimizer == "muon":
            matrices.append(weight)
        else:
            others.append(weight)
    adamw = torch.optim.AdamW([dict(params=others, lr_scale=1)],
                              betas=(settings.beta1, settings.beta2),
                              weight_decay=settings.weight_decay, fused=device.type != "mps")
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon if device.type == "cuda" else FloatMuon
    return [adamw, muon([dict(params=matrices, lr_scale=2)], adjust_lr_fn="match_rms_adamw",
                        weight_decay=settings.weight_decay)]


def take_step(optimizers, lr, grad_clip):
    """Clip the gradient and move the weights, unless it is not finite. Returns its norm."""
    weights = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            weights += group["params"]
    grad_norm = torch.nn.utils.clip_grad_norm_(weights, grad_clip)
    finite = torch.isfinite(grad_norm)
    for optimizer in optimizers:
        if optimizer.defaults.get("fused"):
            # It leaves its step out by itself, so that the program need not wait to know.
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        elif finite:
            optimizer.step()
    return grad_norm


def update_average(ema, denoiser, decay, step):
    """Move the averaged weights towards the new ones, faster in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 1 - decay)


def train_step(model, optimizers, step, batch, settings, dtype="auto"):
    """One step of training.

    model: a Denoiser, or DDP around one. batch: z, labels, noise, angle, share. Returns the
    losses, a dict of (B,), and the norm of the gradient.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    parts = list(zip(*(tensor.chunk(settings.accumulate) for tensor in batch)))
    values = []
    for k, part in enumerate(parts):
        # DDP has to average gradients over processes only once, after the last part.
        model.require_backward_grad_sync = k + 1 == len(parts)
        with autocast(part[0].device, dtype):
            terms = losses(model, *part, settings.consistency_weight)
        (terms["loss"].mean() / len(parts)).backward()
        values.append(terms)

    lr = learning_rate(step, settings.max_steps, settings.lr, settings.warmup)
    grad_norm = take_step(optimizers, lr, settings.grad_clip)
    joined = {name: torch.cat([terms[name].detach() for terms in values]) for name in values[0]}
    return joined, grad_norm


# ====================================================================== a distilling step

def make_distill_optimizers(nets, settings, device):
    """AdamW for imitation, and another for distribution matching, where fake learns faster."""
    fused = device.type != "mps"
    imitating = torch.optim.AdamW([dict(params=nets.generator.parameters(), lr_scale=1)],
                                  betas=(0.9, 0.95), weight_decay=settings.weight_decay,
                                  fused=fused)
    matching = torch.optim.AdamW([dict(params=nets.generator.parameters(), lr_scale=1),
                                  dict(params=nets.fake.parameters(), lr_scale=2)],
                                 betas=(settings.beta1, settings.beta2),
                                 weight_decay=settings.weight_decay, fused=fused)
    return [imitating, matching]


def average_gradients(optimizer, group):
    """Give every process the mean of all processes' gradients."""
    for weights in optimizer.param_groups:
        for weight in weights["params"]:
            if weight.grad is not None:
                dist.all_reduce(weight.grad, group=group)
                weight.grad /= WORLD


def distill_step(nets, ema, optimizers, step, rows, settings, dtype="auto", group=None):
    """One step of distillation: imitation first, then distribution matching.

    nets: a Distillation. ema: the averaged generator. rows: a slice, this process's share of
    the batch. group: of processes that exchange gradients. Returns the losses, a dict of (B,),
    the noise angle of each (B,) or None, and the norm of the gradient.
    """
    config, device = nets.real.config, next(nets.parameters()).device
    noise, angle, share, _ = draw(step, rows, settings, config, device)
    labels = (share * config.num_classes).long()
    imitating, matching = optimizers
    matched = step - settings.imitate_steps         # steps of matching so far

    if matched < 0:
        optimizer = imitating
        lr = learning_rate(step, settings.imitate_steps, settings.imitate_lr)
        with autocast(device, dtype):
            target = teach(nets.real, noise, labels, settings)
            values = imitation(nets.generator, noise, labels, target)
        angle = None                                # this loss knows none
    else:
        optimizer = matching
        lr = learning_rate(matched, settings.max_steps - settings.imitate_steps, settings.lr)
        if matched == 0:
            nets.generator.load_state_dict(ema.state_dict())    # the average is better
        new_noise = draw_gaussian(step, 2, rows, settings, config, device)
        with autocast(device, dtype):
            values = distribution_matching(nets, noise, labels, new_noise, angle,
                                           settings.teacher_cfg)

    optimizer.zero_grad()
    values["loss"].mean().backward()
    if WORLD > 1:
        average_gradients(optimizer, group)
    grad_norm = take_step([optimizer], lr, settings.grad_clip)
    update_average(ema, nets.generator, settings.ema_decay, step if matched < 0 else matched)
    return {name: value.detach() for name, value in values.items()}, angle, grad_norm


def teach(denoiser, noise, labels, settings):
    """What the sampler draws from noise (B, T, C) with the same noise at every step."""
    steps = settings.teacher_steps
    angles = sampling_angles(steps, denoiser.config.max_angle)
    scales = guidance_scales(steps, settings.teacher_cfg, cfg_skip=1)
    drawn = generate(denoiser, labels, noise.expand(steps, *noise.shape), angles, scales)
    return list(drawn)[-1]


# =============================================================================== the log

BINS = 6        # the loss is also logged for sixths of the noise angles, by their law


class Log:
    """Rows of named numbers, and the sums that the next row will be made of."""

    def __init__(self):
        self.rows = []          # dicts: column -> number
        self.sums = {}          # name -> (2,), the sum of values and their count

    def add(self, name, values, counted):
        """Add values, (B,) or (), where counted (bool, of the same shape or one) is true."""
        counted = counted.expand(values.shape)
        pair = torch.stack([torch.where(counted, values, 0).sum(), counted.sum()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def gather(self):
        """Add up the sums of all processes, in the first one."""
        if WORLD == 1 or not self.sums:
            return
        totals = torch.stack(list(self.sums.values())).cpu()
        with with_the_others():
            dist.reduce(totals, 0)
        for name, pair in zip(self.sums, totals):
            pair = pair if RANK == 0 else torch.zeros(2)
            self.sums[name] = pair.to(self.sums[name].device)

    def take_means(self):
        """The means of all that was added since the last call."""
        names, totals = list(self.sums), torch.stack(list(self.sums.values())).cpu()
        self.sums = {}
        return dict(zip(names, (totals[:, 0] / totals[:, 1]).tolist()))

    def put(self, row):
        """Add a row, or complete that of the same step."""
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)


def angle_bins(config, settings, device):
    """The inner edges of BINS equal shares of the noise law, (BINS - 1,) radians, and names."""
    shares = torch.arange(1, BINS) / BINS
    inner = noise_angle(shares, config.max_angle, settings.angle_mean, settings.angle_std)
    edges = [0.0, *torch.rad2deg(inner).tolist(), config.max_angle]
    return inner.to(device), [f"loss_{low:.4g}_{high:.4g}" for low, high in zip(edges, edges[1:])]


def write_log(out_dir, rows):
    """Write log.csv and curve.png."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.8g}" for name, value in row.items()})
    write_file(out_dir / "log.csv", lambda file: file.write(text.getvalue().encode()))
    write_picture(out_dir / "curve.png", draw_curves(rows))


def time_left(seconds):
    """Seconds in words."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


# ============================================================================== the run

@dataclass
class Training:
    """What a run was asked for, and what it has become."""

    settings: Settings
    path: Path                      # of its checkpoint
    device: torch.device
    dtype: str                      # of autocast
    group: object                   # of processes that exchange gradients; None: gloo's
    codec: torch.nn.Module
    classes: list                   # names
    cache_key: str                  # of the latents; "" for distillation
    config: ModelConfig
    denoiser: Denoiser              # the network that will draw
    nets: Distillation              # it and its judges, or None
    ema: Denoiser                   # its averaged weights
    optimizers: list
    log: Log
    step: int = 0
    stamp: int = None               # of the ckpt.pt that this run wrote last

    @property
    def rows(self):
        """This process's share of a batch, a slice."""
        size = self.settings.batch_size
        return slice(RANK * size // WORLD, (RANK + 1) * size // WORLD)


def make_training(settings, path, device, dtype, group, codec, classes, cache_key, start=None):
    """A run at its beginning; start: a checkpoint whose weights it begins with."""
    tokens, channels = latent_shape(settings.codec)
    max_angle = settings.max_angle or largest_angle(tokens, channels)
    config = ModelConfig(tokens, channels, len(classes), sphere=settings.sphere,
                         max_angle=max_angle, **PRESETS[settings.preset])
    torch.manual_seed(settings.seed)
    denoiser = Denoiser(config)
    if start:
        adopt_weights(denoiser, start, classes)
    denoiser = denoiser.to(device)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    if settings.distill:
        nets = Distillation(denoiser)
        optimizers = make_distill_optimizers(nets, settings, device)
    else:
        nets = None
        optimizers = make_optimizers(denoiser, settings, device)
    return Training(settings, path, device, dtype, group, codec, classes, cache_key, config, denoiser,
               nets, ema, optimizers, Log())


def adopt_weights(denoiser, start, classes):
    """Take a checkpoint's averaged weights; classes that it does not know keep random rows."""
    state = dict(start["ema"])
    table = denoiser.classes.weight.detach().clone()
    theirs = [*start["classes"], None]                  # None: the row of "no class"
    for row, name in enumerate([*classes, None]):
        if name in theirs:
            table[row] = state["classes.weight"][theirs.index(name)]
    load_state(denoiser, {**state, "classes.weight": table}, "the checkpoint")


def choose_compile(choice, settings, device):
    """Whether to use torch.compile. auto: on CUDA, and on a CPU if the run is long enough."""
    long_on_cpu = device.type == "cpu" and settings.max_steps >= 1000 and not settings.distill
    if choice == "auto":
        wanted = device.type == "cuda" or long_on_cpu
    else:
        wanted = choice == "on"
    if not wanted:
        return False

    error = can_compile(device)
    if error is None:
        return True
    reason = " ".join(str(error).split())[:200]
    if choice == "on":
        raise UserError(f"--compile on: does not work here ({reason}); use auto or off")
    if RANK == 0:
        print(f"torch.compile does not work here, so steps take longer ({reason})")
    return False


def compile_networks(training, choice):
    """Compile the networks in place, so that state dicts keep their names, if `choice` says so."""
    if not choose_compile(choice, training.settings, training.device):
        return
    networks = training.nets.children() if training.nets else [training.denoiser]
    for network in networks:
        network.compile()
    if RANK == 0:
        print("the first step takes longer: torch.compile (see --compile)", flush=True)


def wrap_for_processes(training):
    """The denoiser, in DDP if there are several processes."""
    if WORLD == 1 or training.nets:
        return training.denoiser
    # torch.compile cuts the network where a bucket ends, so these are large.
    return DDP(training.denoiser, process_group=training.group, bucket_cap_mb=100,
               gradient_as_bucket_view=True)


# ------------------------------------------------------------------------ its checkpoint

def save_checkpoint(training):
    """Write ckpt.pt, unless another run has written it meanwhile."""
    if training.path.exists() and stamp_of(training.path) != training.stamp:
        raise UserError(f"{training.path}: another run has written it meanwhile, so this one stops; "
                        "give each an --out_dir of its own")
    small = training.settings.codec in SMALL_CODECS
    contents = dict(
        format=CHECKPOINT_FORMAT,
        step=training.step,
        model=training.denoiser.state_dict(),
        ema=training.ema.state_dict(),
        nets=training.nets.state_dict() if training.nets else None,
        optimizers=[optimizer.state_dict() for optimizer in training.optimizers],
        config=vars(training.config),
        settings=vars(training.settings),
        classes=training.classes,
        codec=dict(name=training.settings.codec, fingerprint=fingerprint(training.codec),
                   weights=training.codec.state_dict() if small else None),
        cache_key=training.cache_key,
        log=training.log.rows,
        sums={name: pair.cpu() for name, pair in training.log.sums.items()})
    write_file(training.path, lambda file: torch.save(contents, file))
    training.stamp = stamp_of(training.path)


def stamp_of(path):
    """What tells a file from another that takes its place."""
    return path.stat().st_mtime_ns


def restore(training, saved):
    """Continue from a checkpoint of this training."""
    load_state(training.ema, saved["ema"], training.path)
    if training.nets:
        load_state(training.nets, saved["nets"], training.path)
    else:
        load_state(training.denoiser, saved["model"], training.path)
    for optimizer, theirs in zip(training.optimizers, saved["optimizers"]):
        state = theirs["state"]
        if training.device.type == "cpu":
            state = copy.deepcopy(state)        # not to write into the file, which is mapped
        groups = optimizer.state_dict()["param_groups"]         # of the present settings
        optimizer.load_state_dict(dict(state=state, param_groups=groups))
    training.step, training.log.rows = saved["step"], saved["log"]
    for name, pair in saved["sums"].items():
        pair = pair if RANK == 0 else torch.zeros(2)            # they are of all processes
        training.log.sums[name] = pair.to(training.device)
    training.stamp = stamp_of(training.path)


def set_aside(out_dir):
    """Move what an earlier run has written to a folder of its own."""
    names = "ckpt.pt", "log.csv", "samples", "curve.png", "grid_*.png"
    files = [file for name in names for file in out_dir.glob(name)]
    if not files:
        return
    stamp = time.strftime("earlier_%Y-%m-%d_%H.%M.%S")
    aside = out_dir / f"{stamp}_{len(list(out_dir.glob('earlier_*'))) + 1}"
    try:
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
    except OSError as error:
        raise UserError(f"{aside}: cannot take the files of an earlier run ({error.strerror}); "
                        "use another --out_dir") from error
    print(f"{out_dir}: held an earlier run, now in {aside}")


# ---------------------------------------------------------------------------- what it shows

def add_to_log(log, values, angle, grad_norm, bins):
    """Add a step's losses to the sums of the log; the place to log another number.

    values: name -> (B,). angle: (B,), or None where the loss has nothing to do with one.
    """
    finite = torch.isfinite(grad_norm)
    for name, value in values.items():
        log.add(name, value, finite)
    log.add("grad_norm", grad_norm, finite)
    log.add("skipped", 1 - finite.float(), torch.ones_like(finite))
    if angle is None:
        return
    inner, names = bins
    place = torch.bucketize(angle, inner)
    for k, name in enumerate(names):
        log.add(name, values["loss"], finite & (place == k))


def write_line(training, means, rate, seconds, caught):
    """Finish a row of the log, print it, and write log.csv and curve.png."""
    settings, step = training.settings, training.step
    before = training.log.rows[-1]["step"] if training.log.rows else 0
    means["skipped"] = round(means["skipped"] * (step - before))        # steps
    training.log.put(dict(step=step, **means, images_per_s=rate, seconds=seconds))
    write_log(training.path.parent, training.log.rows)

    left = time_left((settings.max_steps - step) * settings.batch_size / rate)
    shown = [f"{name} {value:.4g}" for name, value in means.items()
             if not name.startswith("loss_") and (name != "skipped" or value)]
    parts = [f"step {step:,} of {settings.max_steps:,}", *shown, f"{rate:.4g} images/s",
             f"{left} left"]
    say("  ".join(parts), caught)


SHOWN = 12              # classes in a grid of samples


def write_samples(training):
    """A grid of samples in samples/, always from the same noise: a column a class."""
    settings = training.settings
    shown = training.classes[:SHOWN]
    labels = torch.arange(len(shown)).repeat(6)
    batches = draw_batches(training.ema, training.codec, labels, [list(range(len(labels)))],
                           dtype=training.dtype, **settings.sampling())
    images = np.concatenate(list(batches))
    grid = make_grid(grid_rows(images, shown * 6, len(shown)))
    write_picture(training.path.parent / f"samples/step_{training.step:06d}.png", grid)


@dataclass(frozen=True)
class Evaluation:
    """What samples are compared with while training."""

    extractor: fid.Extractor
    mu: np.ndarray                  # of the reference
    sigma: np.ndarray


def prepare_evaluation(training, data_dir, workers):
    """Open the network and the reference of --eval_every. Raises UserError if one is missing."""
    settings = training.settings
    if settings.eval_features == "inception":
        extractor = in_turn(lambda: fid.inception_extractor(training.device))
    else:
        extractor = fid.codec_extractor(settings.codec, training.codec, training.device)
    where = settings.eval_ref or settings.dataset
    reference = from_first(lambda: fid.open_set(where, data_dir))
    size = extractor.size or training.codec.image_size
    mu, sigma = fid.reference_moments(reference, extractor, size, workers)
    return Evaluation(extractor, mu, sigma)


def evaluate(training, evaluation, caught):
    """Log the Frechet distance of samples, drawn and measured by all processes together."""
    settings, extractor = training.settings, evaluation.extractor
    labels = torch.arange(settings.eval_images) % len(training.classes)
    batches = split_batches(len(labels), 100)
    drawn = draw_batches(training.ema, training.codec, labels, batches, dtype=training.dtype,
                         **settings.sampling())
    mu, sigma = fid.moments_of(drawn, extractor)
    if RANK == 0:
        distance = fid.frechet_distance(mu, sigma, evaluation.mu, evaluation.sigma)
        training.log.put({"step": training.step, "eval_fid": distance})
        write_log(training.path.parent, training.log.rows)
        say(f"step {training.step:,}: Frechet distance {distance:.4g} of {len(labels):,} samples, "
            f"in features of {extractor.name}", caught)


# ---------------------------------------------------------------------------------- the loop

BAD_STEPS = 10          # so many steps without a finite gradient, one after another, end a run


def catch_signals():
    """A list that signals are added to, so that a run can finish its step and save."""
    caught = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):        # Windows has no SIGHUP
        number = getattr(signal, name, None)
        # nohup has SIGHUP ignored, and so it stays.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: caught.append(number))
    return caught


def any_process(flag):
    """Whether a flag is true in any process."""
    if WORLD == 1:
        return bool(flag)
    count = torch.tensor(int(bool(flag)))
    with with_the_others():
        dist.all_reduce(count)
    return count.item() > 0


def save_together(training):
    """Save the checkpoint, with the sums of all processes in it."""
    training.log.gather()
    from_first(lambda: save_checkpoint(training))


def train(training, model, data, evaluation, caught):
    """Take the steps that are left.

    model: the denoiser, or DDP around it. data: CachedLatents or LiveLatents; None when
    distilling. evaluation: an Evaluation, or None. caught: a list of signals.
    """
    settings, config, device = training.settings, training.config, training.device
    bins = angle_bins(config, settings, device)
    bad = torch.zeros((), device=device)        # steps in a row that were skipped
    before = training.log.rows[-1].get("seconds", 0) if training.log.rows else 0
    begun = time.time() - before
    clock, clock_step = time.time(), training.step
    first_step = training.step

    # A thread reads the next batch while this one is learnt from.
    reader = ThreadPoolExecutor(1)
    if data:
        usable = np.flatnonzero(data.labels >= 0)
        ahead = reader.submit(read_batch, data, usable, training.step, training.rows, settings)

    while training.step < settings.max_steps:
        # A signal to any process, or an image that it cannot read, stops all of them.
        problem = ahead.exception() if data else None
        if any_process(caught or problem):
            break

        # One step.
        if settings.distill:
            values, angle, grad_norm = distill_step(
                training.nets, training.ema, training.optimizers, training.step, training.rows, settings, training.dtype,
                training.group)
        else:
            x, labels = ahead.result()
            z, labels = data.place(x), move(labels, device)
            ahead = reader.submit(read_batch, data, usable, training.step + 1, training.rows, settings)
            noise, angle, share, dropped = draw(training.step, training.rows, settings, config, device)
            labels = labels.masked_fill(dropped, config.num_classes)
            batch = z, labels, noise, angle, share
            values, grad_norm = train_step(model, training.optimizers, training.step, batch, settings,
                                           training.dtype)
            update_average(training.ema, training.denoiser, settings.ema_decay, training.step)
        add_to_log(training.log, values, angle, grad_norm, bins)
        training.step += 1

        # Counted on the device, so that the program does not wait for it at every step.
        bad = torch.where(bad < BAD_STEPS, (bad + 1) * ~torch.isfinite(grad_norm), bad)
        if training.step == first_step + 1:
            after_first = time.time()
        if training.step == first_step + 2:
            grad_norm.item()                    # waits for the device
            say_how_long(settings.max_steps - training.step, time.time() - after_first, caught)

        # What happens every so many steps.
        last = training.step == settings.max_steps
        saving = last or training.step % settings.save_every == 0
        sampling = last or training.step % settings.sample_every == 0
        evaluating = evaluation and (last or training.step % settings.eval_every == 0)
        logging = last or evaluating or training.step % settings.log_every == 0
        if logging or saving:
            training.log.gather()
            end_if_bad(bad, training)
        if logging:
            means, now = training.log.take_means(), time.time()
            rate = (training.step - clock_step) * settings.batch_size / (now - clock)
            if RANK == 0:
                write_line(training, means, rate, now - begun, caught)
        if evaluating:
            evaluate(training, evaluation, caught)
        if saving and (last or bad == 0):       # while steps are skipped, weights may be spoilt
            save_together(training)
        if sampling and RANK == 0:
            write_samples(training)
        if logging or saving or sampling or evaluating:
            barrier()                           # by gloo, for NCCL waits ten minutes only
            clock, clock_step = time.time(), training.step

    reader.shutdown(cancel_futures=True)
    if training.step < settings.max_steps:
        save_together(training)
        if problem:
            raise problem


def end_if_bad(bad, training):
    """End a run whose gradients are not finite any more."""
    if bad < BAD_STEPS:
        return
    def fail():
        raise UserError(f"no finite gradient for {BAD_STEPS} steps, to step {training.step}: run the "
                        f"command again with --resume --lr {training.settings.lr / 3:.1g}")
    from_first(fail)


def say_how_long(steps, seconds, caught):
    """After the second step, which took so many seconds: how long the others will take."""
    left = steps * seconds
    hint = ""
    if left > 24 * 3600:
        hint = "; a GPU, a smaller --preset or fewer --max_steps shorten that"
    say(f"about {time_left(left)} for {steps:,} more steps{hint}", caught)


def say(text, caught):
    """Print in the first process; a pipe that is closed counts as a signal."""
    if RANK > 0:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        caught.append(signal.SIGTERM)


# --------------------------------------------------------------------------------- the bench

def bench(training, model):
    """Print the rate of steps on random latents, and how near it comes to a matrix product's."""
    settings, config, device = training.settings, training.config, training.device
    noise, angle, share, dropped = draw(0, training.rows, settings, config, device)
    batch = noise.flip(1), dropped.long(), noise, angle, share      # flipped noise as latents

    def step():
        if settings.distill:
            return distill_step(training.nets, training.ema, training.optimizers, settings.imitate_steps + 1,
                                training.rows, settings, training.dtype, training.group)[2]
        return train_step(model, training.optimizers, 0, batch, settings, training.dtype)[1]

    images = settings.batch_size / seconds(step, 20)
    peak = matrix_product_rate(device, training.dtype)
    if RANK > 0:
        return
    # In forward passes: training takes three, and a consistency target one more; matching
    # six for two networks, and two for the guided teacher.
    passes = 8 if settings.distill else 4 if settings.consistency_weight else 3
    used = images * passes * flops(config) / WORLD
    memory = ""
    if device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most"
    print(f"{'distilling' if settings.distill else 'training'} {settings.preset} on latents "
          f"{config.tokens}x{config.channels}, batch {settings.batch_size}, {WORLD} x "
          f"{device.type}: {images:.4g} images/s, {used / 1e12:.4g} TFLOP/s each, "
          f"{used / peak:.0%} of a large matrix product's {peak / 1e12:.4g}{memory}")


def matrix_product_rate(device, dtype):
    """FLOP/s of a large matrix product in the type that training multiplies in."""
    size = 8192 if device.type == "cuda" else 1024
    with autocast(device, dtype):
        a = torch.randn(size, size, device=device)
        kind = (a[:8, :8] @ a[:8, :8]).dtype
        a = a.to(kind)
        return 2 * size**3 / seconds(lambda: a @ a, 10)


# -------------------------------------------------------------------------------- the script

def open_data(settings, codec, live, key, data_dir, device, dtype, workers, skip_bad):
    """CachedLatents or, if live, LiveLatents; the classes; and the key of the latents.

    key: that of a resumed run, which takes no other latents; or "".
    """
    if not live:
        cache = open_cache(settings.dataset, settings.codec, codec, settings.flip, key, data_dir,
                           device, dtype, workers, skip_bad)
        data = CachedLatents(cache, device, load_latents(cache, device))
        return data, cache.classes, cache.key

    dataset = from_first(lambda: find_dataset(settings.dataset, data_dir))
    new_key = cache_key(fingerprint(codec), dataset.digest, settings.flip)
    if key not in ("", new_key):
        raise UserError(f"{dataset.name}: has changed since this run began; use a new --out_dir")
    labels = np.tile(dataset.labels, 2) if settings.flip else dataset.labels
    pool = ThreadPoolExecutor(workers)
    data = LiveLatents(dataset, labels, codec, device, dtype, pool)
    return data, dataset.classes, new_key


def prepare_folder(training, resumed):
    """Make room in the run's folder, which holds what an earlier run has written."""
    out_dir = training.path.parent
    for leftover in out_dir.glob("ckpt.pt.*.tmp"):          # of a save that was killed
        leftover.unlink()
    if not resumed:
        set_aside(out_dir)


def describe(training, data, known):
    """Print what is about to be trained. known: how many classes a checkpoint knew, or None."""
    config, classes = training.config, len(training.classes)
    images = "no images needed" if data is None else f"{(data.labels >= 0).sum():,} images"
    familiar = "" if known is None else f" ({known} known to the checkpoint it starts from)"
    print(f"{images}, {classes} classes{familiar}, latents {config.tokens}x{config.channels}, "
          f"{WORLD} x {training.device.type}, from step {training.step:,}")
    pairs = [f"{name}={value!r}" for name, value in vars(training.settings).items()]
    print(textwrap.fill(" ".join(pairs), 88, subsequent_indent="  "), flush=True)
    if classes > SHOWN:
        print(f"grids of samples show the first {SHOWN} classes")


def main():
    args, flags = parse_args()
    if args.live and args.skip_bad:
        raise UserError("--live: encodes images as they are read; use --skip_bad without it")
    device = join(args.device, args.weights_dir)
    plan = from_first(lambda: plan_run(flags, args.out_dir, args.resume, args.data_dir))
    settings, path, source, resumed = plan
    start = load_checkpoint(source) if source else None
    if resumed and start["step"] >= settings.max_steps:
        if RANK == 0:
            print(f"{path}: is complete, with {start['step']:,} steps; a larger --max_steps "
                  "goes on")
        return
    group = None
    if WORLD > 1 and device.type == "cuda":
        # A node that compiles without a cache may keep the others waiting for long.
        group = dist.new_group(backend="nccl", timeout=timedelta(hours=2))

    if args.bench:
        classes = start["classes"] if start else [""] * 1000
        training = make_training(settings, path, device, args.dtype, group, None, classes, "",
                                 start)
        compile_networks(training, args.compile)
        bench(training, wrap_for_processes(training))
        return

    # The codec and the data, encoded first if need be.
    decoder = RANK == 0 or settings.eval_every > 0          # others have nothing to decode
    if start:
        codec = load_codec_of(start, device, decoder)
    else:
        codec = prepare_codec(settings.codec, settings.dataset, args.data_dir, device,
                              args.workers, args.fit_steps, skip_bad=args.skip_bad,
                              decoder=decoder)
    if settings.distill:
        data, classes, key = None, start["classes"], ""     # distillation needs noise only
    else:
        key = start["cache_key"] if resumed else ""
        data, classes, key = open_data(settings, codec, args.live, key, args.data_dir, device,
                                       args.dtype, args.workers, args.skip_bad)
    if len(classes) == 1 and not resumed and "cfg_scale" not in flags:
        settings = replace(settings, cfg_scale=1.0)         # guidance takes two classes

    # The networks, from the beginning or as they were.
    known = None
    if start and not resumed:
        known = len(set(classes) & set(start["classes"]))
    training = make_training(settings, path, device, args.dtype, group, codec, classes, key,
                             None if resumed else start)
    if resumed:
        restore(training, start)
    start = None                # closes the file
    compile_networks(training, args.compile)
    evaluation = None
    if settings.eval_every:
        evaluation = prepare_evaluation(training, args.data_dir, args.workers)

    # All that can fail has come before anything is written.
    from_first(lambda: prepare_folder(training, resumed))
    if RANK == 0:
        describe(training, data, known)
    caught = catch_signals()
    train(training, wrap_for_processes(training), data, evaluation, caught)
    if RANK == 0 and training.step < settings.max_steps:
        print(f"stopped at step {training.step:,}, saved in {path}; run the same command with "
              "--resume to go on")
    elif RANK == 0:
        script = shlex.quote(str(Path(sys.argv[0]).with_name("sample.py")))
        print(f"done: {path}, grids in {path.parent / 'samples'}")
        print(f"next: python {script} --ckpt {shlex.quote(str(path.parent))}")


if __name__ == "__main__":
    run(main)
