"""Images to latents, once: the datasets, the frozen autoencoders ("codecs"), the cache.

    python encode.py --dataset flowers                           # downloads Oxford Flowers
    torchrun --nproc_per_node=8 encode.py --dataset imagenet     # continues if interrupted
    python encode.py --reconstruct photo.jpg --codec rae         # a picture of both

Four parts: what all scripts share, the datasets, the codecs, the latent cache.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
import unicodedata
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
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from tqdm import tqdm

from model import rotate, to_sphere


# ====================================================== 1. what all scripts share

# torchrun gives every process its number, its number on this machine, and their count.
LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


class UserError(Exception):
    """Something the user can fix: what is wrong and what to do, in one line."""


def run(main):
    """Run a script's main(): a UserError ends in one line and status 1, a bug in a traceback."""
    # A file name that the terminal cannot show must not end a run.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()        # its threads must not outlive Python
    except UserError as error:
        sys.exit("error: " + str(error).replace("\n", " "))
    except KeyboardInterrupt:
        sys.exit("interrupted; every file already written is complete")
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has left. Python would complain at exit, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@contextlib.contextmanager
def reading(what, remedy):
    """Turn any error in reading a file into a UserError that names the file and the remedy."""
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
        # torch.save hides the system's error behind one of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        # numpy's error for a full disk has no strerror.
        reason = cause.strerror or f"cannot be written ({cause})"
        raise UserError(f"{path}: {reason}; fix that and run the command again "
                        "(train.py with --resume)") from error
    finally:
        if os.path.exists(temporary):
            temporary.unlink()


def file_hash(path, kind):
    """The md5 or sha256 of a file, in hex."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_writable(folder, flag):
    """Raise UserError now, rather than after the work, if a folder cannot be written to.

    It need not exist. flag: the option that names it.
    """
    folder = Path(os.path.abspath(folder))
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{existing}: is no folder that can be written to; see {flag}")


def load_state(module, state, path, surplus=False):
    """Load a state dict from a file; say which tensor does not fit, and both shapes.

    surplus: whether the file may hold tensors that the module lacks.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{path}: has no tensor {name}, which {type(module).__name__} needs")
        if state[name].shape != tensor.shape:
            raise UserError(f"{path}: {name} is {tuple(state[name].shape)} in the file and "
                            f"{tuple(tensor.shape)} in {type(module).__name__}")
    unknown = state.keys() - expected.keys()
    if unknown and not surplus:
        raise UserError(f"{path}: holds {min(unknown)}, which {type(module).__name__} lacks")
    known = {name: state[name] for name in expected}
    on_meta = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict(known, assign=on_meta)


# ---------------------------------------------------------- devices and processes

def join(device="auto", weights_dir=None):
    """Join the other processes, if torchrun started several. Returns this one's device."""
    if weights_dir:
        torch.hub.set_dir(weights_dir)
    if WORLD > 1 and not dist.is_initialized():
        # A day, because the others wait while the first process downloads.
        dist.init_process_group("gloo", timeout=timedelta(days=1))

    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if device == "cuda":
        device = f"cuda:{LOCAL_RANK}"
    with reading(f"--device {device}: not available", "use auto or cpu"):
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            # cuDNN's attention has given NaN in its bf16 backward pass.
            torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.empty(0, device=device).device


def autocast(device, dtype="auto"):
    """Autocast to bfloat16; dtype "auto" means on CUDA cards that compute in it."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = dtype == "bfloat16" or (dtype == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@contextlib.contextmanager
def with_the_others():
    """Around communication: it fails when another process has ended, which then says why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].split(". ")[0]
        sys.exit(f"process {RANK}: ends, for it has lost another one ({reason})")


def barrier():
    """Wait until every process is here."""
    if WORLD > 1:
        with with_the_others():
            dist.barrier()


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, on the CPU."""
    tensor = tensor.cpu()
    if WORLD > 1:
        with with_the_others():
            dist.all_reduce(tensor)
    return tensor


def from_first(work):
    """Let the first process do the work; all return its result, or end with its error."""
    result = [None]
    barrier()
    if RANK == 0:
        try:
            result = [work()]
        except UserError as error:
            result = [error]
    if WORLD > 1:
        with with_the_others():
            dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0] if RANK == 0 else SystemExit(1)
    return result[0]


def in_turn(work):
    """Let the first process work, then the first of each node, then all others.

    So that no two download the same file, whether or not nodes share a disk.
    """
    my_turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
    for turn in range(3):
        if turn == my_turn:
            result = work()
        barrier()
    return result


def can_compile(device):
    """Try torch.compile on one line. Returns the error, or None if it works here."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return error
    return None


# --------------------------------------------------------------- the command line

def within(kind, low, high=None):
    """A type for argparse: an int or float from low to high."""
    def number(text):
        value = kind(text)
        if value >= low and (high is None or value <= high):
            return value
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ArgumentTypeError(f"must be {limits}, got {text}")
    return number


def expanded(text):
    """A type for argparse: a path in which ~ is the home folder, also after an = sign."""
    return os.path.expanduser(text)


def make_parser(doc):
    """A parser with the flags that all scripts have."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    if RANK > 0:
        parser.error = lambda message: sys.exit(2)      # the first process says it
    add = parser.add_argument_group("folders and machine").add_argument
    add("--data_dir", type=expanded, default="data",
        help="folder of datasets and latents; default: data")
    add("--weights_dir", type=expanded, default=torch.hub.get_dir(),
        help="folder of downloaded weights; default: torch.hub's")
    add("--workers", type=within(int, 1), default=min(16, os.cpu_count() or 1),
        help="threads that read images; default: one per core, 16 at most")
    add("--device", default="auto", help="auto (the default), cuda, cuda:N, mps or cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="auto (the default): bfloat16 on CUDA")
    return parser


# ================================================================ 2. the datasets

ASSETS = Path(__file__).parent / "assets"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"


@dataclass(frozen=True)
class Named:
    """A dataset with a name: where its images come from, and the codec that suits them."""

    folder: str             # of the training images, in data/<dataset>/
    codec: str = "rae"
    url: str = ""           # an archive that holds this folder
    md5: str = ""           # of the archive, where it is known


# To add a dataset: an entry here and, if it wants other settings, a block in train.py.
NAMED = {
    "shapes": Named(folder="", codec="small"),
    "flowers": Named(folder="jpg", url=f"{OXFORD}/102flowers.tgz",
                     md5="52808999861908f626f3c1f4e79d11fa"),
    "afhq": Named(folder="train",
                  url="https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1"),
    "imagenet": Named(folder="train"),
}

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
OTHER_SUFFIXES = (".heic", ".avif", ".tif", ".tiff", ".bmp", ".gif", "")    # perhaps images, too

# One's own photographs are no attack: no limit on their size or on text in PNG files.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30

# EXIF's orientation tag, and what turns an image upright.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Dataset:
    """Images with labels; everything that reads images reads them from one of these."""

    name: str               # of its folders under data/ and out/
    classes: list           # their names
    labels: np.ndarray      # (N,) int64
    source: object          # N paths of files, or images (N, S, S, 3) uint8
    digest: str = ""        # of the files' names, sizes and labels

    def __len__(self):
        return len(self.labels)

    def load(self, i, size):
        """Image i as (size, size, 3) uint8 RGB; N + i is image i mirrored.

        Raises UserError if the file cannot be read.
        """
        item = self.source[i % len(self)]
        image = load_image(item) if isinstance(item, str) else Image.fromarray(item)
        pixels = np.array(center_crop(image, size))
        return pixels[:, ::-1] if i >= len(self) else pixels

    def batches(self, batches, size, workers, skip_bad=False):
        """Load images for lists of indexes, each batch while the one before it is used.

        Yields lists of (size, size, 3) uint8. skip_bad: put None in the place of an image
        that cannot be read, and say so; otherwise raise UserError.
        """
        def load(i):
            try:
                return self.load(i, size)
            except UserError as error:
                if not skip_bad:
                    raise
                tqdm.write(f"skipped {error}", file=sys.stderr)

        with ThreadPoolExecutor(workers) as pool:
            ahead = []
            for batch in batches:
                ready, ahead = ahead, [pool.submit(load, i) for i in batch]
                if ready:
                    yield [image.result() for image in ready]
            if ahead:
                yield [image.result() for image in ahead]


def load_image(path):
    """Read an image file: a PIL image in RGB, upright, transparent parts white."""
    remedy = "replace or delete it; encode.py and train.py leave it out with --skip_bad"
    with reading(f"{path}: cannot be read", remedy), Image.open(path) as file:
        image = upright(file)
        if image.mode.startswith("I"):              # 16-bit grey, which convert() would clip
            image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def upright(image):
    """Turn a PIL image as its EXIF data says; leave it if that data cannot be read."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def center_crop(image, size):
    """Cut the middle square out of a PIL image, scaled to size x size, as ADM does."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_float(images, device=None):
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [0, 1], on the device if one is given."""
    return torch.as_tensor(images).to(device).permute(0, 3, 1, 2) / 255


def to_uint8(images):
    """(B, 3, S, S) in [0, 1] -> (B, S, S, 3) uint8, in numpy; rounded, not truncated."""
    images = (images.float() * 255).round().clamp(0, 255).byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()


# --------------------------------------------------------------------- drawn shapes

OUTLINES = json.loads((ASSETS / "shapes.json").read_text())     # class -> polygon, hole
SHAPES_COUNT = 30_000                                           # images of "shapes"


def shapes(n, seed=0):
    """Draw n shapes, the ten classes in turn.

    Each has a size, place, turn and two colours of its own. Returns images (n, 32, 32, 3)
    uint8 and labels (n,) int64.
    """
    u = np.random.default_rng(seed).random((n, 10))
    images = np.empty((n, 32, 32, 3), np.uint8)
    labels = np.arange(n) % len(OUTLINES)
    outlines = list(OUTLINES.values())

    for i in tqdm(range(n), desc="drawing shapes", unit="image", delay=1):
        radius = 7 + 5 * u[i, 0]                                # pixels
        turn = 0.3 * (2 * u[i, 1] - 1)                          # radians
        centre = 16 + (14.5 - radius) * (2 * u[i, 2:4] - 1)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])

        # Drawn 4 times finer and averaged, so that edges are smooth.
        mask = Image.new("L", (128, 128))
        for points, fill in zip(outlines[labels[i]], (255, 0)):
            points = 4 * (radius * np.array(points) @ rotation + centre) - 0.5
            ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=fill)
        cover = np.asarray(mask.reduce(4), np.float64)[:, :, None] / 255    # (32, 32, 1)

        # A colour of the shape that is far from the background's.
        background = u[i, 4:7]
        colour = (background + 0.35 + 0.3 * u[i, 7:10]) % 1
        images[i] = np.round(255 * (background + cover * (colour - background)))
    return images, labels


# ------------------------------------------------------------------ folders of images

def find_dataset(dataset, data_dir="data"):
    """Open the dataset shapes, flowers, afhq (both downloaded), imagenet, or of a folder.

    Raises UserError if there are no images.
    """
    name, folder = locate(dataset, data_dir)
    if name == "shapes":
        images, labels = shapes(SHAPES_COUNT)
        return Dataset(name, list(OUTLINES), labels, images, f"{SHAPES_COUNT} shapes")

    if not folder.is_dir() and dataset in NAMED and NAMED[dataset].url:
        download_folder(folder, NAMED[dataset].url, NAMED[dataset].md5)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put images there, or use --dataset shapes")
    if name == "flowers":
        classes, labels, paths = list_flowers(folder)
    else:
        classes, labels, paths = list_classes(folder, data_dir)

    # The digest tells one state of a folder from another without reading its images.
    listing = []
    for path, label in zip(paths, labels):
        size = os.path.getsize(path) if os.path.exists(path) else 0
        listing.append(f"{os.path.relpath(path, folder)} {size} {label}")
    digest = hashlib.sha256(os.fsencode("\n".join(listing))).hexdigest()
    return Dataset(name, classes, labels, paths, digest)


def locate(dataset, data_dir="data"):
    """The name of a dataset, and the folder of its images, which need not exist.

    The images in photos/train are called photos-train, those in data/cats are called cats.
    """
    if dataset in NAMED:
        return dataset, Path(data_dir) / dataset / NAMED[dataset].folder
    folders = [Path(dataset), Path(data_dir) / dataset]
    present = [folder for folder in folders if folder.is_dir()]

    # The images may be gone and their latents still be there.
    encoded = [folder for folder in folders
               if (Path(data_dir) / folder_name(folder, data_dir)).is_dir()]
    folder = [*present, *encoded, folders[1]][0]
    name = folder_name(folder, data_dir)
    if name in NAMED:
        raise UserError(f"--dataset {dataset}: call it {name}")
    return name, folder


def folder_name(folder, data_dir):
    """The last two parts of a path, or one if the other is data_dir."""
    parts = Path(os.path.abspath(folder)).parts[1:][-2:]
    skipped = Path(os.path.abspath(data_dir)).name
    return "-".join(part for part in parts if part != skipped) or "data"


def claim_name(name, folder, data_dir):
    """Note which images data/<name>/ belongs to; refuse others that happen to share the name."""
    if name in NAMED:
        return
    note = Path(data_dir) / name / "images.txt"
    place = os.path.relpath(folder, data_dir)
    if not note.exists():
        write_file(note, lambda file: file.write(os.fsencode(place)))
    known = os.fsdecode(note.read_bytes())
    if known != place and folder.is_dir():
        raise UserError(
            f"{folder}: {note.parent} belongs to {os.path.normpath(Path(data_dir) / known)}; "
            f"use another --data_dir or, if the images have only moved, delete {note}")


def list_images(folder, suffixes=SUFFIXES):
    """The paths of all image files below a folder, sorted; symbolic links are followed."""
    def refuse(error):
        raise UserError(f"{error.filename}: {error.strerror}; make it readable")

    paths, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # A link may lead back to where we have been.
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)

        # Not .ipynb_checkpoints, @eaDir and other folders that programs hide.
        folders[:] = sorted(name for name in folders if name[0] not in ".@")
        for file in files:
            if file.lower().endswith(suffixes) and file[0] != ".":
                paths.append(os.path.join(place, file))
    return sorted(paths)


def list_classes(folder, data_dir):
    """A folder with one sub-folder a class, or of images alone, which are one class.

    Returns the classes, the labels (N,) int64 and the paths.
    """
    subfolders = sorted(sub for sub in folder.glob("[!.@]*") if sub.is_dir())
    files = {}
    for sub in subfolders:
        if sub.name != "__MACOSX" and not is_our_own(sub, data_dir):
            files[sub.name] = list_images(sub)
    loose = [str(file) for file in sorted(folder.glob("[!.]*"))
             if file.suffix.lower() in SUFFIXES and file.is_file()]

    if loose and any(files.values()):
        raise UserError(f"{loose[0]}: beside {', '.join(files)}; move it into one of them, "
                        "or all images into one folder")
    if loose:
        files = {".": loose}
    for name, paths in files.items():
        if not paths:
            raise UserError(f"{folder / name}: holds no images ({', '.join(SUFFIXES)})")
    if not files:
        raise UserError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")

    everything = [path for name in files for path in list_images(folder / name, suffixes="")]
    others = [path for path in everything if Path(path).suffix.lower() in OTHER_SUFFIXES]
    if others:
        print(f"{len(others)} files left out, such as {others[0]}: no JPEG, PNG or WebP by name")
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    names = [Path(os.path.abspath(folder)).name] if loose else list(files)
    return names, labels, sum(files.values(), [])


def is_our_own(folder, data_dir):
    """Whether a folder is data_dir, or holds latents or runs: then it is no class of images."""
    if os.path.realpath(folder) == os.path.realpath(data_dir):
        return True
    latents = re.compile(f"({'|'.join(CODECS)})-[0-9a-f]{{8}}")
    for place, _, files in os.walk(folder):
        if "ckpt.pt" in files or {"log.csv", "curve.png"} <= set(files):
            return True
        if latents.fullmatch(os.path.basename(place)):
            return True
    return False


def list_flowers(folder):
    """Oxford's folder jpg, whose labels are in a file of their own: as `list_classes`."""
    file, paths = folder.with_name("imagelabels.mat"), list_images(folder)
    download(f"{OXFORD}/imagelabels.mat", file, "e0620be6f572b9609742df49c70aed4d")
    with reading(f"{file}: unusable", f"delete it and {folder}, and run the command again"):
        numbers = scipy.io.loadmat(file)["labels"].ravel().astype(int)
        if len(numbers) != len(paths):
            raise ValueError(f"{len(numbers)} labels for {len(paths)} images")
    numbers, labels = np.unique(numbers, return_inverse=True)
    names = (ASSETS / "flowers.txt").read_text().splitlines()
    return [names[number - 1] for number in numbers], labels, paths


def find_images(*places):
    """Image files, and those in folders: a Dataset without labels."""
    paths = []
    for place in places:
        found = list_images(place) if os.path.isdir(place) else [str(place)]
        if not found or not os.path.isfile(found[0]):
            raise UserError(f"{place}: no such image, nor a folder that holds any")
        paths += found
    return Dataset("", [], np.full(len(paths), -1), paths)


def match_class(typed, classes):
    """The number of a class that the user typed by name or number, or None.

    The exact name comes first, then the name in any case and in any form of its accents.
    """
    if typed in classes:
        return classes.index(typed)
    plain = [unicodedata.normalize("NFC", name).casefold() for name in classes]
    wanted = unicodedata.normalize("NFC", typed).casefold()
    if wanted in plain:
        return plain.index(wanted)
    if typed.isdecimal() and int(typed) < len(classes):
        return int(typed)
    return None


# ------------------------------------------------------------------------- downloads

def download(url, path, md5=""):
    """Download a file, unless it is there; url may be a path. Check its md5, or print it."""
    if path.is_file():
        return
    with reading(f"{path}: cannot be downloaded", f"try again, or save {url} there yourself"):
        path.parent.mkdir(parents=True, exist_ok=True)
        address = url if "://" in url else Path(url).resolve().as_uri()
        torch.hub.download_url_to_file(address, path)
        found = file_hash(path, "md5")
        if md5 and found != md5:
            path.unlink()
            raise ValueError(f"md5 mismatch: {found}, expected {md5}")
        if not md5:
            print(f"{path}: md5 {found} (which is not known beforehand)")


def download_folder(folder, url, md5):
    """Download an archive beside a folder, and unpack the folder from it."""
    archive = folder.with_name(url.split("/")[-1].split("?")[0])
    temporary = folder.with_name(f".{folder.name}.tmp")
    download(url, archive, md5)

    # tar files may name places outside the folder; zip files are unpacked safely anyway.
    safely = {} if archive.suffix == ".zip" else dict(filter="data")
    with reading(f"{archive}: cannot be unpacked", "delete it and try again"):
        shutil.unpack_archive(archive, temporary, **safely)
        next(temporary.rglob(folder.name)).rename(folder)
    shutil.rmtree(temporary)


# ================================================================== 3. the codecs

@dataclass(frozen=True)
class PublishedRAE:
    """Where the weights of a representation autoencoder are."""

    dinov2: str             # its encoder's name in torch.hub
    channels: int           # C of its latents
    folder: str             # in RAE's collection
    stat: str = "stat"      # the file's name here; with the start of its sha256, if known
    decoder: str = "decoder"


RAES = {
    "rae": PublishedRAE("dinov2_vitb14_reg", 768, "wReg_base",
                        stat="stat-84ede66d", decoder="decoder-5fedf7c9"),
    "rae-small": PublishedRAE("dinov2_vits14_reg", 384, "wReg_small"),
    "rae-large": PublishedRAE("dinov2_vitl14_reg", 1024, "wReg_large"),
}
COLLECTION = "https://huggingface.co/nyu-visionx/RAE-collections/resolve/main"
DINOV2 = "facebookresearch/dinov2"
DINOV2_COMMIT = "b8931f7bf91576930313be2c6d6af376033b35f0"
DINOV2_SHA256 = {
    "dinov2_vitb14_reg4_pretrain.pth":
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
}

SMALL_CODECS = {"small": 32, "small64": 64}         # name -> image size
CODECS = (*SMALL_CODECS, *RAES)


def latent_shape(codec):
    """(T, C) of a codec's latents, by its name."""
    if codec in RAES:
        return 256, RAES[codec].channels
    return SmallCodec(SMALL_CODECS[codec]).latent_shape


def default_codec(dataset):
    """The codec of a dataset if none is asked for."""
    return NAMED[dataset].codec if dataset in NAMED else "small"


def load_codec(name, weights=None, device="cpu", decoder=True):
    """A frozen codec: `encode` images to latents, `decode` latents to images.

    name: one of CODECS. weights: of a small codec, its state dict or file; by default those
    for shapes. decoder=False leaves the RAE's out (1.7 GB). Raises UserError if weights are
    missing.
    """
    if name in RAES:
        return RAE(name, decoder).to(device)
    path = "the checkpoint's codec"
    if not isinstance(weights, dict):
        path = weights or ASSETS / "small_shapes.pt"
        weights = read_codec_file(path)["weights"]
    codec = SmallCodec(SMALL_CODECS[name])
    load_state(codec, weights, path)
    return codec.to(device).eval().requires_grad_(False)


def fingerprint(codec):
    """A hash of what a codec's latents depend on: all weights but the decoder's."""
    parts = []
    for name, tensor in codec.state_dict().items():
        if not name.startswith("decoder."):
            parts.append(name.encode() + tensor.cpu().numpy().tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


# ------------------------------------------- representation autoencoder, arXiv 2510.11690

class ViTLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), under the published names."""

    def __init__(self, hidden, heads, mlp):
        super().__init__()
        self.heads = heads
        self.layernorm_before = nn.LayerNorm(hidden, eps=1e-12)
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict({
                "query": nn.Linear(hidden, hidden),
                "key": nn.Linear(hidden, hidden),
                "value": nn.Linear(hidden, hidden)}),
            "output": nn.ModuleDict({"dense": nn.Linear(hidden, hidden)})})
        self.layernorm_after = nn.LayerNorm(hidden, eps=1e-12)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, mlp)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp, hidden)})

    def split_heads(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)     # (B, H, T, D / H)

    def forward(self, x):
        y = self.layernorm_before(x)
        q = self.split_heads(self.attention.attention.query(y))
        k = self.split_heads(self.attention.attention.key(y))
        v = self.split_heads(self.attention.attention.value(y))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention.output.dense(y)                      # (B, T, D)

        y = self.intermediate.dense(self.layernorm_after(x))
        return x + self.output.dense(F.gelu(y))


class ViTDecoder(nn.Module):
    """RAE's decoder, a ViT as in MAE, under the published names: a token becomes a patch."""

    def __init__(self, hidden=1152, depth=28, heads=16, mlp=4096, latent_dim=768,
                 patch=16, grid=16):
        super().__init__()
        self.patch, self.grid = patch, grid     # pixels a patch is wide, tokens an image is
        self.decoder_embed = nn.Linear(latent_dim, hidden)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, hidden))
        layers = [ViTLayer(hidden, heads, mlp) for _ in range(depth)]
        self.decoder_layers = nn.Sequential(*layers)
        self.decoder_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.decoder_pred = nn.Linear(hidden, patch * patch * 3)

    def forward(self, tokens):
        """(B, T, latent_dim) -> (B, 3, S, S), normalised by ImageNet's mean and std."""
        x = self.decoder_embed(tokens)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.decoder_layers(x + self.decoder_pos_embed)         # (B, 1 + T, D)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:]          # (B, T, P * P * 3)

        # Lay the patches out: (B, row, column, y, x, 3) -> (B, 3, row * y, column * x).
        x = x.unflatten(2, (self.patch, self.patch, 3)).unflatten(1, (self.grid, self.grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class RAE(nn.Module):
    """RAE, frozen: DINOv2 with registers encodes at 224 pixels, a ViT-XL decodes to 256."""

    def __init__(self, name="rae", decoder=True):
        super().__init__()
        published = RAES[name]
        channels = published.channels
        self.image_size, self.latent_shape = 256, (256, channels)           # (T, C)

        # RAE takes DINOv2's tokens after its last norm without that norm's weights.
        self.encoder = load_dinov2(published.dinov2)
        self.encoder.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)

        # The statistics of the latents are (C, 16, 16); a mean of None stands for 0.
        path, stat = read_published(published.folder, "stats", "imagenet1k/stat.pt",
                                    published.stat)
        with reading(f"{path}: is not RAE's statistics", "delete it and try again"):
            std = (stat["var"].float() + 1e-5).sqrt()
            mean = torch.zeros_like(std) if stat.get("mean") is None else stat["mean"].float()
            self.register_buffer("mean", mean.reshape(channels, 256).T.contiguous())
            self.register_buffer("std", std.reshape(channels, 256).T.contiguous())
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

        if decoder:
            with torch.device("meta"):          # its memory is that of the file
                self.decoder = ViTDecoder(latent_dim=channels)
            path, state = read_published(published.folder, "decoders", "ViTXL_n08/model.pt",
                                         published.decoder)
            load_state(self.decoder, state, path, surplus=True)
        self.eval().requires_grad_(False)

    def encode(self, images):
        """(B, 3, 256, 256) in [0, 1] -> (B, 256, C) float32."""
        x = F.interpolate(images.float(), 224, mode="bicubic")      # RAE has no antialiasing
        x = self.encoder.forward_features((x - self.pixel_mean) / self.pixel_std)
        return (x["x_norm_patchtokens"].float() - self.mean) / self.std

    def decode(self, z):
        """(B, 256, C) -> (B, 3, 256, 256) in [0, 1]."""
        x = self.decoder(z.float() * self.std + self.mean)
        return (x.float() * self.pixel_std + self.pixel_mean).clamp(0, 1)


def load_dinov2(entry):
    """DINOv2 from torch.hub's folder, or downloaded to it."""
    # For its code: plain attention, and no pickles.
    os.environ["XFORMERS_DISABLED"] = "1"
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

    hub = Path(torch.hub.get_dir())
    file = hub / "checkpoints" / f"{entry}4_pretrain.pth"
    code = next(hub.glob("facebookresearch_dinov2_*/"),
                hub / f"facebookresearch_dinov2_{DINOV2_COMMIT}")
    new = not file.exists()
    with reading(f"{code} or {file}: missing or damaged", "delete it and try again, or get "
                 f"https://github.com/{DINOV2}/archive/{DINOV2_COMMIT}.zip, unpacked, and "
                 "https://dl.fbaipublicfiles.com/dinov2/"
                 f"{entry.removesuffix('_reg')}/{file.name}"):
        if code.is_dir():
            encoder = torch.hub.load(str(code), entry, source="local")
        else:
            encoder = torch.hub.load(f"{DINOV2}:{DINOV2_COMMIT}", entry, skip_validation=True)
        known = DINOV2_SHA256.get(file.name)
        if new and known and file_hash(file, "sha256") != known:
            raise ValueError("sha256 mismatch")
    return encoder


def read_published(folder, kind, path, name):
    """Read a file of RAE's collection from torch.hub's folder, or download it there.

    Returns its place and contents.
    """
    url = f"{COLLECTION}/{kind}/dinov2/{folder}/{path}"
    place = Path(torch.hub.get_dir()) / "checkpoints" / f"rae-{folder}-{name}.pt"
    with reading(f"{place}: missing or damaged", f"delete it and try again, or get {url} yourself"):
        return place, torch.hub.load_state_dict_from_url(
            url, file_name=place.name, map_location="cpu", check_hash=True, weights_only=True)


# ------------------------------------------------------------------ the small codec

class Residual(nn.Sequential):
    """x + conv(silu(norm(conv(silu(norm(x)))))."""

    def __init__(self, width):
        super().__init__(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
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
        self.latent_shape = (self.side**2, channels)                # (T, C)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, 32, 3, padding=1), Residual(32),    # S / 2
            nn.Conv2d(32, 64, 3, stride=2, padding=1), Residual(64),                # S / 4
            nn.Conv2d(64, 96, 3, stride=2, padding=1), Residual(96),                # S / 8
            nn.GroupNorm(8, 96), nn.SiLU(), nn.Conv2d(96, channels, 1),
            nn.BatchNorm2d(channels, affine=False))     # each channel to mean 0, std 1
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 128, 3, padding=1), Residual(128),
            upsample(128, 80), Residual(80),
            upsample(80, 48), Residual(48), nn.GroupNorm(8, 48), nn.SiLU(),
            upsample(48, 16), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 3, 3, padding=1))

    def encode(self, images):
        """(B, 3, S, S) in [0, 1] -> (B, T, C) float32 on the sphere."""
        z = self.encoder(2 * images - 1)                            # (B, C, S / 8, S / 8)
        return to_sphere(z.flatten(2).transpose(1, 2))

    def decode(self, z, clamp=True):
        """(B, T, C), projected first -> (B, 3, S, S) in [0, 1].

        clamp=False is for training, where clamping would stop gradients.
        """
        z = to_sphere(z).transpose(1, 2).unflatten(2, (self.side, self.side))
        images = 0.5 * self.decoder(z) + 0.5
        return images.clamp(0, 1) if clamp else images


FEWEST_STEPS = 100          # a fit that is interrupted earlier leaves no codec


def fit_layout(device):
    """channels_last is faster on CPUs, but its gradients are wrong on MPS (pytorch 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def fit_codec(images, name="small", steps=1500, batch_size=128, seed=0, device="cpu"):
    """Train a small codec on images (N, S, S, 3) uint8.

    Returns it frozen, and the number of steps it took: Ctrl-C ends the fit early.
    """
    torch.manual_seed(seed)
    layout = fit_layout(torch.device(device))
    codec = SmallCodec(SMALL_CODECS[name]).to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(codec.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=min(0.3, 300 / steps))

    step = 0
    try:
        for _ in tqdm(range(steps), desc="fitting the small codec", unit="step", mininterval=1):
            rows = torch.randint(len(images), (batch_size,))
            x = to_float(images[rows], device).contiguous(memory_format=layout)
            z = codec.encode(x)

            # Noise in three of four latents prepares the decoder for the denoiser's errors.
            angle = 0.5 * torch.rand(batch_size) * (torch.rand(batch_size) < 0.75)
            noise = torch.randn(z.shape)
            y = codec.decode(rotate(z, noise.to(device), angle.to(device)), clamp=False)

            optimizer.zero_grad()
            (y - x).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
    except KeyboardInterrupt:
        if WORLD > 1 or step < FEWEST_STEPS:
            raise
    # Half precision makes the file smaller; loaded again, it is what others will load.
    return load_codec(name, codec.half().state_dict(), device), step


def read_codec_file(path):
    """What the file of a small codec holds, a dict: name, weights, steps, images, ..."""
    with reading(f"{path}: missing or damaged", "delete it to fit it again, or git restore it"):
        contents = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("name", "weights", "steps", "asked", "images", "digest", "fitted"):
            if key not in contents:
                raise ValueError(f"holds no {key}")
        return contents


def find_codec_file(name, dataset, data_dir="data"):
    """The file of the small codec that was fitted last to a dataset, or None.

    For shapes there is one in assets/.
    """
    place, _ = locate(dataset, data_dir)
    newest, when = None, 0.0
    for path in (Path(data_dir) / place).glob(f"{name}-*.pt"):
        contents = read_codec_file(path)
        if contents["name"] == name and contents["fitted"] > when:
            newest, when = path, contents["fitted"]
    if newest is None and (name, dataset) == ("small", "shapes"):
        return ASSETS / "small_shapes.pt"
    return newest


def fit_codec_file(name, dataset, steps, data_dir="data", device="cpu", workers=1,
                   skip_bad=False):
    """Fit a small codec to a dataset and write it to a file. Returns its path."""
    images = find_dataset(dataset, data_dir)
    place, folder = locate(dataset, data_dir)

    # 60,000 images are enough, and all of ImageNet would not fit into memory.
    chosen = np.random.default_rng(0).permutation(len(images))[:60_000]
    pixels = load_all(images, chosen, SMALL_CODECS[name], workers, skip_bad)
    print(f"{place}: fitting a codec to {len(pixels):,} images, once; minutes on a CPU "
          "(see --fit_steps). Ctrl-C ends the fit early and keeps the codec as it is",
          flush=True)
    codec, taken = fit_codec(pixels, name, steps, device=device)

    contents = dict(name=name, weights=codec.half().state_dict(), steps=taken, asked=steps,
                    images=len(pixels), digest=images.digest, fitted=time.time())
    path = Path(data_dir) / place / f"{name}-{fingerprint(codec)[:8]}.pt"
    write_file(path, lambda file: torch.save(contents, file))
    return path


def load_all(dataset, indexes, size, workers, skip_bad=False):
    """The images of a list of indexes, (n, size, size, 3) uint8, without those skipped."""
    [images] = dataset.batches([indexes], size, workers, skip_bad)
    good = [image for image in images if image is not None]
    if not good:
        raise UserError(f"{dataset.name}: holds no image that can be read")
    return np.stack(good)


def prepare_codec(name, dataset, data_dir="data", device="cpu", workers=1, fit_steps=1500,
                  fit=False, skip_bad=False, decoder=True):
    """The codec for a dataset; a small one is fitted if there is none, or if fit says so."""
    def find_file():
        place, folder = locate(dataset, data_dir)
        if place != "shapes" and not folder.is_dir() and not (Path(data_dir) / place).is_dir():
            find_dataset(dataset, data_dir)     # fails, before gigabytes of weights are fetched
        claim_name(place, folder, data_dir)
        if name in RAES:
            return None

        path = find_codec_file(name, dataset, data_dir)
        if fit or path is None:
            path = fit_codec_file(name, dataset, fit_steps, data_dir, device, workers, skip_bad)
        known = read_codec_file(path)
        print(f"codec: {path}, fitted for {known['steps']:,} steps to {known['images']:,} images")
        if known["steps"] < known["asked"]:
            print("       (interrupted; python encode.py --fit fits another)")
        return path

    path = from_first(find_file)
    return in_turn(lambda: load_codec(name, path, device, decoder))


# ============================================================ 4. the latent cache

CHUNK = 256                             # images in a chunk file
READERS = ThreadPoolExecutor(16)        # threads that wait for the disk in Cache.read


@dataclass(frozen=True)
class Cache:
    """Latents on disk: chunk files, each complete if it exists, and index.json, written last."""

    folder: Path
    classes: list           # their names
    labels: np.ndarray      # (N,) int64; -1 for an unreadable image, whose latent is NaN
    shape: tuple            # (T, C)
    codec: str              # fingerprint of the codec
    images: str             # digest of the dataset
    flip: bool              # whether the second half are the mirrored images
    written: float = 0.0    # when it was completed, in seconds since 1970

    @property
    def key(self):
        """What tells this cache from others of the dataset and codec: part of its name."""
        return self.folder.name[-8:]

    def path(self, k):
        return self.folder / f"{k:06d}.npy"

    def chunks(self):
        return range(-(-len(self.labels) // CHUNK))

    def rows(self, k):
        """The indexes of the images in chunk k."""
        return range(len(self.labels))[k * CHUNK:(k + 1) * CHUNK]

    def chunk(self, k):
        """The latents of chunk k, (n, T, C) float16, mapped from the file, which is checked."""
        with reading(f"{self.path(k)}: damaged", "delete it and run encode.py again"):
            latents = np.load(self.path(k), mmap_mode="r")
            expected = (len(self.rows(k)), *self.shape)
            if latents.shape != expected:
                raise ValueError(f"holds {latents.shape}, not {expected}")
            return latents

    def read(self, indexes, out):
        """Read latents, in any order, from disk into out (B, T, C) float16.

        By plain reads in many threads: in a memory map, one page after another would wait
        for the disk.
        """
        list(READERS.map(self.read_row, indexes, out))

    def read_row(self, i, row):
        rows, path = self.rows(i // CHUNK), self.path(i // CHUNK)
        with (reading(f"{path}: damaged", "delete it and run encode.py again"),
              open(path, "rb", buffering=0) as file):
            # Counted from the end, so that the length of the header does not matter.
            file.seek((i - rows.stop) * row.nbytes, os.SEEK_END)
            if file.readinto(row) != row.nbytes:
                raise ValueError("is too short")


def cache_key(codec, images, flip):
    """A hash of what latents are made from: the codec's fingerprint, the dataset's digest."""
    made_from = json.dumps([codec, images, bool(flip)])
    return hashlib.sha256(made_from.encode()).hexdigest()[:8]


def read_index(path):
    with reading(f"{path}: damaged", "delete it and run encode.py again"):
        index = json.loads(path.read_text())
        index["labels"] = np.array(index["labels"])
        return Cache(folder=path.parent, **index)


def write_index(cache):
    """Complete a cache: mark the unreadable images and write index.json."""
    bad = [np.isnan(cache.chunk(k)[:, 0, 0]) for k in cache.chunks()]
    labels = np.where(np.concatenate(bad), -1, cache.labels)
    index = dict(classes=cache.classes, labels=labels.tolist(), shape=cache.shape,
                 codec=cache.codec, images=cache.images, flip=cache.flip, written=time.time())
    write_file(cache.folder / "index.json", lambda file: file.write(json.dumps(index).encode()))
    for leftover in cache.folder.glob("*.tmp"):     # of processes that were killed
        leftover.unlink(missing_ok=True)


def find_cache(dataset, name, codec, flip, data_dir, key=""):
    """The cache of a dataset's latents, and the Dataset if some are still to be encoded.

    name, codec: the codec's name, and the codec. key: of the cache that a resumed run began
    with; other latents will not do. Returns (Cache, Dataset or None).
    """
    place, folder = locate(dataset, data_dir)
    parent, identity = Path(data_dir) / place, fingerprint(codec)
    claim_name(place, folder, data_dir)

    complete = []
    for path in parent.glob(f"{name}-*{key}/index.json"):
        cache = read_index(path)
        whole = all(cache.path(k).exists() for k in cache.chunks())
        if cache.codec == identity and cache.flip == bool(flip) and whole:
            complete.append(cache)
    complete.sort(key=lambda cache: cache.written)

    # Only a folder of the user's own may have changed since it was encoded.
    changeable = dataset not in NAMED and folder.is_dir() and list_images(folder)
    if complete and (key or not changeable):
        return complete[-1], None

    images = find_dataset(dataset, data_dir)
    labels = np.concatenate([images.labels, images.labels]) if flip else images.labels
    new_key = cache_key(identity, images.digest, flip)
    if key and key != new_key:
        raise UserError(f"{parent}: the images have changed; start a new run (see --init_from)")
    for cache in complete:
        if cache.key == new_key:
            return cache, None
    cache = Cache(parent / f"{name}-{new_key}", images.classes, labels, codec.latent_shape,
                  identity, images.digest, bool(flip))
    return cache, images


def fill_cache(cache, dataset, codec, device, dtype="auto", workers=1, skip_bad=False):
    """Encode this process's share of the chunks that are missing."""
    missing = [k for k in cache.chunks()[RANK::WORLD] if not cache.path(k).exists()]
    batches = dataset.batches(map(cache.rows, missing), codec.image_size, workers, skip_bad)
    for k, images in zip(tqdm(missing, desc="encoding", unit="chunk", disable=RANK > 0), batches):
        latents = np.full((len(images), *cache.shape), np.nan, np.float16)
        good = [i for i, image in enumerate(images) if image is not None]
        for start in range(0, len(good), 64):
            part = good[start:start + 64]
            x = to_float(np.stack([images[i] for i in part]), device)
            with torch.no_grad(), autocast(device, dtype):
                latents[part] = codec.encode(x).half().cpu().numpy()
        write_file(cache.path(k), lambda file: np.save(file, latents))


def open_cache(dataset, name, codec, flip=False, key="", data_dir="data", device="cpu",
               dtype="auto", workers=1, skip_bad=False):
    """The latents of a dataset by a codec, encoded first as far as they are missing.

    name, codec: the codec's name, and the codec. flip: the mirrored images, too. key: of
    the cache that a resumed run began with. Raises UserError for what cannot be read.
    """
    cache, images = from_first(lambda: find_cache(dataset, name, codec, flip, data_dir, key))
    if images is not None:
        fill_cache(cache, images, codec, torch.device(device), dtype, workers, skip_bad)
        from_first(lambda: write_index(cache))
    cache = read_index(cache.folder / "index.json")

    def check():
        if (cache.labels < 0).all():
            raise UserError(f"{dataset}: holds no image that can be read")
        for k in cache.chunks():
            cache.chunk(k)          # a damaged file is found now, not hours later
    from_first(check)
    return cache


# ------------------------------------------------------------------------ the script

def reconstruct(dataset, name, codec, out, device, dtype="auto", workers=1, skip_bad=False):
    """Draw up to 16 images above their reconstructions; print the mean PSNR."""
    chosen = np.random.default_rng(0).permutation(len(dataset))[:16]
    images = load_all(dataset, chosen, codec.image_size, workers, skip_bad)
    x = to_float(images, device)
    with torch.no_grad(), autocast(device, dtype):
        y = codec.decode(codec.encode(x)).float()
    error = (y - x).pow(2).mean((1, 2, 3))
    psnr = (-10 * error.clamp_min(1e-10).log10()).mean().item()

    picture = Image.fromarray(np.vstack([np.hstack(images), np.hstack(to_uint8(y))]))
    picture = ImageOps.scale(picture, max(1, 96 // codec.image_size), Image.Resampling.NEAREST)
    picture = ImageOps.expand(picture, (0, 14), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((2, 1), "originals", "black")
    draw.text((2, picture.height - 13), "reconstructions", "black")
    write_file(out, lambda file: picture.save(file, format="PNG"))
    print(f"{out}: codec {name}, PSNR {psnr:.2f} dB, mean of {len(images)} images")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--dataset", type=expanded, default="shapes",
        help="shapes (the default), flowers, afhq, imagenet, or a folder of images")
    add("--codec", choices=CODECS,
        help="the autoencoder; default: rae for flowers, afhq and imagenet, else small")
    add("--flip", action="store_true", help="encode the mirrored images, too")
    add("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    add("--fit", action="store_true", help="fit a small codec to the dataset")
    add("--fit_steps", type=within(int, 1), default=1500,
        help="steps of 128 images; default: 1500")
    add("--reconstruct", metavar="PATH", nargs="?", const="", type=expanded,
        help="show what the codec keeps of an image, a folder of them, or the dataset")
    add("--out", type=expanded, default="out/reconstruction.png",
        help="the picture of --reconstruct and --fit; default: out/reconstruction.png")
    args = parser.parse_args()

    device = join(args.device, args.weights_dir)
    name = args.codec or ("small" if args.fit else default_codec(args.dataset))
    if args.fit and name in RAES:
        raise UserError(f"--fit: {name} comes with its weights; use --codec small or small64")
    if args.reconstruct is not None and name in SMALL_CODECS and not args.fit:
        if find_codec_file(name, args.dataset, args.data_dir) is None:
            raise UserError(f"--reconstruct: no codec {name} is fitted to {args.dataset}; "
                            "--fit fits one, in minutes, and shows it")
    codec = prepare_codec(name, args.dataset, args.data_dir, device, args.workers,
                          args.fit_steps, args.fit, args.skip_bad)

    if args.fit or args.reconstruct is not None:
        def show():
            images = (find_images(args.reconstruct) if args.reconstruct
                      else find_dataset(args.dataset, args.data_dir))
            reconstruct(images, name, codec, args.out, device, args.dtype, args.workers,
                        args.skip_bad)
        from_first(show)
        return

    cache = open_cache(args.dataset, name, codec, args.flip, "", args.data_dir, device,
                       args.dtype, args.workers, args.skip_bad)
    if RANK == 0:
        unreadable = (cache.labels < 0).sum()
        print(f"{cache.folder}: complete; {len(cache.labels) - unreadable:,} images of "
              f"{len(cache.classes)} classes; {unreadable} unreadable left out")


if __name__ == "__main__":
    run(main)
