"""Train the denoiser on cached latents.

    python train.py                                              # drawn shapes, on a CPU
    torchrun --nproc_per_node=8 train.py --dataset flowers       # --batch_size is global
    python train.py --resume                                     # go on, or start
    python train.py --distill out/shapes                         # then: draw in one pass

Encodes the dataset first, if need be. Writes ckpt.pt, log.csv, curve.png and samples/ to
out/<dataset>/. Ctrl-C saves before it stops. A resumed run takes the same images and noise as
one that was never interrupted; on a CPU it is the same bit for bit.
"""
import argparse
import contextlib
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
    CHUNK, CODECS, FIT_STEPS, RANK, SMALL_CODECS, WORLD_SIZE, Cache, Dataset, Machine,
    UserError, autocast, barrier, bounded, cache_key, check_writable, compile_blocks,
    default_codec, exit_if_peer_died, find_dataset, fingerprint, in_one_line, join_processes,
    latent_shape, load_state, locate, make_parser, on_rank0, open_cache, prepare_codec,
    remove_leftovers, run, sum_over_processes, to_float, try_compile, user_path, write_file)
from model import (
    PRESETS, Denoiser, Distillation, ModelConfig, distribution_matching, flops, imitation,
    largest_angle, losses, noise_angle)
from sample import (
    CHECKPOINT_FORMAT, SAMPLING, draw_curves, draw_grid, find_checkpoint, generate_batches,
    load_checkpoint, load_checkpoint_codec, make_grid, open_checkpoint, predict, split_batches,
    time_per_call, write_picture)


# ========================================================================= the settings

def flag(help, default=MISSING, **options):
    """Declare a field of Settings together with its command-line flag.

    options: of add_argument; without a type among them, it is the field's. A bool gets a
    --no- form, too.
    """
    return field(default=default, metadata=dict(help=help, **options))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What makes a run what it is: every field is a flag, and is stored in the checkpoint.

    A field with a default has that value unless a block below says otherwise; the others are
    set by every block.
    """

    # The data.
    dataset: str = flag("shapes, flowers, afhq, imagenet, or a folder of images", type=user_path)
    codec: str = flag("the frozen autoencoder", choices=CODECS)
    flip: bool = flag("train on mirrored images, too", False)

    # The network, and the noise that it learns to remove.
    preset: str = flag("size of the network", choices=PRESETS)
    sphere: bool = flag("project noisy latents onto the sphere", True)
    max_angle: float = flag("largest noise angle in degrees; 0: by the size of the latent", 0.0,
                            type=bounded(float, 0, 89.99))
    angle_mean: float = flag("mean of the logit-normal distribution of the noise", 0.0)
    angle_std: float = flag("spread of the distribution of the noise", 1.0,
                            type=bounded(float, 0.01))

    # The optimizer. The learning rate rises for `warmup` steps, stays until half of the run,
    # and falls along a cosine to a hundredth.
    batch_size: int = flag("images per step, over all devices", type=bounded(int, 1))
    max_steps: int = flag("steps of the whole run", type=bounded(int, 1))
    optimizer: str = flag("muon is for the matrices of the blocks, with AdamW for the rest",
                          choices=["adamw", "muon"])
    lr: float = flag("peak learning rate", type=bounded(float, 0))
    warmup: int = flag("steps of linear warm-up", type=bounded(int, 1))
    weight_decay: float = flag("decoupled weight decay", type=bounded(float, 0))
    beta1: float = flag("AdamW's decay of the mean of gradients", 0.9,
                        type=bounded(float, 0, 0.99999))
    beta2: float = flag("AdamW's decay of the mean of squares", 0.95,
                        type=bounded(float, 0, 0.99999))
    grad_clip: float = flag("largest norm of the gradient; 0: no limit", 1.0,
                            type=bounded(float, 0))
    ema_decay: float = flag("decay of the average of the weights", type=bounded(float, 0, 1))
    accumulate: int = flag("parts that each device's share of the batch is split into", 1,
                           type=bounded(int, 1))
    seed: int = flag("seed of weights, order and noise", 0, type=bounded(int, 0, 2**63 - 1))

    # The losses.
    label_dropout: float = flag("fraction of labels dropped, which guidance needs", 0.1,
                                type=bounded(float, 0, 1))
    consistency_weight: float = flag("weight of the consistency loss; 0 saves its forward pass",
                                     type=bounded(float, 0))

    # Starting from a checkpoint.
    init_from: str = flag("checkpoint to start from, with its codec", "", metavar="CKPT",
                          type=user_path)
    distill: str = flag("checkpoint to make a one-step generator of", "", metavar="CKPT",
                        type=user_path)
    imitate_steps: int = flag("of distillation: number of imitation steps, before matching", 350,
                              type=bounded(int, 0))
    imitate_lr: float = flag("of distillation: peak learning rate of imitation", 1e-3,
                             type=bounded(float, 0))
    teacher_steps: int = flag("of distillation: steps of the sampler to imitate", 4,
                              type=bounded(int, 1))
    teacher_cfg: float = flag("of distillation: guidance of the frozen denoiser", 1.65,
                              type=bounded(float, 0, 20))

    # How images are drawn from it.
    steps: int = flag("sampling steps", type=bounded(int, 1))
    cfg_scale: float = flag("guidance of sampling, 1 for none", type=bounded(float, 0, 20))
    cfg_skip: int = flag("first sampling steps without guidance, but never the last two",
                         type=bounded(int, 0))
    same_noise: bool = flag("one noise for all sampling steps")

    # What happens every so many steps.
    log_every: int = flag("steps between log lines", type=bounded(int, 1))
    save_every: int = flag("steps between checkpoints", type=bounded(int, 1))
    sample_every: int = flag("steps between grids of samples", type=bounded(int, 1))
    eval_every: int = flag("steps between evaluations; 0: never", 0, type=bounded(int, 0))
    eval_images: int = flag("samples per evaluation", 1000, type=bounded(int, 2))
    eval_ref: str = flag("images or statistics to compare samples with; default: the dataset",
                         "", metavar="REF", type=user_path)
    eval_features: str = flag("network that compares them", "codec",
                              choices=["codec", "inception"])

    def sampling(self):
        """The options of sample.py's functions."""
        return {name: getattr(self, name) for name in SAMPLING}


# A run uses one of these blocks with the flags laid over it (a dataset of one class is drawn
# without guidance). What is not known of the paper's settings follows RAE, Sphere Encoder and
# assets/results.md.

SHAPES = Settings(                  # minutes on a CPU
    dataset="shapes", codec="small", preset="tiny",
    batch_size=128, max_steps=1850,
    optimizer="muon", lr=5e-3,      # too high for photographs
    warmup=100, weight_decay=0.01, ema_decay=0.999,
    consistency_weight=0.0,         # worse at equal time (assets/results.md)
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
    dataset="", codec="small", preset="tiny",
    batch_size=64, max_steps=750,   # the first --imitate_steps of them imitate
    optimizer="adamw", lr=3e-4, warmup=1, weight_decay=0.0, ema_decay=0.99,
    beta1=0.0, beta2=0.99,          # momentum makes matching collapse
    label_dropout=0.0, consistency_weight=0.0,
    steps=1, cfg_scale=1.0, cfg_skip=0, same_noise=True,
    log_every=50, save_every=100, sample_every=100)

BLOCKS = {"shapes": SHAPES, "flowers": FLOWERS, "afhq": AFHQ, "imagenet": IMAGENET}

# What a run takes over from the checkpoint that it starts from.
INHERITED = ("codec", "preset", "sphere", "max_angle", "angle_mean", "angle_std")
# What cannot be changed when a run is resumed.
FIXED_ON_RESUME = (*INHERITED, "flip", "batch_size", "optimizer", "seed", "imitate_steps")
# What distillation does not use.
NOT_FOR_DISTILL = ("flip", "optimizer", "warmup", "accumulate", "label_dropout",
                   "consistency_weight", "init_from")
# What only distillation uses.
ONLY_FOR_DISTILL = "imitate_steps", "imitate_lr", "teacher_steps", "teacher_cfg"


def choose_settings(flags, checkpoint=None):
    """The settings of a new run.

    flags: the settings that the user gave, a dict. checkpoint: the one that the run starts from,
    if any. Raises UserError.
    """
    refuse_meaningless(flags, flags.get("distill"))
    spec = flags.get("dataset", "shapes")
    if flags.get("distill"):
        block = DISTILL
    elif spec in BLOCKS:
        block = BLOCKS[spec]
    else:
        block = replace(FOLDER, dataset=spec, codec=default_codec(spec))
    if checkpoint is None:
        return replace(block, **flags)

    saved = checkpoint["settings"]
    source = flags.get("distill") or flags.get("init_from")
    refuse_changes(flags, saved, INHERITED, source)
    block = replace(block, **{name: saved[name] for name in INHERITED})
    if flags.get("distill"):
        if saved["distill"] or not saved["sphere"]:
            raise UserError(f"{source}: is distilled already, or was trained with --no-sphere")
        block = replace(block, dataset=saved["dataset"])
    return replace(block, **flags)


def refuse_meaningless(flags, distill):
    """Raise UserError if a flag means nothing to distillation, or to other training."""
    if distill:
        names, relation = NOT_FOR_DISTILL, "means nothing to"
    else:
        names, relation = ONLY_FOR_DISTILL, "is only for"
    for name in names:
        if name in flags:
            raise UserError(f"--{name}: {relation} --distill; drop it")


def refuse_changes(flags, saved, names, path):
    """Raise UserError if a flag differs from the settings saved in a checkpoint."""
    for name in names:
        if name in flags and flags[name] != saved[name]:
            raise UserError(f"{path}: has --{name} {saved[name]}; drop yours")


def parse_args():
    """The command line: its namespace, and those settings that were given, a dict."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=user_path, help="where to write; default: out/<dataset>")
    add("--resume", action="store_true", help="go on with the run in out_dir, or start it")
    add("--live", action="store_true", help="encode each batch as it is needed, without a cache")
    add("--fit_steps", type=bounded(int, 1), default=FIT_STEPS,
        help=f"steps to fit a small codec, if there is none yet; default: {FIT_STEPS}")
    add("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    add("--compile", default="auto", choices=["auto", "on", "off"],
        help="torch.compile; auto (the default): on CUDA, and for long training on a CPU")
    add("--bench", action="store_true", help="time the steps of such a run instead")
    group = parser.add_argument_group(
        "settings", "in parentheses the defaults for shapes; those of other runs are in train.py")
    for setting in fields(Settings):
        options = dict(setting.metadata)
        options["help"] += f" ({getattr(SHAPES, setting.name)})"
        if setting.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.setdefault("type", setting.type)
        group.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, **options)
    args = parser.parse_args()
    flags = {name: vars(args)[name] for name in Settings.__annotations__ if name in args}
    return args, flags


@dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    settings: Settings
    path: Path          # of the run's checkpoint
    source: Path        # the checkpoint to load: its own, another run's, or None
    resumed: bool       # whether the run goes on from its own checkpoint


def make_plan(flags, out_dir, resume, data_dir):
    """Choose the settings and the folder of a run. Raises UserError."""
    source = flags.get("distill") or flags.get("init_from")
    if out_dir is None:
        out_dir = default_out_dir(flags, source, data_dir)
    path = Path(out_dir) / "ckpt.pt"
    resumed = resume and path.exists()
    if resumed:
        settings = resumed_settings(flags, path, data_dir)
        source = path
    else:
        if resume:
            print(f"{path}: does not exist, so this run starts from the beginning")
        if flags.get("init_from"):
            refuse_several(source)
        source = find_checkpoint(source) if source else None
        settings = choose_settings(flags, load_checkpoint(source) if source else None)
        if source:                  # "the newest in out/" may be another one tomorrow
            name = "distill" if settings.distill else "init_from"
            settings = replace(settings, **{name: str(source)})

    if settings.distill and settings.max_steps <= settings.imitate_steps:
        raise UserError(f"--max_steps {settings.max_steps}: ends before matching begins; take more "
                        f"steps, or fewer --imitate_steps than {settings.imitate_steps}")
    parts = WORLD_SIZE * settings.accumulate
    if settings.batch_size % parts:
        raise UserError(f"--batch_size: must be a multiple of {parts}")
    check_writable(out_dir, "--out_dir")
    _, folder = locate(settings.dataset, data_dir)
    if Path(out_dir).resolve() == folder.resolve():
        raise UserError(f"--out_dir {out_dir}: holds the images; use another folder")
    return Plan(settings, path, source, resumed)


def refuse_several(source):
    """Raise UserError for a folder of runs: its newest would soon be the run that starts."""
    if Path(source).is_dir() and not (Path(source) / "ckpt.pt").exists():
        found = find_checkpoint(source)
        raise UserError(f"--init_from {source}: is not a run's folder; name one, such as "
                        f"{found.parent}")


def resumed_settings(flags, path, data_dir):
    """The settings of a run that goes on: those saved, with the flags laid over them."""
    saved = load_checkpoint(path)["settings"]
    if flags.get("distill") and not saved["distill"]:
        raise UserError(f"{path}: is not a distillation; use another --out_dir")
    refuse_changes(flags, saved, FIXED_ON_RESUME, path)
    for name in ("init_from", "distill"):
        if flags.get(name) and not may_be_source(flags[name], saved[name], path):
            raise UserError(f"{path}: did not start from {flags[name]}; drop --{name}")
    refuse_meaningless(flags, saved["distill"])
    name, _ = locate(flags.get("dataset", saved["dataset"]), data_dir)
    saved_name, _ = locate(saved["dataset"], data_dir)
    if name != saved_name:
        raise UserError(f"{path}: has --dataset {saved['dataset']}; drop yours")
    sources = {name: saved[name] for name in ("init_from", "distill")}
    return Settings(**{**saved, **flags, **sources})


def may_be_source(named, saved, own):
    """Whether a run may have started from a checkpoint that the user names.

    saved: the one that it did start from, which may be gone by now. own: the run's, which is
    what a folder of runs now gives as its newest.
    """
    if not saved:
        return False
    if not Path(saved).exists():
        return True
    found = find_checkpoint(named).resolve()
    return found in (find_checkpoint(saved).resolve(), own.resolve())


def default_out_dir(flags, source, data_dir):
    """out/<dataset>; a distilled run goes next to its source, and so does one tuned further."""
    if flags.get("distill"):
        path = find_checkpoint(source)
        folder = path.parent
        if folder.name in ("", ".."):       # of ckpt.pt and ../ckpt.pt
            folder = folder.resolve()
        if load_checkpoint(path)["settings"]["distill"]:    # the newest is this very run's
            return folder
        return Path(f"{folder}-distilled")
    name, _ = locate(flags.get("dataset", "shapes"), data_dir)
    out_dir = Path("out") / name
    if source and find_checkpoint(source).resolve() == (out_dir / "ckpt.pt").resolve():
        return Path(f"{out_dir}-tuned")
    return out_dir


# ============================================================================= the data

# A thread reads the next batch while the network learns from this one: it calls `read`, and
# the main thread `to_latents`. The thread must not compute with torch: on a CPU that slows
# down every step of the main thread, and on MPS two threads that use the GPU can crash.

def move(array, device):
    """A numpy array or host tensor on the device.

    On CUDA the program does not wait for the copy. It must on MPS, which would otherwise read
    memory that has been freed.
    """
    return torch.as_tensor(array).to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class LatentsOnCard:
    """Latents that fit on a CUDA card."""

    labels: np.ndarray          # (N,)
    latents: torch.Tensor       # (N, T, C) float16

    def read(self, indexes):
        return indexes

    def to_latents(self, indexes):
        """(B, T, C) float32."""
        return self.latents[move(indexes, self.latents.device)].float()


@dataclass(frozen=True)
class LatentsInMemory:
    """Latents that fit in the memory of a machine without a CUDA card."""

    labels: np.ndarray          # (N,)
    latents: np.ndarray         # (N, T, C) float16
    device: torch.device

    def read(self, indexes):
        return self.latents[indexes]

    def to_latents(self, z):
        """(B, T, C) float32 on the device."""
        return move(z, self.device).float()


@dataclass(frozen=True)
class LatentsOnDisk:
    """Latents that are read from the cache step by step."""

    cache: Cache
    device: torch.device

    @property
    def labels(self):
        return self.cache.labels

    def read(self, indexes):
        # Copies to a CUDA card are asynchronous only from pinned memory.
        z = torch.empty(len(indexes), *self.cache.shape, dtype=torch.float16,
                        pin_memory=self.device.type == "cuda")
        self.cache.read(indexes, z.numpy())
        return z

    def to_latents(self, z):
        """(B, T, C) float32 on the device."""
        return move(z, self.device).float()


@dataclass(frozen=True)
class LiveLatents:
    """Latents that are encoded from the images step by step."""

    dataset: Dataset
    labels: np.ndarray          # (N,), or (2 N,) with the mirrored images
    codec: torch.nn.Module
    machine: Machine
    pool: ThreadPoolExecutor    # decodes image files

    def read(self, indexes):
        load = functools.partial(self.dataset.load, size=self.codec.image_size)
        images = np.stack(list(self.pool.map(load, indexes)))
        if self.machine.device.type == "cuda":
            # The copy waits for the card, so it is made here, and not by the main thread.
            images = torch.from_numpy(images).to(self.machine.device)
        return images

    def to_latents(self, images):
        """(B, T, C) float32 on the device."""
        device = self.machine.device
        with torch.no_grad(), autocast(device, self.machine.dtype):
            z = self.codec.encode(to_float(images, device))
        return z.half().float()     # rounded as in the cache


def place_latents(cache, device):
    """The latents of a cache on the card, in memory, or on disk, as there is room."""
    on_card = device.type == "cuda"
    room = torch.cuda.mem_get_info(device)[0] / 3 if on_card else 2**30
    shape = len(cache.labels), *cache.shape
    if 2 * math.prod(shape) > room:
        return LatentsOnDisk(cache, device)
    if not on_card:
        latents = np.concatenate([cache.chunk(k) for k in cache.chunks()])
        return LatentsInMemory(cache.labels, latents, device)
    latents = torch.empty(shape, dtype=torch.float16, device=device)
    for k in cache.chunks():
        latents[k * CHUNK:(k + 1) * CHUNK] = torch.tensor(cache.chunk(k))
    return LatentsOnCard(cache.labels, latents)


@functools.lru_cache(maxsize=2)
def permutation(n, epoch, seed):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indexes(n, batch_size, step, seed):
    """Which of n images a step takes: epochs follow one another, each in its own order."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, positions = np.divmod(positions, n)
    parts = [permutation(n, int(epoch), seed)[positions[epochs == epoch]]
             for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def read_batch(data, usable, step, share, settings):
    """In the thread: what a step needs of the data.

    usable: the indexes of the images that could be read. share: a slice, this process's part
    of the batch. Returns what `data.to_latents` takes, and the labels (B,).
    """
    batch = batch_indexes(len(usable), settings.batch_size, step, settings.seed)
    indexes = usable[batch[share]]
    return data.read(indexes), data.labels[indexes]


# ============================================================================== a step

# Noise is drawn in blocks of 16 images, each with its own seed. So every process draws only
# what it needs, and the noise of an image does not depend on how the batch is split.
NOISE_BLOCK = 16

# The random numbers of a step come from (seed, step, stream), with a stream for each purpose.
UNIFORM, NOISE, NEW_NOISE, LABELS = range(4)


def generator_for(device, *key):
    """A random generator that depends on the numbers of the key alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed[0]))


def draw_step_noise(step, stream, share, settings, config, device):
    """Gaussian noise (B, T, C) of a training step, for a share (a slice) of its batch."""
    blocks = range(share.start // NOISE_BLOCK, math.ceil(share.stop / NOISE_BLOCK))
    shape = (NOISE_BLOCK, config.tokens, config.channels)
    noise = []
    for block in blocks:
        generator = generator_for(device, settings.seed, step, stream, block)
        noise.append(torch.randn(shape, generator=generator, device=device))
    first = share.start % NOISE_BLOCK
    return torch.cat(noise)[first:first + share.stop - share.start]


def draw(step, share, settings, config, device):
    """The random numbers of a step for a share (a slice) of its batch.

    Returns noise (B, T, C), angle (B,) radians, ratio (B,) in [0, 0.5), dropped (B,) bool.
    """
    generator = generator_for(device, settings.seed, step, UNIFORM)
    u = torch.rand(3, settings.batch_size, generator=generator, device=device)

    # Stratified angles, the k-th image's from the k-th part of the distribution, reduce the
    # variance of the loss. The images come in random order, so no image is tied to an angle.
    quantile = (torch.arange(settings.batch_size, device=device) + u[0]) / settings.batch_size
    angle = noise_angle(quantile, config.max_angle, settings.angle_mean, settings.angle_std)
    noise = draw_step_noise(step, NOISE, share, settings, config, device)
    ratio = u[1] / 2
    dropped = u[2] < settings.label_dropout
    return noise, angle[share], ratio[share], dropped[share]


def learning_rate(step, total_steps, peak, warmup=1):
    """Linear warm-up, then constant to half of the steps, then a cosine down to a hundredth."""
    progress = max(0.0, 2 * step / total_steps - 1)         # 0 until half, then up to 1
    cosine = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warmup) * cosine


class FloatMuon(torch.optim.Muon):
    """torch.optim.Muon in float32, and all matrices of one shape at once.

    torch's own iterates in bf16, which most CPUs compute many times slower.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                updates = orthogonalize(self.momentum(weights, group), group)
                scale = 0.2 * math.sqrt(max(shape))         # "match_rms_adamw"
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates), alpha=-group["lr"] * scale)

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
    """The Newton-Schulz iteration, which pulls the singular values of (n, r, c) towards 1."""
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

    Muon's updates are scaled to the size of AdamW's. Its learning rate is twice --lr.
    """
    matrices, others = [], []
    for name, weight in denoiser.named_parameters():
        is_matrix = name.startswith("blocks") and weight.ndim == 2 and "adaln" not in name
        if is_matrix and settings.optimizer == "muon":
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
    """Clip the gradient and update the weights, unless it is not finite.

    Returns numbers for the log: lr and grad_norm, which stays on the device.
    """
    weights = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            weights += group["params"]
    grad_norm = torch.nn.utils.clip_grad_norm_(weights, grad_clip or math.inf)
    finite = torch.isfinite(grad_norm)
    for optimizer in optimizers:
        if optimizer.defaults.get("fused"):
            # GradScaler's way: if found_inf is 1, a fused optimizer skips the update on the
            # device, so the program need not wait.
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        elif finite:                # Muon has no such switch, so the program waits here
            optimizer.step()
    return dict(lr=lr, grad_norm=grad_norm)


def update_average(ema, denoiser, decay, step):
    """Update the averaged weights, which follow faster in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 1 - decay)


def train_step(model, optimizers, step, batch, settings, dtype="auto"):
    """One step of training.

    model: a Denoiser, or DDP around one. batch: z, labels, noise, angle, ratio. Returns the
    losses, a dict of (B,), and numbers for the log.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    parts = list(zip(*(tensor.chunk(settings.accumulate) for tensor in batch)))
    values = []
    for k, part in enumerate(parts):
        if isinstance(model, DDP):
            # Gradients are averaged over processes once, after the last part.
            model.require_backward_grad_sync = k + 1 == len(parts)
        with autocast(part[0].device, dtype):
            terms = losses(model, *part, settings.consistency_weight)
        (terms["loss"].mean() / len(parts)).backward()
        values.append(terms)

    lr = learning_rate(step, settings.max_steps, settings.lr, settings.warmup)
    numbers = take_step(optimizers, lr, settings.grad_clip)
    joined = {name: torch.cat([terms[name].detach() for terms in values]) for name in values[0]}
    return joined, numbers


# ======================================================================= distillation

def make_distill_optimizers(nets, settings, device):
    """AdamW for imitation, and another for matching, in which `fake` learns twice as fast."""
    fused = device.type != "mps"
    generator, fake = list(nets.generator.parameters()), list(nets.fake.parameters())
    imitating = torch.optim.AdamW([dict(params=generator, lr_scale=1)], betas=(0.9, 0.95),
                                  weight_decay=settings.weight_decay, fused=fused)
    matching = torch.optim.AdamW([dict(params=generator, lr_scale=1),
                                  dict(params=fake, lr_scale=2)],
                                 betas=(settings.beta1, settings.beta2),
                                 weight_decay=settings.weight_decay, fused=fused)
    return [imitating, matching]


def average_gradients(optimizer, group):
    """Give every process the mean of all processes' gradients."""
    for weights in optimizer.param_groups:
        for weight in weights["params"]:
            if weight.grad is not None:
                dist.all_reduce(weight.grad, group=group)
                weight.grad /= WORLD_SIZE


def distill_step(nets, ema, optimizers, step, share, settings, dtype="auto", group=None):
    """One step of distillation: first imitation, then distribution matching.

    nets: a Distillation. ema: the generator's averaged weights, which are updated here. share:
    a slice, this process's part of the batch. group: the processes that exchange gradients.
    Returns the losses, a dict of (B,); the noise angle of each (B,), or None for imitation,
    which has none; and numbers for the log.
    """
    config, device = nets.real.config, next(nets.parameters()).device
    generator = generator_for(device, settings.seed, step, LABELS)
    labels = torch.randint(config.num_classes, (settings.batch_size,), generator=generator,
                           device=device)[share]
    noise, angle, _, _ = draw(step, share, settings, config, device)

    if step < settings.imitate_steps:
        optimizer, peak, angle = optimizers[0], settings.imitate_lr, None
        phase_step, phase_steps = step, settings.imitate_steps
        with autocast(device, dtype):
            target = imitation_target(nets.real, noise, labels, settings)
            values = imitation(nets.generator, noise, labels, target)
    else:
        optimizer, peak = optimizers[1], settings.lr
        phase_step = step - settings.imitate_steps
        phase_steps = settings.max_steps - settings.imitate_steps
        if phase_step == 0:
            # The averaged weights draw better images.
            nets.generator.load_state_dict(ema.state_dict())
        new_noise = draw_step_noise(step, NEW_NOISE, share, settings, config, device)
        with autocast(device, dtype):
            values = distribution_matching(nets, noise, labels, new_noise, angle,
                                           settings.teacher_cfg)

    optimizer.zero_grad()
    values["loss"].mean().backward()
    if WORLD_SIZE > 1:
        average_gradients(optimizer, group)
    lr = learning_rate(phase_step, phase_steps, peak)
    numbers = take_step([optimizer], lr, settings.grad_clip)
    update_average(ema, nets.generator, settings.ema_decay, phase_step)
    return {name: value.detach() for name, value in values.items()}, angle, numbers


def imitation_target(denoiser, noise, labels, settings):
    """What the sampler draws from noise (B, T, C) if every step gets that noise."""
    same_noise = noise.expand(settings.teacher_steps, *noise.shape)
    return predict(denoiser, labels, same_noise, settings.teacher_cfg, cfg_skip=1)[-1]


# =============================================================================== the log

BINS = 6        # the loss is also logged for six equally likely bins of the noise angle


class Log:
    """Rows of named numbers, and the sums that the next row will be made of."""

    def __init__(self):
        self.rows = []          # dicts: column -> number
        self.sums = {}          # name -> (2,), a sum of values and their count

    def add(self, name, values, counted):
        """Add those of the values, (B,) or (), for which counted, (B,) or () bool, is true."""
        counted = counted.expand(values.shape)
        pair = torch.stack([torch.where(counted, values, 0).sum(), counted.sum()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def reduce(self):
        """Move the sums of all processes to rank 0."""
        if WORLD_SIZE == 1 or not self.sums:
            return
        totals = torch.stack(list(self.sums.values())).cpu()
        with exit_if_peer_died():
            dist.reduce(totals, 0)
        for name, pair in zip(self.sums, totals):
            pair = pair if RANK == 0 else torch.zeros(2)
            self.sums[name] = pair.to(self.sums[name].device)

    def pop_means(self):
        """The means of all that was added since the last call."""
        names, totals = list(self.sums), torch.stack(list(self.sums.values())).cpu()
        self.sums = {}
        return dict(zip(names, (totals[:, 0] / totals[:, 1]).tolist()))


def angle_bins(config, settings, device):
    """The inner edges of the bins, (BINS - 1,) radians, and the bins' names in the log."""
    quantiles = torch.arange(1, BINS) / BINS
    inner = noise_angle(quantiles, config.max_angle, settings.angle_mean, settings.angle_std)
    edges = [0.0, *torch.rad2deg(inner).tolist(), config.max_angle]
    return inner.to(device), [f"loss_{low:.4g}_{high:.4g}" for low, high in zip(edges, edges[1:])]


def add_to_log(log, values, angle, numbers, bins):
    """Add a step to the sums of the log: all of its values and numbers, under their names.

    values: the losses, name -> (B,). angle: (B,) radians, or None. numbers: name -> a scalar
    tensor, or a float. bins: of `angle_bins`. A name that starts with "loss_" is drawn as a
    curve.
    """
    finite = torch.isfinite(numbers["grad_norm"])
    for name, value in values.items():
        log.add(name, value, finite)
    for name, number in numbers.items():
        if isinstance(number, float):
            number = torch.full((), number, device=finite.device)       # without a wait
        log.add(name, number, finite)
    log.add("skipped", 1 - finite.float(), torch.ones_like(finite))
    if angle is None:
        return
    inner, names = bins
    found = torch.bucketize(angle, inner)
    for k, name in enumerate(names):
        log.add(name, values["loss"], finite & (found == k))


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


def format_duration(seconds):
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


# ========================================================================== a training run

@dataclass
class Training:
    """The state of a run, and what it was asked for."""

    settings: Settings
    path: Path                      # of its checkpoint
    machine: Machine
    group: object                   # processes that exchange gradients; None: gloo's
    codec: torch.nn.Module
    classes: list                   # names
    cache_key: str                  # of the latents; "" when distilling
    config: ModelConfig
    denoiser: Denoiser              # the network that draws
    nets: Distillation              # with fake and real, or None
    ema: Denoiser                   # its averaged weights
    optimizers: list
    log: Log
    step: int = 0
    mtime: int = None               # of the ckpt.pt that this run wrote last

    @property
    def share(self):
        """This process's part of a batch, a slice."""
        size = self.settings.batch_size
        return slice(RANK * size // WORLD_SIZE, (RANK + 1) * size // WORLD_SIZE)


def make_training(settings, path, machine, group, codec, classes, cache_key, checkpoint=None):
    """A run at its beginning; checkpoint: one whose averaged weights it takes."""
    tokens, channels = latent_shape(settings.codec)
    max_angle = settings.max_angle or largest_angle(tokens, channels)
    config = ModelConfig(tokens, channels, len(classes), sphere=settings.sphere,
                         max_angle=max_angle, **PRESETS[settings.preset])
    torch.manual_seed(settings.seed)
    denoiser = Denoiser(config)
    if checkpoint:
        adopt_weights(denoiser, checkpoint, classes)
    denoiser = denoiser.to(machine.device)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    if settings.distill:
        nets = Distillation(denoiser)
        optimizers = make_distill_optimizers(nets, settings, machine.device)
    else:
        nets = None
        optimizers = make_optimizers(denoiser, settings, machine.device)
    return Training(settings, path, machine, group, codec, classes, cache_key, config, denoiser,
                    nets, ema, optimizers, Log())


def adopt_weights(denoiser, checkpoint, classes):
    """Take a checkpoint's averaged weights; classes that it does not know keep random rows."""
    state = dict(checkpoint["ema"])
    table = denoiser.class_table.weight.detach().clone()
    shape, width = state["class_table.weight"].shape, table.shape[1]
    if shape[1] != width:
        raise UserError(f"the checkpoint: class_table.weight is {tuple(shape)}, but the network's "
                        f"width is {width}")
    known = [*checkpoint["classes"], None]              # None: the row of "no class"
    for row, name in enumerate([*classes, None]):
        if name in known:
            table[row] = state["class_table.weight"][known.index(name)]
    load_state(denoiser, {**state, "class_table.weight": table}, "the checkpoint")


def choose_compile(choice, settings, device):
    """Whether to use torch.compile. auto: on CUDA, and on a CPU if the run is long enough."""
    long_on_cpu = device.type == "cpu" and settings.max_steps >= 1000 and not settings.distill
    if choice == "auto":
        wanted = device.type == "cuda" or long_on_cpu
    else:
        wanted = choice == "on"
    if not wanted:
        return False

    error = try_compile(device)
    if error is None:
        return True
    if choice == "on":
        raise UserError(f"--compile on: does not work here ({in_one_line(error)}); use auto or off")
    if RANK == 0:
        print(f"goes on without torch.compile, which does not work here ({in_one_line(error)})")
    return False


def compile_networks(training, choice):
    """Compile the networks in place, so that state dicts keep their names, if `choice` says so."""
    if not choose_compile(choice, training.settings, training.machine.device):
        return
    if training.nets:
        for network in training.nets.children():
            compile_blocks(network)
    elif training.machine.device.type == "cuda":
        training.denoiser.compile()     # takes a minute for B, but its steps are 2% faster
    else:
        compile_blocks(training.denoiser)
    if RANK == 0:
        print("the first step takes longer: torch.compile (see --compile)", flush=True)


def wrap_for_processes(training):
    """The denoiser, in DDP if there are several processes and it is not being distilled."""
    if WORLD_SIZE == 1 or training.nets:
        return training.denoiser
    # torch.compile cuts the network where a bucket ends, so buckets are large.
    return DDP(training.denoiser, process_group=training.group, bucket_cap_mb=100,
               gradient_as_bucket_view=True)


# ------------------------------------------------------------------------ its checkpoint

def save_checkpoint(training):
    """Write ckpt.pt, unless another run has written it meanwhile."""
    path = training.path
    if path.exists() and path.stat().st_mtime_ns != training.mtime:
        raise UserError(f"{path}: another run has written it meanwhile, so this one stops; give "
                        "each an --out_dir of its own")
    settings, codec = training.settings, training.codec
    small = settings.codec in SMALL_CODECS
    contents = dict(
        format=CHECKPOINT_FORMAT,
        step=training.step,
        model=training.denoiser.state_dict(),
        ema=training.ema.state_dict(),
        nets=training.nets.state_dict() if training.nets else None,
        optimizers=[optimizer.state_dict() for optimizer in training.optimizers],
        config=vars(training.config),
        settings=vars(settings),
        classes=training.classes,
        codec=dict(name=settings.codec, fingerprint=fingerprint(codec),
                   weights=codec.state_dict() if small else None),
        cache_key=training.cache_key,
        log=training.log.rows,
        sums={name: pair.cpu() for name, pair in training.log.sums.items()})
    write_file(path, lambda file: torch.save(contents, file))
    training.mtime = path.stat().st_mtime_ns


def save_together(training):
    """Save the checkpoint, with the sums of all processes in it."""
    training.log.reduce()
    on_rank0(lambda: save_checkpoint(training))


def restore(training, saved):
    """Continue from a checkpoint of this run."""
    path, device = training.path, training.machine.device
    load_state(training.ema, saved["ema"], path)
    if training.nets:
        load_state(training.nets, saved["nets"], path)
    else:
        load_state(training.denoiser, saved["model"], path)
    for optimizer, theirs in zip(training.optimizers, saved["optimizers"]):
        state = theirs["state"]
        if device.type == "cpu":
            state = copy.deepcopy(state)        # the saved one is mapped from the file
        groups = optimizer.state_dict()["param_groups"]         # of the present settings
        optimizer.load_state_dict(dict(state=state, param_groups=groups))
    training.step, training.log.rows = saved["step"], saved["log"]
    for name, pair in saved["sums"].items():
        pair = pair if RANK == 0 else torch.zeros(2)            # they are totals of all ranks
        training.log.sums[name] = pair.to(device)
    training.mtime = path.stat().st_mtime_ns


def prepare_folder(training, resumed):
    """Move what an earlier run has written to a folder of its own, unless this one goes on."""
    out_dir = training.path.parent
    remove_leftovers(out_dir)
    patterns = "ckpt.pt", "log.csv", "samples", "curve.png", "grid_*.png"
    files = [file for pattern in patterns for file in out_dir.glob(pattern)]
    if resumed or not files:
        return
    date = time.strftime("earlier_%Y-%m-%d_%H.%M.%S")
    aside = out_dir / f"{date}_{len(list(out_dir.glob('earlier_*'))) + 1}"
    try:
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
    except OSError as error:
        raise UserError(f"{aside}: cannot take the files of an earlier run ({error.strerror}); "
                        "use another --out_dir") from error
    print(f"{out_dir}: held an earlier run, now in {aside}")


# ---------------------------------------------------------------------------- what it shows

SHOWN = 12              # classes in a grid of samples


def describe(training, data, known):
    """Print what is about to be trained. known: how many classes a checkpoint knew, or None."""
    config, classes = training.config, len(training.classes)
    images = "no images needed"
    if data is not None:
        unreadable = int((data.labels < 0).sum())
        images = f"{len(data.labels) - unreadable:,} images"
        if unreadable:
            images += f" ({unreadable} unreadable left out)"
    familiar = "" if known is None else f" ({known} known to the checkpoint it starts from)"
    print(f"{images}, {classes} classes{familiar}, latents {config.tokens}x{config.channels}, "
          f"{WORLD_SIZE} x {training.machine.device.type}, from step {training.step:,}")
    pairs = [f"{name}={value!r}" for name, value in vars(training.settings).items()]
    print(textwrap.fill(" ".join(pairs), 88, subsequent_indent="  "), flush=True)
    if classes > SHOWN:
        print(f"grids of samples show the first {SHOWN} classes")


def say(text, caught):
    """Print on rank 0; a pipe or terminal that is gone counts as a signal to stop."""
    if RANK > 0:
        return
    try:
        print(text, flush=True)
    except OSError:
        caught.append(signal.SIGTERM)


def write_line(training, means, rate, elapsed, caught):
    """Complete a row of the log, print it, and write log.csv and curve.png."""
    settings, step, rows = training.settings, training.step, training.log.rows
    previous = rows[-1]["step"] if rows else 0
    means["skipped"] = round(means["skipped"] * (step - previous))      # in steps
    rows.append(dict(step=step, **means, images_per_s=rate, seconds=elapsed))
    write_log(training.path.parent, rows)

    left = format_duration((settings.max_steps - step) * settings.batch_size / rate)
    shown = [f"{name} {value:.4g}" for name, value in means.items()
             if not name.startswith("loss_") and (name != "skipped" or value)]
    parts = [f"step {step:,} of {settings.max_steps:,}", *shown, f"{rate:.4g} images/s",
             f"{left} left"]
    say("  ".join(parts), caught)


def say_how_long(steps, step_time, caught):
    """After the second step: how long the others will take."""
    left = steps * step_time
    hint = ""
    if left > 24 * 3600:
        hint = "; a GPU, a smaller --preset or fewer --max_steps would shorten that"
    say(f"about {format_duration(left)} for {steps:,} more steps{hint}", caught)


def write_samples(training):
    """A grid of samples in samples/, always from the same noise, with a column per class."""
    shown = training.classes[:SHOWN]
    labels = torch.arange(len(shown)).repeat(6)
    batches = generate_batches(training.ema, training.codec, labels, [list(range(len(labels)))],
                               dtype=training.machine.dtype, **training.settings.sampling())
    images = np.concatenate(list(batches))
    picture = draw_grid(make_grid(images, shown * 6, len(shown)))
    write_picture(training.path.parent / f"samples/step_{training.step:06d}.png", picture)


@dataclass(frozen=True)
class Evaluation:
    """What samples are compared with while training."""

    extractor: fid.Extractor
    mu: np.ndarray                  # of the reference
    sigma: np.ndarray


def prepare_evaluation(training, skip_bad=False):
    """Open the network and the reference of --eval_every. Raises UserError if one is missing."""
    settings, codec, machine = training.settings, training.codec, training.machine
    reference_path = settings.eval_ref or settings.dataset

    def open_both():
        if settings.eval_features == "inception":
            extractor = fid.inception_extractor(machine.device)
        else:
            extractor = fid.codec_extractor(codec, machine.device)
        return extractor, fid.open_set(reference_path, machine.data_dir)

    def check():
        _, reference = open_both()
        fid.refuse_too_few(reference)

    on_rank0(check)                 # so that one process alone says what is missing
    extractor, reference = open_both()
    size = extractor.size or codec.image_size
    mu, sigma = fid.reference_moments(reference, extractor, size, machine.workers, skip_bad)
    return Evaluation(extractor, mu, sigma)


def evaluate(training, evaluation, caught):
    """Log the Frechet distance of samples, drawn and measured by all processes together."""
    settings, extractor = training.settings, evaluation.extractor
    labels = torch.arange(settings.eval_images) % len(training.classes)
    batches = split_batches(len(labels), 100)
    images = generate_batches(training.ema, training.codec, labels, batches,
                              dtype=training.machine.dtype, **settings.sampling())
    mu, sigma = fid.moments_of(images, extractor)
    if RANK == 0:
        distance = fid.frechet_distance(mu, sigma, evaluation.mu, evaluation.sigma)
        training.log.rows[-1]["eval_fid"] = distance
        write_log(training.path.parent, training.log.rows)
        say(f"step {training.step:,}: Frechet distance {distance:.4g} of {len(labels):,} samples, "
            f"in features of {extractor.name}", caught)


# ---------------------------------------------------------------------------------- the loop

BAD_STEPS = 10          # a run ends after this many steps in a row without a finite gradient


def catch_signals():
    """A list to which signals are added, so that a run can finish its step and save."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        if number == signal.SIGINT and WORLD_SIZE == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(OSError):      # the same Ctrl-C has ended `| tee log`
                print("finishing the step; Ctrl-C again ends the run without saving", flush=True)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):        # Windows has no SIGHUP
        number = getattr(signal, name, None)
        # nohup ignores SIGHUP, and it stays ignored.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    return caught


def any_process(flag):
    """Whether a flag is true in any process."""
    count = sum_over_processes(torch.tensor(int(flag)))
    return count.item() > 0


def train(training, model, data, evaluation, caught):
    """Take the steps that are left.

    model: the denoiser, or DDP around it. data: LatentsOnCard, LatentsInMemory, LatentsOnDisk
    or LiveLatents; None when distilling. evaluation: an Evaluation, or None. caught: a list of
    signals. Returns whether the run is saved as it is at the end.
    """
    settings, config = training.settings, training.config
    device, dtype, share = training.machine.device, training.machine.dtype, training.share
    bins = angle_bins(config, settings, device)
    bad = torch.zeros((), device=device)        # steps in a row without a finite gradient
    earlier = training.log.rows[-1].get("seconds", 0) if training.log.rows else 0
    begun = time.time() - earlier
    clock, clock_step = time.time(), training.step
    first_step = training.step

    # A thread reads the next batch while the network learns from this one.
    reader = ThreadPoolExecutor(1)
    problem = None
    if data:
        usable = np.flatnonzero(data.labels >= 0)
        ahead = reader.submit(read_batch, data, usable, training.step, share, settings)

    while training.step < settings.max_steps:
        # A signal to any process, or an image that it cannot read, stops all of them.
        if data:
            problem = ahead.exception()
        if any_process(bool(caught) or problem is not None):
            break

        # One step.
        if settings.distill:
            values, angle, numbers = distill_step(
                training.nets, training.ema, training.optimizers, training.step, share,
                settings, dtype, training.group)
        else:
            batch, labels = ahead.result()
            z, labels = data.to_latents(batch), move(labels, device)
            ahead = reader.submit(read_batch, data, usable, training.step + 1, share, settings)
            noise, angle, ratio, dropped = draw(training.step, share, settings, config, device)
            labels = labels.masked_fill(dropped, config.num_classes)
            values, numbers = train_step(model, training.optimizers, training.step,
                                         (z, labels, noise, angle, ratio), settings, dtype)
            update_average(training.ema, training.denoiser, settings.ema_decay, training.step)
        add_to_log(training.log, values, angle, numbers, bins)
        training.step += 1

        # The count stays on the device, so that no step waits for it. Ten bad steps in a row
        # leave it at BAD_STEPS until `end_if_bad` looks.
        in_a_row = torch.where(torch.isfinite(numbers["grad_norm"]), 0, bad + 1)
        bad = torch.where(bad < BAD_STEPS, in_a_row, bad)
        if training.step == first_step + 1:
            after_first = time.time()
        if training.step == first_step + 2:
            numbers["grad_norm"].item()         # waits for the device
            say_how_long(settings.max_steps - training.step, time.time() - after_first, caught)

        # What happens every so many steps.
        last = training.step == settings.max_steps
        saving = last or training.step % settings.save_every == 0
        sampling = last or training.step % settings.sample_every == 0
        evaluating = evaluation and (last or training.step % settings.eval_every == 0)
        logging = last or evaluating or training.step % settings.log_every == 0
        if logging or saving:
            training.log.reduce()
            end_if_bad(bad, training)
        if logging:
            means, now = training.log.pop_means(), time.time()
            rate = (training.step - clock_step) * settings.batch_size / (now - clock)
            if RANK == 0:
                write_line(training, means, rate, now - begun, caught)
        if evaluating:
            evaluate(training, evaluation, caught)
        if saving and (last or bad == 0):       # weights may be bad where gradients are
            save_together(training)
        if sampling and RANK == 0:
            write_samples(training)
        if logging or saving or sampling or evaluating:
            barrier()                           # by gloo: NCCL's would time out
            clock, clock_step = time.time(), training.step

    reader.shutdown(cancel_futures=True)
    if training.step < settings.max_steps and bad == 0:
        save_together(training)
    if problem is not None:
        raise problem
    return bool(bad == 0)


def end_if_bad(bad, training):
    """End a run whose gradients are not finite any more."""
    settings = training.settings
    imitating = settings.distill and training.step <= settings.imitate_steps
    name = "imitate_lr" if imitating else "lr"

    def fail():
        raise UserError(f"no finite gradient for {BAD_STEPS} steps in a row before step "
                        f"{training.step}: run the command again with --resume "
                        f"--{name} {getattr(settings, name) / 3:.1g}")

    if bad >= BAD_STEPS:
        on_rank0(fail)


# --------------------------------------------------------------------------------- the bench

def bench(training, model):
    """Print the rate of steps on random latents, and how near it comes to a matrix product's."""
    settings, config, device = training.settings, training.config, training.machine.device
    dtype, share = training.machine.dtype, training.share
    noise, angle, ratio, dropped = draw(0, share, settings, config, device)
    batch = torch.randn_like(noise), torch.zeros_like(dropped).long(), noise, angle, ratio

    def step():
        if settings.distill:
            matching = settings.imitate_steps + 1
            return distill_step(training.nets, training.ema, training.optimizers, matching, share,
                                settings, dtype, training.group)[2]["grad_norm"]
        return train_step(model, training.optimizers, 0, batch, settings, dtype)[1]["grad_norm"]

    images = settings.batch_size / time_per_call(step, 20)
    peak = matrix_product_rate(device, dtype)
    if RANK > 0:
        return

    # In forward passes: forward and backward are three, the consistency loss's target one.
    # Matching trains two networks, which is six, and asks a guided denoiser, which is two.
    passes = 4 if settings.consistency_weight else 3
    if settings.distill:
        passes = 8
    used = images * passes * flops(config) / WORLD_SIZE
    memory = ""
    if device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most"
    print(f"{'distilling' if settings.distill else 'training'} {settings.preset} on latents "
          f"{config.tokens}x{config.channels}, batch {settings.batch_size}, {WORLD_SIZE} x "
          f"{device.type}: {images:.4g} images/s, {used / 1e12:.4g} TFLOP/s each, "
          f"{used / peak:.0%} of a large matrix product's {peak / 1e12:.4g}{memory}")


def matrix_product_rate(device, dtype):
    """FLOP/s of a large matrix product in the type that training multiplies in."""
    size = 8192 if device.type == "cuda" else 1024
    with autocast(device, dtype):
        bf16 = torch.is_autocast_enabled(device.type)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * size**3 / time_per_call(lambda: a @ a, 10)


# -------------------------------------------------------------------------------- the script

def open_data(settings, codec, machine, live, key, skip_bad):
    """The latents to train on, as `train` takes them; their classes, and their key.

    live: encode each batch as it is needed. key: that of a resumed run, which takes no other
    latents; or "".
    """
    if not live:
        cache = open_cache(settings.dataset, codec, machine, settings.flip, key, skip_bad)
        return place_latents(cache, machine.device), cache.classes, cache.key

    dataset = on_rank0(lambda: find_dataset(settings.dataset, machine.data_dir))
    new_key = cache_key(fingerprint(codec), dataset.digest, settings.flip)
    if key not in ("", new_key):
        raise UserError(f"{dataset.name}: has changed since this run began; use a new --out_dir")
    labels = np.tile(dataset.labels, 2) if settings.flip else dataset.labels
    pool = ThreadPoolExecutor(machine.workers)
    return LiveLatents(dataset, labels, codec, machine, pool), dataset.classes, new_key


def check_live(settings, skip_bad):
    """Raise UserError for what --live cannot do."""
    if skip_bad:
        raise UserError("--live: encodes images as they are read; use --skip_bad without it")
    if settings.distill:
        raise UserError("--live: means nothing to --distill, which needs no images; drop it")


def main():
    args, flags = parse_args()
    device = join_processes(args.device, args.weights_dir)
    machine = Machine(device, args.dtype, args.data_dir, args.workers)
    plan = on_rank0(lambda: make_plan(flags, args.out_dir, args.resume, args.data_dir))
    settings, path, resumed = plan.settings, plan.path, plan.resumed
    if args.live:
        on_rank0(lambda: check_live(settings, args.skip_bad))
    checkpoint = None
    if plan.source:
        _, checkpoint = open_checkpoint(plan.source)
    if resumed and checkpoint["step"] >= settings.max_steps:
        if RANK == 0:
            print(f"{path}: is complete, with {checkpoint['step']:,} steps; a larger --max_steps "
                  "goes on")
        return
    group = None
    if WORLD_SIZE > 1 and device.type == "cuda":
        # A node that compiles without a cache may keep the others waiting for long.
        group = dist.new_group(backend="nccl", timeout=timedelta(hours=2))

    if args.bench:
        classes = checkpoint["classes"] if checkpoint else [""] * 1000
        training = make_training(settings, path, machine, group, None, classes, "", checkpoint)
        compile_networks(training, args.compile)
        bench(training, wrap_for_processes(training))
        return

    # The codec and the data, encoded first if need be.
    decoder = RANK == 0 or settings.eval_every > 0          # other ranks decode nothing
    if checkpoint:
        codec = load_checkpoint_codec(checkpoint, device, decoder)
    else:
        codec = prepare_codec(settings.codec, settings.dataset, machine, args.fit_steps,
                              flip=settings.flip, skip_bad=args.skip_bad, decoder=decoder)
    if settings.distill:
        data, classes, key = None, checkpoint["classes"], ""    # it needs noise only
    else:
        key = checkpoint["cache_key"] if resumed else ""
        data, classes, key = open_data(settings, codec, machine, args.live, key, args.skip_bad)
    if len(classes) == 1 and not resumed and "cfg_scale" not in flags:
        settings = replace(settings, cfg_scale=1.0)         # guidance needs two classes

    # The networks, from the beginning or as they were.
    known = None
    if checkpoint and not resumed:
        known = len(set(classes) & set(checkpoint["classes"]))
    training = make_training(settings, path, machine, group, codec, classes, key,
                             None if resumed else checkpoint)
    if resumed:
        restore(training, checkpoint)
    checkpoint = None           # closes the file
    compile_networks(training, args.compile)
    evaluation = None
    if settings.eval_every:
        evaluation = prepare_evaluation(training, args.skip_bad)

    # All checks have passed; only now is the run's folder touched.
    on_rank0(lambda: prepare_folder(training, resumed))
    if RANK == 0:
        describe(training, data, known)
    caught = catch_signals()
    saved = train(training, wrap_for_processes(training), data, evaluation, caught)
    if RANK > 0:
        return
    if training.step < settings.max_steps:
        state = f"saved in {path}"
        if not saved:
            state = "not saved, because its last gradients are not finite"
        print(f"stopped at step {training.step:,}, {state}; run the same command with --resume to "
              "go on")
        return
    script = shlex.quote(str(Path(sys.argv[0]).with_name("sample.py")))
    print(f"done: {path}, grids in {path.parent / 'samples'}")
    print(f"next: python {script} --ckpt {shlex.quote(str(path.parent))}")


if __name__ == "__main__":
    run(main)
