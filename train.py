"""Train the denoiser on cached latents.

    python train.py                                              # the drawn shapes, on a CPU
    torchrun --nproc_per_node=8 train.py --dataset flowers       # --batch_size is of all
    python train.py --resume                                     # go on after an interruption
    python train.py --distill out/shapes/ckpt.pt                 # then: draw in one pass

Encodes the dataset first if need be. Writes ckpt.pt, log.csv, curve.png and samples/ to out_dir.
Interrupting a run, or splitting it over devices, changes nothing; Ctrl-C saves before it stops.
"""
import argparse
import copy
import functools
import math
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel as DDP

from encode import (CODEC_OF, CODECS, SMALL_CODECS, UserError, autocast, cache_key, dataset_place,
                    find_dataset, fingerprint, from_first, join, make_parser,
                    open_cache, prepare_codec, run, to_float, within, write_file)
from model import (PRESETS, Denoiser, Distillation, ModelConfig, distribution_matching, flops,
                   largest_angle, losses, noise_angle)
from sample import (CHECKPOINT_FORMAT, SAMPLING, load_checkpoint, load_codec_of, make_grid,
                    sample_batches, seconds, write_png)

# ----------------------------------------------------------------------------------- the settings

def flag(default, help, **options):
    return field(default=default, metadata=dict(help=help, **options))

@dataclass(frozen=True)
class Settings:
    """What makes a run what it is: every field is a flag, and is stored in the checkpoint."""
    dataset: str = flag("shapes", "shapes, flowers, afhq, imagenet, or a folder of images")
    distill: str = flag("", "checkpoint to make a one-step generator of", metavar="CKPT")
    init_from: str = flag("", "checkpoint to start from, with its codec", metavar="CKPT")
    teacher_cfg: float = flag(1.0, "guidance of the one distilled", type=within(float, 0, 20))
    preset: str = flag("tiny", "size of the denoiser", choices=PRESETS)
    codec: str = flag("small", "frozen autoencoder", choices=CODECS)
    flip: bool = flag(False, "train on mirrored images, too", action=argparse.BooleanOptionalAction)
    seed: int = flag(0, "seed of weights, order and noise", type=within(int, 0))
    batch_size: int = flag(256, "images a step, over all devices", type=within(int, 1))
    accumulate: int = flag(1, "passes a device's share is split into", type=within(int, 1))
    max_steps: int = flag(100_000, "steps of the whole run", type=within(int, 1))
    optimizer: str = flag("adamw", "muon: for the blocks' matrices", choices=["adamw", "muon"])
    lr: float = flag(2e-4, "peak learning rate", type=within(float, 0))
    warmup: int = flag(1000, "steps of linear warm-up", type=within(int, 1))
    weight_decay: float = flag(0.01, "decoupled, as in AdamW", type=within(float, 0))
    ema_decay: float = flag(0.9995, "of the weights' moving average", type=within(float, 0, 1))
    label_dropout: float = flag(0.1, "share of labels left out", type=within(float, 0, 1))
    sphere: bool = flag(True, "project noisy latents", action=argparse.BooleanOptionalAction)
    max_angle: float = flag(0.0, "degrees of most noise; 0: by size", type=within(float, 0, 89.99))
    angle_mean: float = flag(0.0, "mean of the logit-normal law of the noise", type=float)
    angle_std: float = flag(1.0, "spread of that law", type=within(float, 0.01))
    consistency_weight: float = flag(0.1, "of that loss; 0 saves its pass", type=within(float, 0))
    cfg_scale: float = flag(1.5, "guidance of sampling", type=within(float, 0, 20))
    cfg_skip: int = flag(0, "first sampling steps without guidance", type=within(int, 0))
    steps: int = flag(4, "sampling steps", type=within(int, 1))
    same_noise: bool = flag(True, "one noise for all steps", action=argparse.BooleanOptionalAction)
    log_every: int = flag(100, "steps between log lines", type=within(int, 1))
    save_every: int = flag(2500, "steps between checkpoints", type=within(int, 1))
    sample_every: int = flag(5000, "steps between sample grids", type=within(int, 1))

# A run's settings: the defaults above, then its preset's, its dataset's, and the flags given. The
# sizes are the paper's; the rest of its settings is unknown, and follows RAE and Sphere Encoder.
PRESET_SETTINGS = {"tiny": dict(
    batch_size=128, max_steps=1700, lr=3e-3, warmup=100, ema_decay=0.999, consistency_weight=0.0,
    optimizer="muon", cfg_scale=2.0, cfg_skip=1, log_every=50, save_every=500, sample_every=500)}
DATASET_SETTINGS = {
    "shapes": dict(same_noise=False, teacher_cfg=1.5),      # both worse on photographs
    "flowers": dict(preset="B", weight_decay=0.0, max_steps=32_000),            # 1,000 epochs
    "afhq": dict(preset="B", weight_decay=0.0, max_steps=57_000),               # 1,000 epochs
    "imagenet": dict(preset="XL", weight_decay=0.0, batch_size=1024, max_steps=500_000,
                     save_every=5000),                                          # 400 epochs
}
DISTILL_SETTINGS = dict(        # instead of those of the checkpoint that it starts from
    optimizer="adamw", lr=1.5e-4, weight_decay=0, warmup=1, ema_decay=0.99, label_dropout=0,
    steps=1, cfg_scale=1, batch_size=64, max_steps=600, save_every=100, sample_every=100)
FIXED = ("preset", "codec", "sphere", "max_angle", "angle_mean", "angle_std")   # by the start
RESUMED = (*FIXED, "distill", "flip", "seed", "batch_size", "optimizer")
BINS = 6                        # the loss is also logged for sixths of the noise angles
NOISE_BLOCK = 16                # images whose noise is drawn together

def settings_of(flags):
    """The Settings of a new run, from the flags that were given."""
    source = flags.get("distill") or flags.get("init_from")
    start = load_checkpoint(source)["settings"] if source else {}
    if start.get("distill") or flags.get("distill") and not start["sphere"]:
        raise UserError(f"{source}: is distilled already, or was trained with --no-sphere")
    dataset = flags.get("dataset", "shapes")
    values = dict(codec=CODEC_OF.get(dataset, "small")) | DATASET_SETTINGS.get(dataset, {})
    values |= {name: start[name] for name in FIXED if start} | flags
    values = PRESET_SETTINGS.get(values.get("preset", "tiny"), {}) | values
    if "distill" in flags:
        values = start | DISTILL_SETTINGS | flags
    settings = Settings(**values)
    ten = max(1, min(settings.log_every, settings.max_steps // 10))     # lines at least
    return replace(settings, log_every=flags.get("log_every", ten))

def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=Path, help="where to write; default: out/<dataset>")
    add("--resume", action="store_true", help="continue the run in out_dir")
    add("--live", action="store_true", help="encode each batch as it is needed, without a cache")
    add("--fit_steps", type=within(int, 1), default=1500, help="to fit a codec, if there is none")
    add("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    add("--compile", default="auto", choices=["auto", "on", "off"], help="auto: on CUDA")
    add("--bench", action="store_true", help="time steps on random latents instead of training")
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
    noise (B, T, C), angle (B,) radians, share (B,) in [0, 1), dropped (B,) bool."""
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

def make_model(config, settings, classes, start, device, nccl, compile_when):
    """(model, DDP around it if need be, its moving average, optimizers); start: a checkpoint."""
    torch.manual_seed(settings.seed)
    denoiser = Denoiser(config).to(device)
    if start:                                   # the rows of classes new to it stay random
        table, old = denoiser.classes.weight.detach().clone(), start["ema"]["classes.weight"]
        known = {name: row for row, name in enumerate([*start["classes"], None])}   # None: no class
        for row, name in enumerate([*classes, None]):
            if name in known:
                table[row] = old[known[name]]
        denoiser.load_state_dict(start["ema"] | {"classes.weight": table})
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    model = Distillation(denoiser) if settings.distill else denoiser
    optimizers, betas = [], (0.0, 0.99) if settings.distill else (0.9, 0.95)
    others = dict(denoiser.named_parameters())
    if settings.optimizer == "muon":            # for the matrices of attention and MLP
        matrices = [others.pop(name) for name, weight in [*others.items()]
                    if name.startswith("blocks") and weight.ndim == 2 and "adaln" not in name]
        muon = torch.optim.Muon([dict(params=matrices, faster=2)], adjust_lr_fn="match_rms_adamw")
        if device.type != "cuda":               # float32: bf16 can be twenty times slower there
            muon.step = patch.object(torch.Tensor, "bfloat16", torch.Tensor.float)(muon.step)
        optimizers.append(muon)
    groups = [dict(params=others.values())]
    if settings.distill:                        # fake must keep up with the generator
        groups.append(dict(params=model.fake.parameters(), faster=2))
    optimizers.append(torch.optim.AdamW(groups, betas=betas, fused=device.type != "mps"))
    if compile_when == "on" or compile_when == "auto" and device.type == "cuda" and os.name != "nt":
        model.compile()         # in place: the state dict keeps its names; Windows has no Triton
    ddp = DDP(model, process_group=nccl) if dist.is_initialized() else model
    return model, ddp, ema, optimizers

def train_step(ddp, ema, optimizers, step, settings, batch, context):
    """A step of the optimizers, unless a gradient is not finite, and of the moving average.

    batch: z, labels, noise, angle, share. Returns the loss and its terms (3, B), and the norm.
    """
    model = getattr(ddp, "module", ddp)
    parts = list(zip(*(tensor.chunk(settings.accumulate) for tensor in batch)))
    terms = []
    model.zero_grad()
    for part in parts:
        ddp.require_backward_grad_sync = part is parts[-1]          # what DDP's no_sync() sets
        with context():
            if settings.distill:
                loss = distribution_matching(ddp, *part, settings.teacher_cfg)
            else:
                loss = losses(ddp, *part, settings.consistency_weight)
        (loss[0].mean() / len(parts)).backward()
        terms.append(torch.stack(loss).detach())
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    finite = torch.isfinite(grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings) * group.get("faster", 1)
            group["weight_decay"] = settings.weight_decay
        fused = optimizer.defaults.get("fused")         # skips by itself, so that nothing waits
        optimizer.found_inf = (~finite).float() if fused else None
        if fused or finite:
            optimizer.step()
    with torch.no_grad():
        decay = min(settings.ema_decay, (1 + step) / (10 + step))   # early samples follow closely
        denoiser = getattr(model, "generator", model)
        torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 1 - decay)
    return torch.cat(terms, dim=1), grad_norm

def bench(args, settings, context, rank, world, device, nccl):
    """Print the rate of train_step on random latents of the RAE's shape."""
    config, batch_size = ModelConfig(**PRESETS[settings.preset]), settings.batch_size
    _, *trained = make_model(config, settings, [], None, device, nccl, args.compile)
    noise, angle, share, dropped = draw(0, slice(0, batch_size // world), settings, config, device)
    batch = noise.flip(1), dropped.long(), noise, angle, share      # flipped noise as latents
    images = batch_size / seconds(lambda: train_step(*trained, 0, settings, batch, context)[1], 20)
    used = images * (4 if settings.consistency_weight else 3) * flops(config) / world / 1e12
    if rank == 0:
        print(f"{settings.preset} x {world}: {images:.2f} images/s, {used:.3f} TFLOP/s each")

# ----------------------------------------------------------------------------------------- the run

def open_data(settings, rows, start, codec, device, context, args):
    """(function: step -> latents and labels of rows; number of images; classes; latents' key)."""
    if settings.distill:                        # needs no images, only noise and labels
        config = ModelConfig(**start["config"])
        def read_noise(step):
            noise, _, share, _ = draw(step + 2**40, rows, settings, config, device)
            return noise, (share * config.num_classes).long()
        return read_noise, 0, start["classes"], ""
    key = start["cache_key"] if args.resume else ""
    if args.live:
        source = from_first(lambda: find_dataset(settings.dataset, args.data_dir))
        labels = np.tile(source.labels, 1 + settings.flip)
        new_key = cache_key([fingerprint(codec), source.digest, settings.flip])
        if key not in ("", new_key):
            raise UserError(f"{source.name}: has changed since this run began: use a new --out_dir")
    else:
        source = open_cache(settings.codec, codec, settings.flip, device, args, key)
        labels, new_key = source.labels, source.folder.name[-8:]
        take = source.read
        room = torch.cuda.mem_get_info(device)[0] / 3 if device.type == "cuda" else 2**30
        if 2 * len(labels) * math.prod(source.shape) < room:    # into memory, or onto the card
            chunks = [torch.tensor(source.chunk(k), device=device) for k in source.chunks()]
            take = torch.cat(chunks).__getitem__
    usable = np.flatnonzero(labels >= 0)
    def read(step):
        indexes = usable[batch_indexes(len(usable), settings.batch_size, step, settings.seed)[rows]]
        if not args.live:
            return take(indexes), labels[indexes]
        images = next(source.batches([indexes], codec.image_size, args.workers, args.skip_bad))
        good = np.resize([i for i, image in enumerate(images) if image is not None], len(images))
        with torch.no_grad(), context():        # half: what the cache would hold
            z = codec.encode(to_float(np.stack([images[i] for i in good]), device)).half()
        return z, labels[indexes[good]]
    return read, len(usable), source.classes, new_key

def command(world, resume=True):
    """What to type to go on with this run, or to start it again."""
    line = shlex.join(sys.argv + ["--resume"] * (resume and "--resume" not in sys.argv))
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return f"on every node, the same torchrun with {line}"
    return f"torchrun --nproc_per_node={world} {line}" if world > 1 else f"python {line}"

def set_aside(out_dir):
    """Move what an earlier run has written to a folder of its own."""
    names = "ckpt.pt*", "log.csv", "samples", "*.png"
    files = [file for name in names for file in out_dir.glob(name)]
    if files:
        aside = out_dir / time.strftime("earlier_%Y-%m-%d_%H.%M.%S")
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        print(f"{out_dir}: held an earlier run, now in {aside}")

def log_columns(config, settings):
    terms = ["denoising", "matching"] if settings.distill else ["reconstruction", "consistency"]
    inner = noise_angle(torch.arange(1, BINS) / BINS, config.max_angle,
                        settings.angle_mean, settings.angle_std)
    edges = [0, *torch.rad2deg(inner).tolist(), config.max_angle]
    return ["step", "loss", *terms, "lr", "grad_norm", "images_per_s", "skipped", "seconds",
            *(f"loss_{low:.4g}_{high:.4g}" for low, high in zip(edges, edges[1:]))]

def report(out_dir, log, settings):
    """Write log.csv of its rows (dicts: column -> number) and curve.png; print the last one."""
    lines = [list(log[-1])] + [[f"{value:.8g}" for value in row.values()] for row in log]
    write_file(out_dir / "log.csv", lambda file: np.savetxt(file, lines, "%s", ","))
    write_png(out_dir / "curve.png", draw_curve(log))
    step, row = log[-1]["step"], log[-1]
    left = (settings.max_steps - step) * settings.batch_size / row["images_per_s"] / 60
    shown = [f"{value:.4g} {name}" for name, value in list(row.items())[1:8] if value != 0]
    print(f"step {step:6d}/{settings.max_steps}  {left:.1f} min left", *shown, sep="  ", flush=True)

def draw_curve(log):
    """The loss by noise angle over the steps, on a logarithmic scale: an image 800 pixels wide."""
    names = [name for name in log[0] if name.startswith("loss_")]
    values = np.log([[row[name] for name in names] for row in log])             # (rows, BINS)
    low, high = np.nanmin(values), np.nanmax(values) + 1e-3
    picture = Image.new("RGB", (800, 400), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    x = [60 + 600 * row["step"] / log[-1]["step"] for row in log]
    for k, y in enumerate((20 + 340 * (high - values) / (high - low)).T):       # one a line
        colour = f"hsl({55 * k}, 80%, 40%)"
        canvas.line([(a, b) for a, b in zip(x, y) if b >= 0], colour, 2)        # b: perhaps nan
        canvas.text((680, 140 - 20 * k), names[k][5:].replace("_", " to ") + "°", colour, font)
    for y, value in ((12, high), (352, low)):
        canvas.text((10, y), f"{math.exp(value):.3g}", "black", font)
    canvas.text((60, 375), f"loss by noise angle, to step {log[-1]['step']}", "black", font)
    return picture

def main():
    args, flags = parse_args()
    rank, world, device = join(args)
    nccl = dist.new_group(backend="nccl") if world > 1 and device.type == "cuda" else None
    context = functools.partial(autocast, device, args.dtype)
    settings = settings_of(flags)
    name = dataset_place(settings.dataset, args.data_dir)[0] + "-distilled" * bool(settings.distill)
    name += "-tuned" * (Path(settings.init_from) == Path("out") / name / "ckpt.pt")
    out_dir = args.out_dir or Path("out") / name
    path = out_dir / "ckpt.pt"
    source = path if args.resume else settings.distill or settings.init_from
    start = load_checkpoint(source) if source else None
    if args.resume:
        settings = Settings(**start["settings"] | flags)
    for setting in (RESUMED if args.resume else FIXED) if start else ():
        if vars(settings)[setting] != start["settings"][setting]:
            raise UserError(f"{source}: has --{setting} {start['settings'][setting]}; drop yours")
    if settings.batch_size % (world * settings.accumulate):
        raise UserError(f"--batch_size: must be a multiple of {world * settings.accumulate}")
    if args.bench:
        return bench(args, settings, context, rank, world, device, nccl)
    if args.resume and start["step"] >= settings.max_steps:
        return from_first(lambda: print(f"{path}: step {start['step']}, nothing is left to do"))

    # the data and the model; what may fail comes before anything is written
    args.dataset = settings.dataset
    codec = load_codec_of(start, device) if start else prepare_codec(settings.codec, args, device)
    rows = slice(rank * settings.batch_size // world, (rank + 1) * settings.batch_size // world)
    weights = codec.state_dict() if settings.codec in SMALL_CODECS else None
    saved_codec = dict(name=settings.codec, fingerprint=fingerprint(codec), weights=weights)
    read, count, classes, key = open_data(settings, rows, start, codec, device, context, args)
    if len(classes) == 1 and not args.resume and "cfg_scale" not in flags:
        settings = replace(settings, cfg_scale=1.0)         # guidance needs two
    config = ModelConfig(*codec.latent_shape, len(classes), sphere=settings.sphere,
                         max_angle=settings.max_angle or largest_angle(*codec.latent_shape),
                         **PRESETS[settings.preset])
    model, ddp, ema, optimizers = make_model(config, settings, classes, start, device, nccl,
                                             args.compile)
    step, log, columns = 0, [], log_columns(config, settings)
    stats = torch.zeros(4, settings.batch_size, device=device)      # sums since the last log line
    bad = torch.zeros((), device=device)                    # steps in a row that were skipped
    if args.resume:
        step, log = start["step"], start["log"]
        model.load_state_dict(start["trained"])
        for new, old in zip(optimizers, start["optimizers"]):
            new.load_state_dict(new.state_dict() | dict(state=copy.deepcopy(old["state"])))
        stats += start["stats"].to(device) * (rank == 0)
    known = f" ({len(set(classes) & set(start['classes']))} known to {source})" if start else ""
    del start                                               # lets go of the file
    if rank == 0:
        if not step:
            set_aside(out_dir)
        print(f"{count:,} images of {len(classes)} classes{known}, latents {config.tokens}x"
              f"{config.channels}, {world} x {device.type}, from step {step}\n{settings}")

    # the loop
    thread = ThreadPoolExecutor(1)
    ahead = thread.submit(read, step)
    signals, stopping, started, timed = [], False, time.time(), step
    begun = time.time() - (log[-1]["seconds"] if log else 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    while step < settings.max_steps and not stopping:
        z, y = (torch.as_tensor(x).to(device, non_blocking=True) for x in ahead.result())
        ahead = thread.submit(read, step + 1)
        noise, angle, share, dropped = draw(step, rows, settings, config, device)
        batch = z.float(), y.masked_fill(dropped, config.num_classes), noise, angle, share
        terms, grad_norm = train_step(ddp, ema, optimizers, step, settings, batch, context)
        finite = torch.isfinite(grad_norm)
        stats[:3, rows] += torch.where(finite, terms, 0)
        stats[3, rows] += finite
        bad = torch.where(bad < 10, (bad + 1) * ~finite, bad)       # ten are remembered
        step += 1

        stopping = torch.tensor(len(signals))               # of all processes, by gloo
        if world > 1:
            dist.all_reduce(stopping)
        last = step == settings.max_steps
        logging = step % settings.log_every == 0 or last
        saving = step % settings.save_every == 0 or last or stopping
        if logging or saving:
            if world > 1:
                dist.reduce(stats, 0, group=nccl)
                stats *= rank == 0                          # the first process holds all sums
            if bad.item() >= 10:
                raise UserError(f"no finite gradient for {bad.item():.0f} steps, to {step}: try "
                                f"{command(world, path.is_file())} --lr {settings.lr / 3:.1g}")
        if logging and rank == 0:
            bins = torch.stack([part.sum(1) for part in stats.cpu().tensor_split(BINS, dim=1)])
            means, used = bins.sum(0)[:3] / bins.sum(0)[3], bins.sum(0)[3].item()   # bins: (6, 4)
            rate = (step - timed) * settings.batch_size / (time.time() - started)
            skipped = step - (log[-1]["step"] if log else 0) - round(used / settings.batch_size)
            row = [step, *means.tolist(), learning_rate(step - 1, settings), grad_norm.item(),
                   rate, skipped, time.time() - begun, *(bins[:, 1] / bins[:, 3]).tolist()]
            log.append(dict(zip(columns, row)))
            report(out_dir, log, settings)
            stats.zero_()
        if saving and rank == 0 and (last or stopping or not bad.item()):   # else spoilt, perhaps
            state = dict(format=CHECKPOINT_FORMAT, step=step, classes=classes, ema=ema.state_dict(),
                         model=getattr(model, "generator", model).state_dict(),
                         trained=model.state_dict(),
                         optimizers=[optimizer.state_dict() for optimizer in optimizers],
                         config=vars(config), settings=vars(settings), codec=saved_codec,
                         cache_key=key, stats=stats.cpu(), log=log)
            write_file(path, lambda file: torch.save(state, file))
        if rank == 0 and (step % settings.sample_every == 0 or last):
            shown = classes[:10]
            options = {name: vars(settings)[name] for name in SAMPLING}
            images, = sample_batches(ema, codec, torch.arange(len(shown)).repeat(6), 60, device,
                                     dtype=args.dtype, **options)
            write_png(out_dir / f"samples/step_{step:06d}.png",
                      make_grid(images, shown * 6, len(shown)))
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
