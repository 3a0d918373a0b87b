"""Draw images in a few steps from a trained denoiser; the decoder runs once, at the end.

    python sample.py --steps 4                                   # newest checkpoint under out/ -> a labelled grid, its path printed
    python sample.py --classes star ring --cfg_scale 2 --seed 7 --out stars.png
    python sample.py --num_images 10000 --out samples.npz        # as the ADM evaluator (and fid.py) reads it
    python sample.py --num_images 500 --out samples/             # numbered PNGs
    torchrun --nproc_per_node=8 sample.py --num_images 50000 --out samples.npz    # the same images, sooner
    python sample.py --filmstrip                                 # after 1, 2, ... steps; also by guidance, angle, or slerp between samples
    python sample.py --bench                                     # images/s: denoising, decoding, guidance, 1 to 6 steps, through pixels

Image i of a seed is always made from the same noise, however many are asked for and whatever the batch size.
"""
import argparse
import functools
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from encode import HelpFormatter, autocast, codec_path, find_dataset, fingerprint, join, load_codec, open_cache, read_rows, run, to_uint8, write_file
from model import Denoiser, ModelConfig, flops, generate, rotate, to_sphere

CHECKPOINT_FORMAT = 2
START_LATENTS = 64              # latents of a class whose mean and covariance --start_angle draws from
FILMSTRIPS = {                  # what --filmstrip can show, and what its columns stand for
    "steps": None,                                                 # the image after 1, 2, ... steps
    "guidance": [1, 1.5, 2, 3, 4, 6],                              # guidance scale, from the same noise
    "angle": [0, 15, 30, 45, 60, 75, 90],                          # degrees by which the latent is turned towards noise
    "slerp": [0, 0.2, 0.4, 0.6, 0.8, 1],                           # share of the arc to the next row's image
}


def find_checkpoint(out_dir="out"):
    """The most recently written ckpt.pt under out_dir. Raises FileNotFoundError when there is none."""
    found = sorted(Path(out_dir).rglob("ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{out_dir}/: no checkpoint (ckpt.pt) yet; train one: python train.py")
    return found[-1]


def load_checkpoint(path, device="cpu"):
    """Read and check a checkpoint: the dict that train.py saves. Raises FileNotFoundError or ValueError that names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train one: python train.py")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        version = checkpoint["format"]
    except Exception as error:                                     # torch.load raises many kinds on a broken file
        raise ValueError(f"{path}: is not a whole checkpoint of this project ({str(error).splitlines()[0]}); "
                         "train anew: python train.py, or give another --ckpt") from error
    if version != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: has checkpoint format {version}, this code reads {CHECKPOINT_FORMAT}; train anew: python train.py")
    return checkpoint


def load_model(checkpoint, device="cpu"):
    """The EMA denoiser of a checkpoint, frozen, in eval mode."""
    model = Denoiser(ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval().requires_grad_(False)


def load_codec_of(checkpoint, device="cpu"):
    """The very codec a checkpoint's latents were made with; ValueError if its weights have changed since."""
    settings = checkpoint["settings"]
    path = codec_path(settings["codec"], checkpoint["dataset_name"], checkpoint["data_dir"])
    codec = load_codec(settings["codec"], path, device)
    if fingerprint(codec) != checkpoint["codec_sha256"]:
        raise ValueError(f"{path or settings['codec']}: is not the codec this checkpoint was trained with (fitted again since?); "
                         f"train anew: python train.py --dataset {settings['dataset']} --codec {settings['codec']}")
    return codec


def draw_noise(seed, indexes, shape):
    """Gaussian noise (len(indexes), *shape) on the CPU, image i from its own generator seeded with (seed, i)."""
    one = lambda i: torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
    return torch.stack([one(i) for i in indexes])


def class_latents(checkpoint, codec):
    """A function from a label to START_LATENTS of its latents in the cache (K, T, C), or as many as there are, always the same."""
    settings = checkpoint["settings"]
    found = find_dataset(settings["dataset"], checkpoint["data_dir"])
    latents, labels, _ = open_cache(found, settings["codec"], checkpoint["data_dir"], codec)

    @functools.lru_cache(maxsize=128)
    def of_class(label):
        return read_rows(latents, np.random.default_rng(0).permutation(np.flatnonzero(labels == label))[:START_LATENTS]).float()
    return of_class


def draw_starts(of_class, labels, seed, indexes):
    """Draws (B, T, C) from Gaussians with the mean and covariance of each label's latents: what a linear model would generate."""
    draws = []
    for label, weights in zip(labels.tolist(), draw_noise(seed + 2**32, indexes, (START_LATENTS,))):
        z = of_class(label)
        draws.append(z.mean(0) + torch.tensordot(weights[:len(z)], z - z.mean(0), 1) / len(z) ** 0.5)
    return torch.stack(draws)


def turn_towards_noise(model, z, labels, noise):
    """Latents (B, T, C) at the angles of FILMSTRIPS, and what the denoiser makes of each at one look: (2, angles, B, T, C)."""
    noisy = [rotate(z, noise[0], math.radians(angle), model.config.sphere) for angle in FILMSTRIPS["angle"]]
    length = z.pow(2).mean((1, 2), keepdim=True).sqrt()            # the denoiser's outputs have one of their own
    return torch.stack([torch.stack([length * v for v in noisy]), torch.stack([model(v, labels).float() for v in noisy])])


def walk_to_the_next(model, z, labels, noise):
    """Along the great circle from each latent (B, T, C) to the next one, the last to the first (slerp): (places, B, T, C)."""
    other, length = z.roll(-1, 0), z.pow(2).mean((1, 2), keepdim=True).sqrt()
    whole = torch.acos((to_sphere(z) * to_sphere(other)).mean((1, 2)).clamp(-1, 1))                # (B,) radians
    return torch.stack([torch.lerp(length, length.roll(-1, 0), share) * rotate(z, other, share * whole) for share in FILMSTRIPS["slerp"]])


def sample_batches(model, codec, labels, batch_size, device, seed=0, dtype="auto", progress=True, group=None, of_class=None, start_angle=90, view=None, **options):
    """Generate and decode images for labels (N,) in batches; options go to `generate`.

    start_angle: degrees; below 90 the first point lies this far from a draw of `draw_starts` with of_class, and is not pure noise.
    view: turns (model, latents, labels, noise) into the latents (..., B, T, C) that are decoded.
    group: processes that share the batches; the first one gets all images, the others yield nothing.
    Yields (B, S, S, 3) uint8 arrays in order, or with return_all=True (steps, B, S, S, 3), or as view says.
    """
    steps = 1 if options.pop("same_noise", False) else options.get("steps", 4)
    rank, world = (group.rank(), group.size()) if group else (0, 1)

    def draw_batch(first):
        y = labels[first:first + batch_size]
        if not len(y):
            return None
        indexes = range(first, first + len(y))
        noise = draw_noise(seed, indexes, (steps, *codec.latent_shape)).transpose(0, 1)            # (steps, B, T, C)
        with torch.no_grad(), autocast(device, dtype):
            if start_angle < 90:
                options["start"] = rotate(draw_starts(of_class, y, seed, indexes), noise[0], math.radians(start_angle), model.config.sphere).to(device)
            y, noise = y.to(device), noise.to(device)
            z = generate(model, y, noise=noise, **options)
            z = view(model, z, y, noise) if view else z
            images = to_uint8(codec.decode(z.flatten(0, -3)))                                      # (steps * B, S, S, 3)
        return images.reshape(*z.shape[:-2], *images.shape[1:])

    with tqdm(total=len(labels), desc="sampling", unit="image", disable=not progress or rank > 0) as bar:
        for start in range(0, len(labels), batch_size * world):
            batches = [draw_batch(start + rank * batch_size)]
            if world > 1:
                mine, batches = batches[0], [None] * world
                dist.gather_object(mine, batches if rank == 0 else None, group=group)
            for images in batches if rank == 0 else []:
                if images is not None:
                    bar.update(images.shape[-4])
                    yield images


def make_grid(images, captions, columns):
    """Lay images (N, S, S, 3) uint8 out in rows of `columns`, small ones enlarged, each over its caption. Returns a PIL image."""
    size = images.shape[1]
    tile = size * max(1, 64 // size)
    font = ImageFont.load_default(11)
    cell, line = tile + 4, 16
    grid = Image.new("RGB", (columns * cell + 4, math.ceil(len(images) / columns) * (tile + line) + 4), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 4 + i % columns * cell, 4 + i // columns * (tile + line)
        grid.paste(Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        while font.getlength(caption) > tile and len(caption) > 1:
            caption = caption[:-2] + "\N{HORIZONTAL ELLIPSIS}" if len(caption) > 2 else caption[:1]
        draw.text((x + tile / 2, y + tile + 1), caption, fill="black", font=font, anchor="ma")
    return grid


def make_filmstrip(strips, names, columns):
    """A grid of images (..., columns, N, S, S, 3) uint8: for each of N names its row, or rows, a caption under each. Returns a PIL image."""
    rows = np.moveaxis(strips, -4, 0).reshape(-1, len(columns), *strips.shape[-3:])                # (N * rows, columns, S, S, 3)
    each = len(rows) // strips.shape[-4]
    captions = [f"{column:g}" if i else f"{names[row // each]}, {column:g}" for row in range(len(rows)) for i, column in enumerate(columns)]
    return make_grid(np.concatenate(rows), captions, len(columns))


def write_png(path, image):
    """Write a PIL image safely."""
    write_file(path, functools.partial(image.save, format="PNG"))


def write_npz(path, batches, count, image_size, **arrays):
    """Write arr_0 (count, S, S, 3) uint8 from batches of images, and other arrays, as np.savez does, but without holding all images."""
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(
                    member, dict(descr="|u1", fortran_order=False, shape=(count, image_size, image_size, 3)))
                for images in batches:
                    member.write(images.tobytes())
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array)
    write_file(path, write)


def choose_classes(names, classes):
    """Class numbers for what the user typed: names, numbers, or several joined by commas; None means all."""
    chosen = []
    for name in names or classes:
        for part in [name] if name in classes else name.split(","):
            part = part.strip()
            if part in classes:
                chosen.append(classes.index(part))
            elif part.isdecimal() and int(part) < len(classes):
                chosen.append(int(part))
            else:
                shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
                raise ValueError(f"--classes: no class {part!r} in this checkpoint; it knows {shown} (or 0 to {len(classes) - 1})")
    return chosen


@torch.no_grad()
def bench(model, codec, batch_size, device, dtype):
    """Print images/s of denoising and of decoding, for steps and guidance, in latents and through pixels, and what both cost by count."""
    y, z = torch.arange(batch_size, device=device) % model.config.num_classes, torch.randn(batch_size, *codec.latent_shape, device=device)

    def seconds(work):
        with autocast(device, dtype):
            work().sum().item()                                    # warms up, and waits for the device
            started, times = time.time(), 0
            while times < 3 or (time.time() - started < 1 and times < 20):
                work().flatten()[0].item()
                times += 1
        return (time.time() - started) / times

    def cost(work):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):              # whose products are counted on every device
            work()
        return counter.get_total_flops()

    image = codec.decode(z[:1])
    decode, encode = cost(lambda: codec.decode(z[:1])), cost(lambda: codec.encode(image))
    decoding = seconds(lambda: codec.decode(z))
    print(f"{device.type}, batch {batch_size}: one forward {flops(model.config) / 1e9:.3f} GFLOP an image, decode {decode / 1e9:.3f}, encode {encode / 1e9:.3f}; "
          f"decoding {batch_size / decoding:.4g} images/s\n"
          "steps  guidance    denoising      in all     GFLOP   through pixels     GFLOP   ratio of times   of GFLOP")
    for steps in (1, 2, 4, 6):
        for scale in (1.0, 2.0):
            latent, pixel = (seconds(lambda: generate(model, y, steps, scale, pixel_loop=loop)) for loop in (None, codec))
            here = steps * (1 + (scale > 1)) * flops(model.config) + decode
            there = here + (steps - 1) * (decode + encode)
            print(f"{steps:5d}  {'yes' if scale > 1 else 'no':>8} {batch_size / latent:9.4g} /s {batch_size / (latent + decoding):9.4g} /s {here / 1e9:9.3f} "
                  f"{batch_size / (pixel + decoding):13.4g} /s {there / 1e9:9.3f} {(pixel + decoding) / (latent + decoding):16.2f} {there / here:10.2f}")


def main():
    parser = argparse.ArgumentParser(usage="python sample.py [flags], see --help", description=__doc__, formatter_class=HelpFormatter)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--ckpt", help="checkpoint; default: the newest ckpt.pt under out/")
    what.add_argument("--num_images", type=int, help="how many; default: 8 a class, at most 96 (filmstrip: 1 a class, at most 10)")
    what.add_argument("--classes", nargs="+", help="names or numbers, drawn in equal numbers; default: all")
    what.add_argument("--seed", type=int, default=0, help="noise seed")
    what.add_argument("--out", help="x.png: a labelled grid, x.npz: arr_0 images and arr_1 labels, other: a folder of numbered PNGs")
    what.add_argument("--filmstrip", nargs="?", const="steps", choices=FILMSTRIPS, help="a grid with a row for each image, its columns: the image after "
                      "1, 2, ... steps (the default); by guidance scale; its latent turned towards noise by an angle in degrees, and below what the denoiser "
                      "makes of that in one look; or slerp, the way along the sphere to the next row's image")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=4, help="denoising steps")
    how.add_argument("--cfg_scale", type=float, help="guidance scale, 1 for none; default: the checkpoint's")
    how.add_argument("--cfg_skip", type=int, help="so many first steps without guidance; default: the checkpoint's")
    how.add_argument("--start_angle", type=float, default=90, help="degrees; 90 begins at pure noise, less (try 55 with --steps 1) this far from a Gaussian "
                     "draw with the mean and covariance of the class's cached latents")
    how.add_argument("--same_noise", action=argparse.BooleanOptionalAction, help="keep the first noise at every step, or draw anew; default: the checkpoint's")
    how.add_argument("--pixel_loop", action="store_true", help="decode and encode between steps, as Sphere Encoder does")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--bench", action="store_true", help="time denoising and decoding instead of writing images")
    machine.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="torch.compile; auto: on cuda for --bench or 2000 images")
    machine.add_argument("--weights_dir", help="where the RAE's weights are, instead of torch.hub's folder")
    machine.add_argument("--batch_size", type=int, default=100, help="images at a time")
    machine.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    machine.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on cuda, else float32")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "num_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.cfg_skip is not None and args.cfg_skip < 0:
        parser.error(f"--cfg_skip must be at least 0, got {args.cfg_skip}")
    if not 0 <= args.start_angle <= 90:
        parser.error(f"--start_angle must lie between 0 and 90 degrees, got {args.start_angle:g}")

    if args.weights_dir:
        torch.hub.set_dir(args.weights_dir)
    rank, world, device = join(args.device)
    group = dist.new_group(backend="gloo") if world > 1 else None
    path = args.ckpt or find_checkpoint()
    checkpoint = load_checkpoint(path)
    model, codec = load_model(checkpoint, device), load_codec_of(checkpoint, device)
    if args.compile == "on" or (args.compile == "auto" and device.type == "cuda" and (args.bench or (args.num_images or 0) >= 2000)):
        model.compile()
    if args.bench:
        return bench(model, codec, args.batch_size, device, args.dtype)
    of_class = class_latents(checkpoint, codec) if args.start_angle < 90 else None
    if not args.pixel_loop:
        codec.encoder = None                                       # not needed from here on
    names = checkpoint["classes"]
    cfg_scale = checkpoint["settings"]["cfg_scale"] if args.cfg_scale is None else args.cfg_scale
    cfg_skip, same_noise = (checkpoint["settings"].get(name, 0) if getattr(args, name) is None else getattr(args, name) for name in ("cfg_skip", "same_noise"))
    chosen = choose_classes(args.classes, names)
    number = args.num_images or (min(len(chosen), 10) if args.filmstrip else min(8 * len(chosen), 96))
    labels = torch.tensor(chosen)[torch.arange(number) % len(chosen)]
    variant = "".join(f"_{name}_{value}" for name in ("cfg_skip", "start_angle", "same_noise", "pixel_loop")
                      if (value := getattr(args, name)) != parser.get_default(name))
    out = Path(args.out or Path(path).parent / f"{args.filmstrip or 'grid'}_{args.steps}steps_cfg{cfg_scale:g}_seed{args.seed}{variant}.png")
    kind = out.suffix.lower()
    if args.filmstrip and kind != ".png":
        parser.error(f"--filmstrip draws a .png, got --out {args.out}")
    if kind in (".jpg", ".jpeg", ".webp", ".npy"):
        parser.error(f"--out is a .png, an .npz or a folder, got {args.out}")
    if extra := [file.name for file in out.glob("*.png") if file.stem.isdecimal() and int(file.stem) >= number]:
        raise ValueError(f"{out}: holds {len(extra)} images of an earlier run ({extra[0]}, ...); remove the folder or choose another --out")
    if rank == 0:
        print(f"{path}: step {checkpoint['step']}, {number} images, {args.steps} steps, guidance {cfg_scale:g}, seed {args.seed}, {device.type}")

    at_once = number if args.filmstrip == "slerp" else args.batch_size                             # the last one's next is the first
    draw = functools.partial(sample_batches, model, codec, labels, at_once, device, args.seed, args.dtype, steps=args.steps, cfg_scale=cfg_scale,
                             cfg_skip=cfg_skip, of_class=of_class, start_angle=args.start_angle, same_noise=same_noise,
                             pixel_loop=codec if args.pixel_loop else None, return_all=args.filmstrip == "steps", group=group,
                             view={"angle": turn_towards_noise, "slerp": walk_to_the_next}.get(args.filmstrip))
    if args.filmstrip == "guidance":
        strips = [list(draw(cfg_scale=scale)) for scale in FILMSTRIPS["guidance"]]
        batches = [np.stack(images) for images in zip(*strips)]
    else:
        batches = draw()
    if rank > 0:
        list(batches)                                              # does its share, and gets nothing back
    elif args.filmstrip:
        strips = np.concatenate(list(batches), axis=-4)                                            # (..., columns, N, S, S, 3)
        write_png(out, make_filmstrip(strips, [names[y] for y in labels], FILMSTRIPS[args.filmstrip] or range(1, args.steps + 1)))
    elif kind == ".png":
        columns = len(chosen) if 4 <= len(chosen) <= 12 else math.ceil(math.sqrt(number))
        write_png(out, make_grid(np.concatenate(list(batches)), [names[y] for y in labels], min(columns, number)))
    elif kind == ".npz":
        write_npz(out, batches, number, codec.image_size, arr_1=labels.numpy())
    else:
        for number, image in enumerate(image for images in batches for image in images):
            write_png(out / f"{number:06d}.png", Image.fromarray(image))
    if rank == 0:
        print(f"wrote {out}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
