"""Train the denoiser on cached latents.

    python train.py                                              # the drawn shapes, on a CPU
    python train.py --dataset path/to/folder                     # a sub-folder of images per class
    torchrun --nproc_per_node=8 train.py --dataset flowers       # --batch_size is their sum
    python train.py --resume                                     # go on after an interruption

Encodes the dataset first if need be (encode.py). Writes out/<dataset>/: ckpt.pt, log.csv, samples/.
Noise is drawn from (seed, step), the order of images from (seed, epoch), so a run may be
interrupted, or split over devices, without a change. Ctrl-C and SIGTERM save before they end it.
"""
import argparse
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
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from encode import (CODECS, SMALL_CODECS, UserError, autocast, cache_key, dataset_place,
                    default_codec, find_dataset, fingerprint, from_first, join, make_parser,
                    open_cache, prepare_codec, reading, run, to_float, within, write_file)
from fid import evaluate, load_extractor, load_reference, open_set
from model import PRESETS, Denoiser, ModelConfig, flops, largest_angle, losses, noise_angle
from sample import (CHECKPOINT_FORMAT, load_checkpoint, load_codec_of, make_filmstrip, make_grid,
                    sample_batches, seconds, write_png)

# ----------------------------------------------------------------------------------- the settings

def flag(default, help, **options):
    return field(default=default, metadata=dict(help=help, **options))

@dataclass(frozen=True)
class Settings:
    """What makes a run what it is: every field is a flag, and is stored in the checkpoint."""
    dataset: str = flag("shapes", "shapes, flowers, afhq, imagenet, or a folder of class folders")
    preset: str = flag("tiny", "size of the denoiser", choices=PRESETS)
    codec: str = flag("small", "frozen autoencoder", choices=CODECS)
    flip: bool = flag(False, "train on mirrored images, too", action=argparse.BooleanOptionalAction)
    seed: int = flag(0, "seed of weights, order and noise", type=within(int, 0))
    batch_size: int = flag(256, "images a step, over all devices", type=within(int, 1))
    accumulate: int = flag(1, "passes a device's share is split into", type=within(int, 1))
    max_steps: int = flag(100_000, "steps of the whole run", type=within(int, 1))
    lr: float = flag(2e-4, "peak learning rate of AdamW", type=within(float, 0))
    warmup: int = flag(1000, "steps of linear warm-up", type=within(int, 1))
    weight_decay: float = flag(0.01, "of AdamW", type=within(float, 0))
    grad_clip: float = flag(1.0, "largest gradient norm; 0: any", type=within(float, 0))
    ema_decay: float = flag(0.9995, "of the weights' moving average", type=within(float, 0, 1))
    label_dropout: float = flag(0.1, "share of labels left out", type=within(float, 0, 1))
    sphere: bool = flag(True, "project noisy latents", action=argparse.BooleanOptionalAction)
    max_angle: float = flag(0.0, "degrees of most noise; 0: by size", type=within(float, 0, 89.99))
    angle_mean: float = flag(0.0, "mean of the logit-normal law of the noise", type=float)
    angle_std: float = flag(1.0, "spread of that law", type=within(float, 0))
    consistency_weight: float = flag(0.1, "of that loss; 0 saves its pass", type=within(float, 0))
    cfg_scale: float = flag(1.5, "guidance of sampling", type=within(float, 0, 20))
    cfg_skip: int = flag(0, "first sampling steps without guidance", type=within(int, 0))
    same_noise: bool = flag(True, "one noise for all steps", action=argparse.BooleanOptionalAction)
    log_every: int = flag(100, "steps between log lines", type=within(int, 1))
    save_every: int = flag(2500, "steps between checkpoints", type=within(int, 1))
    sample_every: int = flag(5000, "steps between sample grids", type=within(int, 1))
    eval_every: int = flag(0, "steps between FIDs of samples; 0: none", type=within(int, 0))
    eval_images: int = flag(2000, "samples of such a FID", type=within(int, 2))
    eval_features: str = flag("inception", "codec works offline", choices=["inception", "codec"])
    eval_ref: str = flag("", "as fid.py's --ref; default: the dataset")

# A run's settings: the defaults above, then its preset's, its dataset's, and the flags given. The
# sizes are the paper's; the rest of its settings is unknown, and follows RAE and Sphere Encoder.
PRESET_SETTINGS = {"tiny": dict(
    batch_size=128, max_steps=2200, lr=3e-3, warmup=100, ema_decay=0.999, consistency_weight=0.0,
    cfg_scale=2.0, cfg_skip=1, log_every=50, save_every=500, sample_every=500)}
DATASET_SETTINGS = {
    "shapes": dict(same_noise=False),           # better here, far worse on photographs
    "flowers": dict(preset="B", weight_decay=0.0, max_steps=32_000),            # 1,000 epochs
    "afhq": dict(preset="B", weight_decay=0.0, max_steps=57_000),               # 1,000 epochs
    "imagenet": dict(preset="XL", weight_decay=0.0, batch_size=1024, max_steps=500_000,
                     save_every=5000),                                          # 400 epochs
}
FIXED = ("preset", "codec", "flip", "seed", "batch_size", "sphere", "max_angle")    # by --resume
BAD_STEPS = 10                  # so many in a row without a finite gradient end the run
BINS = 6                        # the loss is also logged for sixths of the noise angles
NOISE_BLOCK = 16                # images whose noise is drawn together

def settings_of(flags):
    """The Settings of a new run, from the flags that were given."""
    dataset = flags.get("dataset", "shapes")
    merged = DATASET_SETTINGS.get(dataset, {}) | flags
    preset = PRESET_SETTINGS.get(merged.get("preset", "tiny"), {})
    return Settings(**dict(codec=default_codec(dataset)) | preset | merged)

def latent_shape(text):
    """An argparse type: tokens, a square grid, x channels."""
    tokens, channels = (int(number) for number in text.split("x"))
    if math.isqrt(tokens) ** 2 != tokens or tokens < 1 or channels < 1:
        raise argparse.ArgumentTypeError(f"must be square tokens x channels, got {text}")
    return tokens, channels

def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=Path, help="where to write; default: out/<dataset>")
    add("--resume", action="store_true", help="continue the run in out_dir")
    add("--live", action="store_true", help="encode each batch as it is needed, without a cache")
    add("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    add("--compile", default="auto", choices=["auto", "on", "off"], help="auto: on CUDA")
    add("--bench", action="store_true", help="time steps on random latents instead of training")
    add("--latent", type=latent_shape, default="256x768", help="tokens x channels of --bench")
    group = parser.add_argument_group("settings", "defaults by preset and dataset: see train.py")
    for setting in fields(Settings):
        group.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, **setting.metadata)
    args = parser.parse_args()
    return args, {name: vars(args)[name] for name in Settings.__annotations__ if name in args}

# ----------------------------------------------------------------------------------------- a step

@functools.lru_cache(maxsize=2)
def permutation(n, epoch, seed):
    return np.random.default_rng((seed, epoch)).permutation(n)

def batch_indexes(n, batch_size, step, seed):
    """Which of n images a step takes: epochs follow one another, each in an order of its own."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(n, place // n, seed)[place % n] for place in places])

def draw(step, rows, settings, config, device):
    """The random numbers of a step for rows (a slice) of its batch, the same however it is split:
    noise (B, T, C), angle (B,) radians, share (B,) in [0, 1), dropped (B,) bool.
    """
    def generator(*key):
        seed = np.random.SeedSequence((settings.seed, step, *key)).generate_state(1)
        return torch.Generator(device).manual_seed(int(seed[0]))
    u = torch.rand(3, settings.batch_size, generator=generator(0), device=device)
    place = (torch.arange(len(u[0]), device=device) + u[0]) / len(u[0])         # stratified
    angle = noise_angle(place, config.max_angle, settings.angle_mean, settings.angle_std)
    blocks = range(rows.start // NOISE_BLOCK, math.ceil(rows.stop / NOISE_BLOCK))
    shape = (NOISE_BLOCK, config.tokens, config.channels)
    noise = [torch.randn(shape, generator=generator(1, k), device=device) for k in blocks]
    noise = torch.cat(noise)[rows.start % NOISE_BLOCK:][:rows.stop - rows.start]    # cut to rows
    return noise, angle[rows], u[1, rows], u[2, rows] < settings.label_dropout

def learning_rate(step, settings):
    """Linear warm-up, then constant to half of the run, then a cosine down to a hundredth."""
    decay = min(1.0, max(0.0, 2 * step / settings.max_steps - 1))
    cosine = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * decay))
    return settings.lr * min(1.0, (step + 1) / settings.warmup) * cosine

def make_model(config, settings, device, nccl, choice):
    """(model, DDP around it if need be, its moving average, AdamW); choice: of --compile."""
    torch.manual_seed(settings.seed)
    model = Denoiser(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95),
                                  weight_decay=settings.weight_decay, fused=device.type != "mps")
    tools = importlib.util.find_spec("triton") and (shutil.which("cc") or shutil.which("gcc"))
    if choice == "on" or (choice == "auto" and device.type == "cuda" and tools):
        model.compile()                         # in place: the state dict keeps its names
    elif choice == "auto" and device.type == "cuda":
        print("not compiled, which needs Triton and a C compiler")
    ddp = DDP(model, process_group=nccl) if dist.is_initialized() else model
    return model, ddp, ema, optimizer

def train_step(ddp, ema, optimizer, step, settings, batch, context):
    """One step of AdamW, none if a gradient is not finite, and of the moving average.

    batch: z, labels, noise, angle, share of this process. context: returns an autocast context.
    Returns (4, B): loss, reconstruction, consistency, ones to count by; and the gradient norm.
    """
    model = getattr(ddp, "module", ddp)
    parts = list(zip(*(tensor.chunk(settings.accumulate) for tensor in batch)))
    terms = []
    optimizer.zero_grad()
    for part in parts:
        ddp.require_backward_grad_sync = part is parts[-1]          # what DDP's no_sync() sets
        with context():
            loss, *both = losses(ddp, *part, settings.consistency_weight)
        (loss / len(parts)).backward()
        terms.append(torch.stack(both).detach())
    clip = settings.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    finite, fused = torch.isfinite(grad_norm), optimizer.defaults["fused"]
    optimizer.found_inf = (~finite).float() if fused else None
    if fused or finite:                         # a fused one skips by itself, and nothing waits
        optimizer.step()
    with torch.no_grad():
        decay = min(settings.ema_decay, (1 + step) / (10 + step))   # early samples follow closely
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    reconstruction, consistency = torch.cat(terms, dim=1)
    loss = reconstruction + settings.consistency_weight * consistency
    return torch.stack([loss, reconstruction, consistency, torch.ones_like(loss)]), grad_norm

def bench(args, settings, context, rank, world, device, nccl):
    """Print the rate of train_step on random latents, and of a large matrix product."""
    config, batch_size = ModelConfig(*args.latent, **PRESETS[settings.preset]), settings.batch_size
    _, *trained = make_model(config, settings, device, nccl, args.compile)
    noise, angle, share, dropped = draw(0, slice(0, batch_size // world), settings, config, device)
    batch = noise.flip(1), dropped.long(), noise, angle, share      # flipped noise as latents
    step = functools.partial(train_step, *trained, 0, settings, batch, context)
    images = batch_size / seconds(lambda: step()[1], 20)
    used = images * (4 if settings.consistency_weight else 3) * flops(config) / world / 1e12
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device)
    with context():
        matrix = matrix @ matrix                # in autocast's type
        peak = 2 * size ** 3 / seconds(lambda: matrix @ matrix, 20) / 1e12
    if rank == 0:
        print(f"{settings.preset}, {world} x {device.type}, batch {batch_size}: {images:.2f} images"
              f"/s, {used:.3f} TFLOP/s each = {used / peak:.0%} of its matrix products' {peak:.3f}")

# ----------------------------------------------------------------------------------------- the run

def open_data(settings, rows, key, codec, device, args):
    """(function: step -> latents or, live, images, and labels; number of images; classes; key)."""
    if args.live:
        source = from_first(lambda: find_dataset(settings.dataset, args.data_dir))
        labels = np.tile(source.labels, 1 + settings.flip)
        new_key = cache_key([fingerprint(codec), source.digest, settings.flip])
        if key not in ("", new_key):
            raise UserError(f"{source.name}: has changed since this run began: use a new --out_dir")
    else:
        source = open_cache(settings.codec, codec, settings.flip, device, args, key)
        codec.encoder = None                    # has done its work
        labels, new_key = source.labels, source.folder.name[-8:]
        take = source.read
        room = torch.cuda.mem_get_info(device)[0] / 3 if device.type == "cuda" else 2**30
        if 2 * len(labels) * math.prod(source.shape) < room:    # into memory, or onto the card
            chunks = [torch.tensor(source.chunk(k), device=device) for k in source.chunks()]
            take = torch.cat(chunks).__getitem__
    usable = np.flatnonzero(labels >= 0)
    def read(step):
        indexes = batch_indexes(len(usable), settings.batch_size, step, settings.seed)[rows]
        indexes = usable[indexes]
        if not args.live:
            return take(indexes), labels[indexes]
        images = next(source.batches([indexes], codec.image_size, args.workers, args.skip_bad))
        good = np.resize([i for i, image in enumerate(images) if image is not None], len(images))
        return np.stack([images[i] for i in good]), labels[indexes[good]]
    return read, len(usable), source.classes, new_key

def stop_on_signals():
    """A list that Ctrl-C and SIGTERM are added to; a second Ctrl-C ends the run at once."""
    signals = []
    def note(number, _):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return signals

def command(world, resume=True):
    """What to type to go on with this run, or to start it again."""
    line = shlex.join(sys.argv + ["--resume"] * (resume and "--resume" not in sys.argv))
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return f"on every node, the same torchrun with {line}"
    return f"torchrun --nproc_per_node={world} {line}" if world > 1 else f"python {line}"

def save_checkpoint(path, state):
    def write(file):
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())                 # a power cut, too, leaves the old or the new one
    write_file(path, write)

def save_grids(folder, step, draw_images, classes):
    """Write a grid of samples, and a filmstrip of how some of them arise."""
    columns = min(len(classes), 10)
    names = classes[:columns]
    batches = draw_images(torch.arange(columns).repeat(6), return_all=True)
    images = np.concatenate(list(batches), axis=1)                  # (steps, N, S, S, 3)
    write_png(folder / f"step_{step:06d}.png", make_grid(images[-1], names * 6, columns))
    strips = make_filmstrip(images[:, :columns], names, range(1, len(images) + 1))
    write_png(folder / f"filmstrip_{step:06d}.png", strips)

def set_aside(out_dir):
    """Move what an earlier run has written to earlier_N."""
    if (out_dir / "log.csv").exists() or (out_dir / "ckpt.pt").exists():
        places = (out_dir / f"earlier_{number}" for number in itertools.count(1))
        aside = next(place for place in places if not place.exists())
        aside.mkdir()
        for name in ("ckpt.pt", "best.pt", "log.csv", "samples", "grid*.png"):
            for file in out_dir.glob(name):
                file.rename(aside / file.name)
        print(f"{out_dir}: held an earlier run, now in {aside}")

def start_log(out_dir, config, settings, step):
    """Begin log.csv, or keep its rows up to a resumed run's step; returns its columns."""
    if not step:
        set_aside(out_dir)
    inner = noise_angle(torch.arange(1, BINS) / BINS, config.max_angle,
                        settings.angle_mean, settings.angle_std)
    edges = [0, *torch.rad2deg(inner).tolist(), config.max_angle]
    score = "fid" if settings.eval_features == "inception" else "codec"
    columns = ["step", "loss", "reconstruction", "consistency", "lr", "grad_norm", "images_per_s",
               "skipped", *(f"loss_{low:.4g}_{high:.4g}" for low, high in zip(edges, edges[1:])),
               f"{score}_{settings.eval_images}"]
    path = out_dir / "log.csv"
    rows = csv.DictReader(path.read_text().splitlines()) if step and path.is_file() else []
    rows = [row for row in rows if None not in row.values() and int(row["step"]) <= step]
    lines = [columns] + [[row.get(name, "nan") for name in columns] for row in rows]
    write_file(path, lambda file: np.savetxt(file, lines, "%s", ","))
    return columns

def report(path, step, row, settings):
    """Append a row (name -> number) to log.csv, and print most of it."""
    with reading(f"{path}: cannot be written", "fix that, then --resume"), open(path, "a") as file:
        file.write(",".join(f"{value:.8g}" for value in row.values()) + "\n")
    left = (settings.max_steps - step) * settings.batch_size / row["images_per_s"] / 60
    shown = [f"{value:.4g} {name}" for name, value in row.items()
             if value > 0 and name != "step" and not name.startswith("loss_")]
    print(f"step {step:6d}/{settings.max_steps}  {left:.1f} min left", *shown, sep="  ", flush=True)

def main():
    args, flags = parse_args()
    rank, world, device = join(args)
    nccl = dist.new_group(backend="nccl") if world > 1 and device.type == "cuda" else None
    context = functools.partial(autocast, device, args.dtype)
    settings = settings_of(flags)
    out_dir = args.out_dir or Path("out") / dataset_place(settings.dataset, args.data_dir)[0]
    path = out_dir / "ckpt.pt"
    checkpoint = dict(step=0, since=0, best=math.inf, cache_key="")
    if args.resume:
        checkpoint = load_checkpoint(path)
        settings = Settings(**checkpoint["settings"] | flags)
        for name, value in checkpoint["settings"].items():
            if name in FIXED and getattr(settings, name) != value:
                raise UserError(f"{path}: was trained with --{name} {value}; use another --out_dir")
    if settings.batch_size % (world * settings.accumulate):
        raise UserError(f"--batch_size: must be a multiple of {world * settings.accumulate}")
    if args.bench:
        return bench(args, settings, context, rank, world, device, nccl)

    # the data and the model; what may fail comes before anything is written
    args.dataset = settings.dataset
    codec = (load_codec_of(checkpoint, device) if args.resume
             else prepare_codec(settings.codec, args, device))
    rows = slice(rank * settings.batch_size // world, (rank + 1) * settings.batch_size // world)
    weights = codec.state_dict() if settings.codec in SMALL_CODECS else None
    saved_codec = dict(name=settings.codec, fingerprint=fingerprint(codec), weights=weights)
    key = checkpoint["cache_key"]
    read, count, classes, key = open_data(settings, rows, key, codec, device, args)
    if settings.eval_every and rank == 0:
        extractor = load_extractor(settings.eval_features, device, settings.codec, weights)
        reference = load_reference(*open_set(settings.eval_ref or settings.dataset, args.data_dir),
                                   codec.image_size, extractor, ["fid"], args.workers)
    config = ModelConfig(*codec.latent_shape, len(classes), sphere=settings.sphere,
                         max_angle=settings.max_angle or largest_angle(*codec.latent_shape),
                         **PRESETS[settings.preset])
    model, ddp, ema, optimizer = make_model(config, settings, device, nccl, args.compile)
    step, since, best = checkpoint["step"], checkpoint["since"], checkpoint["best"]
    stats = torch.zeros(4, settings.batch_size, device=device)     # sums since the last log line
    bad, worst = torch.zeros(2, device=device)              # steps in a row that were skipped
    if args.resume:
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        moments = copy.deepcopy(checkpoint["optimizer"]["state"])
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=moments))
        stats += checkpoint["stats"].to(device) * (rank == 0)
    del checkpoint                                          # lets go of the file
    if rank == 0:
        columns = start_log(out_dir, config, settings, step)
        print(f"{count:,} images of {len(classes)} classes, latents {config.tokens}x"
              f"{config.channels}, {world} x {device.type}, from step {step}\n{settings}")

    # the loop
    thread = ThreadPoolExecutor(1)
    ahead = thread.submit(read, step)
    draw_images = functools.partial(
        sample_batches, ema, codec, batch_size=30, device=device, dtype=args.dtype,
        cfg_scale=settings.cfg_scale, cfg_skip=settings.cfg_skip, same_noise=settings.same_noise)
    signals, stopping, started, timed = stop_on_signals(), False, time.time(), step
    while step < settings.max_steps and not stopping:
        z, y = (torch.as_tensor(x).to(device, non_blocking=True) for x in ahead.result())
        ahead = thread.submit(read, step + 1)
        if args.live:
            with torch.no_grad(), context():
                z = codec.encode(to_float(z, device)).half()        # what the cache would hold
        noise, angle, share, dropped = draw(step, rows, settings, config, device)
        batch = z.float(), y.masked_fill(dropped, config.num_classes), noise, angle, share
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        terms, grad_norm = train_step(ddp, ema, optimizer, step, settings, batch, context)
        finite = torch.isfinite(grad_norm)
        stats[:, rows] += torch.where(finite, terms, 0)
        bad = (bad + 1) * ~finite
        worst = torch.maximum(worst, bad)
        step += 1

        stopping = torch.tensor(len(signals))               # of all processes, by gloo
        if world > 1:
            dist.all_reduce(stopping)
        last = step == settings.max_steps
        evaluating = settings.eval_every and (step % settings.eval_every == 0 or last)
        logging = step % settings.log_every == 0 or last or evaluating
        saving = step % settings.save_every == 0 or last or stopping or evaluating
        score = math.nan
        if logging or saving:
            if world > 1:
                dist.reduce(stats, 0, group=nccl)
                stats *= rank == 0                          # the first process holds all sums
            if worst.item() >= BAD_STEPS:
                raise UserError(f"no finite gradient for {worst.item():.0f} steps, to {step}: try "
                                f"{command(world, path.is_file())} --lr {settings.lr / 3:.1g}")
        if evaluating and rank == 0:
            images = draw_images(torch.arange(settings.eval_images) % len(classes))
            score = evaluate(images, settings.eval_images, extractor, reference, ["fid"])["fid"]
        if logging and rank == 0:
            bins = torch.stack([part.sum(1) for part in stats.cpu().tensor_split(BINS, dim=1)])
            sums = bins.sum(0)                              # (4,), bins (6, 4)
            rate = (step - timed) * settings.batch_size / (time.time() - started)
            skipped = step - since - round(sums[3].item() / settings.batch_size)
            row = [step, *(sums / sums[3]).tolist()[:3], lr, grad_norm.item(), rate, skipped,
                   *(bins[:, 1] / bins[:, 3]).tolist(), score]
            report(out_dir / "log.csv", step, dict(zip(columns, row)), settings)
            stats.zero_()
            since = step
        if saving and rank == 0:
            best = min(best, score)                         # nan is not less
            state = dict(format=CHECKPOINT_FORMAT, step=step, model=model.state_dict(),
                         ema=ema.state_dict(), optimizer=optimizer.state_dict(), classes=classes,
                         config=vars(config), settings=vars(settings), codec=saved_codec,
                         cache_key=key, since=since, stats=stats.cpu(), best=best)
            if score == best:
                save_checkpoint(out_dir / "best.pt", state)
            if last or stopping or not bad.item():          # bad steps may follow spoilt weights
                save_checkpoint(path, state)
        if rank == 0 and (step % settings.sample_every == 0 or last):
            save_grids(out_dir / "samples", step, draw_images, classes)
        if logging or saving:
            if world > 1:
                dist.barrier()                              # gloo: nccl waits ten minutes only
            started, timed = time.time(), step

    if rank == 0 and stopping:
        print(f"stopped at step {step}, saved in {path}; go on with: {command(world)}")
    elif rank == 0:
        print(f"done: {path}, grids in {out_dir / 'samples'}\nnext: python sample.py --ckpt {path}")

if __name__ == "__main__":
    run(main)
