"""Draw images in a few steps from a trained denoiser; the decoder runs once, at the end.

    python sample.py --steps 4                                   # the newest run's, as a grid
    torchrun --nproc_per_node=8 sample.py --num_images 50000 --out samples.npz    # or samples/
    python sample.py --init photo.png --init_angle 60 --classes rose             # edit an image
"""
import contextlib
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
from tqdm import tqdm

from encode import (UserError, autocast, find_images, fingerprint, from_first, join,
                    load_codec_in_turn, make_parser, reading, run, to_float, to_uint8, within,
                    write_file)
from model import Denoiser, ModelConfig, generate, rotate, to_sphere

CHECKPOINT_FORMAT = 5
SAMPLING = ("steps", "cfg_scale", "cfg_skip", "same_noise")     # settings that train.py stores

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
                   rank=0, world=1, init=None, **options):
    """Generate and decode images for labels (N,): yields (B, S, S, 3) uint8 in order.

    view: called like `generate`, with its options; latents (..., B, T, C) give (..., B, S, S, 3).
    init: (N, S, S, 3) uint8 images to edit.
    """
    count = 1 if options.get("same_noise") else options.get("steps", 4)
    shape = (count, *codec.latent_shape)                        # of an image's noise
    for start in range(0, len(labels), batch_size * world):
        rows = list(range(len(labels))[start + rank * batch_size:][:batch_size])
        images = None
        if rows:
            noise = draw_noise(seed, rows, shape).transpose(0, 1).to(device)    # (count, B, T, C)
            with torch.no_grad(), autocast(device, dtype):
                if init is not None:
                    options["init"] = codec.encode(to_float(init[rows], device))
                z = view(model, labels[rows].to(device), noise=noise, **options)
                images = to_uint8(codec.decode(z.flatten(0, -3)))
            images = images.reshape(*z.shape[:-2], *images.shape[1:])
        gathered = [images]                                     # the first process yields them all
        if world > 1:
            gathered = [None] * world if rank == 0 else None
            torch.distributed.gather_object(images, gathered)
        yield from (images for images in gathered or [] if images is not None)

def vary(model, labels, option, values, **options):
    """Latents by each value of an option of `generate`, from the same noise: (values, B, T, C)."""
    return torch.stack([generate(model, labels, **options | {option: value}) for value in values])

def turn_towards_noise(model, labels, noise, values, **options):
    """Latents turned by degrees, and what the denoiser makes of them: (2, values, B, T, C)."""
    z = generate(model, labels, noise=noise, **options)
    length = z.pow(2).mean((1, 2), keepdim=True).sqrt()         # predictions leave the sphere
    noisy = [rotate(z, noise[0], math.radians(angle)) for angle in values]
    seen = [model(v, labels).float() for v in noisy]
    return torch.stack([torch.stack(noisy) * length, torch.stack(seen)])

def walk_to_the_next(model, labels, values, init=None, **options):
    """Latents along the great circle from each one to the next: (values, B, T, C)."""
    z = generate(model, labels, **options) if init is None else init
    other = z.roll(-1, 0)
    angle = torch.acos((to_sphere(z) * to_sphere(other)).mean((1, 2)).clamp(-1, 1))     # (B,)
    return torch.stack([rotate(z, other, share * angle) for share in values])

FILMSTRIPS = {      # how to draw the latents, what the columns stand for, captions of the rows
    "steps": (functools.partial(generate, return_all=True), [], ["step {} {}"]),
    "guidance": (functools.partial(vary, option="cfg_scale"), [1, 1.5, 2, 3, 4, 6], ["cfg {} {}"]),
    "angle": (turn_towards_noise, range(0, 91, 15), ["{}° noisy {}", "{}° denoised {}"]),
    "slerp": (walk_to_the_next, [0, 0.2, 0.4, 0.6, 0.8, 1], ["{:.0%} {} to {}"]),
    "edit": (functools.partial(vary, option="init_angle"), [], ["{} {}"])}      # --init_angle

# -------------------------------------------------------------------------------------- pictures

def make_grid(images, captions, columns):
    """Lay images (N, S, S, 3) uint8 out in rows, small ones enlarged, each over its caption."""
    tile = images.shape[1] * math.ceil(96 / images.shape[1])
    width, height, rows = tile + 4, tile + 16, math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * width + 4, rows * height + 4), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(10)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 4 + i % columns * width, 4 + i // columns * height
        image = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
        grid.paste(image, (x, y))
        draw.text((x + tile / 2, y + tile + 1), caption[:tile // 5], "black", font, anchor="ma")
    return grid

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

def bench(model, codec, B, device, dtype, options):
    """Print images/s, and how much longer a detour through pixels after each step would take."""
    labels = torch.arange(B, device=device) % model.config.num_classes
    pixels = dict(between=lambda z: codec.encode(codec.decode(z)))
    with autocast(device, dtype):
        direct = seconds(lambda: codec.decode(generate(model, labels, **options)))
        detour = seconds(lambda: codec.decode(generate(model, labels, **options, **pixels)))
    print(f"{device}, batch {B}, {options}: {B / direct:.4g} images/s, decoded; through pixels at "
          f"each step {B / detour:.4g}, {detour / direct:.2f} times the time")

def choose_classes(typed, classes, path):
    """Class numbers for what the user typed: names, in any case, or numbers; default: all."""
    numbers = {str(i): i for i in range(len(classes))}
    numbers |= {name.lower(): i for i, name in enumerate(classes)}
    names = ",".join(typed).lower().split(",") if typed else []
    for name in names:
        if name not in numbers:
            hint = ""
            for other in path.parent.parent.glob("*/ckpt.pt"):
                with contextlib.suppress(UserError):            # it may be damaged, or old
                    if name in map(str.lower, load_checkpoint(other)["classes"]):
                        hint = f"; try --ckpt {other}"
            raise UserError(f"--classes {name}: {path} knows {', '.join(classes[:20])}{hint}")
    return [numbers[name] for name in names] or list(range(len(classes)))

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, default="out", help="a file, or a folder: its newest; default: out")
    add("--num_images", type=within(int, 1), help="default: 8 a class; with --init, for each")
    add("--classes", nargs="+", help="names or numbers, drawn in equal numbers; default: all")
    add("--seed", type=within(int, 0), default=0, help="of the noise; default: 0")
    add("--out", help="a grid (.png), an .npz or a folder of PNGs; default: grid_FLAGS.png")
    add("--filmstrip", nargs="?", const="steps", choices=[*FILMSTRIPS][:4], help="of each image")
    add("--init", nargs="+", metavar="PATH", help="images, or folders of them, to edit")
    add("--init_angle", nargs="+", type=within(float, 0, 90), default=[60], help="degrees; 60")
    add("--steps", type=within(int, 1), default=SUPPRESS, help="default: 4; 1 where distilled")
    add("--cfg_scale", type=within(float, 0, 20), default=SUPPRESS, help="guidance; 1 for none")
    add("--cfg_skip", type=within(int, 0), default=SUPPRESS, help="first steps without guidance")
    add("--same_noise", action=BooleanOptionalAction, default=SUPPRESS, help="one for all steps")
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
    options = {name: (checkpoint["settings"] | vars(args))[name] for name in SAMPLING}
    if args.bench:
        return from_first(lambda: bench(model, codec, args.batch_size, device, args.dtype, options))

    chosen = choose_classes(args.classes, checkpoint["classes"], path)
    kind = args.filmstrip or ("edit" if args.init else None)
    view, values, rows = FILMSTRIPS.get(kind, (generate, [], []))
    values = args.init_angle if kind == "edit" else values
    more = dict(values=values) if values else {}
    count = args.num_images or min(len(chosen), 10) * (1 if kind else 8)
    labels = torch.tensor(chosen)[torch.arange(count) % len(chosen)]
    names = [checkpoint["classes"][y] for y in labels]
    if args.init:                                               # every image with all the labels
        images, each = find_images(*args.init), 1 if kind == "slerp" else count
        labels, count = labels[:each].repeat(len(images)), each * len(images)
        names *= len(images)
        if kind == "slerp":
            names = [Path(file).stem[-5:] for file in images.source]
        loaded = [images.load(i, codec.image_size) for i in range(len(images))]
        more |= dict(init=np.repeat(loaded, each, 0), init_angle=args.init_angle[0])
    flags = re.sub(r"[^\w.,]+", "_", " ".join(sys.argv[1:]))   # the picture is named after them
    out = Path(args.out or path.parent / f"grid{flags[:150]}.png")
    suffix = out.suffix.lower()
    if (suffix in (".jpg", ".jpeg", ".webp", ".gif", ".npy") or (kind and suffix != ".png")
            or (not suffix and any(out.glob("*")))):
        raise UserError(f"--out {out}: must be a .png, or for plain samples an .npz or new folder")

    at_once = count if kind == "slerp" else args.batch_size     # its rows form a ring
    batches = sample_batches(model, codec, labels, at_once, device, args.seed, args.dtype, view,
                             rank, world, **options, **more)
    if rank > 0:
        return list(batches)                                    # its share, for the first process
    guided = 0 if options["cfg_scale"] == 1 else options["steps"]
    nfe = options["steps"] + guided - max(0, min(guided - 2, options["cfg_skip"]))
    nfe = f"at most {nfe}" if args.init else nfe
    print(f"{path}: step {checkpoint['step']}, {count} images, {options}, NFE {nfe}", flush=True)
    batches = tqdm(batches, total=math.ceil(count / at_once), unit="batch")
    if kind:
        strips = np.concatenate(list(batches), axis=-4)         # (..., columns, N, S, S, 3)
        columns = values or range(1, 1 + len(strips))
        if kind == "edit":
            strips = np.stack([more["init"], *strips])
            columns = ["input for", *(f"{angle:g}°" for angle in values)]
        images = np.moveaxis(strips, -4, 0).reshape(-1, *strips.shape[-3:])
        captions = [row.format(column, *both) for both in zip(names, names[1:] + names)
                    for row in rows for column in columns]
        write_png(out, make_grid(images, captions, len(columns)))
    elif suffix == ".png":
        columns = len(chosen) if 4 <= len(chosen) <= 12 else math.ceil(math.sqrt(count))
        write_png(out, make_grid(np.concatenate(list(batches)), names, min(columns, count)))
    elif suffix == ".npz":
        write_file(out, lambda file: write_npz(file, batches, labels.numpy(), codec.image_size))
    else:
        for i, image in enumerate(image for images in batches for image in images):
            write_png(out / f"{i:06d}.png", Image.fromarray(image))
        write_file(out / "labels.txt", lambda file: np.savetxt(file, labels, "%d"))
    print(f"wrote {out}")

if __name__ == "__main__":
    run(main)
