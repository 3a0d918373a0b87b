"""How far are generated images from real ones? FID, sFID, Inception Score, precision and recall, as papers print them.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz          # what ADM's TensorFlow evaluator prints
    python fid.py samples/ --ref data/flowers12/test --metrics fid is        # folders of images work too
    python fid.py samples.npz --ref shapes --features codec                  # offline: the frozen codec's features instead

The network is TensorFlow's Inception of 2015-12-05, its published weights converted to PyTorch; a file that lacks is named with
its address. Images stream by, sums are float64. Shapes: B images, S image size, F features, N images in all.
"""
import argparse
import contextlib
import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from encode import (CODECS, SUFFIXES, HelpFormatter, center_crop, checksum, codec_path, find_dataset, fingerprint, load_codec, pick_device, read_images,
                    run, to_float, write_file)
from sample import write_npz

METRICS = {"fid": "FID", "sfid": "sFID", "is": "Inception Score", "precision": "precision", "recall": "recall", "agreement": "class agreement"}
KEPT_SAMPLES, KEPT_REFERENCES = 50_000, 10_000      # features kept for precision and recall, as many as ADM's evaluator compares
KEPT_IMAGES = 50_000                                # image files that the classifier for the class agreement is trained on
SPLIT = 5000                                        # images in a split of the Inception Score, as in ADM's evaluator
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")      # the same file
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS_NAMES[0]
REFERENCE_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz"

# ------------------------------------------------------------------------------------------- the network


@contextlib.contextmanager
def full_float32(device):
    """No autocast and no TF32 inside, whatever the caller has set; the settings come back afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class FrozenNorm(nn.Module):
    """What a batch norm with fixed statistics is made of, under the names of nn.BatchNorm2d."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))


class ConvNorm(nn.Module):
    """Convolution, batch norm with fixed statistics, ReLU. The norm is folded into the convolution, which saves passes over x."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:                                        # TensorFlow's SAME with stride 1, VALID with stride 2
            padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = FrozenNorm(c_out)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x):
        scale = self.bn.weight / (self.bn.running_var + 0.001).sqrt()
        weight, bias = self.conv.weight * scale[:, None, None, None], self.bn.bias - self.bn.running_mean * scale
        return F.relu_(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))


class Mixed(nn.Module):
    """Inception block: chains of convolutions and a pooling side by side, their outputs concatenated in this order.

    branches: name -> steps (width, kernel), or for a fork (width, kernel, kernel), whose two outputs are both kept.
    pool: "average" or "max", 3x3 and followed by a 1x1 convolution to pool_width; or "halve": max pooling with stride 2 alone,
    and stride 2 in the last step of every branch.
    """

    def __init__(self, c_in, pool, pool_width=None, **branches):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, steps in branches.items():
            width, chain = c_in, []
            for i, (c_out, *kernels) in enumerate(steps, 1):
                name = branch if len(steps) == 1 else f"{branch}_{i}"
                chain.append([name] if len(kernels) == 1 else [name + "a", name + "b"])
                for name, kernel in zip(chain[-1], kernels):
                    self.add_module(name, ConvNorm(width, c_out, kernel, 2 if pool == "halve" and i == len(steps) else 1))
                width = c_out
            self.chains.append(chain)
        if pool_width:
            self.branch_pool = ConvNorm(c_in, pool_width, 1)

    def forward(self, x):
        out = []
        for *steps, last in self.chains:
            y = x
            for name, in steps:
                y = getattr(self, name)(y)
            out += [getattr(self, name)(y) for name in last]
        if self.pool == "average":                                 # TensorFlow does not count the padding
            out.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        elif self.pool == "max":
            out.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            out.append(F.max_pool2d(x, 3, 2))
        return torch.cat(out, 1)


def resize_tf1(images, size=299):
    """(B, 3, H, W) -> (B, 3, size, size) float32, bilinear as TensorFlow 1 did it: pixel i is read at i * H / size, no antialiasing."""
    x = images.float()
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = at.long()
        share = (at - low) if dim == 3 else (at - low)[:, None]
        left, right = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = left + (right - left) * share
    return x


class InceptionV3(nn.Module):
    """TensorFlow's Inception of 2015-12-05, frozen, in eval mode whatever is asked.

    weights: path of a state dict with the published file's keys, or None for random weights. Raises FileNotFoundError or ValueError.
    Source: arXiv 1512.00567; the graph in inception-2015-12-05.tgz.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding=0)
        row, column = (1, 7), (7, 1)
        block_a = lambda c_in, pool_width: Mixed(
            c_in, "average", pool_width, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        block_c = lambda c: Mixed(
            768, "average", 192, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
            branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)])
        block_e = lambda c_in, pool: Mixed(
            c_in, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, (1, 3), (3, 1))],
            branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))])
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Mixed(288, "halve", branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = block_c(128), block_c(160), block_c(160), block_c(192)
        self.Mixed_7a = Mixed(768, "halve", branch3x3=[(192, 1), (320, 3)], branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3)])
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            try:
                self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            except FileNotFoundError:
                raise
            except Exception as error:                             # torch.load raises many kinds on a broken file
                raise ValueError(f"{weights}: does not hold Inception's weights ({' '.join(str(error).split())[:200]}); "
                                 f"download them again: {WEIGHTS_URL}") from error
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Leaves out the batch counters that nn.BatchNorm2d saves."""
        return super().load_state_dict({k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}, *args, **kwargs)

    @torch.no_grad()
    def forward(self, images):
        """images (B, 3, H, W) uint8 RGB -> dict of pool3 (B, 2048), spatial (B, 2023) and logits (B, 1008), float32.

        spatial: 7 channels of Mixed_6d in the order row, column, channel; logits: without fc's bias, as the Inception Score takes them.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
        with full_float32(images.device):
            x = ((resize_tf1(images) - 128) / 128).contiguous(memory_format=torch.channels_last)   # (B, 3, 299, 299)
            x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)  # (B, 64, 73, 73)
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)                      # (B, 192, 35, 35)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                                     # (B, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))                      # (B, 768, 17, 17)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                                      # (B, 17 * 17 * 7)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))                      # (B, 2048, 8, 8)
            pool3 = x.mean((2, 3))                                                                 # (B, 2048)
            return dict(pool3=pool3, spatial=spatial, logits=pool3 @ self.fc.weight.T)


# ------------------------------------------------------------------------------------------- the metrics


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet (Wasserstein-2) distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).

    mu1, mu2: (F,); sigma1, sigma2: (F, F) covariances; all taken to float64. Returns a float, not clipped at 0.
    Raises ValueError on shapes that differ or numbers that are not finite. Source: arXiv 1706.08500, section 2.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise ValueError(f"means and covariances don't fit: {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("means or covariances hold numbers that are not finite")

    def root(sigma):                                               # (F, rank): sigma = root @ root.T
        w, v = np.linalg.eigh(sigma)
        used = w > len(w) * np.finfo(float).eps * w[-1]
        return v[:, used] * np.sqrt(w[used])

    root1 = root(sigma1)
    w = np.linalg.eigvalsh(root1.T @ sigma2 @ root1)               # those of S1 S2
    if len(w) and w[0] > len(w) * np.finfo(float).eps * w[-1]:
        trace = np.sqrt(w).sum()
    else:                                                          # w near 0 is rounding, its root is not: (S1 S2)^1/2 without roots
        trace = np.linalg.svd(root1.T @ root(sigma2), compute_uv=False).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def precision_recall(samples, reference, k=3, block=1 << 24):
    """Share of samples inside the reference's manifold, and of the reference inside the samples'.

    samples (N, F), reference (M, F): float32 on one device. A set's manifold is the union of balls around its points that reach to
    their k-th nearest neighbour. block: distances held at a time. Source: arXiv 1904.06991, with Inception's features as ADM has it.
    """
    squares = {x: torch.einsum("nf,nf->n", x, x) for x in (samples, reference)}

    def distances(a, b):                                           # squared, a few rows of (len(a), len(b)) at a time
        rows = max(1, block // len(b))
        for start in tqdm(range(0, len(a), rows), desc="precision, recall", unit="block", leave=False, delay=1):
            part = slice(start, start + rows)
            yield torch.addmm(squares[b], a[part], b.T, alpha=-2).add_(squares[a][part, None])

    def share_inside(a, b):                                        # a point's nearest neighbour in its own set is itself
        radii = torch.cat([d.kthvalue(k + 1).values for d in distances(b, b)])
        return torch.cat([(d <= radii).any(1) for d in distances(a, b)]).double().mean().item()

    with torch.no_grad(), full_float32(samples.device):
        return share_inside(samples, reference), share_inside(reference, samples)


def class_agreement(images, labels, samples, asked, epochs=10):
    """Share of samples in which a classifier, trained here on real images, finds the class that was asked for.

    images (N, 32, 32, 3), samples (M, 32, 32, 3): uint8. labels (N,), asked (M,): int64; a random tenth of the real ones is held out.
    Returns (that share, the same for the held-out images: what can be expected at best). Runs on the CPU, the same each time
    with the same number of threads.
    """
    held = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [layer for c_in, c_out in ((3, 32), (32, 64), (64, 96), (96, 128)) for layer in
                  (nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())]                # 32 to 2 pixels
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, int(labels.max()) + 1))
        steps = max(2, epochs * round(int((~held).sum()) / 128))
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        rows = torch.cat([torch.randperm(len(images)) for _ in range(epochs + 2)])
        rows = rows[~held[rows]]
        for step in tqdm(range(steps), desc="classifier", unit="step", leave=False):
            batch = rows[step * 128:(step + 1) * 128]
            loss = F.cross_entropy(net(to_float(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        share = lambda x, y: torch.cat([net(to_float(b)).argmax(1) for b in x.split(500)]).eq(y).double().mean().item()
        return share(samples, asked), share(images[held], labels[held])


def shuffled(count):
    """The fixed order in which images are dealt to the Inception Score's splits and kept for precision and recall."""
    return np.random.RandomState(2020).permutation(count)


def measure(batches, count, extract, metrics=METRICS, kept=KEPT_SAMPLES, name="samples"):
    """What the metrics need to know of a set of images, summed in float64 as it streams by.

    batches: `count` images in all as (B, S, S, 3) uint8; extract: turns a batch into a dict of features, pool3 (B, F) and, from
    Inception, spatial and logits. Returns a dict, as far as metrics ask for it: mu, sigma of pool3, mu_s, sigma_s of spatial
    (covariances with ddof 1), is (the Inception Score), pool3 (kept, F) float32 of a fixed choice of images; and count.
    Raises ValueError on features that are not finite.
    """
    position = np.empty(count, np.int64)
    position[shuffled(count)] = np.arange(count)
    splits = max(1, round(count / SPLIT))
    split = torch.from_numpy(((position + 1) * splits - 1) // count)          # that of each image
    sums, result, done = {}, dict(count=count), 0
    wide = lambda x: (x.cpu() if x.device.type == "mps" else x).double()
    with tqdm(total=count, desc=name, unit="image", mininterval=1) as bar:
        for batch in batches:
            features, these = extract(batch), slice(done, done + len(batch))
            for key, metric in (("pool3", "fid"), ("spatial", "sfid")):
                if metric in metrics and key in features:
                    x = wide(features[key])                                                        # (B, F)
                    if key not in sums:
                        sums[key] = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
                    sums[key][0].add_(x.sum(0))
                    sums[key][1].addmm_(x.T, x)
            if "is" in metrics:
                log_p = wide(features["logits"]).log_softmax(1)                                    # (B, 1008)
                if "is" not in sums:
                    sums["is"] = log_p.new_zeros(splits, log_p.shape[1]), log_p.new_zeros(splits)
                where = split[these].to(log_p.device)
                sums["is"][0].index_add_(0, where, log_p.exp())
                sums["is"][1].index_add_(0, where, (log_p.exp() * log_p).sum(1))
            if "precision" in metrics or "recall" in metrics:
                x = features["pool3"].float().cpu().numpy()
                if "pool3" not in result:
                    result["pool3"] = np.empty((min(kept, count), x.shape[1]), np.float32)
                place = position[these]
                result["pool3"][place[place < kept]] = x[place < kept]
            done += len(batch)
            bar.update(len(batch))
    for key, mu, sigma in (("pool3", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if key in sums:
            total, outer = (x.cpu().numpy() for x in sums[key])
            result[mu] = total / count
            result[sigma] = (outer - count * np.outer(result[mu], result[mu])) / (count - 1)
    if "is" in sums:                                               # exp of the mean KL(p, q), q being the split's mean of p
        sizes, (p, entropy) = split.bincount(minlength=splits), (x.cpu() for x in sums["is"])
        q = p / sizes[:, None]                                                                     # (splits, 1008)
        result["is"] = (entropy / sizes - torch.xlogy(q, q).sum(1)).exp().mean().item()
    if done != count or not all(np.isfinite(x).all() for x in result.values()):
        raise ValueError(f"{name}: {done} images for {count}" if done != count else f"{name}: features hold numbers that are not finite")
    return result


def evaluate(batches, count, extractor, reference, metrics=METRICS):
    """The metrics of `count` samples, given as (B, S, S, 3) uint8 batches, as a dict of floats.

    extractor, reference: what load_extractor and load_reference returned.
    """
    samples, values = measure(batches, count, extractor["extract"], metrics), {}
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if name in metrics:
            values[name] = frechet_distance(samples[mu], samples[sigma], reference[mu], reference[sigma])
    if "is" in metrics:
        values["is"] = samples["is"]
    if "precision" in metrics or "recall" in metrics:
        both = precision_recall(*(torch.from_numpy(x["pool3"]).to(extractor["device"]) for x in (samples, reference)))
        values |= {name: value for name, value in zip(("precision", "recall"), both) if name in metrics}
    return values


# ------------------------------------------------------------------------------------------- what turns images into features


def find_weights(path=None):
    """The published weight file: `path`, or one of its names in torch.hub's folder. Raises FileNotFoundError or ValueError with its address."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = Path(path or next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), folder / WEIGHTS_NAMES[0]))
    get = f"get it (96 MB, sha256 {WEIGHTS_SHA256}): curl -L --create-dirs -o {folder / WEIGHTS_NAMES[0]} {WEIGHTS_URL}"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Inception's weights are missing; {get} (or compare offline: --features codec)")
    if (digest := checksum(path)) != WEIGHTS_SHA256:
        raise ValueError(f"{path}: is not Inception's published weight file, its sha256 is {digest}; {get}")
    return path


def load_extractor(features, device, weights=None, codec="small", codec_file=None):
    """What turns images into features, as a dict: extract, a function of (B, S, S, 3) uint8 that returns what `measure` takes; width,
    the number F of features; size that images must have, None for any; name, and digest of the weights; device.

    features: "inception", or "codec" for the frozen codec's latents averaged over tokens, under the name of pool3.
    """
    if features == "codec":
        net = load_codec(codec, codec_file, device, decoder=False)
        extract = torch.no_grad()(lambda images: dict(pool3=net.encode(to_float(images, device)).mean(1)))    # (B, C)
        return dict(extract=extract, width=net.latent_shape[1], size=net.image_size, name=codec, digest=fingerprint(net), device=device)
    net = InceptionV3(find_weights(weights)).to(device)
    extract = lambda images: net(torch.as_tensor(images).to(device).permute(0, 3, 1, 2))
    return dict(extract=extract, width=net.fc.in_features, size=None, name="inception", digest=WEIGHTS_SHA256, device=device)


# ------------------------------------------------------------------------------------------- sets of images


@contextlib.contextmanager
def open_npz(path):
    """An npz as a ZipFile; what is wrong with it becomes a ValueError that names it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; samples come from: python sample.py --num_images 50000 --out samples.npz; "
                                f"ADM's references from {REFERENCE_URL}") from None
    except Exception as error:                                     # zipfile, zlib and numpy raise many kinds on a broken file
        raise ValueError(f"{path}: is not a whole npz ({error}); make or download it again") from error


def read_header(member):
    """(shape, Fortran order, dtype) of an .npy file, which is left at its first number."""
    version = np.lib.format.read_magic(member)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)


def look_into(path):
    """(names of an npz's arrays, read_header of arr_0 or None), without reading an array."""
    with open_npz(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in keys:
            return keys, None
        with archive.open("arr_0.npy") as member:
            return keys, read_header(member)


def find_images(where, data_dir="data"):
    """Look a set of images up without reading them: an npz with arr_0, a folder of images, or a dataset (encode.find_dataset).

    Returns find_dataset's dict, labels (N,) and paths, with npz (or None; asked: whether it has labels, arr_1), size (of the images,
    None for files) and stem, the path beside it under which its statistics are kept. Raises FileNotFoundError or ValueError.
    """
    path = Path(where)
    if path.suffix == ".npz":
        keys, header = look_into(path)
        if header is None:
            raise ValueError(f"{path}: has no arr_0 (it holds {', '.join(keys) or 'nothing'}); write the images with np.savez(file, images)")
        shape, fortran, dtype = header
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or fortran:
            raise ValueError(f"{path}: arr_0 must be square images (N, S, S, 3), uint8 from 0 to 255, got {shape} {dtype}"
                             f"{' in Fortran order' * fortran}; convert them and write them anew with np.savez(file, images)")
        found = dict(labels=np.zeros(shape[0]), paths=None, npz=path, size=shape[1], stem=path.with_suffix(""), asked="arr_1" in keys)
    else:
        folder = next((f for f in (path, Path(data_dir) / path) if f.is_dir()), None)
        flat = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".") if folder else []
        try:
            found = dict(labels=np.zeros(len(flat)), paths=flat) if flat else find_dataset(where, data_dir)
        except FileNotFoundError:
            raise FileNotFoundError(f"{where}: no such npz, folder of images or dataset; "
                                    "samples come from: python sample.py --num_images 50000 --out samples.npz") from None
        found |= dict(npz=None, size=None if found["paths"] else 32, stem=folder.resolve() if folder else Path(data_dir) / found["name"] / "images")
    if len(found["labels"]) < 2:
        raise ValueError(f"{where}: holds {len(found['labels'])} image{'s' * (len(found['labels']) != 1)}; at least 2 are needed")
    return found


def image_size(path):
    """(width, height) of a file. Raises ValueError on an unreadable one."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:                                     # Pillow raises a dozen kinds on broken files
        raise ValueError(f"{path}: cannot be read as an image ({error}); mend or delete it") from error


def read_batches(found, size, batch_size, workers=1):
    """Yield a set's images in order as (B, size, size, 3) uint8, through ADM's crop.

    Where found["size"] is set, all files must have it. Raises ValueError that names an unreadable file.
    """
    if found["npz"]:                                               # off the disk as it goes
        with open_npz(found["npz"]) as archive, archive.open("arr_0.npy") as member:
            shape, _, _ = read_header(member)
            for start in range(0, shape[0], batch_size):
                batch = np.empty((min(batch_size, shape[0] - start), *shape[1:]), np.uint8)
                if member.readinto(batch.reshape(-1)) != batch.nbytes:
                    raise ValueError("arr_0 ends early")
                yield batch if shape[1] == size else np.stack([np.asarray(center_crop(Image.fromarray(x), size)) for x in batch])
        return
    try:
        for start, batch, _ in read_images(found, size, batch_size, workers):
            for path in found["paths"][start:start + len(batch)] if found["paths"] and found["size"] else []:
                if image_size(path) != (found["size"], found["size"]):
                    raise ValueError(f"{path}: is {'x'.join(map(str, image_size(path)))}, the first image of the folder is "
                                     f"{found['size']}x{found['size']}; samples must all have one size")
            yield batch
    except ValueError as error:
        raise ValueError(str(error).replace(", or pass --skip_bad", "")) from error


# ------------------------------------------------------------------------------------------- references


def read_statistics(path):
    """The mu, sigma, mu_s and sigma_s that an npz holds, and our own pool3, count and key. Raises ValueError on numbers that can't be right."""
    with open_npz(path), np.load(path) as archive:
        found = {name: archive[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "pool3", "count", "key") if name in archive.files}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mu in found) != (sigma in found) or mu in found and (found[mu].ndim != 1 or found[sigma].shape != found[mu].shape * 2):
            raise ValueError(f"{path}: {mu} and {sigma} don't fit each other; make or download it again")
        if mu in found and not (np.isfinite(found[mu]).all() and np.isfinite(found[sigma]).all()):
            raise ValueError(f"{path}: {mu} or {sigma} holds NaN or infinite numbers; make or download it again")
    return found


def find_reference(ref, data_dir="data"):
    """Look a reference up without reading its images. Returns (statistics of an npz that holds them, else {}; its images or None)."""
    if Path(ref).suffix != ".npz":
        return {}, find_images(ref, data_dir)
    keys, header = look_into(ref)
    if "mu" not in keys and header is None:
        raise ValueError(f"{ref}: holds neither statistics (mu, sigma) nor images (arr_0), but {', '.join(keys) or 'nothing'}")
    return read_statistics(ref) if "mu" in keys else {}, find_images(ref) if header else None


def load_reference(statistics, found, size, extractor, metrics=METRICS, batch_size=64, workers=1):
    """Complete what find_reference returned for the metrics, and keep what was measured in a file beside the reference.

    size: of the samples, to which images without given statistics are cropped; extractor: what load_extractor returned.
    Returns a dict with mu, sigma and, as far as there are, mu_s, sigma_s, pool3 (KEPT_REFERENCES, F), count.
    """
    if statistics:
        metrics, size = [name for name in ("precision", "recall") if name in metrics], found and found["size"]
    if found is None or not metrics:
        return statistics
    wanted = ["precision"] if statistics else ["fid", "sfid", "precision"]
    files = "".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in map(Path, found["paths"] or filter(None, [found["npz"]]))) or found["source"]
    key = hashlib.sha256(json.dumps([1, files, size, wanted, KEPT_REFERENCES, extractor["digest"]]).encode()).hexdigest()
    cache = found["stem"].with_name(f"{found['stem'].name}.{extractor['name']}-{size}.npz")
    if cache.is_file():
        try:
            measured = read_statistics(cache)
            if measured.pop("key", None) == key:
                return measured | statistics
        except ValueError as error:
            tqdm.write(f"measured anew: {error}", file=sys.stderr)
    measured = measure(read_batches(found, size, batch_size, workers), len(found["labels"]), extractor["extract"], wanted,
                       KEPT_REFERENCES, "reference")
    try:
        write_file(cache, lambda file: np.savez(file, key=key, **measured))
    except OSError as error:
        tqdm.write(f"statistics of the reference not kept: {error}", file=sys.stderr)
    return measured | statistics


def save_statistics(path, reference, found, size, batch_size, workers):
    """Write mu, sigma, mu_s, sigma_s, and as arr_0 the images kept for precision and recall: what ADM and pytorch-fid tools read."""
    chosen = np.sort(shuffled(len(found["labels"]))[:KEPT_REFERENCES])
    if found["paths"]:
        batches = read_batches(found | dict(paths=[found["paths"][i] for i in chosen], labels=chosen), size, batch_size, workers)
    else:
        batches = (batch[np.isin(np.arange(i * batch_size, i * batch_size + len(batch)), chosen)]
                   for i, batch in enumerate(read_batches(found, size, batch_size, workers)))
    arrays = {name: reference[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    write_npz(path, tqdm(batches, desc=Path(path).name, unit="batch"), len(chosen), size, **arrays)


def choose_metrics(asked, features, statistics, reference, samples):
    """Split the metrics asked for into those that can be had and a dict of the others with the reason."""
    left_out, count = {}, len(samples["labels"])
    for name in asked:
        if features == "codec" and name in ("sfid", "is"):
            left_out[name] = "needs Inception's features"
        elif name == "agreement" and (reference is None or "classes" not in reference):
            left_out[name] = "the reference is not a dataset with classes"
        elif name == "agreement" and not samples.get("asked"):
            left_out[name] = "the samples have no labels (arr_1)"
        elif name == "sfid" and statistics and "mu_s" not in statistics:
            left_out[name] = "the reference has no mu_s and sigma_s"
        elif name in ("precision", "recall") and reference is None:
            left_out[name] = "the reference has no images (arr_0)"
        elif name in ("precision", "recall") and min(count, len(reference["labels"])) < 4:
            left_out[name] = "needs at least 4 images on both sides"
    return [name for name in METRICS if name in asked and name not in left_out], left_out


def main():
    parser = argparse.ArgumentParser(usage="python fid.py SAMPLES [flags], see --help", description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("what to measure")
    group.add_argument("samples", help="npz with arr_0 (N, S, S, 3) uint8, or a folder of square images")
    group.add_argument("--ref", help="ADM's VIRTUAL_*.npz, statistics as pytorch-fid writes them, an npz or folder of images, or a dataset")
    group.add_argument("--metrics", nargs="+", default=list(METRICS)[:5], choices=METRICS,
                        help="which to compute; agreement: how often a classifier trained on --ref finds the class asked for (arr_1)")
    group.add_argument("--json", action="store_true", help="print a last line of JSON, too")
    group.add_argument("--save_stats", metavar="FILE", help="write the reference's statistics to this npz, for ADM and pytorch-fid tools too")
    group = parser.add_argument_group("whose features")
    group.add_argument("--features", default="inception", choices=["inception", "codec"], help="codec: the frozen codec's pooled latents, offline")
    group.add_argument("--weights", help="Inception's weight file; default: the one in torch.hub's folder")
    group.add_argument("--codec", default="small", choices=CODECS, help="whose features --features codec takes")
    group.add_argument("--codec_dataset", help="the dataset the codec was fitted on; default: --ref if it is a dataset, else shapes")
    group = parser.add_argument_group("place and machine")
    group.add_argument("--data_dir", default="data", help="folder that holds datasets and codecs")
    group.add_argument("--weights_dir", help="where weights are, instead of torch.hub's folder")
    group.add_argument("--batch_size", type=int, default=64, help="images at a time")
    group.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {args.batch_size}")
    if args.ref is None and (set(args.metrics) != {"is"} or args.save_stats):
        parser.error("--ref is needed for all but --metrics is")
    if args.save_stats and args.features == "codec":
        parser.error("--save_stats writes Inception's statistics; leave --features codec out")

    # look everything up before any work
    if args.weights_dir:
        torch.hub.set_dir(args.weights_dir)
    device, warn = pick_device(args.device), lambda text: print(f"warning: {text}", file=sys.stderr)
    samples = find_images(args.samples, args.data_dir)
    count = len(samples["labels"])
    if samples["paths"]:
        width, height = image_size(samples["paths"][0])
        if width != height:
            raise ValueError(f"{samples['paths'][0]}: is {width}x{height}; samples must be square")
        samples["size"] = width
        if Path(samples["paths"][0]).suffix.lower() in (".jpg", ".jpeg"):
            warn(f"{args.samples}: JPEG has changed the samples, and with them every metric; store PNG or npz")
    statistics, images = find_reference(args.ref, args.data_dir) if args.ref else ({}, None)
    if args.save_stats and statistics:
        parser.error(f"--save_stats: {args.ref} holds statistics already")
    metrics, left_out = choose_metrics(args.metrics, args.features, statistics, images, samples)
    if not metrics:
        reasons = "; ".join(f"{METRICS[name]}: {why}" for name, why in left_out.items())
        raise ValueError(f"{args.ref}: nothing to compute ({reasons}); take another --ref or other --metrics")
    home = (find_dataset(args.codec_dataset, args.data_dir) if args.codec_dataset else images or {}).get("name", "shapes")
    by_features = [name for name in metrics if name != "agreement"]
    extractor = dict(size=None)                                    # what the class agreement needs of it
    if by_features or args.save_stats:
        extractor = load_extractor(args.features, device, args.weights, args.codec, codec_path(args.codec, home, args.data_dir))
    if statistics and by_features and len(statistics["mu"]) != extractor["width"]:
        raise ValueError(f"{args.ref}: holds statistics of {len(statistics['mu'])} features, {args.features} has {extractor['width']}")
    if images and statistics and images["size"] != samples["size"]:
        warn(f"{args.ref} is of {images['size']}x{images['size']} images, {args.samples} of {samples['size']}x{samples['size']}")
    for what, n in (("samples", count), ("references", len(images["labels"]) if images and not statistics else count)):
        if {"fid", "sfid"} & set(metrics) and n < extractor["width"]:
            warn(f"{n} {what} are fewer than the {extractor['width']} features: the covariance's rank is too low, the distance too large")

    size, reference = extractor["size"] or samples["size"], {}
    if args.save_stats or set(by_features) - {"is"}:
        reference = load_reference(statistics, images, size, extractor, metrics, args.batch_size, args.workers)
        if args.save_stats:
            save_statistics(args.save_stats, reference, images, size, args.batch_size, args.workers)
    values = evaluate(read_batches(samples, size, args.batch_size, args.workers), count, extractor, reference, by_features) if by_features else {}
    if "agreement" in metrics:
        chosen = shuffled(len(images["labels"]))[:KEPT_IMAGES]
        known = images | dict(paths=[images["paths"][i] for i in chosen], labels=images["labels"][chosen]) if images["paths"] else images
        thumbnails = (torch.from_numpy(np.concatenate(list(read_batches(found, 32, 500, args.workers)))) for found in (known, samples))
        with np.load(args.samples) as archive:
            asked = torch.from_numpy(archive["arr_1"]).long()
        values["agreement"], at_best = class_agreement(next(thumbnails), torch.from_numpy(known["labels"]).long(), next(thumbnails), asked)

    labels = METRICS | ({"fid": f"Frechet distance of {args.codec} codec features"} if args.features == "codec" else {})
    for name, value in values.items():
        if name == "agreement":
            against = f"; of unseen real images {at_best:.5f}"
        elif name in ("precision", "recall"):
            against = f", {min(len(images['labels']), KEPT_REFERENCES)} references"
        else:
            against = "" if name == "is" else f", statistics of {args.ref}" if statistics else f", {reference['count']} references"
        used = min(count, KEPT_SAMPLES) if name in ("precision", "recall") else count
        print(f"{labels[name]:16} {value:12.5f}  ({used} samples{against})")
    for name, why in left_out.items():
        print(f"{METRICS[name]:16} left out: {why}")
    if args.save_stats:
        print(f"wrote {args.save_stats}")
    if args.json:
        references = int(reference["count"]) if "count" in reference else None
        print(json.dumps(dict(samples=args.samples, num_samples=count, ref=args.ref, num_references=references, image_size=size,
                              features=args.features, **values, left_out=left_out)))


if __name__ == "__main__":
    run(main)
