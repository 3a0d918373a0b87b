"""Draw images in a few steps from a trained denoiser; the decoder runs once, at the end.

    python sample.py --steps 4                                   # the newest run's, as a grid
    python sample.py --classes star ring --cfg_scale 2 --seed 7 --out stars.png
    python sample.py --num_images 10000 --out samples.npz        # for fid.py and ADM's evaluator
    python sample.py --num_images 500 --out samples/             # numbered PNGs
    torchrun --nproc_per_node=8 sample.py --num_images 50000 --out samples.npz
    python sample.py --filmstrip                                 # after 1, 2, ... steps
    python sample.py --bench                                     # images/s, also through pixels

Image i of a seed is made from the same noise, whatever the batch size and the number of processes.
"""
import functools
import itertools
import math
import re
import sys
import time
import zipfile
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from encode import (UserError, autocast, fingerprint, join, load_codec, make_parser, reading, run,
                    to_uint8, within, write_file)
from model import Denoiser, ModelConfig, flops, generate, rotate, to_sphere

CHECKPOINT_FORMAT = 3
FILMSTRIPS = {                  # what --filmstrip shows, and what its columns stand for
    "steps": None,                                              # the image after 1, 2, ... steps
    "guidance": [1, 1.5, 2, 3, 4, 6],                           # scale, from the same noise
    "angle": [0, 15, 30, 45, 60, 75, 90],                       # degrees towards noise
    "slerp": [0, 0.2, 0.4, 0.6, 0.8, 1],                        # of the way to the next row's
}

# ---------------------------------------------------------------------------------- checkpoints

def find_checkpoint(path=None):
    """The newest ckpt.pt under out/, or in the folder `path`, or `path` itself."""
    path = Path(path or "out")
    if not path.is_dir():
        return path
    found = sorted(path.rglob("ckpt.pt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"{path}: holds no checkpoint (ckpt.pt); train one: python train.py")
    return found[-1]

def load_checkpoint(path):
    """The dict that train.py saved, its tensors read from the file when they are used."""
    with reading(f"{path}: missing, or no complete checkpoint", "train one: python train.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        version = checkpoint["format"]
    if version != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: has checkpoint format {version}, this code reads "
                        f"{CHECKPOINT_FORMAT}; train again: python train.py")
    return checkpoint

def load_model(checkpoint, device="cpu"):
    """The EMA denoiser of a checkpoint, frozen."""
    model = Denoiser(ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval().requires_grad_(False)

def load_codec_of(checkpoint, device="cpu"):
    """The codec that a checkpoint was trained with: a small one is in it, the RAE is looked up."""
    saved = checkpoint["codec"]
    codec = load_codec(saved["name"], saved["weights"], device)
    if fingerprint(codec) != saved["fingerprint"]:
        raise UserError(f"{saved['name']}: has other weights than this checkpoint was trained "
                        "with; point --weights_dir at those")
    return codec

# ------------------------------------------------------------------------------------- sampling

def draw_noise(seed, indexes, shape):
    """Gaussian noise (B, *shape), that of image i drawn from (seed, i) alone."""
    rngs = [np.random.default_rng((seed, i)) for i in indexes]
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))

def sample_batches(model, codec, labels, batch_size, device, seed=0, dtype="auto", view=None,
                   rank=0, world=1, **options):
    """Generate and decode images for labels (N,): yields (B, S, S, 3) uint8 in order.

    options: of `generate`; with return_all=True the arrays are (steps, B, S, S, 3). view: turns
    (model, latents, labels, noise) into the latents (..., B, T, C) that are decoded instead.
    world: processes that share the batches; the first one yields all of them, the others nothing.
    """
    for start in range(0, len(labels), batch_size * world):
        rows = range(len(labels))[start + rank * batch_size:][:batch_size]
        images = None
        if rows:
            y = labels[rows[0]:rows[-1] + 1].to(device)
            noise = draw_noise(seed, rows, (options.get("steps", 4), *codec.latent_shape))
            noise = noise.transpose(0, 1).to(device)            # (steps, B, T, C)
            with torch.no_grad(), autocast(device, dtype):
                z = generate(model, y, noise=noise, **options)
                z = view(model, z, y, noise[0]) if view else z
                images = to_uint8(codec.decode(z.flatten(0, -3)))
            images = images.reshape(*z.shape[:-2], *images.shape[1:])
        parts = [images]
        if world > 1:
            parts = [None] * world if rank == 0 else None
            dist.gather_object(images, parts)
        for images in parts or []:
            if images is not None:
                yield images

def turn_towards_noise(model, z, labels, noise):
    """Latents (B, T, C) turned by FILMSTRIPS's angles, and what the denoiser makes of each.

    Returns (2, angles, B, T, C).
    """
    length = z.pow(2).mean((1, 2), keepdim=True).sqrt()         # predictions are not on the sphere
    noisy = [rotate(z, noise, math.radians(angle)) for angle in FILMSTRIPS["angle"]]
    seen = [model(v, labels).float() for v in noisy]
    return torch.stack([torch.stack(noisy) * length, torch.stack(seen)])

def walk_to_the_next(model, z, labels, noise):
    """Along the great circle from each latent (B, T, C) to the next one: (places, B, T, C)."""
    other, length = z.roll(-1, 0), z.pow(2).mean((1, 2), keepdim=True).sqrt()
    whole = torch.acos((to_sphere(z) * to_sphere(other)).mean((1, 2)).clamp(-1, 1))     # (B,)
    points = [torch.lerp(length, length.roll(-1, 0), share) * rotate(z, other, share * whole)
              for share in FILMSTRIPS["slerp"]]
    return torch.stack(points)

# -------------------------------------------------------------------------------------- pictures

def make_grid(images, captions, columns):
    """Lay images (N, S, S, 3) uint8 out in rows, small ones enlarged, each over its caption."""
    size = images.shape[1]
    tile = size * max(1, 64 // size)
    font, width, height = ImageFont.load_default(11), tile + 4, tile + 16
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * width + 4, rows * height + 4), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 4 + i % columns * width, 4 + i // columns * height
        image = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
        grid.paste(image, (x, y))
        while font.getlength(caption) > tile and len(caption) > 2:
            caption = caption[:-2] + "\N{HORIZONTAL ELLIPSIS}"
        draw.text((x + tile / 2, y + tile + 1), caption, fill="black", font=font, anchor="ma")
    return grid

def make_filmstrip(strips, names, columns):
    """A grid of images (..., columns, N, S, S, 3): for each of N names its row or rows."""
    rows = np.moveaxis(strips, -4, 0).reshape(-1, len(columns), *strips.shape[-3:])
    each = len(rows) // len(names)                              # rows of a name
    captions = [f"{column:g}" if i else f"{names[row // each]}, {column:g}"
                for row in range(len(rows)) for i, column in enumerate(columns)]
    return make_grid(np.concatenate(rows), captions, len(columns))

def write_png(path, image):
    write_file(path, lambda file: image.save(file, format="PNG"))

def write_npz(path, batches, count, image_size, **arrays):
    """Write arr_0 (count, S, S, 3) uint8 from batches, and other arrays, like np.savez."""
    def write(file):
        header = dict(descr="|u1", fortran_order=False, shape=(count, image_size, image_size, 3))
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for images in batches:
                    member.write(images.tobytes())
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array)
    write_file(path, write)

# ------------------------------------------------------------------------------------ the script

def choose_classes(names, classes):
    """Class numbers for what the user typed: names, numbers, or several joined by commas."""
    chosen = []
    for name in names or classes:
        for part in [name] if name in classes else name.split(","):
            if part in classes:
                chosen.append(classes.index(part))
            elif part.isdecimal() and int(part) < len(classes):
                chosen.append(int(part))
            else:
                raise UserError(f"--classes {part}: no such class in this checkpoint; it knows "
                                f"{', '.join(classes[:20])}, or numbers below {len(classes)}")
    return chosen

def seconds(work, times=3):
    """Time of a call of work(), which returns a tensor: the mean, after three to warm up."""
    for i in range(-3, times):
        if i == 0:
            started = time.time()
        result = work()
        if i in (-1, times - 1):
            result.flatten()[0].item()                          # waits for the device
    return (time.time() - started) / times

@torch.no_grad()
def bench(model, codec, batch_size, device, dtype):
    """Print images/s of sampling in latents and through pixels, and their cost by count."""
    labels = torch.arange(batch_size, device=device) % model.config.num_classes
    z = torch.randn(batch_size, *codec.latent_shape, device=device)

    def through_pixels(x):
        return codec.encode(codec.decode(x))

    def gigaflops(work):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work(z[:1])
        return counter.get_total_flops() / 1e9

    forward, decode = flops(model.config) / 1e9, gigaflops(codec.decode)
    detour = gigaflops(through_pixels)
    with autocast(device, dtype):
        decoding = seconds(lambda: codec.decode(z))
        print(f"{device.type}, batch {batch_size}: GFLOP an image {forward:.3f} a forward pass, "
              f"{decode:.3f} decoding, {detour - decode:.3f} encoding; decoding alone "
              f"{batch_size / decoding:.4g} images/s\nsteps  guided  denoising, images/s  "
              "with decode  through pixels  ratio of times  of GFLOP")
        for steps, scale in itertools.product((1, 2, 4, 6), (1, 2)):
            draw = functools.partial(generate, model, labels, steps, scale)
            latent = seconds(draw) + decoding
            pixels = seconds(lambda: draw(between=through_pixels)) + decoding
            count = 1 + (steps - 1) * detour / (steps * scale * forward + decode)
            print(f"{steps:5d}  {('no', 'yes')[scale - 1]:>6}{batch_size / (latent - decoding):21.4g}"
                  f"{batch_size / latent:13.4g}{batch_size / pixels:16.4g}{pixels / latent:16.2f}"
                  f"{count:10.2f}")

def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", help="checkpoint, or a run's folder; default: the newest under out/")
    add("--num_images", type=within(int, 1), help="default: 8 a class, at most 96")
    add("--classes", nargs="+", help="names or numbers, drawn in equal numbers; default: all")
    add("--seed", type=within(int, 0), default=0, help="of the noise; default: 0")
    add("--out", help="x.png: a labelled grid, x.npz: arr_0 images and arr_1 labels, else a folder "
        "of numbered PNGs; default: a grid beside the checkpoint")
    add("--filmstrip", nargs="?", const="steps", choices=FILMSTRIPS, help="a row for each image, "
        "its columns: after 1, 2, ... steps; by guidance; turned towards noise by an angle in "
        "degrees, and below what the denoiser makes of that; or on the way to the next row's")
    add("--steps", type=within(int, 1), default=4, help="denoising steps; default: 4")
    add("--cfg_scale", type=within(float, 0, 20), help="guidance scale, 1 for none; default: the "
        "checkpoint's, as of the next two")
    add("--cfg_skip", type=within(int, 0), help="so many first steps go without guidance")
    add("--same_noise", action=BooleanOptionalAction, help="one noise for all steps, or one each")
    add("--pixel_loop", action="store_true", help="decode and encode between steps")
    add("--bench", action="store_true", help="time denoising and decoding instead")
    add("--compile", action="store_true", help="torch.compile the denoiser, for many images")
    add("--batch_size", type=within(int, 1), default=100, help="images at a time; default: 100")
    return parser.parse_args()

def main():
    args = parse_args()
    rank, world, device = join(args)
    path = find_checkpoint(args.ckpt)
    checkpoint = load_checkpoint(path)
    names, settings = checkpoint["classes"], checkpoint["settings"]
    model, codec = load_model(checkpoint, device), load_codec_of(checkpoint, device)
    if args.compile:
        model.compile()
    if args.bench:
        return bench(model, codec, args.batch_size, device, args.dtype)

    chosen = choose_classes(args.classes, names)
    count = args.num_images or min(len(chosen), 10) * (1 if args.filmstrip else 8)
    labels = torch.tensor(chosen)[torch.arange(count) % len(chosen)]
    options = dict(steps=args.steps)
    for name in ("cfg_scale", "cfg_skip", "same_noise"):
        given = getattr(args, name)
        options[name] = settings[name] if given is None else given
    if args.pixel_loop:
        options["between"] = lambda x: codec.encode(codec.decode(x))
    flags = re.sub(r"[^\w.,]+", "_", "".join(sys.argv[1:]))   # the picture is named after them
    out = Path(args.out or path.parent / f"grid{flags}.png")
    kind = out.suffix.lower()
    if kind in (".jpg", ".jpeg", ".webp", ".npy") or (args.filmstrip and kind != ".png"):
        raise UserError(f"--out {out}: must be a .png, or without --filmstrip an .npz or a folder")
    if any(file.stem.isdecimal() and int(file.stem) >= count for file in out.glob("*.png")):
        raise UserError(f"--out {out}: holds more images, of an earlier run; remove it first")
    if rank == 0:
        print(f"{path}: step {checkpoint['step']}, {count} images, {options}", flush=True)

    at_once = count if args.filmstrip == "slerp" else args.batch_size   # its last row's next: row 0
    view = {"angle": turn_towards_noise, "slerp": walk_to_the_next}.get(args.filmstrip)
    draw = functools.partial(
        sample_batches, model, codec, labels, at_once, device, args.seed, args.dtype, view, rank,
        world, **options, return_all=args.filmstrip == "steps")
    if args.filmstrip == "guidance":
        columns = [list(draw(cfg_scale=scale)) for scale in FILMSTRIPS["guidance"]]
        batches = [np.stack(parts) for parts in zip(*columns)]
    else:
        batches = tqdm(draw(), total=-(-count // at_once), unit="batch", disable=rank > 0)
    captions = [names[y] for y in labels]
    if rank > 0:
        list(batches)                                           # its share, for the first process
    elif args.filmstrip:
        columns = FILMSTRIPS[args.filmstrip] or range(1, args.steps + 1)
        strips = np.concatenate(list(batches), axis=-4)         # (..., columns, N, S, S, 3)
        write_png(out, make_filmstrip(strips, captions, columns))
    elif kind == ".png":
        columns = len(chosen) if 4 <= len(chosen) <= 12 else math.ceil(math.sqrt(count))
        write_png(out, make_grid(np.concatenate(list(batches)), captions, min(columns, count)))
    elif kind == ".npz":
        write_npz(out, batches, count, codec.image_size, arr_1=labels.numpy())
    else:
        for i, image in enumerate(image for images in batches for image in images):
            write_png(out / f"{i:06d}.png", Image.fromarray(image))
    if rank == 0:
        print(f"wrote {out}")

if __name__ == "__main__":
    run(main)
