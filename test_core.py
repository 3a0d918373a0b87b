"""What the project promises, checked on a CPU without network: python -m pytest -q"""
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn as nn
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import encode
import fid
import model
import sample
import train

torch.set_num_threads(1)
os.environ["TQDM_DISABLE"] = "1"
model.PRESETS["tiny"].update(width=64, depth=2)         # for speed, also in processes
HERE = Path(__file__).parent
CPU = torch.device("cpu")
TINY = dict(tokens=16, channels=32, num_classes=3, width=32, depth=2, heads=2)

ENCODE = "encode.py --dataset photos --workers 1 "
TRAIN = ("train.py --dataset photos --workers 1 --batch_size 8 --log_every 4 --save_every 4 "
         "--sample_every 12 --max_steps 12 ")
AGAIN = TRAIN + "--out_dir out/again "
DISTILL = "--distill out/photos --imitate_steps 6 "


# ------------------------------------------------------------------------------ helpers

def processes(line, cwd, count=2, patch="", stdout=subprocess.PIPE):
    """Run a command line in processes of their own, after a patch: (exit status, their text)."""
    name, *args = line.split()
    (cwd / f"patched_{name}").write_text(
        f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport encode, model, torch\n"
        f"model.PRESETS['tiny'] = {model.PRESETS['tiny']}\nimport {name[:-3]} as script\n"
        f"{patch}\nencode.run(script.main)\n")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    done = subprocess.run(
        [sys.executable, *launch * (count > 1), f"patched_{name}", *args], cwd=cwd, text=True,
        stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT,
        env=os.environ | dict(OMP_NUM_THREADS="1"))
    return done.returncode, done.stdout


def script(line, cwd):
    """Run a command line in this process, which saves importing torch: (status, its text)."""
    text = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    name, *args = line.split()
    status = 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text),
          contextlib.redirect_stderr(text)):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *args])
        patch.setattr(signal, "signal", lambda *_: None)
        try:
            encode.run(sys.modules[name.removesuffix(".py")].main)
        except SystemExit as error:
            print(error.code)
            status = 1
    return status, text.buffer.getvalue().decode()


def works(result, *words):
    status, text = result
    assert status == 0 and all(str(word) in text for word in words), text
    return text


def fails_clearly(result, *words):
    """A user's mistake: non-zero status, no traceback, one line that says what, and the remedy."""
    status, text = result
    assert status != 0 and "Traceback" not in text, text
    [line] = [line for line in text.splitlines() if "error: " in line]
    assert all(str(word) in line for word in words), line


def of_scripts(result):
    """What scripts have printed, without torchrun's own report of a failure."""
    status, text = result
    return status, re.split(r"\n[WE]\d{4} .*elastic", text)[0]


def draw_folder(folder, classes=("one", "two"), each=6, suffix=".png"):
    rng = np.random.default_rng(0)
    for i, name in itertools.product(range(each), classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((48, 40))
        image.save(folder / name / f"{i}{suffix}")
    return folder


def spoil(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) * 2 // 3])
    return whole


def random_denoiser(**changes):
    """A small denoiser whose zero-initialised layers are filled: class and input matter."""
    torch.manual_seed(0)
    denoiser = model.Denoiser(model.ModelConfig(**TINY | changes))
    for parameter in denoiser.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder dataset, trained on for 12 steps by the command line."""
    folder = tmp_path_factory.mktemp("workspace")
    draw_folder(folder / "data" / "photos")
    works(script(ENCODE + "--fit --fit_steps 4", folder))
    works(processes(TRAIN, folder, count=1))
    return folder


@pytest.fixture
def copied(workspace, tmp_path):
    return Path(shutil.copytree(workspace, tmp_path / "copy", symlinks=True))


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*_, **__):
        raise OSError("no network in tests")
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)


def caches(cwd):
    """The caches of the photos, small ones first."""
    files = (cwd / "data/photos").glob("small-*/index.json")
    return sorted(map(encode.read_index, files), key=lambda cache: len(cache.labels))


def read_log(out):
    """log.csv as dicts, without what a row has no number for."""
    header, *rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    return [{name: float(value) for name, value in zip(header, row, strict=True) if value}
            for row in rows]


def load(path):
    return torch.load(path, weights_only=True)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same_curve(one, two, rel=1e-3):
    """Two runs' logs agree up to rounding, but for their speed."""
    for a, b in zip(read_log(one), read_log(two), strict=True):
        speed = dict(images_per_s=0, seconds=0)
        assert a | speed == pytest.approx(b | speed, rel=rel, abs=1e-9, nan_ok=True)


# ----------------------------------------------------------------------------- model.py

def test_rotation_stays_on_the_sphere_and_turns_independent_noise_by_the_angle():
    torch.manual_seed(0)
    z, noise = torch.randn(5, 256, 768).bfloat16() * 7, torch.randn(5, 256, 768) * 3
    angle = torch.tensor([0.0, 0.3, 1.0, 1.5, math.pi / 2])
    z = model.to_sphere(z)
    v = model.rotate(z, noise, angle)
    for x in (z, v):
        assert_close(x.pow(2).mean((1, 2)), torch.ones(5), rtol=1e-5, atol=1e-5)
    assert_close((v * z).mean((1, 2)), angle.cos(), rtol=0, atol=0.01)
    added = model.to_sphere(z + math.tan(1.2) * model.to_sphere(noise))     # Sphere Encoder's form
    assert_close(model.rotate(z, noise, 1.2), added, rtol=1e-4, atol=1e-4)
    plain = z[:4] + angle[:4].tan()[:, None, None] * noise[:4]
    assert_close(model.rotate(z[:4], noise[:4], angle[:4], sphere=False), plain)


def test_rotation_keeps_what_a_prediction_shares_with_its_noise():
    noise = model.to_sphere(torch.randn(2, 16, 32))
    z = model.to_sphere(noise + torch.randn(2, 16, 32))                     # cosine of about 0.7
    v = model.rotate(z, noise, 1.0)
    within = math.cos(1.0) * z + math.sin(1.0) * noise
    assert_close(v, model.to_sphere(within))
    assert ((v * noise).mean((1, 2)) > math.sin(1.0) + 0.05).all()


def test_the_tangents_of_noise_angles_are_logit_normal():
    u = (torch.arange(10_000) + 0.5) / 10_000
    r = model.noise_angle(u, 80.0, mean=0.5, std=2.0).tan() / math.tan(math.radians(80))
    logit = torch.log(r.double() / (1 - r.double()))
    assert abs(logit.mean() - 0.5) < 0.01 and abs(logit.std() - 2.0) < 0.02
    assert model.noise_angle(torch.tensor([0.0, 1.0]), 80.0).isfinite().all()


def test_the_largest_angle_leaves_one_signal_to_noise_ratio_also_in_more_dimensions():
    torch.manual_seed(0)
    z = torch.randn(400, 16, 32)
    signal = model.to_sphere(z) / 512 ** 0.5                                # unit vectors
    for channels in (32, 768):                                              # embedded isometrically
        basis = torch.linalg.qr(torch.randn(channels, 32))[0].T
        angle = math.radians(model.largest_angle(16, channels))
        v = model.rotate(z @ basis, torch.randn(400, 16, channels), angle) @ basis.T
        along = (v * signal).sum((1, 2), keepdim=True)
        assert along.mean() / (v - along * signal).std() == pytest.approx(4.8, rel=0.05)


@pytest.mark.parametrize("preset, millions, gflop", [       # on the RAE's latents
    ("S", 33, 12.4), ("B", 131, 46.6), ("L", 458, 162), ("XL", 675, 238)])
def test_presets_have_their_parameters_and_flops(preset, millions, gflop):
    config = model.ModelConfig(**model.PRESETS[preset])
    with torch.device("meta"):
        state = model.Denoiser(config).state_dict()
    numbers = sum(tensor.numel() for tensor in state.values())
    assert numbers / 1e6 == pytest.approx(millions, abs=0.6)
    assert model.flops(config) / 1e9 == pytest.approx(gflop, rel=0.01)
    if preset == "XL":                                          # the released model
        assert len(state) == 401 and numbers == 675_160_896


def test_flops_are_those_that_torch_counts():
    config = model.ModelConfig(**TINY | dict(tokens=64, channels=48, width=64, depth=3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.Denoiser(config)(torch.randn(1, 64, 48), torch.tensor([1]))
    assert counter.get_total_flops() == model.flops(config)


def test_denoiser_starts_at_zero_and_sees_class_place_and_all_tokens():
    z, y, denoiser = torch.randn(2, 16, 32), torch.tensor([0, 1]), random_denoiser()
    out = denoiser(z, y)
    assert not model.Denoiser(model.ModelConfig(**TINY))(z, y).any()
    assert (denoiser(z, torch.tensor([2, 3])) - out).abs().max() > 1e-3     # class, and none
    assert (denoiser(z.flip(1), y).flip(1) - out).abs().max() > 1e-3        # position
    moved = torch.cat([z[:, :1] + 1, z[:, 1:]], dim=1)
    assert ((denoiser(moved, y) - out).abs().amax(2) > 1e-6).all()          # attention
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in denoiser.parameters())


def test_losses_are_the_papers_two_terms_and_send_gradient_where_they_say():
    denoiser = random_denoiser()
    z, noise = model.to_sphere(torch.randn(4, 16, 32)), torch.randn(4, 16, 32)
    y, angle, ratio = torch.arange(4), torch.full((4,), 1.2), torch.full((4,), 0.4)
    got = model.losses(denoiser, z, y, noise, angle, ratio, 0.3)
    out = denoiser(model.rotate(z, noise, angle), y)
    with torch.no_grad():
        target = denoiser(model.rotate(z, noise, math.atan(0.4 * math.tan(1.2))), y)
    first, second = (out - z).pow(2).mean((1, 2)), (out - target).pow(2).mean((1, 2))
    want = dict(loss=first + 0.3 * second, reconstruction=first, consistency=second)
    assert_close(got, want)
    weights = list(denoiser.parameters())
    assert_close(torch.autograd.grad(got["loss"].sum(), weights),
                 torch.autograd.grad(want["loss"].sum(), weights), rtol=1e-3, atol=1e-6)
    alone = model.losses(denoiser, z, y, noise, angle)
    assert_close(alone, dict(loss=first, reconstruction=first))


def test_imitation_is_the_error_of_one_pass_from_the_samplers_noise():
    denoiser = random_denoiser()
    noise, y, target = torch.randn(4, 16, 32), torch.arange(4), torch.randn(4, 16, 32)
    got = model.imitation(denoiser, noise, y, target)["loss"]
    assert_close(got, (denoiser(model.to_sphere(noise), y) - target).pow(2).mean((1, 2)))


def test_distribution_matching_moves_images_from_fake_to_real_and_teaches_fake():
    judged = model.Distillation(random_denoiser())
    nn.init.normal_(judged.fake.out.weight)
    noise, new_noise, y = torch.randn(4, 16, 32), torch.randn(4, 16, 32), torch.arange(4)
    angle = torch.full((4,), 1.2)
    got = model.distribution_matching(judged, noise, y, new_noise, angle, 2.0)
    x = judged.generator(model.to_sphere(noise), y)
    v = model.rotate(x.detach(), new_noise, angle)
    fake, null = judged.fake(v, y), judged.real(v, torch.full_like(y, 3))
    real = null + 2 * (judged.real(v, y) - null)
    away = ((fake - real) / (x - real).abs().mean((1, 2), keepdim=True)).detach()
    denoising = (fake - x.detach()).pow(2).mean((1, 2))
    assert_close(got["denoising"], denoising)
    assert_close(got["matching"], away.pow(2).mean((1, 2)) / 2)
    got["loss"].sum().backward()
    weights = [*judged.generator.parameters(), *judged.fake.parameters()]
    want = torch.autograd.grad((x * away).mean((1, 2)).sum() + denoising.sum(), weights)
    assert_close([weight.grad for weight in weights], list(want), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps, scales, same_noise", [
    (4, [1] * 4, False), (1, [3.0], False), (4, [3.0] * 4, True), (4, [1, 3.0, 3.0, 3.0], False)])
def test_generate_predicts_turns_back_and_predicts_again(steps, scales, same_noise):
    denoiser, y = random_denoiser(max_angle=60.0), torch.tensor([0, 1, 2])
    noise = torch.randn(1 if same_noise else steps, 3, 16, 32).expand(steps, -1, -1, -1)
    x, expected = None, []
    for k in range(steps):
        angle = math.atan((1 - k / steps) ** 1.5 * math.tan(math.radians(60)))
        v = model.to_sphere(noise[0])
        if k:
            v = model.to_sphere(model.to_sphere(x) + math.tan(angle) * model.to_sphere(noise[k]))
        with torch.no_grad():
            x, null = denoiser(v, y), denoiser(v, torch.full_like(y, 3))
        x = null + scales[k] * (x - null)
        expected.append(x)
    angles = model.sampling_angles(steps, 60.0)
    got = list(model.generate(denoiser, y, noise, angles, scales))
    assert_close(torch.stack(got), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_guidance_leaves_out_first_steps_but_never_the_last_two():
    assert model.guidance_scales(4, 2.0, 1) == [1, 2, 2, 2]
    assert model.guidance_scales(4, 2.0, 9) == [1, 1, 2, 2]
    assert model.guidance_scales(2, 2.0, 1) == [2, 2] and model.guidance_scales(1, 2.0, 1) == [2]


# ---------------------------------------------------------------------------- encode.py

@pytest.mark.parametrize("size", [(331, 150), (63, 200), (64, 64), (5, 9), (33, 32)])
def test_center_crop_is_adms(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(pixels)
    while min(*image.size) >= 64:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scaled = tuple(round(x * 32 / min(*image.size)) for x in image.size)
    expected = np.array(image.resize(scaled, resample=Image.Resampling.BICUBIC))
    top, left = (expected.shape[0] - 32) // 2, (expected.shape[1] - 32) // 2
    expected = expected[top:top + 32, left:left + 32]
    assert np.array_equal(encode.center_crop(Image.fromarray(pixels), 32), expected)


def test_every_kind_of_image_file_is_read_as_upright_rgb(tmp_path):
    upright = Image.new("RGB", (32, 32), "red")
    upright.paste("blue", (0, 16, 32, 32))
    turned = {1: None, 6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180,
              8: Image.Transpose.ROTATE_270, 5: Image.Transpose.TRANSPOSE}
    for orientation, back in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = upright.transpose(back) if back is not None else upright
        image.save(tmp_path / f"exif{orientation}.jpg", exif=exif)
    for name, image in {
            "two.webp": upright, "palette.png": upright.quantize(4),
            "clear.png": Image.new("RGBA", (40, 40), (0, 0, 0, 0)),
            "grey.png": Image.new("L", (40, 40), 77),
            "grey16.png": Image.fromarray(np.full((40, 40), 77 * 257, np.uint16))}.items():
        image.save(tmp_path / name)
    for file in tmp_path.iterdir():
        pixels = np.asarray(encode.load_image(file))[[4, 28], 16]
        want = dict(clear=255., grey=77., grey16=77.).get(file.stem, [[255., 0, 0], [0, 0, 255]])
        assert np.abs(pixels - want).max() < 25, file


def test_good_photographs_are_read_whatever_else_is_in_their_files(tmp_path, monkeypatch):
    image = Image.new("RGB", (40, 40), "red")
    text = PngInfo()
    text.add_text("long", "x" * (3 << 20), zip=True)            # more than Pillow's megabyte
    image.save(tmp_path / "text.png", pnginfo=text)
    image.save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff nonsense")
    Image.new("RGB", (13_500, 13_400), "red").save(tmp_path / "large.png")      # 181 megapixels
    for file in tmp_path.iterdir():
        assert encode.load_image(file).getpixel((9, 9)) == (254, 0, 0) or file.suffix == ".png"
    damaged = tmp_path / "damaged.png"      # no EXIF, for which Pillow reads the file itself
    Image.fromarray(encode.shapes(1)[0][0]).save(damaged)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    with pytest.raises(encode.UserError, match="damaged.png: cannot be read"):
        encode.load_image(damaged)
    broken = tmp_path / "broken.jpg"
    image.save(broken)
    monkeypatch.setattr(Image.Image, "getexif", lambda _: 1 // 0)
    assert encode.load_image(broken).size == (40, 40)


def test_folder_datasets_keep_class_names_and_ignore_what_is_no_image(tmp_path):
    folder = draw_folder(tmp_path / "data/pets/train", ("cat", "a dog", "_owl", "bat.jpg"), each=3)
    (folder / "cat/notes.txt").write_text("no image")
    for hidden in (".hidden", "cat/.ipynb_checkpoints", "cat/@eaDir"):
        (folder / hidden).mkdir()
        shutil.copy(folder / "cat/0.png", folder / hidden)
    dataset = encode.find_dataset(str(folder), tmp_path / "data")
    assert dataset.classes == ["_owl", "a dog", "bat.jpg", "cat"] and dataset.name == "pets-train"
    assert dataset.labels.tolist() == np.repeat(range(4), 3).tolist() and len(dataset) == 12
    assert np.array_equal(dataset.load(13, 32), dataset.load(1, 32)[:, ::-1])   # mirrored


def test_linked_folders_and_files_are_followed_and_compared(tmp_path):
    store = draw_folder(tmp_path / "store", ("cat", "dog", "more"), each=4)
    folder = tmp_path / "data/pets"
    folder.mkdir(parents=True)
    (folder / "cat").symlink_to(store / "cat")                  # a class
    (folder / "dog").mkdir()
    (folder / "dog/more").symlink_to(store / "more")            # a folder within a class
    (folder / "dog/loop").symlink_to(folder / "dog")            # which leads back
    (folder / "dog/0.png").symlink_to(store / "dog/0.png")      # a file
    dataset = encode.find_dataset("pets", tmp_path / "data")
    assert dataset.labels.tolist() == [0] * 4 + [1] * 5
    line = "encode.py --dataset pets --codec small "
    works(script(line + "--fit --fit_steps 1", tmp_path))
    works(script(line, tmp_path), "9 images")
    shutil.copy(store / "cat/0.png", store / "cat/new.png")
    works(script(line, tmp_path), "10 images")
    Image.new("RGB", (99, 99)).save(store / "dog/0.png")        # the target changes
    assert encode.find_dataset("pets", tmp_path / "data").digest != dataset.digest


def test_runs_and_latents_among_the_images_are_no_classes(tmp_path):
    folder = draw_folder(tmp_path / "pets", each=4)
    flags = "--batch_size 4 --fit_steps 1 --max_steps 2"
    for _ in range(2):          # the second finds what the first has written
        works(script(f"train.py --dataset . {flags}", folder), "8 images, 2 classes")
        works(script(f"train.py --dataset pets --out_dir pets/run {flags}", tmp_path), "2 classes")
    fails_clearly(script(f"train.py --dataset pets --out_dir pets {flags}", tmp_path),
                  "--out_dir pets", "another folder")


def test_images_of_the_same_name_elsewhere_do_not_share_codec_and_latents(tmp_path):
    for place in ("p1", "p2"):
        draw_folder(tmp_path / place / "photos/train", each=3)
    line = "encode.py --fit_steps 1 --dataset "
    works(script(line + "p1/photos/train", tmp_path))
    fails_clearly(script(line + "p2/photos/train", tmp_path), "belongs to p1/photos/train",
                  "--data_dir", "images.txt")
    shutil.rmtree(tmp_path / "p1")
    works(script(line + "p1/photos/train", tmp_path), "complete; 6 images")     # latents remain


def test_a_folder_of_images_alone_is_one_class_and_mixtures_are_refused(tmp_path):
    folder = draw_folder(tmp_path / "data", ("pets",), each=3) / "pets"
    (folder / "photo.HEIC").write_bytes(b"not for Pillow")
    line = "train.py --dataset pets --batch_size 4 --max_steps 4 --fit_steps 1"
    works(script(line, tmp_path), "such as data/pets/photo.HEIC", "fitting a codec to 3 images")
    checkpoint = load(tmp_path / "out/pets/ckpt.pt")
    assert checkpoint["classes"] == ["pets"] and checkpoint["settings"]["cfg_scale"] == 1
    draw_folder(folder, ("cat",))
    fails_clearly(script("encode.py --dataset pets", tmp_path), "pets/0.png", "cat")


def test_classes_are_found_by_name_in_any_case_accent_or_by_number():
    classes = ["a", "A", "tench, Tinca tinca", "caf\u00e9", "7"]
    typed = {"a": 0, "A": 1, "Tench, tinca TINCA": 2, "cafe\u0301": 3, "7": 4, "3": 3}
    assert {word: encode.match_class(word, classes) for word in typed} == typed
    assert encode.match_class("tench", classes) is None
    assert sample.choose_classes(["a,A", "tench, Tinca tinca"], classes, "x") == [0, 1, 2]


def test_shapes_are_the_same_for_a_seed_however_many_are_drawn():
    images, labels = encode.shapes(30)
    again, _ = encode.shapes(12)
    other, _ = encode.shapes(12, seed=1)
    assert np.array_equal(images[:12], again) and not np.array_equal(again, other)
    assert images.dtype == np.uint8 and labels.tolist() == list(range(10)) * 3


def psnr(codec, images):
    error = (codec.decode(codec.encode(images)) - images).pow(2).mean((1, 2, 3))
    return -10 * error.log10().mean().item()


def test_shipped_codec_reconstructs_unseen_shapes_by_latents_on_the_sphere():
    codec, images = encode.load_codec("small"), encode.to_float(encode.shapes(200, seed=123)[0])
    z = codec.encode(images)
    assert z.shape == (200, *codec.latent_shape) and not codec.training
    assert_close(z, model.to_sphere(z))
    assert psnr(codec, images) > 30


def test_fitting_learns_also_the_larger_codec(monkeypatch):
    images = encode.shapes(100)[0].repeat(2, 1).repeat(2, 2)
    worse, better = (encode.fit_codec(images, "small64", n, batch_size=8)[0] for n in (1, 20))
    assert better.image_size == 64 and better.latent_shape == (64, 32)
    assert psnr(better, encode.to_float(images)) > psnr(worse, encode.to_float(images)) + 1
    assert encode.fit_layout(torch.device("mps")) == torch.contiguous_format


def test_a_codec_fitted_with_flip_keeps_mirrored_images_better():
    images = encode.shapes(1, seed=3)[0]
    mirrored = encode.to_float(images[:, :, ::-1].copy())
    fit = functools.partial(encode.fit_codec, images, steps=40, batch_size=4)
    assert psnr(fit(flip=True)[0], mirrored) > psnr(fit()[0], mirrored) + 1


def test_ctrl_c_keeps_a_codec_only_if_it_is_worth_it_and_says_how_long_it_was_fitted(
        tmp_path, monkeypatch):
    draw_folder(tmp_path / "data/pets", each=4)
    line = "encode.py --dataset pets --codec small --fit_steps 9 --flip"
    steps, real = itertools.count(), encode.rotate
    def rotate(*args):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(encode, "rotate", rotate)
    status, text = script(line, tmp_path)
    assert status == 1 and "interrupted" in text
    assert not list((tmp_path / "data/pets").glob("*.pt"))
    steps = itertools.count()
    monkeypatch.setattr(encode, "FEWEST_STEPS", 3)
    works(script(line, tmp_path), "fitted for 3 steps to 8 images", "interrupted",
          "encode.py --dataset pets --codec small --fit --fit_steps 9 --flip fits another")


def test_the_codec_fitted_last_is_taken_also_from_copied_files(copied):
    works(script(ENCODE + "--fit --fit_steps 2", copied))
    first, second = sorted((copied / "data/photos").glob("small-*.pt"),
                           key=lambda path: load(path)["fitted"])
    os.utime(second, (1, 1))                                    # older, by the file's time
    assert encode.find_codec_file("small", "photos", copied / "data") == second
    assert load(first)["steps"] == 4 and load(second)["steps"] == 2
    assert len(load(second)["digest"]) == 64 and load(second)["images"] == 12


def test_cache_holds_the_latents_of_the_images_and_of_their_mirrored_views(copied):
    works(script(ENCODE + "--flip", copied), "24 images")
    dataset = encode.find_dataset("photos", copied / "data")    # its caches are no classes
    plain, flipped = caches(copied)
    assert plain.classes == ["one", "two"] and plain.labels.tolist() == dataset.labels.tolist()
    assert flipped.labels.tolist() == plain.labels.tolist() * 2
    assert np.array_equal(flipped.chunk(0)[:12], plain.chunk(0))
    images = np.stack([dataset.load(3, 32), dataset.load(0, 32), dataset.load(11, 32)[:, ::-1]])
    file = encode.find_codec_file("small", "photos", copied / "data")
    latents = torch.from_numpy(flipped.chunk(0)[[3, 0, 23]].astype(np.float32))
    expected = encode.load_codec("small", file).encode(encode.to_float(images))
    assert_close(latents, expected, rtol=1e-2, atol=2e-3)


def test_latents_are_read_from_disk_in_any_order_and_short_files_are_named(copied, monkeypatch):
    whole = np.array(caches(copied)[0].chunk(0))
    monkeypatch.setattr(encode, "CHUNK", 5)
    shutil.rmtree(caches(copied)[0].folder)
    works(script(ENCODE, copied))
    cache, indexes = caches(copied)[0], np.array([11, 0, 4, 5, 11, 9])
    out = np.empty((6, *cache.shape), np.float16)
    cache.read(indexes, out)
    np.testing.assert_allclose(out, whole[indexes], atol=2e-3)
    spoil(cache.path(1))
    with pytest.raises(encode.UserError, match="000001.npy: damaged.*encode.py"):
        cache.chunk(1)
    fails_clearly(script(AGAIN, copied), "000001.npy", "delete it")


def test_encoding_that_a_full_disk_interrupted_goes_on_with_the_missing_chunks(copied, monkeypatch):
    real, written = np.save, []
    def save(file, array):
        written.append(len(array))
        if len(written) == 2:
            file.write(b"half a file")
            raise OSError(28, "No space left on device")
        real(file, array)
    monkeypatch.setattr(np, "save", save)
    monkeypatch.setattr(encode, "CHUNK", 5)
    folder = caches(copied)[0].folder
    shutil.rmtree(folder)
    fails_clearly(script(ENCODE, copied), "000001.npy: No space left on device; fix that")
    assert [file.name for file in folder.iterdir()] == ["000000.npy"]   # no index, nothing half
    leftover, busy = folder / "000001.npy.99.tmp", folder / "000002.npy.100.tmp"
    leftover.write_bytes(b"of a process that was killed")
    os.utime(leftover, (0, 0))
    busy.write_bytes(b"of another process that is encoding")
    works(script(ENCODE, copied), "12 images", "complete")
    assert written == [5, 5, 5, 2] and list(folder.glob("*.tmp")) == [busy]


def test_several_processes_write_the_cache_that_one_writes(copied):
    one = caches(copied)[0]
    expected = np.array(one.chunk(0))
    shutil.rmtree(one.folder)
    works(processes(ENCODE, copied, patch="encode.CHUNK = 3"), "12 images")
    chunks = [np.load(file) for file in sorted(one.folder.glob("*.npy"))]
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 3]
    np.testing.assert_allclose(np.concatenate(chunks), expected, atol=2e-3)


def test_other_images_or_another_codec_get_a_new_cache_and_checkpoints_stand_alone(copied):
    before = {file: file.read_bytes() for file in caches(copied)[0].folder.iterdir()}
    draw_folder(copied / "data/photos", each=7)
    works(script(ENCODE, copied), "14 images")
    works(script(ENCODE + "--fit --fit_steps 2 --out pairs.png", copied), "PSNR", "mean of 14")
    assert Image.open(copied / "pairs.png").size == (14 * 96, 192 + 28)     # 14 above 14, captions
    assert len(caches(copied)) == 2
    assert all(file.read_bytes() == data for file, data in before.items())
    works(script(TRAIN + "--resume --max_steps 13", copied), "12 images")
    shutil.move(copied / "out", copied / "elsewhere")
    shutil.rmtree(copied / "data")
    works(script("sample.py --ckpt elsewhere --num_images 2", copied))


def test_damaged_latents_are_named_with_the_way_to_mend_them(copied):
    chunk = caches(copied)[0].path(0)
    whole = spoil(chunk)
    fails_clearly(script(AGAIN, copied), chunk.name, "delete it", "encode.py")
    chunk.unlink()
    works(script(AGAIN, copied))
    assert chunk.read_bytes() == whole
    spoil(chunk.parent / "index.json")
    fails_clearly(script(AGAIN, copied), "index.json", "delete it")


def test_a_complete_cache_needs_no_images_nor_a_listing_of_them(copied, monkeypatch):
    folder = draw_folder(copied / "data/imagenet/train", ("n01440764",), each=2, suffix=".JPEG")
    flags = "--dataset imagenet --codec small "
    works(script(f"encode.py {flags} --fit --fit_steps 1", copied))
    works(script(f"encode.py {flags}", copied), "2 images")
    shutil.rmtree(folder)
    monkeypatch.setattr(os, "walk", lambda *_: pytest.fail("listed the images"))
    works(script(f"{TRAIN} {flags} --preset tiny --max_steps 1", copied))


def test_unreadable_images_are_named_or_left_out_and_counted(copied):
    spoil(copied / "data/photos/one/2.png")
    fails_clearly(script(ENCODE, copied), "photos/one/2.png", "--skip_bad")
    fails_clearly(script(AGAIN + "--live", copied), "photos/one/2.png", "replace or delete")
    works(script(ENCODE + "--skip_bad", copied), "11 images", "1 unreadable", "one/2.png")
    text = works(script(AGAIN + "--skip_bad --eval_every 12 --eval_images 10", copied), "11 images")
    assert "1 unreadable" in text and "Frechet distance" in text
    for file in (copied / "data/photos").glob("*/*.png"):
        file.write_bytes(b"no image")
    fails_clearly(script(ENCODE + "--fit --skip_bad", copied), "no image that can be read")


def draw_flowers(folder, numbers=(1, 1, 74, 74, 54, 54)):
    """Oxford's two files: 102flowers.tgz of a folder jpg, imagelabels.mat."""
    draw_folder(folder, ("jpg",), suffix=".jpg")
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        archive.add(folder / "jpg", "jpg")
    shutil.rmtree(folder / "jpg")
    scipy.io.savemat(folder / "imagelabels.mat", dict(labels=np.array([numbers])))


def test_flowers_afhq_and_imagenet_are_their_training_parts(tmp_path, no_network):
    draw_flowers(tmp_path / "flowers")
    dataset = encode.find_dataset("flowers", tmp_path)
    assert dataset.classes == ["pink primrose", "sunflower", "rose"]
    assert dataset.labels.tolist() == [0, 0, 2, 2, 1, 1]
    draw_folder(tmp_path / "zip/afhq/train", ("cat", "dog"), 1, ".jpg")
    draw_folder(tmp_path / "zip/afhq/val", ("wild",), 1, ".jpg")
    shutil.make_archive(tmp_path / "afhq/afhq", "zip", tmp_path / "zip")
    assert encode.find_dataset("afhq", tmp_path).classes == ["cat", "dog"]
    draw_folder(tmp_path / "imagenet/train", ("n01440764", "n01443537"), 2, ".JPEG")
    assert encode.find_dataset("imagenet", tmp_path).classes == ["n01440764", "n01443537"]


def test_a_dataset_of_ones_own_is_one_entry_and_its_archive_may_be_a_file(tmp_path, monkeypatch):
    draw_folder(tmp_path / "zip/birds", ("owl", "tit"), 2)
    archive = shutil.make_archive(tmp_path / "birds", "zip", tmp_path / "zip")
    entry = encode.KnownDataset(folder="birds", codec="small", url=archive)
    monkeypatch.setitem(encode.KNOWN_DATASETS, "birds", entry)
    line = "train.py --dataset birds --batch_size 2 --fit_steps 1 --max_steps 1"
    works(script(line, tmp_path), "md5", "4 images, 2 classes")


def test_missing_wrong_or_broken_downloads_are_named(tmp_path, no_network, monkeypatch):
    line = "encode.py --dataset flowers --codec small"
    folder = tmp_path / "data/flowers"
    archive = folder / "102flowers.tgz"
    fails_clearly(script(line, tmp_path), archive.name, f"{encode.OXFORD}/102flowers.tgz")
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file",
                      lambda url, path: Path(path).write_bytes(b"another file"))
        fails_clearly(script(line, tmp_path), archive.name, "md5 mismatch")
    assert not archive.exists()
    shutil.rmtree(folder)
    draw_flowers(folder, numbers=(1, 1, 2))
    fails_clearly(script(line, tmp_path), "imagelabels.mat", "3 labels for 6 images")
    spoil(folder / "imagelabels.mat")
    fails_clearly(script(line, tmp_path), "imagelabels.mat", "delete it")
    shutil.rmtree(folder / "jpg")
    spoil(archive)
    fails_clearly(script(line, tmp_path), archive.name, "cannot be unpacked", "delete it")


HUBCONF = '''
dependencies = ["torch"]
import torch

def dinov2_vitb14_reg(pretrained=True):
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
    net = torch.nn.Module()
    net.patch, net.norm = torch.nn.Conv2d(3, 768, 14, 14), torch.nn.LayerNorm(768, eps=1e-6)
    net.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu"))
    net.forward_features = lambda x: dict(
        x_norm_patchtokens=net.norm(net.patch(x).flatten(2).transpose(1, 2)))
    return net
'''
WEIGHTS = {    # name in torch.hub's folder -> the end of its address
    "dinov2_vitb14_reg4_pretrain.pth": "dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "rae-wReg_base-stat-84ede66d.pt": "stats/dinov2/wReg_base/imagenet1k/stat.pt",
    "rae-wReg_base-decoder-5fedf7c9.pt": "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"}
ENCODER_FILE, STAT_FILE, DECODER_FILE = WEIGHTS
NARROW = dict(hidden=32, depth=2, heads=4, mlp=48)


@pytest.fixture
def hub(tmp_path, monkeypatch, no_network):
    """torch.hub's folder with files of the published names: one layer of DINOv2, two of RAE."""
    torch.manual_seed(0)
    folder = tmp_path / "hub"
    for name in ("checkpoints", "facebookresearch_dinov2_main"):
        (folder / name).mkdir(parents=True)
    (folder / "facebookresearch_dinov2_main/hubconf.py").write_text(HUBCONF)
    narrow = functools.partial(encode.ViTDecoder, **NARROW)
    encoder = {"patch.weight": torch.randn(768, 3, 14, 14), "patch.bias": torch.randn(768),
               "norm.weight": torch.rand(768) * 3, "norm.bias": torch.randn(768)}
    stat = dict(mean=None, var=torch.rand(768, 16, 16) + 0.01)
    decoder = {name: torch.randn(t.shape) * 0.3 for name, t in narrow().state_dict().items()}
    decoder["surplus"] = torch.zeros(1)                         # RAE's own code ignores it, too
    for name, state in zip(WEIGHTS, (encoder, stat, decoder)):
        torch.save(state, folder / "checkpoints" / name)
    monkeypatch.setattr(encode, "ViTDecoder", narrow)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))
    return folder


def test_vit_decoder_has_the_published_tensors_and_computes_the_published_network():
    with torch.device("meta"):
        state = encode.ViTDecoder().state_dict()
    assert len(state) == 456 and sum(t.numel() for t in state.values()) == 415_352_704
    assert state["decoder_layers.27.attention.attention.query.weight"].shape == (1152, 1152)
    net = encode.ViTDecoder(24, 2, 3, 40, latent_dim=10, patch=4, grid=3).double()
    random = np.random.RandomState(0)
    w = {name: torch.tensor(random.standard_normal(t.shape) * 0.3)
         for name, t in sorted(net.state_dict().items())}
    for name in ("decoder_embed.bias", "decoder_pos_embed", "trainable_cls_token"):
        w[name] *= 1e-3                                         # an eps of 1e-6 would show
    net.load_state_dict(w)
    image = net(torch.tensor(random.standard_normal((1, 9, 10))) * 1e-3)[0]
    pinned = [0.922671, 0.184827, 0.724542, 1.124162]           # by nn.TransformerEncoderLayer
    values = image[[0, 1, 2, 0], [0, 5, 11, 3], [0, 2, 7, 9]].tolist()
    assert image.shape == (3, 12, 12) and values == pytest.approx(pinned, abs=1e-5)


def test_rae_encodes_and_decodes_by_the_published_formulas(hub):
    codec, images = encode.load_codec("rae"), torch.rand(2, 3, 256, 256)
    z = codec.encode(images)
    assert codec.latent_shape == (256, 768) and codec.image_size == 256 and not codec.training
    assert encode.latent_shape("rae") == (256, 768)
    encoder, stat = load(hub / "checkpoints" / ENCODER_FILE), load(hub / "checkpoints" / STAT_FILE)
    scale = (stat["var"] + 1e-5).sqrt()                         # (C, 16, 16)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    x = nn.functional.interpolate(images, (224, 224), mode="bicubic", align_corners=False)
    x = nn.functional.conv2d((x - mean) / std, encoder["patch.weight"], encoder["patch.bias"], 14)
    x = x - x.mean(1, keepdim=True)                             # the norm has no weights
    x = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    assert_close(z, (x / scale).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    y = codec.decoder(x.flatten(2).transpose(1, 2)) * std + mean
    assert_close(codec.decode(z), y.clamp(0, 1), rtol=1e-4, atol=1e-4)
    torch.save(stat | dict(mean=torch.ones(768, 16, 16)), hub / "checkpoints" / STAT_FILE)
    shifted, expected = encode.load_codec("rae"), z - (1 / scale).flatten(1).T
    assert_close(shifted.encode(images), expected, rtol=1e-3, atol=1e-3)
    assert_close(shifted.decode(expected), codec.decode(z), rtol=1e-3, atol=1e-3)


def test_missing_or_damaged_weights_are_named_with_address_and_place(hub, tmp_path):
    Image.new("RGB", (300, 260)).save(tmp_path / "x.jpg")
    line = f"encode.py --reconstruct x.jpg --codec rae --weights_dir {hub}"
    works(script(line, tmp_path))
    for name, url in WEIGHTS.items():
        file = hub / "checkpoints" / name
        whole = spoil(file)
        fails_clearly(script(line, tmp_path), file, url, "delete")
        file.unlink()
        fails_clearly(script(line, tmp_path), file, url)
        file.write_bytes(whole)
    (hub / "facebookresearch_dinov2_main/hubconf.py").unlink()
    fails_clearly(script(line, tmp_path), hub / "facebookresearch_dinov2_main",
                  encode.DINOV2_COMMIT)


def test_a_changed_architecture_is_told_by_tensor_and_shapes_not_as_a_damaged_file(hub, copied):
    file = hub / "checkpoints" / DECODER_FILE
    torch.save(load(file) | {"decoder_norm.weight": torch.zeros(31)}, file)
    with pytest.raises(encode.UserError) as error:
        encode.load_codec("rae")
    assert "decoder_norm.weight is (31,) in the file and (32,)" in str(error.value)
    assert "delete" not in str(error.value)
    checkpoint = load(copied / "out/photos/ckpt.pt")
    checkpoint["ema"]["embed.weight"] = torch.zeros(64, 31)
    torch.save(checkpoint, copied / "wide.pt")
    fails_clearly(script("sample.py --ckpt wide.pt", copied),
                  "embed.weight is (64, 31) in the file and (64, 32)")


def test_nodes_load_in_turn_the_first_process_then_the_first_of_each_node_then_all(monkeypatch):
    turns = {}
    for rank, local_rank in ((0, 0), (1, 1), (8, 0), (9, 1)):
        waited = []
        monkeypatch.setattr(encode, "RANK", rank)
        monkeypatch.setattr(encode, "LOCAL_RANK", local_rank)
        monkeypatch.setattr(encode, "barrier", lambda: waited.append(1))
        turns[rank] = encode.in_turn(lambda: len(waited))
        assert len(waited) == 3
    assert turns == {0: 0, 8: 1, 1: 2, 9: 2}


def test_processes_that_start_together_download_dinov2_once(hub, tmp_path):
    draw_folder(tmp_path / "photos", each=1)
    works(script("train.py --dataset photos --codec rae --batch_size 2 --max_steps 1", tmp_path))
    (hub / "facebookresearch_dinov2_main").rename(tmp_path / "dinov2-x")
    archive = shutil.make_archive(tmp_path / "dinov2", "zip", tmp_path, "dinov2-x")
    patch = f"""import functools, shutil
def download(url, path, *args, **kwargs):
    print("download", url)
    shutil.copy({archive!r}, path)
torch.hub.download_url_to_file = download
encode.ViTDecoder = functools.partial(encode.ViTDecoder, **{NARROW})"""
    text = works(processes(f"sample.py --num_images 2 --weights_dir {hub}", tmp_path, patch=patch))
    assert text.count("download https") == 1


def test_flowers_go_through_the_rae_from_archive_to_samples(hub, tmp_path):
    draw_flowers(tmp_path / "data/flowers")
    line = "train.py --dataset flowers --preset tiny --batch_size 4 --max_steps 2"
    works(script(line, tmp_path), "latents 256x768")
    works(script("sample.py --num_images 3 --out s.npz", tmp_path))
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 256, 256, 3)
    line = "fid.py s.npz --ref flowers --features codec"        # flowers' codec is the RAE
    works(script(line, tmp_path), "Frechet distance of codec rae")
    stat = dict(mean=None, var=torch.rand(768, 16, 16) + 1)
    torch.save(stat, hub / "checkpoints" / STAT_FILE)
    fails_clearly(script("sample.py", tmp_path), "rae", "other weights")


def test_a_pickle_that_runs_code_is_refused(copied):
    class Evil:
        def __reduce__(self):
            return Path.touch, (copied / "pwned",)
    torch.save(Evil(), copied / "evil.pt")
    for line in ("sample.py --ckpt evil.pt", "train.py --init_from evil.pt --dataset photos",
                 "fid.py x.npy --ref x.npy --features codec --codec evil.pt"):
        np.save(copied / "x.npy", encode.shapes(4)[0])
        fails_clearly(script(line, copied), "evil.pt")
    assert not (copied / "pwned").exists()


def test_full_disk_keeps_the_old_file_and_bugs_get_their_traceback(tmp_path, monkeypatch):
    path, real = tmp_path / "ckpt.pt", open
    encode.write_file(path, lambda file: file.write(b"old"))
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, *mode: real("/dev/full", *mode))
        for write in (lambda file: torch.save(dict(x=torch.zeros(100_000)), file),
                      lambda file: np.save(file, np.zeros(100_000))):
            with pytest.raises(encode.UserError) as error:
                encode.write_file(path, write)
            expected = r"ckpt.pt: (No space left|cannot be written).*--resume"
            assert re.search(expected, str(error.value))
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError):
        encode.run(lambda: os.remove("nowhere"))                # a bug


# ----------------------------------------------------------------------------- train.py

def test_settings_are_the_block_of_the_run_with_the_flags_laid_over_it():
    choose = train.choose_settings
    assert choose({}) == train.SHAPES
    assert choose(dict(preset="S")) == train.replace(train.SHAPES, preset="S")
    assert choose(dict(dataset="a/b")) == train.replace(train.FOLDER, dataset="a/b")
    flags = dict(dataset="flowers", preset="tiny")
    assert choose(flags) == train.replace(train.FLOWERS, preset="tiny")
    start = dict(settings=vars(choose(dict(dataset="a/b", preset="S", angle_std=2.0))))
    distilled = choose(dict(distill="x", lr=1.0), start)
    assert distilled == train.replace(train.DISTILL, dataset="a/b", preset="S", angle_std=2.0,
                                      distill="x", lr=1.0)


def test_training_lowers_the_loss_and_writes_checkpoint_log_and_grids(copied):
    text = works(script(AGAIN + "--max_steps 60 --lr 3e-3 --warmup 5", copied))
    out, first = copied / "out/again", read_log(copied / "out/photos")[0]
    last = read_log(out)[-1]
    assert "python sample.py" in text and "more steps" in text and last["step"] == 60
    assert last["reconstruction"] < 0.6 * first["reconstruction"]
    bins = [first[name] for name in first if name.startswith("loss_")]      # of the noise's law
    assert len(bins) == 6 and np.mean(bins) == pytest.approx(first["reconstruction"], rel=0.2)
    assert Image.open(out / "samples/step_000060.png").width > 64
    curve = np.asarray(Image.open(out / "curve.png"))
    assert curve.shape == (400, 800, 3) and len(np.unique(curve.reshape(-1, 3), axis=0)) > 6
    checkpoint = load(out / "ckpt.pt")
    assert checkpoint["step"] == 60 and list(checkpoint["model"]) == list(checkpoint["ema"])
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in checkpoint["model"])
    (out / "notes").touch()
    works(script(AGAIN + "--max_steps 4", copied), "earlier_")  # nothing of a run is lost
    assert (out / "notes").exists() and load(*out.glob("earlier_*/ckpt.pt"))["step"] == 60


@pytest.mark.parametrize("names, flags", [      # Slurm sends two signals
    ("SIGINT", ""), ("SIGKILL", ""), ("SIGTERM SIGTERM", "--live"), ("SIGHUP", DISTILL),
    ("SIGKILL", DISTILL)])
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(copied, names, flags):
    if flags == DISTILL:
        shutil.rmtree(copied / "data")                          # needs no images
        works(script(TRAIN + flags + "--out_dir out/whole", copied))
    else:
        shutil.copytree(copied / "out/photos", copied / "out/whole")
    name = "distill_step" if flags == DISTILL else "train_step"
    status, text = processes(AGAIN + flags, copied, 1, f"""import signal
step = script.{name}
calls = []
def signalling(*args):
    calls.append(1)
    for name in {names.split()} * (len(calls) == 6):
        os.kill(os.getpid(), signal.Signals[name])
    return step(*args)
script.{name} = signalling""")
    if names == "SIGKILL":
        assert status == -signal.SIGKILL and load(copied / "out/again/ckpt.pt")["step"] == 4
        leftover = copied / "out/again/ckpt.pt.99.tmp"
        leftover.write_bytes(b"of a save that was killed")
        os.utime(leftover, (0, 0))
    else:
        works((status, text), "stopped at step 6", "--resume")
    if flags == DISTILL:
        shutil.rmtree(copied / "out/photos")                    # the source may be gone by now
    works(script(AGAIN + flags + " --resume", copied))
    assert not list((copied / "out/again").glob("*.tmp"))
    a, b = ([c["step"], c["model"], c["ema"], *(one["state"] for one in c["optimizers"])]
            for c in map(load, (copied / "out/again/ckpt.pt", copied / "out/whole/ckpt.pt")))
    assert_close(a, b, rtol=0, atol=0)
    assert_same_curve(copied / "out/again", copied / "out/whole", rel=0)


def test_a_terminal_or_pipe_that_is_gone_stops_a_run_instead_of_breaking_it(monkeypatch):
    names = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {name: signal.getsignal(name) for name in names}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        caught = train.catch_signals()
        for error in (BrokenPipeError(), OSError(5, "Input/output error")):
            def gone(*_, error=error, **__):
                raise error
            monkeypatch.setattr("builtins.print", gone)
            caught.clear()
            train.say("step 1", caught)
            assert caught == [signal.SIGTERM]
        caught.clear()
        signal.getsignal(signal.SIGINT)(signal.SIGINT, None)    # as in `| tee log`
        assert caught == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler    # for the second
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def test_gradients_are_clipped_to_a_norm_or_not_at_all():
    for grad_clip, change in ((0.5, 0.5), (0, 5.0), (9, 5.0)):
        weights = nn.Parameter(torch.zeros(2))
        weights.grad = torch.tensor([3.0, 4.0])
        optimizer = torch.optim.SGD([dict(params=[weights], lr_scale=1)])
        numbers = train.take_step([optimizer], 1.0, grad_clip)
        assert numbers["grad_norm"] == 5 and weights.norm().item() == pytest.approx(change, 1e-3)


@pytest.mark.parametrize("flags", ["--consistency_weight 0.5 ", DISTILL])
def test_two_processes_train_as_one_does_and_end_equal(copied, flags):
    works(script(AGAIN + flags, copied))
    works(processes(TRAIN + flags + "--out_dir out/two", copied, patch="""
made, make, main = [], script.make_training, script.main
def make_training(*args):
    made.append(make(*args))
    return made[0]
def compile_networks(training, choice):
    training.denoiser.compile(backend="aot_eager_decomp_partition")     # as DDP sees it
def main_and_save():
    main()
    nets = made[0].denoiser, made[0].ema
    torch.save([net.state_dict() for net in nets], "rank" + os.environ["RANK"])
script.make_training, script.main = make_training, main_and_save
script.compile_networks = compile_networks"""), "2 x cpu")
    assert_same_curve(copied / "out/again", copied / "out/two")
    for first, second in zip(load(copied / "rank0"), load(copied / "rank1"), strict=True):
        assert equal(first.values(), second.values())


def test_distilled_checkpoints_are_sampled_in_one_unguided_pass(copied):
    flags = "--max_steps 4 --batch_size 4 --imitate_steps 2 --log_every 2"
    works(script(f"train.py --distill out {flags}", copied), "no images needed")    # the newest
    out = copied / "out/photos-distilled"
    (copied / "here").mkdir()
    shutil.copy(copied / "out/photos/ckpt.pt", copied / "here")
    works(script(f"train.py --distill ckpt.pt {flags}", copied / "here"), "here-distilled/ckpt.pt")
    imitating, matching = read_log(out)
    assert imitating["lr"] > matching["lr"] > 0
    assert "matching" not in imitating and {"matching", "denoising"} <= matching.keys()
    works(script(f"sample.py --ckpt {out} --num_images 2", copied), "NFE 1", "'steps': 1")
    works(script("sample.py --ckpt out/photos --cfg_skip 1", copied), "NFE 7")      # 2 * 4 - 1
    teacher = copied / "out/photos/ckpt.pt"
    assert list(load(out / "ckpt.pt")["model"]) == list(load(teacher)["model"])
    fails_clearly(script(f"train.py --distill {out}", copied), out, "already")
    works(script(f"train.py --distill out {flags} --resume --max_steps 6", copied), "from step 4")
    line = "train.py --distill out/photos --resume --max_steps 8 --accumulate 2"
    fails_clearly(script(line, copied), "--accumulate", "--distill")


def test_imitation_learns_what_the_sampler_draws_with_one_noise_for_all_steps():
    denoiser, noise, y = random_denoiser(max_angle=70.0), torch.randn(3, 16, 32), torch.arange(3)
    settings = train.replace(train.DISTILL, teacher_steps=3, teacher_cfg=2.0)
    got = train.imitation_target(denoiser, noise, y, settings)
    v, x = model.to_sphere(noise), denoiser(model.to_sphere(noise), y)
    for angle in model.sampling_angles(3, 70.0)[1:]:
        v = model.rotate(x, noise, angle)
        null = denoiser(v, torch.full_like(y, 3))
        x = null + 2 * (denoiser(v, y) - null)
    assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags, way", [
    ("", "--accumulate 4"), ("", "--live"), ("--flip", "--live")])
def test_parts_and_live_encoding_follow_the_curve_of_the_cached_batch(copied, flags, way):
    works(script(f"{TRAIN} {flags} --out_dir out/plain", copied))
    works(script(f"{AGAIN} {flags} {way}", copied))
    assert_same_curve(copied / "out/plain", copied / "out/again")


class OnlyAllocation(TorchDispatchMode):
    """Fails at any operation of torch's but making an empty tensor, and an array of it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.detach), function
        return function(*args, **kwargs or {})


def test_the_thread_that_reads_leaves_torchs_operations_to_the_main_thread(copied, monkeypatch):
    threads, real = set(), train.read_batch
    def read_batch(*args):
        threads.add(threading.current_thread())
        with OnlyAllocation():
            return real(*args)
    monkeypatch.setattr(train, "read_batch", read_batch)
    works(script(AGAIN, copied))
    works(script(AGAIN + "--live", copied))
    monkeypatch.setattr(train, "place_latents", train.LatentsOnDisk)
    works(script(AGAIN, copied))
    assert threading.main_thread() not in threads and threads
    assert_same_curve(copied / "out/photos", copied / "out/again")


def test_copies_to_other_devices_than_cuda_are_waited_for(copied):
    copies = []
    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket == torch.ops.aten._to_copy:
                copies.append((kwargs or {}).get("non_blocking", False))
            return function(*args, **kwargs or {})
    cache, meta = caches(copied)[0], torch.device("meta")
    for data in train.place_latents(cache, meta), train.LatentsOnDisk(cache, meta):
        batch, labels = train.read_batch(data, np.arange(12), 0, slice(0, 4), train.SHAPES)
        with Recording():
            assert data.to_latents(batch).is_meta and train.move(labels, meta).is_meta
    assert len(copies) > 3 and not any(copies)
    assert isinstance(train.place_latents(cache, torch.device("mps")), train.LatentsInMemory)


def test_batches_go_through_every_image_once_an_epoch_in_an_order_of_their_own():
    seen = np.concatenate([train.batch_indexes(10, 4, step, seed=0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert not np.array_equal(seen[:4], train.batch_indexes(10, 4, 0, seed=1))
    assert len(train.batch_indexes(3, 8, 5, seed=0)) == 8       # several epochs in a batch


def test_noise_is_the_same_however_a_batch_is_split():
    config, settings = model.ModelConfig(**TINY), train.replace(train.SHAPES, batch_size=48)
    whole = train.draw(7, slice(0, 48), settings, config, CPU)
    for parts in ([0, 24, 48], [0, 12, 24, 36, 48], [0, 5, 48]):
        split = [train.draw(7, slice(a, b), settings, config, CPU)
                 for a, b in zip(parts, parts[1:])]
        assert equal(whole, [torch.cat(values) for values in zip(*split)])
    assert not torch.equal(whole[0], train.draw(8, slice(0, 48), settings, config, CPU)[0])


def test_muon_steps_as_torchs_does_up_to_its_bf16_for_all_shapes_at_once():
    shapes = [(24, 16), (16, 24), (16, 16), (24, 16), (16, 16)]
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    ends = []
    for kind in (torch.optim.Muon, train.FloatMuon):
        weights = [nn.Parameter(weight.clone()) for weight in start]
        optimizer = kind(weights, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in gradients:
            for weight, gradient in zip(weights, step):
                weight.grad = gradient.clone()
            optimizer.step()
        ends.append([weight.detach() - old for weight, old in zip(weights, start)])
    for theirs, ours in zip(*ends):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_steps_that_are_not_finite_are_skipped_and_ten_end_the_run(copied, monkeypatch):
    bad_steps, step = [5], train.train_step
    def watched_step(net, optimizers, number, batch, *rest):
        bad = number in bad_steps
        batch = batch[0] * (math.nan if bad else 1), *batch[1:]
        moments = [x for one in optimizers for state in one.state.values() for x in state.values()]
        before = [x.clone() for x in (*net.parameters(), *moments)]
        result = step(net, optimizers, number, batch, *rest)
        assert equal(before, [*net.parameters(), *moments]) == bad
        return result
    monkeypatch.setattr(train, "train_step", watched_step)
    works(script(AGAIN, copied), "skipped 1")
    assert [row["skipped"] for row in read_log(copied / "out/again")] == [0, 1, 0]
    bad_steps += range(6, 15)
    fails_clearly(script(AGAIN + "--max_steps 30", copied), "for 10 steps", "--resume --lr")
    assert load(copied / "out/again/ckpt.pt")["step"] == 4      # from before the bad steps
    bad_steps.clear()
    works(script(AGAIN + "--resume --lr 1e-4", copied))


def test_resume_starts_goes_on_and_says_when_there_is_nothing_left(copied):
    line = AGAIN + "--resume "
    works(script(line, copied), "does not exist, so this run starts", "from step 0", "done")
    works(script(line + "--max_steps 14", copied), "from step 12", "done")
    [text] = works(script(line + "--max_steps 14", copied), "is complete, with 14").splitlines()
    assert "--max_steps" in text


def test_settings_given_on_resuming_take_effect_or_are_refused(copied):
    path = copied / "out/photos/ckpt.pt"
    line = TRAIN + "--resume --max_steps 14 "
    works(script(line + "--weight_decay 0.5", copied))
    groups = [group for one in load(path)["optimizers"] for group in one["param_groups"]]
    assert [group["weight_decay"] for group in groups] == [0.5] * 2
    fails_clearly(script(line + "--preset S", copied), "ckpt.pt", "--preset tiny")


def test_a_log_that_lacks_a_number_is_resumed(copied):
    path = copied / "out/photos/ckpt.pt"
    checkpoint = load(path)
    for row in checkpoint["log"]:
        del row["grad_norm"], row["seconds"]
        row["other"] = 1.0
    torch.save(checkpoint, path)
    works(script(TRAIN + "--resume --max_steps 16", copied))
    old, new = read_log(copied / "out/photos")[-2:]
    assert "grad_norm" not in old and old["other"] == 1 and new["grad_norm"] > 0


def test_a_run_does_not_overwrite_the_checkpoint_of_another(copied, monkeypatch):
    real = train.train_step
    def step(*args):
        if args[2] == 6:        # after its own first save
            torch.save(dict(another="run"), copied / "out/again/ckpt.pt")
        return real(*args)
    monkeypatch.setattr(train, "train_step", step)
    fails_clearly(script(AGAIN, copied), "ckpt.pt: another run", "--out_dir")
    assert load(copied / "out/again/ckpt.pt") == dict(another="run")


def test_a_closed_pipe_and_a_closed_terminal_end_a_run_with_its_checkpoint(copied):
    script_file = copied / "patched_train.py"
    works(processes(AGAIN + "--max_steps 1", copied, 1))        # writes it
    run = subprocess.Popen([sys.executable, script_file, *(AGAIN + "--max_steps 999").split()[1:]],
                           cwd=copied, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "more steps" not in run.stdout.readline():
        pass
    run.stdout.close()                                          # as `| head` does
    assert run.wait() == 1 and "Traceback" not in run.stderr.read()
    assert 1 < load(copied / "out/again/ckpt.pt")["step"] < 999
    hang_up = "import signal\nstep = script.train_step\ndef hanging_up(*args):\n" \
              "    os.kill(os.getpid(), signal.SIGHUP)\n    return step(*args)\n" \
              "script.train_step = hanging_up\n"
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"    # as nohup does
    works(processes(AGAIN, copied, 1, ignore + hang_up), "done")
    works(processes(AGAIN, copied, 1, hang_up), "stopped at step 1,")


def test_an_unreadable_image_stops_a_live_run_with_its_checkpoint(copied, monkeypatch):
    real = train.read_batch
    def read_batch(data, usable, step, *rest):
        if step == 6:
            raise encode.UserError("a.png: cannot be read")
        return real(data, usable, step, *rest)
    monkeypatch.setattr(train, "read_batch", read_batch)
    fails_clearly(script(AGAIN + "--live", copied), "a.png")
    assert load(copied / "out/again/ckpt.pt")["step"] == 6


def test_errors_of_several_processes_are_said_once(copied):
    for line, words in (("train.py --batch_size 7 --dataset photos", "multiple of 2"),
                        ("sample.py --ckpt nowhere", "nowhere"),
                        ("sample.py --classes unicorn", "unicorn"),
                        ("fid.py a.npz --ref b.npz", "one process")):
        fails_clearly(of_scripts(processes(line, copied)), words)
    spoil(copied / "data/photos/two/5.png")                     # in the share of the second
    shutil.rmtree(caches(copied)[0].folder)
    fails_clearly(of_scripts(processes(ENCODE, copied, patch="encode.CHUNK = 6")), "two/5.png")


def test_compiling_is_for_cuda_and_long_runs_on_cpus_and_must_work_if_asked_for(monkeypatch):
    tried, long, short = [], train.SHAPES, train.replace(train.SHAPES, max_steps=500)
    monkeypatch.setattr(train, "try_compile", lambda device: tried.append(device))
    mps = torch.device("mps")
    assert train.choose_compile("auto", long, CPU) and not train.choose_compile("auto", short, CPU)
    assert not train.choose_compile("auto", long, mps)
    assert not train.choose_compile("off", long, CPU)
    assert train.choose_compile("on", short, CPU) and len(tried) == 2
    monkeypatch.setattr(train, "try_compile", lambda device: RuntimeError("no g++"))
    assert not train.choose_compile("auto", long, CPU)
    with pytest.raises(encode.UserError, match="no g\\+\\+"):
        train.choose_compile("on", long, CPU)


def test_compiling_takes_one_block_for_all_and_keeps_the_names_of_the_weights(monkeypatch):
    graphs, denoiser = [], random_denoiser(depth=3)
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compile_with = functools.partialmethod(nn.Module.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", compile_with)
    z, labels = torch.randn(2, 16, 32), torch.tensor([0, 2])
    expected, names = denoiser(z, labels), list(denoiser.state_dict())
    encode.compile_blocks(denoiser)
    assert_close(denoiser(z, labels), expected)
    [graph] = graphs
    [attention] = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert list(denoiser.state_dict()) == names


def test_too_little_memory_of_the_gpu_is_said_in_a_line(copied, monkeypatch):
    def step(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    monkeypatch.setattr(train, "train_step", step)
    fails_clearly(script(AGAIN, copied), "2.00 GiB", "--batch_size", "--accumulate")


def test_fine_tuning_starts_from_the_weights_the_codec_and_the_rows_of_known_classes(copied):
    draw_folder(copied / "data/others", ("three", "two"))
    line = "train.py --init_from out/photos/ckpt.pt --batch_size 4 --max_steps 1 --lr 0 --dataset "
    works(script(line + "others", copied), "2 classes (1 known to the checkpoint")
    old, new = (load(copied / f"out/{name}/ckpt.pt") for name in ("photos", "others"))
    assert new["codec"]["fingerprint"] == old["codec"]["fingerprint"]
    weights = {name: (old["ema"][name], new["model"][name]) for name in old["ema"]}
    before, after = weights.pop("class_table.weight")           # one, two, none
    assert all(torch.equal(*pair) for pair in weights.values())
    assert equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])
    mistake = line + "others --codec small64"
    fails_clearly(script(mistake, copied), "photos/ckpt.pt", "--codec small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS["tiny"], "width", 32)
        fails_clearly(script(line + "others", copied), "class_table.weight", "64", "32")
    absolute = line.replace("out/photos", f"{copied}/out/photos")
    works(script(absolute + "photos", copied), "out/photos-tuned")          # the source stays
    assert load(copied / "out/photos/ckpt.pt")["step"] == 12


def test_evaluation_while_training_is_what_fid_py_measures_afterwards(copied):
    flags = "--eval_every 8 --eval_images 10 "
    works(script(AGAIN + flags, copied), "Frechet distance")
    rows = read_log(copied / "out/again")
    assert [row["step"] for row in rows if "eval_fid" in row] == [8, 12]
    works(script("sample.py --ckpt out/again --num_images 10 --out s.npz", copied))
    line = "fid.py s.npz --ref photos --features codec --codec out/again --metrics fid"
    assert measured(line, copied)["fid"] == pytest.approx(rows[-1]["eval_fid"], rel=1e-3)
    assert Image.open(copied / "out/again/curve.png").size == (800, 800)
    works(processes(TRAIN + flags + "--out_dir out/two", copied))
    assert_same_curve(copied / "out/again", copied / "out/two", rel=0.05)
    works(script(line + " --save_stats stats.npz", copied))
    works(script(AGAIN + flags + "--eval_ref stats.npz", copied), "Frechet distance")
    assert_same_curve(copied / "out/again", copied / "out/two", rel=0.05)
    for mistake, word in (("--eval_features inception", "Inception"), ("--eval_ref none", "none")):
        status, text = script(f"{TRAIN} --out_dir out/no {flags} {mistake} --weights_dir w", copied)
        fails_clearly((status, text), word)
        assert "step 4" not in text and not (copied / "out/no").exists()


# ---------------------------------------------------------------------------- sample.py

def test_sample_writes_grids_npz_and_folder_with_classes_in_equal_numbers(copied):
    for flags in ("--out a.npz", "--out folder", "", "--cfg_scale 3", "--cfg_skip 0", "--steps 1",
                  "--same_noise", "--dtype bfloat16", "--classes Two", "--pixel_loop"):
        works(script(f"sample.py --num_images 6 {flags}", copied), "wrote")
    assert len(list((copied / "out/photos").glob("grid_*.png"))) == 8       # one each
    assert "--pixel_loop" in Image.open(copied / "out/photos/grid_8.png").text["Comment"]
    images, labels = np.load(copied / "a.npz").values()
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1] * 3
    assert fid.open_set(copied / "folder").images.labels.tolist() == [0, 1] * 3
    for i, image in enumerate(images):
        assert np.array_equal(Image.open(copied / f"folder/{i:06d}.png"), image)
    for name, kind in (("x.jpg", "JPEG"), ("x.webp", "WEBP")):
        works(script(f"sample.py --num_images 2 --out {name}", copied))
        assert Image.open(copied / name).format == kind
    with pytest.raises(encode.UserError, match="x.webp: WEBP holds at most 16,383 pixels"):
        sample.write_picture("x.webp", Image.new("RGB", (1, 17_000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "sample_batches", lambda *_, **__: pytest.fail("drew them first"))
        fails_clearly(script("sample.py --num_images 30000 --out x.webp", copied), "16,383 pixels")
    works(script("sample.py --num_images 2 --out samples_cfg1.5", copied))  # a folder, not a type
    assert len(list((copied / "samples_cfg1.5").iterdir())) == 3


def test_two_processes_make_the_very_images_that_one_makes(copied):
    line = "sample.py --num_images 11 --batch_size 3 --out "    # the last batch is short
    text = works(processes(line + "two.npz", copied))
    assert text.count("wrote two.npz") == 1
    works(script(line + "one.npz", copied))
    assert (copied / "one.npz").read_bytes() == (copied / "two.npz").read_bytes()
    works(script(line + "all.npz --batch_size 99", copied))
    works(script(line + "other.npz --seed 1", copied))
    one, whole, other = (np.load(copied / f"{name}.npz")["arr_0"].astype(int)
                         for name in ("one", "all", "other"))
    assert np.abs(one - whole).max() <= 1 < np.abs(one - other).max()       # rounds by batch size


def test_all_processes_sample_the_checkpoint_that_the_first_one_found(copied):
    patch = """found = script.find_checkpoint
def find_checkpoint(path):
    assert os.environ["RANK"] == "0" or str(path).endswith("ckpt.pt")
    return found(path)
script.find_checkpoint = find_checkpoint
"""
    works(processes("sample.py --num_images 2", copied, patch=patch))
    patch = """loaded = script.load_checkpoint
def load_checkpoint(path):
    return dict(loaded(path), step=int(os.environ["RANK"]))
script.load_checkpoint = load_checkpoint
"""
    result = processes("sample.py --num_images 2", copied, patch=patch)
    fails_clearly(of_scripts(result), "saved again meanwhile")


def test_from_python_a_checkpoint_is_loaded_and_drawn_from_in_a_few_lines(copied):
    checkpoint = sample.load_checkpoint(copied / "out/photos")  # a folder, as --ckpt takes
    net, codec = sample.load_model(checkpoint), sample.load_checkpoint_codec(checkpoint)
    labels, options = torch.tensor([0, 1, 0, 1]), sample.sampling_options(checkpoint)
    images = np.concatenate(list(sample.sample_batches(net, codec, labels, **options)))
    works(script("sample.py --num_images 4 --out a.npz", copied))
    assert np.abs(images.astype(int) - np.load(copied / "a.npz")["arr_0"]).max() <= 1


def test_benches_print_rates_and_shares(copied):
    text = works(script("sample.py --bench --batch_size 2 --steps 6 --cfg_scale 1", copied))
    assert float(re.search(r"([\d.]+) times the time", text)[1]) > 1.5      # five trips to pixels
    text = works(processes("train.py --bench --batch_size 4", copied))
    assert re.search(r"training tiny on latents 16x32, batch 4, 2 x cpu: [\d.]+ images/s.*% of a "
                     r"large matrix product's", text)
    assert "distilling tiny" in works(script(f"train.py --bench --batch_size 4 {DISTILL}", copied))


def test_filmstrips_show_steps_guidance_angles_and_the_way_between_samples(workspace):
    checkpoint = sample.load_checkpoint(workspace / "out/photos/ckpt.pt")
    net, codec = sample.load_model(checkpoint), sample.load_checkpoint_codec(checkpoint)
    labels, names = torch.tensor([0, 1, 1]), ["one", "two", "two"]
    noise = sample.draw_noise(0, range(3), codec.latent_shape, 4)
    options = dict(cfg_scale=2.0, cfg_skip=1)
    last = sample.decode(codec, sample.predict(net, labels, noise, **options)[-1]).astype(int)
    strips = {kind: draw(net, codec, labels, names, noise, options)
              for kind, draw in sample.FILMSTRIPS.items()}
    z = sample.predict(net, labels, noise, **options)[-1]
    strips["slerp"] = sample.slerp_filmstrip(codec, z, names)
    for row, cell in (("steps", 3), ("guidance", 2), ("slerp", 0)):     # a column each is `last`
        assert np.abs(strips[row][1][cell][0] - last[1]).max() <= 1
    assert np.abs(strips["slerp"][0][-1][0] - last[1]).max() <= 1
    noisy, denoised = strips["angle"][:2]
    assert np.abs(noisy[0][0] - last[0]).max() <= 1
    assert np.abs(noisy[6][0].astype(int) - last[0]).max() > 1
    assert not np.array_equal(noisy[6][0], denoised[6][0])
    from_noise = sample.decode(codec, model.to_sphere(noise[0]))    # what the samples began as
    assert np.abs(noisy[6][0].astype(int) - from_noise[0]).max() > 5
    for kind, size in dict(steps=(4, 2), guidance=(6, 2), angle=(7, 4), slerp=(6, 2)).items():
        works(script(f"sample.py --filmstrip {kind} --out strip.png", workspace))
        assert Image.open(workspace / "strip.png").size == (size[0] * 100 + 4, size[1] * 124 + 4)


def test_without_the_sphere_there_are_no_filmstrips_of_angles_and_no_edits_from_noise_alone(copied):
    checkpoint = load(copied / "out/photos/ckpt.pt")
    checkpoint["config"]["sphere"] = False
    torch.save(checkpoint, copied / "flat.pt")
    line = "sample.py --ckpt flat.pt --filmstrip angle --out x.png"
    fails_clearly(script(line, copied), "flat.pt", "--no-sphere")
    line = "sample.py --ckpt flat.pt --init data/photos/one --out x.png --init_angle 80 "
    works(script(line, copied), "12 images")
    fails_clearly(script(line + "90", copied), "--init_angle 90", "--no-sphere")


def test_an_edit_starts_from_the_image_turned_by_its_angle_and_takes_the_steps_below_it():
    denoiser, y = random_denoiser(max_angle=80.0), torch.tensor([0, 1, 2])
    noise, z = torch.randn(4, 3, 16, 32), torch.randn(3, 16, 32)
    angles = [math.degrees(angle) for angle in model.sampling_angles(4, 80.0)]      # 80, 75, 63, 35
    for degrees, taken in ((0, 1), (30, 1), (60, 2), (74, 3), (90, 4)):
        first = [math.radians(degrees)]
        rest = [math.radians(angle) for angle in angles[4 - taken + 1:]]
        *_, want = model.generate(denoiser, y, noise[4 - taken:], first + rest, [1] * taken, z)
        assert_close(sample.edit(denoiser, y, noise, z, degrees), want)


def test_images_are_edited_by_class_and_angle_or_joined_by_slerp(copied):
    line = "sample.py --init data/photos/one/0.png data/photos/two --out edit.png "
    works(script(line + "--init_angle 0 60 90 --classes one two", copied), "42 images")
    grid = np.asarray(Image.open(copied / "edit.png"))          # 7 images, two classes
    original = encode.center_crop(encode.load_image(copied / "data/photos/two/5.png"), 32)
    assert grid.shape == (14 * 124 + 4, 4 * 100 + 4, 3)
    assert np.array_equal(grid[4 + 124 * 13:, 4:][:96:3, :96:3], original)
    assert not np.array_equal(grid[:100, 100:200], grid[:100, 300:400])
    works(script(line + "--classes one two", copied))           # one angle: a row an image
    assert Image.open(copied / "edit.png").size == (3 * 100 + 4, 7 * 124 + 4)
    works(script(line + "--filmstrip slerp", copied))
    assert Image.open(copied / "edit.png").size == (6 * 100 + 4, 7 * 124 + 4)


# ------------------------------------------------------------------------------- fid.py

@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file with Inception's published keys, by numpy's frozen generator."""
    random, state = np.random.RandomState(0), {}
    for key, old in sorted(fid.InceptionV3().state_dict().items()):
        x = random.standard_normal(old.shape)
        x *= np.sqrt(2 / x[0].size)
        if key.endswith(("bn.weight", "running_var")):
            x = 0.8 + 0.3 * np.abs(x)
        state[key] = torch.tensor(x, dtype=torch.float32)
    path = tmp_path_factory.mktemp("weights") / "checkpoints" / fid.WEIGHTS
    encode.write_file(path, lambda file: torch.save(state, file))
    return path


def test_inception_computes_the_graph_of_2015_in_float32_whatever_the_caller_set(weights):
    pinned = dict(pool3=[1.74376, 3.07761, 95.42464], spatial=[6.36752, 5.91374, 11.85546],
                  logits=[-9.88275, 3.69112, -38.27039])        # by torch-fidelity
    net, seen = fid.InceptionV3(weights), []
    state = net.state_dict()
    assert len(state) == 472 and sum(x.numel() for x in state.values()) == 23_850_960 + 34_432
    net.load_state_dict(state | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)})
    net.Conv2d_1a_3x3.register_forward_hook(lambda *_: seen.append((
        torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())))
    torch.set_float32_matmul_precision("medium")
    image = np.random.RandomState(320).randint(0, 256, (1, 3, 320, 320), np.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net.train()(torch.from_numpy(image))
    for key, expected in pinned.items():
        assert out[key][0, [0, 700, 1001]].tolist() == pytest.approx(expected, rel=1e-4)
    assert seen == [(False, "highest")] and torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")


def test_frechet_distance_is_exact_also_without_full_rank():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((50, 200)), random.standard_normal((300, 200))
    for u, v in ((x, y), (y, x), (x, x), (y, y + 1)):
        u0, v0 = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (u, v))
        exact = ((u.mean(0) - v.mean(0)) ** 2).sum() + (u0 ** 2).sum() + (v0 ** 2).sum()
        exact -= 2 * np.linalg.svd(u0 @ v0.T)[1].sum()
        moments = u.mean(0), np.cov(u, rowvar=False), v.mean(0), np.cov(v, rowvar=False)
        assert fid.frechet_distance(*moments) == pytest.approx(exact, abs=1e-9 * 400)


class Rows:
    """An extractor whose features are rows of an array."""

    name, width = "rows", 30

    def __init__(self, x):
        self.x = x

    def extract(self, rows):
        return dict(pool3=torch.from_numpy(self.x[rows]))


def test_streamed_moments_are_those_of_the_whole_set():
    x = np.random.default_rng(0).standard_normal((500, 30)).astype(np.float32) + 5
    def measure():
        batches = np.split(np.arange(500), range(70, 500, 70))
        return fid.measure(batches, 500, Rows(x), ["precision"], kept=100)
    got = measure()
    np.testing.assert_allclose(got["mu"], x.astype(float).mean(0), rtol=1e-13)
    np.testing.assert_allclose(got["sigma"], np.cov(x.astype(float), rowvar=False), atol=1e-12)
    kept = {tuple(row) for row in got["pool3"].tolist()}
    assert len(kept) == 100 and kept <= {tuple(row) for row in x.tolist()}
    x[77, 3] = np.nan
    with pytest.raises(encode.UserError, match="finite"):
        measure()


def test_inception_score_precision_and_recall_are_their_formulas():
    logits = torch.eye(10).repeat_interleave(1000, 0) * 30      # sorted by class, in two splits
    assert fid.inception_score(logits) == pytest.approx(10, rel=1e-3)
    p = torch.randn(400, 12).softmax(1)                         # one split
    exact = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert fid.inception_score(p.log() + 5) == pytest.approx(exact, rel=1e-5)
    a, b = torch.randn(90, 6), 1.4 * torch.randn(70, 6)
    def inside(x, y):
        radii = torch.cdist(y, y).sort().values[:, 3]
        return (torch.cdist(x, y) <= radii).any(1).double().mean().item()
    assert fid.precision_recall(a, b, block=1000) == pytest.approx((inside(a, b), inside(b, a)))
    assert 0 < inside(b, a) < 1


def measured(line, cwd):
    return json.loads(works(script(line + " --json", cwd)).splitlines()[-1])


def test_all_metrics_of_a_folder_and_of_its_saved_statistics(weights, tmp_path, monkeypatch):
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()   # the published file is not here
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", sha256)
    monkeypatch.setattr(fid, "frechet_distance",                # which takes seconds
                        lambda mu1, sigma1, mu2, sigma2: ((mu1 - mu2) ** 2).sum()
                        + abs(sigma1 - sigma2).sum())
    images, stats = encode.shapes(10)[0], tmp_path / "stats"    # written under just this name
    np.savez(tmp_path / "s.npz", arr_0=images[:5])
    draw_folder(tmp_path / "ref", each=4)
    line = f"fid.py s.npz --weights_dir {weights.parents[1]} --ref "
    first = measured(line + "ref --save_stats stats", tmp_path)
    assert (first["num_samples"], first["num_references"], first["left_out"]) == (5, 8, {})
    assert first["fid"] > 0 and first["sfid"] > 0 and 1 <= first["is"] <= 1008
    again = measured(line + "stats", tmp_path)
    assert again == first | dict(ref="stats", save_stats=None) | {
        name: pytest.approx(first[name]) for name in fid.METRICS[:5]}
    saved = dict(np.load(stats))
    assert saved["mu_s"].shape == (2023,) and saved["sigma_s"].shape == (2023, 2023)    # ADM's keys
    with open(tmp_path / "p.NPZ", "wb") as file:                # as pytorch-fid does
        np.savez(file, mu=saved["mu"], sigma=saved["sigma"])
    third = measured(line + "p.NPZ", tmp_path)
    assert third["fid"] == pytest.approx(first["fid"])
    assert set(third["left_out"]) == {"sfid", "precision", "recall"}


def test_statistics_are_refused_with_another_network_or_size(copied):
    dataset = encode.find_dataset("photos", copied / "data")
    images = np.stack([dataset.load(i, 32) for i in range(9)])
    np.savez(copied / "s.npz", arr_0=images[:6])
    np.save(copied / "s.npy", images[:6])
    line = "fid.py s.npz --features codec --metrics fid --ref "
    first = measured(line + "photos --save_stats st.npz", copied)
    assert first["network"].startswith("codec small")
    fails_clearly(script(line + "st.npz", copied), "st.npz", first["network"], "--codec")
    codec = encode.find_codec_file("small", "photos", copied / "data")
    for samples, named in (("s.npz", codec), ("s.npy", "out/photos")):      # file, checkpoint
        again = measured(line.replace("s.npz", samples) + f"st.npz --codec {named}", copied)
        assert again["fid"] == pytest.approx(first["fid"])
    statistics = dict(np.load(copied / "st.npz")) | dict(size=64)
    np.savez(copied / "st.npz", **statistics)
    fails_clearly(script(line + f"st.npz --codec {codec}", copied), "at 64 pixels")
    draw_folder(copied / "photos/test", each=3)
    fails_clearly(script(line + "photos/test", copied), "no codec small is fitted", "--codec")
    assert measured(line + "photos/test --codec out/photos", copied)["fid"] > 0
    same = works(script("fid.py s.npz --features codec --metrics fid --ref s.npy", copied))
    assert " 0.00000" in same and "-0.0" not in same


def test_labels_that_are_not_one_integer_an_image_leave_the_distance_and_no_agreement(tmp_path):
    images = encode.shapes(60)[0]
    np.savez(tmp_path / "plain.npz", arr_0=images)
    line = "fid.py s.npz --ref plain.npz --features codec --metrics fid agreement"
    for labels in (np.arange(30), np.arange(90), np.eye(10)[:60], np.array(["a"] * 60),
                   np.array(3)):
        np.savez(tmp_path / "s.npz", arr_0=images, arr_1=labels)
        values = measured(line, tmp_path)
        assert values["num_samples"] == 60 and "arr_1" in values["left_out"]["agreement"]


def test_class_agreement_tells_images_of_the_class_asked_for_from_others(tmp_path, monkeypatch):
    images, labels = encode.shapes(120, seed=5)
    monkeypatch.setattr(encode, "SHAPES_COUNT", 2500)
    wrong = np.where(np.arange(120) < 60, labels, (labels + 3) % 10)
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=wrong)
    line = "fid.py s.npz --metrics fid agreement --features classifier --ref shapes"
    values = measured(line, tmp_path)
    assert 0.4 < values["agreement"] < 0.6 and values["agreement_real"] > 0.8
    np.savez(tmp_path / "s.npz", arr_0=images[:, ::-1], arr_1=labels)
    upside_down = measured(line, tmp_path)
    assert upside_down["fid"] > values["fid"] > values["fid_real"] / 2 > 0
    draw_folder(tmp_path / "few", each=3)
    fails_clearly(script("fid.py s.npz --metrics agreement --ref few", tmp_path), "50 images")
    line = "fid.py s.npz --features classifier --ref few"
    fails_clearly(script(line, tmp_path), "--features classifier", "50 images")


# ------------------------------------------------------------------ mistakes, and README

MISTAKES = [    # a command line, and words of the line that it ends with
    ("train.py --dataset empty", "empty: no images"), ("train.py --dataset void", "void/b: images"),
    ("train.py --distill none.pt", "none.pt train.py"),
    ("train.py --distill out/photos/ckpt.pt --preset S", "out/photos/ckpt.pt --preset tiny"),
    ("train.py --distill out/photos --accumulate 2", "--accumulate --distill"),
    ("train.py --distill out/photos --warmup 9", "--warmup --distill"),
    ("train.py --distill out/photos --live", "--live --distill"),
    ("train.py --imitate_lr 1e-3", "--imitate_lr only --distill"),
    ("train.py --beta2 1", "--beta2 1"), ("train.py --seed 9223372036854775808", "--seed"),
    ("train.py --dataset photos --eval_every 4 --eval_ref one.npz --out_dir x", "one.npz fewer"),
    ("train.py --distill out/photos --max_steps 300", "--max_steps 300 --imitate_steps"),
    ("train.py --resume --init_from cut.pt --out_dir out/photos", "cut.pt --init_from"),
    ("train.py --init_from out --dataset photos", "--init_from out out/photos"),
    ("train.py --codec wide --data_dir text", "text no folder --data_dir"),
    ("train.py --max_steps 1e4", "--max_steps invalid int 1e4"),
    ("train.py --resume --distill out/photos --out_dir out/photos", "is not a distillation"),
    ("train.py --resume --dataset photos --accumulate 3", "--batch_size multiple of 3"),
    ("train.py --resume --dataset spoilt --out_dir out/photos", "has --dataset photos"),
    ("train.py --max_angle 90", "--max_angle 90"), ("train.py --init_from cut.pt", "cut.pt"),
    ("train.py --batch_size 8 --accumulate 3", "--batch_size multiple 3"),
    ("train.py --live --skip_bad", "--live --skip_bad"),
    ("train.py --out_dir text/x", "text no folder --out_dir"),
    ("encode.py --dataset nowhere", "nowhere"), ("encode.py --dataset imagenet", "imagenet put"),
    ("encode.py --dataset afhq", "dropbox.com"), ("train.py --dataset data/afhq", "call it afhq"),
    ("encode.py --reconstruct nowhere", "nowhere no such image"),
    ("encode.py --reconstruct --codec small64", "small64 --fit"),
    ("encode.py --fit --codec rae", "--fit rae small64"),
    ("encode.py --reconstruct data/photos --out x.jpg", "--out x.jpg .png"),
    ("encode.py --fit --dataset photos --out text/x.png", "text no folder --out"),
    ("sample.py --init spoilt/b/2.png", "b/2.png replace"), ("sample.py --init empty", "empty"),
    ("sample.py --init x.png", "x.png no such"), ("sample.py --init x --init_angle 91", "91"),
    ("sample.py --init_angle 30", "--init_angle --init"),
    ("sample.py --init data/photos --filmstrip angle", "--filmstrip angle --init"),
    ("sample.py --filmstrip slerp --num_images 1", "slerp two"),
    ("sample.py --pixel_loop --filmstrip", "--pixel_loop --filmstrip"),
    ("sample.py --cfg_scale -1", "--cfg_scale -1"), ("sample.py --cfg_scale 21", "--cfg_scale 21"),
    ("sample.py --steps 0", "--steps at least 1"),
    ("sample.py --classes unicorn", "unicorn one, two"),
    ("sample.py --device cuda:99", "cuda:99 auto cpu"), ("sample.py --out x.tiff", "x.tiff .png"),
    ("sample.py --filmstrip --out x.npz", "x.npz .png"),
    ("sample.py --out text/x.png", "text no folder --out"),
    ("sample.py --num_images 1 --out data/photos/one", "data/photos/one new folder"),
    ("sample.py --ckpt none.pt", "none.pt train.py"), ("sample.py --ckpt text", "text train.py"),
    ("sample.py --ckpt empty", "empty ckpt.pt train.py"),
    ("sample.py --ckpt cut.pt", "cut.pt train.py"),
    ("sample.py --ckpt other.pt", "other.pt train.py"), ("sample.py --ckpt old.pt", "old.pt 3"),
    ("fid.py good.npz", "--ref"), ("fid.py none.npz --ref good.npz", "none.npz No such file"),
    ("fid.py good.npz --ref good.npz --codec small", "--codec --features"),
    ("fid.py text --ref good.npz", "text neither npz"),
    ("fid.py float.npz --ref good.npz", "float.npz uint8 float64"),
    ("fid.py wide.npz --ref good.npz", "wide.npz square"),
    ("fid.py one.npz --ref good.npz", "one.npz fewer than 2"),
    ("fid.py mixed --ref good.npz", "mixed/a/1.png one size"),
    ("fid.py good.npz --ref nowhere", "nowhere no such folder"),
    ("fid.py good.npz --ref nan.npz", "nan.npz NaN"),
    ("fid.py good.npz --ref keys.npz", "keys.npz foo, bar"),
    ("fid.py good.npz --features codec --ref narrow.npz", "narrow.npz 3 features 32"),
    ("fid.py good.npz --features codec --ref spoilt", "spoilt --codec"),
    ("fid.py good.npz --features codec --codec other.pt --ref good.npz", "other.pt codec"),
    ("fid.py good.npz --features codec --codec out/photos --ref spoilt", "spoilt/b/2.png read"),
    ("fid.py good.npz --metrics agreement --ref good.npz", "50 images labels of the samples"),
    ("fid.py good.npz --ref good.npz --weights_dir none", f"none {fid.WEIGHTS_URL} sha256")]


@pytest.fixture(scope="session")
def mistaken(workspace, tmp_path_factory):
    folder = shutil.copytree(workspace, tmp_path_factory.mktemp("mistaken") / "copy")
    for name in ("empty", "void/b"):
        (folder / name).mkdir(parents=True)
    draw_folder(folder / "void", ("a",))
    spoil(draw_folder(folder / "spoilt", ("a", "b")) / "b/2.png")
    (folder / "text").write_bytes(b"hello")
    spoil(Path(shutil.copy(folder / "out/photos/ckpt.pt", folder / "cut.pt")))
    torch.save(dict(x=1), folder / "other.pt")
    torch.save(dict(format=3), folder / "old.pt")
    images = encode.shapes(4)[0]
    draw_folder(folder / "mixed", ("a",))
    for file in (folder / "mixed/a").iterdir():
        Image.new("RGB", (40, 40)).save(file)
    Image.new("RGB", (20, 20)).save(folder / "mixed/a/0.png")
    for name, arrays in dict(
            good=dict(arr_0=images), float=dict(arr_0=images / 255), one=dict(arr_0=images[:1]),
            wide=dict(arr_0=images[:, :9]), keys=dict(foo=1, bar=2),
            nan=dict(mu=np.full(32, np.nan), sigma=np.eye(32)),
            narrow=dict(mu=np.ones(3), sigma=np.eye(3))).items():
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


@pytest.mark.parametrize("line, words", MISTAKES)
def test_mistakes_end_in_one_clear_line(mistaken, no_network, line, words):
    fails_clearly(script(line, mistaken), *words.split())


def test_a_missing_network_is_named_before_a_classifier_is_trained(
        mistaken, no_network, monkeypatch):
    monkeypatch.setattr(fid, "train_judge", lambda *_: pytest.fail("trained it first"))
    line = "fid.py good.npz --ref shapes --metrics fid agreement --weights_dir none"
    fails_clearly(script(line, mistaken), "none", "sha256")


def test_a_home_folder_a_strange_name_and_a_stray_environment_variable_do_no_harm(
        copied, monkeypatch):
    monkeypatch.setenv("HOME", str(copied / "home"))
    works(script("sample.py --num_images 2 --out=~/a.npz", copied))
    assert (copied / "home/a.npz").exists() and not (copied / "~").exists()
    name = os.fsdecode(b"caf\xe9.png")                          # no valid UTF-8
    shutil.copy(copied / "data/photos/one/0.png", copied / name)
    works(script(f"sample.py --init {name} --out edit.png", copied))
    os.rename(copied / "data/photos/one/0.png", copied / "data/photos/one" / name)
    spoil(copied / "data/photos/one" / name)
    works(script(ENCODE + "--skip_bad", copied), "11 images", "skipped")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    works(processes("sample.py --num_images 2", copied, 1), "wrote")


def python_of_the_readme(word):
    """The block of Python in the README that holds a word."""
    [block] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
               if word in block]
    return block


def test_the_method_in_25_lines_runs_as_the_readme_has_it(tmp_path, monkeypatch):
    block = python_of_the_readme("optimizer.step")
    short = block.replace("10_000", "1_000").replace("range(400)", "range(2)")
    assert short.count("range(2)") == 1 and short.count("1_000") == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(short, "README.md", "exec"), {})
    assert Image.open("grid.png").size[0] == 10 * 100 + 4


def test_drawing_from_python_works_as_the_readme_has_it(copied, monkeypatch):
    block = python_of_the_readme("sampling_options").replace("out/shapes", "out/photos")
    monkeypatch.chdir(copied)
    names = {}
    exec(compile(block.replace("[3, 1, 4]", "[1, 1, 0]"), "README.md", "exec"), names)
    assert names["images"].shape == (3, 32, 32, 3) and names["images"].dtype == np.uint8


README = (HERE / "README.md").read_text()
GUIDE = (HERE / "assets/guide.md").read_text()


@pytest.mark.parametrize("text, folder", [(README, HERE), (GUIDE, HERE / "assets")])
def test_readme_and_guide_name_only_flags_and_files_that_exist(text, folder):
    known = {*train.Settings.__annotations__, "nproc_per_node", "nnodes", "rdzv_backend",
             "rdzv_endpoint", "shutdown_timeout", "max"}
    for name in ("encode.py", "train.py", "sample.py", "fid.py"):
        known |= set(re.findall(r'"--(\w+)"', (HERE / name).read_text()))
    flags = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z]\w+)", text))
    assert len(flags) > 10 and flags <= known, flags - known
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    scripts = re.findall(r"python (\w+\.py)", text)
    assert [name for name in linked if not (folder / name).is_file()] == []
    assert scripts and [name for name in scripts if not (HERE / name).is_file()] == []
