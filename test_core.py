"""What the project promises, checked on a CPU without network in about a minute: python -m pytest -q"""
import argparse
import contextlib
import errno
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
import tracemalloc
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.attention
import torch.utils.flop_counter
from PIL import Image

import encode
import fid
import model
import sample
import train

torch.set_num_threads(1)

HERE = Path(__file__).parent
TINY = dict(tokens=16, channels=32, num_classes=3, width=32, depth=2, heads=2)


def command(*args, cwd=HERE):
    """Run one of the scripts as a user does, in a process of its own; returns (exit status, everything it printed)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return done.returncode, done.stdout


def script(name, *args, cwd=HERE):
    """The same within this process, which saves importing torch."""
    text, status, here, argv = io.StringIO(), 0, os.getcwd(), sys.argv
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
    return status, text.getvalue()


def fails_clearly(result, *words):
    """A user's mistake: non-zero status, no traceback, a last line that names the thing and the way out."""
    status, text = result
    assert status != 0, text
    assert "Traceback" not in text, text
    last = text.strip().splitlines()[-1]
    for word in words:
        assert str(word) in last, f"{word!r} is not in: {last}"


def draw_folder(folder, classes=("disc", "plain"), each=6, size=40, suffix=".png"):
    """A folder dataset of drawn images."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            image = Image.fromarray(np.full((size, size + 8, 3), rng.integers(0, 256, 3), np.uint8))
            if k == 0:
                image.paste(tuple(rng.integers(0, 256, 3).tolist()), (10, 10, 30, 30))
            image.save(folder / name / f"{i}{suffix}")
    return folder


def random_denoiser(**changes):
    """A small denoiser whose zero-initialised layers are filled, so that class and input matter."""
    torch.manual_seed(0)
    denoiser = model.Denoiser(model.ModelConfig(**TINY | changes))
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(denoiser.classes.weight)
    return denoiser.eval()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder dataset, trained for 12 steps by the command line: what most tests of the scripts look at."""
    folder = tmp_path_factory.mktemp("workspace")
    draw_folder(folder / "data" / "photos")
    status, text = command(HERE / "encode.py", "--dataset", "photos", "--fit_steps", 4, "--workers", 1, cwd=folder)
    assert status == 0, text
    status, text = command(HERE / "train.py", "--dataset", "photos", *RUN, "--max_steps", 12, cwd=folder)
    assert status == 0, text
    return folder


RUN = ("--batch_size", 8, "--log_every", 4, "--save_every", 4, "--sample_every", 100, "--workers", 1)

# ------------------------------------------------------------------------------------------- the sphere


def test_projected_latents_have_rms_one_in_float32():
    z = torch.randn(4, 16, 32, dtype=torch.bfloat16) * 7
    projected = model.to_sphere(z)
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.pow(2).mean((1, 2)).sqrt(), torch.ones(4), rtol=1e-5, atol=0)
    assert torch.equal(model.to_sphere(z, "none"), z.float())


def test_rotation_stays_on_the_sphere_and_turns_by_exactly_the_angle():
    z, noise = model.to_sphere(torch.randn(5, 16, 32)), torch.randn(5, 16, 32) * 3
    angle = torch.tensor([0.0, 0.3, 1.0, 1.5, math.pi / 2])
    v = model.rotate(z, noise, angle)
    torch.testing.assert_close(v.pow(2).mean((1, 2)), torch.ones(5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((v * z).mean((1, 2)), angle.cos(), rtol=0, atol=1e-5)
    assert ((v * noise).mean((1, 2)) > -1e-5)[1:].all()
    torch.testing.assert_close(model.rotate(z[:4], noise[:4], angle[:4], "none"), z[:4] + angle[:4].tan()[:, None, None] * noise[:4])    # a plain sum


def test_rotation_equals_projected_addition_of_orthogonal_noise():
    z = model.to_sphere(torch.randn(3, 16, 32))
    e = model.to_sphere(torch.randn(3, 16, 32))
    e = model.to_sphere(e - z * (z * e).mean((1, 2), keepdim=True))
    torch.testing.assert_close(model.rotate(z, e, 1.2), model.to_sphere(z + math.tan(1.2) * e), rtol=1e-4, atol=1e-5)


def test_the_tangents_of_noise_angles_are_logit_normal():
    u = (torch.arange(10_000) + 0.5) / 10_000
    r = model.noise_angle(u, 80.0, mean=0.5, std=2.0).tan() / math.tan(math.radians(80))
    logit = torch.log(r.double() / (1 - r.double()))
    assert abs(logit.mean() - 0.5) < 0.01 and abs(logit.std() - 2.0) < 0.02


def test_the_largest_angle_leaves_one_signal_to_noise_ratio_whatever_the_latents_size():
    for tokens, channels in ((16, 8), (16, 32), (64, 32)):
        assert math.sqrt(tokens * channels) / math.tan(math.radians(model.largest_angle(tokens, channels))) == pytest.approx(4.8, rel=0.05)
    assert model.largest_angle(256, 768) == 85


# ------------------------------------------------------------------------------------------- the denoiser


def test_xl_has_the_released_number_of_tensors_and_parameters():
    with torch.device("meta"):
        state = model.Denoiser(model.ModelConfig(**model.PRESETS["XL"])).state_dict()
    assert len(state) == 401
    assert sum(t.numel() for t in state.values()) == 675_160_896


def test_denoiser_starts_at_zero_and_sees_class_place_and_all_tokens():
    z, y = torch.randn(2, 16, 32), torch.tensor([0, 1])
    assert not model.Denoiser(model.ModelConfig(**TINY))(z, y).any()
    denoiser = random_denoiser()
    out = denoiser(z, y)
    assert (denoiser(z, torch.tensor([2, 3])) - out).abs().amax((1, 2)).min() > 1e-3          # class, and the null class
    assert (denoiser(z.flip(1), y).flip(1) - out).abs().max() > 1e-3                          # positions
    moved = z.clone()
    moved[:, 0] += 1
    assert ((denoiser(moved, y) - out).abs().amax(2) > 1e-6).all()                            # attention reaches every token


@pytest.mark.parametrize("shape", [dict(), dict(tokens=64, channels=48, width=64, depth=3)])
def test_flops_are_those_that_torch_counts(shape):
    config = model.ModelConfig(**TINY | shape)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.Denoiser(config)(torch.randn(1, config.tokens, config.channels), torch.tensor([1]))
    assert counter.get_total_flops() == model.flops(config)
    assert round(model.flops(model.ModelConfig(**model.PRESETS["XL"])) / 1e9) == 238


def test_positions_tell_rows_from_columns():
    p = model.sincos_2d(16, 32)[0].view(4, 4, 32)
    assert torch.equal(p[0, 1, :16], p[3, 1, :16]) and torch.equal(p[2, 0, 16:], p[2, 3, 16:])
    assert torch.unique(p.view(16, 32), dim=0).shape[0] == 16


def test_losses_are_the_papers_two_terms_and_send_gradient_where_they_say():
    denoiser = random_denoiser()
    z, noise, y = model.to_sphere(torch.randn(4, 16, 32)), torch.randn(4, 16, 32), torch.tensor([0, 1, 2, 3])
    angle, nearer = torch.full((4,), 1.2), torch.full((4,), 0.8)
    strong, weak = model.rotate(z, noise, angle), model.rotate(z, noise, math.atan(0.4 * math.tan(1.2)))
    mse = lambda a, b: (a - b).pow(2).mean((1, 2))
    total, reconstruction, consistency = model.losses(denoiser, z, y, noise, angle, nearer, 0.3)
    out, weak_out = denoiser(strong, y), denoiser(weak, y)
    torch.testing.assert_close(reconstruction, mse(out, z))
    torch.testing.assert_close(consistency, mse(out, weak_out))
    expected = (mse(out, z) + 0.3 * mse(out, weak_out.detach())).mean()
    torch.testing.assert_close(total, expected)
    for got, want in zip(*(torch.autograd.grad(x, list(denoiser.parameters())) for x in (total, expected))):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------- sampling


def test_generate_walks_noise_predict_rotate_predict():
    denoiser, y = random_denoiser(max_angle=60.0), torch.tensor([0, 1, 2])
    noise = torch.randn(3, 16, 32)
    e = model.to_sphere(noise)
    with torch.no_grad():
        x1 = denoiser(e, y)
        x2 = denoiser(model.rotate(x1, e, math.atan(0.5 ** 1.5 * math.tan(math.radians(60)))), y)
    every = model.generate(denoiser, y, steps=2, noise=noise, return_all=True)
    torch.testing.assert_close(every, torch.stack([x1, x2]))
    with torch.no_grad():
        x2_fresh = denoiser(model.rotate(x1, noise.flip(0), math.atan(0.5 ** 1.5 * math.tan(math.radians(60)))), y)
    torch.testing.assert_close(model.generate(denoiser, y, steps=2, noise=torch.stack([noise, noise.flip(0)])), x2_fresh)
    torch.testing.assert_close(model.generate(denoiser, y, steps=2, noise=noise.flip(0), start=e, return_all=True)[0], x1)
    again = [model.generate(denoiser, y, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
    with pytest.raises(ValueError, match="steps"):
        model.generate(denoiser, y, steps=0)


def test_what_the_class_decides_can_be_computed_once():
    denoiser, y, z = random_denoiser(), torch.tensor([0, 3, 2]), torch.randn(3, 16, 32)
    assert torch.equal(denoiser(z, denoiser.modulation(y)), denoiser(z, y))
    denoiser(z, y).square().sum().backward()
    assert [name for name, parameter in denoiser.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_guidance_extrapolates_from_the_null_class():
    denoiser, y, noise = random_denoiser(), torch.tensor([0, 1, 2]), torch.randn(3, 16, 32)
    with torch.no_grad():
        x, null = (denoiser(model.to_sphere(noise), labels) for labels in (y, torch.full_like(y, 3)))
    torch.testing.assert_close(model.generate(denoiser, y, steps=1, noise=noise, cfg_scale=3), null + 3 * (x - null))
    torch.testing.assert_close(model.generate(denoiser, y, steps=1, noise=noise, cfg_scale=1), x)


def test_first_steps_can_go_without_guidance_but_the_last_two_never_do():
    denoiser, y, noise = random_denoiser(), torch.tensor([0, 1, 2]), torch.randn(4, 3, 16, 32)
    draw = lambda n, **options: model.generate(denoiser, y, steps=n, noise=noise[:n], return_all=True, **options)
    plain, guided, skipped = draw(4), draw(4, cfg_scale=3), draw(4, cfg_scale=3, cfg_skip=1)
    torch.testing.assert_close(skipped[0], plain[0])
    assert not torch.allclose(skipped[1], plain[1]) and not torch.allclose(skipped[1], guided[1])
    torch.testing.assert_close(draw(4, cfg_scale=3, cfg_skip=9)[1], plain[1])
    assert not torch.allclose(draw(4, cfg_scale=3, cfg_skip=9)[2], plain[2])
    for n in (1, 2):
        torch.testing.assert_close(draw(n, cfg_scale=3, cfg_skip=1), draw(n, cfg_scale=3))


def test_guidance_takes_two_batches_where_memory_is_short(monkeypatch):
    denoiser, y, noise, sizes = random_denoiser(), torch.tensor([0, 1, 2]), torch.randn(3, 16, 32), []
    whole, real = model.generate(denoiser, y, steps=2, noise=noise, cfg_scale=3), denoiser.forward

    def forward(z, labels):
        sizes.append(len(z))
        if len(z) > 3:
            raise torch.OutOfMemoryError("no room")
        return real(z, labels)

    monkeypatch.setattr(denoiser, "forward", forward)
    torch.testing.assert_close(model.generate(denoiser, y, steps=2, noise=noise, cfg_scale=3), whole)
    assert sizes == [6, 3, 3, 3, 3]
    monkeypatch.setattr(denoiser, "forward", lambda z, labels: forward(z.repeat(2, 1, 1), labels))
    with pytest.raises(torch.OutOfMemoryError):
        model.generate(denoiser, y, steps=2, noise=noise, cfg_scale=3)


def test_pixel_loop_goes_through_the_codec_between_steps_only():
    denoiser, y, noise, calls = random_denoiser(), torch.tensor([0, 1, 2]), torch.randn(3, 16, 32), []

    class Halving(torch.nn.Module):
        def decode(self, z):
            calls.append("decode")
            return z / 2

        def encode(self, images):
            calls.append("encode")
            return images * 2

    looped = model.generate(denoiser, y, steps=3, noise=noise, pixel_loop=Halving())
    assert calls == ["decode", "encode"] * 2
    torch.testing.assert_close(looped, model.generate(denoiser, y, steps=3, noise=noise))


# ------------------------------------------------------------------------------------------- images and datasets


def test_shapes_are_the_same_for_a_seed_varied_and_balanced():
    images, labels = encode.shapes(200, seed=3)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    again, _ = encode.shapes(50, seed=3)
    assert np.array_equal(images[:50], again)
    assert not np.array_equal(images[:50], encode.shapes(50, seed=4)[0])
    assert (np.bincount(labels) == 20).all() and len(encode.SHAPES) == 10
    assert len(np.unique(images[:, 0, 0], axis=0)) > 190                                     # backgrounds
    assert (np.ptp(images.reshape(200, -1, 3), axis=1).min(0) > 60).all()                    # every shape stands out


@pytest.mark.parametrize("width, height", [(331, 150), (63, 200), (64, 64), (5, 9), (33, 32)])
def test_center_crop_is_adms(width, height):
    """Box-halving while the shorter side is at least twice the size, bicubic to the size, an array slice from the middle."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    expected = image
    while min(*expected.size) >= 64:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.Resampling.BOX)
    scale = 32 / min(*expected.size)
    expected = np.array(expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.Resampling.BICUBIC))
    top, left = (expected.shape[0] - 32) // 2, (expected.shape[1] - 32) // 2
    assert np.array_equal(np.asarray(encode.center_crop(image, 32)), expected[top:top + 32, left:left + 32])


def test_every_kind_of_image_file_is_read_as_upright_rgb(tmp_path):
    red_above_blue = Image.new("RGB", (32, 32), "red")
    red_above_blue.paste("blue", (0, 16, 32, 32))
    turned = red_above_blue.transpose(Image.Transpose.ROTATE_90)                             # EXIF 6 says: turn by 270 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    red_above_blue.save(tmp_path / "a.webp", lossless=True)
    red_above_blue.quantize(4).save(tmp_path / "palette.png")
    for name in ("exif.jpg", "a.webp", "palette.png"):
        image = encode.load_image(tmp_path / name, 32).astype(int)
        assert image.shape == (32, 32, 3)
        assert image[4, 16, 0] > 230 and image[4, 16, 2] < 25 and image[28, 16, 2] > 230, name
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (encode.load_image(tmp_path / "clear.png", 32) == 255).all()                      # transparency on white
    Image.new("L", (40, 40), 77).save(tmp_path / "grey.png")
    assert (encode.load_image(tmp_path / "grey.png", 32) == 77).all()
    Image.fromarray(np.full((40, 40), 77 * 257, np.uint16)).save(tmp_path / "grey16.png")
    assert (encode.load_image(tmp_path / "grey16.png", 32) == 77).all()


def test_folder_datasets_keep_class_names_and_ignore_what_is_no_image(tmp_path):
    draw_folder(tmp_path / "data" / "pets" / "train", ("cat", "a dog"), each=3)
    (tmp_path / "data" / "pets" / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "data" / "pets" / "train" / ".hidden").mkdir()
    found = encode.find_dataset(str(tmp_path / "data" / "pets" / "train"), tmp_path / "data")
    assert found["classes"] == ["a dog", "cat"] and found["name"] == "pets-train"
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1]


# ------------------------------------------------------------------------------------------- the codec


def test_shipped_codec_reconstructs_unseen_shapes_at_30_db_and_forgives_rotated_latents():
    codec = encode.load_codec("small")
    images = encode.to_float(encode.shapes(200, seed=123)[0])
    z = codec.encode(images)
    assert z.shape == (200, *codec.latent_shape) and codec.image_size == 32 and not codec.training
    torch.testing.assert_close(z, model.to_sphere(z))
    psnr = lambda x: -10 * (x - images).pow(2).mean((1, 2, 3)).log10().mean()
    assert psnr(codec.decode(z)) > 30
    turned = codec.decode(model.rotate(z, torch.randn(z.shape, generator=torch.Generator().manual_seed(0)), 0.4))
    assert psnr(turned) > 25
    assert (HERE / "assets" / "small_shapes.pt").stat().st_size < 2e6
    wild = codec.decode(torch.randn(2, 16, 32) * 9)
    assert wild.min() >= 0 and wild.max() <= 1


def test_fitting_learns_and_the_larger_codec_has_more_tokens(tmp_path):
    images, _ = encode.shapes(200)
    worse, better = (encode.fit_codec(images, tmp_path / f"{n}.pt", 32, steps=n, batch_size=16) for n in (2, 60))
    assert better > worse + 1
    encode.fit_codec(images[:20].repeat(2, axis=1).repeat(2, axis=2), tmp_path / "large.pt", 64, steps=1, batch_size=4)
    codec = encode.load_codec("small64", tmp_path / "large.pt")
    assert codec.image_size == 64 and codec.latent_shape == (64, 32)
    assert codec.decode(codec.encode(torch.rand(2, 3, 64, 64))).shape == (2, 3, 64, 64)


# ------------------------------------------------------------------------------------------- the cache


def test_cache_holds_the_latents_of_the_images_with_labels_and_statistics(workspace):
    data = workspace / "data"
    found = encode.find_dataset("photos", data)                   # the cache lies beside the class folders and is not one
    latents, labels, meta = encode.open_cache(found, "small", data)
    codec = encode.load_codec("small", data / "photos" / "small.pt")
    z = codec.encode(encode.to_float(np.stack([encode.load_image(path, 32) for path in found["paths"]])))
    assert latents.dtype == np.float16 and isinstance(latents, np.memmap)
    torch.testing.assert_close(torch.from_numpy(np.array(latents)).float(), z, rtol=1e-2, atol=2e-3)
    assert labels.tolist() == found["labels"].tolist() and meta["classes"] == ["disc", "plain"]
    torch.testing.assert_close(torch.tensor(meta["mean"]), z.mean((0, 1)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(meta["std"]), z.flatten(0, 1).std(0, correction=0), rtol=1e-3, atol=1e-3)


@pytest.fixture
def copied(workspace, tmp_path):
    """A copy of the workspace to spoil."""
    shutil.copytree(workspace, tmp_path / "copy")
    return tmp_path / "copy"


def train_again(cwd, *more):
    return script("train.py", "--dataset", "photos", *RUN, "--max_steps", 12, "--out_dir", "out/again", *more, cwd=cwd)


def test_damaged_foreign_or_outdated_cache_is_refused_with_the_command_that_remakes_it(copied):
    cache = copied / "data" / "photos" / "small"
    whole = (cache / "latents.npy").read_bytes()
    (cache / "latents.npy").write_bytes(whole[:-100])
    fails_clearly(train_again(copied), cache.relative_to(copied), "python encode.py --dataset photos --codec small")
    (cache / "latents.npy").write_bytes(whole)
    draw_folder(copied / "data" / "photos", each=7)
    fails_clearly(train_again(copied), "other images", "python encode.py --dataset photos")
    status, text = script("encode.py", "--dataset", "photos", "--workers", 1, cwd=copied)
    assert status == 0 and "14 images of 2 classes" in text, text
    script("encode.py", "--dataset", "photos", "--fit", "--fit_steps", 2, "--workers", 1, cwd=copied)
    fails_clearly(train_again(copied), "another codec", "python encode.py --dataset photos")
    fails_clearly(script("sample.py", cwd=copied), "small.pt", "python train.py --dataset photos")


def test_killed_encoding_keeps_the_earlier_cache_and_goes_on_without_encoding_anything_twice(copied, monkeypatch):
    monkeypatch.chdir(copied)
    found, codec = encode.find_dataset("photos"), encode.load_codec("small", "data/photos/small.pt")
    cache, real, seen = copied / "data/photos/small", codec.encode, []
    before = {file.name: file.read_bytes() for file in cache.iterdir()}

    def count(images):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return real(images)

    monkeypatch.setattr(codec, "encode", count)
    with pytest.raises(KeyboardInterrupt):
        encode.write_cache(found, "small", codec, batch_size=5)
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == before
    monkeypatch.setattr(codec, "encode", lambda images: seen.append(len(images)) or real(images))
    encode.write_cache(found, "small", codec, batch_size=4)        # the batches of the first try count: 5, 5 and 2
    assert seen == [5, 5, 2]
    resumed = (cache / "latents.npy").read_bytes()
    encode.write_cache(found, "small", codec, batch_size=5)
    assert (cache / "latents.npy").read_bytes() == resumed and seen[3:] == [5, 5, 2]
    encode.open_cache(found, "small", codec=codec)
    assert sorted(file.name for file in cache.parent.iterdir()) == ["disc", "plain", "small", "small.pt"]


def test_full_disk_while_encoding_names_the_file_and_keeps_what_is_done(copied, monkeypatch):
    shutil.rmtree(copied / "data/photos/small")
    calls, real = [], os.fsync

    def full(number):
        calls.append(number)
        if len(calls) == 3:                                        # the plan, the first batch, the second
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(number)

    run = lambda: script("encode.py", "--dataset", "photos", "--batch_size", 5, "--workers", 1, cwd=copied)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        fails_clearly(run(), ".small.tmp/latents.npy", "No space left", "is kept", "free some disk space and run the command again")
    assert np.isnan(np.load(copied / "data/photos/.small.tmp/moments.npy")).any((1, 2)).tolist() == [False, True, True]
    assert run()[0] == 0


def test_an_unfinished_cache_of_another_codec_is_not_continued(copied, monkeypatch):
    monkeypatch.chdir(copied)
    found, codec = encode.find_dataset("photos"), encode.load_codec("small", "data/photos/small.pt")
    plan = dict(codec="small", codec_sha256="another", shape=[12, 16, 32], image_size=32, classes=found["classes"], source=found["source"],
                flip=False, batch_size=5)
    encode.start_cache(copied / "data/photos/.small.tmp", copied, plan | dict(shape=(12, 16, 32))).close()
    np.save(copied / "data/photos/.small.tmp/moments.npy", np.zeros((3, 2, 32)))                  # says that all is done
    shutil.rmtree("data/photos/small")
    encode.write_cache(found, "small", codec)
    assert (np.abs(encode.open_cache(found, "small", codec=codec)[0]).max((1, 2)) > 0).all()


def test_several_processes_write_the_cache_that_one_writes(copied):
    before = (copied / "data/photos/small/latents.npy").read_bytes()
    shutil.rmtree(copied / "data/photos/small")
    status, text = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "encode.py", "--dataset", "photos",
                           "--batch_size", 3, "--workers", 1, cwd=copied)
    assert status == 0 and "6/6" in text and "12/12" not in text, text    # half of the 12 images for the one that shows its progress
    after = np.frombuffer((copied / "data/photos/small/latents.npy").read_bytes()[128:], np.float16)
    np.testing.assert_allclose(after, np.frombuffer(before[128:], np.float16), atol=2e-3)
    assert json.loads((copied / "data/photos/small/meta.json").read_text())["skipped"] == 0


def test_two_encoders_at_once_and_a_disk_too_small_are_told_before_anything_is_encoded(copied, monkeypatch):
    shutil.rmtree(copied / "data/photos/small")
    temporary = copied / "data/photos/.small.tmp"
    found = encode.find_dataset("photos", copied / "data")
    lock = encode.start_cache(temporary, "x", dict(shape=(12, 16, 32), flip=False, batch_size=5))
    fails_clearly(script("encode.py", "--dataset", "photos", cwd=copied), "data/photos/small", "another process")
    lock.close()
    usage = shutil.disk_usage(copied)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    fails_clearly(script("encode.py", "--dataset", "photos", "--codec", "small", cwd=copied), "0 MB free", "--live")
    assert len(found["labels"]) == 12 and not (copied / "data/photos/small").exists()


def test_flip_caches_the_mirrored_views_behind_the_others(copied):
    data = copied / "data"
    before = np.array(np.load(data / "photos/small/latents.npy"))
    fails_clearly(train_again(copied, "--flip"), "mirrored", "encode.py --dataset photos --codec small --flip")
    status, text = script("encode.py", "--dataset", "photos", "--flip", "--workers", 1, cwd=copied)
    assert status == 0 and "mirrored" in text, text
    found, codec = encode.find_dataset("photos", data), encode.load_codec("small", data / "photos/small.pt")
    latents, labels, meta = encode.open_cache(found, "small", data, codec, flip=True)
    assert labels.tolist() == found["labels"].tolist() * 2 and meta["shape"][0] == 24
    np.testing.assert_array_equal(latents[:12], before)
    mirrored = codec.encode(encode.to_float(np.stack([encode.load_image(path, 32)[:, ::-1] for path in found["paths"]])))
    torch.testing.assert_close(torch.from_numpy(np.array(latents[12:])).float(), mirrored, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(encode.read_rows(latents, np.array([13, 0])), torch.from_numpy(latents[[13, 0]]))


def test_reconstruct_writes_pairs_and_prints_their_psnr(copied):
    status, text = script("encode.py", "--reconstruct", "data/photos/disc", "--codec", "small", "--out", "pairs.png", "--workers", 1, cwd=copied)
    picture = np.asarray(Image.open(copied / "pairs.png"))
    assert status == 0 and picture.shape == (64, 256, 3), text     # 6 pairs of 32x32, four in a row
    original = encode.load_image(copied / "data/photos/disc/0.png", 32)
    np.testing.assert_array_equal(picture[:32, :32], original)
    error = ((picture[:32, 32:64] / 255 - original / 255) ** 2).mean()
    assert f"{-10 * np.log10(error):.1f}"[:3] == text.split()[0][:3] and text.count(" dB ") == 7
    status, text = script("encode.py", "--dataset", "photos", "--reconstruct", "--workers", 1, cwd=copied)
    assert status == 0 and text.count(" dB ") == 21 and Image.open(copied / "out/reconstruction.png").size == (256, 160), text
    fails_clearly(script("encode.py", "--reconstruct", "nowhere", "--codec", "small", cwd=copied), "nowhere", "no such image")


def test_encode_bench_prints_the_rate_alone_and_with_reading_and_writing(copied):
    status, text = script("encode.py", "--dataset", "photos", "--bench", "--batch_size", 2, "--workers", 1, cwd=copied)
    bare, whole = (float(x) for x in re.search(r"bare encoder ([\d.]+) images/s, from files to the cache ([\d.]+)", text).groups())
    assert status == 0 and 0 < whole < bare, text
    assert sorted(file.name for file in (copied / "data").iterdir()) == ["photos"]


def test_unreadable_images_are_named_or_skipped_and_counted(copied):
    bad = sorted((copied / "data" / "photos" / "disc").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:60])
    fails_clearly(script("encode.py", "--dataset", "photos", "--workers", 1, cwd=copied), bad.name, "--skip_bad")
    status, text = script("encode.py", "--dataset", "photos", "--workers", 1, "--skip_bad", cwd=copied)
    assert status == 0 and "11 images" in text and "1 unreadable" in text and bad.name in text, text
    assert train_again(copied)[0] == 0


def test_useless_dataset_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    fails_clearly(script("encode.py", "--dataset", "empty", cwd=tmp_path), "empty", "one sub-folder per class")
    draw_folder(tmp_path / "photos", each=1)
    (tmp_path / "photos" / "void").mkdir()
    fails_clearly(script("encode.py", "--dataset", "photos", cwd=tmp_path), Path("photos") / "void")
    fails_clearly(script("train.py", "--dataset", "nowhere", cwd=tmp_path), "nowhere")


# ------------------------------------------------------------------------------------------- the datasets by name


def draw_flowers(folder, numbers=(1, 1, 74, 74, 54, 54), labels=None):
    """Oxford's two files, with drawn flowers: 102flowers.tgz with jpg/image_00001.jpg..., imagelabels.mat."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        for i, number in enumerate(numbers):
            file = io.BytesIO()
            Image.new("RGB", (300, 260), (number, 40 * i, 90)).save(file, "JPEG")
            info = tarfile.TarInfo(f"jpg/image_{i + 1:05d}.jpg")
            info.size = file.tell()
            archive.addfile(info, io.BytesIO(file.getvalue()))
    scipy.io.savemat(folder / "imagelabels.mat", dict(labels=np.array([labels or numbers], np.uint8)))


def no_network(*_, **__):
    raise urllib.error.URLError("no network in tests")


def test_flowers_are_unpacked_from_oxfords_archive_with_their_names(tmp_path):
    draw_flowers(tmp_path / "flowers")
    found = encode.find_dataset("flowers", tmp_path)
    assert found["name"] == "flowers" and found["classes"] == ["pink primrose", "sunflower", "rose"]
    assert found["labels"].tolist() == [0, 0, 2, 2, 1, 1] and [Path(p).name for p in found["paths"]][:2] == ["image_00001.jpg", "image_00002.jpg"]
    assert encode.load_image(found["paths"][2], 256).shape == (256, 256, 3) and len(encode.FLOWERS) == 102
    (tmp_path / "flowers" / "102flowers.tgz").unlink()             # no longer needed
    assert encode.find_dataset("flowers", tmp_path)["source"] == found["source"]


def test_afhq_and_imagenet_are_their_training_parts(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for part, name in [("train", "dog"), ("train", "cat"), ("val", "cat")]:
            file = io.BytesIO()
            Image.new("RGB", (20, 20)).save(file, "JPEG")
            archive.writestr(f"afhq/{part}/{name}/flickr_1.jpg", file.getvalue())
        archive.writestr("../../escaped.txt", "no")
    (tmp_path / "data/afhq").mkdir(parents=True)
    (tmp_path / "x.zip").rename(tmp_path / "data/afhq/afhq.zip")
    found = encode.find_dataset("afhq", tmp_path / "data")
    assert found["classes"] == ["cat", "dog"] and found["name"] == "afhq" and len(found["labels"]) == 2
    assert (tmp_path / "data/afhq/val/cat/flickr_1.jpg").is_file() and not list(tmp_path.parent.rglob("escaped.txt"))
    draw_folder(tmp_path / "data/imagenet/train", ("n01440764", "n01443537"), each=2, suffix=".JPEG")
    found = encode.find_dataset("imagenet", tmp_path / "data")
    assert found["name"] == "imagenet" and found["classes"] == ["n01440764", "n01443537"]


def test_wrong_or_broken_archives_and_labels_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(encode.urllib.request, "urlopen", no_network)
    flowers = lambda: script("encode.py", "--dataset", "flowers", "--codec", "small", cwd=tmp_path)
    fails_clearly(flowers(), "data/flowers/102flowers.tgz", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", "by hand")
    fails_clearly(script("train.py", "--dataset", "afhq", cwd=tmp_path), "data/afhq/afhq.zip", "https://www.dropbox.com")
    fails_clearly(script("encode.py", "--dataset", "imagenet", cwd=tmp_path), "data/imagenet", "ln -s")
    shutil.rmtree(tmp_path / "data")
    draw_flowers(tmp_path / "data/flowers", labels=[1, 1, 2])
    fails_clearly(flowers(), "imagelabels.mat", "3 labels for the 6 images")
    (tmp_path / "data/flowers/imagelabels.mat").write_bytes(b"nonsense")
    fails_clearly(flowers(), "imagelabels.mat", "delete it")
    shutil.rmtree(tmp_path / "data/flowers/jpg")
    archive = tmp_path / "data/flowers/102flowers.tgz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-200])
    fails_clearly(flowers(), "102flowers.tgz", "cannot be unpacked")
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(tarfile.TarInfo("other/readme"))
    fails_clearly(flowers(), "102flowers.tgz", "no folder called jpg")
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(tarfile.TarInfo("../../escaped"))
    fails_clearly(flowers(), "102flowers.tgz", "outside")
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path / "data/flowers/.unpacked.tmp").exists()


def test_a_download_goes_on_where_it_broke_off_and_is_checked(tmp_path, monkeypatch):
    content, asked = bytes(range(256)) * 5000, []

    class Answer(io.BytesIO):
        def __init__(self, request, cut=None):
            start = int((request.get_header("Range") or "bytes=0-")[6:-1])
            asked.append(start)
            super().__init__(content[start:cut])
            self.status, self.headers = 206 if start else 200, {"Content-Length": len(content) - start}

    url, path = "https://host/file.tgz", tmp_path / "new" / "file.tgz"
    monkeypatch.setattr(encode.urllib.request, "urlopen", lambda request, timeout: Answer(request, cut=700_000))
    with pytest.raises(OSError, match="broke off after 700,000 of 1,280,000 bytes.*go on"):
        encode.download(url, path)
    assert not path.exists()
    monkeypatch.setattr(encode.urllib.request, "urlopen", lambda request, timeout: Answer(request))
    encode.download(url, path, md5=hashlib.md5(content).hexdigest())
    assert asked == [0, 700_000] and path.read_bytes() == content and [file.name for file in path.parent.iterdir()] == ["file.tgz"]
    path.unlink()
    with pytest.raises(ValueError, match="md5"):
        encode.download(url, path, md5="0" * 32)
    assert not list(path.parent.iterdir())


# ------------------------------------------------------------------------------------------- the representation autoencoder

HUBCONF = '''
dependencies = ["torch"]
import torch

class Encoder(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, width, 14, 14)
        self.norm = torch.nn.LayerNorm(width, eps=1e-6)

    def forward_features(self, x):
        return dict(x_norm_patchtokens=self.norm(self.patch(x).flatten(2).transpose(1, 2)), x_norm_clstoken=None)

def dinov2_vitb14_reg(pretrained=True):
    model = Encoder(768)
    if pretrained:
        model.load_state_dict(torch.hub.load_state_dict_from_url(
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", map_location="cpu"), strict=True)
    return model
'''


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder with files of the published names, a one-layer DINOv2 and a narrow decoder in them."""
    torch.manual_seed(0)
    folder = tmp_path / "hub"
    (folder / "facebookresearch_dinov2_main").mkdir(parents=True)
    (folder / "facebookresearch_dinov2_main" / "hubconf.py").write_text(HUBCONF)
    (folder / "checkpoints").mkdir()
    encoder = dict({"patch.weight": torch.randn(768, 3, 14, 14), "patch.bias": torch.randn(768),
                    "norm.weight": torch.rand(768) * 3, "norm.bias": torch.randn(768)})
    monkeypatch.setattr(encode, "ViTDecoder", functools.partial(encode.ViTDecoder, hidden=32, depth=2, heads=4, mlp=48))
    decoder = {name: torch.randn(t.shape) * 0.3 for name, t in encode.ViTDecoder().state_dict().items()}
    for name, state in [("dinov2_vitb14_reg4_pretrain.pth", encoder), ("rae-wReg_base-decoder-5fedf7c9.pt", decoder),
                        ("rae-wReg_base-stat-84ede66d.pt", dict(mean=None, var=torch.rand(768, 16, 16) + 0.01))]:
        torch.save(state, folder / "checkpoints" / name)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    return folder


def test_vit_decoder_has_the_published_tensors():
    with torch.device("meta"):
        state = encode.ViTDecoder().state_dict()
    assert len(state) == 456 and sum(t.numel() for t in state.values()) == 415_352_704
    assert state["decoder_layers.27.attention.attention.query.weight"].shape == (1152, 1152)
    assert state["decoder_layers.0.intermediate.dense.weight"].shape == (4096, 1152)
    assert state["decoder_pos_embed"].shape == (1, 257, 1152) and state["trainable_cls_token"].shape == (1, 1, 1152)
    with torch.device("meta"):
        for width, latent, tensors, numbers in [((768, 12, 12, 3072), 768, 200, 86_435_328), ((1152, 28, 16, 4096), 384, 456, 414_910_336)]:
            state = encode.ViTDecoder(*width, latent_dim=latent).state_dict()
            assert (len(state), sum(t.numel() for t in state.values())) == (tensors, numbers)


def test_vit_decoder_computes_the_published_network():
    """Against the same network written with plain matrix products, one token and one pixel at a time where that is clearest."""
    torch.manual_seed(0)
    net = encode.ViTDecoder(hidden=24, depth=2, heads=3, mlp=40, latent_dim=10, patch=4, grid=3).double()
    w = {name: torch.randn(t.shape, dtype=torch.float64) * 0.2 for name, t in net.state_dict().items()}
    net.load_state_dict(w)
    tokens = torch.randn(2, 9, 10, dtype=torch.float64) * 1e-3      # small, so that an eps of 1e-6 in the norms would show
    w["decoder_embed.bias"] *= 1e-3
    net.load_state_dict(w)
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda x, name: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    x = torch.cat([w["trainable_cls_token"].repeat(2, 1, 1), linear(tokens, "decoder_embed")], 1) + w["decoder_pos_embed"]
    for layer in ("decoder_layers.0", "decoder_layers.1"):
        y = norm(x, f"{layer}.layernorm_before")
        q, k, v = (linear(y, f"{layer}.attention.attention.{name}") for name in ("query", "key", "value"))
        heads = [torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / 8 ** 0.5, -1) @ v[..., h] for h in (slice(0, 8), slice(8, 16), slice(16, 24))]
        x = x + linear(torch.cat(heads, -1), f"{layer}.attention.output.dense")
        y = linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)), f"{layer}.output.dense")
    x = linear(norm(x, "decoder_norm"), "decoder_pred")[:, 1:]
    image = net(tokens)
    assert image.shape == (2, 3, 12, 12)
    for row, column, colour in [(0, 0, 0), (5, 2, 1), (11, 7, 2)]:
        token, inside = row // 4 * 3 + column // 4, (row % 4 * 4 + column % 4) * 3 + colour
        torch.testing.assert_close(image[:, colour, row, column], x[:, token, inside])
    with pytest.raises(ValueError, match="9 tokens, got 4"):
        net(tokens[:, :4])


def test_rae_encodes_and_decodes_by_the_published_formulas(hub):
    codec = encode.load_codec("rae")
    assert codec.image_size == 256 and codec.latent_shape == (256, 768) and not codec.training
    images = torch.rand(2, 3, 256, 256)
    z = codec.encode(images)
    state = torch.load(hub / "checkpoints/dinov2_vitb14_reg4_pretrain.pth", weights_only=True)
    var = torch.load(hub / "checkpoints/rae-wReg_base-stat-84ede66d.pt", weights_only=True)["var"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    small = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", align_corners=False, antialias=False)
    tokens = torch.nn.functional.conv2d((small - mean) / std, state["patch.weight"], state["patch.bias"], stride=14)     # (B, C, 16, 16)
    tokens = (tokens - tokens.mean(1, keepdim=True)) / (tokens.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()          # no affine
    torch.testing.assert_close(z, (tokens / (var + 1e-5).sqrt()).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    x = codec.decoder((z.transpose(1, 2).unflatten(2, (16, 16)) * (var + 1e-5).sqrt()).flatten(2).transpose(1, 2)) * std + mean
    assert x.min() < 0 and x.max() > 1
    torch.testing.assert_close(codec.decode(z), x.clamp(0, 1), rtol=1e-4, atol=1e-4)
    torch.save(dict(mean=torch.ones(768, 16, 16), var=var), hub / "checkpoints/rae-wReg_base-stat-84ede66d.pt")
    shifted = encode.load_codec("rae")
    torch.testing.assert_close(shifted.encode(images), z - (var + 1e-5).rsqrt().flatten(1).T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shifted.decode(shifted.encode(images)), codec.decode(z), rtol=1e-3, atol=1e-3)
    assert encode.fingerprint(codec) != encode.fingerprint(shifted) == encode.fingerprint(encode.load_codec("rae", decoder=False))


def test_missing_and_damaged_weights_are_named_with_address_and_place(hub, tmp_path, monkeypatch):
    image = tmp_path / "x.png"
    Image.new("RGB", (300, 280), "red").save(image)
    look = lambda *more: script("encode.py", "--reconstruct", image, "--workers", 1, *more, cwd=tmp_path)
    assert look()[0] == 0
    assert look("--weights_dir", hub)[0] == 0
    files = {"checkpoints/dinov2_vitb14_reg4_pretrain.pth": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
             "checkpoints/rae-wReg_base-decoder-5fedf7c9.pt": "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
             "checkpoints/rae-wReg_base-stat-84ede66d.pt": "stats/dinov2/wReg_base/imagenet1k/stat.pt"}
    for name, url in files.items():
        whole = (hub / name).read_bytes()
        (hub / name).unlink()
        fails_clearly(look(), "missing", f"{url} -> {hub / name}")
        (hub / name).write_bytes(whole[:-100])
        fails_clearly(look(), hub / name, "damaged", "delete it", url)
        torch.save(dict(nothing=torch.zeros(3)), hub / name)
        fails_clearly(look(), hub / name, "damaged or another file")
        (hub / name).write_bytes(whole)
    (hub / "facebookresearch_dinov2_main" / "hubconf.py").unlink()
    fails_clearly(look(), hub / "facebookresearch_dinov2_main", "delete it")
    fails_clearly(look("--weights_dir", tmp_path / "empty"), *files.values(), tmp_path / "empty" / "facebookresearch_dinov2_main")


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_no_weight_file_can_run_code(hub, tmp_path):
    Image.new("RGB", (300, 280), "red").save(tmp_path / "x.png")
    for file in (hub / "checkpoints").iterdir():
        whole = file.read_bytes()
        torch.save(dict(x=Evil()), file)
        fails_clearly(script("encode.py", "--reconstruct", "x.png", cwd=tmp_path), file)
        file.write_bytes(whole)
    assert not (tmp_path / "owned").exists()


def test_flowers_go_through_the_rae_from_archive_to_samples(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(encode.urllib.request, "urlopen", no_network)
    draw_flowers(tmp_path / "data/flowers")
    run = ("--dataset", "flowers", "--preset", "tiny", "--batch_size", 4, "--workers", 1, "--max_steps", 2, "--log_every", 1)
    status, text = script("train.py", *run, cwd=tmp_path)
    assert status == 0 and "latents 256x768 (rae)" in text and "8,189" in text, text
    status, text = script("sample.py", "--num_images", 3, "--out", "samples.npz", "--device", "cpu", cwd=tmp_path)
    assert status == 0 and np.load(tmp_path / "samples.npz")["arr_0"].shape == (3, 256, 256, 3), text
    status, text = script("fid.py", "samples.npz", "--ref", "flowers", "--features", "codec", "--codec", "rae", "--workers", 1, cwd=tmp_path)
    assert status == 0 and "Frechet" in text, text
    (hub / "checkpoints/dinov2_vitb14_reg4_pretrain.pth").write_bytes(b"")
    torch.save({k: v + 1 for k, v in dict({"patch.weight": torch.randn(768, 3, 14, 14), "patch.bias": torch.randn(768),
                "norm.weight": torch.rand(768), "norm.bias": torch.randn(768)}).items()}, hub / "checkpoints/dinov2_vitb14_reg4_pretrain.pth")
    fails_clearly(script("sample.py", cwd=tmp_path), "rae", "not the codec this checkpoint was trained with")


# ------------------------------------------------------------------------------------------- training


def test_training_lowers_the_loss_and_writes_checkpoint_log_and_grids(tmp_path):
    """60 steps on latents of 3 points per class: far below the loss of predicting nothing."""
    draw_folder(tmp_path / "data" / "photos", each=3)
    status, text = script("encode.py", "--dataset", "photos", "--fit_steps", 4, "--workers", 1, cwd=tmp_path)
    assert status == 0, text
    status, text = script("train.py", "--dataset", "photos", *RUN, "--batch_size", 16, "--max_steps", 60, "--lr", 3e-3, "--warmup", 5,
                          "--sample_every", 60, cwd=tmp_path)
    assert status == 0 and "python sample.py --steps 4" in text, text
    out = tmp_path / "out" / "photos"
    rows = [dict(zip(header, map(float, row))) for header, row in read_log(out)]
    assert rows[-1]["step"] == 60 and rows[-1]["reconstruction"] < 0.6 * rows[0]["reconstruction"]
    assert Image.open(out / "samples" / "step_000060.png").width > 64
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 60 and all(not key.startswith(("module.", "_orig_mod.")) for key in checkpoint["model"])


def read_log(out):
    """(header, row) pairs of a log.csv."""
    lines = (out / "log.csv").read_text().splitlines()
    return [(lines[0].split(","), line.split(",")) for line in lines[1:]]


def checkpoints_equal(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    flat = lambda c: {**c["model"], **{f"ema.{k}": v for k, v in c["ema"].items()},
                      **{f"{i}.{k}": v for i, state in c["optimizer"]["state"].items() for k, v in state.items()}}
    return a["step"] == b["step"] and all(torch.equal(v, flat(b)[k]) for k, v in flat(a).items())


def dies(monkeypatch, cwd, at_step, error, *args):
    """Run train.main() in this process until `losses` raises `error` at a step."""
    calls, real = [], train.losses

    def losses(*arguments, **options):
        calls.append(1)
        if len(calls) > at_step:
            raise error
        return real(*arguments, **options)

    monkeypatch.chdir(cwd)
    with monkeypatch.context() as patch:
        patch.setattr(train, "losses", losses)
        patch.setattr(sys, "argv", ["train.py", *map(str, args)])
        with pytest.raises(type(error)):
            train.main()


def test_resumed_run_ends_bit_equal_to_an_uninterrupted_one(copied, monkeypatch):
    dies(monkeypatch, copied, 10, KeyboardInterrupt(), "--dataset", "photos", *RUN, "--log_every", 3, "--max_steps", 12, "--out_dir", "out/killed")
    out = copied / "out" / "killed"
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 8
    assert [row[0] for _, row in read_log(out)] == ["3", "6", "9"]
    status, text = command(HERE / "train.py", "--resume", "--out_dir", "out/killed", "--dataset", "photos", cwd=copied)
    assert status == 0, text
    assert checkpoints_equal(out / "ckpt.pt", copied / "out/photos/ckpt.pt")
    assert [row[0] for _, row in read_log(out)] == ["3", "6", "9", "12"]


def test_a_new_run_sets_an_earlier_one_aside(copied):
    out = copied / "out/photos"
    before = (out / "ckpt.pt").read_bytes()
    status, text = script("train.py", "--dataset", "photos", *RUN, "--max_steps", 4, cwd=copied)
    assert status == 0 and "earlier_1" in text, text
    assert (out / "earlier_1" / "ckpt.pt").read_bytes() == before


def assert_same_curve(one, two):
    """Two runs' logs agree up to rounding, but for their speed."""
    for (header, one), (_, two) in zip(read_log(one), read_log(two), strict=True):
        for name, x, y in zip(header, one, two):
            assert name in ("images_per_s", "mfu") or float(x) == pytest.approx(float(y), rel=1e-3, nan_ok=True), name


def test_two_processes_train_as_one_does_and_end_equal(copied):
    """The same batch, noise and order, split over two CPU processes: equal losses up to rounding, equal weights on both."""
    (copied / "both.py").write_text(f"""import os, sys; sys.path.insert(0, {str(HERE)!r})
import encode, torch, train
made, make = [], train.make_model
train.make_model = lambda *arguments: made.append(make(*arguments)) or made[0]
encode.run(train.main)
torch.save([made[0][i].state_dict() for i in (0, 2)], "rank" + os.environ["RANK"])
""")
    status, text = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "both.py", "--dataset", "photos",
                           *RUN, "--max_steps", 12, "--out_dir", "out/two", cwd=copied)
    assert status == 0 and "2 x cpu; batch 8 = 2 x 1 x 4" in text, text
    assert_same_curve(copied / "out/photos", copied / "out/two")
    first, second = (torch.load(copied / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(x[name], y[name]) for x, y in zip(first, second) for name in x)
    status, text = train_again(copied, "--resume", "--out_dir", "out/two", "--max_steps", 13)
    assert status == 0 and "was trained by 2 processes and goes on with 1" in text, text


def test_settings_come_from_preset_dataset_and_flags_in_this_order():
    flowers = train.settings_of(dict(dataset="flowers"))
    assert (flowers["preset"], flowers["codec"], flowers["lr"], flowers["weight_decay"]) == ("B", "rae", 2e-4, 0.0)
    assert train.settings_of(dict(dataset="imagenet"))["preset"] == "XL"
    own = train.settings_of(dict(dataset="flowers", preset="tiny", lr=1.0, weight_decay=0.5))
    assert (own["preset"], own["ema_decay"], own["lr"], own["weight_decay"]) == ("tiny", train.SETTINGS["tiny"]["ema_decay"], 1.0, 0.5)
    assert [train.forwards(argparse.Namespace(consistency_weight=w)) for w in (0, 0.5)] == [3, 4]
    assert (train.settings_of({})["preset"], train.settings_of(dict(dataset="some/folder"))["codec"]) == ("tiny", "small")


def test_a_process_that_fails_ends_the_others_with_its_message(copied):
    (copied / "fails.py").write_text(f"""import os, sys; sys.path.insert(0, {str(HERE)!r})
import encode, train
step = train.train_step
def failing(model, ema, optimizer, number, *more):
    if number == 2 and os.environ["RANK"] == "1":
        raise ValueError("the second process gives up")
    return step(model, ema, optimizer, number, *more)
train.train_step = failing
encode.run(train.main)
""")
    status, text = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "fails.py", "--dataset", "photos",
                           *RUN, "--max_steps", 100_000, "--out_dir", "out/fails", cwd=copied)
    assert status != 0 and "error: the second process gives up" in text and "error: process 0 has lost another one" in text, text


def nan_losses(monkeypatch, *calls):
    """Make the losses of these calls, counted from 1, nan."""
    real, count = train.losses, []

    def losses(*arguments, **options):
        count.append(1)
        total, *terms = real(*arguments, **options)
        return (total * math.nan if len(count) in calls else total, *terms)

    monkeypatch.setattr(train, "losses", losses)


def test_a_step_whose_gradient_is_not_finite_changes_nothing(monkeypatch):
    s = argparse.Namespace(**train.settings_of(dict(batch_size=6)))
    config = model.ModelConfig(**TINY)

    def weights_after(*bad, steps):
        with monkeypatch.context() as patch:
            nan_losses(patch, *bad)
            net, ddp, ema, optimizer = train.make_model(config, s, torch.device("cpu"), 1, False)
            for step in steps:
                noise, angle, nearer, _ = train.draw(step, s, config, "cpu")
                z = torch.randn(6, 16, 32, generator=torch.Generator().manual_seed(step))
                train.train_step(ddp, ema, optimizer, 9, s, z, torch.arange(6) % 3, noise, angle, nearer, contextlib.nullcontext)
        return net.state_dict(), [state[name] for state in optimizer.state.values() for name in sorted(state)]

    assert all(torch.equal(x, y) for x, y in zip(weights_after(steps=[0, 2])[0].values(), weights_after(2, steps=[0, 1, 2])[0].values(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(weights_after(steps=[0, 2])[1], weights_after(2, steps=[0, 1, 2])[1], strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(weights_after(steps=[0, 2])[0].values(), weights_after(steps=[0, 1, 2])[0].values()))


def test_bad_steps_are_skipped_and_counted_and_ten_in_a_row_end_the_run(copied, monkeypatch):
    with monkeypatch.context() as patch:
        nan_losses(patch, 6)
        status, text = train_again(copied)
    header, *rows = [line.split(",") for line in (copied / "out/again/log.csv").read_text().splitlines()]
    assert status == 0 and "1 skipped" in text and [row[header.index("skipped")] for row in rows] == ["0", "1", "0"], text
    assert all(math.isfinite(float(row[1])) for row in rows)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        nan_losses(patch, *range(7, 30))
        fails_clearly(train_again(copied, "--max_steps", 30, "--out_dir", "out/nan"), "in 10 steps in a row, up to step 16", "ckpt.pt", "--resume --lr")
    checkpoint = torch.load(copied / "out/nan/ckpt.pt", weights_only=True)    # not from the bad steps, whose weights may be spoilt
    assert signal.getsignal(signal.SIGTERM) is handler
    assert checkpoint["step"] == 4 and all(torch.isfinite(t).all() for t in checkpoint["model"].values())
    assert train_again(copied, "--max_steps", 30, "--out_dir", "out/nan", "--resume", "--lr", 1e-4)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run_which_goes_on_as_if_nothing_had_been(copied, monkeypatch, number):
    real, out = train.train_step, copied / "out/again"

    def step_then_signal(model_, ema, optimizer, step, *more):
        if step == 5:
            os.kill(os.getpid(), number)
        return real(model_, ema, optimizer, step, *more)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step_then_signal)
        status, text = train_again(copied)
    assert status == 0 and "stopped at step 6" in text and "--out_dir out/again --resume" in text and signal.getsignal(number) is before, text
    assert train_again(copied, "--resume")[0] == 0
    assert checkpoints_equal(out / "ckpt.pt", copied / "out/photos/ckpt.pt")
    assert_same_curve(copied / "out/photos", out)                  # though the signal came between two log lines


def test_keep_keeps_the_last_checkpoints_under_their_numbers(copied):
    status, text = train_again(copied, "--keep", 2, "--save_every", 3)
    assert status == 0 and sorted(file.name for file in (copied / "out/again").glob("ckpt*")) == ["ckpt.pt", "ckpt_000009.pt", "ckpt_000012.pt"], text
    assert torch.load(copied / "out/again/ckpt_000009.pt", weights_only=True)["step"] == 9


def test_parts_one_after_the_other_follow_the_curve_of_the_whole_batch(copied):
    assert train_again(copied, "--accumulate", 4)[0] == 0
    assert_same_curve(copied / "out/photos", copied / "out/again")
    fails_clearly(train_again(copied, "--accumulate", 3), "--batch_size 8", "multiple of 3")


def test_live_encoding_trains_as_the_cache_does_and_resumes(copied, monkeypatch):
    shutil.rmtree(copied / "data/photos/small")
    monkeypatch.setattr(train, "learning_rate", lambda step, lr, warmup, _, real=train.learning_rate: real(step, lr, warmup, 12))
    assert train_again(copied, "--live", "--max_steps", 8)[0] == 0
    assert train_again(copied, "--live", "--max_steps", 12, "--resume")[0] == 0
    assert not (copied / "data/photos/small").exists()
    assert_same_curve(copied / "out/photos", copied / "out/again")
    fails_clearly(train_again(copied, "--live", "--dataset", "shapes"), "--live", "leave it out")
    assert train_again(copied, "--live", "--flip", "--out_dir", "out/live")[0] == 0
    assert train_again(copied, "--flip", "--out_dir", "out/cached")[0] == 0
    assert_same_curve(copied / "out/live", copied / "out/cached")


def test_live_encoding_names_or_replaces_unreadable_images(copied):
    bad = copied / "data/photos/disc/2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    fails_clearly(train_again(copied, "--live"), bad.name, "--skip_bad")
    status, text = train_again(copied, "--live", "--skip_bad", "--flip")
    assert status == 0 and text.count("skipped data/photos/disc/2.png") == 1, text


def test_resuming_with_other_settings_or_without_a_checkpoint_is_refused(copied):
    out = copied / "out/photos"
    fails_clearly(script("train.py", "--dataset", "photos", "--resume", "--preset", "S", cwd=copied), out.name, "--preset tiny, not S")
    fails_clearly(script("train.py", "--dataset", "photos", "--resume", "--out_dir", "out/none", cwd=copied), "out/none", "python train.py")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_saving_keeps_the_old_file_and_says_so(tmp_path, monkeypatch):
    encode.write_file(tmp_path / "ckpt.pt", lambda file: file.write(b"old"))
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *mode: real("/dev/full" if ".tmp" in str(path) else path, *mode))
    with pytest.raises(SystemExit, match="ckpt.pt.*free some disk space"):
        encode.run(lambda: encode.write_file(tmp_path / "ckpt.pt", lambda file: torch.save(dict(x=torch.zeros(100_000)), file)))
    assert (tmp_path / "ckpt.pt").read_bytes() == b"old"


def test_batches_go_through_every_image_once_an_epoch_in_an_order_of_their_own():
    seen = np.concatenate([train.batch_indexes(10, 4, step, seed=0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert not np.array_equal(train.batch_indexes(10, 4, 0, seed=0), train.batch_indexes(10, 4, 0, seed=1))
    assert np.bincount(train.batch_indexes(3, 9, 2, seed=0)).tolist() == [3, 3, 3]          # batches larger than the dataset


# ------------------------------------------------------------------------------------------- sample.py


def test_sample_writes_grid_npz_and_folder_with_classes_in_equal_numbers(copied):
    assert "wrote out" in script("sample.py", cwd=copied)[1]
    for out in ("a.npz", "folder", "grid.png"):
        status, text = script("sample.py", "--num_images", 6, "--out", out, cwd=copied)
        assert status == 0 and f"wrote {out}" in text, text
    with np.load(copied / "a.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1] * 3
    files = sorted((copied / "folder").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(6)]
    assert all(np.array_equal(np.asarray(Image.open(f)), image) for f, image in zip(files, images))
    status, text = script("sample.py", "--num_images", 3, "--classes", "plain", "--out", "b.npz", cwd=copied)
    assert np.load(copied / "b.npz")["arr_1"].tolist() == [1, 1, 1], text


def test_a_seed_makes_the_same_images_whatever_the_batch_size():
    draw = lambda batch_size, seed=0, **options: np.concatenate(list(sample.sample_batches(
        random_denoiser(), encode.load_codec("small"), torch.arange(10) % 3, batch_size, torch.device("cpu"), seed, progress=False, **options))).astype(int)
    for options in ({}, dict(same_noise=True, cfg_scale=2.0)):
        ten = draw(10, **options)
        assert np.abs(ten - draw(3, **options)).max() <= 1                                   # a grey level: matrix products round by size
        assert np.abs(ten - draw(10, seed=1, **options)).max() > 50 and np.abs(ten[0] - ten[3]).max() > 50


def test_two_processes_make_the_very_images_that_one_makes(copied):
    arguments = ("--num_images", 11, "--batch_size", 3)            # batches for both, one left over, the last one short
    status, text = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "sample.py", *arguments, "--out", "two.npz", cwd=copied)
    assert status == 0 and text.count("wrote two.npz") == 1, text
    assert script("sample.py", *arguments, "--out", "one.npz", cwd=copied)[0] == 0
    assert (copied / "one.npz").read_bytes() == (copied / "two.npz").read_bytes()


def test_benches_print_rates_and_shares(copied):
    status, text = script("sample.py", "--bench", "--batch_size", 2, cwd=copied)
    rows = [line.split() for line in text.splitlines()[2:]]
    assert status == 0 and [row[:2] for row in rows] == [[steps, scale] for steps in "1246" for scale in ("no", "yes")], text
    assert float(rows[0][-1]) == 1 and float(rows[4][-1]) > 1.5    # four steps through pixels decode three more times
    status, text = script("train.py", "--bench", "--latent", "16x8", "--batch_size", 4, "--compile", "off", cwd=copied)
    assert status == 0 and re.search(r"latents 16x8, batch 4, compile off: [\d.]+ images/s, [\d.]+ TFLOP/s a device = \d+% of .* peak memory [\d.]+ GB", text), text
    fails_clearly(script("train.py", "--bench", "--latent", "15x8", cwd=copied), "--latent 15x8", "square")


def test_filmstrips_show_steps_guidance_angles_and_the_way_between_samples(workspace):
    checkpoint = sample.load_checkpoint(workspace / "out/photos/ckpt.pt") | dict(data_dir=workspace / "data")
    denoiser, codec = sample.load_model(checkpoint), sample.load_codec_of(checkpoint)
    draw = lambda **options: next(sample.sample_batches(denoiser, codec, torch.tensor([0, 1, 1]), 3, torch.device("cpu"), progress=False, **options))
    strip, last = draw(steps=3, return_all=True), draw(steps=3)
    assert strip.shape == (3, 3, 32, 32, 3)
    assert np.array_equal(strip[2], last) and np.array_equal(strip[0], draw(steps=1))

    close = lambda a, b: np.abs(a.astype(int) - b).max() <= 1      # uint8 of numbers that are rounded differently
    noisy, seen = draw(steps=3, view=sample.turn_towards_noise)
    assert len(noisy) == len(seen) == len(sample.FILMSTRIPS["angle"])
    labels, noise = torch.tensor([0, 1, 1]), sample.draw_noise(0, range(3), (3, *codec.latent_shape)).transpose(0, 1)
    z = model.generate(denoiser, labels, steps=3, noise=noise)
    half = model.rotate(z, noise[0], math.radians(45))             # in column 3
    assert close(noisy[0], last) and close(noisy[3], sample.to_uint8(codec.decode(half)))
    assert close(seen[3], sample.to_uint8(codec.decode(denoiser(half, labels)))) and not close(seen[3], noisy[3])

    way = draw(steps=3, view=sample.walk_to_the_next)
    assert len(way) == len(sample.FILMSTRIPS["slerp"]) and close(way[0], last) and close(way[-1], np.roll(last, -1, axis=0))
    for kind, options, columns, rows in (("steps", ["--steps", 3], 3, 2), ("guidance", [], 6, 2), ("angle", [], 7, 4), ("slerp", ["--batch_size", 1], 6, 2)):
        status, text = script("sample.py", "--filmstrip", kind, *options, "--out", workspace / "strip.png", cwd=workspace)
        assert status == 0 and Image.open(workspace / "strip.png").size == (columns * 68 + 4, rows * 80 + 4), text
    tile = lambda row, column: np.asarray(Image.open(workspace / "strip.png"))[80 * row + 4:80 * row + 68, 68 * column + 4:68 * column + 68]
    assert close(tile(0, 5), tile(1, 0)) and close(tile(1, 5), tile(0, 0))


def test_starts_are_drawn_with_the_mean_and_covariance_of_the_class():
    z = torch.randn(2, sample.START_LATENTS, 4, 3) @ torch.randn(3, 3) + torch.tensor([5.0, 0, -5])
    draws = sample.draw_starts(lambda label: z[label], torch.ones(4000, dtype=torch.long), 0, range(4000)).flatten(1)
    torch.testing.assert_close(draws.mean(0), z[1].flatten(1).mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(draws.T.cov(), z[1].flatten(1).T.cov(correction=0), atol=0.15 * z[1].flatten(1).T.cov().max().item(), rtol=0)
    assert torch.equal(draws[7:9], sample.draw_starts(lambda label: z[label], torch.ones(2, dtype=torch.long), 0, range(7, 9)).flatten(1))


def test_sampling_can_start_near_the_class_and_needs_the_cache_for_it(copied):
    draw = lambda *options: script("sample.py", "--num_images", 4, "--steps", 1, "--out", "s.npz", *options, cwd=copied)
    images = {}
    for angle in (90, 40, 0):
        assert draw("--start_angle", angle)[0] == 0
        images[angle] = np.load(copied / "s.npz")["arr_0"]
    assert not np.array_equal(images[90], images[40]) and not np.array_equal(images[40], images[0])
    fails_clearly(draw("--start_angle", 91), "between 0 and 90")
    shutil.rmtree(copied / "data/photos/small")
    fails_clearly(draw("--start_angle", 40), "no latent cache", "python encode.py --dataset photos")


def test_every_way_of_sampling_runs_and_writes_a_file_of_its_own(copied):
    written = set()
    for options in (["--cfg_scale", 3], ["--cfg_skip", 0], ["--same_noise"], ["--pixel_loop"], ["--steps", 1], ["--start_angle", 40], ["--dtype", "bfloat16"]):
        status, text = script("sample.py", "--num_images", 2, *options, cwd=copied)
        assert status == 0, text
        written.add(text.split("wrote ")[1].split()[0])
    assert len(written) == 7 and all((copied / name).is_file() for name in written), written


def test_sampling_mistakes_end_in_one_clear_line(copied, tmp_path):
    out = copied / "out/photos"
    fails_clearly(script("sample.py", cwd=tmp_path), "python train.py")
    fails_clearly(script("sample.py", "--steps", 0, cwd=copied), "--steps", 0)
    fails_clearly(script("sample.py", "--batch_size", 0, cwd=copied), "--batch_size", 0)
    fails_clearly(script("train.py", "--batch_size", 0, cwd=copied), "--batch_size", 0)
    fails_clearly(script("sample.py", "--device", "cuda:99", cwd=copied), "cuda:99", "auto or cpu")
    fails_clearly(script("sample.py", "--classes", "unicorn", cwd=copied), "unicorn", "disc, plain")
    (copied / "not.pt").write_bytes(b"hello")
    fails_clearly(script("sample.py", "--ckpt", "not.pt", cwd=copied), "not.pt", "python train.py")
    torch.save(dict(x=1), copied / "other.pt")
    fails_clearly(script("sample.py", "--ckpt", "other.pt", cwd=copied), "other.pt")
    whole = (out / "ckpt.pt").read_bytes()
    (out / "ckpt.pt").write_bytes(whole[:len(whole) // 2])
    fails_clearly(script("sample.py", cwd=copied), out.name, "python train.py")
    fails_clearly(script("train.py", "--dataset", "photos", "--resume", cwd=copied), out.name)


# ------------------------------------------------------------------------------------------- README.md


def test_readme_names_only_flags_and_files_that_exist_and_their_true_lengths():
    text = re.sub(r"(?s)<!-- other code -->.*?<!-- this code -->", "", (HERE / "README.md").read_text())
    scripts = "".join((HERE / name).read_text() for name in ("encode.py", "train.py", "sample.py", "fid.py"))
    flags = set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) - {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    assert len(flags) > 15 and [flag for flag in flags if f'"{flag}"' not in scripts] == []
    files = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"python (\w+\.py)", text)
    assert len(files) > 6 and [name for name in files if not (HERE / name).is_file()] == []
    counts = re.findall(r"\]\((\w+\.py)\) \| ([\d,]+) \|", text)
    assert len(counts) == 6
    for name, lines in counts:                                     # the file map is off by a tenth at most
        assert abs(int(lines.replace(",", "")) / len((HERE / name).read_text().splitlines()) - 1) < 0.1, name


# ------------------------------------------------------------------------------------------- fid.py


def random_weights():
    """A state dict with the published keys, by numpy's frozen generator, so that outputs can be pinned."""
    random, state = np.random.RandomState(0), {}
    for key, old in sorted(fid.InceptionV3().state_dict().items()):
        x = random.standard_normal(old.shape)
        if key.endswith("conv.weight") or key == "fc.weight":
            x *= np.sqrt(2 / np.prod(old.shape[1:]))
        elif "running_var" in key or "bn.weight" in key:
            x = 0.8 + 0.5 * np.abs(x)
        state[key] = torch.tensor(0.3 * x if key.endswith(("bias", "mean")) else x, dtype=torch.float32)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_weights(), path)
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
    assert len(keys) == 472 and {"Mixed_7c.branch3x3dbl_3b.bn.running_var", "Mixed_6a.branch3x3.conv.weight", "fc.bias"} <= keys
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert net.Mixed_6b.branch7x7_2.conv.weight.shape == (128, 128, 1, 7) and net.fc.weight.shape == (1008, 2048)
    counters = {"fc.num_batches_tracked": torch.tensor(0)}         # as nn.BatchNorm2d would add
    net.load_state_dict(net.state_dict() | counters)


# Pool, spatial and logits of picture(size), computed by another implementation of the same graph with these weights.
PINNED = {
    32: ([0.61587, 0.77016, 114.91007, 19.54561], [2.56863, 10.85928, 6.31832, 14.68909], [0.46252, -46.00879, 43.96598, 101.09564]),
    256: ([0.62031, 0.77197, 115.45718, 19.61932], [2.57193, 10.69898, 6.41739, 14.7975], [0.47205, -46.30979, 44.16714, 101.49183]),
    320: ([0.62268, 0.7704, 115.44699, 19.62211], [2.5679, 10.68181, 6.43882, 14.80673], [0.46822, -46.30226, 44.16594, 101.49995]),
}


@pytest.mark.parametrize("size", PINNED)
def test_inception_computes_the_graph_of_2015(net, size):
    out = net(picture(size))
    assert {name: tuple(x.shape) for name, x in out.items()} == {"pool3": (1, 2048), "spatial": (1, 2023), "logits": (1, 1008)}
    for name, expected in zip(("pool3", "spatial", "logits"), PINNED[size]):
        torch.testing.assert_close(out[name][0, :: len(out[name][0]) // 4][:4], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_inception_is_in_eval_mode_and_float32_whatever_the_caller_set(net):
    seen, image = [], picture(64)
    plain = net(image)["logits"]
    hook = net.Conv2d_1a_3x3.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"))))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net.train()(image)["logits"], plain) and not net.training
        assert seen == [(False, "highest", False)]
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32
    finally:
        hook.remove()
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    with pytest.raises(ValueError, match="uint8"):
        net(image.float())


@pytest.mark.parametrize("size", [32, 320])
def test_resize_reads_pixels_where_tensorflow_1_did(size):
    image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got, source = fid.resize_tf1(image)[0, 0].numpy(), np.pad(image[0, 0].numpy().astype(float), (0, 1), "edge")
    for i, j in ((0, 0), (298, 298), (7, 200), (150, 33)):
        (y, v), (x, u) = divmod(i * size / 299, 1), divmod(j * size / 299, 1)
        window = source[int(y):int(y) + 2, int(x):int(x) + 2]
        assert got[i, j] == pytest.approx(np.array([1 - v, v]) @ window @ np.array([1 - u, u]), abs=0.02)
    assert torch.equal(fid.resize_tf1(picture(299)), picture(299).float())


def test_frechet_distance_is_exact_on_known_gaussians_also_without_full_rank():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 200, 200))
    s1, root = a @ a.T / 200, b @ b.T / 200
    mu, s2 = random.standard_normal(200), root @ s1 @ root         # the optimal map is `root`
    exact = mu @ mu + np.trace(s1) + np.trace(s2) - 2 * np.trace(root @ s1)
    assert fid.frechet_distance(0 * mu, s1, mu, s2) == pytest.approx(exact, abs=1e-9 * np.trace(s1 + s2))
    x, y = random.standard_normal((50, 200)), random.standard_normal((300, 200))
    for u, v in ((x, y), (y, x), (x, x)):
        u0, v0 = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (u, v))
        exact = ((u.mean(0) - v.mean(0)) ** 2).sum() + (u0 ** 2).sum() + (v0 ** 2).sum() - 2 * np.linalg.svd(u0 @ v0.T)[1].sum()
        got = fid.frechet_distance(u.mean(0), np.cov(u, rowvar=False), v.mean(0), np.cov(v, rowvar=False))
        assert got == pytest.approx(exact, abs=1e-9 * 400)
    first, second = np.diag([1.0, 2, 0, 0]), np.diag([0, 0, 3.0, 4])
    assert fid.frechet_distance(np.zeros(4), first, np.zeros(4), second) == pytest.approx(10, abs=1e-12)


def features_by_index(**arrays):
    """Batches of images that carry their number, and an extractor that looks their features up."""
    count = len(next(iter(arrays.values())))
    images = np.arange(count).view(np.uint8).reshape(count, 2, 4, 1)
    look_up = lambda batch: {name: torch.from_numpy(x[batch.reshape(-1, 8).copy().view(np.int64)[:, 0]]) for name, x in arrays.items()}
    return [images[start:start + 70] for start in range(0, count, 70)], count, look_up


def test_streamed_moments_are_those_of_the_whole_set():
    x = np.random.default_rng(0).standard_normal((500, 30)).astype(np.float32) + 5
    got = fid.measure(*features_by_index(pool3=x), metrics=["fid", "precision"], kept=100)
    np.testing.assert_allclose(got["mu"], x.astype(float).mean(0), rtol=1e-13)
    np.testing.assert_allclose(got["sigma"], np.cov(x.astype(float), rowvar=False), atol=1e-12)
    assert got["pool3"].shape == (100, 30) and len({tuple(row) for row in got["pool3"]} & {tuple(row) for row in x}) == 100
    x[77, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        fid.measure(*features_by_index(pool3=x), metrics=["fid"])


def test_inception_score_does_not_depend_on_samples_sorted_by_class():
    classes = np.repeat(np.arange(10), 1000)                       # two splits; in file order each would hold half of the classes
    logits = 30 * np.eye(10)[classes]
    got = fid.measure(*features_by_index(logits=logits), metrics=["is"])["is"]
    assert got == pytest.approx(10, rel=1e-3)
    logits = np.random.default_rng(0).standard_normal((400, 12))   # one split: the formula itself
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    exact = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert fid.measure(*features_by_index(logits=logits), metrics=["is"])["is"] == pytest.approx(exact, rel=1e-12)


def test_precision_and_recall_count_points_in_balls_of_the_third_neighbour():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((90, 6)), 1.4 * random.standard_normal((70, 6))
    distance = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=2)
    inside = lambda x, y: (distance(x, y) <= np.sort(distance(y, y))[:, 3]).any(1).mean()
    got = fid.precision_recall(*(torch.from_numpy(x).float() for x in (a, b)), block=1000)
    assert got == pytest.approx((inside(a, b), inside(b, a))) and 0 < got[0] < 1 and got[0] != got[1]


def test_samples_are_read_from_an_npz_without_loading_it(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=np.arange(600 * 64 * 64 * 3, dtype=np.int64).astype(np.uint8).reshape(600, 64, 64, 3))
    found = fid.find_images(tmp_path / "s.npz")
    tracemalloc.start()
    total = sum(int(batch.sum(dtype=np.int64)) for batch in fid.read_batches(found, 64, 7))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == np.load(tmp_path / "s.npz")["arr_0"].sum(dtype=np.int64) and peak < 2e6 < 600 * 64 * 64 * 3


def write_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def call(monkeypatch, capsys, *args):
    """Run fid.py in this process and return its JSON line."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args), "--json", "--workers", "1", "--device", "cpu"])
    encode.run(fid.main)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_metrics_of_a_folder_and_of_its_saved_statistics(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", encode.checksum(weights))    # the published file can't be had here
    images = encode.shapes(10)[0]
    np.savez(tmp_path / "s.npz", arr_0=images[:5])
    write_pngs(tmp_path / "ref" / "a", images[2:6])
    write_pngs(tmp_path / "ref" / "b", images[6:])
    stats = tmp_path / "stats.npz"
    first = call(monkeypatch, capsys, tmp_path / "s.npz", "--ref", tmp_path / "ref", "--weights", weights, "--save_stats", stats)
    assert (first["num_samples"], first["num_references"], first["left_out"]) == (5, 8, {})
    assert first["fid"] > 0 and first["sfid"] > 0 and 1 <= first["is"] <= 1008 and 0 < first["precision"] <= 1
    saved = np.load(stats)
    assert {name: saved[name].shape for name in saved.files} == {
        "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023), "arr_0": (8, 32, 32, 3)}
    assert {image.tobytes() for image in saved["arr_0"]} == {image.tobytes() for image in images[2:]}
    second = call(monkeypatch, capsys, tmp_path / "s.npz", "--ref", stats, "--weights", weights)
    numbers = list(fid.METRICS)[:5]
    assert [second[name] for name in numbers] == pytest.approx([first[name] for name in numbers])
    np.savez(stats, mu=saved["mu"], sigma=saved["sigma"])          # as pytorch-fid writes them
    third = call(monkeypatch, capsys, tmp_path / "s.npz", "--ref", stats, "--weights", weights, "--metrics", "fid", "sfid", "precision")
    assert third["fid"] == pytest.approx(first["fid"]) and set(third["left_out"]) == {"sfid", "precision"}


def test_statistics_of_a_reference_are_kept_and_made_anew_when_it_changes(tmp_path, monkeypatch, capsys):
    images = encode.shapes(120)[0]
    write_pngs(tmp_path / "samples", images[:40])
    np.savez(tmp_path / "ref.npz", arr_0=images[40:80])
    args = tmp_path / "samples", "--ref", tmp_path / "ref.npz", "--features", "codec"
    first = call(monkeypatch, capsys, *args)
    kept = tmp_path / "ref.small-32.npz"
    written = kept.stat().st_mtime_ns
    assert call(monkeypatch, capsys, *args) == first and kept.stat().st_mtime_ns == written
    kept.write_bytes(b"damaged")
    assert call(monkeypatch, capsys, *args) == first and kept.stat().st_size > 1000
    np.savez(tmp_path / "ref.npz", arr_0=images[80:])
    assert call(monkeypatch, capsys, *args)["fid"] != first["fid"]
    assert set(first["left_out"]) == {"sfid", "is"}


def test_class_agreement_tells_images_of_the_class_asked_for_from_others(tmp_path, monkeypatch, capsys):
    images, labels = encode.shapes(120, seed=5)
    monkeypatch.setattr(encode, "SHAPES_COUNT", 2500)
    measure = lambda *args: call(monkeypatch, capsys, tmp_path / "s.npz", "--metrics", "agreement", "--data_dir", tmp_path, *args)
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=np.where(np.arange(120) < 60, labels, (labels + 3) % 10))
    assert 0.4 < measure("--ref", "shapes")["agreement"] < 0.6     # half of the labels are wrong
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "r.npz", arr_0=images)
    for ref, reason in (("shapes", "no labels"), (tmp_path / "r.npz", "with classes")):
        with pytest.raises(SystemExit) as exit:
            measure("--ref", ref)
        assert reason in exit.value.code


def spoil(folder):
    write_pngs(folder, encode.shapes(4)[0])
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:99])


IMAGES = encode.shapes(4)[0]
NPZ = lambda **arrays: lambda path: np.savez(path, **arrays)
BAD_SAMPLES = {
    "float.npz": (NPZ(arr_0=IMAGES / 255), "uint8"), "wide.npz": (NPZ(arr_0=IMAGES[:, :9]), "square"), "one.npz": (NPZ(arr_0=IMAGES[:1]), "at least 2"),
    "keys.npz": (NPZ(foo=IMAGES, bar=IMAGES), "foo, bar"), "text.npz": (lambda path: path.write_text("hello"), "not a whole npz"),
    "missing.npz": (lambda path: None, "no such file"), "empty": (lambda path: path.mkdir(), "holds no images"), "spoilt": (spoil, "cannot be read"),
    "mixed": (lambda path: write_pngs(path, [*IMAGES, IMAGES[0, :20, :20]]), "must all have one size"),
    "flat": (lambda path: write_pngs(path, IMAGES[:, :20]), "must be square")}
BAD_REFERENCES = {
    "nan.npz": (NPZ(mu=np.full(32, np.nan), sigma=np.eye(32)), "NaN"), "other.npz": (NPZ(foo=1), "foo"), "misfit.npz": (NPZ(mu=np.ones(3), sigma=1), "fit"),
    "wide.npz": (NPZ(mu=np.ones(3), sigma=np.eye(3)), "3 features"), "spoilt": (spoil, "cannot be read"), "nowhere": (lambda path: None, "no such")}


@pytest.mark.parametrize("name, place", [(name, "samples") for name in BAD_SAMPLES] + [(name, "reference") for name in BAD_REFERENCES])
def test_bad_input_ends_in_one_line_that_names_the_file(name, place, tmp_path, monkeypatch, capsys):
    make, words = (BAD_SAMPLES if place == "samples" else BAD_REFERENCES)[name]
    np.savez(tmp_path / "good.npz", arr_0=IMAGES)
    make(tmp_path / name)
    both = (name, "good.npz") if place == "samples" else ("good.npz", name)
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, capsys, tmp_path / both[0], "--ref", tmp_path / both[1], "--features", "codec")
    message = exit.value.code
    assert message.startswith("error: ") and "\n" not in message and str(tmp_path / name) in message and words in message


def test_missing_or_other_weights_are_refused_with_the_place_to_get_them(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    np.savez(tmp_path / "s.npz", arr_0=IMAGES)
    for options in ([], ["--weights", weights]):
        with pytest.raises(SystemExit) as exit:
            call(monkeypatch, capsys, tmp_path / "s.npz", "--ref", tmp_path / "s.npz", *options)
        assert all(words in exit.value.code for words in (fid.WEIGHTS_URL, fid.WEIGHTS_SHA256, str(tmp_path / "checkpoints" / fid.WEIGHTS_NAMES[0])))
        assert Path(options[-1] if options else tmp_path).name in exit.value.code


def test_training_logs_the_distance_of_ema_samples_and_keeps_the_best_checkpoint(copied):
    status, text = train_again(copied, "--max_steps", 8, "--eval_every", 4, "--eval_images", 6, "--eval_features", "codec")
    assert status == 0 and "fid_6" in text, text
    values = [float(row[header.index("fid_6")]) for header, row in read_log(copied / "out/again")]
    best = torch.load(copied / "out/again/best.pt", weights_only=True)
    assert len(values) == 2 and best["best"] == pytest.approx(min(values), rel=1e-4) and best["step"] == 4 * (1 + values.index(min(values)))
    assert script("sample.py", "--ckpt", "out/again/best.pt", "--num_images", 2, cwd=copied)[0] == 0


def test_training_without_inceptions_weights_says_where_to_get_them_before_it_begins(copied, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(copied))
    fails_clearly(train_again(copied, "--eval_every", 4), fid.WEIGHTS_URL)
    assert not (copied / "out/again/ckpt.pt").exists()
