"""Draw images in a few steps from a trained denoiser; the decoder runs once, at the end.

    python sample.py --steps 4                                   # the newest run's, as a grid
    python sample.py --classes star ring --cfg_scale 2 --seed 7 --out stars.png
    torchrun --nproc_per_node=8 sample.py --num_images 50000 --out samples.npz    # or samples/
    python sample.py --filmstrip angle                           # or steps, guidance, slerp
"""
import functools
import math
import re
import sys
import time
import zipfile
from argparse import SUPPRESS, BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from encode import (UserError, autocast, fingerprint, from_first, join, load_codec_in_turn,
                    make_parser, reading, run, to_uint8, within, write_file)
from model import Denoiser, ModelConfig, flops, generate, rotate, to_sphere

CHECKPOINT_FORMAT = 4
SAMPLING = ("steps", "cfg_scale", "cfg_skip", "same_noise")     # settings that train.py stores
FILMSTRIPS = {                  # what --filmstrip shows, and what its columns stand for
    "steps": None,                                              # the image after 1, 2, ... steps
    "guidance": [1, 1.5, 2, 3, 4, 6],                           # scale, from the same noise
    "angle": [0, 15, 30, 45, 60, 75, 90],                       # degrees towards noise
    "slerp": [0, 0.2, 0.4, 0.6, 0.8, 1]}                        # of the way to the next row's

# ------------------------------------------------------------------------- checkpoint to images

def load_checkpoint(path):
    """The dict that train.py saved, its tensors read from the file when they are used."""
    with reading(f"{path}: no complete checkpoint", "train one: python train.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise UserError(f"{path}: unknown format {checkpoint['format']}; python train.py again")
    return checkpoint

def load_model(checkpoint, device="cpu"):
    """The EMA denoiser of a checkpoint, frozen."""
    model = Denoiser(ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval().requires_grad_(False)

def load_codec_of(checkpoint, device="cpu"):
    """The codec that a checkpoint was trained with: a small one is in it, the RAE is looked up."""
    saved = checkpoint["codec"]
    codec = load_codec_in_turn(saved["name"], saved["weights"], device)
    if fingerprint(codec) != saved["fingerprint"]:
        raise UserError(f"{saved['name']}: has other weights than in training; see --weights_dir")
    return codec

def draw_noise(seed, indexes, shape):
    """Gaussian noise (B, *shape), image i's from (seed, i): the same however images are batched."""
    rngs = [np.random.default_rng((seed, i)) for i in indexes]
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))

def sample_batches(model, codec, labels, batch_size, device, seed=0, dtype="auto", view=generate,
                   rank=0, world=1, **options):
    """Generate and decode images for labels (N,): yields (B, S, S, 3) uint8 in order.

    view: called like `generate`, with its options; latents (..., B, T, C) give (..., B, S, S, 3).
    """
    count = 1 if options.get("same_noise") else options.get("steps", 4)
    shape = (count, *codec.latent_shape)                        # of an image's noise
    for start in range(0, len(labels), batch_size * world):
        rows = range(len(labels))[start + rank * batch_size:][:batch_size]
        images = None
        if rows:
            noise = draw_noise(seed, rows, shape).transpose(0, 1).to(device)    # (count, B, T, C)
            with torch.no_grad(), autocast(device, dtype):
                z = view(model, labels[list(rows)].to(device), noise=noise, **options)
                images = to_uint8(codec.decode(z.flatten(0, -3)))
            images = images.reshape(*z.shape[:-2], *images.shape[1:])
        gathered = [images]                                     # the first process yields them all
        if world > 1:
            gathered = [None] * world if rank == 0 else None
            torch.distributed.gather_object(images, gathered)
        yield from (images for images in gathered or [] if images is not None)

def raise_guidance(model, labels, **options):
    """Latents by each guidance scale: (scales, B, T, C)."""
    return torch.stack([generate(model, labels, **options | dict(cfg_scale=scale))
                        for scale in FILMSTRIPS["guidance"]])

def turn_towards_noise(model, labels, noise, **options):
    """Latents turned by each angle, and what the denoiser makes of them: (2, angles, B, T, C)."""
    z = generate(model, labels, noise=noise, **options)
    length = z.pow(2).mean((1, 2), keepdim=True).sqrt()         # predictions leave the sphere
    noisy = [rotate(z, noise[0], math.radians(angle)) for angle in FILMSTRIPS["angle"]]
    seen = [model(v, labels).float() for v in noisy]
    return torch.stack([torch.stack(noisy) * length, torch.stack(seen)])

def walk_to_the_next(model, labels, **options):
    """Latents along the great circle from each one to the next: (places, B, T, C)."""
    z = generate(model, labels, **options)
    other = z.roll(-1, 0)
    cosine = (to_sphere(z) * to_sphere(other)).mean((1, 2), keepdim=True)       # (B, 1, 1)
    angle = torch.acos(0.9999 * cosine)                         # never 0: its sine is a divisor
    return torch.stack([((1 - share) * angle).sin() * z + (share * angle).sin() * other
                        for share in FILMSTRIPS["slerp"]]) / angle.sin()

# -------------------------------------------------------------------------------------- pictures

def make_grid(images, captions, columns):
    """Lay images (N, S, S, 3) uint8 out in rows, small ones enlarged, each over its caption."""
    tile = images.shape[1] * max(1, 64 // images.shape[1])
    width, height, rows = tile + 4, tile + 16, math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * width + 4, rows * height + 4), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 4 + i % columns * width, 4 + i // columns * height
        image = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
        grid.paste(image, (x, y))
        draw.text((x + tile / 2, y + tile + 1), caption[:tile // 6], "black", font, anchor="ma")
    return grid

def make_filmstrip(strips, names, columns):
    """A grid of images (..., columns, N, S, S, 3): for each of N names its row or rows."""
    images = np.moveaxis(strips, -4, 0).reshape(-1, *strips.shape[-3:])
    rows = np.repeat(names, len(images) // len(names) // len(columns))
    captions = [f"{column:g} {name}" for name in rows for column in columns]
    return make_grid(images, captions, len(columns))

def write_png(path, image):
    write_file(path, lambda file: image.save(file, format="PNG"))

def write_npz(file, batches, labels, size):
    """Write arr_0 (N, size, size, 3) uint8, batch by batch, and arr_1 (N,), like np.savez."""
    header = dict(descr="|u1", fortran_order=False, shape=(len(labels), size, size, 3))
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for images in batches:
                member.write(images.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.save(member, labels)

# ------------------------------------------------------------------------------------ the script

def seconds(work, times=3):
    """Mean time of a call of work(), which returns a tensor, after three calls to warm up."""
    for calls in (3, times):
        started = time.time()
        for _ in range(calls):
            result = work()
        result.flatten()[0].item()                              # waits for the device
    return (time.time() - started) / times

def bench(model, codec, B, device, dtype):
    """Print images/s of sampling in latents and through pixels, and their cost by count."""
    labels = torch.arange(B, device=device) % model.config.num_classes
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        image = codec.decode(torch.randn(1, *codec.latent_shape, device=device))
        decode = counter.get_total_flops() / flops(model.config)
        codec.encode(image)
        encode = counter.get_total_flops() / flops(model.config) - decode
    print(f"{device}, batch {B}, images/s; decode = {decode:.2f} forwards, encode = {encode:.2f}")
    print("steps  guided     denoising   with decode    via pixels    time ratio   GFLOP ratio")
    for steps in (1, 2, 4, 6):
        for guided, forwards in (("no", 1), ("yes", 2)):        # a step
            draw = functools.partial(generate, model, labels, steps, forwards)
            detoured = functools.partial(draw, between=lambda z: codec.encode(codec.decode(z)))
            with autocast(device, dtype):
                denoising = seconds(draw)
                latents = seconds(lambda: codec.decode(draw()))
                pixels = seconds(lambda: codec.decode(detoured()))
            cost = 1 + (steps - 1) * (decode + encode) / (steps * forwards + decode)
            row = B / denoising, B / latents, B / pixels, pixels / latents, cost
            print(f"{steps:5}{guided:>8}", *(f"{value:13.4g}" for value in row))

def choose_classes(typed, classes):
    """Class numbers for what the user typed: names, in any case, or numbers; default: all."""
    typed = ",".join(typed).split(",") if typed else classes
    numbers = {str(i): i for i in range(len(classes))}
    numbers |= {name.lower(): i for i, name in enumerate(classes)}
    numbers |= {name: i for i, name in enumerate(classes)}      # "A" and "a" may be two classes
    chosen = [numbers.get(name, numbers.get(name.lower())) for name in typed]
    if None in chosen:
        raise UserError(f"--classes {typed[chosen.index(None)]}: this checkpoint knows "
                        f"{', '.join(classes[:20])}, or numbers below {len(classes)}")
    return chosen

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, default="out", help="a file, or a folder: its newest; default: out")
    add("--num_images", type=within(int, 1), help="default: 8 of each class, at most 80")
    add("--classes", nargs="+", help="names or numbers, drawn in equal numbers; default: all")
    add("--seed", type=within(int, 0), default=0, help="of the noise; default: 0")
    add("--out", help="a grid (.png), an .npz or a folder of PNGs; default: grid_FLAGS.png")
    add("--filmstrip", nargs="?", const="steps", choices=FILMSTRIPS, help="a row for each image")
    add("--steps", type=within(int, 1), default=SUPPRESS, help="default: 4; 1 where distilled")
    add("--cfg_scale", type=within(float, 0, 20), default=SUPPRESS,
        help="guidance scale, 1 for none; default, as for the next two: as in training")
    add("--cfg_skip", type=within(int, 0), default=SUPPRESS, help="first steps without guidance")
    add("--same_noise", action=BooleanOptionalAction, default=SUPPRESS, help="one for all steps")
    add("--pixel_loop", action="store_true", help="decode and encode between steps")
    add("--bench", action="store_true", help="time denoising and decoding instead")
    add("--compile", action="store_true", help="torch.compile the denoiser, for many images")
    add("--batch_size", type=within(int, 1), default=100, help="images at a time; default: 100")
    args = parser.parse_args()
    rank, world, device = join(args)
    path = max(args.ckpt.rglob("ckpt.pt"), key=lambda file: file.stat().st_mtime, default=args.ckpt)
    checkpoint = load_checkpoint(path)
    model, codec = load_model(checkpoint, device), load_codec_of(checkpoint, device)
    if args.compile:
        model.compile()
    if args.bench:
        return from_first(lambda: bench(model, codec, args.batch_size, device, args.dtype))

    classes, settings = checkpoint["classes"], checkpoint["settings"] | vars(args)
    chosen = choose_classes(args.classes, classes)
    count = args.num_images or min(len(chosen), 10) * (1 if args.filmstrip else 8)
    labels = torch.tensor(chosen)[torch.arange(count) % len(chosen)]
    options = {name: settings[name] for name in SAMPLING}
    if args.pixel_loop:
        options["between"] = lambda z: codec.encode(codec.decode(z))
    flags = re.sub(r"[^\w.,]+", "_", "".join(sys.argv[1:]))   # the picture is named after them
    out = Path(args.out or path.parent / f"grid{flags[:150]}.png")
    kind = out.suffix.lower()
    if kind in (".jpg", ".jpeg", ".webp", ".gif", ".npy") or (args.filmstrip and kind != ".png"):
        raise UserError(f"--out {out}: must be a .png, or without --filmstrip an .npz or a folder")
    if any(file.stem.isdecimal() and int(file.stem) >= count for file in out.glob("*.png")):
        raise UserError(f"--out {out}: holds more images, of an earlier run; remove it first")

    view = {"steps": functools.partial(generate, return_all=True), "guidance": raise_guidance,
            "angle": turn_towards_noise, "slerp": walk_to_the_next}.get(args.filmstrip, generate)
    at_once = count if args.filmstrip == "slerp" else args.batch_size      # its rows form a ring
    batches = sample_batches(model, codec, labels, at_once, device, args.seed, args.dtype, view,
                             rank, world, **options)
    if rank > 0:
        return list(batches)                                    # its share, for the first process
    guided = 0 if options["cfg_scale"] == 1 else options["steps"]
    nfe = options["steps"] + guided - max(0, min(guided - 2, options["cfg_skip"]))
    print(f"{path}: step {checkpoint['step']}, {count} images, {options}, NFE {nfe}", flush=True)
    batches = tqdm(batches, total=math.ceil(count / at_once), unit="batch")
    captions = [classes[y] for y in labels]
    if args.filmstrip:
        columns = FILMSTRIPS[args.filmstrip] or range(1, options["steps"] + 1)
        write_png(out, make_filmstrip(np.concatenate(list(batches), axis=-4), captions, columns))
    elif kind == ".png":
        columns = len(chosen) if 4 <= len(chosen) <= 12 else math.ceil(math.sqrt(count))
        write_png(out, make_grid(np.concatenate(list(batches)), captions, min(columns, count)))
    elif kind == ".npz":
        write_file(out, lambda file: write_npz(file, batches, labels.numpy(), codec.image_size))
    else:
        for i, image in enumerate(image for images in batches for image in images):
            write_png(out / f"{i:06d}.png", Image.fromarray(image))
    print(f"wrote {out}")

if __name__ == "__main__":
    run(main)
