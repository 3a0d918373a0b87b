"""Images to latents, once: the datasets, the frozen autoencoders ("codecs"), and the latent cache that train.py reads.

    python encode.py --dataset shapes                            # draw ten shapes, encode them, cache the latents
    python encode.py --dataset flowers                           # download Oxford Flowers, encode them with the RAE
    torchrun --nproc_per_node=8 encode.py --dataset imagenet     # several devices; killed, it goes on where it stopped
    python encode.py --dataset data/flowers12/train              # your own folder: one sub-folder per class
    python encode.py --reconstruct photo.jpg --codec rae         # originals beside reconstructions, and their PSNR
    python encode.py --fit --dataset shapes --fit_steps 9000     # fit the small codec anew (how assets/small_shapes.pt was made)

train.py does the first four by itself when the cache is missing.

A codec has encode: images (B, 3, S, S) in [0, 1] -> latents (B, T, C), decode: back again, image_size and latent_shape. There are two:
the RAE, a frozen DINOv2 with a ViT decoder trained to see what DINOv2 saw (`RAE`), and a small one that needs no download
(`SmallCodec`). Shapes: B images, S image size, T tokens, C latent channels, D width, H heads.
"""
import argparse
import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from model import rotate, to_sphere

try:
    import fcntl
except ImportError:                                                # Windows: two encoders on one cache are not kept apart
    fcntl = None

# ------------------------------------------------------------------------------------------- for every script


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the script's docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def run(main):
    """Run a script's main(): what the user can mend ends in one line and a non-zero status, a bug in a traceback."""
    try:
        main()
    except OSError as error:
        full = "; free some disk space and run the command again (train.py: with --resume)" if error.errno == errno.ENOSPC else ""
        sys.exit(f"error: {f'{error.filename}: {error.strerror}' if error.filename else error}{full}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not dist.is_initialized() or "onnection" not in str(error):
            raise
        sys.exit(f"error: process {dist.get_rank()} has lost another one, whose own message says why ({str(error).splitlines()[0][:150]})")
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


def checksum(path, kind="sha256"):
    """Hex digest of a file, read in pieces."""
    digest = hashlib.new(kind)
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


def autocast(device, dtype="auto"):
    """bf16 autocast on CUDA, plain float32 elsewhere (on CPUs bf16 is slower for small models), or as dtype says."""
    if dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def join(device):
    """Join the other processes if torchrun started several. Returns (rank, number of processes, this one's torch.device)."""
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), pick_device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)                # its backward has given NaN in bf16 on H100
    if world > 1 and not dist.is_initialized():                    # the others wait long while rank 0 downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return rank, world, device


def first(work):
    """Let rank 0 do what must be done once; the others wait."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        work()
    if dist.is_initialized():
        dist.barrier()


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


# What can be downloaded: addresses, and md5 sums where they are known.
DOWNLOADS = {
    "flowers": [("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
                ("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/imagelabels.mat", "e0620be6f572b9609742df49c70aed4d")],
    "afhq": [("https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1", None)],
}
PUBLISHED = {"flowers": 8189, "afhq": 14_630, "imagenet": 1_281_167}    # images; of afhq and imagenet the training part
FLOWERS = """pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, bird of paradise,
    monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris, globe-flower, purple coneflower,
    peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger, grape hyacinth, corn poppy,
    prince of wales feathers, stemless gentian, artichoke, sweet william, carnation, garden phlox, love in the mist, mexican aster,
    alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily,
    poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower,
    pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata, japanese anemone,
    black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea,
    water lily, rose, thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine,
    desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia,
    mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily""".replace("\n   ", "").split(", ")    # the labels 1 to 102


def download(url, path, md5=None):
    """Fetch url to path, going on where an earlier try broke off. Raises OSError or ValueError that says what to do."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.is_file() else 0
    by_hand = f"run the command again to go on, or get {url} by hand and put it at {path}"
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"} | ({"Range": f"bytes={done}-"} if done else {}))
        with urllib.request.urlopen(request, timeout=60) as answer, open(part, "ab" if answer.status == 206 else "wb") as file:
            length = answer.headers.get("Content-Length")
            total = file.tell() + int(length) if length else None
            with tqdm(total=total, initial=file.tell(), desc=path.name, unit="B", unit_scale=True) as bar:
                while piece := answer.read(1 << 20):
                    bar.update(file.write(piece))
            if total and file.tell() != total:
                raise ConnectionError(f"the connection broke off after {file.tell():,} of {total:,} bytes")
    except OSError as error:                                       # urllib's errors are OSErrors, too
        if getattr(error, "code", None) != 416:                    # 416: nothing is left to be sent
            if error.errno == errno.ENOSPC:
                raise OSError(error.errno, error.strerror, str(part)) from error
            raise OSError(f"{path}: cannot be downloaded ({error}); {by_hand}") from error
    if md5 and (found := checksum(part, "md5")) != md5:
        part.unlink()
        raise ValueError(f"{path}: what came has the md5 sum {found}, not {md5}; {by_hand.replace('to go on', 'to try anew')}")
    os.replace(part, path)


def unpack(archive, folder, inner):
    """Unpack a .tgz or .zip so that `inner`, a folder somewhere in it, and what lies beside it come to lie in `folder`."""
    temporary = folder / ".unpacked.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(temporary)                         # drops leading slashes and ..
        else:
            with tarfile.open(archive) as file:
                file.extractall(temporary, filter="data")          # refuses what would land outside
    except Exception as error:                                     # tarfile, zipfile, gzip and zlib raise many kinds
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{archive}: cannot be unpacked ({error}); delete it and run the command again to fetch it anew") from error
    home = next((Path(place) for place, folders, _ in os.walk(temporary) if inner in folders), None)
    if home is None:
        shutil.rmtree(temporary)
        raise ValueError(f"{archive}: holds no folder called {inner}, so it is another archive; delete it and run the command again")
    for part in sorted(home.iterdir(), key=lambda part: part.name == inner):    # `inner` last: once there, all is there
        shutil.rmtree(folder / part.name, ignore_errors=True)
        part.rename(folder / part.name)
    shutil.rmtree(temporary)


def obtain(dataset, folder):
    """Download and unpack one of DOWNLOADS into its folder, as far as that has not been done."""
    inner = {"flowers": "jpg", "afhq": "train"}[dataset]
    for url, md5 in DOWNLOADS[dataset]:
        path = folder / url.split("/")[-1].split("?")[0]
        packed = path.suffix in (".tgz", ".zip")
        if packed and (folder / inner).is_dir():
            continue
        if not path.is_file():
            download(url, path, md5)
        if packed:
            print(f"unpacking {path}", flush=True)
            unpack(path, folder, inner)


def flower_images(folder):
    """Oxford's jpg/image_00001.jpg... and their labels: (classes, labels, paths)."""
    paths, file = sorted(str(path) for path in (folder / "jpg").glob("*.jpg")), folder / "imagelabels.mat"
    try:
        numbers, labels = np.unique(scipy.io.loadmat(file)["labels"].ravel().astype(int), return_inverse=True)
        classes = [FLOWERS[number - 1] for number in numbers]
    except Exception as error:                                     # scipy raises many kinds on a broken file
        raise ValueError(f"{file}: cannot be read as Oxford's labels ({error}); delete it and run the command again to fetch it anew") from error
    if len(labels) != len(paths):
        raise ValueError(f"{file}: has {len(labels)} labels for the {len(paths)} images in {folder / 'jpg'}; "
                         "delete both and run the command again to fetch them anew")
    return classes, labels, paths


def folder_images(folder):
    """The images of a folder with one sub-folder per class: (classes, labels, paths)."""
    classes, labels, paths = [], [], []
    for sub in sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] not in "._" and not (f / "meta.json").exists()):    # caches
        found = sorted(os.path.join(place, file) for place, _, files in os.walk(sub) for file in files
                       if file.lower().endswith(SUFFIXES) and file[0] != ".")
        if not found:
            raise ValueError(f"{sub}: holds no images ({' '.join(SUFFIXES)}); add some or remove the folder")
        labels += [len(classes)] * len(found)
        classes.append(sub.name)
        paths += found
    return classes, labels, paths


def quiet_worker():
    """How worker processes take signals: Ctrl-C is the main process's business, and it must be able to end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def find_dataset(dataset, data_dir="data"):
    """Look a dataset up without reading its images: "shapes", "flowers" or "afhq" (downloaded if need be), "imagenet" (the user's, in data_dir),
    or a folder with one sub-folder per class.

    Returns a dict: name (of its place under data_dir and out/), classes, labels (N,) int64, paths (N strings, or None for shapes) and
    source, a digest of the file names and sizes. Raises OSError or ValueError with what is missing.
    """
    if dataset == "shapes":
        labels = np.arange(SHAPES_COUNT) % len(SHAPES)
        return dict(dataset=dataset, name=dataset, classes=list(SHAPES), labels=labels, paths=None, source=f"drawn {SHAPES_COUNT}")
    home = Path(data_dir) / dataset
    if dataset in DOWNLOADS:
        first(lambda: obtain(dataset, home))
    folder = next((f for f in ([home / "train", home] if dataset in PUBLISHED else [Path(dataset), home]) if f.is_dir()), None)
    if folder is None and dataset == "imagenet":
        raise FileNotFoundError(f"{home}: ImageNet is not there; get ILSVRC2012_img_train.tar from https://image-net.org, unpack it to one sub-folder "
                                f"per class (n01440764, ...), and link that: mkdir -p {home} && ln -s /path/to/it {home / 'train'}")
    if folder is None:
        raise FileNotFoundError(f"{dataset}: no such dataset; give shapes, flowers, afhq, imagenet, or a folder with one sub-folder of images per class")
    name, resolved, inside = dataset, folder.resolve(), Path(data_dir).resolve()
    if dataset not in PUBLISHED:                                   # data/flowers12/train is called flowers12-train
        parts = resolved.relative_to(inside).parts if resolved.is_relative_to(inside) else resolved.parts[-2:]
        name = "-".join(part for part in parts if part.strip("/\\"))
        name = f"{name}-folder" if name == "shapes" else name
    classes, labels, paths = flower_images(folder) if dataset == "flowers" else folder_images(folder)
    if not paths:
        raise ValueError(f"{folder}: holds no images; expected one sub-folder per class with {' '.join(SUFFIXES)} files in it")
    listing = "\n".join(f"{os.path.relpath(path, folder)} {os.path.getsize(path)} {label}" for path, label in zip(paths, labels))
    return dict(dataset=dataset, name=name, classes=classes, labels=np.array(labels, np.int64), paths=paths,
                source=hashlib.sha256(listing.encode()).hexdigest())


def read_images(found, size, batch_size, workers=0, skip_bad=False, starts=None):
    """Yield a dataset's images in order: (start, images (B, size, size, 3) uint8, bad), bad being positions left black.

    Files are decoded by `workers` processes, a batch ahead. starts: which batches, by their first image (default: all).
    An unreadable file raises ValueError, or with skip_bad is named and left black.
    """
    starts = list(range(0, len(found["labels"]), batch_size) if starts is None else starts)
    if found["paths"] is None:
        images, _ = shapes(len(found["labels"]))
        for start in starts:
            batch = images[start:start + batch_size]
            if size != 32:
                batch = np.stack([np.asarray(center_crop(Image.fromarray(x), size)) for x in batch])
            yield start, batch, []
        return
    with multiprocessing.Pool(max(1, workers), quiet_worker) as pool:
        ask = lambda starts: pool.map_async(partial(try_load_image, size=size), found["paths"][starts[0]:starts[0] + batch_size]) if starts else None
        ahead = ask(starts)
        for number, start in enumerate(starts):
            loaded, ahead = ahead.get(), ask(starts[number + 1:number + 2])
            bad = [i for i, image in enumerate(loaded) if isinstance(image, str)]
            for i in bad:
                if not skip_bad:
                    raise ValueError(loaded[i])
                tqdm.write(f"skipped {loaded[i].removesuffix('; mend or delete it, or pass --skip_bad')}", file=sys.stderr)
                loaded[i] = np.zeros((size, size, 3), np.uint8)
            yield start, np.stack(loaded), bad


# ------------------------------------------------------------------------------------------- the representation autoencoder


class DecoderLayer(nn.Module):
    """A pre-norm transformer layer under the published names: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, hidden, heads, mlp):
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict(dict(
            attention=nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}),
            output=nn.ModuleDict(dict(dense=nn.Linear(hidden, hidden)))))
        self.intermediate = nn.ModuleDict(dict(dense=nn.Linear(hidden, mlp)))
        self.output = nn.ModuleDict(dict(dense=nn.Linear(mlp, hidden)))
        self.layernorm_before = nn.LayerNorm(hidden, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x):
        normed = self.layernorm_before(x)
        q, k, v = (self.attention.attention[name](normed).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        x = x + self.attention.output.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))    # (B, 1 + T, D)
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class ViTDecoder(nn.Module):
    """RAE's decoder, a ViT as in MAE: tokens, a class token before them, learned positions, and a patch of pixels out of each token.

    Its state dict has the published names. hidden: width. patch: pixels. grid: tokens a side.
    Source: Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690; the published ViT-XL.
    """

    def __init__(self, hidden=1152, depth=28, heads=16, mlp=4096, latent_dim=768, patch=16, grid=16):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.decoder_embed = nn.Linear(latent_dim, hidden)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, hidden))    # trained, so never recomputed
        self.decoder_layers = nn.ModuleList(DecoderLayer(hidden, heads, mlp) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.decoder_pred = nn.Linear(hidden, patch * patch * 3)

    def forward(self, tokens):
        """(B, grid * grid, latent_dim), not normalised -> (B, 3, S, S) in ImageNet-normalised space, S = grid * patch."""
        if tokens.shape[1] != self.grid ** 2:
            raise ValueError(f"the decoder takes {self.grid ** 2} tokens, got {tokens.shape[1]}")
        x = torch.cat([self.trainable_cls_token.expand(len(tokens), -1, -1), self.decoder_embed(tokens)], dim=1)
        x = x + self.decoder_pos_embed                                                             # (B, 1 + T, D)
        for layer in self.decoder_layers:
            x = layer(x)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:]                                         # (B, T, P * P * 3), colour last
        x = x.unflatten(2, (self.patch, self.patch, 3)).unflatten(1, (self.grid, self.grid))       # (B, gy, gx, py, px, 3)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                                # (B, 3, S, S)


RAES = {    # codec -> DINOv2's letter, latent channels C, the collection's folder, first digits of the decoder's and statistics' sha256 if known
    "rae": ("b", 768, "wReg_base", "-5fedf7c9", "-84ede66d"),
    "rae-small": ("s", 384, "wReg_small", "", ""),
    "rae-large": ("l", 1024, "wReg_large", "", ""),
}
COLLECTION = "https://huggingface.co/nyu-visionx/RAE-collections/resolve/main"


class RAE(nn.Module):
    """The paper's frozen autoencoder: DINOv2 with registers at 224 pixels, its tokens normalised place by place, and a ViT-XL decoder.

    Published weights, fetched by torch.hub into torch.hub.get_dir() or found there. name: a key of RAES. decoder: False leaves the
    decoder out. Raises OSError that lists what is missing, with address and place, or ValueError that names a damaged file.
    Source: RAE, arXiv 2510.11690; DINOv2, arXiv 2304.07193; registers, arXiv 2309.16588.
    """
    image_size = 256

    def __init__(self, name="rae", decoder=True):
        super().__init__()
        letter, channels, folder, decoder_hash, stat_hash = RAES[name]
        self.latent_shape = (256, channels)                        # (T, C)
        hub = Path(torch.hub.get_dir())
        entry = f"dinov2_vit{letter}14_reg"
        files = {what: (url, hub / "checkpoints" / file) for what, url, file in (
            ("encoder", f"https://dl.fbaipublicfiles.com/dinov2/{entry.removesuffix('_reg')}/{entry}4_pretrain.pth", f"{entry}4_pretrain.pth"),
            ("statistics", f"{COLLECTION}/stats/dinov2/{folder}/imagenet1k/stat.pt", f"rae-{folder}-stat{stat_hash}.pt"),
            ("decoder", f"{COLLECTION}/decoders/dinov2/{folder}/ViTXL_n08/model.pt", f"rae-{folder}-decoder{decoder_hash}.pt"))}
        files = {"code": ("https://github.com/facebookresearch/dinov2/archive/refs/heads/main.zip, unpacked",
                          hub / "facebookresearch_dinov2_main")} | files
        os.environ.setdefault("XFORMERS_DISABLED", "1")            # one attention everywhere
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")    # DINOv2's own code would unpickle anything

        def fetch(what):
            url, path = files[what]
            return torch.hub.load_state_dict_from_url(url, file_name=path.name, map_location="cpu", check_hash=True, weights_only=True)

        try:
            at = "encoder"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                    # xFormers is not available
                self.encoder = torch.hub.load("facebookresearch/dinov2:main", entry, skip_validation=True, verbose=False)
            # RAE drops the last norm's weights: every token has mean 0 and variance 1
            self.encoder.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
            at = "statistics"
            stat = fetch(at)
            tokens = lambda x: x.float().reshape(channels, 256).T.contiguous()                     # (C, 16, 16) -> (T, C)
            mean = stat.get("mean")                                # None for DINOv2-B: only the variance is published
            self.register_buffer("mean", torch.zeros(256, channels) if mean is None else tokens(mean))
            self.register_buffer("std", (tokens(stat["var"]) + 1e-5).sqrt())
            at = "decoder"
            if decoder:
                with torch.device("meta"):
                    self.decoder = ViTDecoder(latent_dim=channels)
                self.decoder.load_state_dict(fetch(at), assign=True)
        except Exception as error:                                 # urllib, zipfile, pickle, torch.load, load_state_dict: many kinds
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise OSError(error.errno, error.strerror, str(hub)) from error
            if at == "encoder" and (isinstance(error, (ImportError, FileNotFoundError)) or not files["code"][1].is_dir()):
                at = "code"
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            missing = [f"{url} -> {path}" for url, path in files.values() if not path.exists()]
            if missing and not files[at][1].exists():
                raise FileNotFoundError(f"{name}: weights are missing and could not be fetched ({reason}); get them by hand, or set TORCH_HOME or "
                                        f"--weights_dir to where they are: {'; '.join(missing)}") from error
            url, path = files[at]
            raise ValueError(f"{path}: is damaged or another file ({reason}); delete it and run the command again, or get it by hand: {url}") from error
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def encode(self, images):
        """(B, 3, 256, 256) in [0, 1] -> (B, 256, C) float32, normalised place by place."""
        x = images.float()
        if x.shape[-1] != 224:
            x = F.interpolate(x, size=(224, 224), mode="bicubic", align_corners=False)    # without antialias, as RAE was trained
        x = self.encoder.forward_features((x - self.pixel_mean) / self.pixel_std)["x_norm_patchtokens"]
        return (x.float() - self.mean) / self.std

    def decode(self, z):
        """(B, 256, C) -> (B, 3, 256, 256) in [0, 1]."""
        x = self.decoder(z.float() * self.std + self.mean)
        return (x.float() * self.pixel_std + self.pixel_mean).clamp(0, 1)


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
CODECS = (*SMALL_CODECS, *RAES)
FIT_IMAGES = 60_000                            # a small codec is fitted on so many, or all there are


def default_codec(dataset):
    """The RAE for the real datasets, the small codec for shapes and for folders."""
    return "rae" if dataset in PUBLISHED else "small"


def codec_path(name, dataset_name, data_dir="data"):
    """Where a small codec's weights lie: shipped for shapes, else beside the dataset's caches. None for the RAE, which torch.hub keeps."""
    if name in RAES:
        return None
    if (name, dataset_name) == ("small", "shapes"):
        return Path(__file__).parent / "assets" / "small_shapes.pt"
    return Path(data_dir) / dataset_name / f"{name}.pt"


def load_codec(name, path=None, device="cpu", decoder=True):
    """Return a frozen codec by name, in eval mode: encode, decode, image_size, latent_shape.

    name: one of CODECS. path: a small codec's weights (default: those shipped for shapes). decoder: whether the RAE's is needed.
    Raises OSError or ValueError.
    """
    if name in RAES:
        return RAE(name, decoder).to(device)
    if name not in SMALL_CODECS:
        raise ValueError(f"codec {name!r} is not known; choose from {', '.join(CODECS)}")
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


def codec_device(codec):
    """The device a codec is on."""
    return next(codec.buffers()).device


def fingerprint(codec):
    """Hex digest of what a codec's latents depend on: all its weights but the decoder's."""
    digest = hashlib.sha256()
    for name, tensor in codec.state_dict().items():
        if not name.startswith("decoder."):
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


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


def remake_command(found, codec_name, data_dir, flip=False):
    """The command that makes a dataset's cache (again)."""
    return (f"python encode.py --dataset {found['dataset']} --codec {codec_name}" + " --flip" * flip
            + (f" --data_dir {data_dir}" if str(data_dir) != "data" else ""))


def open_cache(found, codec_name, data_dir="data", codec=None, flip=False):
    """Open and check a dataset's cached latents.

    codec: if given, the cache must be its work. flip: whether there must be mirrored views.
    Returns (latents, labels, meta): a read-only float16 memory map (N, T, C), labels (N,) int64 with -1 for images that could
    not be read, and the dict of meta.json. With mirrored views N is twice the number of images, the second half being the mirrored ones.
    Raises FileNotFoundError without a cache, ValueError for one that is damaged, belongs to another codec, or was made from other images.
    """
    folder = Path(data_dir) / found["name"] / codec_name
    mend = f"; remake it: {remake_command(found, codec_name, data_dir, flip)}"
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
    if codec and (meta["codec_sha256"] != fingerprint(codec) or meta["image_size"] != codec.image_size or shape[1:] != codec.latent_shape):
        raise ValueError(f"{folder}: was made with another codec than {codec_path(codec_name, found['name'], data_dir) or codec_name}{mend}")
    if meta["source"] != found["source"]:
        raise ValueError(f"{folder}: was made from other images than {found['dataset']} holds now{mend}")
    if flip and not meta.get("flip"):
        raise ValueError(f"{folder}: has no mirrored views, as --flip asks for{mend}")
    return latents, labels, meta


def read_rows(latents, rows):
    """Rows of a cache's memory map as a float16 tensor (B, T, C), by reading the file: touched pages of the map would count as memory."""
    out = np.empty((len(rows), *latents.shape[1:]), latents.dtype)
    with open(latents.filename, "rb", buffering=0) as file:
        for row, place in zip(rows.tolist(), out):
            file.seek(latents.offset + row * place.nbytes)
            if file.readinto(place) != place.nbytes:
                raise ValueError(f"{latents.filename}: was cut short while in use; make it again with encode.py")
    return torch.from_numpy(out)


def start_cache(temporary, folder, plan):
    """Make the files of an unfinished cache, or keep those of an earlier try at the same. Returns the lock, to be held open."""
    temporary.mkdir(parents=True, exist_ok=True)
    lock = open(temporary / "lock", "w")
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)       # ends with the process, however that ends
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is encoding this dataset just now; wait for it, or stop it") from error
    try:
        earlier = json.loads((temporary / "plan.json").read_text())
        same = earlier | dict(batch_size=0) == json.loads(json.dumps(plan | dict(batch_size=0)))
    except (OSError, ValueError):
        same = False
    for file in [] if same else temporary.glob("*.*"):
        file.unlink()
    latents, need, free = temporary / "latents.npy", 2 * math.prod(plan["shape"]), shutil.disk_usage(temporary).free
    taken = latents.stat().st_blocks * 512 if same and hasattr(os.stat_result, "st_blocks") else 0
    print(f"{folder}: {plan['shape'][0]:,} latents of {plan['shape'][1]}x{plan['shape'][2]} take {need / 1e9:,.3f} GB, {free / 1e9:,.1f} GB are free"
          + (f", {taken / 1e9:,.3f} GB are there already" if taken else ""), flush=True)
    if need > free + taken:
        raise OSError(f"{folder}: the latents need {(need - taken) / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free; "
                      "free some, point --data_dir at another disk, or encode while training: train.py --live")
    if not same:
        views = 2 if plan["flip"] else 1
        np.lib.format.open_memmap(latents, "w+", np.float16, plan["shape"])                        # takes no space until it is written
        np.save(temporary / "labels.npy", np.zeros(plan["shape"][0], np.int64))
        np.save(temporary / "moments.npy", np.full((math.ceil(plan["shape"][0] / views / plan["batch_size"]), 2, plan["shape"][2]), np.nan))
        write_file(temporary / "plan.json", lambda out: out.write(json.dumps(plan).encode()))
    return lock


@torch.no_grad()
def encode_share(found, codec, temporary, plan, workers, skip_bad, dtype):
    """Encode this process's share of the batches that are not done yet; a batch is done when its sums stand in moments.npy."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, n, views, batch_size = codec_device(codec), len(found["labels"]), 2 if plan["flip"] else 1, plan["batch_size"]
    layout = np.load(temporary / "latents.npy", mmap_mode="r")
    labels, moments = (np.load(temporary / f"{name}.npy", mmap_mode="r+") for name in ("labels", "moments"))
    todo = (np.flatnonzero(np.isnan(moments).any((1, 2)))[rank::world] * batch_size).tolist()
    if world > 1:
        dist.barrier()                                             # all have looked before anybody writes

    def store(start, z, sums, ready, bad):
        """Write a batch, and then that it is done."""
        if ready:
            ready.synchronize()
        try:
            for view in range(views):
                row = view * n + start
                file.seek(layout.offset + row * layout[0].nbytes)
                left = memoryview(z[view].numpy()).cast("B")
                while left:
                    left = left[file.write(left):]
                labels[row:row + z.shape[1]] = found["labels"][start:start + z.shape[1]]
                labels[row + np.array(bad, int)] = -1
            os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; what has been encoded is kept", file.name) from error
        labels.flush()
        moments[start // batch_size] = sums.numpy()
        moments.flush()

    writing, mine = None, sum(min(batch_size, n - start) for start in todo)
    with open(temporary / "latents.npy", "r+b", buffering=0) as file, ThreadPoolExecutor(1) as writer, tqdm(
            total=mine, desc=f"encoding {found['name']}", unit="image", mininterval=1, disable=rank > 0) as bar:
        for start, images, bad in read_images(found, codec.image_size, batch_size, workers, skip_bad, todo):
            x = to_float(images, device)
            with autocast(device, dtype):
                z = torch.stack([codec.encode(view) for view in (x, x.flip(3))[:views]])           # (views, B, T, C)
            good = z[:, np.delete(np.arange(len(images)), bad)]
            sums = torch.stack([good.sum((0, 1, 2)), good.pow(2).sum((0, 1, 2))])                  # (2, C)
            z, sums = (x.to("cpu", non_blocking=device.type == "cuda") for x in (z.half(), sums))
            ready = torch.cuda.Event() if device.type == "cuda" else None
            if ready:
                ready.record()
            if writing:
                writing.result()                                   # one batch is written while the next is encoded
            writing = writer.submit(store, start, z, sums, ready, bad)
            bar.update(len(images))
        if writing:
            writing.result()


def finish_cache(found, temporary, folder, plan):
    """Write meta.json and rename the folder to where train.py looks for it."""
    views, labels, moments = 2 if plan["flip"] else 1, np.load(temporary / "labels.npy"), np.load(temporary / "moments.npy")
    if missing := sorted(set(range(len(found["classes"]))) - set(labels.tolist())):
        raise ValueError(f"{found['dataset']}: no readable image of class {found['classes'][missing[0]]}; add some or remove the folder")
    mean, square = moments.sum(0) / ((labels >= 0).sum() * plan["shape"][1])
    skipped = int((labels < 0).sum()) // views
    write_file(temporary / "meta.json", lambda file: file.write(json.dumps(plan | dict(
        skipped=skipped, mean=mean.tolist(), std=np.sqrt(square - mean ** 2).tolist(),
        sha256=hashlib.sha256(moments.tobytes() + labels.tobytes()).hexdigest()), indent=1).encode()))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for name in ("moments.npy", "plan.json", "lock"):              # from here on of no use
        (folder / name).unlink()
    number = len(found["labels"])
    print(f"{folder}: {number - skipped:,} images of {len(found['classes'])} classes" + f", {skipped} unreadable ones skipped" * (skipped > 0)
          + ", and their mirrored views" * plan["flip"])
    if number != PUBLISHED.get(found["dataset"], number):
        print(f"warning: {found['dataset']} has {number:,} images here, the published one has {PUBLISHED[found['dataset']]:,}", file=sys.stderr)


def write_cache(found, codec_name, codec, data_dir="data", batch_size=128, workers=0, skip_bad=False, flip=False, dtype="auto"):
    """Encode a dataset into data_dir/<name>/<codec>/: latents.npy, labels.npy, meta.json; under a temporary name until whole.

    Under torchrun every process takes its share. Killed, it goes on where it stopped, with whatever number of processes.
    """
    folder = Path(data_dir) / found["name"] / codec_name
    temporary = folder.with_name(f".{codec_name}.tmp")
    plan = dict(codec=codec_name, codec_sha256=fingerprint(codec), shape=(len(found["labels"]) * (2 if flip else 1), *codec.latent_shape),
                image_size=codec.image_size, classes=found["classes"], source=found["source"], flip=flip, batch_size=batch_size)
    held = []                                                      # the lock, in the first process
    first(lambda: held.append(start_cache(temporary, folder, plan)))
    plan = json.loads((temporary / "plan.json").read_text())       # an earlier try's batch size counts
    encode_share(found, codec, temporary, plan, workers, skip_bad, dtype)
    if dist.is_initialized():
        dist.barrier()
    first(lambda: (held[0].close(), finish_cache(found, temporary, folder, plan)))


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


def prepare(found, codec_name, data_dir="data", device="cpu", workers=0, skip_bad=False, flip=False, live=False, dtype="auto"):
    """Make what a dataset still lacks: the codec's weights and, unless live, the latent cache. Neither is touched when it is there."""
    path = codec_path(codec_name, found["name"], data_dir)
    first(lambda: path is None or path.is_file() or fit(found, codec_name, data_dir, device, workers, skip_bad))
    if not live and not (Path(data_dir) / found["name"] / codec_name / "meta.json").is_file():
        write_cache(found, codec_name, load_codec(codec_name, path, device, decoder=False), data_dir, 128, workers, skip_bad, flip, dtype)


@torch.no_grad()
def bench(found, codec_name, codec, data_dir, batch_size, workers, dtype):
    """Print the images/s of the bare encoder, and those of the whole way from files to the cache at the same batch size."""
    device = codec_device(codec)
    x = torch.rand(batch_size, 3, codec.image_size, codec.image_size, device=device)

    def rate(work, x, times):
        with autocast(device, dtype):
            work(x).sum().item()                                   # warms up, and waits for the device
            started = time.time()
            for _ in range(times):
                last = work(x)
            last.sum().item()
        return times * batch_size / (time.time() - started)

    times = max(8, min(200, round(30 * rate(codec.encode, x, 1) / batch_size)))                    # half a minute or so
    bare, decoded = rate(codec.encode, x, times), rate(codec.decode, codec.encode(x), 1)
    chosen = np.resize(np.arange(len(found["labels"])), times * batch_size)
    some = found | dict(dataset="bench", classes=["any"], labels=np.zeros(len(chosen), int), paths=found["paths"] and [found["paths"][i] for i in chosen])
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as folder, contextlib.redirect_stdout(None):
        started = time.time()
        write_cache(some, codec_name, codec, folder, batch_size, workers, skip_bad=True, dtype=dtype)
        whole = times * batch_size / (time.time() - started)
    print(f"{codec_name} on {device.type}, batch {batch_size}, {workers} workers: bare encoder {bare:.2f} images/s, from files to the cache "
          f"{whole:.2f} ({whole / bare:.0%}); bare decoder {decoded:.2f}")


def reconstruct(where, found, codec, out, batch_size, workers, dtype):
    """Write originals beside their reconstructions, the first 32, to a PNG, and print the PSNR of all: of an image, a folder's, or 20 of the dataset's."""
    device, psnr, shown = codec_device(codec), [], []
    if not where:
        paths = found["paths"] and [found["paths"][i] for i in np.linspace(0, len(found["paths"]) - 1, 20).astype(int)]
    else:
        where = Path(where)
        paths = [str(where)] if where.is_file() else sorted(str(path) for path in where.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
        if not paths:
            raise FileNotFoundError(f"{where}: no such image, or no folder with images ({' '.join(SUFFIXES)}) in it")
    count = len(paths) if paths else 20                            # shapes have no paths
    batches = read_images(dict(labels=np.zeros(count), paths=paths), codec.image_size, min(batch_size, count), workers)
    for _, images, _ in tqdm(batches, unit="batch", disable=count <= batch_size):
        x = to_float(images, device)
        with torch.no_grad(), autocast(device, dtype):
            y = codec.decode(codec.encode(x))
        psnr += (-10 * (y.float() - x).pow(2).mean((1, 2, 3)).clamp_min(1e-10).log10()).tolist()
        shown += [np.concatenate(pair, axis=1) for pair in zip(images, to_uint8(y))][:32 - len(shown)]             # (S, 2S, 3)
    for path, value in list(zip(paths or [], psnr))[:32]:
        print(f"{value:6.2f} dB  {path}")
    columns = min(4, len(shown))
    shown += [np.full_like(shown[0], 255)] * (-len(shown) % columns)
    rows = [np.concatenate(shown[i:i + columns], axis=1) for i in range(0, len(shown), columns)]
    write_file(out, partial(Image.fromarray(np.concatenate(rows)).save, format="PNG"))
    print(f"{np.mean(psnr):6.2f} dB  mean of {len(psnr)}; wrote {out}: originals on the left, reconstructions beside them")


def main():
    parser = argparse.ArgumentParser(usage="python encode.py [flags], see --help", description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("what to encode, and with what")
    group.add_argument("--dataset", default="shapes", help="shapes, flowers, afhq, imagenet, or a folder with one sub-folder of images per class")
    group.add_argument("--data_dir", default="data", help="folder that holds datasets and caches")
    group.add_argument("--codec", choices=CODECS, help="frozen autoencoder; small: 32x32 images, small64: 64x64, rae: 256x256; "
                        "default: rae for flowers, afhq, imagenet and --reconstruct PATH, else small")
    group.add_argument("--weights_dir", help="where the RAE's weights are, instead of torch.hub's folder")
    group.add_argument("--flip", action="store_true", help="cache the mirrored views too, in twice the space")
    group.add_argument("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    group = parser.add_argument_group("other work, instead of filling the cache")
    group.add_argument("--reconstruct", metavar="PATH", nargs="?", const="", help="write this image, a folder's images, or without PATH some of the "
                        "dataset's, beside their reconstructions")
    group.add_argument("--out", default="out/reconstruction.png", help="the picture that --reconstruct writes")
    group.add_argument("--fit", action="store_true", help="fit the small codec on the dataset instead of encoding it")
    group.add_argument("--fit_steps", type=int, default=1500, help="optimizer steps of --fit, 128 images each")
    group.add_argument("--bench", action="store_true", help="time the encoder alone and with reading and writing, on the dataset's images")
    group = parser.add_argument_group("machine")
    group.add_argument("--batch_size", type=int, default=128, help="images at a time, per process")
    group.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on cuda, else float32")
    args = parser.parse_args()
    for name in ("fit_steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    codec_name = args.codec or ("rae" if args.reconstruct else default_codec(args.dataset))
    if args.fit and codec_name in RAES:
        parser.error(f"--fit: the {codec_name} is used as published; only the small codecs are fitted")
    if args.weights_dir:
        torch.hub.set_dir(args.weights_dir)
    _, _, device = join(args.device)
    found = find_dataset(args.dataset, args.data_dir)
    path = codec_path(codec_name, found["name"], args.data_dir)
    first(lambda: (args.fit or path and not path.is_file()) and fit(found, codec_name, args.data_dir, device, args.workers, args.skip_bad, args.fit_steps))
    if not args.fit:
        codec = load_codec(codec_name, path, device, decoder=args.bench or args.reconstruct is not None)
        if args.reconstruct is not None:
            reconstruct(args.reconstruct, found, codec, args.out, args.batch_size, args.workers, args.dtype)
        elif args.bench:
            bench(found, codec_name, codec, args.data_dir, args.batch_size, args.workers, args.dtype)
        else:
            try:
                open_cache(found, codec_name, args.data_dir, codec, args.flip)
                print(f"{args.data_dir}/{found['name']}/{codec_name}: is whole already; remove it to have it made anew")
            except (FileNotFoundError, ValueError):                # there is none, or not one of this codec and these images
                write_cache(found, codec_name, codec, args.data_dir, args.batch_size, args.workers, args.skip_bad, args.flip, args.dtype)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
