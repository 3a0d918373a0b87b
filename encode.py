"""Images to latents, once: the datasets, the small frozen autoencoder ("codec"), and the latent cache that train.py reads.

    python encode.py --dataset shapes                            # draw ten shapes, encode them, cache the latents
    python encode.py --dataset data/flowers12/train              # your own folder: one sub-folder per class
    python encode.py --fit --dataset shapes --fit_steps 9000     # fit the codec anew (how assets/small_shapes.pt was made)

train.py does the first two by itself when the cache is missing.

The small codec is a representation autoencoder in miniature: a convolutional encoder whose latents lie on the sphere, and
a decoder trained on latents rotated away from the truth, so that it forgives the denoiser's small mistakes (RAE does that
with added noise). Shapes: B images, S image size, T = (S/8)^2 tokens, C latent channels.
"""
import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from model import rotate, to_sphere

# ------------------------------------------------------------------------------------------- for every script


def run(main):
    """Run a script's main(): what the user can mend ends in one line and a non-zero status, a bug in a traceback."""
    try:
        main()
    except OSError as error:
        full = "; free some disk space and run the command again (train.py: with --resume)" if error.errno == errno.ENOSPC else ""
        sys.exit(f"error: {f'{error.filename}: {error.strerror}' if error.filename else error}{full}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; every file already written is whole")


def write_file(path, write):
    """Call write(file) on a temporary file, flush it to disk and rename it: `path` is always whole, the old or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__         # torch.save wraps what the disk said
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"{cause.strerror or cause}; what was there before is untouched", str(path)) from error
        raise


def sha256(path):
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def pick_device(name="auto"):
    """"auto" is cuda, else mps, else cpu. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: is not to be had here ({str(error).splitlines()[0]}); use auto or cpu") from error


# ------------------------------------------------------------------------------------------- the drawn dataset


def outlines():
    """Class name -> polygons (n, 2) in units of the shape's radius, y down; the second one, if any, is cut out."""
    def ngon(n, radius=1.0, turn=0.0):
        angle = 2 * np.pi * (np.arange(n) / n + turn)
        return radius * np.stack([np.sin(angle), -np.cos(angle)], axis=1)

    star = 1.15 * ngon(10)
    star[1::2] *= 0.42
    t = 2 * np.pi * np.arange(40) / 40
    heart = np.stack([16 * np.sin(t) ** 3,
                      -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 2.5], axis=1) / 15
    a, b = 0.34, 0.95
    cross = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    arrow = [(-1.05, -0.35), (0.05, -0.35), (0.05, -0.95), (1.05, 0), (0.05, 0.95), (0.05, 0.35), (-1.05, 0.35)]
    return {"circle": [ngon(48, 0.9)], "square": [ngon(4, 1.15, turn=1 / 8)], "triangle": [ngon(3, 1.1) + [0, 0.2]],
            "diamond": [ngon(4) * [0.68, 1.1]], "star": [star + [0, 0.06]], "cross": [np.array(cross)],
            "ring": [ngon(48), ngon(48, 0.55)], "heart": [heart],
            "moon": [ngon(48) - [0.1, 0], ngon(48, 0.85) + [0.4, -0.1]], "arrow": [np.array(arrow)]}


SHAPES = tuple(outlines())
SHAPES_COUNT = 30_000           # images of the dataset called `shapes`


def shapes(n, seed=0):
    """Draw shapes of ten classes (SHAPES), varied in colours, place, size and slight rotation, with smooth edges.

    Returns images (n, 32, 32, 3) uint8 RGB and labels (n,) int64, the classes in turn. The same seed draws the same
    pictures, and a larger n begins with those of a smaller one.
    """
    polygons, fine = list(outlines().values()), 4                  # drawn `fine` times larger, then averaged
    u = np.random.default_rng(seed).random((n, 10))
    images, labels = np.empty((n, 32, 32, 3), np.uint8), np.arange(n) % len(polygons)
    for i in range(n):
        radius, turn = 7 + 5 * u[i, 0], 0.3 * (2 * u[i, 1] - 1)    # pixels, radians
        centre = 16 + (14.5 - radius) * (2 * u[i, 2:4] - 1)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        mask = Image.new("L", (32 * fine, 32 * fine))
        for points, fill in zip(polygons[labels[i]], (255, 0)):
            points = (radius * points @ rotation + centre) * fine - 0.5
            ImageDraw.Draw(mask).polygon([tuple(p) for p in points], fill=fill)
        cover = np.asarray(mask.reduce(fine), np.float64)[:, :, None] / 255                        # (32, 32, 1)
        background = u[i, 4:7]
        colour = (background + 0.35 + 0.3 * u[i, 7:10]) % 1        # differs by 0.35 to 0.65 in each of red, green, blue
        images[i] = np.round(255 * (background + cover * (colour - background)))
    return images, labels.astype(np.int64)


# ------------------------------------------------------------------------------------------- folders of images

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def center_crop(image, size):
    """ADM's crop: halve with a box filter while twice too large, scale the shorter side bicubically, cut out the centre.

    image: PIL image; returns one of (size, size). Source: openai/guided-diffusion, center_crop_arr.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_image(path, size):
    """Read a file as RGB (size, size, 3) uint8: turned as EXIF says, transparency on white, ADM's crop.

    Raises ValueError that names an unreadable or truncated file.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                         # 16-bit grey, which convert() would clip
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(center_crop(image.convert("RGB"), size))
    except Exception as error:                                     # Pillow raises a dozen kinds on broken files
        raise ValueError(f"{path}: cannot be read as an image ({error}); "
                         "mend or delete it, or pass --skip_bad") from error


def try_load_image(path, size):
    """load_image for worker processes: the array, or the error as text."""
    try:
        return load_image(path, size)
    except ValueError as error:
        return str(error)


def find_dataset(dataset, data_dir="data"):
    """Look a dataset up without reading its images: "shapes", a folder with one sub-folder per class, or such a folder in data_dir.

    Returns a dict: name (of its place under data_dir and out/), classes, labels (N,) int64, paths (N, or None for shapes) and
    source, a digest of the file names and sizes. Raises FileNotFoundError or ValueError with what is missing.
    """
    if dataset == "shapes":
        labels = np.arange(SHAPES_COUNT) % len(SHAPES)
        return dict(dataset=dataset, name=dataset, classes=list(SHAPES), labels=labels, paths=None, source=f"drawn {SHAPES_COUNT}")
    folder = next((f for f in (Path(dataset), Path(data_dir) / dataset) if f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{dataset}: no such dataset; give `shapes` or a folder with one sub-folder of images per class")
    resolved = folder.resolve()
    inside = Path(data_dir).resolve()                              # data/flowers12/train is called flowers12-train
    parts = resolved.relative_to(inside).parts if resolved.is_relative_to(inside) else resolved.parts[-2:]
    classes, labels, paths = [], [], []
    for sub in sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] not in "._" and not (f / "meta.json").exists()):    # caches
        found = sorted(f for f in sub.rglob("*") if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
        if not found:
            raise ValueError(f"{sub}: holds no images ({' '.join(SUFFIXES)}); add some or remove the folder")
        labels += [len(classes)] * len(found)
        classes.append(sub.name)
        paths += found
    if not paths:
        raise ValueError(f"{folder}: holds no images; expected one sub-folder per class with {' '.join(SUFFIXES)} files in it")
    name = "-".join(part for part in parts if part.strip("/\\"))
    listing = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in paths)
    return dict(dataset=dataset, name=name if name != "shapes" else "shapes-folder", classes=classes,
                labels=np.array(labels, np.int64), paths=paths, source=hashlib.sha256(listing.encode()).hexdigest())


def read_images(found, size, batch_size, workers=0, skip_bad=False):
    """Yield a dataset's images in order: (start, images (B, size, size, 3) uint8, bad), bad being positions left black.

    Files are decoded by `workers` processes, a batch ahead. An unreadable file raises ValueError, or with skip_bad is counted.
    """
    n = len(found["labels"])
    starts = range(0, n, batch_size)
    if found["paths"] is None:
        images, _ = shapes(n)
        for start in starts:
            batch = images[start:start + batch_size]
            if size != 32:
                batch = np.stack([np.asarray(center_crop(Image.fromarray(x), size)) for x in batch])
            yield start, batch, []
        return
    load = partial(try_load_image, size=size)
    with multiprocessing.Pool(max(1, workers), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        ahead = pool.map_async(load, found["paths"][:batch_size])
        for start in starts:
            loaded = ahead.get()
            ahead = pool.map_async(load, found["paths"][start + batch_size:start + 2 * batch_size])
            bad = [i for i, image in enumerate(loaded) if isinstance(image, str)]
            for i in bad:
                if not skip_bad:
                    raise ValueError(loaded[i])
                tqdm.write(f"skipped {loaded[i].removesuffix('; mend or delete it, or pass --skip_bad')}", file=sys.stderr)
                loaded[i] = np.zeros((size, size, 3), np.uint8)
            yield start, np.stack(loaded), bad


# ------------------------------------------------------------------------------------------- the small codec


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3, same width."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                  nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class SmallCodec(nn.Module):
    """A convolutional autoencoder: 8x8 pixels become a token of C channels, the whole latent a point on the sphere.

    BatchNorm without weights whitens the channels, so that the latents are spread over the sphere as the noise is.
    """

    def __init__(self, image_size=32, channels=32):
        super().__init__()
        self.image_size, self.side = image_size, image_size // 8
        self.latent_shape = (self.side ** 2, channels)             # (T, C)
        up = lambda a, b: nn.Sequential(nn.Conv2d(a, 4 * b, 1), nn.PixelShuffle(2))
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, 32, 3, padding=1), ResidualBlock(32),              # S/2
            nn.Conv2d(32, 64, 3, stride=2, padding=1), ResidualBlock(64),                          # S/4
            nn.Conv2d(64, 96, 3, stride=2, padding=1), ResidualBlock(96),                          # S/8
            nn.GroupNorm(8, 96), nn.SiLU(), nn.Conv2d(96, channels, 1), nn.BatchNorm2d(channels, affine=False))
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 128, 3, padding=1), ResidualBlock(128), up(128, 80), ResidualBlock(80),
            up(80, 48), ResidualBlock(48), nn.GroupNorm(8, 48), nn.SiLU(),
            up(48, 16), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def encode(self, images):
        """(B, 3, S, S) in [0, 1] -> (B, T, C) float32 on the sphere."""
        return to_sphere(self.encoder(2 * images - 1).flatten(2).transpose(1, 2))

    def decode(self, z):
        """(B, T, C), projected to the sphere first -> (B, 3, S, S) in [0, 1]."""
        return self.paint(to_sphere(z)).clamp(0, 1)

    def paint(self, z):
        """decode without the clamp, which would stop gradients."""
        return 0.5 * self.decoder(z.transpose(1, 2).unflatten(2, (self.side, self.side))) + 0.5


SMALL_CODECS = {"small": 32, "small64": 64}    # name -> image size
FIT_IMAGES = 60_000                            # a codec is fitted on so many, or all there are


def codec_path(name, dataset_name, data_dir="data"):
    """Where a small codec's weights lie: shipped for shapes, else beside the dataset's caches."""
    if (name, dataset_name) == ("small", "shapes"):
        return Path(__file__).parent / "assets" / "small_shapes.pt"
    return Path(data_dir) / dataset_name / f"{name}.pt"


def load_codec(name, path=None, device="cpu"):
    """Return a frozen codec by name, in eval mode: encode, decode, image_size, latent_shape.

    name: a key of SMALL_CODECS. path: its weights (default: those shipped for shapes). Raises FileNotFoundError or ValueError.
    """
    if name not in SMALL_CODECS:
        raise ValueError(f"codec {name!r} is not known; choose from {', '.join(SMALL_CODECS)}")
    path = Path(path or codec_path(name, "shapes"))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the codec's weights are missing; make them: python encode.py --fit --codec {name} --dataset ...")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        codec = SmallCodec(saved["image_size"], saved["channels"])
        codec.load_state_dict({key: t.float() if t.is_floating_point() else t for key, t in saved["model"].items()})
    except Exception as error:                                     # torch.load raises many kinds on a broken file
        raise ValueError(f"{path}: is not a whole codec file ({str(error).splitlines()[0]}); "
                         f"make it again: python encode.py --fit --codec {name} --dataset ...") from error
    return codec.to(device).eval().requires_grad_(False)


def to_float(images, device="cpu"):
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [0, 1]."""
    return torch.as_tensor(images).to(device).permute(0, 3, 1, 2) / 255


def to_uint8(images):
    """(B, 3, S, S) in [0, 1] -> (B, S, S, 3) uint8 numpy, rounded."""
    return (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def fit_codec(images, path, image_size, steps=1500, batch_size=128, lr=2e-3, max_angle=0.5, seed=0, device="cpu"):
    """Train a SmallCodec on images (N, S, S, 3) uint8 and write its weights (16-bit) to `path`. Returns PSNR in dB on held-out images.

    Loss: squared error of decode(rotate(encode(x), noise, a)), a = 0 for one image in four, else uniform up to max_angle radians.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = SmallCodec(image_size).to(device, memory_format=torch.channels_last)
    order = torch.randperm(len(images), generator=generator)
    held_out = len(images) // 20
    train, test = torch.from_numpy(images)[order[held_out:]], torch.from_numpy(images)[order[:held_out or None]]
    optimizer = torch.optim.AdamW(codec.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=min(0.3, 300 / steps))
    bar = tqdm(range(steps), desc=f"fitting {path.name}", unit="step", mininterval=1)
    for step in bar:
        x = to_float(train[torch.randint(len(train), (batch_size,), generator=generator)], device)
        z = codec.encode(x.contiguous(memory_format=torch.channels_last))
        u = torch.rand(batch_size, 2, generator=generator)
        noise = torch.randn(z.shape, generator=generator).to(device)
        angle = (max_angle * u[:, 0] * (u[:, 1] < 0.75)).to(device)
        loss = (codec.paint(rotate(z, noise, angle)) - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix_str(f"{-10 * loss.log10().item():.1f} dB with noise")
    if not torch.isfinite(loss):
        raise ValueError(f"{path}: fitting diverged (loss {loss.item()}); nothing was written; try fewer --fit_steps")
    codec.eval()
    state = {key: t.half().cpu() if t.is_floating_point() else t.cpu() for key, t in codec.state_dict().items()}
    write_file(path, partial(torch.save, dict(image_size=image_size, channels=codec.latent_shape[1], model=state)))
    codec = load_codec(next(name for name, size in SMALL_CODECS.items() if size == image_size), path, device)
    with torch.no_grad():
        errors = [(codec.decode(codec.encode(to_float(batch, device))) - to_float(batch, device)).pow(2).mean((1, 2, 3))
                  for batch in test.split(batch_size)]
    return -10 * torch.cat(errors).log10().mean().item()


# ------------------------------------------------------------------------------------------- the latent cache


def remake_command(found, codec_name, data_dir):
    """The command that makes a dataset's cache (again)."""
    return f"python encode.py --dataset {found['dataset']} --codec {codec_name}" + (f" --data_dir {data_dir}" if str(data_dir) != "data" else "")


def open_cache(found, codec_name, data_dir="data"):
    """Open and check a dataset's cached latents.

    Returns (latents, labels, meta): a read-only float16 memory map (N, T, C), labels (N,) int64 with -1 for images that could
    not be read, and the dict of meta.json. Raises FileNotFoundError without a cache, ValueError for one that is damaged, belongs to
    another codec, or was made from other images.
    """
    folder = Path(data_dir) / found["name"] / codec_name
    mend = f"; remake it: {remake_command(found, codec_name, data_dir)}"
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"{folder}: no latent cache{mend.replace('remake', 'make')}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        shape = tuple(meta["shape"])
        labels = np.load(folder / "labels.npy")
        latents = np.load(folder / "latents.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{folder}: the latent cache is damaged ({error}){mend}") from error
    if latents.shape != shape or latents.dtype != np.float16 or labels.shape != shape[:1]:
        raise ValueError(f"{folder}: the latent cache is damaged (meta.json says {shape}, latents.npy holds {latents.dtype} "
                         f"{latents.shape}, labels.npy {labels.shape}){mend}")
    if meta["codec"] != codec_name or meta["codec_sha256"] != sha256(codec_path(codec_name, found["name"], data_dir)):
        raise ValueError(f"{folder}: was made with another codec than {codec_path(codec_name, found['name'], data_dir)}{mend}")
    if meta["source"] != found["source"]:
        raise ValueError(f"{folder}: was made from other images than {found['dataset']} holds now{mend}")
    return latents, labels, meta


@torch.no_grad()
def write_cache(found, codec_name, data_dir="data", device="cpu", batch_size=256, workers=0, skip_bad=False):
    """Encode a dataset into data_dir/<name>/<codec>/: latents.npy, labels.npy, meta.json; under a temporary name until whole."""
    weights = codec_path(codec_name, found["name"], data_dir)
    codec = load_codec(codec_name, weights, device)
    folder = Path(data_dir) / found["name"] / codec_name
    temporary = folder.with_name(f".{codec_name}.tmp")
    shape = (len(found["labels"]), *codec.latent_shape)
    folder.parent.mkdir(parents=True, exist_ok=True)
    need, free = 2 * int(np.prod(shape)), shutil.disk_usage(folder.parent).free
    if need > free:
        raise OSError(f"{folder}: the latents need {need / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free; "
                      "free some, or point --data_dir at another disk")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        labels = found["labels"].copy()
        moments = torch.zeros(2, codec.latent_shape[1], dtype=torch.float64)
        with open(temporary / "latents.npy", "wb") as file, tqdm(total=shape[0], desc=f"encoding {found['name']}", unit="image", mininterval=1) as bar:
            np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=shape))
            for start, images, bad in read_images(found, codec.image_size, batch_size, workers, skip_bad):
                z = codec.encode(to_float(images, device)).cpu()                                   # (B, T, C)
                file.write(z.half().numpy().tobytes())
                labels[start + np.array(bad, int)] = -1
                moments += torch.stack([z.double().mean(1).sum(0), z.double().pow(2).mean(1).sum(0)])
                bar.update(len(z))
            file.flush()
            os.fsync(file.fileno())
        if missing := sorted(set(range(len(found["classes"]))) - set(labels.tolist())):
            raise ValueError(f"{found['dataset']}: no readable image of class {found['classes'][missing[0]]}; add some or remove the folder")
        mean = moments[0] / shape[0]
        meta = dict(codec=codec_name, codec_sha256=sha256(weights), shape=shape, image_size=codec.image_size,
                    classes=found["classes"], skipped=int((labels < 0).sum()), source=found["source"],
                    mean=mean.tolist(), std=(moments[1] / shape[0] - mean ** 2).sqrt().tolist(),
                    sha256=sha256(temporary / "latents.npy"))
        np.save(temporary / "labels.npy", labels)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    skipped = f", {meta['skipped']} unreadable ones skipped" if meta["skipped"] else ""
    print(f"{folder}: {shape[0] - meta['skipped']} images of {len(meta['classes'])} classes{skipped}, "
          f"latents {shape[1]}x{shape[2]}, {need / 1e6:.0f} MB")


def fit(found, codec_name, data_dir="data", device="cpu", workers=0, skip_bad=False, steps=1500):
    """Fit a small codec on a dataset and say how well it reconstructs."""
    size, path = SMALL_CODECS[codec_name], codec_path(codec_name, found["name"], data_dir)
    chosen = np.random.default_rng(0).permutation(len(found["labels"]))[:FIT_IMAGES] if found["paths"] else np.arange(FIT_IMAGES)
    subset = dict(labels=chosen, paths=found["paths"] and [found["paths"][i] for i in chosen])
    batches = read_images(subset, size, 256, workers, skip_bad)
    images = np.concatenate([np.delete(batch, bad, axis=0) for _, batch, bad in batches])
    if not len(images):
        raise ValueError(f"{found['dataset']}: holds no readable image to fit the codec on")
    psnr = fit_codec(images, path, size, steps, device=device)
    print(f"{path}: codec for {size}x{size} images, reconstructs held-out ones at {psnr:.1f} dB")


def prepare(found, codec_name, data_dir="data", device="cpu", workers=0, skip_bad=False):
    """Make what a dataset still lacks: the codec's weights and the latent cache. Neither is touched when it is there."""
    if not codec_path(codec_name, found["name"], data_dir).is_file():
        fit(found, codec_name, data_dir, device, workers, skip_bad)
    if not (Path(data_dir) / found["name"] / codec_name / "meta.json").is_file():
        write_cache(found, codec_name, data_dir, device, workers=workers, skip_bad=skip_bad)


def main():
    parser = argparse.ArgumentParser(usage="python encode.py [flags], see --help",
                                     description="Fit the small codec, or encode a dataset into the latent cache that train.py reads.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", default="shapes", help="shapes, or a folder with one sub-folder of images per class")
    parser.add_argument("--data_dir", default="data", help="folder that holds datasets and caches")
    parser.add_argument("--codec", default="small", choices=SMALL_CODECS, help="small: 32x32 images, small64: 64x64")
    parser.add_argument("--fit", action="store_true", help="fit the small codec on the dataset instead of encoding it")
    parser.add_argument("--fit_steps", type=int, default=1500, help="optimizer steps of --fit, 128 images each")
    parser.add_argument("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    if args.fit_steps < 1:
        parser.error(f"--fit_steps must be at least 1, got {args.fit_steps}")
    found, device = find_dataset(args.dataset, args.data_dir), pick_device(args.device)
    if args.fit or not codec_path(args.codec, found["name"], args.data_dir).is_file():
        fit(found, args.codec, args.data_dir, device, args.workers, args.skip_bad, args.fit_steps)
    if not args.fit:
        write_cache(found, args.codec, args.data_dir, device, workers=args.workers, skip_bad=args.skip_bad)


if __name__ == "__main__":
    run(main)
