"""Train the denoiser on cached latents.

    python train.py                                              # the drawn shapes, on a CPU
    python train.py --dataset data/flowers12/train               # a sub-folder of images per class
    torchrun --nproc_per_node=8 train.py --dataset flowers       # --batch_size is their sum
    python train.py --resume                                     # go on after an interruption
    python train.py --bench --preset XL                          # how fast a step is

Encodes the dataset first if need be (encode.py). Writes out/<dataset>/: ckpt.pt, log.csv, samples/.
What is random at a step is drawn from (seed, step), so a run may be interrupted, or split over
devices, without a change. Ctrl-C and SIGTERM save before they end it.
"""
import argparse
import contextlib
import copy
import csv
import functools
import importlib.util
import itertools
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from encode import (CODECS, SMALL_CODECS, UserError, autocast, cache_key, dataset_place,
                    default_codec, find_dataset, fingerprint, from_first, join, make_parser,
                    open_cache, prepare_codec, run, to_float, within, write_file)
from fid import evaluate, load_extractor, load_reference, open_set
from model import PRESETS, Denoiser, ModelConfig, flops, largest_angle, losses, noise_angle
from sample import (CHECKPOINT_FORMAT, load_checkpoint, load_codec_of, make_filmstrip, make_grid,
                    sample_batches, seconds, write_png)

# ----------------------------------------------------------------------------------- the settings

def flag(default, help, kind=None, **options):
    return field(default=default, metadata=dict(help=help, type=kind) | options)

@dataclass(frozen=True)
class Settings:
    """What makes a run what it is: every field is a flag, and is stored in the checkpoint."""
    dataset: str = flag("shapes", "shapes, flowers, afhq, imagenet, or a folder of class folders")
    preset: str = flag("tiny", "size of the denoiser", choices=PRESETS)
    codec: str = flag("small", "frozen autoencoder", choices=CODECS)
    flip: bool = flag(False, "train on the mirrored images, too")
    seed: int = flag(0, "of weights, order and noise", within(int, 0))
    batch_size: int = flag(256, "images a step, over all devices", within(int, 1))
    accumulate: int = flag(1, "parts of a device's share, one by one for memory", within(int, 1))
    max_steps: int = flag(100_000, "steps of the whole run", within(int, 1))
    lr: float = flag(2e-4, "peak learning rate of AdamW", within(float, 0))
    warmup: int = flag(1000, "steps of linear warm-up", within(int, 1))
    weight_decay: float = flag(0.01, "of AdamW", within(float, 0))
    grad_clip: float = flag(1.0, "largest gradient norm", within(float, 0))
    ema_decay: float = flag(0.9995, "of the weights' moving average", within(float, 0, 1))
    label_dropout: float = flag(0.1, "share of labels replaced by none", within(float, 0, 1))
    sphere: bool = flag(True, "project noisy latents; without it, the paper's ablation")
    max_angle: float = flag(0.0, "degrees of the most noise; 0: by size", within(float, 0, 89.99))
    angle_mean: float = flag(0.0, "mean of the logit-normal law of the noise", float)
    angle_std: float = flag(1.0, "spread of that law", within(float, 0))
    consistency_weight: float = flag(0.1, "of that loss; 0 saves its pass", within(float, 0))
    cfg_scale: float = flag(1.5, "guidance of sampling", within(float, 0, 20))
    cfg_skip: int = flag(0, "first sampling steps without guidance", within(int, 0))
    same_noise: bool = flag(True, "one noise for all sampling steps")
    log_every: int = flag(100, "steps between log lines", within(int, 1))
    save_every: int = flag(2500, "steps between checkpoints", within(int, 1))
    sample_every: int = flag(5000, "steps between sample grids", within(int, 1))
    eval_every: int = flag(0, "steps between FIDs of samples; 0: none", within(int, 0))
    eval_images: int = flag(2000, "samples of such a FID", within(int, 2))
    eval_features: str = flag("inception", "or codec, offline", choices=["inception", "codec"])
    eval_ref: str = flag("", "as fid.py's --ref; default: the dataset")

# A run's settings: the defaults above, then its preset's, its dataset's, and the flags given. The
# sizes are the paper's; the rest of its settings is unknown, and follows RAE and Sphere Encoder.
PRESET_SETTINGS = {
    "tiny": dict(batch_size=128, max_steps=2200, lr=3e-3, warmup=100, ema_decay=0.999,
                 consistency_weight=0.0, cfg_scale=2.0, cfg_skip=1, log_every=50, save_every=500,
                 sample_every=500),
}
DATASET_SETTINGS = {
    "shapes": dict(same_noise=False),           # better here, far worse on photographs
    "flowers": dict(preset="B", weight_decay=0.0, max_steps=32_000),            # 1,000 epochs
    "afhq": dict(preset="B", weight_decay=0.0, max_steps=57_000),               # 1,000 epochs
    "imagenet": dict(preset="XL", weight_decay=0.0, batch_size=1024, max_steps=500_000,
                     save_every=5000),                                          # 400 epochs
}
FIXED = ("dataset", "preset", "codec", "flip", "seed", "batch_size", "sphere", "max_angle")
BAD_STEPS = 10                  # so many in a row without a finite gradient end the run
BINS = 6                        # the loss is also logged for sixths of the noise's law
NOISE_BLOCK = 16                # images whose noise is drawn together

def settings_of(given):
    """The Settings of a new run, from the flags that were given."""
    dataset = given.get("dataset", "shapes")
    merged = DATASET_SETTINGS.get(dataset, {}) | given
    preset = PRESET_SETTINGS.get(merged.get("preset", "tiny"), {})
    return Settings(**dict(codec=default_codec(dataset)) | preset | merged)

def latent_shape(text):
    """An argparse type: tokens, a square grid, x channels."""
    tokens, channels = (int(number) for number in text.split("x"))
    if math.isqrt(tokens) ** 2 != tokens or tokens < 1 or channels < 1:
        raise argparse.ArgumentTypeError(f"must be square tokens x channels, got {text}")
    return tokens, channels

def parse_args():
    """The command line: (its flags, the Settings among them)."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=Path, help="where to write; default: out/<dataset>")
    add("--resume", action="store_true", help="continue the run in out_dir")
    add("--live", action="store_true", help="encode each batch as it is needed, without a cache")
    add("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    add("--keep", type=within(int, 0), default=0, help="earlier checkpoints kept as ckpt_STEP.pt")
    add("--compile", default="auto", choices=["auto", "on", "off"], help="auto: on CUDA")
    add("--bench", action="store_true", help="time steps on random latents instead of training")
    add("--latent", type=latent_shape, default="256x768", help="tokens x channels of --bench")
    group = parser.add_argument_group("settings", "defaults by preset and dataset: see train.py")
    for setting in fields(Settings):
        options = {name: value for name, value in setting.metadata.items() if value is not None}
        if setting.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        group.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, **options)
    args = parser.parse_args()
    names = [setting.name for setting in fields(Settings)]
    return args, {name: value for name, value in vars(args).items() if name in names}

# ----------------------------------------------------------------------------- what is random

@functools.lru_cache(maxsize=2)
def permutation(n, epoch, seed):
    """The order of one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)

def batch_indexes(n, batch_size, step, seed):
    """Which of n images a step takes: epochs follow one another, each in an order of its own."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    indexes = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        indexes[epochs == epoch] = permutation(n, int(epoch), seed)[places[epochs == epoch]]
    return indexes

def draw(step, rows, s, config, device):
    """What is random at a step, for rows (a slice) of its batch.

    Returns noise (B, T, C), angle (B,) radians, nearer (B,), dropped (B,) bool: the same however
    the batch is split, for they come from (seed, step), the noise in blocks of images.
    """
    def generator(*key):
        seed = np.random.SeedSequence((s.seed, step, *key)).generate_state(1)
        return torch.Generator(device).manual_seed(int(seed[0]))

    u = torch.rand(3, s.batch_size, generator=generator(0), device=device)
    place = (torch.arange(s.batch_size, device=device) + u[0]) / s.batch_size   # stratified
    angle = noise_angle(place, config.max_angle, s.angle_mean, s.angle_std)
    first, last = rows.start // NOISE_BLOCK, -(-rows.stop // NOISE_BLOCK)
    shape = (NOISE_BLOCK, config.tokens, config.channels)
    blocks = [torch.randn(shape, generator=generator(1, block), device=device)
              for block in range(first, last)]
    noise = torch.cat(blocks)[rows.start - first * NOISE_BLOCK:][:rows.stop - rows.start]
    return noise, angle[rows], u[1, rows], u[2, rows] < s.label_dropout

# ----------------------------------------------------------------------------------------- a step

def learning_rate(step, s):
    """Linear warm-up, then constant to half of the run, then a cosine down to a hundredth."""
    decay = min(1.0, max(0.0, 2 * step / s.max_steps - 1))
    cosine = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * decay))
    return s.lr * min(1.0, (step + 1) / s.warmup) * cosine

def make_model(config, s, device, cards, choice):
    """(model, what to call in training: DDP around it if need be, its moving average, AdamW).

    choice: of --compile; auto is on CUDA, where Triton and a C compiler are there.
    """
    torch.manual_seed(s.seed)
    model = Denoiser(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.95),
                                  weight_decay=s.weight_decay, fused=device.type != "mps")
    tools = importlib.util.find_spec("triton") and (shutil.which("cc") or shutil.which("gcc"))
    if choice == "on" or (choice == "auto" and device.type == "cuda" and tools):
        model.compile()                         # in place: the state dict keeps its names
    elif choice == "auto" and device.type == "cuda":
        print("not compiled, which needs Triton and a C compiler")
    if not dist.is_initialized():
        return model, model, ema, optimizer
    ddp = nn.parallel.DistributedDataParallel(
        model, [device] if device.type == "cuda" else None, process_group=cards,
        broadcast_buffers=False)
    return model, ddp, ema, optimizer

def train_step(ddp, ema, optimizer, step, s, batch, context):
    """One step of AdamW and the moving average; nothing changes if a gradient is not finite.

    batch: z, labels, noise, angle, nearer of this process. context: makes the autocast context.
    Returns the loss, its two terms and ones, (4, B), and the gradient norm, on the device.
    """
    parts, terms = list(zip(*(tensor.chunk(s.accumulate) for tensor in batch))), []
    optimizer.zero_grad()
    for i, part in enumerate(parts):
        waits = hasattr(ddp, "no_sync") and i < len(parts) - 1      # DDP adds up in the last part
        with ddp.no_sync() if waits else contextlib.nullcontext():
            with context():
                loss, *term = losses(ddp, *part, s.consistency_weight)
            (loss / len(parts)).backward()
        terms.append(torch.stack(term).detach())
    model = getattr(ddp, "module", ddp)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
    optimizer.found_inf = (~torch.isfinite(grad_norm)).float()      # fused AdamW then does nothing
    if grad_norm.device.type != "mps" or torch.isfinite(grad_norm):
        optimizer.step()
    with torch.no_grad():                       # short at first, so that early samples follow
        decay = min(s.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    reconstruction, consistency = torch.cat(terms, dim=1)
    loss = reconstruction + s.consistency_weight * consistency
    return torch.stack([loss, reconstruction, consistency, torch.ones_like(loss)]), grad_norm

def bench(args, s, rank, world, device, cards):
    """Time training steps on random latents, and a large matrix product on the same device."""
    config = ModelConfig(*args.latent, sphere=s.sphere, max_angle=largest_angle(*args.latent),
                         **PRESETS[s.preset])
    model, ddp, ema, optimizer = make_model(config, s, device, cards, args.compile)
    context = functools.partial(autocast, device, args.dtype)
    share = s.batch_size // world
    rows = slice(rank * share, (rank + 1) * share)
    z = torch.randn(share, *args.latent, device=device)
    labels = torch.arange(share, device=device) % config.num_classes
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device)

    def step():
        noise, angle, nearer, _ = draw(0, rows, s, config, device)
        batch = z, labels, noise, angle, nearer
        return train_step(ddp, ema, optimizer, 0, s, batch, context)[1]

    def product():
        with context():
            return a @ a

    images = s.batch_size / seconds(step, 20)
    used = images * (4 if s.consistency_weight else 3) * flops(config) / world / 1e12
    peak = 2 * n ** 3 / seconds(product, 20) / 1e12
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else math.nan
    if rank == 0:
        print(f"{s.preset} on {world} x {device.type}, latents {config.tokens}x{config.channels}, batch "
              f"{s.batch_size}: {images:.2f} images/s, {used:.3f} TFLOP/s a device = "
              f"{used / peak:.0%} of its matrix products' {peak:.3f}, peak memory {memory:.2f} GB")

# ---------------------------------------------------------------------------------------- the data

def read_cache(cache, device):
    """A function from rows to latents and labels; what fits stays in memory, or on the card."""
    labels = torch.from_numpy(cache.labels)
    room = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 2**30
    if 2 * len(labels) * math.prod(cache.shape) > room:
        return lambda rows: (cache.read(rows), labels[rows])
    latents = torch.cat([torch.tensor(cache.chunk(k)) for k in cache.chunks()]).to(device)
    return lambda rows: (latents[rows], labels[rows])

def read_live(dataset, labels, size, args):
    """A function from rows to images and labels; an unreadable image is replaced by the next."""
    pool, bad = ThreadPoolExecutor(args.workers), set()

    def load(row):
        try:
            return dataset.load(row, size), labels[row]
        except UserError as error:
            if not args.skip_bad or len(bad) == len(labels):
                raise
            if row not in bad:
                tqdm.write(f"skipped {error}", file=sys.stderr)
                bad.add(row)
            return load((row + 1) % len(labels))

    def read(rows):
        images, found = zip(*pool.map(load, rows.tolist()))
        return torch.from_numpy(np.stack(images)), torch.tensor(found)
    return read

def open_data(s, key, codec, device, args):
    """What a run trains on: (reader, labels with -1 for unreadable images, classes, cache key)."""
    if not args.live:
        cache = open_cache(s.codec, codec, s.flip, device, args, key)
        return read_cache(cache, device), cache.labels, cache.classes, cache.folder.name[-8:]
    dataset = from_first(lambda: find_dataset(s.dataset, args.data_dir))
    found = cache_key([fingerprint(codec), dataset.digest, s.flip])
    if key not in ("", found):
        raise UserError(f"{s.dataset}: holds other images than when this run began; train again, "
                        "with another --out_dir")
    labels = np.tile(dataset.labels, 1 + s.flip)
    return read_live(dataset, labels, codec.image_size, args), labels, dataset.classes, found

def batches_from(step, read, usable, rows, s):
    """Yield this process's share (rows) of each step's images, read a step ahead in a thread."""
    def load(step):
        return read(usable[batch_indexes(len(usable), s.batch_size, step, s.seed)[rows]])

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load, step)
        for step in itertools.count(step + 1):
            ready, ahead = ahead, thread.submit(load, step)
            yield ready.result()

# ----------------------------------------------------------------------------------------- the run

def reduced(tensor, op=dist.ReduceOp.SUM, group=None):
    """The sum, or what op says, over all processes."""
    tensor = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(tensor, op, group=group)
    return tensor

def stop_on_signals():
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C ends the run at once."""
    asked = threading.Event()

    def ask(number, _):
        asked.set()
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked

def set_aside(out_dir):
    """Move an earlier run's files to out_dir/earlier_N, so that a new run loses nothing."""
    files = [file for file in out_dir.glob("*") if not file.name.startswith("earlier_")]
    if files:
        aside = out_dir / f"earlier_{1 + len(list(out_dir.glob('earlier_*')))}"
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        print(f"{out_dir}: held an earlier run, moved to {aside} (--resume would continue it)")

def resume_command(world):
    """What to type to go on with this run."""
    command = shlex.join(sys.argv + ["--resume"] * ("--resume" not in sys.argv))
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return f"torchrun as before on every node, of {command}"
    return f"torchrun --nproc_per_node={world} {command}" if world > 1 else f"python {command}"

def resumed_settings(checkpoint, given, path):
    """The settings of a run that goes on: the checkpoint's, changed by the flags given."""
    earlier = checkpoint["settings"]
    for name in FIXED:
        if given.get(name, earlier[name]) != earlier[name]:
            raise UserError(f"{path}: was trained with --{name} {earlier[name]}; resume it without "
                            f"--{name} {given[name]}, or start another run with --out_dir")
    return Settings(**earlier | given)

def load_state(checkpoint, model, ema, optimizer, s):
    """Put a checkpoint's weights and optimizer state in place, under this run's settings."""
    fused = optimizer.param_groups[0]["fused"]
    model.load_state_dict(checkpoint["model"])
    ema.load_state_dict(checkpoint["ema"])
    optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
    for group in optimizer.param_groups:
        group.update(weight_decay=s.weight_decay, fused=fused)

def save_checkpoint(path, state, keep=0):
    """Write a checkpoint, down to the disk; the last `keep` ones stay as ckpt_STEP.pt, too."""
    def write(file):
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())

    write_file(path, write)
    if keep:
        numbered = path.with_name(f"ckpt_{state['step']:06d}.pt")
        numbered.unlink(missing_ok=True)
        os.link(path, numbered)                 # the same bytes: the next save makes a new file
        for old in sorted(path.parent.glob("ckpt_*.pt"))[:-keep]:
            old.unlink()

def save_grids(folder, step, draw_images, classes):
    """Write a grid of samples, and a filmstrip of how some of them arise."""
    columns = min(len(classes), 10)
    shown = torch.arange(columns).repeat(6)
    names = [classes[y] for y in shown]
    images = np.concatenate(list(draw_images(shown)))
    write_png(folder / f"step_{step:06d}.png", make_grid(images, names, columns))
    strips = next(draw_images(shown[:columns], return_all=True))
    strip = make_filmstrip(strips, names[:columns], range(1, len(strips) + 1))
    write_png(folder / f"filmstrip_{step:06d}.png", strip)

def start_log(path, columns, step):
    """Begin log.csv, with the complete rows of a resumed run up to its checkpoint's step."""
    lines = [",".join(columns)]
    if step and path.is_file():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        lines += [",".join(row.get(name, "nan") for name in columns)
                  for row in rows if int(row["step"]) <= step]
    write_file(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))

def report(path, row, s):
    """Append a row (name -> number) to log.csv, and print the most of it."""
    try:
        with open(path, "a") as file:
            file.write(",".join(f"{value:.6g}" for value in row.values()) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); fix that and go on with "
                        "--resume") from error
    left = (s.max_steps - row["step"]) * s.batch_size / row["images_per_s"]
    shown = [f"step {row['step']:6d}/{s.max_steps}", f"{left // 60:.0f}:{left % 60:02.0f} left"]
    shown += [f"{name} {value:.4g}" for name, value in row.items()
              if name not in ("step", "skipped") and not name.startswith("loss_") and value == value]
    print("  ".join(shown + [f"{row['skipped']} skipped"] * (row["skipped"] > 0)), flush=True)

def main():
    args, given = parse_args()
    rank, world, device = join(args)
    cards = dist.new_group(backend="nccl") if world > 1 and device.type == "cuda" else None
    if args.bench:
        return bench(args, settings_of(given), rank, world, device, cards)

    # the settings
    name = dataset_place(given.get("dataset", "shapes"), args.data_dir)[0]
    out_dir = args.out_dir or Path("out") / name
    path, s, checkpoint, step, key = out_dir / "ckpt.pt", settings_of(given), None, 0, ""
    if args.resume:
        checkpoint = load_checkpoint(path)
        s = resumed_settings(checkpoint, given, path)
        step, key = checkpoint["step"], checkpoint["cache_key"]
    args.dataset = s.dataset
    if s.batch_size % (world * s.accumulate):
        raise UserError(f"--batch_size {s.batch_size}: cannot be shared by {world} processes in "
                        f"{s.accumulate} parts each; use a multiple of {world * s.accumulate}")

    # the data; what may fail comes before anything is written
    if checkpoint:
        codec = load_codec_of(checkpoint, device)
    else:
        codec = prepare_codec(s.codec, args, device)
    read, labels, classes, key = open_data(s, key, codec, device, args)
    saved_codec = dict(name=s.codec, fingerprint=fingerprint(codec), weights=None)
    if s.codec in SMALL_CODECS:
        saved_codec["weights"] = codec.half_weights()
    if s.eval_every and rank == 0:
        extractor = load_extractor(s.eval_features, device, s.codec, saved_codec["weights"])
        reference = load_reference(*open_set(s.eval_ref or s.dataset, args.data_dir),
                                   codec.image_size, extractor, ["fid"], args.workers)
    if not args.live:
        codec.encoder = None                            # has done its work

    # the model
    config = ModelConfig(*codec.latent_shape, len(classes), sphere=s.sphere,
                         max_angle=s.max_angle or largest_angle(*codec.latent_shape),
                         **PRESETS[s.preset])
    model, ddp, ema, optimizer = make_model(config, s, device, cards, args.compile)
    stats = torch.zeros(4, s.batch_size, device=device)         # sums since the last log line
    bad, worst = torch.zeros(2, device=device)          # steps in a row without a finite gradient
    since, best = step, math.inf
    if checkpoint:
        load_state(checkpoint, model, ema, optimizer, s)
        since, best = checkpoint["since"], checkpoint["best"]
        if rank == 0:
            stats += checkpoint["stats"].to(device)
        del checkpoint                                  # lets go of the file
    edges = noise_angle(torch.arange(1, BINS) / BINS, config.max_angle, s.angle_mean, s.angle_std)
    edges = [f"{edge:.3g}" for edge in [0, *torch.rad2deg(edges).tolist(), config.max_angle]]
    columns = ["step", "loss", "reconstruction", "consistency", "lr", "grad_norm", "images_per_s",
               "skipped", *(f"loss_{low}_{high}" for low, high in zip(edges, edges[1:]))]
    if s.eval_every:
        columns.append(f"{'fid' if s.eval_features == 'inception' else 'codec'}_{s.eval_images}")
    if rank == 0:
        if not args.resume:
            set_aside(out_dir)
        start_log(out_dir / "log.csv", columns, step)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{s.dataset}: {(labels >= 0).sum():,} images of {len(classes)} classes, latents "
              f"{config.tokens}x{config.channels}; {s.preset}, {size:.1f} M parameters; {world} x "
              f"{device.type}; steps {step} to {s.max_steps}\n{s}", flush=True)

    # the loop
    rows = slice(rank * s.batch_size // world, (rank + 1) * s.batch_size // world)
    batches = batches_from(step, read, np.flatnonzero(labels >= 0), rows, s)
    context = functools.partial(autocast, device, args.dtype)
    draw_images = functools.partial(
        sample_batches, ema, codec, batch_size=60, device=device, dtype=args.dtype,
        cfg_scale=s.cfg_scale, cfg_skip=s.cfg_skip, same_noise=s.same_noise)
    asked, stopping, started, timed = stop_on_signals(), False, time.time(), step
    while step < s.max_steps and not stopping:
        z, y = (x.to(device, non_blocking=True) for x in next(batches))
        if args.live:
            with torch.no_grad(), context():
                z = codec.encode(to_float(z, device)).half()            # what the cache would hold
        noise, angle, nearer, dropped = draw(step, rows, s, config, device)
        y = y.masked_fill(dropped, config.num_classes)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, s)
        batch = z.float(), y, noise, angle, nearer
        terms, grad_norm = train_step(ddp, ema, optimizer, step, s, batch, context)
        finite = torch.isfinite(grad_norm)
        bad = (bad + 1) * ~finite
        worst = torch.maximum(worst, bad)
        stats[:, rows] += torch.where(finite, terms, 0)
        step += 1

        stopping = reduced(torch.tensor(float(asked.is_set())), dist.ReduceOp.MAX).item() > 0
        ending = stopping or step == s.max_steps
        evaluating = s.eval_every and step % s.eval_every == 0
        logging = step % s.log_every == 0 or step == s.max_steps or evaluating
        saving = step % s.save_every == 0 or ending
        score = math.nan
        if logging or saving:
            total = reduced(stats, group=cards).cpu()
            if worst.item() >= BAD_STEPS:
                raise UserError(f"the gradient was not finite in {worst.item():.0f} steps in a row, "
                                f"up to step {step}; go on from the last checkpoint at a smaller "
                                f"rate: {resume_command(world)} --lr {s.lr / 3:.1g}")
        if evaluating and rank == 0:
            shown = torch.arange(s.eval_images) % len(classes)
            score = evaluate(draw_images(shown), s.eval_images, extractor, reference, ["fid"])["fid"]
        if logging:
            sums = total.sum(1)
            rate = (step - timed) * s.batch_size / (time.time() - started)
            skipped = step - since - round(sums[3].item() / s.batch_size)
            row = [step, *(sums[:3] / sums[3]).tolist(), lr, grad_norm.item(), rate, skipped]
            row += [(part[1].sum() / part[3].sum()).item() for part in total.tensor_split(BINS, 1)]
            if rank == 0:
                report(out_dir / "log.csv", dict(zip(columns, [*row, score])), s)
            stats.zero_()
            total, since = torch.zeros_like(total), step
        better = score < best
        best = min(best, score) if better else best
        if rank == 0 and (better or saving):
            state = dict(format=CHECKPOINT_FORMAT, step=step, model=model.state_dict(),
                         ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                         config=asdict(config), settings=asdict(s), classes=classes,
                         codec=saved_codec, cache_key=key, since=since, stats=total, best=best)
            if better:
                save_checkpoint(out_dir / "best.pt", state)
            if ending or saving and not bad.item():             # bad steps may follow spoilt weights
                save_checkpoint(path, state, args.keep)
        if rank == 0 and (step % s.sample_every == 0 or step == s.max_steps):
            save_grids(out_dir / "samples", step, draw_images, classes)
        if logging or saving:
            started, timed = time.time(), step

    if rank == 0 and stopping:
        print(f"stopped at step {step}, saved in {path}; go on with: {resume_command(world)}")
    elif rank == 0:
        print(f"done: {path}, grids in {out_dir / 'samples'}\nnext: python sample.py --ckpt {path}")

if __name__ == "__main__":
    run(main)
