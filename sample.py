"""Draw images in a few steps from a trained denoiser; the decoder runs once, at the end.

    python sample.py                                             # a grid, from the newest run
    torchrun --nproc_per_node=8 sample.py --num_images 50000 --out samples.npz    # or samples/
    python sample.py --init photo.png --init_angle 60 --classes rose             # edit an image
"""
import math
import shlex
import sys
import time
import zipfile
from argparse import SUPPRESS, BooleanOptionalAction
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from encode import (
    RANK, WORLD_SIZE, UserError, autocast, bounded, check_writable, compile_blocks,
    exit_if_peer_died, find_images, fingerprint, in_one_line, in_turn, join_processes,
    load_codec, load_state, make_parser, match_class, on_failure, on_rank0, run, to_float,
    to_uint8, try_compile, user_path, write_file)
from model import (
    Denoiser, ModelConfig, generate, guidance_scales, guided, rotate, sampling_angles, to_sphere)

CHECKPOINT_FORMAT = 6
SAMPLING = ("steps", "cfg_scale", "cfg_skip", "same_noise")     # settings of a run


# -------------------------------------------------------------------- the checkpoint

def find_checkpoint(path):
    """The file of a checkpoint: the path itself or, in a folder, the newest ckpt.pt below it."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted(path.rglob("ckpt.pt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"{path.resolve()}: no ckpt.pt in this folder or below; name the file "
                        "of a checkpoint, or train one: python train.py")
    return found[-1]


def load_checkpoint(path):
    """Read what train.py saved, a dict; path: a file, or a folder that holds one.

    Its tensors are read from the file when they are used. Raises UserError.
    """
    path = find_checkpoint(path)
    if not path.exists():
        raise UserError(f"{path.resolve()}: no such checkpoint; name another with --ckpt, or "
                        "train one: python train.py")
    with on_failure(f"{path}: is no complete checkpoint of train.py (ckpt.pt)",
                    "name another, or train one: python train.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = checkpoint["format"]
    if found != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: has format {found}, not {CHECKPOINT_FORMAT}: it was written by "
                        "another version of train.py; use that version, or train again")
    return checkpoint


def load_model(checkpoint, device="cpu"):
    """The denoiser of a checkpoint with its averaged (EMA) weights, frozen."""
    model = Denoiser(ModelConfig(**checkpoint["config"]))
    load_state(model, checkpoint["ema"], "the checkpoint")
    return model.to(device).eval().requires_grad_(False)


def load_checkpoint_codec(checkpoint, device="cpu", decoder=True):
    """The codec that a checkpoint was trained with: a small one is in it, the RAE is not."""
    saved = checkpoint["codec"]
    codec = in_turn(lambda: load_codec(saved["name"], saved["weights"], device, decoder))
    if fingerprint(codec) != saved["fingerprint"]:
        raise UserError(f"{saved['name']}: has other weights than in training; see --weights_dir")
    return codec


def sampling_options(checkpoint):
    """How a run's images are drawn by default: steps, cfg_scale, cfg_skip, same_noise."""
    return {name: checkpoint["settings"][name] for name in SAMPLING}


# ----------------------------------------------------------------- from noise to images

def draw_noise(seed, indexes, shape, steps=1, same_noise=False):
    """Gaussian noise for images: (steps, B, *shape), repeated for all steps if same_noise.

    Image i's depends on (seed, i) alone, so it does not matter how images are batched.
    """
    count = 1 if same_noise else steps
    noise = np.empty((len(indexes), count, *shape), np.float32)
    for row, i in zip(noise, indexes):
        np.random.default_rng((seed, i)).standard_normal(dtype=np.float32, out=row)
    noise = torch.from_numpy(noise).transpose(0, 1)
    return noise.expand(steps, *noise.shape[1:])


def schedule(model, steps, cfg_scale=1.0, cfg_skip=0):
    """The noise angle before each step, and the guidance of each step."""
    return (sampling_angles(steps, model.config.max_angle),
            guidance_scales(steps, cfg_scale, cfg_skip))


def predict(model, labels, noise, cfg_scale=1.0, cfg_skip=0):
    """Each step's prediction from noise (steps, B, T, C): a list of (B, T, C), the best last."""
    angles, scales = schedule(model, len(noise), cfg_scale, cfg_skip)
    return list(generate(model, labels, noise, angles, scales))


def edit(model, labels, noise, start, degrees, cfg_scale=1.0, cfg_skip=0):
    """Edit latents (B, T, C): rotate them towards noise, and take the steps from there.

    The more noise, the less is kept. Steps that start from more noise are skipped.
    """
    angles, scales = schedule(model, len(noise), cfg_scale, cfg_skip)
    first = math.radians(degrees)
    angles = [first] + [angle for angle in angles[1:] if angle < first]
    taken = len(angles)
    return list(generate(model, labels, noise[-taken:], angles, scales[-taken:], start))[-1]


@torch.no_grad()
def predict_through_pixels(model, codec, labels, noise, cfg_scale=1.0, cfg_skip=0):
    """Sphere Encoder's loop: decode each step's image and encode it again (arXiv 2602.15030).

    Returns the last prediction, (B, T, C). It shows what staying among latents saves.
    """
    angles, scales = schedule(model, len(noise), cfg_scale, cfg_skip)
    x = torch.zeros_like(noise[0])
    for k in range(len(noise)):
        if k > 0:
            x = codec.encode(codec.decode(x).float())
        v = rotate(x, noise[k], angles[k], model.config.sphere)
        x = guided(model, v, labels, scales[k])
    return x


def generate_batches(model, codec, labels, batches, seed=0, steps=4, cfg_scale=1.0, cfg_skip=0,
                     same_noise=False, pixel_loop=False, dtype="auto"):
    """Generate and decode images: yields (B, S, S, 3) uint8 for each of batches.

    labels: (N,) int64 of all images. batches: lists of indexes of images.
    """
    device = next(model.parameters()).device

    def noise_of(batch):
        return draw_noise(seed, batch, codec.latent_shape, steps, same_noise)

    # A thread draws the noise of the next batch, with numpy: see train.py on threads.
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(noise_of, batches[0]) if batches else None
        for k, batch in enumerate(batches):
            noise = ahead.result().to(device)
            if k + 1 < len(batches):
                ahead = thread.submit(noise_of, batches[k + 1])
            y = labels[torch.tensor(batch)].to(device)
            with torch.no_grad(), autocast(device, dtype):
                if pixel_loop:
                    z = predict_through_pixels(model, codec, y, noise, cfg_scale, cfg_skip)
                else:
                    z = predict(model, y, noise, cfg_scale, cfg_skip)[-1]
                images = codec.decode(z)
            yield to_uint8(images)


def split_batches(count, batch_size):
    """This process's share of the images 0 to count - 1: a list of lists of indexes."""
    starts = range(0, count, batch_size)
    batches = [list(range(start, min(start + batch_size, count))) for start in starts]
    return batches[RANK::WORLD_SIZE]


def sample_batches(model, codec, labels, batch_size=100, **options):
    """Images for labels (N,), in order: yields (B, S, S, 3) uint8, on rank 0 only.

    All processes must call it and exhaust it. options: of `generate_batches`.
    """
    batches = split_batches(len(labels), batch_size)
    generated = generate_batches(model, codec, labels, batches, **options)
    if WORLD_SIZE == 1:
        yield from generated
        return

    # In rounds of one batch per process; the last batches may be short, or missing.
    size = codec.image_size
    for start in range(0, len(labels), batch_size * WORLD_SIZE):
        mine = torch.zeros(batch_size, size, size, 3, dtype=torch.uint8)
        images = next(generated, None)
        if images is not None:
            mine[:len(images)] = torch.from_numpy(images)
        parts = [torch.empty_like(mine) for _ in range(WORLD_SIZE)] if RANK == 0 else None
        with exit_if_peer_died():
            dist.gather(mine, parts)
        for rank, part in enumerate(parts or []):
            count = min(batch_size, len(labels) - start - rank * batch_size)
            if count > 0:
                yield part[:count].numpy()


# -------------------------------------------------------------------------- filmstrips

# Each returns a grid for `draw_grid`: a list of rows, and a row is a list of (image, caption).
# `names` are those of the classes of the labels, `options` are cfg_scale and cfg_skip.

def decode(codec, z, batch_size=100):
    """(B, T, C) -> (B, S, S, 3) uint8, a batch at a time."""
    return np.concatenate([to_uint8(codec.decode(part)) for part in z.split(batch_size)])


def one_row_each(columns, captions, names):
    """Columns of images (B, S, S, 3), with a caption each -> a row for each of the B images."""
    grid = []
    for b, name in enumerate(names):
        grid.append([(images[b], f"{caption}\n{name}")
                     for images, caption in zip(columns, captions)])
    return grid


def steps_filmstrip(model, codec, labels, names, noise, options):
    """What each step predicts."""
    columns = [decode(codec, x) for x in predict(model, labels, noise, **options)]
    captions = [f"step {k + 1}" for k in range(len(columns))]
    return one_row_each(columns, captions, names)


def guidance_filmstrip(model, codec, labels, names, noise, options):
    """The same noise with more and more guidance."""
    columns, captions = [], []
    for scale in (1, 1.5, 2, 3, 4, 6):
        z = predict(model, labels, noise, scale, options["cfg_skip"])[-1]
        columns.append(decode(codec, z))
        captions.append(f"guidance {scale:g}")
    return one_row_each(columns, captions, names)


def angle_filmstrip(model, codec, labels, names, noise, options):
    """A sample rotated towards noise and decoded; below, what the denoiser makes of it."""
    z = predict(model, labels, noise, **options)[-1]
    # Noise of its own: at 90 degrees, that which z was drawn from would give z again.
    other = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z.device)
    length = z.pow(2).mean((1, 2), keepdim=True).sqrt()     # predictions leave the sphere
    noisy, denoised, captions = [], [], []
    for degrees in range(0, 91, 15):
        v = rotate(z, other, math.radians(degrees))
        noisy.append(decode(codec, v * length))
        denoised.append(decode(codec, model(v, labels).float()))
        captions.append(f"{degrees}°")
    above = one_row_each(noisy, [f"{caption} noisy" for caption in captions], names)
    below = one_row_each(denoised, [f"{caption} denoised" for caption in captions], names)
    return [row for pair in zip(above, below) for row in pair]


FILMSTRIPS = {"steps": steps_filmstrip, "guidance": guidance_filmstrip, "angle": angle_filmstrip}


def slerp(a, b, t):
    """The point at t in [0, 1] of the way from a to b along the sphere; (B, T, C) each."""
    a, b = to_sphere(a), to_sphere(b)
    cosine = (a * b).mean((1, 2), keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / angle.sin()


def slerp_filmstrip(codec, z, names):
    """From each latent of z (B, T, C) to the next along the sphere; the last goes to the first.

    The ends keep their lengths, since the RAE's latents are not quite on the sphere.
    """
    length = z.pow(2).mean((1, 2), keepdim=True).sqrt()
    other, other_length = z.roll(-1, 0), length.roll(-1, 0)
    columns, captions = [], []
    for t in (0, 0.2, 0.4, 0.6, 0.8, 1):
        between = slerp(z, other, t) * ((1 - t) * length + t * other_length)
        columns.append(decode(codec, between))
        captions.append(f"{t:.0%}")
    pairs = [f"{name} to {following}" for name, following in zip(names, names[1:] + names)]
    return one_row_each(columns, captions, pairs)


def edit_filmstrip(model, codec, labels, names, noise, options, image, degrees):
    """An image (S, S, 3) uint8 and its edits, with each label, from each angle of noise.

    With several angles, a row for each label; with one, all labels in one row.
    """
    start = codec.encode(to_float(image[None], labels.device)).expand(len(labels), -1, -1)
    columns, captions = [], []
    for angle in degrees:
        z = edit(model, labels, noise, start, angle, **options)
        columns.append(decode(codec, z))
        captions.append(f"{angle:g}°")
    grid = one_row_each(columns, captions, names)
    original = (image, "input")
    if len(degrees) > 1:
        return [[original, *row] for row in grid]
    return [[original, *(row[0] for row in grid)]]


# ---------------------------------------------------------------------------- pictures

def draw_grid(grid):
    """Draw rows of (image, caption), with images (S, S, 3) uint8; small ones are enlarged.

    A caption may have several lines; what does not fit below its image is cut.
    """
    lines = max(caption.count("\n") + 1 for row in grid for _, caption in row)
    columns = max(len(row) for row in grid)
    tile, width, height = cell_size(len(grid[0][0][0]), lines)
    picture = Image.new("RGB", (columns * width + 4, len(grid) * height + 4), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(10)

    for i, row in enumerate(grid):
        for j, (image, caption) in enumerate(row):
            x, y = 4 + j * width, 4 + i * height
            image = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
            picture.paste(image, (x, y))
            for k, line in enumerate(caption.split("\n")):
                line = fit_text(line, font, tile)
                draw.text((x + tile / 2, y + tile + 12 * k), line, "black", font, anchor="ma")
    return picture


def cell_size(size, lines):
    """A cell of `draw_grid`, in pixels: its image's side; its width and height with margins."""
    tile = size * math.ceil(96 / size)
    return tile, tile + 4, tile + 4 + 12 * lines


def fit_text(text, font, width):
    """Cut a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def make_grid(images, captions, columns):
    """Images and their captions, row by row: a grid for `draw_grid`."""
    cells = list(zip(images, captions))
    return [cells[i:i + columns] for i in range(0, len(cells), columns)]


LARGEST_SIDES = {"WEBP": 16_383, "JPEG": 65_500}     # in pixels


def format_of(path):
    """Pillow's name of the format that a picture's suffix stands for."""
    return Image.registered_extensions()[Path(path).suffix.lower()]


def refuse_large(path, width, height):
    """Raise UserError if a picture has more pixels a side than its format can hold."""
    largest = LARGEST_SIDES.get(format_of(path), math.inf)
    if max(width, height) > largest:
        raise UserError(f"{path}: {format_of(path)} holds at most {largest:,} pixels a side, and "
                        f"this picture has {max(width, height):,}; draw fewer images, or write "
                        ".png or .npz")


def write_picture(path, picture, comment=""):
    """Write a PIL image in the format of the path's suffix; a comment goes into PNG files."""
    info = PngInfo()
    if comment:
        # The command may name a file that is not valid UTF-8.
        info.add_text("Comment", comment.encode(errors="backslashreplace").decode())
    format = format_of(path)
    refuse_large(path, *picture.size)
    options = dict(pnginfo=info) if format == "PNG" else dict(quality=95)
    write_file(path, lambda file: picture.save(file, format=format, **options))


def draw_curves(rows):
    """A run's log: the loss by noise angle and, if there are any, the evaluations.

    rows: dicts, column name -> number, each with "step".
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    by_angle = [name for name in names if name.startswith("loss_")]
    evaluations = [name for name in names if name.startswith("eval_")]
    panels = [("loss by noise angle, in degrees", by_angle or ["loss"])]
    if evaluations:
        panels.append(("distance from real images", evaluations))
    picture = Image.new("RGB", (800, 400 * len(panels)), "white")
    for k, (title, names) in enumerate(panels):
        draw_panel(ImageDraw.Draw(picture), 400 * k, title, names, rows)
    return picture


def draw_panel(draw, top, title, names, rows):
    """Lines of named columns over the steps, on a logarithmic scale, 800 x 400 pixels."""
    font = ImageFont.load_default(14)
    points = {name: [(row["step"], row[name]) for row in rows if row.get(name, 0) > 0]
              for name in names}
    values = [value for line in points.values() for _, value in line]
    if not values:
        return
    left, right, above, below = 60, 640, top + 40, top + 350
    low, high = math.log(min(values)), math.log(max(values) * 1.001)
    last = rows[-1]["step"]

    def x_of(step):
        return left + (right - left) * step / last

    def y_of(value):
        return below - (below - above) * (math.log(value) - low) / (high - low)

    draw.text((left, top + 12), f"{title} (logarithmic)", "black", font)
    draw.line([(left, above), (left, below), (right, below)], "black")
    for part in (0, 0.25, 0.5, 0.75, 1):
        value = math.exp(low + part * (high - low))
        draw.line([(left - 4, y_of(value)), (left, y_of(value))], "black")
        draw.text((left - 8, y_of(value)), f"{value:.2g}", "black", font, anchor="rm")
        step = round(part * last)
        draw.line([(x_of(step), below), (x_of(step), below + 4)], "black")
        draw.text((x_of(step), below + 8), f"{step}", "black", font, anchor="ma")
    draw.text((right, below + 26), "step", "black", font, anchor="ma")

    for k, name in enumerate(names):
        color = f"hsl({55 * k}, 80%, 40%)"
        line = [(x_of(step), y_of(value)) for step, value in points[name]]
        draw.line(line, color, 2)
        if len(line) == 1:
            draw.circle(line[0], 3, color)
        label = name.removeprefix("loss_").replace("_", " ")
        if label[0].isdigit():
            label = label.replace(" ", " to ")      # the ends of a bin of noise angles
        draw.text((right + 20, above + 20 * (len(names) - k)), label, color, font)


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


def write_folder(folder, batches, labels):
    """Write 000000.png, 000001.png, ... and, when all are there, labels.txt."""
    images = (image for batch in batches for image in batch)
    for i, image in enumerate(images):
        write_picture(folder / f"{i:06d}.png", Image.fromarray(image))
    write_file(folder / "labels.txt", lambda file: np.savetxt(file, labels, "%d"))


# --------------------------------------------------------------------------- the bench

def time_per_call(work, calls=3):
    """The mean time of a call of work(), which returns a tensor, after three calls to warm up."""
    for repeat in (3, calls):
        started = time.perf_counter()
        for _ in range(repeat):
            result = work()
        result.flatten()[0].item()          # waits for the device
    return (time.perf_counter() - started) / calls


def bench(model, codec, batch_size, device, dtype, sampling):
    """Print images/s, and how much longer the loop through pixels takes."""
    labels = torch.arange(batch_size, device=device) % model.config.num_classes
    noise = draw_noise(0, range(batch_size), codec.latent_shape, sampling["steps"]).to(device)
    options = dict(cfg_scale=sampling["cfg_scale"], cfg_skip=sampling["cfg_skip"])
    with torch.no_grad(), autocast(device, dtype):
        direct = time_per_call(lambda: codec.decode(predict(model, labels, noise, **options)[-1]))
        through_pixels = time_per_call(lambda: codec.decode(
            predict_through_pixels(model, codec, labels, noise, **options)))
    print(f"{device}, batch {batch_size}, {sampling['steps']} steps, guidance "
          f"{sampling['cfg_scale']:g}: {batch_size / direct:.4g} images/s, decoded; through "
          f"pixels at each step {batch_size / through_pixels:.4g} images/s, "
          f"{through_pixels / direct:.2f} times the time")


# -------------------------------------------------------------------------- the script

def choose_classes(typed, classes, path):
    """Numbers of the classes that the user typed, or of all.

    A typed word is one class, by name or number, or several with commas between them.
    """
    chosen = []
    for word in typed or []:
        parts = [word] if match_class(word, classes) is not None else word.split(",")
        for part in parts:
            number = match_class(part.strip(), classes)
            if number is None:
                shown = ", ".join(classes[:20])
                more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
                raise UserError(f"--classes {part.strip()}: {path} knows {shown}{more}")
            chosen.append(number)
    return chosen or list(range(len(classes)))


def forward_passes(steps, cfg_scale, cfg_skip):
    """The number of forward passes per image (NFE): two in a guided step."""
    scales = guidance_scales(steps, cfg_scale, cfg_skip)
    return sum(1 if scale == 1 else 2 for scale in scales)


PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def choose_output(typed, run_folder, filmstrip):
    """Where the result goes, and what it is: "picture", "npz" or "folder". Raises UserError."""
    if typed is None:
        number = 1
        while (run_folder / f"grid_{number}.png").exists():
            number += 1
        path, result = run_folder / f"grid_{number}.png", "picture"
    else:
        path = Path(typed)
        suffix = path.suffix.lower()
        result = "folder"
        if suffix in PICTURES:
            result = "picture"
        elif suffix == ".npz":
            result = "npz"
        # A folder may have a dot in its name, as in samples_cfg1.5.
        if result == "folder" and suffix[1:].isalpha() and not typed.endswith("/"):
            raise UserError(f"--out {path}: must end in {', '.join(PICTURES)} or .npz, or be a "
                            "folder")
    if filmstrip and result != "picture":
        raise UserError(f"--out {path}: a filmstrip is a picture ({', '.join(PICTURES)})")
    if result == "folder" and path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {path}: must be a new folder, or an empty one")
    check_writable(path if result == "folder" else path.parent, "--out")
    return path, result


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=user_path, default="out",
        help="a checkpoint, or a folder: the newest in it; default: out")
    add("--num_images", type=bounded(int, 1),
        help="default: 8 of each of --classes, or of the first ten; 1 for a filmstrip or edit")
    add("--classes", nargs="+", help="names or numbers, in equal shares; default: all")
    add("--seed", type=bounded(int, 0), default=0, help="of the noise; default: 0")
    add("--out", type=user_path,
        help="a picture, an .npz or a folder of PNGs; default: grid_N.png next to the checkpoint")
    add("--filmstrip", nargs="?", const="steps", choices=[*FILMSTRIPS, "slerp"],
        help="for each image: its steps (the default), guidance, angle, or slerp to the next")
    add("--init", nargs="+", metavar="PATH", type=user_path,
        help="images, or folders of them, to edit")
    add("--init_angle", nargs="+", type=bounded(float, 0, 90),
        help="degrees of noise that --init starts from; default: 60")
    add("--steps", type=bounded(int, 1), default=SUPPRESS,
        help="default: the run's, which is 4, or 1 if it is distilled")
    add("--cfg_scale", type=bounded(float, 0, 20), default=SUPPRESS,
        help="guidance, 1 for none; default: the run's")
    add("--cfg_skip", type=bounded(int, 0), default=SUPPRESS,
        help="first steps without guidance, but never the last two; default: the run's")
    add("--same_noise", action=BooleanOptionalAction, default=SUPPRESS,
        help="one noise for all steps; default: the run's")
    add("--pixel_loop", action="store_true",
        help="decode and encode between steps, as Sphere Encoder does")
    add("--bench", action="store_true", help="time denoising and decoding instead")
    add("--compile", action="store_true", help="torch.compile the denoiser, for many images")
    add("--batch_size", type=bounded(int, 1), default=100, help="images at a time; default: 100")
    return parser.parse_args()


def make_filmstrip(kind, model, codec, labels, names, noise, options, dataset, degrees):
    """The grid of a filmstrip.

    dataset: the images of --init, for kind "edit" and perhaps "slerp"; or None. degrees: of
    the edits.
    """
    images = []
    if dataset is not None:
        images = [dataset.load(i, codec.image_size) for i in range(len(dataset))]
    if kind == "edit":
        grid = []
        for image in images:
            grid += edit_filmstrip(model, codec, labels, names, noise, options, image, degrees)
        return grid
    if kind == "slerp" and images:
        z = [codec.encode(to_float(image[None], labels.device)) for image in images]
        return slerp_filmstrip(codec, torch.cat(z), [Path(path).stem for path in dataset.source])
    if kind == "slerp":
        return slerp_filmstrip(codec, predict(model, labels, noise, **options)[-1], names)
    return FILMSTRIPS[kind](model, codec, labels, names, noise, options)


def open_checkpoint(typed):
    """A checkpoint's path and contents, the same in all processes although a run may be saving."""
    def find():
        path = find_checkpoint(typed)
        return path, load_checkpoint(path)["step"]

    path, step = on_rank0(find)
    checkpoint = load_checkpoint(path)
    if checkpoint["step"] != step:
        raise UserError(f"{path}: was saved again meanwhile; run the command again")
    return path, checkpoint


def announce(path, checkpoint, drawn, cost, sampling):
    """Say what is drawn from which checkpoint, and at what cost."""
    settings = checkpoint["settings"]
    print(f"{path}: step {checkpoint['step']:,} of {settings['max_steps']:,}, {drawn} images, "
          f"{sampling}, {cost}", flush=True)
    if sampling["steps"] > 8 and settings["steps"] <= 8:
        print("note: many steps take samples further from the data (assets/results.md)")


def refuse_pairs(args, filmstrip):
    """Raise UserError for flags that mean nothing together."""
    if args.init and args.filmstrip not in (None, "slerp"):
        raise UserError(f"--filmstrip {args.filmstrip}: draws its own samples; drop --init")
    if args.init_angle and filmstrip != "edit":
        raise UserError("--init_angle: is for edits, of images named with --init and without "
                        "--filmstrip")
    if args.pixel_loop and filmstrip:
        raise UserError("--pixel_loop: is for plain samples; drop --filmstrip and --init")


def refuse_off_sphere(path, filmstrip, init_angles):
    """Raise UserError for what a checkpoint trained with --no-sphere cannot draw."""
    if filmstrip == "angle":
        raise UserError(f"--filmstrip angle: turns samples on the sphere; {path} was trained with "
                        "--no-sphere")
    if filmstrip == "edit" and max(init_angles) == 90:
        raise UserError(f"--init_angle 90: is infinite noise to {path}, which was trained with "
                        "--no-sphere; take less")


def write_result(path, result, batches, labels, names, size, columns, comment):
    """Write batches of images (B, size, size, 3) uint8 as an npz, a folder or a picture.

    names: of the labels' classes, for the captions of a picture, which has `columns`.
    """
    if result == "npz":
        write_file(path, lambda file: write_npz(file, batches, labels.numpy(), size))
    elif result == "folder":
        write_folder(path, batches, labels)
    else:
        grid = make_grid(np.concatenate(list(batches)), names, columns)
        write_picture(path, draw_grid(grid), comment)


def main():
    args = parse_args()
    filmstrip = args.filmstrip or ("edit" if args.init else None)
    init_angles = args.init_angle or [60.0]
    device = join_processes(args.device, args.weights_dir)
    on_rank0(lambda: refuse_pairs(args, filmstrip))

    # The networks, and how the run samples, with the flags laid over it.
    path, checkpoint = open_checkpoint(args.ckpt)
    model = load_model(checkpoint, device)
    codec = load_checkpoint_codec(checkpoint, device)
    classes = checkpoint["classes"]
    if not model.config.sphere:
        on_rank0(lambda: refuse_off_sphere(path, filmstrip, init_angles))
    sampling = sampling_options(checkpoint)
    sampling.update({name: vars(args)[name] for name in SAMPLING if name in args})
    options = dict(cfg_scale=sampling["cfg_scale"], cfg_skip=sampling["cfg_skip"])

    if args.compile:
        error = try_compile(device)
        if error is not None:
            raise UserError(f"--compile: does not work here ({in_one_line(error)})")
        compile_blocks(model)
    if args.bench:
        on_rank0(lambda: bench(model, codec, args.batch_size, device, args.dtype, sampling))
        return

    # What to draw: the same number of each class, the classes in turn.
    chosen = on_rank0(lambda: choose_classes(args.classes, classes, path))
    if args.num_images is None and not args.classes:
        chosen = chosen[:10]
    count = args.num_images or len(chosen) * (1 if filmstrip else 8)
    labels = torch.tensor(chosen)[torch.arange(count) % len(chosen)]
    names = [classes[label] for label in labels]

    def find_inputs():
        dataset = find_images(*args.init) if args.init else None
        if filmstrip == "slerp" and len(dataset or labels) < 2:
            raise UserError("--filmstrip slerp: needs two samples, or two images of --init")
        return dataset

    dataset = on_rank0(find_inputs)
    out, result = on_rank0(lambda: choose_output(args.out, path.parent, filmstrip))

    passes = forward_passes(sampling["steps"], **options)
    drawn, cost = len(labels), f"NFE {passes}"
    if filmstrip == "edit":
        drawn = len(dataset) * len(labels) * len(init_angles)
        cost = f"NFE at most {passes}"
    elif dataset is not None:
        drawn, cost = len(dataset), "no denoising"          # slerp between images
    if RANK == 0:
        announce(path, checkpoint, drawn, cost, sampling)
    comment = shlex.join(["python", *sys.argv])

    # Filmstrips are small: rank 0 draws them alone.
    def draw_filmstrip():
        noise = draw_noise(args.seed, range(count), codec.latent_shape, sampling["steps"],
                           sampling["same_noise"])
        with torch.no_grad(), autocast(device, args.dtype):
            grid = make_filmstrip(filmstrip, model, codec, labels.to(device), names,
                                  noise.to(device), options, dataset, init_angles)
        write_picture(out, draw_grid(grid), comment)
        print(f"wrote {out}")

    if filmstrip:
        on_rank0(draw_filmstrip)
        return

    columns = len(chosen) if 4 <= len(chosen) <= 12 else math.ceil(math.sqrt(count))
    if result == "picture":
        _, width, height = cell_size(codec.image_size, lines=1)
        rows = math.ceil(count / columns)
        on_rank0(lambda: refuse_large(out, columns * width + 4, rows * height + 4))
    batches = sample_batches(model, codec, labels, args.batch_size, seed=args.seed,
                             pixel_loop=args.pixel_loop, dtype=args.dtype, **sampling)
    if RANK > 0:
        for _ in batches:
            pass                    # rank 0 gets this process's share
        return
    batches = tqdm(batches, total=math.ceil(count / args.batch_size), unit="batch")
    write_result(out, result, batches, labels, names, codec.image_size, columns, comment)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
