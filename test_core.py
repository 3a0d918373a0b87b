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
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn as nn
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import encode
import fid
import model
import sample
import train

torch.set_num_threads(1)
model.PRESETS["tiny"].update(width=64, depth=2)                     # for speed, also in processes
HERE = Path(__file__).parent
CPU = torch.device("cpu")
TINY = dict(tokens=16, channels=32, num_classes=3, width=32, depth=2, heads=2)
ENCODE = "encode.py --dataset photos --workers 1 "
TRAIN = ("train.py --dataset photos --workers 1 --batch_size 8 --log_every 4 --save_every 4 "
         "--max_steps 12 ")
AGAIN = TRAIN + "--out_dir out/again "

# --------------------------------------------------------------------------------------- helpers

def processes(line, cwd, count=2, patch=""):
    """Run a command line in processes of their own, after a patch: (exit status, their text)."""
    name, *args = line.split()
    (cwd / f"patched_{name}").write_text(
        f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport encode, model, torch\n"
        f"model.PRESETS['tiny'] = {model.PRESETS['tiny']}\nimport {name[:-3]} as script\n{patch}\n"
        "encode.run(script.main)\n")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    done = subprocess.run([sys.executable, *launch * (count > 1), f"patched_{name}", *args],
                          cwd=cwd, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return done.returncode, done.stdout

def script(line, cwd):
    """Run a command line in this process, which saves importing torch: (status, its text)."""
    text = io.StringIO()
    name, *args = line.split()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text),
          contextlib.redirect_stderr(text)):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *args])
        patch.setattr(signal, "signal", lambda *_: None)
        try:
            encode.run(sys.modules[name.removesuffix(".py")].main)
        except SystemExit as error:
            print(error.code)
            return 1, text.getvalue()
    return 0, text.getvalue()

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
    return Path(shutil.copytree(workspace, tmp_path / "copy"))

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
    header, *rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    return [dict(zip(header, map(float, row), strict=True)) for row in rows]

def load(path):
    return torch.load(path, weights_only=True)

def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

def assert_same_curve(one, two, rel=1e-3):
    """Two runs' logs agree up to rounding, but for their speed."""
    for a, b in zip(read_log(one), read_log(two), strict=True):
        speed = dict(images_per_s=0, seconds=0)
        assert a | speed == pytest.approx(b | speed, rel=rel, abs=1e-9, nan_ok=True)

# -------------------------------------------------------------------------------------- model.py

def test_rotation_stays_on_the_sphere_and_turns_by_exactly_the_angle():
    z, noise = model.to_sphere(torch.randn(5, 16, 32).bfloat16() * 7), torch.randn(5, 16, 32) * 3
    angle = torch.tensor([0.0, 0.3, 1.0, 1.5, math.pi / 2])
    v = model.rotate(z, noise, angle)
    for x in (z, v):
        assert_close(x.pow(2).mean((1, 2)), torch.ones(5), rtol=1e-5, atol=1e-5)
    assert_close((v * z).mean((1, 2)), angle.cos(), rtol=0, atol=1e-5)
    e = model.to_sphere(noise - z * (z * noise).mean((1, 2), keepdim=True))     # orthogonal
    added = model.to_sphere(z + math.tan(1.2) * e)
    assert_close(model.rotate(z, noise, 1.2), added, rtol=1e-4, atol=1e-5)
    plain = z[:4] + angle[:4].tan()[:, None, None] * noise[:4]
    assert_close(model.rotate(z[:4], noise[:4], angle[:4], sphere=False), plain)

def test_the_tangents_of_noise_angles_are_logit_normal():
    u = (torch.arange(10_000) + 0.5) / 10_000
    r = model.noise_angle(u, 80.0, mean=0.5, std=2.0).tan() / math.tan(math.radians(80))
    logit = torch.log(r.double() / (1 - r.double()))
    assert abs(logit.mean() - 0.5) < 0.01 and abs(logit.std() - 2.0) < 0.02
    assert model.noise_angle(torch.tensor([0.0, 1.0]), 80.0).isfinite().all()

def test_the_largest_angle_leaves_one_signal_to_noise_ratio_also_in_more_dimensions():
    torch.manual_seed(0)
    z = torch.randn(400, 16, 32)
    signal = model.to_sphere(z) / 512 ** 0.5                        # unit vectors
    for channels in (32, 768):                                      # embedded isometrically
        basis = torch.linalg.qr(torch.randn(channels, 32))[0].T
        angle = math.radians(model.largest_angle(16, channels))
        v = model.rotate(z @ basis, torch.randn(400, 16, channels), angle) @ basis.T
        along = (v * signal).sum((1, 2), keepdim=True)
        assert along.mean() / (v - along * signal).std() == pytest.approx(4.8, rel=0.03)

def test_xl_has_the_released_size_and_flops_are_those_that_torch_counts():
    with torch.device("meta"):
        state = model.Denoiser(model.ModelConfig(**model.PRESETS["XL"])).state_dict()
    assert len(state) == 401 and sum(t.numel() for t in state.values()) == 675_160_896
    config = model.ModelConfig(**TINY | dict(tokens=64, channels=48, width=64, depth=3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.Denoiser(config)(torch.randn(1, 64, 48), torch.tensor([1]))
    assert counter.get_total_flops() == model.flops(config)

def test_denoiser_starts_at_zero_and_sees_class_place_and_all_tokens():
    z, y, denoiser = torch.randn(2, 16, 32), torch.tensor([0, 1]), random_denoiser()
    out = denoiser(z, y)
    assert not model.Denoiser(model.ModelConfig(**TINY))(z, y).any()
    assert (denoiser(z, torch.tensor([2, 3])) - out).abs().max() > 1e-3         # class, and none
    assert (denoiser(z.flip(1), y).flip(1) - out).abs().max() > 1e-3            # position
    moved = torch.cat([z[:, :1] + 1, z[:, 1:]], dim=1)
    assert ((denoiser(moved, y) - out).abs().amax(2) > 1e-6).all()              # attention
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in denoiser.parameters())

def test_losses_are_the_papers_two_terms_and_send_gradient_where_they_say():
    denoiser = random_denoiser()
    z, noise = model.to_sphere(torch.randn(4, 16, 32)), torch.randn(4, 16, 32)
    y, angle, share = torch.arange(4), torch.full((4,), 1.2), torch.full((4,), 0.8)
    got = model.losses(denoiser, z, y, noise, angle, share, 0.3)
    out = denoiser(model.rotate(z, noise, angle), y)
    with torch.no_grad():
        target = denoiser(model.rotate(z, noise, math.atan(0.4 * math.tan(1.2))), y)
    terms = (out - z).pow(2).mean((1, 2)), (out - target).pow(2).mean((1, 2))
    want = terms[0] + 0.3 * terms[1], *terms
    assert_close(got, want)
    weights = list(denoiser.parameters())
    assert_close(torch.autograd.grad(got[0].sum(), weights),
                 torch.autograd.grad(want[0].sum(), weights), rtol=1e-3, atol=1e-6)

def test_distribution_matching_moves_images_from_fake_to_real_and_teaches_fake():
    judged = model.Distillation(random_denoiser())
    nn.init.normal_(judged.fake.out.weight)
    noise, new_noise, y = torch.randn(4, 16, 32), torch.randn(4, 16, 32), torch.arange(4)
    angle = torch.full((4,), 1.2)
    got = model.distribution_matching(judged, noise, y, new_noise, angle, None, 2.0)
    x = judged.generator(model.to_sphere(noise), y)
    v = model.rotate(x.detach(), new_noise, angle)
    fake, null = judged.fake(v, y), judged.real(v, torch.full_like(y, 3))
    real = null + 2 * (judged.real(v, y) - null)
    away = ((fake - real) / (x - real).abs().mean((1, 2), keepdim=True)).detach()
    denoising = (fake - x.detach()).pow(2).mean((1, 2))
    assert_close(got[1:], (denoising, away.pow(2).mean((1, 2)) / 2))
    got[0].sum().backward()
    weights = [*judged.generator.parameters(), *judged.fake.parameters()]
    want = torch.autograd.grad((x * away).mean((1, 2)).sum() + denoising.sum(), weights)
    assert_close([weight.grad for weight in weights], list(want), rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize("steps, unguided, options", [
    (4, 4, {}), (1, 0, dict(cfg_scale=3.0)), (4, 0, dict(cfg_scale=3.0, same_noise=True)),
    (4, 1, dict(cfg_scale=3.0, cfg_skip=1)), (4, 2, dict(cfg_scale=3.0, cfg_skip=9)),
    (2, 0, dict(cfg_scale=3.0, cfg_skip=1)), (3, 3, dict(between=torch.neg))])
def test_generate_predicts_turns_back_and_predicts_again(steps, unguided, options):
    denoiser, y = random_denoiser(max_angle=60.0), torch.tensor([0, 1, 2])
    noise, between = torch.randn(steps, 3, 16, 32), options.get("between", torch.clone)
    x, expected = torch.zeros(3, 16, 32), []
    for k in range(steps):
        e = noise[0 if options.get("same_noise") else k]
        angle = math.atan((1 - k / steps) ** 1.5 * math.tan(math.radians(60)))
        v = model.rotate(between(x), e, angle) if k else model.to_sphere(e)
        if k and options.get("same_noise"):                         # e and x are not orthogonal
            v = model.to_sphere(model.to_sphere(x) + math.tan(angle) * model.to_sphere(e))
        with torch.no_grad():
            x, null = denoiser(v, y), denoiser(v, torch.full_like(y, 3))
        x = x if k < unguided else null + 3 * (x - null)
        expected.append(x)
    got = model.generate(denoiser, y, steps, noise=noise, return_all=True, **options)
    assert_close(got, torch.stack(expected))

def test_an_edit_starts_from_the_image_turned_by_its_angle_and_takes_the_steps_below_it():
    denoiser, y = random_denoiser(max_angle=80.0), torch.tensor([0, 1, 2])
    noise, z = torch.randn(4, 3, 16, 32), torch.randn(3, 16, 32)
    edit = functools.partial(model.generate, denoiser, y, 4, noise=noise, init=z, return_all=True)
    for angle, taken in ((0, 1), (30, 1), (60, 2), (74, 3), (90, 4)):       # 35, 63 and 75 degrees
        v = model.rotate(z, noise[4 - taken], math.radians(angle))
        got = edit(init_angle=angle)
        assert len(got) == taken
        assert_close(got[0], denoiser(v, y), rtol=1e-3, atol=1e-4)

# ------------------------------------------------------------------------------------ encode.py

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
    upright, exif = Image.new("RGB", (32, 32), "red"), Image.Exif()
    upright.paste("blue", (0, 16, 32, 32))
    exif[0x0112] = 6                                                # turn by 270 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "exif.jpg", exif=exif)
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

def test_folder_datasets_keep_class_names_and_ignore_what_is_no_image(tmp_path):
    folder = draw_folder(tmp_path / "data/pets/train", ("cat", "a dog"), each=3)
    (folder / "cat/notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    dataset = encode.find_dataset(str(folder), tmp_path / "data")
    assert dataset.classes == ["a dog", "cat"] and dataset.name == "pets-train"
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(dataset) == 6
    assert np.array_equal(dataset.load(7, 32), dataset.load(1, 32)[:, ::-1])        # mirrored

def test_a_folder_of_images_alone_is_one_class_and_mixtures_are_refused(tmp_path):
    folder = draw_folder(tmp_path / "data", ("pets",), each=3) / "pets"
    (folder / "photo.HEIC").write_bytes(b"not for Pillow")
    line = "train.py --dataset pets --batch_size 4 --max_steps 20 --fit_steps 1"
    works(script(line, tmp_path), "photo.HEIC for one", "fitting a codec to 3 images")
    checkpoint, rows = load(tmp_path / "out/pets/ckpt.pt"), read_log(tmp_path / "out/pets")
    assert checkpoint["classes"] == ["pets"] and checkpoint["settings"]["cfg_scale"] == 1
    assert [row["step"] for row in rows] == list(range(2, 21, 2))
    draw_folder(folder, ("cat",))
    fails_clearly(script("encode.py --dataset pets", tmp_path), "pets/0.png", "cat")

def psnr(codec, images):
    error = (codec.decode(codec.encode(images)) - images).pow(2).mean((1, 2, 3))
    return -10 * error.log10().mean().item()

def test_shipped_codec_reconstructs_unseen_shapes_by_latents_on_the_sphere():
    codec, images = encode.load_codec("small"), encode.to_float(encode.shapes(200, seed=123)[0])
    z = codec.encode(images)
    assert z.shape == (200, *codec.latent_shape) and not codec.training
    assert_close(z, model.to_sphere(z))
    assert psnr(codec, images) > 30

def test_fitting_learns_also_the_larger_codec_and_ctrl_c_keeps_what_there_is(monkeypatch):
    images = encode.shapes(100)[0].repeat(2, 1).repeat(2, 2)
    worse, better = (encode.fit_codec(images, "small64", n, batch_size=8) for n in (1, 20))
    assert better.image_size == 64 and better.latent_shape == (64, 32)
    assert psnr(better, encode.to_float(images)) > psnr(worse, encode.to_float(images)) + 1
    z = torch.randn(8, 64, 32)
    monkeypatch.setattr(encode, "rotate", mock.Mock(side_effect=[z, z, KeyboardInterrupt]))
    assert not encode.fit_codec(images, "small64", 99, batch_size=8).training

def test_cache_holds_the_latents_of_the_images_and_of_their_mirrored_views(copied):
    works(script(ENCODE + "--flip", copied), "24 images")
    dataset = encode.find_dataset("photos", copied / "data")          # its caches are no classes
    plain, flipped = caches(copied)
    assert plain.classes == ["one", "two"] and plain.labels.tolist() == dataset.labels.tolist()
    assert flipped.labels.tolist() == plain.labels.tolist() * 2
    assert torch.equal(flipped.read(np.arange(12)), plain.read(np.arange(12)))
    images = np.stack([dataset.load(3, 32), dataset.load(0, 32), dataset.load(11, 32)[:, ::-1]])
    codec = encode.load_codec("small", encode.codec_path("small", "photos", copied / "data"))
    latents = flipped.read(np.array([3, 0, 23]))
    assert latents.dtype == torch.float16
    assert_close(latents.float(), codec.encode(encode.to_float(images)), rtol=1e-2, atol=2e-3)

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
    assert [file.name for file in folder.iterdir()] == ["000000.npy"]       # no index, nothing half
    works(script(ENCODE, copied), "12 images", "complete")
    assert written == [5, 5, 5, 2]

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
    for line in (ENCODE, AGAIN + "--live"):
        fails_clearly(script(line, copied), "photos/one/2.png", "--skip_bad")
    works(script(ENCODE + "--skip_bad", copied), "11 images", "1 unreadable", "one/2.png")
    works(script(AGAIN + "--skip_bad", copied), "11 images")
    works(script(AGAIN + "--skip_bad --live", copied), "skipped data/photos/one/2.png")

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
    decoder["surplus"] = torch.zeros(1)                             # RAE's own code ignores it, too
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
        w[name] *= 1e-3                                             # an eps of 1e-6 would show
    net.load_state_dict(w)
    image = net(torch.tensor(random.standard_normal((1, 9, 10))) * 1e-3)[0]
    pinned = [0.922671, 0.184827, 0.724542, 1.124162]               # by nn.TransformerEncoderLayer
    values = image[[0, 1, 2, 0], [0, 5, 11, 3], [0, 2, 7, 9]].tolist()
    assert image.shape == (3, 12, 12) and values == pytest.approx(pinned, abs=1e-5)

def test_rae_encodes_and_decodes_by_the_published_formulas(hub):
    codec, images = encode.load_codec("rae"), torch.rand(2, 3, 256, 256)
    z = codec.encode(images)
    assert codec.latent_shape == (256, 768) and codec.image_size == 256 and not codec.training
    encoder, stat = (load(hub / "checkpoints" / name) for name in list(WEIGHTS)[:2])
    scale = (stat["var"] + 1e-5).sqrt()                             # (C, 16, 16)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    x = nn.functional.interpolate(images, (224, 224), mode="bicubic", align_corners=False)
    x = nn.functional.conv2d((x - mean) / std, encoder["patch.weight"], encoder["patch.bias"], 14)
    x = x - x.mean(1, keepdim=True)                                 # the norm has no weights
    x = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    assert_close(z, (x / scale).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    y = codec.decoder(x.flatten(2).transpose(1, 2)) * std + mean
    assert_close(codec.decode(z), y.clamp(0, 1), rtol=1e-4, atol=1e-4)
    torch.save(stat | dict(mean=torch.ones(768, 16, 16)), hub / "checkpoints" / list(WEIGHTS)[1])
    shifted, expected = encode.load_codec("rae"), z - (1 / scale).flatten(1).T
    assert_close(shifted.encode(images), expected, rtol=1e-3, atol=1e-3)
    assert_close(shifted.decode(expected), codec.decode(z), rtol=1e-3, atol=1e-3)

def test_missing_damaged_or_other_weights_are_named_with_address_and_place(hub, tmp_path):
    Image.new("RGB", (300, 260)).save(tmp_path / "x.jpg")
    line = f"encode.py --reconstruct x.jpg --codec rae --weights_dir {hub}"
    works(script(line, tmp_path))
    for name, url in WEIGHTS.items():
        file = hub / "checkpoints" / name
        whole = spoil(file)
        fails_clearly(script(line, tmp_path), file, url, "delete")
        torch.save(dict(nothing=torch.zeros(3)), file)
        fails_clearly(script(line, tmp_path), file, url, "delete")
        file.unlink()
        fails_clearly(script(line, tmp_path), file, url)
        file.write_bytes(whole)
    (hub / "facebookresearch_dinov2_main/hubconf.py").unlink()
    fails_clearly(script(line, tmp_path), hub / "facebookresearch_dinov2_main", encode.COMMIT)

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
    line = "fid.py s.npz --ref flowers --features codec --codec rae"
    works(script(line, tmp_path), "Frechet distance of rae codec features")
    stat = dict(mean=None, var=torch.rand(768, 16, 16) + 1)
    torch.save(stat, hub / "checkpoints" / list(WEIGHTS)[1])
    fails_clearly(script("sample.py", tmp_path), "rae", "other weights")

# -------------------------------------------------------------------------- train.py, sample.py

def test_training_lowers_the_loss_and_writes_checkpoint_log_and_grids(copied):
    text = works(script(AGAIN + "--max_steps 60 --lr 3e-3 --warmup 5", copied))
    out, first = copied / "out/again", read_log(copied / "out/photos")[0]
    last = read_log(out)[-1]
    assert "python sample.py" in text and last["step"] == 60
    assert last["reconstruction"] < 0.6 * first["reconstruction"]
    bins = [first[name] for name in first if name.startswith("loss_")]      # of the noise's law
    assert len(bins) == 6 and np.mean(bins) == pytest.approx(first["reconstruction"], rel=0.05)
    assert Image.open(out / "samples/step_000060.png").width > 64
    curve = np.asarray(Image.open(out / "curve.png"))
    assert curve.shape == (400, 800, 3) and len(np.unique(curve.reshape(-1, 3), axis=0)) > 6
    checkpoint = load(out / "ckpt.pt")
    assert checkpoint["step"] == 60 and list(checkpoint["model"]) == list(checkpoint["ema"])
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in checkpoint["model"])
    (out / "notes").touch()
    works(script(AGAIN + "--max_steps 4", copied), "earlier_")      # nothing of a run is lost
    assert (out / "notes").exists() and load(*out.glob("earlier_*/ckpt.pt"))["step"] == 60

DISTILL = "--distill out/photos/ckpt.pt "

@pytest.mark.parametrize("names, flags", [      # Slurm sends two signals
    ("SIGINT", ""), ("SIGKILL", ""), ("SIGTERM SIGTERM", "--live"), ("SIGKILL", DISTILL)])
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(copied, names, flags):
    if flags == DISTILL:
        shutil.rmtree(copied / "data")                              # needs no images
        works(script(TRAIN + flags + "--out_dir out/whole", copied))
    else:
        shutil.copytree(copied / "out/photos", copied / "out/whole")
    status, text = processes(AGAIN + flags, copied, 1, f"""import signal
step = script.train_step
def signalling(ddp, ema, optimizer, now, *more):
    for name in {names.split()} * (now == 5):
        os.kill(os.getpid(), signal.Signals[name])
    return step(ddp, ema, optimizer, now, *more)
script.train_step = signalling""")
    if names == "SIGKILL":
        assert status == -signal.SIGKILL and load(copied / "out/again/ckpt.pt")["step"] == 4
    else:
        works((status, text), "stopped at step 6", "--out_dir out/again", "--resume")
    works(script(AGAIN + flags + " --resume", copied))
    a, b = ([c["step"], c["model"], c["ema"], *(one["state"] for one in c["optimizers"])]
            for c in map(load, (copied / "out/again/ckpt.pt", copied / "out/whole/ckpt.pt")))
    assert_close(a, b, rtol=0, atol=0)
    assert_same_curve(copied / "out/again", copied / "out/whole", rel=0)

@pytest.mark.parametrize("flags", ["--consistency_weight 0.5 ", DISTILL])
def test_two_processes_train_as_one_does_and_end_equal(copied, flags):
    works(script(AGAIN + flags, copied))
    works(processes(TRAIN + flags + "--out_dir out/two", copied, patch="""
made, make, main = [], script.make_model, script.main
def make_model(*args):
    made.extend(make(*args))
    made[0].compile(backend="aot_eager_decomp_partition")           # as DDP sees compiled models
    return made
def main_and_save():
    main()
    torch.save([made[0].state_dict(), made[2].state_dict()], "rank" + os.environ["RANK"])
script.make_model, script.main = make_model, main_and_save"""), "2 x cpu")
    assert_same_curve(copied / "out/again", copied / "out/two")
    for first, second in zip(load(copied / "rank0"), load(copied / "rank1"), strict=True):
        assert equal(first.values(), second.values())

def test_distilled_checkpoints_are_sampled_in_one_unguided_pass(copied):
    works(script("train.py --max_steps 2 --batch_size 4 " + DISTILL, copied), "0 images")
    path = copied / "out/photos-distilled/ckpt.pt"
    works(script(f"sample.py --ckpt {path} --num_images 2", copied), "NFE 1", "'steps': 1")
    works(script("sample.py --ckpt out/photos --cfg_skip 1", copied), "NFE 7")      # 2 * 4 - 1
    assert list(load(path)["model"]) == list(load(copied / "out/photos/ckpt.pt")["model"])
    fails_clearly(script(f"train.py --distill {path}", copied), path, "already")

@pytest.mark.parametrize("flags, way", [
    ("", "--accumulate 4"), ("", "--live"), ("--flip", "--live")])
def test_parts_and_live_encoding_follow_the_curve_of_the_cached_batch(copied, flags, way):
    works(script(f"{TRAIN} {flags} --out_dir out/plain", copied))
    works(script(f"{AGAIN} {flags} {way}", copied))
    assert_same_curve(copied / "out/plain", copied / "out/again")

def test_batches_go_through_every_image_once_an_epoch_in_an_order_of_their_own():
    seen = np.concatenate([train.batch_indexes(10, 4, step, seed=0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert not np.array_equal(seen[:4], train.batch_indexes(10, 4, 0, seed=1))

def test_muon_stays_in_float32_on_cpus(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda _: pytest.fail("slow without AMX"))
    config, settings = model.ModelConfig(**TINY), train.settings_of({})
    net, _, _, (muon, _) = train.make_model(config, settings, [], None, CPU, None, "off")
    weight = net.blocks[0].mlp.w1.weight
    before, weight.grad = weight.detach().clone(), torch.randn(weight.shape)
    muon.step()
    assert (weight - before).square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.4)

def test_steps_that_are_not_finite_are_skipped_and_ten_end_the_run(copied, monkeypatch):
    bad_steps, step = [5], train.train_step
    def watched_step(ddp, ema, optimizers, number, s, batch, context):
        bad = number in bad_steps
        batch = batch[0] * (math.nan if bad else 1), *batch[1:]
        moments = [x for one in optimizers for state in one.state.values() for x in state.values()]
        before = [x.clone() for x in (*ddp.parameters(), *moments)]
        result = step(ddp, ema, optimizers, number, s, batch, context)
        assert equal(before, [*ddp.parameters(), *moments]) == bad
        return result
    monkeypatch.setattr(train, "train_step", watched_step)
    works(script(AGAIN, copied), "1 skipped")
    assert [row["skipped"] for row in read_log(copied / "out/again")] == [0, 1, 0]
    bad_steps += range(6, 15)
    fails_clearly(script(AGAIN + "--max_steps 30", copied), "for 10 steps", "--resume --lr")
    assert load(copied / "out/again/ckpt.pt")["step"] == 4          # from before the bad steps
    bad_steps.clear()
    works(script(AGAIN + "--resume --lr 1e-4", copied))

def test_settings_given_on_resuming_take_effect_or_are_refused(copied):
    path = copied / "out/photos/ckpt.pt"
    line = TRAIN + "--resume --max_steps 14 "
    works(script(line + "--weight_decay 0.5", copied))
    groups = [group for one in load(path)["optimizers"] for group in one["param_groups"]]
    assert [group["weight_decay"] for group in groups] == [0.5] * 2
    fails_clearly(script(line + "--preset S", copied), "ckpt.pt", "--preset tiny")
    [_] = works(script(TRAIN + "--resume --max_steps 8", copied), "nothing is left").splitlines()

def test_fine_tuning_starts_from_the_weights_the_codec_and_the_rows_of_known_classes(copied):
    draw_folder(copied / "data/others", ("three", "two"))
    line = "train.py --dataset others --init_from out/photos/ckpt.pt --batch_size 4 --max_steps 1 "
    works(script(line + "--lr 0", copied), "of 2 classes (1 known to out/photos/ckpt.pt)")
    old, new = (load(copied / f"out/{name}/ckpt.pt") for name in ("photos", "others"))
    assert new["codec"]["fingerprint"] == old["codec"]["fingerprint"]
    weights = {name: (old["ema"][name], new["model"][name]) for name in old["ema"]}
    before, after = weights.pop("classes.weight")                   # one, two, none
    assert all(torch.equal(*pair) for pair in weights.values())
    assert equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])
    fails_clearly(script(line + "--codec small64", copied), "photos/ckpt.pt", "--codec small")
    fails_clearly(script("sample.py --ckpt out/photos --classes THREE", copied),
                  "three: out/photos/ckpt.pt knows one, two; try --ckpt out/others/ckpt.pt")

def test_full_disk_keeps_the_old_file_and_bugs_get_their_traceback(tmp_path, monkeypatch):
    path, real = tmp_path / "ckpt.pt", open
    encode.write_file(path, lambda file: file.write(b"old"))
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, *mode: real("/dev/full", *mode))
        with pytest.raises(SystemExit, match="ckpt.pt.*No space left"):
            encode.run(lambda: encode.write_file(path, lambda file: torch.save(dict(
                x=torch.zeros(100_000)), file)))
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError):
        encode.run(lambda: os.remove("nowhere"))                    # a bug

def test_sample_writes_grids_npz_and_folder_with_classes_in_equal_numbers(copied):
    for flags in ("--out a.npz", "--out folder", "", "--cfg_scale 3", "--cfg_skip 0", "--steps 1",
                  "--same_noise", "--dtype bfloat16", "--classes Two"):
        works(script(f"sample.py --num_images 6 {flags}", copied), "wrote")
    assert len(list((copied / "out/photos").glob("grid*.png"))) == 7        # one each
    images, labels = np.load(copied / "a.npz").values()
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1] * 3
    assert fid.open_set(copied / "folder")[0].labels.tolist() == [0, 1] * 3
    for i, image in enumerate(images):
        assert np.array_equal(Image.open(copied / f"folder/{i:06d}.png"), image)

def test_two_processes_make_the_very_images_that_one_makes(copied):
    line = "sample.py --num_images 11 --batch_size 3 --out "        # the last batch is short
    text = works(processes(line + "two.npz", copied))
    assert text.count("wrote two.npz") == 1
    works(script(line + "one.npz", copied))
    assert (copied / "one.npz").read_bytes() == (copied / "two.npz").read_bytes()
    works(script(line + "all.npz --batch_size 99", copied))
    works(script(line + "other.npz --seed 1", copied))
    one, whole, other = (np.load(copied / f"{name}.npz")["arr_0"].astype(int)
                         for name in ("one", "all", "other"))
    assert np.abs(one - whole).max() <= 1 < np.abs(one - other).max()       # rounds by batch size

def test_benches_print_rates_and_shares(copied):
    text = works(script("sample.py --bench --batch_size 2 --steps 6 --cfg_scale 1", copied))
    assert float(re.search(r"([\d.]+) times the time", text)[1]) > 1.5      # five trips to pixels
    text = works(processes("train.py --bench --batch_size 4", copied))
    assert re.search(r"tiny x 2: \d+.\d+ images/s, .* TFLOP/s each", text)

def test_filmstrips_show_steps_guidance_angles_and_the_way_between_samples(workspace):
    checkpoint = sample.load_checkpoint(workspace / "out/photos/ckpt.pt")
    nets = sample.load_model(checkpoint), sample.load_codec_of(checkpoint)
    def draw(**options):
        [images] = sample.sample_batches(*nets, torch.tensor([0, 1, 1]), 3, CPU, **options)
        return images.astype(int)
    last, way = draw(), draw(view=sample.walk_to_the_next, values=[0, 0.5, 1])
    noisy, seen = draw(view=sample.turn_towards_noise, values=range(0, 91, 30))
    for one, other in (last, noisy[0]), (way[0], np.roll(way[-1], 1, 0)):
        assert np.abs(one - other).max() <= 1 < np.abs(noisy[3] - seen[3]).max()
    for kind, size in dict(steps=(4, 2), guidance=(6, 2), angle=(7, 4), slerp=(6, 2)).items():
        works(script(f"sample.py --filmstrip {kind} --out strip.png", workspace))
        assert Image.open(workspace / "strip.png").size == (size[0] * 100 + 4, size[1] * 112 + 4)

def test_images_are_edited_by_class_and_angle_or_joined_by_slerp(copied):
    line = "sample.py --init data/photos/one/0.png data/photos/two --out edit.png "
    works(script(line + "--init_angle 0 60 90 --classes one two", copied), "14 images")
    grid = np.asarray(Image.open(copied / "edit.png"))              # 7 images, two classes
    original = encode.center_crop(encode.load_image(copied / "data/photos/two/5.png"), 32)
    assert grid.shape == (14 * 112 + 4, 4 * 100 + 4, 3)
    assert np.array_equal(grid[4 + 112 * 13:, 4:][:96:3, :96:3], original)
    assert not np.array_equal(grid[:112, 100:200], grid[:112, 300:400])
    works(script(line + "--filmstrip slerp", copied))
    assert Image.open(copied / "edit.png").size == (6 * 100 + 4, 7 * 112 + 4)

# ---------------------------------------------------------------------------------------- fid.py

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
                  logits=[-9.88275, 3.69112, -38.27039])            # by torch-fidelity
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

def test_streamed_moments_are_those_of_the_whole_set():
    x = np.random.default_rng(0).standard_normal((500, 30)).astype(np.float32) + 5
    def measure():
        return fid.measure(np.split(np.arange(500), range(70, 500, 70)), 500, kept=100,
                           extract=lambda rows: dict(pool3=torch.from_numpy(x[rows])),
                           metrics=["precision"])
    got = measure()
    np.testing.assert_allclose(got["mu"], x.astype(float).mean(0), rtol=1e-13)
    np.testing.assert_allclose(got["sigma"], np.cov(x.astype(float), rowvar=False), atol=1e-12)
    kept = {tuple(row) for row in got["pool3"].tolist()}
    assert len(kept) == 100 and kept <= {tuple(row) for row in x.tolist()}
    x[77, 3] = np.nan
    with pytest.raises(encode.UserError, match="finite"):
        measure()

def test_inception_score_precision_and_recall_are_their_formulas():
    logits = torch.eye(10).repeat_interleave(1000, 0) * 30          # sorted by class, in two splits
    assert fid.inception_score(logits) == pytest.approx(10, rel=1e-3)
    p = torch.randn(400, 12).softmax(1)                             # one split
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
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()       # the published file isn't here
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", sha256)
    images, stats = encode.shapes(10)[0], tmp_path / "stats.npz"
    np.savez(tmp_path / "s.npz", arr_0=images[:5])
    draw_folder(tmp_path / "ref", each=4)
    line = f"fid.py s.npz --weights_dir {weights.parents[1]} --ref "
    first = measured(line + "ref --save_stats stats.npz", tmp_path)
    assert (first["num_samples"], first["num_references"], first["left_out"]) == (5, 8, {})
    assert first["fid"] > 0 and first["sfid"] > 0 and 1 <= first["is"] <= 1008
    again = measured(line + "stats.npz", tmp_path)
    assert again == first | dict(ref="stats.npz", save_stats=None) | {
        name: pytest.approx(first[name]) for name in fid.METRICS[:5]}
    saved = dict(np.load(stats))
    assert saved["mu_s"].shape == (2023,) and saved["sigma_s"].shape == (2023, 2023)    # ADM's keys
    np.savez(stats, mu=saved["mu"], sigma=saved["sigma"])           # as pytorch-fid does
    third = measured(line + "stats.npz", tmp_path)
    assert third["fid"] == pytest.approx(first["fid"])
    assert set(third["left_out"]) == {"sfid", "precision", "recall"}

def test_class_agreement_tells_images_of_the_class_asked_for_from_others(tmp_path, monkeypatch):
    images, labels = encode.shapes(120, seed=5)
    monkeypatch.setattr(encode, "SHAPES_COUNT", 2500)
    wrong = np.where(np.arange(120) < 60, labels, (labels + 3) % 10)
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=wrong)
    values = measured("fid.py s.npz --metrics agreement --ref shapes", tmp_path)
    assert 0.4 < values["agreement"] < 0.6
    draw_folder(tmp_path / "few", each=3)
    fails_clearly(script("fid.py s.npz --metrics agreement --ref few", tmp_path), "50 images")

# -------------------------------------------------------------------------- mistakes, and README

MISTAKES = [    # a command line, and words of the line that it ends with
    ("train.py --dataset empty", "empty: no images"), ("train.py --dataset void", "void/b: images"),
    ("train.py --distill none.pt", "none.pt train.py"),
    ("train.py --distill out/photos/ckpt.pt --preset S", "out/photos/ckpt.pt --preset tiny"),
    ("train.py --max_angle 90", "--max_angle 90"), ("train.py --init_from cut.pt", "cut.pt"),
    ("train.py --batch_size 8 --accumulate 3", "--batch_size multiple 3"),
    ("encode.py --dataset nowhere", "nowhere"), ("encode.py --dataset imagenet", "imagenet put"),
    ("encode.py --dataset afhq", "dropbox.com"), ("train.py --dataset data/afhq", "call it afhq"),
    ("encode.py --reconstruct nowhere", "nowhere no such image"),
    ("sample.py --init spoilt/b/2.png", "b/2.png fix"), ("sample.py --init empty", "empty"),
    ("sample.py --init x.png", "x.png no such"), ("sample.py --init x --init_angle 91", "91"),
    ("sample.py --cfg_scale -1", "--cfg_scale -1"), ("sample.py --cfg_scale 21", "--cfg_scale 21"),
    ("sample.py --steps 0", "--steps 0"), ("sample.py --classes unicorn", "unicorn one, two"),
    ("sample.py --device cuda:99", "cuda:99 auto cpu"), ("sample.py --out x.jpg", "x.jpg .png"),
    ("sample.py --filmstrip --out x.npz", "x.npz .png"), ("train.py --resume --out_dir x", "x/"),
    ("sample.py --num_images 1 --out data/photos/one", "data/photos/one new folder"),
    ("sample.py --ckpt none.pt", "none.pt train.py"), ("sample.py --ckpt text", "text train.py"),
    ("sample.py --ckpt cut.pt", "cut.pt train.py"),
    ("sample.py --ckpt other.pt", "other.pt train.py"), ("sample.py --ckpt old.pt", "old.pt 3"),
    ("fid.py good.npz", "--ref"), ("fid.py none.npz --ref good.npz", "none.npz No such file"),
    ("fid.py float.npz --ref good.npz", "float.npz uint8"),
    ("fid.py wide.npz --ref good.npz", "wide.npz square"),
    ("fid.py one.npz --ref good.npz", "one.npz fewer than 2"),
    ("fid.py mixed --ref good.npz", "mixed one size"),
    ("fid.py good.npz --ref nowhere", "nowhere no such folder"),
    ("fid.py good.npz --ref nan.npz", "nan.npz NaN"),
    ("fid.py good.npz --ref keys.npz", "keys.npz foo, bar"),
    ("fid.py good.npz --features codec --ref narrow.npz", "narrow.npz 3 features 32"),
    ("fid.py good.npz --features codec --ref spoilt", "spoilt --codec_dataset"),
    ("fid.py good.npz --features codec --codec_dataset shapes --ref spoilt", "spoilt/b/2.png read"),
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

def test_readme_names_only_flags_and_files_that_exist():
    text = (HERE / "README.md").read_text()
    known = {*train.Settings.__annotations__, "nproc_per_node", "nnodes", "rdzv_backend",
             "rdzv_endpoint", "shutdown_timeout"}
    for name in ("encode.py", "train.py", "sample.py", "fid.py"):
        known |= set(re.findall(r'"--(\w+)"', (HERE / name).read_text()))
    flags = set(re.findall(r"(?<![\w-])--([a-z]\w+)", text))
    assert len(flags) > 15 and flags <= known, flags - known
    files = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r"python (\w+\.py)", text)
    assert len(files) > 6 and [name for name in files if not (HERE / name).is_file()] == []
