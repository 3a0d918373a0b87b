"""How far are generated images from real ones? FID, sFID, Inception Score, precision and recall.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz      # as ADM's evaluator does
    python fid.py samples/ --ref data/flowers12/test --metrics fid is    # folders of images, too
    python fid.py samples.npz --ref shapes --features codec              # offline: codec features
    python fid.py samples.npz --ref shapes --features codec --metrics fid agreement
    python fid.py samples.npz --ref flowers --save_stats flowers.npz     # measured once, kept

The network is TensorFlow's Inception of 2015-12-05, with its published weights. Images stream by,
sums are float64. Shapes: B images, S image size, F features, N images in all.
"""
import contextlib
import hashlib
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from encode import (CODECS, SUFFIXES, Dataset, UserError, codec_path, find_dataset, join,
                    load_codec, make_parser, reading, run, to_float)
from sample import write_npz

METRICS = {"fid": "FID", "sfid": "sFID", "is": "Inception Score", "precision": "precision",
           "recall": "recall", "agreement": "class agreement"}
KEPT_SAMPLES, KEPT_REFERENCES = 50_000, 10_000  # compared for precision and recall, as by ADM
SPLIT = 5000                                    # images in a split of the Inception Score
BATCH = 64                                      # images that go through the network together
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"

# ------------------------------------------------------------------------------------ the network

@contextlib.contextmanager
def full_float32(device):
    """No autocast and no TF32 inside, whatever the caller has set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (torch.autocast(device.type, enabled=False),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)

class FrozenNorm(nn.Module):
    """The numbers of a batch norm with fixed statistics, under nn.BatchNorm2d's names."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

class ConvNorm(nn.Module):
    """Convolution, frozen batch norm, ReLU; the norm is folded into the convolution on loading."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:                     # TensorFlow's SAME with stride 1, VALID with 2
            padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = FrozenNorm(c_out)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.register_load_state_dict_post_hook(ConvNorm.fold)
        self.fold()

    @torch.no_grad()
    def fold(self, *_):
        scale = self.bn.weight / (self.bn.running_var + 0.001).sqrt()
        self.weight = self.conv.weight * scale[:, None, None, None]
        self.bias = self.bn.bias - self.bn.running_mean * scale

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.conv.stride, self.conv.padding)
        return F.relu_(x)

class Mixed(nn.Module):
    """Inception block: chains of convolutions and a pooling side by side, their outputs joined.

    branches: name -> steps (width, kernel), or for a fork (width, kernel, kernel), whose outputs
    are both kept. pool: "average" or "max", 3x3 and followed by a 1x1 convolution to pool_width;
    "halve" is max pooling with stride 2 alone, and stride 2 in the last step of every branch.
    """

    def __init__(self, c_in, pool, pool_width=None, **branches):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, steps in branches.items():
            width, chain = c_in, []
            for i, (c_out, *kernels) in enumerate(steps, 1):
                name = branch if len(steps) == 1 else f"{branch}_{i}"
                names = [name] if len(kernels) == 1 else [f"{name}a", f"{name}b"]
                stride = 2 if pool == "halve" and i == len(steps) else 1
                for name, kernel in zip(names, kernels):
                    self.add_module(name, ConvNorm(width, c_out, kernel, stride))
                chain.append(names)
                width = c_out
            self.chains.append(chain)
        if pool_width:
            self.branch_pool = ConvNorm(c_in, pool_width, 1)

    def forward(self, x):
        out = []
        for *steps, last in self.chains:
            y = x
            for name, in steps:
                y = self.get_submodule(name)(y)
            out += [self.get_submodule(name)(y) for name in last]
        if self.pool == "average":              # TensorFlow does not count the padding
            out.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        elif self.pool == "max":
            out.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            out.append(F.max_pool2d(x, 3, 2))
        return torch.cat(out, 1)

def resize_tf1(images, size=299):
    """(B, 3, H, W) -> (B, 3, size, size) float32 like TensorFlow 1: pixel i is read at i * H/size.

    Bilinear, without half-pixel centres and antialiasing.
    """
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
    """TensorFlow's Inception of 2015-12-05, frozen, always in eval mode.

    weights: path of the published state dict; None: random ones. Raises UserError.
    Source: arXiv 1512.00567; the graph in inception-2015-12-05.tgz.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding=0)
        for name, c_in, width in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", Mixed(
                c_in, "average", width, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)]))
        self.Mixed_6a = Mixed(288, "halve", branch3x3=[(384, 3)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        row, column = (1, 7), (7, 1)
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", Mixed(
                768, "average", 192, branch1x1=[(192, 1)],
                branch7x7=[(c, 1), (c, row), (192, column)],
                branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)]))
        self.Mixed_7a = Mixed(768, "halve", branch3x3=[(192, 1), (320, 3)],
                              branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3)])
        for name, c_in, pool in (("7b", 1280, "average"), ("7c", 2048, "max")):
            self.add_module(f"Mixed_{name}", Mixed(
                c_in, pool, 192, branch1x1=[(320, 1)],
                branch3x3=[(384, 1), (384, (1, 3), (3, 1))],
                branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))]))
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            with reading(f"{weights}: missing, or not Inception's weights", f"get {WEIGHTS_URL}"):
                self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Leaves out the batch counters that nn.BatchNorm2d saves."""
        state_dict = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.no_grad()
    def forward(self, images):
        """(B, 3, H, W) uint8 RGB -> pool3 (B, 2048), spatial (B, 2023), logits (B, 1008), float32.

        spatial: 7 channels of Mixed_6d in the order row, column, channel. logits: without fc's
        bias, as the Inception Score takes them.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) uint8, got {images.dtype}")
        with full_float32(images.device):
            x = (resize_tf1(images) - 128) / 128                                    # (B, 3, 299, 299)
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, 2)                                               # (B, 64, 73, 73)
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                      # (B, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))       # (B, 768, 17, 17)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))       # (B, 2048, 8, 8)
            pool3 = x.mean((2, 3))
            return dict(pool3=pool3, spatial=spatial, logits=pool3 @ self.fc.weight.T)

# ------------------------------------------------------------------------------------ the metrics

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).

    mu1, mu2: (F,); sigma1, sigma2: (F, F) covariances; taken to float64. Returns a float, not
    clipped at 0. Source: arXiv 1706.08500, section 2.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))

    def root(sigma):                            # (F, rank): sigma = root @ root.T
        w, v = np.linalg.eigh(sigma)
        used = w > len(w) * np.finfo(float).eps * w[-1]
        return v[:, used] * np.sqrt(w[used])

    # the singular values of root1.T @ root2 are the roots of the eigenvalues of S1 S2
    trace = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)

def precision_recall(samples, reference, k=3, block=1 << 24):
    """Share of samples inside the reference's manifold, and of the reference inside the samples'.

    samples (N, F), reference (M, F): float32. A set's manifold is the union of balls around its
    points that reach to their k-th nearest neighbour. Source: arXiv 1904.06991, as ADM has it.
    """
    def distances(a, b):                        # squared, a few rows of (len(a), len(b)) at a time
        b_squares = b.pow(2).sum(1)
        for rows in a.split(max(1, block // len(b))):
            yield torch.addmm(b_squares, rows, b.T, alpha=-2).add_(rows.pow(2).sum(1, keepdim=True))

    def share_inside(a, b):                     # a point's nearest neighbour in its set is itself
        radii = torch.cat([d.kthvalue(k + 1).values for d in distances(b, b)])
        return torch.cat([(d <= radii).any(1) for d in distances(a, b)]).double().mean().item()

    with torch.no_grad(), full_float32(samples.device):
        return share_inside(samples, reference), share_inside(reference, samples)

def class_agreement(images, labels, samples, asked, epochs=10):
    """Share of samples in which a classifier, trained on real images, finds the class asked for.

    images (N, 32, 32, 3), samples (M, 32, 32, 3): uint8. labels (N,), asked (M,): int64. Returns
    (that share, the same for a tenth of the real images, held out). Runs on the CPU.
    """
    held = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.1
    torch.manual_seed(0)
    layers, width = [], 3
    for c_out in (32, 64, 96, 128):                                             # 32 to 2 pixels
        layers += [nn.Conv2d(width, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
        width = c_out
    head = [nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, int(labels.max()) + 1)]
    net = nn.Sequential(*layers, *head)
    rows = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    batches = rows[~held[rows]].split(128)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(2, len(batches)))
    for batch in tqdm(batches, desc="classifier", unit="step", leave=False):
        loss = F.cross_entropy(net(to_float(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()

    def share(x, y):
        found = torch.cat([net(to_float(batch)).argmax(1) for batch in x.split(500)])
        return found.eq(y).double().mean().item()

    with torch.no_grad():
        return share(samples, asked), share(images[held], labels[held])

class Moments:
    """Mean and covariance of vectors, summed in float64 as they stream by."""
    count, total, outer = 0, 0, 0

    def add(self, x):
        """x: (B, F)."""
        x = (x.cpu() if x.device.type == "mps" else x).double()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.outer = self.outer + x.T @ x

    def result(self):
        """mu (F,) and sigma (F, F) with ddof 1, numpy float64."""
        mu = self.total / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()

def shuffled(count):
    """The fixed order in which images are dealt to splits, and kept for precision and recall."""
    return np.random.RandomState(2020).permutation(count)

def inception_score(logits):
    """exp of the mean KL(p, q), q being a split's mean p; the mean over shuffled splits.

    logits: (N, classes). Source: arXiv 1606.03498, in splits of about SPLIT images like ADM's.
    """
    logits, scores = logits[shuffled(len(logits))].double(), []
    for part in logits.tensor_split(max(1, round(len(logits) / SPLIT))):
        log_p = part.log_softmax(1)
        q = log_p.exp().mean(0)
        scores.append(((log_p.exp() * log_p).sum(1).mean() - torch.xlogy(q, q).sum()).exp().item())
    return float(np.mean(scores))

def measure(batches, count, extract, metrics=METRICS, kept=KEPT_SAMPLES, name="samples"):
    """What the metrics need to know of a set of images.

    batches: `count` images in all as (B, S, S, 3) uint8; extract: turns a batch into features.
    Returns a dict: count, mu and sigma of pool3 and, as far as metrics ask for it, mu_s and
    sigma_s of spatial, logits (N, classes), and pool3 (kept, F) of a fixed choice of images.
    """
    chosen = np.argsort(shuffled(count)) < kept
    pool3, spatial, logits, features = Moments(), Moments(), [], []
    for batch in tqdm(batches, desc=name, unit="batch", mininterval=1):
        keep = chosen[pool3.count:][:len(batch)]
        found = extract(batch)
        pool3.add(found["pool3"])
        if "sfid" in metrics and "spatial" in found:
            spatial.add(found["spatial"])
        if "is" in metrics:
            logits.append(found["logits"].cpu())
        if "precision" in metrics or "recall" in metrics:
            features.append(found["pool3"].float()[torch.from_numpy(keep)].cpu())
    result = dict(count=count)
    result["mu"], result["sigma"] = pool3.result()
    if spatial.count:
        result["mu_s"], result["sigma_s"] = spatial.result()
    if not np.isfinite(result["sigma"]).all():
        raise UserError(f"{name}: the features are not finite; check the network's weights")
    lists = dict(logits=logits, pool3=features)
    return result | {key: torch.cat(values) for key, values in lists.items() if values}

def evaluate(batches, count, extractor, reference, metrics=METRICS):
    """The metrics of `count` samples, (B, S, S, 3) uint8 batches, against a reference: floats.

    reference: what load_reference returned.
    """
    samples, values = measure(batches, count, extractor["extract"], metrics), {}
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if name in metrics:
            moments = samples[mu], samples[sigma], reference[mu], reference[sigma]
            values[name] = frechet_distance(*moments)
    if "is" in metrics:
        values["is"] = inception_score(samples["logits"])
    if "precision" in metrics or "recall" in metrics:
        both = [x["pool3"].to(extractor["device"]) for x in (samples, reference)]
        values |= dict(zip(("precision", "recall"), precision_recall(*both)))
    return {name: values[name] for name in metrics if name in values}

# ------------------------------------------------------------------------ features, sets of images

def load_extractor(features, device, codec="small", codec_weights=None, weights=None):
    """What turns images into features: a dict of extract, a function of (B, S, S, 3) uint8, width,
    the number of features, size, of the images it takes (None: any), and device.

    features: "inception", or "codec": the frozen codec's latents, averaged over tokens.
    """
    if features == "codec":
        net = load_codec(codec, codec_weights, device, decoder=False)
        width, size = net.latent_shape[1], net.image_size

        @torch.no_grad()
        def extract(images):
            return dict(pool3=net.encode(to_float(images, device)).mean(1))     # (B, C)
    else:
        path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS)
        get = (f"get it (96 MB, sha256 {WEIGHTS_SHA256}): curl -L --create-dirs -o {path} "
               f"{WEIGHTS_URL} (or compare offline: --features codec)")
        with reading(f"{path}: Inception's weights are missing or damaged", get):
            if hashlib.sha256(path.read_bytes()).hexdigest() != WEIGHTS_SHA256:
                raise ValueError("another sha256")
        net, width, size = InceptionV3(path).to(device), 2048, None

        def extract(images):
            return net(torch.as_tensor(images).to(device).permute(0, 3, 1, 2))
    return dict(extract=extract, width=width, size=size, device=device)

def map_array(path, name):
    """An array of an npz as a memory map; a compressed one is read."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.load(path)[name]
        file.seek(info.header_offset + 26)                      # lengths of its name and extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")

def open_npz(path):
    """(Dataset of an npz's images or None, its statistics mu, sigma, mu_s, sigma_s)."""
    with (reading(f"{path}: unusable", "write it with sample.py --out, or download it again"),
          np.load(path) as archive):
        keys = archive.files
        statistics = {key: archive[key] for key in ("mu", "sigma", "mu_s", "sigma_s") if key in keys}
        for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if mu in keys and statistics[sigma].shape != statistics[mu].shape * 2:
                raise ValueError(f"{mu} and {sigma} don't fit each other")
            if mu in keys and not np.isfinite(statistics[mu] @ statistics[sigma]).all():
                raise ValueError(f"{mu} or {sigma} holds NaN or infinity")
        if "arr_0" not in keys:
            if not statistics:
                raise ValueError(f"has neither arr_0 nor mu, but {', '.join(keys)}")
            return None, statistics
        images = map_array(path, "arr_0")
        square = images.ndim == 4 and images.shape[1:] == (images.shape[2], images.shape[2], 3)
        if images.dtype != np.uint8 or not square:
            raise ValueError("arr_0 must be square images (N, S, S, 3), uint8, and not "
                             f"{images.shape} {images.dtype}")
        labels = archive["arr_1"] if "arr_1" in keys else np.full(len(images), -1)
        return Dataset("", [], labels, images), statistics

def open_set(where, data_dir="data"):
    """(Dataset of the images or None, statistics) of an npz, a folder of images, or a dataset."""
    path = Path(where)
    if path.suffix == ".npz":
        return open_npz(path)
    flat = sorted(str(file) for file in path.glob("*") if file.suffix.lower() in SUFFIXES)
    if flat:
        return Dataset("", [], np.full(len(flat), -1), flat), {}
    return find_dataset(where, data_dir), {}

def image_batches(dataset, size, workers, rows=None):
    """Images, by default all, in order: (B, size, size, 3) uint8 through ADM's crop."""
    rows = range(len(dataset)) if rows is None else rows
    parts = [rows[start:start + BATCH] for start in range(0, len(rows), BATCH)]
    return map(np.stack, dataset.batches(parts, size, workers))

def load_reference(dataset, statistics, size, extractor, metrics, workers):
    """What samples are compared with: given statistics, and what is measured of the images.

    size: of the samples, to which images without statistics are cropped.
    """
    if statistics:                              # an ADM file: its images are for these two alone
        metrics = [name for name in metrics if name in ("precision", "recall")]
    if dataset is None or not set(metrics) - {"is"}:
        return statistics
    size = len(dataset.source[0]) if statistics else size
    measured = measure(image_batches(dataset, size, workers), len(dataset), extractor["extract"],
                       set(metrics) - {"is"}, KEPT_REFERENCES, "reference")
    return measured | statistics

def save_statistics(path, dataset, reference, size, workers):
    """Write mu, sigma, mu_s, sigma_s, and as arr_0 the images kept for precision and recall."""
    rows = np.sort(shuffled(len(dataset))[:KEPT_REFERENCES])
    arrays = {name: reference[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    write_npz(path, image_batches(dataset, size, workers, rows), len(rows), size, **arrays)

def choose_metrics(asked, features, dataset, statistics, samples):
    """Those of the metrics asked for that can be computed, and of the others why not."""
    left_out = {}
    for name in asked:
        if features == "codec" and name in ("sfid", "is"):
            left_out[name] = "needs Inception's features"
        elif name == "agreement" and not (dataset and dataset.classes):
            left_out[name] = "the reference is no dataset with classes"
        elif name == "agreement" and samples.labels.min() < 0:
            left_out[name] = "the samples have no labels (arr_1)"
        elif name == "sfid" and statistics and "mu_s" not in statistics:
            left_out[name] = "the reference has no mu_s and sigma_s"
        elif name in ("precision", "recall") and dataset is None:
            left_out[name] = "the reference has no images (arr_0)"
        elif name in ("precision", "recall") and min(len(samples), len(dataset)) < 4:
            left_out[name] = "needs at least 4 images on both sides"
    return [name for name in METRICS if name in asked and name not in left_out], left_out

def sample_size(samples, where):
    """Pixels a side of samples, which must be square and all of one size."""
    sizes = set()
    for item in samples.source if isinstance(samples.source, list) else samples.source[:1]:
        with reading(f"{item}: cannot be read as an image", "delete it"):
            sizes.add(Image.open(item).size if isinstance(item, str) else item.shape[:2])
    width, height = sizes.pop()
    if sizes or width != height:
        raise UserError(f"{where}: samples must be square and all of one size, here are some of "
                        f"{width}x{height}{''.join(f' and {w}x{h}' for w, h in sizes)}")
    return width

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("samples", help="an npz with arr_0 (N, S, S, 3) uint8, or a folder of square images")
    add("--ref", help="ADM's VIRTUAL_*.npz, statistics as pytorch-fid writes them, an npz or "
        "folder of images, or a dataset")
    add("--metrics", nargs="+", default=list(METRICS)[:5], choices=METRICS, help="agreement: how "
        "often a classifier trained on --ref finds the class asked for; default: the others")
    add("--json", action="store_true", help="print a last line of JSON, too")
    add("--save_stats", metavar="FILE", help="write the reference's statistics to this npz")
    add("--features", default="inception", choices=["inception", "codec"], help="default: inception")
    add("--weights", help="Inception's weight file; default: in torch.hub's folder")
    add("--codec", default="small", choices=CODECS, help="whose features codec means")
    add("--codec_dataset", help="the dataset it was fitted on; default: --ref, or shapes")
    args = parser.parse_args()
    if args.ref is None and (set(args.metrics) != {"is"} or args.save_stats):
        parser.error("--ref is needed for all but --metrics is")
    _, _, device = join(args)
    samples, _ = open_set(args.samples, args.data_dir)
    dataset, statistics = open_set(args.ref, args.data_dir) if args.ref else (None, {})
    for where, images in ((args.samples, samples), (args.ref, dataset)):
        if images is None and where == args.samples or images is not None and len(images) < 2:
            raise UserError(f"{where}: holds fewer than 2 images")
    if args.save_stats and (statistics or args.features == "codec"):
        parser.error("--save_stats: writes Inception's statistics of images")
    metrics, left_out = choose_metrics(args.metrics, args.features, dataset, statistics, samples)
    if not metrics:
        reasons = "; ".join(f"{METRICS[name]} {reason}" for name, reason in left_out.items())
        raise UserError(f"{args.ref}: nothing to compute: {reasons}")

    size, values, reference = sample_size(samples, args.samples), {}, {}
    by_features = [name for name in metrics if name != "agreement"]
    if by_features or args.save_stats:
        home = args.codec_dataset or (dataset.name if dataset and dataset.classes else "shapes")
        extractor = load_extractor(args.features, device, args.codec,
                                   codec_path(args.codec, home, args.data_dir), args.weights)
        if statistics and len(statistics["mu"]) != extractor["width"]:
            raise UserError(f"{args.ref}: holds statistics of {len(statistics['mu'])} features, "
                            f"{args.features} has {extractor['width']}")
        if min(len(samples), len(dataset or samples)) < extractor["width"]:
            print(f"warning: fewer images than the {extractor['width']} features: the covariance "
                  "is singular, the distance too large", file=sys.stderr)
        size = extractor["size"] or size
        wanted = list(METRICS) if args.save_stats else by_features
        reference = load_reference(dataset, statistics, size, extractor, wanted, args.workers)
        if args.save_stats:
            save_statistics(args.save_stats, dataset, reference, size, args.workers)
        values = evaluate(image_batches(samples, size, args.workers), len(samples), extractor,
                          reference, by_features)
    if "agreement" in metrics:
        rows = shuffled(len(dataset))[:KEPT_SAMPLES]
        real, drawn = (torch.from_numpy(np.concatenate(list(batches))) for batches in (
            image_batches(dataset, 32, args.workers, rows), image_batches(samples, 32, args.workers)))
        labels, asked = (torch.from_numpy(x).long() for x in (dataset.labels[rows], samples.labels))
        values["agreement"], at_best = class_agreement(real, labels, drawn, asked)

    for name, value in values.items():
        label = METRICS[name]
        if name == "fid" and args.features == "codec":
            label = f"Frechet distance of {args.codec} codec features"
        note = f"{len(samples)} samples"
        if name == "agreement":
            note += f"; {at_best:.5f} of unseen real images"
        elif name != "is":
            note += f", {reference.get('count', f'statistics of {args.ref}')} references"
        print(f"{label:16} {value:12.5f}  ({note})")
    for name, reason in left_out.items():
        print(f"{METRICS[name]:16} left out: {reason}")
    if args.json:
        print(json.dumps(dict(samples=args.samples, num_samples=len(samples), ref=args.ref,
                              num_references=reference.get("count"), features=args.features,
                              left_out=left_out) | values))

if __name__ == "__main__":
    run(main)
