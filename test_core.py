"""What the project promises, checked on a CPU without network: python -m pytest -q"""
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import encode
import fid
import model
import sample
import train

torch.set_num_threads(1)
HERE = Path(__file__).parent
CPU = torch.device("cpu")
TINY = dict(tokens=16, channels=32, num_classes=3, width=32, depth=2, heads=2)
RUN = ("--batch_size", 8, "--log_every", 4, "--save_every", 4, "--sample_every", 100, "--workers", 1,
       "--max_steps", 12)

# --------------------------------------------------------------------------------------- helpers

def command(*args, cwd=HERE, **env):
    """Run python in a process of its own: (exit status, all that it printed)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | dict(OMP_NUM_THREADS="1") | env)
    return done.returncode, done.stdout

def torchrun(file, *args, cwd=HERE, processes=2):
    return command("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                   HERE / file, *args, cwd=cwd)

def script(name, *args, cwd=HERE):
    """Run a script's main() in this process, which saves importing torch."""
    text, status, here, argv = io.StringIO(), 0, os.getcwd(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [name, *map(str, args)]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            encode.run(sys.modules[Path(name).stem].main)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        text.write(error.code if isinstance(error.code, str) else "")
    finally:
        os.chdir(here)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, text.getvalue()

def works(result, *words):
    status, text = result
    assert status == 0 and all(str(word) in text for word in words), text
    return text

def fails_clearly(result, *words):
    """A user's mistake: non-zero status, no traceback, a last line that names it and the way out."""
    status, text = result
    assert status != 0 and "Traceback" not in text, text
    last = text.strip().splitlines()[-1]
    assert "error: " in last and all(str(word) in last for word in words), last

def draw_folder(folder, classes=("disc", "plain"), each=6, suffix=".png"):
    """A folder dataset of drawn images."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            image = Image.fromarray(np.full((40, 48, 3), rng.integers(0, 256, 3), np.uint8))
            if k == 0:
                image.paste(tuple(rng.integers(0, 256, 3).tolist()), (10, 10, 30, 30))
            image.save(folder / name / f"{i}{suffix}")
    return folder

def random_denoiser(**changes):
    """A small denoiser whose zero-initialised layers are filled: class and input matter."""
    torch.manual_seed(0)
    denoiser = model.Denoiser(model.ModelConfig(**TINY | changes))
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()

@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder dataset, trained on for 12 steps by the command line."""
    folder = tmp_path_factory.mktemp("workspace")
    draw_folder(folder / "data" / "photos")
    works(script("encode.py", "--dataset", "photos", "--fit", "--fit_steps", 4, cwd=folder))
    works(command(HERE / "train.py", "--dataset", "photos", *RUN, cwd=folder))
    return folder

@pytest.fixture
def copied(workspace, tmp_path):
    """A copy of the workspace to spoil."""
    shutil.copytree(workspace, tmp_path / "copy")
    return tmp_path / "copy"

def train_again(cwd, *more):
    return script("train.py", "--dataset", "photos", *RUN, "--out_dir", "out/again", *more, cwd=cwd)

def cache_of(cwd, name="photos"):
    """The folder of a dataset's only cache."""
    (index,) = (cwd / "data" / name).glob("small-*/index.json")
    return index.parent

def read_log(out):
    """The rows of a log.csv, as dicts of floats."""
    header, *rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    return [dict(zip(header, map(float, row), strict=True)) for row in rows]

def assert_same_curve(one, two, rel=1e-3):
    """Two runs' logs agree up to rounding, but for their speed."""
    for first, second in zip(read_log(one), read_log(two), strict=True):
        first.pop("images_per_s"), second.pop("images_per_s")
        assert first == pytest.approx(second, rel=rel, abs=1e-9, nan_ok=True)

def assert_equal_runs(one, two):
    """Bit-equal checkpoints and, but for their speed, logs."""
    a, b = (torch.load(out / "ckpt.pt", weights_only=True) for out in (one, two))
    assert a["step"] == b["step"]
    for name in ("model", "ema"):
        assert all(torch.equal(tensor, b[name][key]) for key, tensor in a[name].items()), name
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(x, b["optimizer"]["state"][i][key]) for key, x in state.items())
    assert_same_curve(one, two, rel=0)

# ---------------------------------------------------------------------------------------- the sphere

def test_projected_latents_have_rms_one_in_float32():
    projected = model.to_sphere(torch.randn(4, 16, 32, dtype=torch.bfloat16) * 7)
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.pow(2).mean((1, 2)), torch.ones(4), rtol=1e-5, atol=0)

def test_rotation_stays_on_the_sphere_and_turns_by_exactly_the_angle():
    z, noise = model.to_sphere(torch.randn(5, 16, 32)), torch.randn(5, 16, 32) * 3
    angle = torch.tensor([0.0, 0.3, 1.0, 1.5, math.pi / 2])
    v = model.rotate(z, noise, angle)
    torch.testing.assert_close(v.pow(2).mean((1, 2)), torch.ones(5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((v * z).mean((1, 2)), angle.cos(), rtol=0, atol=1e-5)
    assert ((v * noise).mean((1, 2)) > -1e-5)[1:].all()
    e = model.to_sphere(noise - z * (z * noise).mean((1, 2), keepdim=True))
    projected_sum = model.to_sphere(z + math.tan(1.2) * e)
    torch.testing.assert_close(model.rotate(z, e, 1.2), projected_sum, rtol=1e-4, atol=1e-5)
    plain = z[:4] + angle[:4].tan()[:, None, None] * noise[:4]
    torch.testing.assert_close(model.rotate(z[:4], noise[:4], angle[:4], sphere=False), plain)

def test_the_tangents_of_noise_angles_are_logit_normal(monkeypatch):
    monkeypatch.delattr(torch.special, "ndtri")                     # Macs have no kernel for it
    u = (torch.arange(10_000) + 0.5) / 10_000
    r = model.noise_angle(u, 80.0, mean=0.5, std=2.0).tan() / math.tan(math.radians(80))
    logit = torch.log(r.double() / (1 - r.double()))
    assert abs(logit.mean() - 0.5) < 0.01 and abs(logit.std() - 2.0) < 0.02
    assert model.noise_angle(torch.tensor([0.0, 1.0]), 80.0).isfinite().all()

def test_the_largest_angle_leaves_one_signal_to_noise_ratio_whatever_the_latents_size():
    """Also for latents that are embedded isometrically in more dimensions."""
    torch.manual_seed(0)
    z = torch.randn(400, 16, 32)
    for channels in (32, 768):
        basis = torch.linalg.qr(torch.randn(channels, 32))[0].T     # (32, channels), orthonormal
        embedded = z @ basis
        angle = math.radians(model.largest_angle(16, channels))
        v = model.rotate(embedded, torch.randn_like(embedded), angle) @ basis.T
        signal = model.to_sphere(z) / 512 ** 0.5                    # unit vectors
        along = (v * signal).sum((1, 2), keepdim=True)
        noise = (v - along * signal).std()
        assert along.mean() / noise == pytest.approx(4.8, rel=0.03)
    for name in ("flowers", "afhq", "imagenet"):
        s = train.settings_of(dict(dataset=name))
        angle = s.max_angle or model.largest_angle(256, 768)
        assert s.codec == "rae" and 3 < math.sqrt(256 * 768) / math.tan(math.radians(angle)) < 8

# -------------------------------------------------------------------------------------- the denoiser

def test_xl_has_the_released_number_of_tensors_and_parameters():
    with torch.device("meta"):
        state = model.Denoiser(model.ModelConfig(**model.PRESETS["XL"])).state_dict()
    assert len(state) == 401 and sum(t.numel() for t in state.values()) == 675_160_896

def test_denoiser_starts_at_zero_and_sees_class_place_and_all_tokens():
    z, y = torch.randn(2, 16, 32), torch.tensor([0, 1])
    assert not model.Denoiser(model.ModelConfig(**TINY))(z, y).any()
    denoiser = random_denoiser()
    out = denoiser(z, y)
    assert (denoiser(z, torch.tensor([2, 3])) - out).abs().amax((1, 2)).min() > 1e-3    # class, null
    assert (denoiser(z.flip(1), y).flip(1) - out).abs().max() > 1e-3                    # positions
    moved = z.clone()
    moved[:, 0] += 1
    assert ((denoiser(moved, y) - out).abs().amax(2) > 1e-6).all()                      # attention
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in denoiser.parameters())
    p = model.sincos_2d(16, 32)[0].view(4, 4, 32)
    assert torch.equal(p[0, 1, :16], p[3, 1, :16]) and torch.equal(p[2, 0, 16:], p[2, 3, 16:])
    assert torch.unique(p.view(16, 32), dim=0).shape[0] == 16

@pytest.mark.parametrize("shape", [dict(), dict(tokens=64, channels=48, width=64, depth=3)])
def test_flops_are_those_that_torch_counts(shape):
    config = model.ModelConfig(**TINY | shape)
    z = torch.randn(1, config.tokens, config.channels)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.Denoiser(config)(z, torch.tensor([1]))
    assert counter.get_total_flops() == model.flops(config)

def test_losses_are_the_papers_two_terms_and_send_gradient_where_they_say():
    denoiser = random_denoiser()
    z, noise = model.to_sphere(torch.randn(4, 16, 32)), torch.randn(4, 16, 32)
    y, angle, nearer = torch.arange(4), torch.full((4,), 1.2), torch.full((4,), 0.8)
    strong = model.rotate(z, noise, angle)
    weak = model.rotate(z, noise, math.atan(0.4 * math.tan(1.2)))
    total, reconstruction, consistency = model.losses(denoiser, z, y, noise, angle, nearer, 0.3)
    out, weak_out = denoiser(strong, y), denoiser(weak, y)
    torch.testing.assert_close(reconstruction, (out - z).pow(2).mean((1, 2)))
    torch.testing.assert_close(consistency, (out - weak_out).pow(2).mean((1, 2)))
    weights = list(denoiser.parameters())
    expected = (out - z).pow(2).mean() + 0.3 * (out - weak_out.detach()).pow(2).mean()
    torch.testing.assert_close(total, expected)
    for got, want in zip(torch.autograd.grad(total, weights), torch.autograd.grad(expected, weights)):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)

def test_ddp_is_called_once_a_step_whatever_the_losses():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args):
            self.calls += 1
            return self.module(*args)

    wrapper, z = Wrapper(random_denoiser()), torch.randn(2, 16, 32)
    model.losses(wrapper, z, torch.tensor([0, 1]), z.flip(0), torch.ones(2), torch.ones(2), 0.5)
    assert wrapper.calls == 1

# ------------------------------------------------------------------------------------------ sampling

def test_generate_predicts_turns_back_and_predicts_again():
    denoiser, y = random_denoiser(max_angle=60.0), torch.tensor([0, 1, 2])
    noise, draw = torch.randn(2, 3, 16, 32), functools.partial(model.generate, denoiser, y, 2)
    angle = math.atan(0.5 ** 1.5 * math.tan(math.radians(60)))
    with torch.no_grad():
        x1 = denoiser(model.to_sphere(noise[0]), y)
        x2, x2_same = (denoiser(model.rotate(x1, e, angle), y) for e in (noise[1], noise[0]))
    torch.testing.assert_close(draw(noise=noise, return_all=True), torch.stack([x1, x2]))
    torch.testing.assert_close(draw(noise=noise, same_noise=True), x2_same)
    torch.testing.assert_close(draw(noise=noise, between=lambda x: -x, return_all=True)[1],
                               denoiser(model.rotate(-x1, noise[1], angle), y))
    again = [draw(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])

def test_guidance_extrapolates_from_the_null_class_and_may_skip_the_first_steps():
    denoiser, y, noise = random_denoiser(), torch.tensor([0, 1, 2]), torch.randn(4, 3, 16, 32)

    def draw(n, **options):
        return model.generate(denoiser, y, n, noise=noise[:n], return_all=True, **options)

    start = model.to_sphere(noise[0])
    with torch.no_grad():
        x, null = denoiser(start, y), denoiser(start, torch.full_like(y, 3))
    torch.testing.assert_close(draw(1, cfg_scale=3)[0], null + 3 * (x - null))
    torch.testing.assert_close(draw(1)[0], x)
    plain, guided, skipped = draw(4), draw(4, cfg_scale=3), draw(4, cfg_scale=3, cfg_skip=9)
    torch.testing.assert_close(skipped[:2], plain[:2])              # never the last two
    assert not torch.allclose(skipped[2], plain[2]) and not torch.allclose(skipped[2], guided[2])
    torch.testing.assert_close(draw(2, cfg_scale=3, cfg_skip=1), draw(2, cfg_scale=3))

# ------------------------------------------------------------------------------ images and datasets

def test_shapes_are_the_same_for_a_seed_varied_and_balanced():
    images, labels = encode.shapes(200, seed=3)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and (np.bincount(labels) == 20).all()
    assert np.array_equal(images[:50], encode.shapes(50, seed=3)[0])
    assert not np.array_equal(images[:50], encode.shapes(50, seed=4)[0])
    assert len(np.unique(images[:, 0, 0], axis=0)) > 190            # backgrounds
    assert (np.ptp(images.reshape(200, -1, 3), axis=1).min(0) > 60).all()

@pytest.mark.parametrize("size", [(331, 150), (63, 200), (64, 64), (5, 9), (33, 32)])
def test_center_crop_is_adms(size):
    """Box-halving while twice too large, bicubic, an array slice from the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = expected = Image.fromarray(pixels)
    while min(*expected.size) >= 64:
        half = tuple(x // 2 for x in expected.size)
        expected = expected.resize(half, resample=Image.Resampling.BOX)
    scale = 32 / min(*expected.size)
    whole = tuple(round(x * scale) for x in expected.size)
    expected = np.array(expected.resize(whole, resample=Image.Resampling.BICUBIC))
    top, left = (expected.shape[0] - 32) // 2, (expected.shape[1] - 32) // 2
    expected = expected[top:top + 32, left:left + 32]
    assert np.array_equal(np.asarray(encode.center_crop(image, 32)), expected)

def test_every_kind_of_image_file_is_read_as_upright_rgb(tmp_path):
    upright = Image.new("RGB", (32, 32), "red")
    upright.paste("blue", (0, 16, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6                                                # turn by 270 degrees
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    upright.save(tmp_path / "a.webp", lossless=True)
    upright.quantize(4).save(tmp_path / "palette.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (40, 40), 77).save(tmp_path / "grey.png")
    Image.fromarray(np.full((40, 40), 77 * 257, np.uint16)).save(tmp_path / "grey16.png")
    names = ["exif.jpg", "a.webp", "palette.png", "clear.png", "grey.png", "grey16.png"]
    dataset = encode.Dataset("", [], np.zeros(6), [str(tmp_path / name) for name in names])
    for i in range(3):
        image = dataset.load(i, 32).astype(int)
        assert image[4, 16, 0] > 230 and image[4, 16, 2] < 25 and image[28, 16, 2] > 230, names[i]
    assert (dataset.load(3, 32) == 255).all()                       # transparency on white
    assert (dataset.load(4, 32) == 77).all() and (dataset.load(5, 32) == 77).all()

def test_folder_datasets_keep_class_names_and_ignore_what_is_no_image(tmp_path):
    folder = draw_folder(tmp_path / "data" / "pets" / "train", ("cat", "a dog"), each=3)
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    found = encode.find_dataset(str(folder), tmp_path / "data")
    assert found.classes == ["a dog", "cat"] and found.name == "pets-train"
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(found) == 6
    assert np.array_equal(found.load(7, 32), found.load(1, 32)[:, ::-1])        # mirrored

# ---------------------------------------------------------------------------------------- the codec

def psnr(x, y):
    return -10 * (x - y).pow(2).mean((1, 2, 3)).log10().mean().item()

def test_shipped_codec_reconstructs_unseen_shapes_and_forgives_rotated_latents():
    codec = encode.load_codec("small")
    images = encode.to_float(encode.shapes(200, seed=123)[0])
    z = codec.encode(images)
    assert z.shape == (200, *codec.latent_shape) and not codec.training
    torch.testing.assert_close(z, model.to_sphere(z))
    assert psnr(codec.decode(z), images) > 30
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    assert psnr(codec.decode(model.rotate(z, noise, 0.4)), images) > 25
    assert (HERE / "assets" / "small_shapes.pt").stat().st_size < 2e6
    wild = codec.decode(torch.randn(2, 16, 32) * 9)
    assert wild.min() >= 0 and wild.max() <= 1

def test_fitting_learns_and_the_larger_codec_has_more_tokens():
    images = encode.shapes(200)[0]
    x = encode.to_float(images)
    worse, better = (encode.fit_codec(images, "small", steps=n, batch_size=16) for n in (2, 60))
    assert psnr(better.decode(better.encode(x)), x) > psnr(worse.decode(worse.encode(x)), x) + 1
    large = encode.fit_codec(images[:20].repeat(2, 1).repeat(2, 2), "small64", 1, batch_size=4)
    assert large.image_size == 64 and large.latent_shape == (64, 32)
    assert large.decode(large.encode(torch.rand(2, 3, 64, 64))).shape == (2, 3, 64, 64)

# ------------------------------------------------------------------------- the latent cache

def test_cache_holds_the_latents_of_the_images_in_chunk_files(workspace, monkeypatch):
    found = encode.find_dataset("photos", workspace / "data")       # its cache is not a class
    cache = encode.read_index(cache_of(workspace) / "index.json")
    codec = encode.load_codec("small", encode.codec_path("small", "photos", workspace / "data"))
    images = np.stack([found.load(i, 32) for i in range(12)])
    latents = cache.read(np.array([3, 0, 11]))
    assert latents.dtype == torch.float16 and cache.classes == ["disc", "plain"]
    assert cache.labels.tolist() == found.labels.tolist()
    z = codec.encode(encode.to_float(images[[3, 0, 11]]))
    torch.testing.assert_close(latents.float(), z, rtol=1e-2, atol=2e-3)

def encode_photos(cwd, *more):
    return script("encode.py", "--dataset", "photos", *more, cwd=cwd)

def test_killed_encoding_goes_on_with_the_missing_chunks_alone(copied, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK", 5)
    real, written = np.save, []

    def save(file, array):
        written.append(len(array))
        if len(written) == 2:
            file.write(b"half a file")
            raise KeyboardInterrupt
        real(file, array)

    shutil.rmtree(cache_of(copied))
    monkeypatch.setattr(np, "save", save)
    assert "interrupted" in encode_photos(copied)[1]
    folder = next((copied / "data/photos").glob("small-*[!t]"))
    assert [file.name for file in folder.iterdir()] == ["000000.npy"]       # no index, nothing half
    assert encode.find_dataset("photos", copied / "data").classes == ["disc", "plain"]
    works(encode_photos(copied), "12 images", "complete")
    assert written == [5, 5, 5, 2]
    works(encode_photos(copied))
    assert len(written) == 4                                        # all is there: nothing to do

def test_full_disk_while_encoding_keeps_what_is_done(copied, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK", 5)
    shutil.rmtree(cache_of(copied))
    real = open

    def full(path, *mode, **more):
        disk_is_full = ".000001.npy" in str(path)
        return real("/dev/full" if disk_is_full else path, *mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        fails_clearly(encode_photos(copied), "000001.npy", "No space left", "run the command again")
    works(encode_photos(copied))
    assert len(list(cache_of(copied).glob("*.npy"))) == 3

def test_several_processes_write_the_cache_that_one_writes(copied):
    before = encode.read_index(cache_of(copied) / "index.json")
    old, = cache_of(copied).glob("*.npy")
    expected = np.load(old)
    shutil.rmtree(cache_of(copied))
    (copied / "small_chunks.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
                                            "import encode; encode.CHUNK = 3; encode.run(encode.main)")
    works(torchrun(copied / "small_chunks.py", "--dataset", "photos", cwd=copied), "12 images")
    after = encode.read_index(cache_of(copied) / "index.json")
    assert after.folder == before.folder and (after.labels == before.labels).all()
    chunks = [np.load(file) for file in sorted(after.folder.glob("*.npy"))]
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 3]
    np.testing.assert_allclose(np.concatenate(chunks), expected, atol=2e-3)

def test_other_images_another_codec_or_flips_get_a_folder_of_their_own(copied):
    first = cache_of(copied)
    before = {file: file.read_bytes() for file in first.iterdir()}
    draw_folder(copied / "data" / "photos", each=7)
    works(encode_photos(copied), "14 images")
    works(encode_photos(copied, "--flip"), "28 images")
    works(encode_photos(copied, "--fit", "--fit_steps", 2))
    works(encode_photos(copied), "14 images")
    caches = {index.parent for index in (copied / "data/photos").glob("small-*/index.json")}
    assert len(caches) == 4 and all(file.read_bytes() == data for file, data in before.items())
    works(script("sample.py", "--num_images", 2, cwd=copied))       # the codec is in the checkpoint
    shutil.move(copied / "out", copied / "elsewhere")
    shutil.rmtree(copied / "data")
    works(script("sample.py", "--ckpt", "elsewhere/photos/ckpt.pt", "--num_images", 2, cwd=copied))

def test_flips_follow_the_other_images(copied):
    works(encode_photos(copied, "--flip"))
    caches = [encode.read_index(index) for index in (copied / "data/photos").glob("small-*/index.json")]
    plain, flipped = sorted(caches, key=lambda cache: len(cache.labels))
    assert flipped.labels.tolist() == plain.labels.tolist() * 2
    assert torch.equal(flipped.read(np.arange(12)), plain.read(np.arange(12)))
    found = encode.find_dataset("photos", copied / "data")
    codec = encode.load_codec("small", encode.codec_path("small", "photos", copied / "data"))
    mirrored = codec.encode(encode.to_float(np.stack([found.load(i, 32)[:, ::-1] for i in range(12)])))
    latents = flipped.read(np.arange(12, 24)).float()
    torch.testing.assert_close(latents, mirrored, rtol=1e-2, atol=2e-3)

def test_damaged_latents_are_named_with_the_way_to_mend_them(copied):
    chunk, = cache_of(copied).glob("*.npy")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-100])
    fails_clearly(train_again(copied), chunk.name, "delete it", "encode.py")
    chunk.unlink()
    works(train_again(copied))
    assert chunk.read_bytes() == whole
    (chunk.parent / "index.json").write_text("{")
    fails_clearly(train_again(copied), "index.json", "delete it")

def test_a_complete_cache_needs_no_images_nor_a_listing_of_them(copied, monkeypatch):
    for name in ("disc", "plain"):
        shutil.rmtree(copied / "data/photos" / name)
    works(train_again(copied))
    draw_folder(copied / "data/imagenet/train", ("n01440764",), each=2, suffix=".JPEG")
    arguments = ("--dataset", "imagenet", "--codec", "small")
    works(script("encode.py", *arguments, "--fit", "--fit_steps", 1, cwd=copied))
    works(script("encode.py", *arguments, cwd=copied), "2 images")
    monkeypatch.setattr(os, "walk", lambda *_: pytest.fail("listed the images"))
    monkeypatch.setattr(os.path, "getsize", lambda *_: pytest.fail("looked at an image"))
    works(script("train.py", *arguments, "--preset", "tiny", *RUN, cwd=copied))

def test_unreadable_images_are_named_or_left_out_and_counted(copied):
    bad = sorted((copied / "data/photos/disc").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:60])
    fails_clearly(encode_photos(copied), bad.name, "--skip_bad")
    works(encode_photos(copied, "--skip_bad"), "11 images", "1 unreadable", bad.name)
    works(train_again(copied, "--skip_bad"), "11 images")
    works(train_again(copied, "--live", "--skip_bad", "--out_dir", "out/live"), f"skipped data/photos/disc/{bad.name}")
    fails_clearly(train_again(copied, "--live"), bad.name, "--skip_bad")

def test_reconstruct_writes_pairs_and_prints_their_psnr(copied):
    text = works(encode_photos(copied, "--reconstruct", "data/photos/disc", "--out", "pairs.png"))
    picture = np.asarray(Image.open(copied / "pairs.png")) / 255
    assert picture.shape == (6 * 32, 64, 3) and "mean of 6" in text
    errors = [((pair[:, :32] - pair[:, 32:]) ** 2).mean() for pair in picture.reshape(6, 32, 64, 3)]
    printed = float(re.search(r"PSNR ([\d.]+) dB", text)[1])
    assert np.mean(-10 * np.log10(errors)) == pytest.approx(printed, abs=0.1)
    works(encode_photos(copied, "--reconstruct"), "mean of 16")
    fails_clearly(encode_photos(copied, "--reconstruct", "nowhere"), "nowhere", "no image")

def test_useless_dataset_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    fails_clearly(script("encode.py", "--dataset", "empty", cwd=tmp_path), "empty", "per class")
    draw_folder(tmp_path / "photos", each=1)
    (tmp_path / "photos" / "void").mkdir()
    fails_clearly(script("encode.py", "--dataset", "photos", cwd=tmp_path), Path("photos") / "void")
    fails_clearly(script("train.py", "--dataset", "nowhere", cwd=tmp_path), "nowhere")

# ---------------------------------------------------------------------------- the datasets by name

def draw_flowers(folder, numbers=(1, 1, 74, 74, 54, 54), labels=None):
    """Oxford's two files: 102flowers.tgz with jpg/image_00001.jpg..., imagelabels.mat."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        for i, number in enumerate(numbers):
            file = io.BytesIO()
            Image.new("RGB", (300, 260), (number, 40 * i, 90)).save(file, "JPEG")
            info = tarfile.TarInfo(f"jpg/image_{i + 1:05d}.jpg")
            info.size = file.tell()
            archive.addfile(info, io.BytesIO(file.getvalue()))
    labels = np.array([labels or numbers], np.uint8)
    scipy.io.savemat(folder / "imagelabels.mat", dict(labels=labels))

@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*_, **__):
        raise OSError("no network in tests")
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)

def test_flowers_afhq_and_imagenet_are_their_training_parts(tmp_path, no_network):
    draw_flowers(tmp_path / "flowers")
    found = encode.find_dataset("flowers", tmp_path)
    assert found.name == "flowers" and found.classes == ["pink primrose", "sunflower", "rose"]
    assert found.labels.tolist() == [0, 0, 2, 2, 1, 1]
    assert [Path(path).name for path in found.source[:2]] == ["image_00001.jpg", "image_00002.jpg"]
    (tmp_path / "flowers" / "102flowers.tgz").unlink()              # no longer needed
    assert encode.find_dataset("flowers", tmp_path).digest == found.digest
    (tmp_path / "afhq").mkdir()
    with zipfile.ZipFile(tmp_path / "afhq/afhq.zip", "w") as archive:
        for name in ("train/dog/1.jpg", "train/cat/1.jpg", "val/cat/1.jpg"):
            file = io.BytesIO()
            Image.new("RGB", (20, 20)).save(file, "JPEG")
            archive.writestr(f"afhq/{name}", file.getvalue())
        archive.writestr("../../escaped.txt", "no")
    assert encode.find_dataset("afhq", tmp_path).classes == ["cat", "dog"]
    assert not list(tmp_path.parent.rglob("escaped.txt"))
    draw_folder(tmp_path / "imagenet/train", ("n01440764", "n01443537"), 2, ".JPEG")
    found = encode.find_dataset("imagenet", tmp_path)
    assert found.name == "imagenet" and found.classes == ["n01440764", "n01443537"]

def test_missing_wrong_or_broken_downloads_are_named(tmp_path, no_network, monkeypatch):
    def flowers():
        return script("encode.py", "--dataset", "flowers", "--codec", "small", cwd=tmp_path)

    folder = tmp_path / "data/flowers"
    archive = folder / "102flowers.tgz"
    fails_clearly(flowers(), "data/flowers/102flowers.tgz", f"{encode.OXFORD}/102flowers.tgz")
    afhq = script("train.py", "--dataset", "afhq", cwd=tmp_path)
    fails_clearly(afhq, "afhq.zip", "dropbox.com")
    fails_clearly(script("encode.py", "--dataset", "imagenet", cwd=tmp_path), "data/imagenet", "ln -s")
    shutil.rmtree(tmp_path / "data")
    draw_flowers(folder, labels=[1, 1, 2])
    fails_clearly(flowers(), "imagelabels.mat", "3 labels for 6 images")
    (folder / "imagelabels.mat").write_bytes(b"nonsense")
    fails_clearly(flowers(), "imagelabels.mat", "delete it")
    shutil.rmtree(folder / "jpg")
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-200])
    fails_clearly(flowers(), "102flowers.tgz", "cannot be unpacked", "delete it")
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(tarfile.TarInfo("../../escaped"))
    fails_clearly(flowers(), "102flowers.tgz", "outside")
    assert not list(tmp_path.rglob("escaped"))
    archive.write_bytes(whole)
    monkeypatch.delattr(tarfile, "data_filter")                     # as in Python 3.10.11
    fails_clearly(flowers(), "3.10.12")

def test_downloads_are_checked_and_written_whole(tmp_path, monkeypatch):
    def fetch(url, path, **_):
        Path(path).write_bytes(b"content")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    path = tmp_path / "new" / "file.tgz"
    with pytest.raises(encode.UserError, match="md5"):
        encode.download("https://host/file.tgz", path, md5="0" * 32)
    assert not list(path.parent.iterdir())
    encode.download("https://host/file.tgz", path, md5=hashlib.md5(b"content").hexdigest())
    assert path.read_bytes() == b"content"

# ------------------------------------------------------------- the representation autoencoder (RAE)

HUBCONF = '''
dependencies = ["torch"]
import torch

class Encoder(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, width, 14, 14)
        self.norm = torch.nn.LayerNorm(width, eps=1e-6)

    def forward_features(self, x):
        return dict(x_norm_patchtokens=self.norm(self.patch(x).flatten(2).transpose(1, 2)))

def dinov2_vitb14_reg(pretrained=True):
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
    model = Encoder(768)
    model.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu"))
    return model
'''
WEIGHTS = {    # name in torch.hub's folder -> what an error must say of it
    "dinov2_vitb14_reg4_pretrain.pth": "dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "rae-wReg_base-stat-84ede66d.pt": "stats/dinov2/wReg_base/imagenet1k/stat.pt",
    "rae-wReg_base-decoder-5fedf7c9.pt": "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"}

@pytest.fixture
def hub(tmp_path, monkeypatch, no_network):
    """torch.hub's folder with files of the published names: a one-layer DINOv2, a narrow decoder."""
    torch.manual_seed(0)
    folder = tmp_path / "hub"
    (folder / "facebookresearch_dinov2_main").mkdir(parents=True)
    (folder / "facebookresearch_dinov2_main" / "hubconf.py").write_text(HUBCONF)
    (folder / "checkpoints").mkdir()
    narrow = functools.partial(encode.ViTDecoder, hidden=32, depth=2, heads=4, mlp=48)
    monkeypatch.setattr(encode, "ViTDecoder", narrow)
    encoder = {"patch.weight": torch.randn(768, 3, 14, 14), "patch.bias": torch.randn(768),
               "norm.weight": torch.rand(768) * 3, "norm.bias": torch.randn(768)}
    stat = dict(mean=None, var=torch.rand(768, 16, 16) + 0.01)
    decoder = {name: torch.randn(t.shape) * 0.3 for name, t in narrow().state_dict().items()}
    decoder["surplus"] = torch.zeros(1)                             # RAE's own code ignores it, too
    for name, state in zip(WEIGHTS, (encoder, stat, decoder)):
        torch.save(state, folder / "checkpoints" / name)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))
    return folder

def test_vit_decoder_has_the_published_tensors():
    with torch.device("meta"):
        state = encode.ViTDecoder().state_dict()
        small = encode.ViTDecoder(latent_dim=384).state_dict()
    assert len(state) == 456 and sum(t.numel() for t in state.values()) == 415_352_704
    assert sum(t.numel() for t in small.values()) == 414_910_336
    shapes = {"decoder_layers.27.attention.attention.query.weight": (1152, 1152),
              "decoder_layers.0.intermediate.dense.weight": (4096, 1152),
              "decoder_pos_embed": (1, 257, 1152), "trainable_cls_token": (1, 1, 1152)}
    assert all(state[name].shape == shape for name, shape in shapes.items())

def test_vit_decoder_computes_the_published_network():
    """Against the same network written with plain matrix products."""
    torch.manual_seed(0)
    size = dict(hidden=24, depth=2, heads=3, mlp=40, latent_dim=10, patch=4, grid=3)
    net = encode.ViTDecoder(**size).double()
    w = {name: torch.randn(t.shape).double() * 0.2 for name, t in net.state_dict().items()}
    w["decoder_embed.bias"] *= 1e-3                                 # an eps of 1e-6 would show
    net.load_state_dict(w)
    tokens = torch.randn(2, 9, 10).double() * 1e-3

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = torch.cat([w["trainable_cls_token"].repeat(2, 1, 1), linear(tokens, "decoder_embed")], 1)
    x = x + w["decoder_pos_embed"]
    for layer in ("decoder_layers.0", "decoder_layers.1"):
        y = norm(x, f"{layer}.layernorm_before")
        q, k, v = (linear(y, f"{layer}.attention.attention.{name}").unflatten(2, (3, 8))
                   for name in ("query", "key", "value"))
        weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / 8 ** 0.5, -1)
        y = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        x = x + linear(y, f"{layer}.attention.output.dense")
        y = linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)), f"{layer}.output.dense")
    x = linear(norm(x, "decoder_norm"), "decoder_pred")[:, 1:]
    image = net(tokens)
    assert image.shape == (2, 3, 12, 12)
    for row, column, colour in [(0, 0, 0), (5, 2, 1), (11, 7, 2)]:
        token, inside = row // 4 * 3 + column // 4, (row % 4 * 4 + column % 4) * 3 + colour
        torch.testing.assert_close(image[:, colour, row, column], x[:, token, inside])

def test_rae_encodes_and_decodes_by_the_published_formulas(hub):
    codec = encode.load_codec("rae")
    assert codec.latent_shape == (256, 768) and codec.image_size == 256 and not codec.training
    images = torch.rand(2, 3, 256, 256)
    z = codec.encode(images)
    encoder, stat = (torch.load(hub / "checkpoints" / name, weights_only=True)
                     for name in list(WEIGHTS)[:2])
    scale = (stat["var"] + 1e-5).sqrt()                             # (C, 16, 16)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", align_corners=False)
    x = torch.nn.functional.conv2d((x - mean) / std, encoder["patch.weight"], encoder["patch.bias"],
                                   stride=14)
    x = x - x.mean(1, keepdim=True)                                 # the norm has no weights
    x = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() / scale
    torch.testing.assert_close(z, x.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    y = codec.decoder((x * scale).flatten(2).transpose(1, 2)) * std + mean
    assert y.min() < 0 and y.max() > 1
    torch.testing.assert_close(codec.decode(z), y.clamp(0, 1), rtol=1e-4, atol=1e-4)
    stat["mean"] = torch.ones(768, 16, 16)
    torch.save(stat, hub / "checkpoints" / list(WEIGHTS)[1])
    shifted = encode.load_codec("rae")
    expected = z - (1 / scale).flatten(1).T
    torch.testing.assert_close(shifted.encode(images), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shifted.decode(expected), codec.decode(z), rtol=1e-3, atol=1e-3)
    without_decoder = encode.load_codec("rae", decoder=False)
    assert encode.fingerprint(codec) != encode.fingerprint(shifted)
    assert encode.fingerprint(shifted) == encode.fingerprint(without_decoder)

class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)

def test_missing_damaged_or_evil_weights_are_named_with_address_and_place(hub, tmp_path):
    Image.new("RGB", (300, 280), "red").save(tmp_path / "x.png")

    def look(*more):
        return script("encode.py", "--reconstruct", "x.png", "--codec", "rae", *more, cwd=tmp_path)

    works(look())
    works(look("--weights_dir", hub))
    for name, url in WEIGHTS.items():
        file = hub / "checkpoints" / name
        whole = file.read_bytes()
        for spoil in (file.unlink, lambda: file.write_bytes(whole[:-100]),
                      lambda: torch.save(dict(nothing=torch.zeros(3)), file),
                      lambda: torch.save(dict(x=Evil()), file)):
            spoil()
            fails_clearly(look(), file.name, url if "decoder" not in name else "decoder")
        file.write_bytes(whole)
    assert not (tmp_path / "owned").exists()
    (hub / "facebookresearch_dinov2_main" / "hubconf.py").unlink()
    fails_clearly(look(), hub / "facebookresearch_dinov2_main", encode.COMMIT)

def test_processes_that_start_together_download_dinov2_once(hub, tmp_path):
    """torch.hub deletes and unpacks its folder in every process that finds none."""
    draw_folder(tmp_path / "photos", each=1)
    shutil.rmtree(hub / "facebookresearch_dinov2_main")
    with zipfile.ZipFile(tmp_path / "dinov2.zip", "w") as archive:
        archive.writestr("dinov2-x/", "")
        archive.writestr("dinov2-x/hubconf.py", HUBCONF)
    (tmp_path / "stub.py").write_text(f"""import os, shutil, sys; sys.path.insert(0, {str(HERE)!r})
import encode, functools, torch
def download(url, path, *args, **kwargs):
    print("download", url)
    shutil.copy({str(tmp_path / 'dinov2.zip')!r}, path)
torch.hub.download_url_to_file = download
encode.ViTDecoder = functools.partial(encode.ViTDecoder, hidden=32, depth=2, heads=4, mlp=48)
encode.run(encode.main)
""")
    text = works(torchrun(tmp_path / "stub.py", "--dataset", "photos", "--codec", "rae",
                          "--weights_dir", hub, cwd=tmp_path), "2 images")
    assert text.count("download https") == 1

def test_flowers_go_through_the_rae_from_archive_to_samples(hub, tmp_path):
    draw_flowers(tmp_path / "data/flowers")
    run = ("--dataset", "flowers", "--preset", "tiny", "--batch_size", 4, "--max_steps", 2)
    works(script("train.py", *run, cwd=tmp_path), "latents 256x768")
    works(script("sample.py", "--num_images", 3, "--out", "samples.npz", cwd=tmp_path))
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (3, 256, 256, 3)
    works(script("fid.py", "samples.npz", "--ref", "flowers", "--features", "codec", "--codec", "rae",
                 cwd=tmp_path), "Frechet")
    torch.save(dict(mean=None, var=torch.rand(768, 16, 16) + 1),
               hub / "checkpoints" / list(WEIGHTS)[1])
    fails_clearly(script("sample.py", cwd=tmp_path), "rae", "other weights")

# -------------------------------------------------------------------------------------- training

def test_training_lowers_the_loss_and_writes_checkpoint_log_and_grids(copied):
    text = works(train_again(copied, "--max_steps", 60, "--lr", 3e-3, "--warmup", 5, "--sample_every", 60))
    out, first = copied / "out/again", read_log(copied / "out/photos")[0]
    rows = read_log(out)
    assert "python sample.py" in text and rows[-1]["step"] == 60
    assert rows[-1]["reconstruction"] < 0.6 * first["reconstruction"]
    bins = [name for name in first if name.startswith("loss_")]
    assert len(bins) == 6 and bins[-1].endswith("_78")              # sixths of the noise's law
    assert np.mean([first[name] for name in bins]) == pytest.approx(first["reconstruction"], rel=0.05)
    assert Image.open(out / "samples" / "step_000060.png").width > 64
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 60 and list(checkpoint["model"]) == list(checkpoint["ema"])
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in checkpoint["model"])
    works(train_again(copied, "--max_steps", 4), "earlier_1")       # nothing of a run is lost
    assert torch.load(out / "earlier_1/ckpt.pt", weights_only=True)["step"] == 60

def signal_at(monkeypatch, step, *numbers):
    """Make train_step send signals to this process at a step."""
    real = train.train_step

    def signalling(ddp, ema, optimizer, now, *more):
        for number in numbers if now == step else ():
            os.kill(os.getpid(), number)
        return real(ddp, ema, optimizer, now, *more)

    monkeypatch.setattr(train, "train_step", signalling)

@pytest.mark.parametrize("numbers, flags", [((signal.SIGINT,), ()), ((signal.SIGTERM,), ()),
                                            ((signal.SIGTERM, signal.SIGTERM), ("--live",))])
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(copied, monkeypatch, numbers, flags):
    """Also where Slurm sends its signal twice, and while threads are reading images."""
    with monkeypatch.context() as patch:
        signal_at(patch, 5, *numbers)
        text = works(train_again(copied, *flags), "stopped at step 6", "--resume")
    assert "python train.py --dataset photos" in text and "--out_dir out/again" in text
    works(train_again(copied, "--resume", *flags))
    assert_equal_runs(copied / "out/again", copied / "out/photos")

def test_a_killed_run_resumes_as_if_nothing_had_been(copied):
    (copied / "killed.py").write_text(f"""import os, signal, sys; sys.path.insert(0, {str(HERE)!r})
import encode, train
step = train.train_step
def deadly(ddp, ema, optimizer, now, *more):
    if now == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(ddp, ema, optimizer, now, *more)
train.train_step = deadly
encode.run(train.main)
""")
    status, _ = command("killed.py", "--dataset", "photos", *RUN, "--log_every", 3, "--out_dir",
                        "out/again", cwd=copied)
    out = copied / "out/again"
    assert status == -signal.SIGKILL and torch.load(out / "ckpt.pt", weights_only=True)["step"] == 8
    assert [row["step"] for row in read_log(out)] == [3, 6, 9]
    works(train_again(copied, "--resume", "--log_every", 4))
    assert [row["step"] for row in read_log(out)] == [3, 6, 12]     # none twice, none after step 8
    a, b = (torch.load(o / "ckpt.pt", weights_only=True) for o in (out, copied / "out/photos"))
    assert all(torch.equal(tensor, b["ema"][name]) for name, tensor in a["ema"].items())

def test_two_processes_train_as_one_does_also_when_one_goes_on_alone(copied):
    """The same images, noise and order, with the consistency loss, compiled as DDP sees it."""
    (copied / "both.py").write_text(f"""import os, sys; sys.path.insert(0, {str(HERE)!r})
import encode, torch, train
made, make = [], train.make_model
def make_model(*args):
    made.append(make(*args))
    made[0][0].compile(backend="aot_eager_decomp_partition")
    return made[0]
train.make_model = make_model
encode.run(train.main)
torch.save([made[0][i].state_dict() for i in (0, 2)], "rank" + os.environ["RANK"])
""")
    flags = ("--consistency_weight", 0.5, "--log_every", 5)
    works(train_again(copied, *flags, "--out_dir", "out/one"))
    works(torchrun(copied / "both.py", "--dataset", "photos", *RUN, *flags, "--out_dir", "out/two",
                   "--max_steps", 12, "--save_every", 7, cwd=copied), "2 x cpu")
    assert_same_curve(copied / "out/one", copied / "out/two")
    first, second = (torch.load(copied / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(x[name], y[name]) for x, y in zip(first, second) for name in x)
    works(torchrun("train.py", "--dataset", "photos", *RUN, *flags, "--out_dir", "out/alone",
                   "--max_steps", 12, "--save_every", 7, cwd=copied))

def test_a_run_of_two_processes_goes_on_with_one_between_two_log_lines(copied, monkeypatch):
    works(torchrun("train.py", "--dataset", "photos", *RUN, "--max_steps", 6, "--log_every", 4,
                   "--out_dir", "out/again", cwd=copied))
    monkeypatch.setattr(train, "learning_rate", lambda step, s: 1e-4)
    text = works(train_again(copied, "--resume", "--max_steps", 8))
    assert "skipped" not in text and read_log(copied / "out/again")[-1]["skipped"] == 0

@pytest.mark.parametrize("flags", [("--accumulate", 4), ("--live",), ("--live", "--flip")])
def test_parts_and_live_encoding_follow_the_curve_of_the_whole_cached_batch(copied, flags):
    works(train_again(copied, *(flag for flag in flags if flag == "--flip"), "--out_dir", "out/plain"))
    if "--live" in flags:
        for index in (copied / "data/photos").glob("small-*/index.json"):
            shutil.rmtree(index.parent)
    works(train_again(copied, *flags))
    assert_same_curve(copied / "out/plain", copied / "out/again")

def test_noise_is_the_same_however_the_batch_is_split_and_none_is_drawn_in_vain(monkeypatch):
    s, config = train.settings_of(dict(batch_size=256)), model.ModelConfig(**TINY)
    whole = train.draw(3, slice(0, 256), s, config, CPU)
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(1) or randn(*a, **k))
    for rows in (slice(64, 96), slice(70, 75)):
        parts = train.draw(3, rows, s, config, CPU)
        assert all(torch.equal(part, full[rows]) for part, full in zip(parts, whole, strict=True))
    assert len(drawn) == 2 + 1                                      # blocks of 16 images
    assert not torch.equal(whole[0], train.draw(4, slice(0, 256), s, config, CPU)[0])

def test_batches_go_through_every_image_once_an_epoch_in_an_order_of_their_own():
    seen = np.concatenate([train.batch_indexes(10, 4, step, seed=0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert not np.array_equal(seen[:4], train.batch_indexes(10, 4, 0, seed=1))
    assert np.bincount(train.batch_indexes(3, 9, 2, seed=0)).tolist() == [3, 3, 3]

def test_settings_come_from_preset_dataset_and_flags_in_this_order():
    s = train.settings_of(dict(dataset="flowers"))
    assert (s.preset, s.codec, s.lr, s.weight_decay) == ("B", "rae", 2e-4, 0.0)
    s = train.settings_of(dict(dataset="flowers", preset="tiny", lr=1.0))
    assert (s.preset, s.ema_decay, s.lr, s.max_steps) == ("tiny", 0.999, 1.0, 32_000)
    assert train.settings_of({}).preset == "tiny"
    assert train.settings_of(dict(dataset="some/folder")).codec == "small"

def test_a_process_that_fails_ends_the_others_with_its_message(copied):
    bad = copied / "data/photos/plain/5.png"
    bad.write_bytes(bad.read_bytes()[:60])
    shutil.rmtree(cache_of(copied))
    status, text = torchrun("train.py", "--dataset", "photos", *RUN, "--live", "--out_dir",
                            "out/again", "--max_steps", 100_000, cwd=copied)
    assert status != 0 and "error: data/photos/plain/5.png" in text, text

def nan_losses(monkeypatch, *calls):
    """Make the losses of these calls, counted from 1, nan."""
    real, count = train.losses, []

    def losses(*arguments):
        count.append(1)
        total, *terms = real(*arguments)
        return (total * math.nan if len(count) in calls else total, *terms)

    monkeypatch.setattr(train, "losses", losses)

def test_a_step_whose_gradient_is_not_finite_changes_nothing(monkeypatch):
    s, config = train.settings_of(dict(batch_size=6)), model.ModelConfig(**TINY)

    def state_after(*bad, steps):
        with monkeypatch.context() as patch:
            nan_losses(patch, *bad)
            net, ddp, ema, optimizer = train.make_model(config, s, CPU, None, "off")
            for step in steps:
                noise, angle, nearer, _ = train.draw(step, slice(0, 6), s, config, CPU)
                batch = noise.flip(0), torch.arange(6) % 3, noise, angle, nearer
                train.train_step(ddp, ema, optimizer, 9, s, batch, contextlib.nullcontext)
        moments = [state[name] for state in optimizer.state.values() for name in sorted(state)]
        return [*net.state_dict().values(), *moments]

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    good = state_after(steps=[0, 2])
    assert equal(good, state_after(2, steps=[0, 1, 2]))
    assert not equal(good, state_after(steps=[0, 1, 2]))

def test_bad_steps_are_skipped_and_counted_and_ten_in_a_row_end_the_run(copied, monkeypatch):
    with monkeypatch.context() as patch:
        nan_losses(patch, 6)
        works(train_again(copied), "1 skipped")
    rows = read_log(copied / "out/again")
    assert [row["skipped"] for row in rows] == [0, 1, 0] and all(math.isfinite(row["loss"]) for row in rows)
    arguments = ("--max_steps", 30, "--out_dir", "out/nan")
    with monkeypatch.context() as patch:
        nan_losses(patch, *range(7, 30))
        fails_clearly(train_again(copied, *arguments), "in 10 steps in a row, up to step 16",
                      "--resume --lr")
    checkpoint = torch.load(copied / "out/nan/ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 4                                  # from before the bad steps
    works(train_again(copied, *arguments, "--resume", "--lr", 1e-4))

def test_keep_keeps_the_last_checkpoints_under_their_numbers(copied):
    works(train_again(copied, "--keep", 2, "--save_every", 3))
    names = sorted(file.name for file in (copied / "out/again").glob("ckpt*"))
    assert names == ["ckpt.pt", "ckpt_000009.pt", "ckpt_000012.pt"]
    assert torch.load(copied / "out/again/ckpt_000009.pt", weights_only=True)["step"] == 9

def test_settings_given_on_resuming_take_effect_or_are_refused(copied, monkeypatch):
    checkpoint = torch.load(copied / "out/photos/ckpt.pt", weights_only=True)
    checkpoint["optimizer"]["param_groups"][0]["fused"] = False     # as Apple's devices save it
    torch.save(checkpoint, copied / "out/photos/ckpt.pt")
    seen, real = [], train.train_step

    def look(ddp, ema, optimizer, *more):
        seen.append(optimizer.param_groups[0] | {})
        return real(ddp, ema, optimizer, *more)

    monkeypatch.setattr(train, "train_step", look)
    resume = ("--dataset", "photos", "--resume")
    works(script("train.py", *resume, "--max_steps", 13, "--weight_decay", 0.5, cwd=copied))
    assert seen[0]["weight_decay"] == 0.5 and seen[0]["fused"]
    fails_clearly(script("train.py", *resume, "--preset", "S", cwd=copied), "ckpt.pt", "--preset tiny")
    fails_clearly(script("train.py", *resume, "--out_dir", "out/none", cwd=copied), "out/none", "train.py")
    fails_clearly(train_again(copied, "--accumulate", 3), "--batch_size 8", "multiple of 3")

def test_the_resume_command_keeps_every_flag_quotes_paths_and_knows_nodes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_dir", "my data", "--dtype", "float32"])
    flags = "train.py --data_dir 'my data' --dtype float32 --resume"
    assert train.resume_command(1) == f"python {flags}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert train.resume_command(8) == f"torchrun --nproc_per_node=8 {flags}"
    assert "every node" in train.resume_command(16) and flags in train.resume_command(16)

def test_full_disk_keeps_the_old_file_and_bugs_get_their_traceback(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    encode.write_file(path, lambda file: file.write(b"old"))
    real = open
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, *mode: real("/dev/full", *mode))
        with pytest.raises(SystemExit, match="ckpt.pt.*No space left"):
            encode.run(lambda: train.save_checkpoint(path, dict(x=torch.zeros(100_000))))
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]
    for bug in (ValueError, RuntimeError, OSError, KeyError):
        def fail(*_):
            raise bug("a bug")
        with pytest.raises(bug):
            encode.run(fail)
    with pytest.raises(MemoryError):                                # is no damaged file
        with encode.reading("x", "y"):
            raise MemoryError

def test_devices_and_dtypes_are_those_asked_for(monkeypatch):
    def device(name):
        return encode.join(encode.make_parser("").parse_args(["--device", name]))[2]

    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda _, device: torch.zeros(0))
    monkeypatch.setenv("LOCAL_RANK", "3")
    device("cuda:1"), device("cuda")
    assert chosen == ["cuda:1", "cuda:3"]
    emulated = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation: emulated.append(including_emulation))
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    assert not encode.autocast(torch.device("cuda"), "auto") and emulated == [False]
    assert encode.autocast(torch.device("cuda"), "bfloat16")
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert encode.make_parser("").parse_args([]).workers <= 24

def test_training_logs_the_distance_of_samples_and_keeps_the_best_checkpoint(copied):
    """In two processes, of which only the first one measures."""
    works(torchrun("train.py", "--dataset", "photos", *RUN, "--max_steps", 8, "--eval_every", 4,
                   "--eval_images", 6, "--eval_features", "codec", "--out_dir", "out/again",
                   cwd=copied), "codec_6")
    values = [row["codec_6"] for row in read_log(copied / "out/again")]
    best = torch.load(copied / "out/again/best.pt", weights_only=True)
    assert len(values) == 2 and best["best"] == pytest.approx(min(values), rel=1e-4)
    assert best["step"] == 4 * (1 + values.index(min(values)))
    works(script("sample.py", "--ckpt", "out/again/best.pt", "--num_images", 2, cwd=copied))
    monkeypatch_weights = train_again(copied, "--eval_every", 4, "--out_dir", "out/x", "--weights_dir", "none")
    fails_clearly(monkeypatch_weights, fid.WEIGHTS_URL)
    assert not (copied / "out/x/ckpt.pt").exists()

# ---------------------------------------------------------------------------------------- sample.py

def test_sample_writes_grid_npz_and_folder_with_classes_in_equal_numbers(copied):
    for out in ("a.npz", "folder", "grid.png"):
        works(script("sample.py", "--num_images", 6, "--out", out, cwd=copied), f"wrote {out}")
    with np.load(copied / "a.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1] * 3
    files = sorted((copied / "folder").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(6)]
    assert all(np.array_equal(np.asarray(Image.open(f)), image) for f, image in zip(files, images))
    works(script("sample.py", "--num_images", 3, "--classes", "plain", "--out", "b.npz", cwd=copied))
    assert np.load(copied / "b.npz")["arr_1"].tolist() == [1, 1, 1]

def test_a_seed_makes_the_same_images_whatever_the_batch_size():
    def draw(batch_size, seed=0, **options):
        batches = sample.sample_batches(random_denoiser(), encode.load_codec("small"),
                                        torch.arange(10) % 3, batch_size, CPU, seed, **options)
        return np.concatenate(list(batches)).astype(int)

    for options in ({}, dict(same_noise=True, cfg_scale=2.0)):
        ten = draw(10, **options)
        assert np.abs(ten - draw(3, **options)).max() <= 1          # matrix products round by size
        assert np.abs(ten - draw(10, seed=1, **options)).max() > 50
        assert np.abs(ten[0] - ten[3]).max() > 50

def test_two_processes_make_the_very_images_that_one_makes(copied):
    arguments = ("--num_images", 11, "--batch_size", 3)             # the last batch is short
    text = works(torchrun("sample.py", *arguments, "--out", "two.npz", cwd=copied))
    assert text.count("wrote two.npz") == 1
    works(script("sample.py", *arguments, "--out", "one.npz", cwd=copied))
    assert (copied / "one.npz").read_bytes() == (copied / "two.npz").read_bytes()

def test_benches_print_rates_and_shares(copied):
    text = works(script("sample.py", "--bench", "--batch_size", 2, cwd=copied))
    rows = [line.split() for line in text.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[n, guided] for n in "1246" for guided in ("no", "yes")]
    assert float(rows[0][-1]) == 1 and float(rows[4][-1]) > 1.5     # three more trips to pixels
    text = works(torchrun("train.py", "--bench", "--latent", "16x8", "--batch_size", 4))
    assert text.count("images/s") == 1 and re.search(r"\d+% of its matrix products'", text)
    fails_clearly(script("train.py", "--bench", "--latent", "15x8", cwd=copied), "--latent", "15x8")

def test_filmstrips_show_steps_guidance_angles_and_the_way_between_samples(workspace):
    checkpoint = sample.load_checkpoint(workspace / "out/photos/ckpt.pt")
    denoiser, codec = sample.load_model(checkpoint), sample.load_codec_of(checkpoint)
    labels = torch.tensor([0, 1, 1])

    def draw(**options):
        return next(sample.sample_batches(denoiser, codec, labels, 3, CPU, steps=3, **options))

    def close(a, b):
        return np.abs(a.astype(int) - b).max() <= 1

    strip, last = draw(return_all=True), draw()
    assert strip.shape == (3, 3, 32, 32, 3) and np.array_equal(strip[2], last)
    noisy, seen = draw(view=sample.turn_towards_noise)
    noise = sample.draw_noise(0, range(3), (3, *codec.latent_shape)).transpose(0, 1)
    half = model.rotate(model.generate(denoiser, labels, 3, noise=noise), noise[0], math.pi / 4)
    assert close(noisy[0], last) and close(noisy[3], encode.to_uint8(codec.decode(half)))
    assert close(seen[3], encode.to_uint8(codec.decode(denoiser(half, labels))))
    way = draw(view=sample.walk_to_the_next)
    assert close(way[0], last) and close(way[-1], np.roll(last, -1, axis=0))
    for kind, columns, rows in (("steps", 4, 2), ("guidance", 6, 2), ("angle", 7, 4), ("slerp", 6, 2)):
        works(script("sample.py", "--filmstrip", kind, "--out", workspace / "strip.png", cwd=workspace))
        size = Image.open(workspace / "strip.png").size
        assert size == (columns * 68 + 4, rows * 80 + 4), kind

def test_every_way_of_sampling_writes_a_file_of_its_own(copied):
    written = set()
    for flags in ([], ["--cfg_scale", 3], ["--cfg_skip", 0], ["--same_noise"], ["--pixel_loop"],
                  ["--steps", 1], ["--dtype", "bfloat16"], ["--classes", "disc"]):
        text = works(script("sample.py", "--num_images", 2, *flags, cwd=copied))
        written.add(text.split("wrote ")[1].strip())
    assert len(written) == 8 and all((copied / name).is_file() for name in written)

MISTAKES = [    # a command line, and words of the last line that it prints
    (["sample.py", "--steps", 0], ["--steps", "0"]),
    (["sample.py", "--batch_size", 0], ["--batch_size", "0"]),
    (["train.py", "--batch_size", 0], ["--batch_size", "0"]),
    (["train.py", "--max_angle", 90], ["--max_angle", "90"]),
    (["sample.py", "--device", "cuda:99"], ["cuda:99", "auto or cpu"]),
    (["sample.py", "--device", "mps"], ["mps", "auto or cpu"]),
    (["sample.py", "--classes", "unicorn"], ["unicorn", "disc, plain"]),
    (["sample.py", "--ckpt", "not.pt"], ["not.pt", "python train.py"]),
    (["sample.py", "--ckpt", "other.pt"], ["other.pt", "python train.py"]),
    (["sample.py", "--ckpt", "old.pt"], ["old.pt", "format 2"]),
    (["sample.py", "--ckpt", "nowhere.pt"], ["nowhere.pt", "python train.py"]),
    (["sample.py", "--ckpt", "data"], ["data", "python train.py"]),
    (["sample.py", "--out", "x.jpg"], ["x.jpg", ".png"]),
    (["sample.py", "--filmstrip", "--out", "x.npz"], ["x.npz", ".png"]),
    (["sample.py", "--num_images", 1, "--out", "data/photos/disc"], ["data/photos/disc", "earlier"]),
    (["fid.py", "out.npz"], ["--ref"]),
]

@pytest.mark.parametrize("line, words", MISTAKES)
def test_mistakes_end_in_one_clear_line(workspace, line, words):
    (workspace / "not.pt").write_bytes(b"hello")
    torch.save(dict(x=1), workspace / "other.pt")
    torch.save(dict(format=2), workspace / "old.pt")
    fails_clearly(script(*line, cwd=workspace), *words)

def test_a_truncated_checkpoint_is_named(copied):
    path = copied / "out/photos/ckpt.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    fails_clearly(script("sample.py", cwd=copied), "ckpt.pt", "python train.py")
    fails_clearly(script("train.py", "--dataset", "photos", "--resume", cwd=copied), "ckpt.pt")

# ------------------------------------------------------------------------------------------- fid.py

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the published keys, by numpy's frozen generator, so that outputs can be pinned."""
    random, state = np.random.RandomState(0), {}
    for key, old in sorted(fid.InceptionV3().state_dict().items()):
        x = random.standard_normal(old.shape)
        if key.endswith("conv.weight") or key == "fc.weight":
            x *= np.sqrt(2 / np.prod(old.shape[1:]))
        elif "running_var" in key or "bn.weight" in key:
            x = 0.8 + 0.5 * np.abs(x)
        x = 0.3 * x if key.endswith(("bias", "mean")) else x
        state[key] = torch.tensor(x, dtype=torch.float32)
    path = tmp_path_factory.mktemp("weights") / "checkpoints" / fid.WEIGHTS
    encode.write_file(path, lambda file: torch.save(state, file))
    return path

@pytest.fixture(scope="module")
def net(weights):
    return fid.InceptionV3(weights)

def picture(size):
    """A smooth colour picture (1, 3, size, size) uint8."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(9 * x + 5 * y), np.cos(7 * x * y), np.sin(12 * y - 3 * x)]
    return torch.from_numpy(np.stack(waves) * 100 + 128).byte()[None]

def test_inception_takes_the_published_file(net):
    keys = set(net.state_dict())
    assert len(keys) == 472 and "Mixed_7c.branch3x3dbl_3b.bn.running_var" in keys
    assert sum(x.numel() for x in net.state_dict().values()) == 23_850_960 + 34_432
    assert net.Mixed_6b.branch7x7_2.conv.weight.shape == (128, 128, 1, 7)
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}    # nn.BatchNorm2d's
    net.load_state_dict(net.state_dict() | counters)

# pool3, spatial and logits of picture(size), by another implementation of the graph
PINNED = {
    32: ([0.61587, 0.77016, 114.91007, 19.54561], [2.56863, 10.85928, 6.31832, 14.68909],
         [0.46252, -46.00879, 43.96598, 101.09564]),
    256: ([0.62031, 0.77197, 115.45718, 19.61932], [2.57193, 10.69898, 6.41739, 14.7975],
          [0.47205, -46.30979, 44.16714, 101.49183]),
    320: ([0.62268, 0.7704, 115.44699, 19.62211], [2.5679, 10.68181, 6.43882, 14.80673],
          [0.46822, -46.30226, 44.16594, 101.49995]),
}

@pytest.mark.parametrize("size", PINNED)
def test_inception_computes_the_graph_of_2015(net, size):
    out = net(picture(size))
    assert [(name, x.shape[1]) for name, x in out.items()] == [("pool3", 2048), ("spatial", 2023),
                                                               ("logits", 1008)]
    for x, expected in zip(out.values(), PINNED[size]):
        some = x[0, ::x.shape[1] // 4][:4]
        torch.testing.assert_close(some, torch.tensor(expected), rtol=1e-4, atol=1e-4)

def test_inception_is_in_eval_mode_and_float32_whatever_the_caller_set(net):
    seen, image = [], picture(64)
    plain = net(image)["logits"]
    hook = net.Conv2d_1a_3x3.register_forward_hook(lambda *_: seen.append((
        torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"))))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net.train()(image)["logits"], plain) and not net.training
        assert seen == [(False, "highest", False)]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        hook.remove()
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    with pytest.raises(ValueError, match="uint8"):
        net(image.float())

@pytest.mark.parametrize("size", [32, 320])
def test_resize_reads_pixels_where_tensorflow_1_did(size):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=generator)
    got, source = fid.resize_tf1(image)[0, 0].numpy(), image[0, 0].numpy().astype(float)
    source = np.pad(source, (0, 1), "edge")
    for i, j in ((0, 0), (298, 298), (7, 200), (150, 33)):
        (y, v), (x, u) = divmod(i * size / 299, 1), divmod(j * size / 299, 1)
        window = source[int(y):int(y) + 2, int(x):int(x) + 2]
        exact = np.array([1 - v, v]) @ window @ np.array([1 - u, u])
        assert got[i, j] == pytest.approx(exact, abs=0.02)

def test_frechet_distance_is_exact_on_known_gaussians_also_without_full_rank():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 200, 200))
    s1, root = a @ a.T / 200, b @ b.T / 200
    mu, s2 = random.standard_normal(200), root @ s1 @ root          # the optimal map is `root`
    exact = mu @ mu + np.trace(s1) + np.trace(s2) - 2 * np.trace(root @ s1)
    assert fid.frechet_distance(0 * mu, s1, mu, s2) == pytest.approx(exact, abs=1e-9 * np.trace(s2))
    x, y = random.standard_normal((50, 200)), random.standard_normal((300, 200))
    for u, v in ((x, y), (y, x), (x, x)):
        u0, v0 = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (u, v))
        exact = ((u.mean(0) - v.mean(0)) ** 2).sum() + (u0 ** 2).sum() + (v0 ** 2).sum()
        exact -= 2 * np.linalg.svd(u0 @ v0.T)[1].sum()
        moments = u.mean(0), np.cov(u, rowvar=False), v.mean(0), np.cov(v, rowvar=False)
        assert fid.frechet_distance(*moments) == pytest.approx(exact, abs=1e-9 * 400)

def features_by_index(**arrays):
    """Batches of images that carry their number, and an extractor that looks their features up."""
    count = len(next(iter(arrays.values())))
    images = np.arange(count).view(np.uint8).reshape(count, 2, 4, 1)

    def look_up(batch):
        numbers = batch.reshape(-1, 8).copy().view(np.int64)[:, 0]
        return {name: torch.from_numpy(x[numbers]) for name, x in arrays.items()}

    return [images[start:start + 70] for start in range(0, count, 70)], count, look_up

def test_streamed_moments_are_those_of_the_whole_set():
    x = np.random.default_rng(0).standard_normal((500, 30)).astype(np.float32) + 5
    got = fid.measure(*features_by_index(pool3=x), metrics=["fid", "precision"], kept=100)
    np.testing.assert_allclose(got["mu"], x.astype(float).mean(0), rtol=1e-13)
    np.testing.assert_allclose(got["sigma"], np.cov(x.astype(float), rowvar=False), atol=1e-12)
    kept = {tuple(row) for row in got["pool3"].tolist()}
    assert len(kept) == 100 and kept <= {tuple(row) for row in x.tolist()}
    x[77, 3] = np.nan
    with pytest.raises(encode.UserError, match="finite"):
        fid.measure(*features_by_index(pool3=x), metrics=["fid"])

def test_inception_score_does_not_depend_on_samples_sorted_by_class():
    classes = np.repeat(np.arange(10), 1000)        # two splits: in file order, half the classes each
    assert fid.inception_score(torch.tensor(30 * np.eye(10)[classes])) == pytest.approx(10, rel=1e-3)
    logits = np.random.default_rng(0).standard_normal((400, 12))    # one split: the formula itself
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    exact = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert fid.inception_score(torch.from_numpy(logits)) == pytest.approx(exact, rel=1e-12)

def test_precision_and_recall_count_points_in_balls_of_the_third_neighbour():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((90, 6)), 1.4 * random.standard_normal((70, 6))

    def distance(x, y):
        return np.linalg.norm(x[:, None] - y[None], axis=2)

    def inside(x, y):
        return (distance(x, y) <= np.sort(distance(y, y))[:, 3]).any(1).mean()

    got = fid.precision_recall(*(torch.from_numpy(x).float() for x in (a, b)), block=1000)
    assert got == pytest.approx((inside(a, b), inside(b, a))) and 0 < got[0] < 1 and got[0] != got[1]

def write_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")

def measured(cwd, *args):
    """The last line of JSON of fid.py."""
    text = works(script("fid.py", *args, "--json", "--device", "cpu", cwd=cwd))
    return json.loads(text.splitlines()[-1])

def test_all_metrics_of_a_folder_and_of_its_saved_statistics(weights, tmp_path, monkeypatch):
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()       # the published file isn't here
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", sha256)
    images = encode.shapes(10)[0]
    np.savez(tmp_path / "s.npz", arr_0=images[:5])
    write_pngs(tmp_path / "ref" / "a", images[2:6])
    write_pngs(tmp_path / "ref" / "b", images[6:])
    arguments = ("s.npz", "--weights_dir", weights.parents[1], "--ref")
    first = measured(tmp_path, *arguments, "ref", "--save_stats", "stats.npz")
    assert (first["num_samples"], first["num_references"], first["left_out"]) == (5, 8, {})
    assert first["fid"] > 0 and first["sfid"] > 0 and 1 <= first["is"] <= 1008
    saved = dict(np.load(tmp_path / "stats.npz"))
    shapes = dict(mu=(2048,), sigma=(2048, 2048), mu_s=(2023,), sigma_s=(2023, 2023))
    assert all(saved[name].shape == shape for name, shape in shapes.items())    # as ADM's tool reads
    second = measured(tmp_path, *arguments, "stats.npz")
    for name in fid.METRICS[:5]:
        assert second[name] == pytest.approx(first[name]), name
    np.savez(tmp_path / "stats.npz", mu=saved["mu"], sigma=saved["sigma"])      # as pytorch-fid does
    third = measured(tmp_path, *arguments, "stats.npz")
    assert third["fid"] == pytest.approx(first["fid"])
    assert set(third["left_out"]) == {"sfid", "precision", "recall"}
    np.savez_compressed(tmp_path / "s.npz", arr_0=images[:5])
    assert measured(tmp_path, *arguments, "ref", "--metrics", "fid")["fid"] == first["fid"]

def test_class_agreement_tells_images_of_the_class_asked_for_from_others(tmp_path, monkeypatch):
    images, labels = encode.shapes(120, seed=5)
    monkeypatch.setattr(encode, "SHAPES_COUNT", 2500)
    wrong = np.where(np.arange(120) < 60, labels, (labels + 3) % 10)
    arguments = ("s.npz", "--metrics", "agreement", "--ref")
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=wrong)
    assert 0.4 < measured(tmp_path, *arguments, "shapes")["agreement"] < 0.6
    np.savez(tmp_path / "s.npz", arr_0=images)
    fails_clearly(script("fid.py", *arguments, "shapes", cwd=tmp_path), "labels of the samples")
    fails_clearly(script("fid.py", *arguments, "s.npz", cwd=tmp_path), "with classes")

def spoil(folder):
    write_pngs(folder, encode.shapes(4)[0])
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:99])

IMAGES = encode.shapes(4)[0]

def npz(**arrays):
    return lambda path: np.savez(path, **arrays)

BAD_SETS = [    # name, how to make it, words of the error; as samples, or else as the reference
    ("float.npz", npz(arr_0=IMAGES / 255), "uint8", True),
    ("wide.npz", npz(arr_0=IMAGES[:, :9]), "square", True),
    ("one.npz", npz(arr_0=IMAGES[:1]), "fewer than 2", True),
    ("keys.npz", npz(foo=IMAGES, bar=IMAGES), "foo, bar", True),
    ("text.npz", lambda path: path.write_text("hello"), "unusable", True),
    ("missing.npz", lambda path: None, "No such file", True),
    ("empty", lambda path: path.mkdir(), "holds no images", True),
    ("spoilt", spoil, "cannot be read", True),
    ("mixed", lambda path: write_pngs(path, [*IMAGES, IMAGES[0, :20, :20]]), "one size", True),
    ("flat", lambda path: write_pngs(path, IMAGES[:, :20]), "square", True),
    ("nan.npz", npz(mu=np.full(32, np.nan), sigma=np.eye(32)), "NaN", False),
    ("other.npz", npz(foo=1), "foo", False),
    ("misfit.npz", npz(mu=np.ones(3), sigma=1), "fit", False),
    ("narrow.npz", npz(mu=np.ones(3), sigma=np.eye(3)), "3 features", False),
    ("spoilt", spoil, "cannot be read", False),
    ("nowhere", lambda path: None, "no such dataset", False),
]

@pytest.mark.parametrize("name, make, words, as_samples", BAD_SETS)
def test_bad_sets_end_in_one_line_that_names_the_file(name, make, words, as_samples, tmp_path):
    np.savez(tmp_path / "good.npz", arr_0=IMAGES)
    make(tmp_path / name)
    samples, ref = (name, "good.npz") if as_samples else ("good.npz", name)
    result = script("fid.py", samples, "--ref", ref, "--features", "codec", cwd=tmp_path)
    fails_clearly(result, name, words)

def test_missing_or_other_weights_are_refused_with_the_place_to_get_them(weights, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=IMAGES)
    for folder in ("none", weights.parents[1]):
        result = script("fid.py", "s.npz", "--ref", "s.npz", "--weights_dir", folder, cwd=tmp_path)
        fails_clearly(result, fid.WEIGHTS_URL, fid.WEIGHTS_SHA256, folder)

# ---------------------------------------------------------------------------------------- README.md

def test_readme_names_only_flags_and_files_that_exist():
    text = (HERE / "README.md").read_text()
    scripts = "".join((HERE / name).read_text() for name in ("encode.py", "sample.py", "fid.py"))
    settings = {field.name for field in train.fields(train.Settings)}
    flags = set(re.findall(r"(?<![\w-])--([a-z]\w+)", text)) - {
        "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown_timeout"}
    known = scripts + (HERE / "train.py").read_text()
    assert len(flags) > 15
    assert [flag for flag in flags if flag not in settings and f'"--{flag}"' not in known] == []
    files = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"python (\w+\.py)", text)
    assert len(files) > 6 and [name for name in files if not (HERE / name).is_file()] == []
