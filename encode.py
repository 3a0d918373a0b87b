"""Images to latents, once: the datasets, the frozen autoencoders ("codecs"), the cache.

    python encode.py --dataset flowers                           # downloads Oxford Flowers
    torchrun --nproc_per_node=8 encode.py --dataset imagenet     # resumes if interrupted
    python encode.py --reconstruct photo.jpg --codec rae         # original and reconstruction

Four parts: what all scripts share, the datasets, the codecs, the latent cache.
"""
import contextlib
import hashlib
import json
import os
import re
import shlex
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

# torchrun tells each process its rank, its rank on this node, and how many there are.
LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


# ------------------------------------------------------------------------- errors

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
    except torch.OutOfMemoryError as error:
        # Its first two sentences: that memory is short, and by how much.
        reason = ". ".join(str(error).split(". ")[:2])
        sys.exit(f"error: {reason}; take a smaller --batch_size or, in training without "
                 "--distill, a larger --accumulate")
    except KeyboardInterrupt:
        sys.exit("interrupted; every file already written is complete")
    except BrokenPipeError:
        # Whoever read our output, such as `head`, is gone. Python would complain again at
        # exit, when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@contextlib.contextmanager
def on_failure(what, remedy):
    """Turn any error inside the block into a UserError: what failed, why, and the remedy."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what} ({in_one_line(error)}); {remedy}") from error


def in_one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


# -------------------------------------------------------------------------- files

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


def remove_leftovers(folder):
    """Remove what killed processes left of `write_file`; files of this hour may be in use."""
    for leftover in Path(folder).glob("*.[0-9]*.tmp"):
        with contextlib.suppress(OSError):
            if leftover.stat().st_mtime < time.time() - 3600:
                leftover.unlink()


def check_writable(folder, flag):
    """Raise UserError now, rather than after the work, if a folder cannot be written to.

    The folder need not exist yet. flag: the option that names it.
    """
    folder = Path(os.path.abspath(folder))
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{existing}: is not a folder that can be written to; see {flag}")


def file_hash(path, algorithm):
    """The md5 or sha256 of a file, in hex."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_state(module, state, path, allow_extra=False):
    """Load a state dict; if it does not fit, raise UserError with the tensor and both shapes.

    path: the file it comes from. allow_extra: whether it may hold tensors the module lacks.
    """
    expected, kind = module.state_dict(), type(module).__name__
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{path}: has no tensor {name}, which {kind} needs")
        if state[name].shape != tensor.shape:
            raise UserError(f"{path}: {name} is {tuple(state[name].shape)} in the file and "
                            f"{tuple(tensor.shape)} in {kind}")
    extra = state.keys() - expected.keys()
    if extra and not allow_extra:
        raise UserError(f"{path}: holds {min(extra)}, which {kind} does not have")
    on_meta = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict({name: state[name] for name in expected}, assign=on_meta)


# ---------------------------------------------------------- devices and processes

@dataclass(frozen=True)
class Machine:
    """What a script runs on, and where it keeps its data."""

    device: torch.device = torch.device("cpu")
    dtype: str = "auto"         # of autocast
    data_dir: str = "data"
    workers: int = 1            # threads that read images


def join_processes(device="auto", weights_dir=None):
    """Join the other processes, if torchrun started several. Returns this one's device."""
    if weights_dir:
        torch.hub.set_dir(weights_dir)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        # A day, because the others wait while rank 0 downloads.
        dist.init_process_group("gloo", timeout=timedelta(days=1))

    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if device == "cuda":
        device = f"cuda:{LOCAL_RANK}"
    remedy = "use auto or cpu"
    if WORLD_SIZE > 1 and device.startswith("cuda"):
        remedy = "start no more processes than there are GPUs, or use cpu"
    with on_failure(f"--device {device}: not available", remedy):
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            # cuDNN's attention has given NaN in its bf16 backward pass.
            torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.empty(0, device=device).device


def autocast(device, dtype="auto"):
    """Autocast to bfloat16; dtype "auto" does so on CUDA cards that compute in bfloat16."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = dtype == "bfloat16" or (dtype == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def try_compile(device):
    """Try torch.compile on one line. Returns the error, or None if it works here."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return error
    return None


def compile_blocks(denoiser):
    """torch.compile in place. All blocks have the same code, so only one of them is compiled."""
    for block in denoiser.blocks:
        block.compile()


@contextlib.contextmanager
def exit_if_peer_died():
    """Around collective calls, which fail when another process has ended.

    That process has said why, so this one exits with a line instead of a traceback.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].split(". ")[0]
        sys.exit(f"rank {RANK}: exits because another process has ended ({reason})")


def barrier():
    """Wait until every process is here."""
    if WORLD_SIZE > 1:
        with exit_if_peer_died():
            dist.barrier()


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, on the CPU."""
    tensor = tensor.cpu()
    if WORLD_SIZE > 1:
        with exit_if_peer_died():
            dist.all_reduce(tensor)
    return tensor


def on_rank0(work):
    """Let rank 0 do the work; every process returns its result, or ends with its error."""
    result = [None]
    barrier()
    if RANK == 0:
        try:
            result = [work()]
        except UserError as error:
            result = [error]
    if WORLD_SIZE > 1:
        with exit_if_peer_died():
            dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        if RANK > 0:
            sys.exit(1)         # rank 0 says why
        raise result[0]
    return result[0]


def in_turn(work):
    """Let rank 0 do the work, then the first process of each node, then all others.

    So no two processes download the same file, whether or not nodes share a disk.
    """
    if RANK == 0:
        my_turn = 0
    elif LOCAL_RANK == 0:
        my_turn = 1
    else:
        my_turn = 2
    for turn in range(3):
        if turn == my_turn:
            result = work()
        barrier()
    return result


# --------------------------------------------------------------- the command line

def bounded(number, low, high=None):
    """A type for argparse: an int or a float from low to high."""
    def parse(text):
        value = number(text)
        if value >= low and (high is None or value <= high):
            return value
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ArgumentTypeError(f"must be {limits}, got {text}")

    parse.__name__ = number.__name__        # argparse says "invalid int value"
    return parse


def user_path(text):
    """A type for argparse: a path; the shell leaves the ~ of --out=~/x as it is."""
    return os.path.expanduser(text)


def make_parser(doc):
    """A parser with the flags that all scripts have."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    if RANK > 0:
        parser.error = lambda message: sys.exit(2)      # rank 0 prints it
    add = parser.add_argument_group("folders and machine").add_argument
    add("--data_dir", type=user_path, default="data",
        help="folder of datasets and latents; default: data")
    add("--weights_dir", type=user_path, default=torch.hub.get_dir(),
        help="folder of downloaded weights; default: torch.hub's")
    add("--workers", type=bounded(int, 1), default=min(16, os.cpu_count() or 1),
        help="threads that read images; default: one per core, at most 16")
    add("--device", default="auto", help="auto (the default), cuda, cuda:N, mps or cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="auto (the default): bfloat16 on CUDA")
    return parser


# ================================================================ 2. the datasets

ASSETS = Path(__file__).parent / "assets"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"


@dataclass(frozen=True)
class KnownDataset:
    """Where the images of a dataset come from, and the codec that suits them."""

    folder: str             # of the training images, in data/<dataset>/
    codec: str = "rae"
    url: str = ""           # an archive that holds this folder
    md5: str = ""           # of the archive, where it is known


# To add a dataset: an entry here and, if it wants other settings, a block in train.py.
KNOWN_DATASETS = {
    "shapes": KnownDataset(folder="", codec="small"),
    "flowers": KnownDataset(folder="jpg", url=f"{OXFORD}/102flowers.tgz",
                            md5="52808999861908f626f3c1f4e79d11fa"),
    "afhq": KnownDataset(folder="train",
                         url="https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1"),
    "imagenet": KnownDataset(folder="train"),
}

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
OTHER_SUFFIXES = (".heic", ".avif", ".tif", ".tiff", ".bmp", ".gif", "")    # may be images, too

# The images are the user's own, so Pillow need not guard against malicious ones.
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
    """N images with labels. Index i is an image, and N + i the same image mirrored."""

    name: str               # of its folders under data/ and out/
    classes: list           # their names
    labels: np.ndarray      # (N,) int64
    source: object          # N paths of files, or images (N, S, S, 3) uint8
    digest: str = ""        # of the files' names, sizes and labels

    def __len__(self):
        return len(self.labels)

    def load(self, i, size):
        """Image i as (size, size, 3) uint8 RGB. Raises UserError if it cannot be read."""
        item = self.source[i % len(self)]
        image = load_image(item) if isinstance(item, str) else Image.fromarray(item)
        pixels = np.array(center_crop(image, size))
        return pixels[:, ::-1] if i >= len(self) else pixels

    def batches(self, index_lists, size, workers, skip_bad=False):
        """Yield a list of (size, size, 3) uint8 images for each list of indexes.

        An image that cannot be read raises UserError; with skip_bad it is reported, and
        None takes its place.
        """
        def load(i):
            try:
                return self.load(i, size)
            except UserError as error:
                if not skip_bad:
                    raise
                tqdm.write(f"skipped {error}", file=sys.stderr)

        # The next batch is being read while the caller works on this one.
        with ThreadPoolExecutor(workers) as pool:
            next_batch = None
            for indexes in index_lists:
                batch, next_batch = next_batch, [pool.submit(load, i) for i in indexes]
                if batch is not None:
                    yield [image.result() for image in batch]
            if next_batch is not None:
                yield [image.result() for image in next_batch]

    def load_all(self, indexes, size, workers, skip_bad=False):
        """Images as one array (n, size, size, 3) uint8, without those that are skipped."""
        [images] = self.batches([indexes], size, workers, skip_bad)
        good = [image for image in images if image is not None]
        if not good:
            raise UserError(f"{self.name}: holds no image that can be read")
        return np.stack(good)


# --------------------------------------------------------------------- image files

def load_image(path):
    """Read an image file: a PIL image in RGB, upright, transparent parts white."""
    remedy = "replace or delete it; encode.py and train.py leave it out with --skip_bad"
    with on_failure(f"{path}: cannot be read", remedy), Image.open(path) as file:
        file.load()     # first, because reading the EXIF data of a damaged PNG hides the damage
        image = upright(file)
        if image.mode.startswith("I"):              # 16-bit gray, which convert() would clip
            image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def upright(image):
    """Turn a PIL image as its EXIF data says; leave it alone if that data is malformed."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def center_crop(image, size):
    """Scale a PIL image and cut the middle square out of it, size x size, as ADM does."""
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
    """(B, 3, S, S) in [0, 1] -> (B, S, S, 3) uint8 in numpy; rounded, not truncated."""
    images = (images.float() * 255).round().clamp(0, 255).byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()


# --------------------------------------------------------------------- drawn shapes

OUTLINES = json.loads((ASSETS / "shapes.json").read_text())     # class -> polygon, hole
SHAPES_COUNT = 30_000                                           # images of "shapes"


def shapes(n, seed=0):
    """Draw n shapes, the ten classes in turn, each with its own size, position and colors.

    Returns images (n, 32, 32, 3) uint8 and labels (n,) int64.
    """
    u = np.random.default_rng(seed).random((n, 10))
    images = np.empty((n, 32, 32, 3), np.uint8)
    labels = np.arange(n) % len(OUTLINES)
    outlines = list(OUTLINES.values())

    for i in tqdm(range(n), desc="drawing shapes", unit="image", delay=1):
        radius = 7 + 5 * u[i, 0]                                # pixels
        turn = 0.3 * (2 * u[i, 1] - 1)                          # radians
        center = 16 + (14.5 - radius) * (2 * u[i, 2:4] - 1)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])

        # Drawn at 4 times the size and averaged, so that edges are smooth.
        mask = Image.new("L", (128, 128))
        for points, fill in zip(outlines[labels[i]], (255, 0)):
            points = 4 * (radius * np.array(points) @ rotation + center) - 0.5
            ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=fill)
        cover = np.asarray(mask.reduce(4), np.float64)[:, :, None] / 255    # (32, 32, 1)

        # The shape's color is far from the background's.
        background = u[i, 4:7]
        color = (background + 0.35 + 0.3 * u[i, 7:10]) % 1
        images[i] = np.round(255 * (background + cover * (color - background)))
    return images, labels


# ------------------------------------------------------------------ folders of images

# A dataset is given by a `spec`, as typed for --dataset: a name in KNOWN_DATASETS, or the
# path of a folder.

def find_dataset(spec, data_dir="data"):
    """Open a known dataset, downloaded if it is missing and can be, or a folder of images.

    Raises UserError if there are no images.
    """
    name, folder = locate(spec, data_dir)
    if name == "shapes":
        images, labels = shapes(SHAPES_COUNT)
        return Dataset(name, list(OUTLINES), labels, images, f"{SHAPES_COUNT} shapes")

    if not folder.is_dir() and name in KNOWN_DATASETS and KNOWN_DATASETS[name].url:
        download_folder(folder, KNOWN_DATASETS[name].url, KNOWN_DATASETS[name].md5)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put images there, or name another folder of "
                        "images, or shapes")
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


def locate(spec, data_dir="data"):
    """The name of a dataset, and the folder of its images, which need not exist.

    The images in photos/train are called photos-train, those in data/cats are called cats.
    """
    if spec in KNOWN_DATASETS:
        return spec, Path(data_dir) / spec / KNOWN_DATASETS[spec].folder
    folders = [Path(spec), Path(data_dir) / spec]
    present = [folder for folder in folders if folder.is_dir()]
    if not present:
        # The images may be gone while their latents are still there.
        present = [folder for folder in folders
                   if (Path(data_dir) / folder_name(folder, data_dir)).is_dir()]
    folder = present[0] if present else folders[1]
    name = folder_name(folder, data_dir)
    if name in KNOWN_DATASETS:
        raise UserError(f"--dataset {spec}: call it {name}")
    return name, folder


def folder_name(folder, data_dir):
    """The last two parts of a path, or just the last if its parent is data_dir."""
    folder = Path(os.path.abspath(folder))
    if folder.parent == Path(os.path.abspath(data_dir)):
        return folder.name
    return "-".join(folder.parts[1:][-2:]) or "data"


def claim_name(name, folder, data_dir):
    """Record which images data/<name>/ belongs to; refuse others that share the name."""
    if name in KNOWN_DATASETS:
        return
    record = Path(data_dir) / name / "images.txt"
    relative = os.path.relpath(folder, data_dir)
    if not record.exists():
        write_file(record, lambda file: file.write(os.fsencode(relative)))
    recorded = os.fsdecode(record.read_bytes())
    if recorded != relative and folder.is_dir():
        owner = os.path.normpath(Path(data_dir) / recorded)
        raise UserError(f"{folder}: {record.parent} belongs to {owner}; use another --data_dir "
                        f"or, if the images have only moved, delete {record}")


def list_files(folder):
    """The paths of all files below a folder, sorted, without hidden ones; links are followed."""
    def refuse(error):
        raise UserError(f"{error.filename}: {error.strerror}; make it readable")

    paths, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # A symbolic link may lead back to a folder that we have been in.
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)

        # Programs hide folders such as .ipynb_checkpoints and @eaDir.
        folders[:] = sorted(name for name in folders if name[0] not in ".@")
        paths += [os.path.join(parent, file) for file in files if file[0] != "."]
    return sorted(paths)


def list_classes(folder, data_dir):
    """A folder with one sub-folder per class, or of images only, which are one class.

    Returns the classes, the labels (N,) int64 and the paths.
    """
    files = {}                  # class -> paths of all files
    for sub in sorted(folder.glob("[!.@]*")):
        if sub.is_dir() and sub.name != "__MACOSX":
            paths = list_files(sub)
            if not is_generated(sub, paths, data_dir):
                files[sub.name] = paths
    loose = [str(path) for path in sorted(folder.glob("[!.]*")) if path.is_file()]

    images = {name: only_images(paths) for name, paths in files.items()}
    loose_images = only_images(loose)
    if loose_images and any(images.values()):
        raise UserError(f"{loose_images[0]}: lies beside the folders {', '.join(images)}; move it "
                        "into one of them, or all images into one folder")
    if loose_images:
        images = {Path(os.path.abspath(folder)).name: loose_images}
    for name, paths in images.items():
        if not paths:
            raise UserError(f"{folder / name}: holds no images ({', '.join(SUFFIXES)})")
    if not images:
        raise UserError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")

    others = [path for path in sum(files.values(), loose)
              if Path(path).suffix.lower() in OTHER_SUFFIXES]
    if others:
        print(f"skipped {len(others)} files such as {others[0]}, which are not JPEG, PNG or WebP")
    labels = np.repeat(np.arange(len(images)), [len(paths) for paths in images.values()])
    return list(images), labels, sum(images.values(), [])


def only_images(paths):
    return [path for path in paths if path.lower().endswith(SUFFIXES)]


def is_generated(folder, files, data_dir):
    """Whether a folder is data_dir, or holds what the scripts write: then it is no class of images.

    files: all that are below it.
    """
    names = {os.path.basename(path) for path in files}
    if "ckpt.pt" in names or {"log.csv", "curve.png"} <= names:
        return True
    if names == {"reconstruction.png"}:         # the picture that encode.py draws
        return True
    latents = re.compile(f"({'|'.join(CODECS)})-[0-9a-f]{{8}}")
    for parent in {os.path.dirname(path) for path in files}:
        if latents.fullmatch(os.path.basename(parent)):
            return True
    return os.path.realpath(folder) == os.path.realpath(data_dir)


def list_flowers(folder):
    """Oxford's folder jpg, whose labels are in a file of their own: like `list_classes`."""
    paths = only_images(list_files(folder))
    file = folder.with_name("imagelabels.mat")
    download(f"{OXFORD}/imagelabels.mat", file, "e0620be6f572b9609742df49c70aed4d")
    with on_failure(f"{file}: unusable", f"delete it and {folder}, and run the command again"):
        numbers = scipy.io.loadmat(file)["labels"].ravel().astype(int)
        if len(numbers) != len(paths):
            raise ValueError(f"{len(numbers)} labels for {len(paths)} images")
    numbers, labels = np.unique(numbers, return_inverse=True)
    names = (ASSETS / "flowers.txt").read_text().splitlines()
    return [names[number - 1] for number in numbers], labels, paths


def find_images(*paths):
    """Image files, and those in folders: a Dataset without labels."""
    images = []
    for path in paths:
        found = only_images(list_files(path)) if os.path.isdir(path) else [str(path)]
        if not found or not os.path.isfile(found[0]):
            raise UserError(f"{path}: no such image, nor a folder that holds any")
        images += found
    return Dataset("", [], np.full(len(images), -1), images)


def match_class(typed, classes):
    """The number of a class that the user typed by name or number, or None.

    An exact name counts first, then one in any case and with its accents in any encoding.
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
    """Download a file unless it exists, and check its md5, or print it. url may be a path."""
    if path.is_file():
        return
    with on_failure(f"{path}: cannot be downloaded", f"try again, or save {url} there yourself"):
        path.parent.mkdir(parents=True, exist_ok=True)
        address = url if "://" in url else Path(url).resolve().as_uri()
        torch.hub.download_url_to_file(address, path)
        found = file_hash(path, "md5")
        if md5 and found != md5:
            path.unlink()
            raise ValueError(f"md5 mismatch: {found}, expected {md5}")
        if not md5:
            print(f"{path}: md5 {found} (the expected one is not known)")


def download_folder(folder, url, md5):
    """Download an archive next to a folder, and unpack the folder from it."""
    archive = folder.with_name(url.split("/")[-1].split("?")[0])
    temporary = folder.with_name(f".{folder.name}.tmp")
    download(url, archive, md5)

    # The members of a tar file could write outside the folder; those of a zip file cannot.
    safely = {} if archive.suffix == ".zip" else dict(filter="data")
    with on_failure(f"{archive}: cannot be unpacked", "delete it and try again"):
        shutil.unpack_archive(archive, temporary, **safely)
        next(temporary.rglob(folder.name)).rename(folder)
    shutil.rmtree(temporary)


# ================================================================== 3. the codecs

# A codec is a frozen nn.Module with `encode` (images to latents), `decode` (back), `name`,
# `image_size` and `latent_shape` (T, C).

@dataclass(frozen=True)
class PublishedRAE:
    """Where the weights of a representation autoencoder are."""

    dinov2: str             # its encoder's name in torch.hub
    channels: int           # C of its latents
    folder: str             # in RAE's collection
    stat: str = "stat"      # the file's name here, with the start of its sha256 if known
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

# The codecs that are fitted here: name -> (image size, channels of a token). More channels keep
# more of a photograph; drawings need few, and few are easier to denoise.
SMALL_CODECS = {"small": (32, 32), "wide": (32, 64), "small64": (64, 32)}
CODECS = (*SMALL_CODECS, *RAES)


def latent_shape(codec_name):
    """(T, C) of a codec's latents."""
    if codec_name in RAES:
        return 256, RAES[codec_name].channels
    size, channels = SMALL_CODECS[codec_name]
    return (size // 8) ** 2, channels


def default_codec(spec):
    """The name of the codec that suits a dataset."""
    return KNOWN_DATASETS[spec].codec if spec in KNOWN_DATASETS else "small"


def load_codec(name, weights=None, device="cpu", decoder=True):
    """A frozen codec.

    name: one of CODECS. weights: of a small codec, its state dict or file; None means the
    one for shapes. decoder=False leaves the RAE's out (1.7 GB). Raises UserError if weights
    are missing.
    """
    if name in RAES:
        return RAE(name, decoder).to(device)
    path = "the checkpoint's codec"
    if not isinstance(weights, dict):
        path = weights or SHAPES_CODEC
        contents = read_codec_file(path)
        if contents["name"] != name:
            raise UserError(f"{path}: holds a codec {contents['name']}, not {name}")
        weights = contents["weights"]
    codec = SmallCodec(name)
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
    """x + attention(norm(x)), then x + mlp(norm(x)), with the published names."""

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
    """RAE's decoder, a ViT as in MAE, with the published names: a token becomes a patch."""

    def __init__(self, hidden=1152, depth=28, heads=16, mlp=4096, latent_dim=768,
                 patch=16, grid=16):
        super().__init__()
        self.patch = patch      # pixels per side of a patch
        self.grid = grid        # patches per side of the image
        self.decoder_embed = nn.Linear(latent_dim, hidden)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, hidden))
        layers = [ViTLayer(hidden, heads, mlp) for _ in range(depth)]
        self.decoder_layers = nn.Sequential(*layers)
        self.decoder_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.decoder_pred = nn.Linear(hidden, patch * patch * 3)

    def forward(self, tokens):
        """(B, T, latent_dim) -> (B, 3, S, S), normalized by ImageNet's mean and std."""
        x = self.decoder_embed(tokens)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.decoder_layers(x + self.decoder_pos_embed)         # (B, 1 + T, D)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:]          # (B, T, P * P * 3)

        # From (B, row, column, y, x, 3) to (B, 3, row * y, column * x).
        x = x.unflatten(2, (self.patch, self.patch, 3)).unflatten(1, (self.grid, self.grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class RAE(nn.Module):
    """RAE, frozen: DINOv2 with registers encodes at 224 pixels, a ViT-XL decodes to 256."""

    def __init__(self, name="rae", decoder=True):
        super().__init__()
        published = RAES[name]
        self.name, self.image_size, self.latent_shape = name, 256, latent_shape(name)
        tokens, channels = self.latent_shape

        # RAE takes DINOv2's tokens after its last norm, but without that norm's weights.
        self.encoder = load_dinov2(published.dinov2)
        self.encoder.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)

        # The statistics of the latents are (C, 16, 16); a mean of None stands for 0.
        path, stat = read_published(published.folder, "stats", "imagenet1k/stat.pt",
                                    published.stat)
        with on_failure(f"{path}: does not hold RAE's statistics", "delete it and try again"):
            std = (stat["var"].float() + 1e-5).sqrt()
            mean = torch.zeros_like(std) if stat.get("mean") is None else stat["mean"].float()
            self.register_buffer("mean", mean.reshape(channels, tokens).T.contiguous())
            self.register_buffer("std", std.reshape(channels, tokens).T.contiguous())
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

        if decoder:
            with torch.device("meta"):          # no memory yet: it takes over the file's
                self.decoder = ViTDecoder(latent_dim=channels)
            path, state = read_published(published.folder, "decoders", "ViTXL_n08/model.pt",
                                         published.decoder)
            load_state(self.decoder, state, path, allow_extra=True)
        self.eval().requires_grad_(False)

    def encode(self, images):
        """(B, 3, 256, 256) in [0, 1] -> (B, 256, C) float32."""
        x = F.interpolate(images.float(), 224, mode="bicubic")      # RAE does not antialias
        x = self.encoder.forward_features((x - self.pixel_mean) / self.pixel_std)
        return (x["x_norm_patchtokens"].float() - self.mean) / self.std

    def decode(self, z):
        """(B, 256, C) -> (B, 3, 256, 256) in [0, 1]."""
        x = self.decoder(z.float() * self.std + self.mean)
        return (x.float() * self.pixel_std + self.pixel_mean).clamp(0, 1)


def load_dinov2(entry):
    """DINOv2 from torch.hub's folder, or downloaded to it."""
    # DINOv2's code reads these: use plain attention, and load weights without pickles.
    os.environ["XFORMERS_DISABLED"] = "1"
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

    hub = Path(torch.hub.get_dir())
    file = hub / "checkpoints" / f"{entry}4_pretrain.pth"
    code = next(hub.glob("facebookresearch_dinov2_*/"),
                hub / f"facebookresearch_dinov2_{DINOV2_COMMIT}")
    new = not file.exists()
    with on_failure(f"{code} or {file}: missing or damaged", "delete it and try again, or get "
                    f"https://github.com/{DINOV2}/archive/{DINOV2_COMMIT}.zip, unpacked, and "
                    "https://dl.fbaipublicfiles.com/dinov2/"
                    f"{entry.removesuffix('_reg')}/{file.name}"):
        if code.is_dir():
            encoder = torch.hub.load(str(code), entry, source="local")
        else:
            encoder = torch.hub.load(f"{DINOV2}:{DINOV2_COMMIT}", entry, skip_validation=True)
        expected = DINOV2_SHA256.get(file.name)
        if new and expected and file_hash(file, "sha256") != expected:
            file.unlink()       # the next run would take it for one that has been checked
            raise ValueError("sha256 mismatch")
    return encoder


def read_published(folder, kind, path, name):
    """Read a file of RAE's collection from torch.hub's folder, or download it there first.

    Returns where it is, and its contents.
    """
    url = f"{COLLECTION}/{kind}/dinov2/{folder}/{path}"
    local = Path(torch.hub.get_dir()) / "checkpoints" / f"rae-{folder}-{name}.pt"
    with on_failure(f"{local}: missing or damaged",
                    f"delete it and try again, or get {url} yourself"):
        return local, torch.hub.load_state_dict_from_url(
            url, file_name=local.name, map_location="cpu", check_hash=True, weights_only=True)


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

    def __init__(self, name="small"):
        super().__init__()
        self.name, self.latent_shape = name, latent_shape(name)
        self.image_size, channels = SMALL_CODECS[name]
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
        """(B, T, C), which is projected first -> (B, 3, S, S) in [0, 1].

        clamp=False is for training, because clamping stops gradients.
        """
        side = self.image_size // 8
        z = to_sphere(z).transpose(1, 2).unflatten(2, (side, side))
        images = 0.5 * self.decoder(z) + 0.5
        return images.clamp(0, 1) if clamp else images


FIT_STEPS = 6000            # of a fit, if nothing else is asked
FEWEST_STEPS = 100          # a fit that is interrupted earlier leaves no codec


def fit_layout(device):
    """channels_last is faster on CPUs, but its gradients are wrong on MPS (pytorch 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def fit_codec(images, name="small", steps=FIT_STEPS, batch_size=32, seed=0, device="cpu",
              flip=False):
    """Train a small codec on images (N, S, S, 3) uint8; flip: mirror half of each batch.

    Ctrl-C ends the fit early. Returns the codec, frozen, and the number of steps it took.
    """
    torch.manual_seed(seed)
    layout = fit_layout(torch.device(device))
    codec = SmallCodec(name).to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(codec.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=min(0.3, 300 / steps))

    step = 0
    try:
        for _ in tqdm(range(steps), desc="fitting the small codec", unit="step", mininterval=1):
            indexes = torch.randint(len(images), (batch_size,))
            x = to_float(images[indexes], device)
            if flip:
                half = batch_size // 2
                x = torch.cat([x[:half].flip(3), x[half:]])
            x = x.contiguous(memory_format=layout)
            z = codec.encode(x)

            # Noise in three of four latents prepares the decoder for the denoiser's errors.
            angle = 0.5 * torch.rand(batch_size) * (torch.rand(batch_size) < 0.75)
            noise = torch.randn(z.shape)
            y = codec.decode(rotate(z, noise.to(device), angle.to(device)), clamp=False)

            # Squared errors of the pixels, and of the differences between neighbors, because
            # edges weigh little in the former and make a picture look sharp.
            error = y - x
            edges = error.diff(dim=2).pow(2).mean() + error.diff(dim=3).pow(2).mean()
            loss = error.pow(2).mean() + 2 * edges

            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
    except KeyboardInterrupt:
        if WORLD_SIZE > 1 or step < FEWEST_STEPS:
            raise

    # Stored in half precision; whoever loads it later gets the same numbers.
    return load_codec(name, half_weights(codec), device), step


SHAPES_CODEC = ASSETS / "small_shapes.pt"


def half_weights(codec):
    return {name: tensor.half() for name, tensor in codec.state_dict().items()}


def read_codec_file(path):
    """The contents of a small codec's file, a dict: name, weights, steps, images, ..."""
    with on_failure(f"{path}: missing or damaged", "delete it to fit it again, or git restore it"):
        contents = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("name", "weights", "steps", "asked", "images", "digest", "fitted"):
            if key not in contents:
                raise ValueError(f"holds no {key}")
        return contents


def find_codec_file(name, spec, data_dir="data"):
    """The file of the small codec that was last fitted to a dataset, or None.

    For shapes there is one in assets/.
    """
    dataset_name, _ = locate(spec, data_dir)
    newest, when = None, 0.0
    for path in (Path(data_dir) / dataset_name).glob(f"{name}-*.pt"):
        contents = read_codec_file(path)
        if contents["name"] == name and contents["fitted"] > when:
            newest, when = path, contents["fitted"]
    if newest is None and (name, spec) == ("small", "shapes"):
        return SHAPES_CODEC
    return newest


def fit_codec_file(name, spec, steps, machine, flip=False, skip_bad=False):
    """Fit a small codec to a dataset and write it to a file. Returns its path."""
    dataset = find_dataset(spec, machine.data_dir)
    check_writable(Path(machine.data_dir) / dataset.name, "--data_dir")

    # 60,000 images are enough, and all of ImageNet would not fit into memory.
    chosen = np.random.default_rng(0).permutation(len(dataset))[:60_000]
    size, _ = SMALL_CODECS[name]
    images = dataset.load_all(chosen, size, machine.workers, skip_bad)
    print(f"{dataset.name}: fitting a codec to {len(images):,} images, once; minutes on a CPU "
          f"(see --fit_steps). Ctrl-C after {FEWEST_STEPS} steps keeps what has been learned",
          flush=True)
    codec, taken = fit_codec(images, name, steps, device=machine.device, flip=flip)

    contents = dict(name=name, weights=half_weights(codec), steps=taken, asked=steps,
                    images=len(images), digest=dataset.digest, fitted=time.time())
    path = Path(machine.data_dir) / dataset.name / f"{name}-{fingerprint(codec)[:8]}.pt"
    write_file(path, lambda file: torch.save(contents, file))
    return path


def prepare_codec(name, spec, machine, fit_steps=FIT_STEPS, refit=False, flip=False,
                  skip_bad=False, decoder=True):
    """The codec for a dataset. A small one is fitted if there is none, or if refit says so.

    flip: fit it to the mirrored images, too.
    """
    def find_file():
        dataset_name, folder = locate(spec, machine.data_dir)
        data = Path(machine.data_dir) / dataset_name
        if dataset_name != "shapes" and not folder.is_dir() and not data.is_dir():
            find_dataset(spec, machine.data_dir)    # fails or downloads, before the codec does
        claim_name(dataset_name, folder, machine.data_dir)
        if name in RAES:
            return None

        path = find_codec_file(name, spec, machine.data_dir)
        if refit or path is None:
            path = fit_codec_file(name, spec, fit_steps, machine, flip, skip_bad)
        contents = read_codec_file(path)
        print(f"codec: {path}, fitted for {contents['steps']:,} steps to "
              f"{contents['images']:,} images")
        if contents["steps"] < contents["asked"]:
            line = ["--dataset", str(spec), "--codec", name, "--fit",
                    "--fit_steps", str(contents["asked"])]
            if flip:
                line += ["--flip"]
            if machine.data_dir != "data":
                line += ["--data_dir", str(machine.data_dir)]
            print(f"       (interrupted; python encode.py {shlex.join(line)} fits another)")
        return path

    path = on_rank0(find_file)
    return in_turn(lambda: load_codec(name, path, machine.device, decoder))


# ============================================================ 4. the latent cache

CHUNK = 256                             # images in a chunk file
READERS = ThreadPoolExecutor(16)        # threads that wait for the disk in Cache.read


@dataclass(frozen=True)
class Cache:
    """Latents on disk: chunk files, which are written atomically, and then index.json."""

    folder: Path
    classes: list           # their names
    labels: np.ndarray      # (N,) int64; -1 for an unreadable image, whose latent is NaN
    shape: tuple            # (T, C)
    codec_fingerprint: str
    images_digest: str
    flip: bool              # whether the second half are the mirrored images
    written: float = 0.0    # when it was completed, in seconds since 1970

    @property
    def key(self):
        """What distinguishes this cache from others: the end of its folder's name."""
        return self.folder.name[-8:]

    def path(self, k):
        return self.folder / f"{k:06d}.npy"

    def chunks(self):
        return range(-(-len(self.labels) // CHUNK))

    def indexes(self, k):
        """The indexes of the images in chunk k, a range."""
        return range(len(self.labels))[k * CHUNK:(k + 1) * CHUNK]

    def is_whole(self):
        return all(self.path(k).exists() for k in self.chunks())

    def chunk(self, k):
        """The latents of chunk k, (n, T, C) float16: memory-mapped, and their shape checked."""
        with if_damaged(self.path(k)):
            latents = np.load(self.path(k), mmap_mode="r")
            expected = (len(self.indexes(k)), *self.shape)
            if latents.shape != expected:
                raise ValueError(f"holds {latents.shape}, not {expected}")
            return latents

    def read(self, indexes, out):
        """Read latents in any order from disk into out (B, T, C) float16.

        By plain reads in many threads: a memory map waits for the disk page by page.
        """
        for _ in READERS.map(self.read_latent, indexes, out):
            pass                # waits, and raises what a thread has raised

    def read_latent(self, i, out):
        path = self.path(i // CHUNK)
        chunk = self.indexes(i // CHUNK)
        with if_damaged(path), open(path, "rb", buffering=0) as file:
            # Counted from the end, so that the length of the header does not matter.
            file.seek((i - chunk.stop) * out.nbytes, os.SEEK_END)
            if file.readinto(out) != out.nbytes:
                raise ValueError("is too short")


def if_damaged(path):
    return on_failure(f"{path}: damaged", "delete it and run encode.py again")


def cache_key(codec_fingerprint, images_digest, flip):
    """A hash of all that latents are made from."""
    made_from = json.dumps([codec_fingerprint, images_digest, bool(flip)])
    return hashlib.sha256(made_from.encode()).hexdigest()[:8]


def read_index(path):
    with if_damaged(path):
        index = json.loads(path.read_text())
        index["labels"] = np.array(index["labels"])
        return Cache(folder=path.parent, **index)


def write_index(cache):
    """Complete a cache: mark the unreadable images, and write index.json."""
    unreadable = [np.isnan(cache.chunk(k)[:, 0, 0]) for k in cache.chunks()]
    labels = np.where(np.concatenate(unreadable), -1, cache.labels)
    index = dict(classes=cache.classes, labels=labels.tolist(), shape=cache.shape,
                 codec_fingerprint=cache.codec_fingerprint, images_digest=cache.images_digest,
                 flip=cache.flip, written=time.time())
    write_file(cache.folder / "index.json", lambda file: file.write(json.dumps(index).encode()))
    remove_leftovers(cache.folder)


def complete_caches(spec, codec, flip=False, data_dir="data"):
    """All complete caches of a dataset's latents by a codec, the newest last."""
    name, _ = locate(spec, data_dir)
    wanted = fingerprint(codec), bool(flip)
    caches = []
    for path in (Path(data_dir) / name).glob(f"{codec.name}-????????/index.json"):
        cache = read_index(path)
        if (cache.codec_fingerprint, cache.flip) == wanted and cache.is_whole():
            caches.append(cache)
    return sorted(caches, key=lambda cache: cache.written)


def find_cache(spec, codec, flip=False, key="", data_dir="data"):
    """The cache to use: a complete one and None, or one to fill and the Dataset to fill it from.

    key: of the cache that a resumed run began with; raises UserError if it is not available.
    """
    caches = complete_caches(spec, codec, flip, data_dir)
    if key:
        caches = [cache for cache in caches if cache.key == key]

    # A cache of a known dataset is taken as it is. A user's folder may have changed since it was
    # encoded, so its images are listed again, unless they are gone.
    _, folder = locate(spec, data_dir)
    may_have_changed = (spec not in KNOWN_DATASETS and folder.is_dir()
                        and only_images(list_files(folder)))
    if caches and (key or not may_have_changed):
        return caches[-1], None

    dataset = find_dataset(spec, data_dir)
    labels = np.tile(dataset.labels, 2) if flip else dataset.labels
    codec_fingerprint = fingerprint(codec)
    new_key = cache_key(codec_fingerprint, dataset.digest, flip)
    parent = Path(data_dir) / dataset.name
    if key and key != new_key:
        raise UserError(f"{parent}: the images have changed since the run began; start a new one "
                        "(see --init_from)")
    for cache in caches:
        if cache.key == new_key:
            return cache, None
    cache = Cache(parent / f"{codec.name}-{new_key}", dataset.classes, labels,
                  codec.latent_shape, codec_fingerprint, dataset.digest, bool(flip))
    return cache, dataset


def fill_cache(cache, dataset, codec, machine, skip_bad=False):
    """Encode this process's share of the chunks that are missing."""
    missing = [k for k in cache.chunks()[RANK::WORLD_SIZE] if not cache.path(k).exists()]
    index_lists = [cache.indexes(k) for k in missing]
    batches = dataset.batches(index_lists, codec.image_size, machine.workers, skip_bad)
    for k, images in zip(tqdm(missing, desc="encoding", unit="chunk", disable=RANK > 0), batches):
        latents = np.full((len(images), *cache.shape), np.nan, np.float16)
        good = [i for i, image in enumerate(images) if image is not None]
        for start in range(0, len(good), 64):
            part = good[start:start + 64]
            x = to_float(np.stack([images[i] for i in part]), machine.device)
            with torch.no_grad(), autocast(machine.device, machine.dtype):
                latents[part] = codec.encode(x).half().cpu().numpy()
        if not np.isfinite(latents[good]).all():
            raise UserError(f"{cache.path(k)}: some latents are not finite; try --dtype float32")
        write_file(cache.path(k), lambda file: np.save(file, latents))


def open_cache(spec, codec, machine=Machine(), flip=False, key="", skip_bad=False):
    """The latents of a dataset by a codec; those that are missing are encoded first.

    flip: the mirrored images, too. key: of the cache that a resumed run began with. Raises
    UserError for what cannot be read.
    """
    def find():
        name, folder = locate(spec, machine.data_dir)
        claim_name(name, folder, machine.data_dir)
        return find_cache(spec, codec, flip, key, machine.data_dir)

    def check():
        if (cache.labels < 0).all():
            raise UserError(f"{spec}: holds no image that can be read")
        for k in cache.chunks():
            cache.chunk(k)          # a damaged file is found now, not hours later

    cache, dataset = on_rank0(find)
    if dataset is not None:
        fill_cache(cache, dataset, codec, machine, skip_bad)
        on_rank0(lambda: write_index(cache))
        cache = read_index(cache.folder / "index.json")
    on_rank0(check)
    return cache


# ------------------------------------------------------------------------ the script

def reconstruct(dataset, codec, out, machine, skip_bad=False):
    """Draw up to 16 images above their reconstructions; print the mean PSNR."""
    chosen = np.random.default_rng(0).permutation(len(dataset))[:16]
    images = dataset.load_all(chosen, codec.image_size, machine.workers, skip_bad)
    x = to_float(images, machine.device)
    with torch.no_grad(), autocast(machine.device, machine.dtype):
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
    print(f"{out}: codec {codec.name}, PSNR {psnr:.2f} dB, mean of {len(images)} images")


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--dataset", type=user_path, default="shapes",
        help="shapes (the default), flowers, afhq, imagenet, or a folder of images")
    add("--codec", choices=CODECS,
        help="the autoencoder; default: rae for flowers, afhq and imagenet, else small")
    add("--flip", action="store_true", help="encode (or --fit to) the mirrored images, too")
    add("--skip_bad", action="store_true", help="leave unreadable images out, and count them")
    add("--fit", action="store_true", help="fit a small codec to the dataset, and show it")
    add("--fit_steps", type=bounded(int, 1), default=FIT_STEPS,
        help=f"steps of 32 images; default: {FIT_STEPS}")
    add("--reconstruct", metavar="PATH", nargs="?", const="", type=user_path,
        help="show what the codec keeps of an image, a folder of them, or the dataset")
    add("--out", type=user_path, default="out/reconstruction.png",
        help="the picture of --reconstruct and --fit, a PNG; default: out/reconstruction.png")
    return parser.parse_args()


def check_showing(args, name):
    """Raise UserError now for what --fit or --reconstruct could not do later."""
    if args.fit and name in RAES:
        raise UserError(f"--fit: {name} comes with its weights; use --codec "
                        "small, wide or small64")
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must end in .png")
    check_writable(Path(args.out).parent, "--out")
    if not args.fit and name in SMALL_CODECS:
        if find_codec_file(name, args.dataset, args.data_dir) is None:
            raise UserError(f"--reconstruct: no codec {name} is fitted to {args.dataset}; "
                            "--fit fits one, in minutes, and shows it")


def main():
    args = parse_args()
    device = join_processes(args.device, args.weights_dir)
    machine = Machine(device, args.dtype, args.data_dir, args.workers)
    name = args.codec or ("small" if args.fit else default_codec(args.dataset))
    showing = args.fit or args.reconstruct is not None
    if showing:
        on_rank0(lambda: check_showing(args, name))
    codec = prepare_codec(name, args.dataset, machine, args.fit_steps, args.fit, args.flip,
                          args.skip_bad)

    def show():
        if args.reconstruct:
            dataset = find_images(args.reconstruct)
        else:
            dataset = find_dataset(args.dataset, args.data_dir)
        reconstruct(dataset, codec, args.out, machine, args.skip_bad)

    if showing:
        on_rank0(show)
        return
    cache = open_cache(args.dataset, codec, machine, args.flip, skip_bad=args.skip_bad)
    if RANK == 0:
        unreadable = (cache.labels < 0).sum()
        print(f"{cache.folder}: complete; {len(cache.labels) - unreadable:,} images of "
              f"{len(cache.classes)} classes; {unreadable} unreadable left out")


if __name__ == "__main__":
    run(main)
