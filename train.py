"""Train the denoiser on cached latents: one loop, top to bottom.

    python train.py                                              # the drawn shapes, on a laptop's CPU, in minutes
    python train.py --dataset data/flowers12/train --codec small # your own folder: one sub-folder per class
    python train.py --resume                                     # go on after an interruption
    torchrun --nproc_per_node=8 train.py --dataset ...           # several devices; --batch_size is their sum

Makes the latent cache first when it is missing (encode.py). Writes out/<dataset>/ckpt.pt, log.csv and samples/.
Everything random at a step is drawn for the whole batch from (seed, step), so runs resume, and split over devices, unchanged.
"""
import argparse
import copy
import csv
import functools
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from encode import CODECS, autocast, codec_path, default_codec, find_dataset, join, load_codec, open_cache, prepare, read_rows, run, write_file
from fid import evaluate, find_reference, load_extractor, load_reference
from model import ANGLE_LAWS, CONSISTENCY_TARGETS, PRESETS, SPHERES, Denoiser, ModelConfig, losses, noise_angle
from sample import CHECKPOINT_FORMAT, load_checkpoint, make_grid, sample_batches, write_png

# What a run is made of, by preset. A flag of the same name overrides one value; all are stored in the checkpoint.
COMMON = dict(preset="tiny", dataset="shapes", codec="small", flip=False, seed=0, weight_decay=0.01, grad_clip=1.0, label_dropout=0.1, sphere="global",
              angle_law="logit_normal", angle_mean=0.0, angle_std=1.0, consistency_weight=0.1, consistency_target="stop", weak_weight=0.0,
              eval_every=0, eval_images=2000, eval_features="inception")
SETTINGS = {
    # NOTE deviates: no consistency pass in tiny, which for the same time gained nothing (README, "Differences from the paper")
    "tiny": COMMON | dict(batch_size=128, max_steps=2200, lr=3e-3, warmup=100, ema_decay=0.999, angle_mean=0.5, max_angle=78.0,
                          consistency_weight=0.0, cfg_scale=2.0, log_every=50, save_every=500, sample_every=500),
    "S": COMMON | dict(batch_size=256, max_steps=100_000, lr=2e-4, warmup=1000, ema_decay=0.9995, max_angle=85.0, cfg_scale=1.5,
                       log_every=100, save_every=2500, sample_every=5000),
}
SETTINGS["B"] = SETTINGS["L"] = SETTINGS["XL"] = SETTINGS["S"]
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
    files = [out_dir / name for name in ("ckpt.pt", "best.pt", "log.csv", "samples") if (out_dir / name).exists()]
    if files:
        number = next(n for n in range(1, 10**6) if not (out_dir / f"earlier_{n}").exists())
        aside = out_dir / f"earlier_{number}"
        aside.mkdir()
        for file in files:
            shutil.move(file, aside / file.name)
        print(f"{out_dir}: holds an earlier run, moved to {aside} (--resume would have continued it)")


def parse_args():
    parser = argparse.ArgumentParser(usage="python train.py [flags], see --help",
                                     description="Train the denoiser on cached latents. Defaults marked (preset) come from SETTINGS in "
                                     "train.py; with --resume, from the checkpoint.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)

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
    group.add_argument("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    group.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    group = parser.add_argument_group("model and method")
    group.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS, help="size of the denoiser, and its settings; default: tiny")
    preset_value(group, "--sphere", str, "one sphere per latent, one per token, or none", choices=list(SPHERES))
    preset_value(group, "--angle_law", str, "law of the noise angle", choices=ANGLE_LAWS)
    preset_value(group, "--max_angle", float, "largest noise angle, degrees")
    preset_value(group, "--angle_mean", float, "mean of the logit-normal law")
    preset_value(group, "--angle_std", float, "spread of the logit-normal law")
    preset_value(group, "--consistency_weight", float, "weight of the consistency loss, 0 turns it off")
    preset_value(group, "--consistency_target", str, "what the noisier output is pulled to", choices=CONSISTENCY_TARGETS)
    preset_value(group, "--weak_weight", float, "weight of the nearer point's own reconstruction loss")
    preset_value(group, "--label_dropout", float, "share of labels replaced by none, for guidance")
    group = parser.add_argument_group("optimisation")
    preset_value(group, "--batch_size", int, "images a step, over all devices")
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
    preset_value(group, "--eval_every", int, "steps between FIDs of samples, 0 for none; the best checkpoint is kept as best.pt")
    preset_value(group, "--eval_images", int, "samples of such a FID")
    preset_value(group, "--eval_features", str, "whose features; codec needs no download", choices=["inception", "codec"])
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too (pip install tensorboard)")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on cuda, else float32")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if name in SETTINGS["tiny"]}
    for name in ("batch_size", "max_steps", "warmup", "log_every", "save_every", "sample_every", "lr", "grad_clip"):
        if given.get(name, 1) <= 0:
            parser.error(f"--{name} must be above 0, got {given[name]}")
    if not 0 < given.get("max_angle", 1) <= (90 if given.get("angle_law") == "uniform" else 89.9):
        parser.error(f"--max_angle must lie between 0 and 90 degrees, got {given['max_angle']:g}")
    if given.get("eval_every", 0) < 0 or given.get("eval_images", 2) < 2:
        parser.error("--eval_every must be at least 0 and --eval_images at least 2")
    for name in ("label_dropout", "ema_decay"):
        if not 0 <= given.get(name, 0) < 1:
            parser.error(f"--{name} must be at least 0 and below 1, got {given[name]:g}")
    return args, given


def main():
    args, given = parse_args()

    rank, world, device = join(args.device)
    master = rank == 0
    if args.weights_dir:
        torch.hub.set_dir(args.weights_dir)

    # settings: the preset's, or the checkpoint's, then the command line's
    defaults = dict(codec=default_codec(given.get("dataset", COMMON["dataset"])))
    settings, checkpoint = SETTINGS[given.get("preset", COMMON["preset"])] | defaults | given, None
    found = None if args.out_dir else find_dataset(settings["dataset"], args.data_dir)
    out_dir = Path(args.out_dir or Path("out") / found["name"])
    if args.resume:
        checkpoint = load_checkpoint(out_dir / "ckpt.pt")
        settings = checkpoint["settings"] | given
        for name in ("preset", "codec", "flip", "dataset", "sphere", "max_angle", "batch_size", "seed"):
            if settings[name] != checkpoint["settings"][name]:
                raise ValueError(f"{out_dir / 'ckpt.pt'}: was trained with --{name} {checkpoint['settings'][name]}, not {settings[name]}; "
                                 "resume it with its own settings, or start anew with another --out_dir")
    s = argparse.Namespace(**settings)
    again = f"python train.py --dataset {s.dataset} --out_dir {out_dir} --resume"
    if s.batch_size % world:
        raise ValueError(f"--batch_size {s.batch_size} cannot be shared by {world} processes; use a multiple of {world}")

    # data: labels and a memory map of latents
    found = found or find_dataset(s.dataset, args.data_dir)
    prepare(found, s.codec, args.data_dir, device, args.workers, args.skip_bad, s.flip)
    weights = codec_path(s.codec, found["name"], args.data_dir)
    codec = load_codec(s.codec, weights, device) if master else None                              # checks the cache, draws the samples
    latents, all_labels, meta = open_cache(found, s.codec, args.data_dir, codec, s.flip)
    usable = np.flatnonzero(all_labels >= 0)
    if checkpoint and checkpoint["cache_sha256"] != meta["sha256"]:
        raise ValueError(f"{out_dir / 'ckpt.pt'}: was trained on other latents than {args.data_dir}/{found['name']}/{s.codec} holds now; "
                         "start anew with another --out_dir")
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

    # model, its moving average, optimizer
    torch.manual_seed(s.seed)
    config = ModelConfig(tokens=meta["shape"][1], channels=meta["shape"][2], num_classes=len(meta["classes"]), sphere=s.sphere,
                         max_angle=s.max_angle, **PRESETS[s.preset])
    model = Denoiser(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay, fused=device.type != "mps")
    step = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if world > 1 else model

    # log
    columns = ["step", "loss", "reconstruction", "consistency", "lr", "grad_norm", "images_per_s"]
    columns += [f"loss_{90 // BINS * i}_{90 // BINS * (i + 1)}" for i in range(BINS)]
    columns += [f"fid_{s.eval_images}"] if s.eval_every else []
    best = checkpoint["best"] if checkpoint else math.inf
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        log = out_dir / "log.csv"
        lines = log.read_text().splitlines() if checkpoint and log.is_file() else []
        rows = [row for row in csv.reader(lines[1:]) if len(row) == len(lines[0].split(",")) and int(row[0]) <= step]    # whole, none twice
        lines = [",".join(columns)] + [",".join((row + ["nan"])[:len(columns)]) for row in rows]
        write_file(log, lambda file: file.write(("\n".join(lines) + "\n").encode()))
        print(f"{found['name']}: {len(usable)} images, {config.num_classes} classes, latents {config.tokens}x{config.channels} ({s.codec}); "
              f"{s.preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {world} x {device.type}; batch {s.batch_size}; "
              f"steps {step} to {s.max_steps}")

    def save(name="ckpt.pt"):
        state = dict(format=CHECKPOINT_FORMAT, step=step, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                     config=asdict(config), settings=settings, classes=meta["classes"], dataset_name=found["name"], data_dir=args.data_dir,
                     codec_sha256=meta["codec_sha256"], cache_sha256=meta["sha256"], best=best)
        write_file(out_dir / name, lambda file: torch.save(state, file))

    def sample_grid():
        shown = torch.arange(min(config.num_classes, 10)).repeat(6)
        images = np.concatenate(list(sample_batches(ema, codec, shown, 60, device, dtype=args.dtype, progress=False, cfg_scale=s.cfg_scale)))
        write_png(out_dir / "samples" / f"step_{step:06d}.png", make_grid(images, [meta["classes"][y] for y in shown], min(config.num_classes, 10)))

    def evaluate_ema():
        labels = torch.arange(s.eval_images) % config.num_classes
        batches = sample_batches(ema, codec, labels, 100, device, dtype=args.dtype, progress=False, cfg_scale=s.cfg_scale)
        return evaluate(batches, s.eval_images, extractor, reference, ["fid"])["fid"]

    # the loop
    mine = slice(rank * s.batch_size // world, (rank + 1) * s.batch_size // world)
    stats = torch.zeros(3 + 2 * BINS, device=device)               # sums of the losses, of the loss by angle bin, and the bins' counts
    first_bad = torch.full((), -1, device=device)                  # the first step whose loss or gradient was not finite
    started, since, first_step = time.time(), step, step

    def check_finite():
        if (bad := first_bad.item()) >= 0:
            kept = f"{out_dir / 'ckpt.pt'} is from before it; go on from there, with a smaller rate: {again} --lr {s.lr / 3:.1g}" \
                if (out_dir / "ckpt.pt").is_file() else f"no checkpoint had been written; start again with a smaller rate: --lr {s.lr / 3:.1g}"
            raise ValueError(f"loss or gradient is not finite at step {bad}; {kept}")

    while step < s.max_steps:
        generator = torch.Generator(device).manual_seed(s.seed * 1_000_000_007 + step)
        u = torch.rand(3, s.batch_size, generator=generator, device=device)
        noise = torch.randn(s.batch_size, config.tokens, config.channels, generator=generator, device=device)[mine]
        stratified = (torch.arange(s.batch_size, device=device) + u[0]) / s.batch_size
        angle = noise_angle(stratified, s.angle_law, s.max_angle, s.angle_mean, s.angle_std)[mine]                   # (B,)
        rows = usable[batch_indexes(len(usable), s.batch_size, step, s.seed)[mine]]
        z = read_rows(latents, rows).to(device, non_blocking=True).float()                                   # (B, T, C)
        labels = torch.from_numpy(all_labels[rows]).to(device).masked_fill(u[1, mine] < s.label_dropout, config.num_classes)

        lr = learning_rate(step, s.lr, s.warmup, s.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(device, args.dtype):
            loss, reconstruction, consistency = losses(ddp, z, labels, noise, angle, u[2, mine], s.consistency_weight, s.consistency_target,
                                                       s.weak_weight, ema, s.sphere)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        optimizer.step()
        with torch.no_grad():                                      # the average starts short, so that early samples follow the weights
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(s.ema_decay, (1 + step) / (10 + step)))
            first_bad = torch.where((first_bad < 0) & ~torch.isfinite(loss + grad_norm), step, first_bad)
            stats[:3] += torch.stack([loss.detach(), reconstruction.mean(), consistency.mean()])
            bins = (torch.rad2deg(angle) / (90 / BINS)).long().clamp(max=BINS - 1)
            stats[3:].index_add_(0, bins, reconstruction.detach())
            stats[3 + BINS:].index_add_(0, bins, torch.ones_like(angle))
        step += 1

        evaluating = s.eval_every and step % s.eval_every == 0
        if step % s.log_every == 0 or step == s.max_steps or evaluating:
            check_finite()
            if world > 1:
                dist.all_reduce(stats)
            totals, counts = stats[:3] / ((step - since) * world), stats[3 + BINS:]
            by_bin = (stats[3:3 + BINS] / counts).tolist()                                       # nan for a bin without points
            now = time.time()
            rate = (step - since) * s.batch_size / (now - started)
            if master:
                left = (s.max_steps - step) * s.batch_size / rate
                row = [step, *totals.tolist(), lr, grad_norm.item(), rate, *by_bin]
                if s.eval_every:
                    row.append(evaluate_ema() if evaluating else math.nan)
                with open(log, "a", newline="") as file:
                    csv.writer(file).writerow([row[0]] + [f"{x:.6g}" for x in row[1:]])
                print(f"step {step:6d}/{s.max_steps}  loss {row[1]:.4f}  recon {row[2]:.4f}  cons {row[3]:.4f}  lr {lr:.1e}  grad {row[5]:5.2f}  "
                      f"{rate:7.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left"
                      + (f"  {columns[-1]} {row[-1]:.3f}" if evaluating else ""), flush=True)
                if evaluating and row[-1] < best:
                    best = row[-1]
                    save("best.pt")
                if writer:
                    for name, value in zip(columns[1:], row[1:]):
                        writer.add_scalar(name, value, step)
            stats.zero_()
            started, since = time.time(), step
        if step % s.save_every == 0 or step == s.max_steps:
            check_finite()
            if master:
                save()
        if master and (step % s.sample_every == 0 or step == s.max_steps):
            sample_grid()
            started = time.time() if since == step else started

    if master:
        if step == first_step:
            print(f"{out_dir / 'ckpt.pt'}: is at step {step} already; raise --max_steps to go on")
        print(f"done: {out_dir / 'ckpt.pt'}, grids in {out_dir / 'samples'}\nnext: python sample.py --steps 4 --ckpt {out_dir / 'ckpt.pt'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
