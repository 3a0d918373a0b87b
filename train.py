"""Train the denoiser on cached latents: one loop, top to bottom.

    python train.py                                              # the drawn shapes, on a laptop's CPU, in minutes
    python train.py --dataset data/flowers12/train               # your own folder: one sub-folder per class
    torchrun --nproc_per_node=8 train.py --dataset flowers       # several devices; --batch_size is their sum
    python train.py --resume                                     # go on after an interruption
    python train.py --bench --preset XL                          # how fast, and how near to what the device can do

Makes the latent cache first when it is missing (encode.py). Writes out/<dataset>/ckpt.pt, log.csv and samples/.
Everything random at a step is drawn for the whole batch from (seed, step), so runs resume, and split over devices, unchanged.
Ctrl-C and SIGTERM save before they end the run.
"""
import argparse
import contextlib
import copy
import csv
import functools
import math
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from encode import (CODECS, HelpFormatter, autocast, codec_path, default_codec, find_dataset, fingerprint, join, load_codec, open_cache, prepare,
                    quiet_worker, read_rows, run, to_float, try_load_image, write_file)
from fid import evaluate, find_reference, load_extractor, load_reference
from model import PRESETS, SPHERES, Denoiser, ModelConfig, flops, largest_angle, losses, noise_angle, sincos_2d
from sample import CHECKPOINT_FORMAT, load_checkpoint, make_filmstrip, make_grid, sample_batches, write_png

try:
    import resource
except ImportError:                                                # Windows
    resource = None

# What a run is made of: COMMON, then the preset's, then the dataset's, then the command line's flags. All are stored in the checkpoint.
# max_angle: None becomes model.largest_angle of the latent.
COMMON = dict(dataset="shapes", flip=False, seed=0, weight_decay=0.01, grad_clip=1.0, accumulate=1, label_dropout=0.1, cfg_skip=0, same_noise=True,
              sphere="global", max_angle=None, angle_mean=0.0, angle_std=1.0, consistency_weight=0.1,
              eval_every=0, eval_images=2000, eval_features="inception")
SETTINGS = {
    # NOTE deviates: no consistency pass, and no guidance at the first of more than two steps (README, "Results")
    "tiny": dict(batch_size=128, max_steps=2200, lr=3e-3, warmup=100, ema_decay=0.999, consistency_weight=0.0,
                 cfg_scale=2.0, cfg_skip=1, log_every=50, save_every=500, sample_every=500),
    "S": dict(batch_size=256, max_steps=100_000, lr=2e-4, warmup=1000, ema_decay=0.9995, cfg_scale=1.5,
              log_every=100, save_every=2500, sample_every=5000),
}
SETTINGS["B"] = SETTINGS["L"] = SETTINGS["XL"] = SETTINGS["S"]
# The paper's sizes; the rest of its settings is not known, so these follow RAE (batch 1024, lr 2e-4, no weight decay) and Sphere Encoder (epochs).
DATASETS = {
    "shapes": dict(same_noise=False),                              # new noise at every step: better here, far worse on CIFAR-10 (README, "Results")
    "flowers": dict(preset="B", weight_decay=0.0, max_steps=32_000),                               # 1,000 epochs
    "afhq": dict(preset="B", weight_decay=0.0, max_steps=57_000),                                  # 1,000 epochs
    "imagenet": dict(preset="XL", weight_decay=0.0, batch_size=1024, max_steps=500_000, save_every=5000),    # 400 epochs
}
BAD_STEPS = 10                  # so many steps in a row whose gradient is not finite end the run
BINS = 6                        # the loss is also logged for angles of 0-15, 15-30, ... 75-90 degrees


@functools.lru_cache(maxsize=4)
def permutation(n, epoch, seed):
    """The order of one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indexes(n, batch_size, step, seed):
    """Positions of the whole batch of a step: epochs follow one another, each in its own order."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    indexes = np.empty(batch_size, np.int64)
    for epoch in np.unique(position // n):
        here = position // n == epoch
        indexes[here] = permutation(n, int(epoch), seed)[position[here] % n]
    return indexes


def learning_rate(step, lr, warmup, max_steps):
    """Linear warm-up, then constant to half of the run, then a cosine down to a hundredth."""
    decay = max(0.0, (step - 0.5 * max_steps) / (0.5 * max_steps))
    return lr * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, decay))))


def set_aside(out_dir):
    """Move an earlier run's files in out_dir to out_dir/earlier_N, so that a new run loses nothing."""
    files = [out_dir / name for name in ("ckpt.pt", "best.pt", "log.csv", "samples") if (out_dir / name).exists()] + sorted(out_dir.glob("ckpt_*.pt"))
    if files:
        number = next(n for n in range(1, 10**6) if not (out_dir / f"earlier_{n}").exists())
        aside = out_dir / f"earlier_{number}"
        aside.mkdir()
        for file in files:
            shutil.move(file, aside / file.name)
        print(f"{out_dir}: holds an earlier run, moved to {aside} (--resume would have continued it)")


def parse_args():
    parser = argparse.ArgumentParser(usage="python train.py [flags], see --help", description=__doc__, formatter_class=HelpFormatter,
                                     epilog="Defaults marked (preset) come from SETTINGS and DATASETS in train.py; with --resume, from the checkpoint.")

    def preset_value(group, name, kind, text, **more):
        group.add_argument(name, **({} if kind is bool else dict(type=kind)), default=argparse.SUPPRESS, help=f"{text} (preset)", **more)

    group = parser.add_argument_group("data and place")
    preset_value(group, "--dataset", str, "shapes, flowers, afhq, imagenet, or a folder with one sub-folder of images per class")
    preset_value(group, "--codec", str, "frozen autoencoder; small: 32x32 images, small64: 64x64, rae: 256x256", choices=CODECS)
    preset_value(group, "--flip", bool, "train on the mirrored views, too", action=argparse.BooleanOptionalAction)
    group.add_argument("--data_dir", default="data", help="folder that holds datasets and caches")
    group.add_argument("--weights_dir", help="where the RAE's weights are, instead of torch.hub's folder")
    group.add_argument("--out_dir", help="where to write; default: out/<dataset>")
    group.add_argument("--resume", action="store_true", help="continue the run in out_dir")
    group.add_argument("--live", action="store_true", help="encode each batch when it is needed instead of caching all latents")
    group.add_argument("--keep", type=int, default=0, help="how many earlier checkpoints to keep, as ckpt_STEP.pt")
    group.add_argument("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    group.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    group = parser.add_argument_group("model and method")
    group.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS, help="size of the denoiser, and its settings; "
                       "default: B for flowers and afhq, XL for imagenet, else tiny")
    preset_value(group, "--sphere", str, "one sphere per latent, or none, the ablation", choices=SPHERES)
    group.add_argument("--max_angle", type=float, default=argparse.SUPPRESS, help="largest noise angle, degrees; default: by the latent's size, 78 to 85")
    preset_value(group, "--angle_mean", float, "mean of the logit-normal law of the noise angle")
    preset_value(group, "--angle_std", float, "spread of the logit-normal law")
    preset_value(group, "--consistency_weight", float, "weight of the consistency loss, 0 turns it off")
    preset_value(group, "--label_dropout", float, "share of labels replaced by none, for guidance")
    group = parser.add_argument_group("optimisation")
    preset_value(group, "--batch_size", int, "images a step, over all devices")
    preset_value(group, "--accumulate", int, "parts that each device's share is computed in, one after the other, to save memory")
    preset_value(group, "--max_steps", int, "steps of the whole run")
    preset_value(group, "--lr", float, "peak learning rate of AdamW")
    preset_value(group, "--warmup", int, "steps of linear warm-up")
    preset_value(group, "--weight_decay", float, "of AdamW")
    preset_value(group, "--grad_clip", float, "largest gradient norm")
    preset_value(group, "--ema_decay", float, "decay of the weights' moving average, which sampling uses")
    preset_value(group, "--seed", int, "of weights, data order and noise")
    group = parser.add_argument_group("watching")
    preset_value(group, "--log_every", int, "steps between log lines")
    preset_value(group, "--save_every", int, "steps between checkpoints")
    preset_value(group, "--sample_every", int, "steps between sample grids")
    preset_value(group, "--cfg_scale", float, "guidance of the sample grids, and sample.py's default")
    preset_value(group, "--cfg_skip", int, "so many first steps of sampling without guidance")
    preset_value(group, "--same_noise", bool, "keep the first noise at every step of sampling", action=argparse.BooleanOptionalAction)
    preset_value(group, "--eval_every", int, "steps between FIDs of samples, 0 for none; the best checkpoint is kept as best.pt")
    preset_value(group, "--eval_images", int, "samples of such a FID")
    preset_value(group, "--eval_features", str, "whose features; codec needs no download", choices=["inception", "codec"])
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too (pip install tensorboard)")
    group = parser.add_argument_group("machine")
    group.add_argument("--bench", action="store_true", help="time training steps on made-up latents instead of training")
    group.add_argument("--latent", default="256x768", help="tokens x channels of --bench")
    group.add_argument("--compile", default="auto", choices=["auto", "on", "off", "both"], help="torch.compile; auto: on cuda; both: for --bench")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on cuda, else float32")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if name in {"preset", "codec", *COMMON, *SETTINGS["tiny"]}}
    for name in ("batch_size", "accumulate", "max_steps", "warmup", "log_every", "save_every", "sample_every", "lr", "grad_clip"):
        if given.get(name, 1) <= 0:
            parser.error(f"--{name} must be above 0, got {given[name]}")
    if not 0 < given.get("max_angle", 1) < 90:
        parser.error(f"--max_angle must lie between 0 and 90 degrees, got {given['max_angle']:g}")
    if given.get("eval_every", 0) < 0 or given.get("eval_images", 2) < 2:
        parser.error("--eval_every must be at least 0 and --eval_images at least 2")
    if args.compile == "both" and not args.bench:
        parser.error("--compile both is for --bench")
    if args.keep < 0:
        parser.error(f"--keep must be at least 0, got {args.keep}")
    if given.get("cfg_skip", 0) < 0:
        parser.error(f"--cfg_skip must be at least 0, got {given['cfg_skip']}")
    for name in ("label_dropout", "ema_decay"):
        if not 0 <= given.get(name, 0) < 1:
            parser.error(f"--{name} must be at least 0 and below 1, got {given[name]:g}")
    return args, given


def settings_of(given):
    """All settings of a new run, from what the command line gives."""
    dataset = given.get("dataset", COMMON["dataset"])
    preset = given.get("preset", DATASETS.get(dataset, {}).get("preset", "tiny"))
    return COMMON | SETTINGS[preset] | DATASETS.get(dataset, {}) | dict(codec=default_codec(dataset)) | given | dict(preset=preset)


def draw(step, s, config, device):
    """Everything random at a step, for the whole batch: (noise (B, T, C), angle (B,) radians, nearer (B,), dropped (B,) bool)."""
    generator = torch.Generator(device).manual_seed(s.seed * 1_000_000_007 + step)
    u = torch.rand(3, s.batch_size, generator=generator, device=device)
    noise = torch.randn(s.batch_size, config.tokens, config.channels, generator=generator, device=device)
    stratified = (torch.arange(s.batch_size, device=device) + u[0]) / s.batch_size
    return noise, noise_angle(stratified, config.max_angle, s.angle_mean, s.angle_std), u[2], u[1] < s.label_dropout


def train_step(model, ema, optimizer, step, s, z, labels, noise, angle, nearer, amp):
    """One step: losses, gradients, AdamW, moving average; weights stay as they are if the gradient is not finite.

    model: the denoiser, or DDP around it. z to nearer: this process's share of the batch. amp: makes the autocast context.
    Returns (loss, reconstruction (B,), consistency (B,), gradient norm), on the device.
    """
    parts, results = [x.chunk(s.accumulate) for x in (z, labels, noise, angle, nearer)], []
    optimizer.zero_grad()
    for i, (z, labels, noise, angle, nearer) in enumerate(zip(*parts)):
        last = i == len(parts[0]) - 1                              # DDP sums gradients over processes in the last part only
        with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            with amp():
                loss, *terms = losses(model, z, labels, noise, angle, nearer, s.consistency_weight, s.sphere)
            (loss * (len(z) / sum(map(len, parts[0])))).backward()
        results.append((loss.detach()[None] * len(z), *(term.detach() for term in terms)))
    loss, reconstruction, consistency = (torch.cat(x) for x in zip(*results))
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
    if grad_norm.device.type != "mps":                             # fused AdamW leaves all alone where found_inf is 1, without asking the host
        optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
    if grad_norm.device.type != "mps" or torch.isfinite(grad_norm).item():
        optimizer.step()
    with torch.no_grad():                                          # the average starts short, so that early samples follow the weights
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(s.ema_decay, (1 + step) / (10 + step)))
    return loss.sum() / len(reconstruction), reconstruction, consistency, grad_norm


def forwards(s):
    """What an image costs in training, in forward passes: a gradient triples one, a pass without gradient counts once."""
    return 4 if s.consistency_weight else 3


def matmul_rate(device, amp):
    """What the device reaches in a large matrix product, FLOP/s: the measure of everything else."""
    n, times = (8192, 20) if device.type == "cuda" else (1536, 8)
    a, b = torch.randn(2, n, n, device=device)
    best = 0.0
    for _ in range(3):
        with amp():
            a = a.to((a @ b).dtype)                                # autocast's type, so that no conversion is timed
            (a @ a)[0, 0].item()
            started = time.time()
            for _ in range(times):
                c = a @ a
            c[0, 0].item()                                         # waits for the device
        best = max(best, 2 * n ** 3 * times / (time.time() - started))
    return best


def make_model(config, s, device, world, compiled):
    """(model, what to call for training: DDP around it if need be, its moving average, AdamW)."""
    torch.manual_seed(s.seed)
    model = Denoiser(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay, fused=device.type != "mps")
    if compiled:
        model.compile()                                            # in place: the state dict keeps its names
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if world > 1 else model
    return model, ddp, ema, optimizer


def bench(args, s, rank, world, device, amp):
    """Time training steps on made-up latents, and print them beside a large matrix product on the same device."""
    try:
        tokens, channels = map(int, args.latent.split("x"))
        config = ModelConfig(tokens=tokens, channels=channels, sphere=s.sphere, max_angle=s.max_angle or largest_angle(tokens, channels), **PRESETS[s.preset])
        sincos_2d(tokens, config.width)                            # says what is wrong with the number of tokens
    except ValueError as error:
        raise ValueError(f"--latent {args.latent}: must be tokens x channels, such as 256x768 ({error})") from error
    for compiled in {"on": [True], "off": [False], "both": [False, True]}.get(args.compile, [device.type == "cuda"]):
        model, ddp, ema, optimizer = make_model(config, s, device, world, compiled)
        share = s.batch_size // world
        z, labels = torch.randn(share, tokens, channels, device=device), torch.arange(share, device=device) % config.num_classes
        done, started = -3, 0.0                                    # three steps warm up
        while done < 3 or (time.time() - started < 15 and done < 30):
            if done == 0:
                rate = matmul_rate(device, amp)
                started = time.time()
            noise, angle, nearer, _ = (x[rank * share:(rank + 1) * share] for x in draw(done + 3, s, config, device))
            loss, *_ = train_step(ddp, ema, optimizer, 0, s, z, labels, noise, angle, nearer, amp)
            done += 1
            if device.type != "cuda" or done % 10 == 0:
                loss.item()                                        # so that the clock is true
        loss.item()
        images = done * s.batch_size / (time.time() - started)
        used = images * forwards(s) * flops(config) / world
        memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 if resource else math.nan
        if rank == 0:
            print(f"{s.preset} on {world} x {device.type}, latents {tokens}x{channels}, batch {s.batch_size}, compile {'on' if compiled else 'off'}: "
                  f"{images:.2f} images/s, {used / 1e12:.3f} TFLOP/s a device = {used / rate:.0%} of its matrix products' {rate / 1e12:.3f}, "
                  f"peak memory {memory:.2f} GB")


def main():
    with contextlib.ExitStack() as cleanup:                        # however it ends: signal handlers, the reading thread, worker processes
        train(cleanup, *parse_args())


def train(cleanup, args, given):
    if args.weights_dir:
        torch.hub.set_dir(args.weights_dir)
    rank, world, device = join(args.device)
    master, amp = rank == 0, functools.partial(autocast, device, args.dtype)

    # settings: the preset's and the dataset's, or the checkpoint's, then the command line's
    settings, checkpoint = settings_of(given), None
    if args.bench:
        return bench(args, argparse.Namespace(**settings), rank, world, device, amp)
    found = None if args.resume and args.out_dir else find_dataset(settings["dataset"], args.data_dir)
    out_dir = Path(args.out_dir or Path("out") / found["name"])
    if args.resume:
        checkpoint = load_checkpoint(out_dir / "ckpt.pt")
        earlier, settings = checkpoint["settings"], checkpoint["settings"] | given
        if found is None or settings["dataset"] != found["dataset"]:
            found = find_dataset(settings["dataset"], args.data_dir)
        for name in ("preset", "codec", "flip", "sphere", "max_angle", "batch_size", "seed"):
            if settings[name] != earlier[name]:
                raise ValueError(f"{out_dir / 'ckpt.pt'}: was trained with --{name} {earlier[name]}, not {settings[name]}; "
                                 "resume it with its own settings, or start anew with another --out_dir")
        if found["name"] != checkpoint["dataset_name"]:
            raise ValueError(f"{out_dir / 'ckpt.pt'}: was trained with --dataset {earlier['dataset']}, not {settings['dataset']}; "
                             "resume it with its own settings, or start anew with another --out_dir")
    s = argparse.Namespace(**settings)
    again = (f"torchrun --nproc_per_node={world}" if world > 1 else "python") + f" train.py --dataset {s.dataset} --out_dir {out_dir} --resume"
    again += "".join(f" --{name} {getattr(args, name)}" for name in ("data_dir", "weights_dir") if getattr(args, name) not in (None, "data"))
    again += "".join(f" --{name}" for name in ("live", "skip_bad") if getattr(args, name))
    if s.batch_size % (world * s.accumulate):
        raise ValueError(f"--batch_size {s.batch_size} cannot be shared by {world} processes in {s.accumulate} parts each; "
                         f"use a multiple of {world * s.accumulate}")
    if args.live and found["paths"] is None:
        raise ValueError(f"--live reads image files, and {s.dataset} has none; leave it out")

    # data: the images themselves, or labels and a memory map of latents
    prepare(found, s.codec, args.data_dir, device, args.workers, args.skip_bad, s.flip, args.live, args.dtype)
    weights = codec_path(s.codec, found["name"], args.data_dir)
    codec = load_codec(s.codec, weights, device, decoder=master) if master or args.live else None
    if args.live:
        all_labels = np.tile(found["labels"], 2 if s.flip else 1)
        meta = dict(shape=(len(all_labels), *codec.latent_shape), classes=found["classes"], codec_sha256=fingerprint(codec), sha256=found["source"])
    else:
        latents, all_labels, meta = open_cache(found, s.codec, args.data_dir, codec, s.flip)
    usable = np.flatnonzero(all_labels >= 0)
    if checkpoint and checkpoint["cache_sha256"] != meta["sha256"]:
        raise ValueError(f"{out_dir / 'ckpt.pt'}: was trained on other latents than {args.data_dir}/{found['name']}/{s.codec} holds now"
                         f"{' (or with --live where now without, or the other way round)' if args.live else ''}; start anew with another --out_dir")
    writer = None
    if master:                                                     # what may fail comes before anything is written
        if s.eval_every:
            extractor = load_extractor(s.eval_features, device, codec=s.codec, codec_file=weights)
            reference = load_reference(*find_reference(s.dataset, args.data_dir), codec.image_size, extractor, ["fid"], workers=args.workers)
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(f"--tensorboard: that package is missing ({error}); pip install tensorboard") from error
            writer = SummaryWriter(out_dir / "tensorboard")
        if not checkpoint:
            set_aside(out_dir)
        if not args.live:
            codec.encoder = None                                   # has done its work

    # model, its moving average, optimizer
    settings["max_angle"] = s.max_angle or largest_angle(*meta["shape"][1:])
    config = ModelConfig(tokens=meta["shape"][1], channels=meta["shape"][2], num_classes=len(meta["classes"]), sphere=s.sphere,
                         max_angle=settings["max_angle"], **PRESETS[s.preset])
    model, ddp, ema, optimizer = make_model(config, s, device, world, args.compile == "on" or (args.compile == "auto" and device.type == "cuda"))
    step = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        if master and checkpoint["world"] != world:
            print(f"{out_dir / 'ckpt.pt'}: was trained by {checkpoint['world']} processes and goes on with {world}: the same order and noise, "
                  "but sums are rounded differently")
    on_card = None                                                 # all latents, where they fit twice
    if device.type == "cuda" and not args.live and 4 * math.prod(meta["shape"]) < torch.cuda.mem_get_info(device)[0]:
        on_card = torch.cat([read_rows(latents, rows).to(device) for rows in np.array_split(np.arange(len(all_labels)), len(all_labels) // 1024 + 1)])

    # log
    columns = ["step", "loss", "reconstruction", "consistency", "lr", "grad_norm", "images_per_s", "mfu", "skipped"]
    columns += [f"loss_{90 // BINS * i}_{90 // BINS * (i + 1)}" for i in range(BINS)]
    columns += [f"fid_{s.eval_images}"] if s.eval_every else []
    best = checkpoint["best"] if checkpoint else math.inf
    peak = matmul_rate(device, amp) * world if device.type == "cuda" else math.nan                 # FLOP/s
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        log = out_dir / "log.csv"
        lines = log.read_text().splitlines() if checkpoint and log.is_file() else []
        rows = [row for row in csv.reader(lines[1:]) if len(row) == len(lines[0].split(",")) and int(row[0]) <= step]    # whole, none twice
        lines = [",".join(columns)] + [",".join((row + ["nan"])[:len(columns)]) for row in rows]
        write_file(log, lambda file: file.write(("\n".join(lines) + "\n").encode()))
        print(f"{found['name']}: {len(usable)} images, {config.num_classes} classes, latents {config.tokens}x{config.channels} ({s.codec}); "
              f"{s.preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {world} x {device.type}; "
              f"batch {s.batch_size} = {world} x {s.accumulate} x {s.batch_size // world // s.accumulate}, lr {s.lr:g}; steps {step} to {s.max_steps}"
              + ("; latents on the card" if on_card is not None else ""))
        print("settings: " + " ".join(f"{name}={value}" for name, value in settings.items()), flush=True)

    def sums():
        """What has been added up since the last log line, over all processes, so that a resumed run logs the same line."""
        total = stats.clone()
        if world > 1:
            dist.all_reduce(total)
        return total.cpu()

    def save(total, name="ckpt.pt"):
        state = dict(format=CHECKPOINT_FORMAT, step=step, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                     config=asdict(config), settings=settings, classes=meta["classes"], dataset_name=found["name"], data_dir=args.data_dir,
                     codec_sha256=meta["codec_sha256"], cache_sha256=meta["sha256"], best=best, world=world, since=since, stats=total)
        write_file(out_dir / name, lambda file: torch.save(state, file))

    sampling = dict(cfg_scale=s.cfg_scale, cfg_skip=s.cfg_skip, same_noise=s.same_noise)

    def sample_grids():
        shown = torch.arange(min(config.num_classes, 10)).repeat(6)
        draw_images = functools.partial(sample_batches, ema, codec, batch_size=60, device=device, dtype=args.dtype, progress=False, **sampling)
        names, folder = [meta["classes"][y] for y in shown], out_dir / "samples"
        write_png(folder / f"step_{step:06d}.png", make_grid(np.concatenate(list(draw_images(shown))), names, min(config.num_classes, 10)))
        strips = next(draw_images(shown[:config.num_classes][:10], return_all=True))
        write_png(folder / f"filmstrip_{step:06d}.png", make_filmstrip(strips, names, range(1, len(strips) + 1)))

    def evaluate_ema():
        labels = torch.arange(s.eval_images) % config.num_classes
        batches = sample_batches(ema, codec, labels, 100, device, dtype=args.dtype, progress=False, **sampling)
        return evaluate(batches, s.eval_images, extractor, reference, ["fid"])["fid"]

    # one step's images, read a step ahead in a thread: latents, or with --live pixels; and labels
    mine = slice(rank * s.batch_size // world, (rank + 1) * s.batch_size // world)
    pool = cleanup.enter_context(multiprocessing.Pool(max(1, args.workers), quiet_worker)) if args.live else None
    skipped_files = set()

    def fetch(step):
        rows = usable[batch_indexes(len(usable), s.batch_size, step, s.seed)[mine]]
        if on_card is not None:
            x = torch.from_numpy(rows)
        elif not args.live:
            x = read_rows(latents, rows)
        else:
            number, load = len(found["paths"]), functools.partial(try_load_image, size=codec.image_size)
            images = pool.map(load, [found["paths"][row % number] for row in rows])
            for i, image in enumerate(images):
                while isinstance(image, str):                      # unreadable: the next one takes its place
                    if not args.skip_bad:
                        raise ValueError(image)
                    if rows[i] % number not in skipped_files:
                        print(f"skipped {image.removesuffix('; mend or delete it, or pass --skip_bad')}", flush=True)
                        skipped_files.add(rows[i] % number)
                    if len(skipped_files) == number:
                        raise ValueError(f"{s.dataset}: holds no readable image")
                    rows[i] = (rows[i] + 1) % len(all_labels)
                    image = load(found["paths"][rows[i] % number])
                images[i] = image[:, ::-1] if rows[i] >= number else image
            x = torch.from_numpy(np.stack(images))
        batch = x, torch.from_numpy(all_labels[rows])
        return [t.pin_memory() for t in batch] if device.type == "cuda" else batch

    # signals ask the loop to stop; a second one is not caught. All processes stop after the same step
    asked = []

    def ask(number, _):
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        cleanup.callback(signal.signal, number, handler)
    hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if world > 1 else None      # over the hosts' network, so that no device waits

    def stopping():
        flag = torch.tensor(len(asked))
        if world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=hosts)
        return flag.item() > 0

    # the loop
    stats = torch.zeros(4 + 2 * BINS, device=device)               # sums of the losses, steps, sums of the loss by angle bin, and the bins' counts
    bad, worst = torch.zeros((), device=device), torch.zeros((), device=device)                    # bad steps in a row just now, and at most
    since, first_step, stopped = step, step, False                 # since: the step of the last log line
    if checkpoint:                                                 # which may lie before the checkpoint
        since = checkpoint["since"]
        stats += checkpoint["stats"].to(device) * master
    started, timed = time.time(), step                             # the clock, and the step it was started at
    loader = ThreadPoolExecutor(1)
    cleanup.callback(loader.shutdown, cancel_futures=True)
    ahead = loader.submit(fetch, step) if step < s.max_steps else None

    def check_finite():
        if worst.item() >= BAD_STEPS:
            kept = f"{out_dir / 'ckpt.pt'} is from before them; go on from there with a smaller rate: {again} --lr {s.lr / 3:.1g}" \
                if (out_dir / "ckpt.pt").is_file() else f"no checkpoint had been written; start again with a smaller rate: --lr {s.lr / 3:.1g}"
            raise ValueError(f"the gradient was not finite in {int(worst.item())} steps in a row, up to step {step}; {kept}")

    while step < s.max_steps and not (stopped := stopping()):
        x, labels = (t.to(device, non_blocking=True) for t in ahead.result())
        ahead = loader.submit(fetch, step + 1) if step + 1 < s.max_steps else None
        if args.live:
            with torch.no_grad(), amp():
                x = codec.encode(to_float(x, device)).half()               # what the cache would hold
        z = (x if on_card is None else on_card[x]).float()                                         # (B, T, C)
        noise, angle, nearer, dropped = (t[mine] for t in draw(step, s, config, device))
        labels = labels.masked_fill(dropped, config.num_classes)
        lr = learning_rate(step, s.lr, s.warmup, s.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, reconstruction, consistency, grad_norm = train_step(ddp, ema, optimizer, step, s, z, labels, noise, angle, nearer, amp)
        good = torch.isfinite(grad_norm)                           # of the sum over all processes, so the same for all
        bad = (bad + 1) * ~good
        worst = torch.maximum(worst, bad)
        stats[:4] += torch.where(good, torch.stack([loss, reconstruction.mean(), consistency.mean(), torch.ones_like(loss)]), 0)
        bins = (torch.rad2deg(angle) / (90 / BINS)).long().clamp(max=BINS - 1)
        stats[4:].index_add_(0, bins, torch.where(good, reconstruction, 0))
        stats[4 + BINS:].index_add_(0, bins, good.float().expand(len(bins)))
        step += 1

        evaluating = s.eval_every and step % s.eval_every == 0
        if step % s.log_every == 0 or step == s.max_steps or evaluating:
            check_finite()
            if world > 1:
                dist.all_reduce(stats)
            totals, counts, steps_done = stats[:3] / stats[3], stats[4 + BINS:], round(stats[3].item() / world)
            by_bin = (stats[4:4 + BINS] / counts).tolist()                                       # nan for a bin without points
            now = time.time()
            rate = (step - timed) * s.batch_size / (now - started)
            skipped, since = step - since - steps_done, step
            if master:
                left = (s.max_steps - step) * s.batch_size / rate
                mfu = rate * forwards(s) * flops(config) / peak
                row = [step, *totals.tolist(), lr, grad_norm.item(), rate, mfu, skipped, *by_bin]
                if s.eval_every:
                    row.append(evaluate_ema() if evaluating else math.nan)
                try:
                    with open(log, "a", newline="") as file:
                        csv.writer(file).writerow([row[0]] + [f"{x:.6g}" for x in row[1:]])
                except OSError as error:
                    raise OSError(error.errno, f"{error.strerror}; {out_dir / 'ckpt.pt'} is whole", str(log)) from error
                print(f"step {step:6d}/{s.max_steps}  loss {row[1]:.4f}  recon {row[2]:.4f}  cons {row[3]:.4f}  lr {lr:.1e}  grad {row[5]:5.2f}  "
                      f"{rate:7.0f} images/s  " + (f"mfu {mfu:.0%}  " if mfu == mfu else "") + f"{left // 60:.0f}:{left % 60:02.0f} left"
                      + (f"  {skipped} skipped" if skipped else "") + (f"  {columns[-1]} {row[-1]:.3f}" if evaluating else ""), flush=True)
                if evaluating and row[-1] < best:
                    best = row[-1]
                    save(torch.zeros(len(stats)), "best.pt")
                if writer:
                    for name, value in zip(columns[1:], row[1:]):
                        writer.add_scalar(name, value, step)
            stats.zero_()
            started, timed = time.time(), step
        if step % s.save_every == 0 or step == s.max_steps:
            check_finite()
            total = sums()
            if master and (step == s.max_steps or not bad.item()):     # in a row of bad steps the weights may be spoilt: keep the earlier ones
                save(total)
                if args.keep:
                    numbered = out_dir / f"ckpt_{step:06d}.pt"
                    numbered.unlink(missing_ok=True)
                    os.link(out_dir / "ckpt.pt", numbered)         # the same bytes: the next save makes a new file
                    for old in sorted(out_dir.glob("ckpt_*.pt"))[:-args.keep]:
                        old.unlink()
        if master and (step % s.sample_every == 0 or step == s.max_steps):
            sample_grids()
            started = time.time() if timed == step else started

    total = sums() if stopped else None
    if master and stopped:
        check_finite()
        save(total)
        print(f"stopped at step {step}, saved in {out_dir / 'ckpt.pt'}; go on with: {again}")
    elif master:
        if step == first_step:
            print(f"{out_dir / 'ckpt.pt'}: is at step {step} already; raise --max_steps to go on")
        print(f"done: {out_dir / 'ckpt.pt'}, grids in {out_dir / 'samples'}\nnext: python sample.py --steps 4 --ckpt {out_dir / 'ckpt.pt'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
