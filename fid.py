"""How far are generated images from real ones? FID, sFID, Inception Score, precision and recall.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz      # as ADM's evaluator does
    python fid.py samples/ --ref data/flowers12/test --metrics fid is    # folders of images, too
    python fid.py samples.npz --ref shapes --features codec --metrics fid agreement     # offline
    python fid.py samples.npz --ref flowers --save_stats flowers.npz     # measured once, kept

The network is TensorFlow's Inception of 2015-12-05, with its published weights; sums are float64.
B images, S image size, F features, N images in all.
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
                    load_codec, make_parser, reading, run, to_float, write_file)

METRICS = ("fid", "sfid", "is", "precision", "recall", "agreement")
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

class ConvNorm(nn.Module):
    """Convolution, batch norm with fixed statistics, ReLU; the norm is folded in on loading."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        if padding is None:                     # TensorFlow's SAME with stride 1, VALID with 2
            padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.ParameterDict({name: torch.full((c_out,), value) for name, value in (
            ("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0))})
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
        return F.relu_(F.conv2d(x, self.weight, self.bias, self.conv.stride, self.conv.padding))

class Mixed(nn.Module):
    """Inception block: chains of convolutions and a pooling side by side, their outputs joined.

    branches: name -> steps (width, kernel); a last step (width, kernel, kernel) is a fork, both of
    whose outputs count. pool: "average" or "max", before a 1x1 convolution to pool_width, or
    "halve": with stride 2, which the last step of every branch has then, too.
    """

    def __init__(self, c_in, pool, pool_width=None, **branches):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, steps in branches.items():
            width, chain = c_in, []
            for i, (c_out, *kernels) in enumerate(steps, 1):
                name = branch if len(steps) == 1 else f"{branch}_{i}"
                chain.append([name] if len(kernels) == 1 else [f"{name}a", f"{name}b"])
                stride = 2 if pool == "halve" and i == len(steps) else 1
                for name, kernel in zip(chain[-1], kernels):
                    self.add_module(name, ConvNorm(width, c_out, kernel, stride))
                width = c_out
            self.chains.append(chain)
        if pool_width:
            self.branch_pool = ConvNorm(c_in, pool_width, (1, 1))

    def forward(self, x):
        out = []
        for chain in self.chains:
            ends = [x]
            for names in chain:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            out += ends
        if self.pool == "halve":
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "average":              # TensorFlow does not count the padding
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            x = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*out, self.branch_pool(x)], 1)

def resize_tf1(images, size=299):
    """(B, 3, H, W) -> (B, 3, size, size) float32, bilinear with TensorFlow 1's pixel positions."""
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

    weights: path of the published state dict, or None for random ones. Raises UserError.
    Source: arXiv 1512.00567; the graph in inception-2015-12-05.tgz.
    """

    def __init__(self, weights=None):
        super().__init__()
        one, three, five, row, column = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
        fork = (384, (1, 3), (3, 1))
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, three, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, three, padding=0)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, three)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, one)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, three, padding=0)
        double = [(64, one), (96, three), (96, three)]
        for name, c_in, width in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
            block = Mixed(c_in, "average", width, branch1x1=[(64, one)],
                          branch5x5=[(48, one), (64, five)], branch3x3dbl=double)
            self.add_module(f"Mixed_5{name}", block)
        self.Mixed_6a = Mixed(288, "halve", branch3x3=[(384, three)], branch3x3dbl=double)
        for name, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            double = [(c, one), (c, column), (c, row), (c, column), (192, row)]
            block = Mixed(768, "average", 192, branch1x1=[(192, one)],
                          branch7x7=[(c, one), (c, row), (192, column)], branch7x7dbl=double)
            self.add_module(f"Mixed_6{name}", block)
        self.Mixed_7a = Mixed(768, "halve", branch3x3=[(192, one), (320, three)],
                              branch7x7x3=[(192, one), (192, row), (192, column), (192, three)])
        for name, c_in, pool in (("b", 1280, "average"), ("c", 2048, "max")):
            block = Mixed(c_in, pool, 192, branch1x1=[(320, one)], branch3x3=[(384, one), fork],
                          branch3x3dbl=[(448, one), (384, three), fork])
            self.add_module(f"Mixed_7{name}", block)
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            with reading(f"{weights}: not Inception's weights", f"get {WEIGHTS_URL}"):
                self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def load_state_dict(self, state, *args, **kwargs):
        """Leaves out the batch counters that nn.BatchNorm2d saves."""
        state = {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}
        return super().load_state_dict(state, *args, **kwargs)

    @torch.no_grad()
    def forward(self, images):
        """(B, 3, H, W) uint8 RGB -> pool3 (B, 2048), spatial (B, 2023), logits (B, 1008), float32.

        spatial: 7 channels of Mixed_6d in the order row, column, channel. logits: without fc's
        bias, as the Inception Score takes them.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        with full_float32(images.device):
            x = (resize_tf1(images) - 128) / 128                                # (B, 3, 299, 299)
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, 2)                                           # (B, 64, 73, 73)
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                  # (B, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))   # (B, 768, 17, 17)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))   # (B, 2048, 8, 8)
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

def class_agreement(images, labels, samples, asked, epochs=10):
    """Share of samples in which a classifier, trained on real images, finds the class asked for.

    images (N, 32, 32, 3), samples (M, 32, 32, 3): uint8. labels (N,), asked (M,): int64. Returns
    (that share, the same for a tenth of the real images, held out). Runs on the CPU.
    """
    torch.manual_seed(0)
    held = torch.rand(len(images)) < 0.1
    net = nn.Sequential()
    for c_in, c_out in ((3, 32), (32, 64), (64, 96), (96, 128)):                # 32 to 2 pixels
        net.extend([nn.Conv2d(c_in, c_out, 3, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU()])
    classes = int(labels.max()) + 1
    net.extend([nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, classes)])
    rows = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    batches = rows[~held[rows]].split(128)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(batches) + 1)
    for batch in tqdm(batches, desc="classifier", unit="step", leave=False):
        loss = F.cross_entropy(net(to_float(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        found = [torch.cat([net(to_float(batch)).argmax(1) for batch in x.split(500)])
                 for x in (samples, images[held])]
    return [(x == y).double().mean().item() for x, y in zip(found, (asked, labels[held]))]

class Moments:
    """Mean and covariance of vectors, summed in float64 as they stream by."""
    count, total, outer = 0, 0, 0

    def add(self, x):                           # (B, F)
        x = (x.cpu() if x.device.type == "mps" else x).double()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.outer = self.outer + x.T @ x

    def result(self):                           # (F,) and (F, F) with ddof 1, numpy float64
        mu = self.total / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()

def shuffled(count):
    """The fixed order in which images are dealt to splits, and kept for precision and recall."""
    return np.random.RandomState(2020).permutation(count)

def measure(batches, count, extract, metrics, kept=KEPT_SAMPLES, name="samples"):
    """What metrics need to know of a set of images.

    batches: `count` images in all as (B, S, S, 3) uint8; extract: turns a batch into features.
    Returns a dict: count, mu and sigma of pool3 and, as far as metrics ask for it, mu_s and
    sigma_s of spatial, logits (N, classes), and pool3 (kept, F) of a fixed choice of images.
    """
    chosen = torch.from_numpy(np.argsort(shuffled(count)) < kept)
    pool3, spatial, lists = Moments(), Moments(), dict(logits=[], pool3=[])
    for batch in tqdm(batches, desc=name, unit="batch", mininterval=1):
        found, keep = extract(batch), chosen[pool3.count:][:len(batch)]
        pool3.add(found["pool3"])
        if "sfid" in metrics and "spatial" in found:
            spatial.add(found["spatial"])
        if "is" in metrics and "logits" in found:
            lists["logits"].append(found["logits"].cpu())
        if "precision" in metrics or "recall" in metrics:
            lists["pool3"].append(found["pool3"].float().cpu()[keep])
    result = {key: torch.cat(values) for key, values in lists.items() if values}
    result["count"], (result["mu"], result["sigma"]) = count, pool3.result()
    if spatial.count:
        result["mu_s"], result["sigma_s"] = spatial.result()
    if not np.isfinite(result["sigma"]).all():
        raise UserError(f"{name}: the features are not finite; check the network's weights")
    return result

def evaluate(batches, count, extractor, reference, metrics):
    """Those of the metrics of samples for which there is a reference: name -> float.

    batches: (B, S, S, 3) uint8, `count` images in all; reference: a dict like `measure`'s.
    """
    samples, values = measure(batches, count, extractor["extract"], metrics), {}
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if name in metrics and mu in samples and mu in reference:
            moments = samples[mu], samples[sigma], reference[mu], reference[sigma]
            values[name] = frechet_distance(*moments)
    if "logits" in samples:
        values["is"] = inception_score(samples["logits"])
    if "pool3" in samples and min(count, len(reference.get("pool3", []))) > 3:
        both = [torch.as_tensor(x["pool3"]).to(extractor["device"]) for x in (samples, reference)]
        values |= dict(zip(("precision", "recall"), precision_recall(*both)))
    return {name: values[name] for name in metrics if name in values}

# ------------------------------------------------------------------------ features, sets of images

def load_extractor(features, device, codec="small", codec_weights=None):
    """What turns images into features: a dict of extract, a function of (B, S, S, 3) uint8, width,
    the number of features, size, of the images that it takes (None: any), and device.

    features: "inception", or "codec": the frozen codec's latents, averaged over tokens.
    """
    if features == "codec":
        net = load_codec(codec, codec_weights, device, decoder=False)

        @torch.no_grad()
        def extract(images):
            return dict(pool3=net.encode(to_float(images, device)).mean(1))     # (B, C)
        return dict(extract=extract, width=net.latent_shape[1], size=net.image_size, device=device)
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    with reading(f"{path}: Inception's weights are missing or damaged",
                 f"get them (96 MB, sha256 {WEIGHTS_SHA256}): curl -L --create-dirs -o {path} "
                 f"{WEIGHTS_URL} (or compare offline: --features codec)"):
        if hashlib.sha256(path.read_bytes()).hexdigest() != WEIGHTS_SHA256:
            raise ValueError("another sha256")
    inception = InceptionV3(path).to(device)

    def extract(images):
        return inception(torch.as_tensor(images).to(device).permute(0, 3, 1, 2))
    return dict(extract=extract, width=2048, size=None, device=device)

def map_images(path):
    """arr_0 of an npz as a memory map; a compressed one is read."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.load(path)["arr_0"]
        file.seek(info.header_offset + 26)      # the lengths of its name and of an extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")

def open_set(where, data_dir="data"):
    """(Dataset of the images or None, statistics) of an npz, a folder of images, or a dataset."""
    path = Path(where)
    if path.suffix != ".npz":
        flat = sorted(str(file) for file in path.glob("*") if file.suffix.lower() in SUFFIXES)
        unknown = np.full(len(flat), -1)
        return Dataset("", [], unknown, flat) if flat else find_dataset(where, data_dir), {}
    with (reading(f"{path}: unusable", "write it with sample.py --out, or download it again"),
          np.load(path) as archive):
        keys, wanted = archive.files, ("mu", "sigma", "mu_s", "sigma_s", "pool3", "count")
        statistics = {key: archive[key] for key in keys if key in wanted}
        for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if mu in keys and statistics[sigma].shape != statistics[mu].shape * 2:
                raise ValueError(f"{mu} and {sigma} don't fit each other")
            if mu in keys and not np.isfinite(statistics[mu] @ statistics[sigma]).all():
                raise ValueError(f"{mu} or {sigma} holds NaN or infinity")
        if "arr_0" not in keys and "mu" not in keys:
            raise ValueError(f"has neither arr_0 nor mu, but {', '.join(keys)}")
        if "arr_0" not in keys:
            return None, statistics
        images = map_images(path)
        n, *shape = images.shape
        if images.dtype != np.uint8 or shape != [shape[0], shape[0], 3]:
            raise ValueError(f"arr_0 must be square images (N, S, S, 3) uint8, not {images.shape}")
        labels = archive["arr_1"] if "arr_1" in keys else np.full(n, -1)
        return Dataset("", [], labels, images), statistics

def image_batches(dataset, size, workers, rows=None):
    """Images, by default all, in order: (B, size, size, 3) uint8 through ADM's crop."""
    rows = range(len(dataset)) if rows is None else rows
    parts = [rows[start:start + BATCH] for start in range(0, len(rows), BATCH)]
    return map(np.stack, dataset.batches(parts, size, workers))

def load_reference(dataset, statistics, size, extractor, metrics, workers):
    """What samples are compared with: given statistics, and what is measured of the images.

    size: of the samples, to which images without statistics are cropped.
    """
    metrics = set(metrics) - {"is"}
    if statistics:                              # an ADM file: its images are for these two alone
        metrics &= {"precision", "recall"} if dataset and "pool3" not in statistics else set()
        size = len(dataset.source[0]) if dataset else size
    if not dataset or not metrics:
        return statistics
    return measure(image_batches(dataset, size, workers), len(dataset), extractor["extract"],
                   metrics, KEPT_REFERENCES, "reference") | statistics

def sample_size(samples, where):
    """Pixels a side of samples, which must be square and all of one size."""
    sizes = {samples.source[0].shape[:2]} if isinstance(samples.source, np.ndarray) else set()
    for path in samples.source if not sizes else []:
        with reading(f"{path}: cannot be read as an image", "delete it"), Image.open(path) as image:
            sizes.add(image.size)
    (width, height), *others = sizes
    if others or width != height:
        raise UserError(f"{where}: samples must be square and all of one size, not {sizes}")
    return width

NEEDS = {       # metric -> what it needs, for those that are left out
    "fid": "a reference", "sfid": "Inception's features, and of statistics mu_s and sigma_s",
    "is": "Inception's features", "precision": "4 images of samples and reference (arr_0)",
    "recall": "4 images of samples and reference (arr_0)",
    "agreement": "a reference with classes, and labels of the samples (arr_1)"}

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("samples", help="an npz with arr_0 (N, S, S, 3) uint8, or a folder of square images")
    add("--ref", help="ADM's VIRTUAL_*.npz, statistics as --save_stats or pytorch-fid writes them, "
        "an npz or folder of images, or a dataset")
    add("--metrics", nargs="+", default=METRICS[:5], choices=METRICS, help="agreement: how often a "
        "classifier trained on --ref finds the class asked for; default: the others")
    add("--json", action="store_true", help="print a last line of JSON, too")
    add("--save_stats", metavar="FILE", help="write the reference's statistics to this npz")
    add("--features", default="inception", choices=["inception", "codec"], help="of which network")
    add("--codec", default="small", choices=CODECS, help="the codec of --features codec")
    add("--codec_dataset", help="the dataset it was fitted on; default: --ref, or shapes")
    args = parser.parse_args()
    _, _, device = join(args)
    if args.ref is None and (args.metrics != ["is"] or args.save_stats):
        raise UserError("--ref is needed for all but --metrics is")
    samples, _ = open_set(args.samples, args.data_dir)
    dataset, statistics = open_set(args.ref, args.data_dir) if args.ref else (None, {})
    if samples is None or min(len(samples), len(dataset or samples)) < 2:
        raise UserError(f"{args.samples}, {args.ref}: fewer than 2 images")

    metrics, values, reference = set(args.metrics) - {"agreement"}, {}, {}
    size = sample_size(samples, args.samples)
    if metrics or args.save_stats:
        home = args.codec_dataset or (dataset.name if dataset and dataset.classes else "shapes")
        extractor = load_extractor(args.features, device, args.codec,
                                   codec_path(args.codec, home, args.data_dir))
        size, width = extractor["size"] or size, extractor["width"]
        if statistics and len(statistics["mu"]) != width:
            raise UserError(f"{args.ref}: holds statistics of {len(statistics['mu'])} features, "
                            f"{args.features} has {width}")
        if min(len(samples), len(dataset or samples)) < width:
            print(f"warning: fewer images than the {width} features: the covariance is singular, "
                  "the distance too large", file=sys.stderr)
        wanted = METRICS if args.save_stats else metrics
        reference = load_reference(dataset, statistics, size, extractor, wanted, args.workers)
        if args.save_stats:
            write_file(args.save_stats, lambda file: np.savez(file, **reference))
        batches = image_batches(samples, size, args.workers)
        values = evaluate(batches, len(samples), extractor, reference, metrics)
    if "agreement" in args.metrics and dataset and dataset.classes and samples.labels.min() >= 0:
        rows = shuffled(len(dataset))[:KEPT_SAMPLES]
        real = image_batches(dataset, 32, args.workers, rows)
        drawn = image_batches(samples, 32, args.workers)
        real, drawn = (torch.from_numpy(np.concatenate(list(images))) for images in (real, drawn))
        labels, asked = (torch.from_numpy(x).long() for x in (dataset.labels[rows], samples.labels))
        values["agreement"], values["agreement_real"] = class_agreement(real, labels, drawn, asked)

    left_out = {name: NEEDS[name] for name in args.metrics if name not in values}
    for name, value in values.items():
        if name == "fid" and args.features == "codec":
            name = f"Frechet distance of {args.codec} codec features"
        print(f"{name:15} {value:12.5f}  ({len(samples)} samples, {args.ref})")
    for name, need in left_out.items():
        print(f"{name:15} left out: needs {need}")
    if args.json:
        found = dict(samples=args.samples, num_samples=len(samples), ref=args.ref,
                     num_references=int(reference.get("count", 0)), features=args.features)
        print(json.dumps(found | dict(left_out=left_out) | values))
    if not values:
        raise UserError(f"{args.ref}: nothing to compute without {'; '.join(left_out.values())}")

if __name__ == "__main__":
    run(main)
