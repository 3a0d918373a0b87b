"""Images to latents, once: the datasets, the frozen autoencoders ("codecs"), the latent cache.

    python encode.py --dataset flowers                           # downloads Oxford Flowers
    torchrun --nproc_per_node=8 encode.py --dataset imagenet     # killed, it goes on where it was
    python encode.py --reconstruct photo.jpg --codec rae         # above its reconstruction
"""
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
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

# ------------------------------------------------------------------------------ for every script

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun

class UserError(Exception):
    """Something the user can fix: what is wrong and what to do, in one line."""

def run(main):
    """Run a script's main(): a UserError ends in one line and status 1, a bug in a traceback."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()        # its threads must not outlive python
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; every file already written is complete")

@contextlib.contextmanager
def reading(what, remedy):
    """Whatever error the reader of a file raises inside becomes one UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what} ({reason}); {remedy}") from error

def write_file(path, write):
    """Call write(file) on a temporary file, then rename it: `path` never holds half a file."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: {cause.strerror}; fix that and run the command again") from error
    finally:
        if os.path.exists(temporary):
            temporary.unlink()

def join(args):
    """Join the other processes, if torchrun started several: (rank, world size, device)."""
    torch.hub.set_dir(args.weights_dir)
    if WORLD > 1 and not dist.is_initialized():     # a day: the first one may download
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    name = str(accelerator) if args.device == "auto" else args.device
    if name == "cuda":                              # without a number, each process its own card
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with reading(f"--device {name}: not available", "use auto or cpu"):
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
            torch.backends.cuda.enable_cudnn_sdp(False)     # its backward has given NaN in bf16
        return RANK, WORLD, torch.empty(0, device=name).device

def autocast(device, dtype):        # dtype: auto is bfloat16 on cards that compute in it
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = dtype == "bfloat16" or (dtype == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

def from_first(work):
    """The first process does the work; all return its result, or end with its error."""
    box = [None]
    if dist.is_initialized():
        dist.barrier()                          # all have done what comes before
    if RANK == 0:
        try:
            box = [work()]
        except UserError as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], UserError):
        raise box[0] if RANK == 0 else SystemExit(1)
    return box[0]

def within(kind, low, high=float("inf")):           # makes an argparse type
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise ArgumentTypeError(f"must be from {low} to {high}, got {text}")
    return number

def make_parser(doc):
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument_group("place and machine").add_argument
    add("--data_dir", default="data", help="folder of datasets and latents; default: data")
    add("--weights_dir", default=torch.hub.get_dir(), help="folder of weights; default: torch.hub")
    add("--workers", type=within(int, 1), default=min(16, os.cpu_count() or 1), help="threads")
    add("--device", default="auto", help="auto (the default), cuda, cuda:N, mps or cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: by device")
    return parser

# ----------------------------------------------------------------------------------- the datasets

ASSETS = Path(__file__).parent / "assets"
OUTLINES = json.loads((ASSETS / "shapes.json").read_text())     # class -> polygon, hole
SHAPES_COUNT = 30_000                                           # images of the dataset "shapes"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
NAMED = {       # dataset -> sub-folder of its training images, address of an archive, its md5
    "shapes": ("", None, None),
    "flowers": ("jpg", f"{OXFORD}/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
    "afhq": ("train", "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1", None),
    "imagenet": ("train", None, None)}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

def shapes(n, seed=0):
    """Draw n shapes of ten classes in turn: images (n, 32, 32, 3) uint8, labels (n,) int64."""
    u = np.random.default_rng(seed).random((n, 10))
    images, labels = np.empty((n, 32, 32, 3), np.uint8), np.arange(n) % len(OUTLINES)
    for i in tqdm(range(n), desc="drawing shapes", unit="image", delay=1):
        radius, turn = 7 + 5 * u[i, 0], 0.3 * (2 * u[i, 1] - 1)     # pixels, radians
        centre = 16 + (14.5 - radius) * (2 * u[i, 2:4] - 1)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        mask = Image.new("L", (128, 128))                       # 4 times finer, then averaged
        for points, fill in zip(list(OUTLINES.values())[labels[i]], (255, 0)):
            points = 4 * (radius * np.array(points) @ rotation + centre) - 0.5
            ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=fill)
        cover = np.asarray(mask.reduce(4), np.float64)[:, :, None] / 255        # (32, 32, 1)
        background = u[i, 4:7]
        colour = (background + 0.35 + 0.3 * u[i, 7:10]) % 1     # far from the background
        images[i] = np.round(255 * (background + cover * (colour - background)))
    return images, labels

def center_crop(image, size):       # ADM's: halve while twice too large, scale, cut the middle out
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

def load_image(path):               # as a PIL image in RGB, upright, transparency on white
    with reading(f"{path}: cannot be read", "fix it, or --skip_bad it"), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):                          # convert() would clip 16-bit grey
            image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

@dataclass(frozen=True)
class Dataset:
    """Images with labels; everything that reads images reads them from one of these."""
    name: str                       # of its folders under data/ and out/
    classes: list                   # their names
    labels: np.ndarray              # (N,) int64
    source: object                  # N paths of files, or images (N, S, S, 3) uint8
    digest: str = ""                # of the files' names, sizes and labels

    def __len__(self):
        return len(self.labels)

    def load(self, i, size):
        """Image i as (size, size, 3) uint8 RGB; N + i is image i mirrored. Raises UserError."""
        item = self.source[i % len(self)]
        image = load_image(item) if isinstance(item, str) else Image.fromarray(item)
        image = np.array(center_crop(image, size))
        return image[:, ::-1] if i >= len(self) else image

    def batches(self, batches, size, workers, skip_bad=False):
        """Yield lists of images for lists of indices, read ahead; None for what skip_bad skips."""
        def load(i):
            try:
                return self.load(i, size)
            except UserError as error:
                if not skip_bad:
                    raise
                tqdm.write(f"skipped {error}", file=sys.stderr)
        with ThreadPoolExecutor(workers) as pool:   # a batch is read while the one before is used
            for ready, _ in itertools.pairwise(pool.map(load, batch) for batch in [*batches, []]):
                yield list(ready)

def download(url, path, md5=None):
    with reading(f"{path}: cannot be downloaded", f"try again, or save {url} there yourself"):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path)
            if md5 and hashlib.md5(path.read_bytes()).hexdigest() != md5:
                path.unlink()
                raise ValueError(f"md5 mismatch, expected {md5}")

def obtain(folder, url, md5):       # download an archive, and unpack the folder from it
    archive = folder.with_name(url.split("/")[-1].split("?")[0])
    temporary = folder.with_name(f".{folder.name}.tmp")
    download(url, archive, md5)
    safely = {} if archive.suffix == ".zip" else {"filter": "data"}             # zip has none
    with reading(f"{archive}: cannot be unpacked", "delete it and try again"):
        shutil.unpack_archive(archive, temporary, **safely)
        next(temporary.rglob(folder.name)).rename(folder)
    shutil.rmtree(temporary)

def list_images(folder, suffixes=SUFFIXES):     # and of its sub-folders
    return sorted(os.path.join(place, file) for place, _, files in os.walk(folder)
                  for file in files if file.lower().endswith(suffixes) and file[0] != ".")

def find_images(*places):           # files, or folders of them -> a Dataset without labels
    paths = [path for place in places for path in list_images(place) or [str(place)]]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such image, nor a folder that holds any")
    return Dataset("", [], np.full(len(paths), -1), paths)

def list_flowers(folder):           # Oxford's jpg -> classes, labels, paths
    file, paths = folder.with_name("imagelabels.mat"), list_images(folder)
    download(f"{OXFORD}/imagelabels.mat", file, "e0620be6f572b9609742df49c70aed4d")
    with reading(f"{file}: unusable", f"delete it and {folder}, and run the command again"):
        numbers = scipy.io.loadmat(file)["labels"].ravel().astype(int)
        if len(numbers) != len(paths):
            raise ValueError(f"{len(numbers)} labels for {len(paths)} images")
    numbers, labels = np.unique(numbers, return_inverse=True)
    names = (ASSETS / "flowers.txt").read_text().splitlines()
    return [names[i - 1] for i in numbers], labels, paths

def list_classes(folder):           # a class per sub-folder, or one of all -> the same three
    files = {sub.name: list_images(sub) for sub in sorted(folder.glob("[!._]*")) if sub.is_dir()}
    files = {name: paths for name, paths in files.items()
             if paths or name.rpartition("-")[0] not in CODECS}                 # those are latents
    loose = [str(file) for file in sorted(folder.glob("[!.]*")) if file.suffix.lower() in SUFFIXES]
    if loose and any(files.values()):
        raise UserError(f"{loose[0]}: beside {', '.join(files)}; put all into folders, or none")
    others = list_images(folder, (".heic", ".avif", ".tif", ".tiff", ".bmp", ".gif"))
    if others:
        print(f"{len(others)} files left out, {others[0]} for one; convert them to PNG")
    files = {Path(os.path.abspath(folder)).name: loose} if loose else files
    empty = [folder / name for name in files if not files[name]]
    if empty or not files:
        raise UserError(f"{[*empty, folder][0]}: holds no images ({', '.join(SUFFIXES)})")
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    return list(files), labels, list(itertools.chain(*files.values()))

def dataset_place(dataset, data_dir):       # its name, and the folder of its images, if any
    if dataset in NAMED:
        return dataset, Path(data_dir) / dataset / NAMED[dataset][0]
    folder = Path(dataset) if Path(dataset).is_dir() else Path(data_dir) / dataset
    parts = Path(os.path.abspath(folder)).parts[1:][-2:]        # data/a/train is called a-train
    name = "-".join(part for part in parts if part != Path(data_dir).absolute().name) or "data"
    if name in NAMED:
        raise UserError(f"--dataset {dataset}: call it {name}")
    return name, folder

def find_dataset(dataset, data_dir="data"):
    """The Dataset shapes, flowers, afhq (downloaded if need be), imagenet, or of a folder."""
    name, folder = dataset_place(dataset, data_dir)
    if dataset == "shapes":
        images, labels = shapes(SHAPES_COUNT)
        return Dataset(name, list(OUTLINES), labels, images, f"{SHAPES_COUNT} shapes")
    if not folder.is_dir() and dataset in NAMED and NAMED[dataset][1]:
        obtain(folder, *NAMED[dataset][1:])
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put images there, or take shapes or flowers")
    classes, labels, paths = (list_flowers if dataset == "flowers" else list_classes)(folder)
    listing = [f"{os.path.relpath(path, folder)} {os.lstat(path).st_size} {label}"
               for path, label in zip(paths, labels)]
    digest = hashlib.sha256(os.fsencode("\n".join(listing))).hexdigest()
    return Dataset(name, classes, labels, paths, digest)

# ------------------------------------------------------------- the codecs: RAE, and the small one

COLLECTION = "https://huggingface.co/nyu-visionx/RAE-collections/resolve/main"
DINOV2, COMMIT = "facebookresearch/dinov2", "b8931f7bf91576930313be2c6d6af376033b35f0"
RAES = {    # codec -> DINOv2's letter, latent channels, folder, names of files and sha256 if known
    "rae": ("b", 768, "wReg_base", "stat-84ede66d", "decoder-5fedf7c9"),
    "rae-small": ("s", 384, "wReg_small", "stat", "decoder"),
    "rae-large": ("l", 1024, "wReg_large", "stat", "decoder")}

class ViTLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), under the published names."""
    def __init__(self, hidden, heads, mlp):
        super().__init__()
        self.heads = heads
        self.layernorm_before = nn.LayerNorm(hidden, eps=1e-12)
        qkv = {name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"attention": nn.ModuleDict(qkv)})
        self.attention["output"] = nn.ModuleDict({"dense": nn.Linear(hidden, hidden)})
        self.layernorm_after = nn.LayerNorm(hidden, eps=1e-12)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, mlp)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp, hidden)})

    def forward(self, x):
        y = self.layernorm_before(x)
        q, k, v = (linear(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for linear in self.attention.attention.values())             # (B, H, T, D/H)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention.output.dense(y)                                  # (B, T, D)
        y = self.intermediate.dense(self.layernorm_after(x))
        return x + self.output.dense(F.gelu(y))

class ViTDecoder(nn.Module):
    """RAE's decoder, a ViT as in MAE with the published names: a patch of pixels of each token."""
    def __init__(self, hidden=1152, depth=28, heads=16, mlp=4096, latent_dim=768, patch=16,
                 grid=16):
        super().__init__()
        self.patch, self.grid = patch, grid                     # pixels, and tokens, a side
        self.decoder_embed = nn.Linear(latent_dim, hidden)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, hidden))
        self.decoder_layers = nn.Sequential(*[ViTLayer(hidden, heads, mlp) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.decoder_pred = nn.Linear(hidden, patch * patch * 3)

    def forward(self, tokens):      # (B, T, latent_dim) -> (B, 3, S, S), in ImageNet's mean and std
        x = self.decoder_embed(tokens)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.decoder_layers(x + self.decoder_pos_embed)                     # (B, 1 + T, D)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:]                      # (B, T, P * P * 3)
        x = x.unflatten(2, (self.patch, self.patch, 3)).unflatten(1, (self.grid, self.grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)             # (B, 3, S, S)

def load_dinov2(entry):             # from torch.hub's folder, or downloaded to it
    os.environ |= dict(XFORMERS_DISABLED="1", TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")    # for its code
    hub, file = Path(torch.hub.get_dir()), f"{entry}4_pretrain.pth"
    code = next(hub.glob("facebookresearch_dinov2_*/"), hub / f"facebookresearch_dinov2_{COMMIT}")
    with reading(f"{code} or {hub}/checkpoints/{file}: missing or damaged", "delete it and try "
                 f"again, or get https://github.com/{DINOV2}/archive/{COMMIT}.zip, unpacked, and "
                 f"https://dl.fbaipublicfiles.com/dinov2/{entry.removesuffix('_reg')}/{file}"):
        if code.is_dir():
            return torch.hub.load(str(code), entry, source="local")
        return torch.hub.load(f"{DINOV2}:{COMMIT}", entry, skip_validation=True)

@contextlib.contextmanager
def published(kind, folder, path, name):
    """The contents of a file of RAE's collection, in torch.hub's folder or downloaded to it."""
    file, url = f"rae-{folder}-{name}.pt", f"{COLLECTION}/{kind}/dinov2/{folder}/{path}"
    place = Path(torch.hub.get_dir()) / "checkpoints" / file
    with reading(f"{place}: missing or damaged", f"delete it and try again, or get {url} yourself"):
        yield torch.hub.load_state_dict_from_url(
            url, file_name=file, map_location="cpu", check_hash=True, weights_only=True)

class RAE(nn.Module):
    """RAE, arXiv 2510.11690, frozen: DINOv2 with registers at 224 pixels, and a ViT-XL decoder."""
    def __init__(self, name="rae", decoder=True):
        super().__init__()
        letter, channels, folder, stat_name, decoder_name = RAES[name]
        self.image_size, self.latent_shape = 256, (256, channels)                       # (T, C)
        self.encoder = load_dinov2(f"dinov2_vit{letter}14_reg")     # its last norm without weights
        self.encoder.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        with published("stats", folder, "imagenet1k/stat.pt", stat_name) as stat:
            std, mean = (stat["var"].float() + 1e-5).sqrt(), stat.get("mean")   # (C, 16, 16)
            mean = torch.zeros_like(std) if mean is None else mean.float()
            self.register_buffer("mean", mean.reshape(channels, 256).T.contiguous())    # (T, C)
            self.register_buffer("std", std.reshape(channels, 256).T.contiguous())
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        if decoder:
            with torch.device("meta"):
                self.decoder = ViTDecoder(latent_dim=channels)
            with published("decoders", folder, "ViTXL_n08/model.pt", decoder_name) as state:
                state = {name: state[name] for name in self.decoder.state_dict()}   # and no other
                self.decoder.load_state_dict(state, assign=True)
        self.eval().requires_grad_(False)

    def encode(self, images):       # (B, 3, 256, 256) in [0, 1] -> (B, 256, C) float32
        x = F.interpolate(images.float(), 224, mode="bicubic")  # not antialiased in RAE either
        x = self.encoder.forward_features((x - self.pixel_mean) / self.pixel_std)
        return (x["x_norm_patchtokens"].float() - self.mean) / self.std

    def decode(self, z):            # (B, 256, C) -> (B, 3, 256, 256) in [0, 1]
        x = self.decoder(z.float() * self.std + self.mean)
        return (x.float() * self.pixel_std + self.pixel_mean).clamp(0, 1)

class Residual(nn.Sequential):      # x + conv(silu(norm(conv(silu(norm(x))))))
    def __init__(self, width):
        super().__init__(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                         nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + super().forward(x)

def upsample(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 1), nn.PixelShuffle(2))

class SmallCodec(nn.Module):
    """A convolutional autoencoder: 8x8 pixels become a token, the latent a point on the sphere."""
    def __init__(self, image_size=32, channels=32):
        super().__init__()
        self.image_size, self.side = image_size, image_size // 8
        self.latent_shape = (self.side ** 2, channels)          # (T, C)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, 32, 3, padding=1), Residual(32),   # S / 2
            nn.Conv2d(32, 64, 3, stride=2, padding=1), Residual(64),               # S / 4
            nn.Conv2d(64, 96, 3, stride=2, padding=1), Residual(96),               # S / 8
            nn.GroupNorm(8, 96), nn.SiLU(), nn.Conv2d(96, channels, 1),
            nn.BatchNorm2d(channels, affine=False))             # each channel to mean 0, std 1
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 128, 3, padding=1), Residual(128), upsample(128, 80), Residual(80),
            upsample(80, 48), Residual(48), nn.GroupNorm(8, 48), nn.SiLU(), upsample(48, 16),
            nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def encode(self, images):       # (B, 3, S, S) in [0, 1] -> (B, T, C) float32 on the sphere
        return to_sphere(self.encoder(2 * images - 1).flatten(2).transpose(1, 2))

    def decode(self, z, clamp=True):            # (B, T, C), projected -> (B, 3, S, S) in [0, 1]
        z = to_sphere(z).transpose(1, 2).unflatten(2, (self.side, self.side))
        images = 0.5 * self.decoder(z) + 0.5
        return images.clamp(0, 1) if clamp else images          # a clamp would stop gradients

SMALL_CODECS = {"small": 32, "small64": 64}                     # name -> image size
CODECS = (*SMALL_CODECS, *RAES)
CODEC_OF = {"flowers": "rae", "afhq": "rae", "imagenet": "rae"}     # others: small

def load_codec(name, weights=None, device="cpu", decoder=True):
    """A frozen codec; weights: a small one's state dict or its file, by default that for shapes."""
    if name in RAES:
        return RAE(name, decoder).to(device)
    codec = SmallCodec(SMALL_CODECS[name])
    if not isinstance(weights, dict):
        file = weights or ASSETS / "small_shapes.pt"
        with reading(f"{file}: missing or damaged", "delete it to fit it again, or git restore it"):
            weights = torch.load(file, map_location="cpu", weights_only=True)
    codec.load_state_dict(weights)
    return codec.to(device).eval().requires_grad_(False)

def load_codec_in_turn(name, weights, device):      # only a node's first process may download
    codec = load_codec(name, weights, device) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    from_first(lambda: None)                        # the others wait here
    return codec or load_codec(name, weights, device)

def fingerprint(codec):             # of what its latents depend on: all but the decoder
    parts = [name.encode() + tensor.cpu().numpy().tobytes()
             for name, tensor in codec.state_dict().items() if not name.startswith("decoder.")]
    return hashlib.sha256(b"".join(parts)).hexdigest()

def to_float(images, device="cpu"):     # (B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [0, 1]
    return torch.as_tensor(images).to(device).permute(0, 3, 1, 2) / 255

def to_uint8(images):                   # (B, 3, S, S) in [0, 1] -> (B, S, S, 3) uint8 numpy
    return (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()

def fit_codec(images, name="small", steps=1500, batch_size=128, seed=0, device="cpu"):
    """Train a small codec on images (N, S, S, 3) uint8; returns it frozen."""
    torch.manual_seed(seed)
    codec = SmallCodec(SMALL_CODECS[name]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(codec.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps,
                                                   pct_start=min(0.3, 300 / steps))
    with contextlib.suppress(KeyboardInterrupt if WORLD == 1 else ()):      # what there is must do
        for _ in tqdm(range(steps), desc="fitting the small codec", unit="step", mininterval=1):
            x = to_float(images[torch.randint(len(images), (batch_size,))], device)
            z = codec.encode(x)
            u, noise = torch.rand(2, batch_size), torch.randn(z.shape).to(device)
            angle = 0.5 * u[0] * (u[1] < 0.75)                  # for errors of the denoiser
            y = codec.decode(rotate(z, noise, angle.to(device)), clamp=False)
            optimizer.zero_grad()
            (y - x).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return load_codec(name, codec.half().state_dict(), device)  # rounded, for smaller files

def codec_path(name, dataset, data_dir="data"):     # the newest fitted, else that shipped, or None
    fitted = (Path(data_dir) / dataset_place(dataset, data_dir)[0]).glob(f"{name}-*.pt")
    shipped = ASSETS / "small_shapes.pt" if (name, dataset) == ("small", "shapes") else None
    return max(fitted, key=os.path.getmtime, default=shipped)

def prepare_codec(name, args, device, fit=False):
    """The codec of --dataset, downloaded or fitted first if need be; fit: fit another."""
    def prepare():
        path = codec_path(name, args.dataset, args.data_dir)
        place, folder = dataset_place(args.dataset, args.data_dir)
        if place != "shapes" and not folder.is_dir() and not Path(args.data_dir, place).is_dir():
            find_dataset(args.dataset, args.data_dir)           # before gigabytes of weights
        if name in SMALL_CODECS and (fit or not path):
            dataset = find_dataset(args.dataset, args.data_dir)
            rows = np.random.default_rng(0).permutation(len(dataset))[:60_000]  # all may not fit
            images = next(dataset.batches([rows], SMALL_CODECS[name], args.workers, args.skip_bad))
            with reading(f"{folder}: no readable images", "replace them"):
                images = np.stack([image for image in images if image is not None])
            print(f"{place}: fitting a codec to {len(images):,} images, once; minutes on a CPU "
                  "(see --fit_steps); Ctrl-C ends it early and takes the codec so far", flush=True)
            codec = fit_codec(images, name, args.fit_steps, device=device)
            path = Path(args.data_dir, place, f"{name}-{fingerprint(codec)[:8]}.pt")
            write_file(path, lambda file: torch.save(codec.half().state_dict(), file))
        return path
    return load_codec_in_turn(name, from_first(prepare), device)

# ------------------------------------------------------------------------------- the latent cache

CHUNK = 256                                                     # images in a chunk file

@dataclass(frozen=True)
class Cache:
    """Latents on disk: chunk files, each complete if it exists, and index.json, written last."""
    folder: Path
    classes: list                   # their names
    labels: np.ndarray              # (N,) int64, -1 for an unreadable image, whose latent is NaN
    shape: tuple                    # (T, C)
    made_from: list                 # the codec's fingerprint, the dataset's digest, flip

    def path(self, k):
        return self.folder / f"{k:06d}.npy"

    def chunks(self):
        return range(-(-len(self.labels) // CHUNK))

    def chunk(self, k):             # (n, T, C) float16, a memory map
        with reading(f"{self.path(k)}: damaged", "delete it and run encode.py again"):
            return np.load(self.path(k), mmap_mode="r")

    def read(self, rows):           # in any order -> (B, T, C) float16
        return torch.from_numpy(np.stack([self.chunk(i // CHUNK)[i % CHUNK] for i in rows]))

def cache_key(made_from):
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:8]

def read_index(file):
    with reading(f"{file}: damaged", "delete it and run encode.py again"):
        index = json.loads(file.read_text())
        return Cache(**index | dict(folder=file.parent, labels=np.array(index["labels"])))

def write_index(cache):             # once all chunks exist
    bad = [np.isnan(cache.chunk(k)[:, 0, 0]) for k in cache.chunks()]
    cache.labels[np.concatenate(bad)] = -1
    index = vars(cache) | dict(folder=cache.folder.name, labels=cache.labels.tolist())
    write_file(cache.folder / "index.json", lambda file: file.write(json.dumps(index).encode()))

def write_chunks(cache, dataset, codec, device, args):      # those of this process that are missing
    todo = [k for k in cache.chunks()[RANK::WORLD] if not cache.path(k).exists()]
    rows = [range(len(cache.labels))[k * CHUNK:(k + 1) * CHUNK] for k in todo]
    loaded = dataset.batches(rows, codec.image_size, args.workers, args.skip_bad)
    bar = tqdm(todo, desc="encoding", unit="chunk", disable=RANK > 0)
    for k, images in zip(bar, loaded):
        latents = np.full((len(images), *cache.shape), np.nan, np.float16)
        good = [i for i, image in enumerate(images) if image is not None]
        for start in range(0, len(good), 64):
            part = good[start:start + 64]
            x = to_float(np.stack([images[i] for i in part]), device)
            with autocast(device, args.dtype):
                latents[part] = codec.encode(x).half().cpu().numpy()
        write_file(cache.path(k), lambda file: np.save(file, latents))

def open_cache(name, codec, flip, device, args, key=""):
    """The Cache of --dataset, its missing chunks encoded first; key: of a resumed run."""
    def find():                     # a complete Cache and None, or one to complete and its Dataset
        place, folder = dataset_place(args.dataset, args.data_dir)
        parent, identity = Path(args.data_dir) / place, fingerprint(codec)
        caches = [cache for cache in map(read_index, parent.glob(f"{name}-*{key}/index.json"))
                  if cache.made_from[::2] == [identity, flip]
                  and all(cache.path(k).exists() for k in cache.chunks())]
        if caches and (key or args.dataset in NAMED or not list_images(folder)):
            return max(caches, key=lambda cache: os.path.getmtime(cache.folder)), None
        dataset = find_dataset(args.dataset, args.data_dir)
        made_from = [identity, dataset.digest, flip]
        cache = Cache(parent / f"{name}-{cache_key(made_from)}", dataset.classes,
                      np.tile(dataset.labels, 1 + flip), codec.latent_shape, made_from)
        if not cache.folder.name.endswith(key):
            raise UserError(f"{parent}: the images have changed; start a new run (see --init_from)")
        return cache, None if any(other.folder == cache.folder for other in caches) else dataset
    cache, dataset = from_first(find)
    if dataset:
        write_chunks(cache, dataset, codec, device, args)
        from_first(lambda: write_index(cache))
    return read_index(cache.folder / "index.json")

# ------------------------------------------------------------------------------------- the script

def reconstruct(name, codec, device, args):
    """Write 16 images, or fewer, above their reconstructions to --out; print the mean PSNR."""
    path = args.reconstruct
    dataset = find_images(path) if path else find_dataset(args.dataset, args.data_dir)
    rows = np.random.default_rng(0).permutation(len(dataset))[:16]
    [images] = dataset.batches([rows], codec.image_size, args.workers, args.skip_bad)
    with reading(f"{path or args.dataset}: no readable images", "replace them"):
        images = np.stack([image for image in images if image is not None])
    x = to_float(images, device)
    with autocast(device, args.dtype):
        y = codec.decode(codec.encode(x)).float()
    psnr = -10 * (y - x).pow(2).mean((1, 2, 3)).clamp_min(1e-10).log10().mean().item()
    picture = Image.fromarray(np.vstack([np.hstack(images), np.hstack(to_uint8(y))]))
    picture = ImageOps.scale(picture, max(1, 96 // codec.image_size), Image.Resampling.NEAREST)
    picture = ImageOps.expand(picture, (0, 14), "white")
    ImageDraw.Draw(picture).text((2, 1), "originals", "black")
    ImageDraw.Draw(picture).text((2, picture.height - 13), "reconstructions", "black")
    write_file(args.out, lambda file: picture.save(file, format="PNG"))
    print(f"{args.out}: codec {name} ({args.dataset}), PSNR {psnr:.2f} dB, mean of {len(images)}")

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="shapes", help="or flowers, afhq, imagenet, or a folder")
    add("--codec", choices=CODECS, help="default: rae for flowers, afhq and imagenet, else small")
    add("--flip", action="store_true", help="encode the mirrored images, too, in twice the space")
    add("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    add("--fit", action="store_true", help="fit a small codec to the dataset")
    add("--fit_steps", type=within(int, 1), default=1500, help="steps of 128 images; default: 1500")
    add("--reconstruct", metavar="PATH", nargs="?", const="", help="show what the codec keeps")
    add("--out", default="out/reconstruction.png", help="the picture that this writes")
    args = parser.parse_args()
    _, _, device = join(args)
    name = args.codec or ("small" if args.fit else CODEC_OF.get(args.dataset, "small"))
    if args.fit and name in RAES:
        raise UserError(f"--fit: {name} comes with its weights; use --codec small or small64")
    codec = prepare_codec(name, args, device, args.fit)
    if args.fit or args.reconstruct is not None:
        from_first(lambda: reconstruct(name, codec, device, args))
    else:
        cache = open_cache(name, codec, args.flip, device, args)
        if RANK == 0:
            print(f"{cache.folder}: complete; {(cache.labels >= 0).sum():,} images of "
                  f"{len(cache.classes)} classes; {(cache.labels < 0).sum()} unreadable left out")

if __name__ == "__main__":
    run(main)
