"""How far are generated images from real ones? FID, sFID, Inception Score, precision and recall.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz      # as ADM's evaluator does
    python fid.py samples/ --ref path/to/folder --metrics fid is         # folders of images, too
    python fid.py samples.npz --ref shapes --features codec --metrics fid agreement     # offline
    python fid.py samples.npz --ref shapes --features classifier --metrics fid agreement
    python fid.py samples.npz --ref flowers --save_stats flowers.npz     # measured once, kept
"""
import contextlib
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from encode import (
    CODECS, RAES, RANK, WORLD_SIZE, Dataset, UserError, check_writable, default_codec,
    file_hash, find_codec_file, find_dataset, find_images, fingerprint, join_processes,
    load_codec, make_parser, on_failure, on_rank0, run, sum_over_processes, to_float, user_path,
    write_file)
from sample import find_checkpoint

# Each metric, and what it needs; without that it is left out.
NEEDS = {
    "fid": "a reference",
    "sfid": "--features inception, and mu_s and sigma_s if the reference is statistics",
    "is": "--features inception",
    "precision": "at least 4 images on both sides",
    "recall": "at least 4 images on both sides",
    "agreement": "labels of the samples (arr_1, one integer each), and a reference with the "
                 "same classes and 50 images or more per class",
}
METRICS = tuple(NEEDS)
DEFAULT_METRICS = METRICS[:5]

KEPT_SAMPLES, KEPT_REFERENCES = 50_000, 10_000  # images for precision and recall, as in ADM
SPLIT = 5000                                    # images in a split of the Inception Score
BATCH = 64                                      # images per forward pass

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"


# ----------------------------------------------------------------------- the network

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
    """Convolution, batch norm with fixed statistics, ReLU.

    The norm is folded into the convolution when weights are loaded, which saves a third of
    the time.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.ParameterDict({
            "weight": torch.ones(c_out), "bias": torch.zeros(c_out),
            "running_mean": torch.zeros(c_out), "running_var": torch.ones(c_out)})
        # nn.BatchNorm2d also saves a counter.
        self.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *rest: state.pop(f"{prefix}bn.num_batches_tracked", None))
        self.register_load_state_dict_post_hook(lambda module, _: module.fold())
        self.fold()

    @torch.no_grad()
    def fold(self):
        scale = self.bn.weight / (self.bn.running_var + 0.001).sqrt()
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        bias = self.bn.bias - self.bn.running_mean * scale
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.conv.stride, self.conv.padding)
        return F.relu_(x)


def average_pool(x):
    """3x3 average pooling that does not count the padding, as in TensorFlow."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


# The blocks; the names of their layers are the published ones.

class Mixed5(nn.Module):
    """35 x 35 pixels, c_in -> 224 + pool channels."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.branch1x1 = ConvNorm(c_in, 64, 1)
        self.branch5x5_1 = ConvNorm(c_in, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5)
        self.branch3x3dbl_1 = ConvNorm(c_in, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3)
        self.branch_pool = ConvNorm(c_in, pool, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pool = self.branch_pool(average_pool(x))
        return torch.cat([self.branch1x1(x), five, double, pool], 1)


class Mixed6a(nn.Module):
    """35 x 35 pixels to 17 x 17, 288 -> 768 channels."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = ConvNorm(288, 384, 3, 2, "valid")
        self.branch3x3dbl_1 = ConvNorm(288, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, 2, "valid")

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Mixed6(nn.Module):
    """17 x 17 pixels, 768 -> 768 channels; c channels within the branches."""

    def __init__(self, c):
        super().__init__()
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, c, 1)
        self.branch7x7_2 = ConvNorm(c, c, (1, 7))
        self.branch7x7_3 = ConvNorm(c, 192, (7, 1))
        self.branch7x7dbl_1 = ConvNorm(768, c, 1)
        self.branch7x7dbl_2 = ConvNorm(c, c, (7, 1))
        self.branch7x7dbl_3 = ConvNorm(c, c, (1, 7))
        self.branch7x7dbl_4 = ConvNorm(c, c, (7, 1))
        self.branch7x7dbl_5 = ConvNorm(c, 192, (1, 7))
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pool = self.branch_pool(average_pool(x))
        return torch.cat([self.branch1x1(x), seven, double, pool], 1)


class Mixed7a(nn.Module):
    """17 x 17 pixels to 8 x 8, 768 -> 1280 channels."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, 2, "valid")
        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, 2, "valid")

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        seven = self.branch7x7x3_4(seven)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)


class Mixed7(nn.Module):
    """8 x 8 pixels, c_in -> 2048 channels; `pool` is the pooling of the last branch."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvNorm(c_in, 320, 1)
        self.branch3x3_1 = ConvNorm(c_in, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvNorm(c_in, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1))
        self.branch_pool = ConvNorm(c_in, 192, 1)

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([
            self.branch1x1(x),
            self.branch3x3_2a(three), self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x))], 1)


def resize_tf1(images, size=299):
    """TensorFlow 1's bilinear resize: pixel i is read at i * H / size, without antialiasing.

    (B, 3, H, W) -> (B, 3, size, size) float32.
    """
    x = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return x[:, :, :-1, :-1]


class InceptionV3(nn.Module):
    """TensorFlow's Inception of 2015-12-05, frozen, with the published names.

    weights: a file of torch-fidelity's or pytorch-fid's; None gives random ones.
    Source: arXiv 1512.00567.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2, "valid")
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, 1, "valid")
        self.Mixed_5b = Mixed5(192, pool=32)
        self.Mixed_5c = Mixed5(256, pool=64)
        self.Mixed_5d = Mixed5(288, pool=64)
        self.Mixed_6a = Mixed6a()
        self.Mixed_6b = Mixed6(128)
        self.Mixed_6c = Mixed6(160)
        self.Mixed_6d = Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b = Mixed7(1280, pool=average_pool)
        self.Mixed_7c = Mixed7(2048, pool=nn.MaxPool2d(3, 1, 1))
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def features(self, x):
        """(B, 3, 299, 299) -> dict: pool3 (B, 2048), spatial (B, 2023), logits (B, 1008)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)                               # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)                               # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))      # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))

        # sFID's: the first 7 channels, row by row, the channel last.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)       # of (B, 768, 17, 17)
        x = self.Mixed_7a(self.Mixed_6e(x))                     # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))                     # (B, 2048, 8, 8)
        pool3 = x.mean((2, 3))

        # The Inception Score's logits have no bias.
        return dict(pool3=pool3, spatial=spatial, logits=pool3 @ self.fc.weight.T)

    def forward(self, images):
        """(B, 3, H, W) uint8 RGB -> the dict of `features`. Raises ValueError."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        with full_float32(images.device):
            x = (resize_tf1(images) - 128) / 128                # (B, 3, 299, 299)
            return self.features(x.contiguous(memory_format=torch.channels_last))


# ----------------------------------------------------------------------- the metrics

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of mu (F,) and S (F, F).

    Source: arXiv 1706.08500.
    """
    def root(sigma):
        """(F, rank): sigma = root @ root.T."""
        w, v = np.linalg.eigh(sigma)
        used = w > len(w) * np.finfo(float).eps * w[-1]
        return v[:, used] * np.sqrt(w[used])

    mu1, sigma1 = np.asarray(mu1, np.float64), np.asarray(sigma1, np.float64)
    mu2, sigma2 = np.asarray(mu2, np.float64), np.asarray(sigma2, np.float64)

    # The singular values of root1.T @ root2 are the roots of the eigenvalues of S1 S2.
    trace = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum()
    return float(distance + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def add_moments(total, features):
    """Add the sums of (x, 1) (x, 1)^T over features x (B, F) to total (F + 1, F + 1) float64.

    total: None to begin. The sums stay on a CUDA card, so that nothing waits.
    """
    if not features.is_cuda:
        features = features.cpu()
    x = F.pad(features.double(), (0, 1), value=1)
    if total is None:
        return x.T @ x
    return torch.addmm(total, x.T, x, out=total)


def mean_and_covariance(total):
    """mu (F,) and sigma (F, F), unbiased, from the sums of `add_moments`."""
    total = total.cpu().numpy()
    count, sums = total[-1, -1], total[-1, :-1]
    mu = sums / count
    return mu, (total[:-1, :-1] - np.outer(sums, mu)) / (count - 1)


def precision_recall(samples, reference, k=3, block=1 << 25):
    """Share of samples (N, F) within reach of a reference image (M, F), and the other way.

    A point reaches as far as its k-th nearest neighbor in its own set. block: distances
    that are computed at a time. Source: arXiv 1904.06991, as ADM has it.
    """
    def share_inside(a, b):
        rows = max(1, block // len(b))
        # A point's nearest neighbor in its own set is itself.
        radii = torch.cat([torch.cdist(x, b).kthvalue(k + 1).values for x in b.split(rows)])
        inside = torch.cat([(torch.cdist(x, b) <= radii).any(1) for x in a.split(rows)])
        return inside.float().mean().item()

    with full_float32(samples.device):
        return share_inside(samples, reference), share_inside(reference, samples)


def inception_score(logits):
    """exp of the mean KL(p, q), where q is the mean p of a random split; arXiv 1606.03498."""
    logits, scores = logits[shuffled(len(logits))].double(), []             # (N, C)
    for part in logits.tensor_split(max(1, round(len(logits) / SPLIT))):
        log_p = part.log_softmax(1)
        log_q = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def shuffled(count):
    """The fixed order in which images are dealt to splits, and kept for precision and recall."""
    return np.random.RandomState(2020).permutation(count)


# -------------------------------------------------------------------------- a classifier

class Classifier(nn.Sequential):
    """A small convolutional network from (B, 3, 32, 32) in [0, 1] to logits (B, classes)."""

    def __init__(self, num_classes):
        layers = []
        for c_in, c_out in ((3, 32), (32, 64), (64, 96), (96, 128)):        # 32 to 2 pixels
            layers += [nn.Conv2d(c_in, c_out, 3, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(512, 128), nn.ReLU(),
                         nn.Linear(128, num_classes))


def train_classifier(images, labels, num_classes, epochs=10):
    """A Classifier trained on images (N, 32, 32, 3) uint8 with labels (N,) int64."""
    net = Classifier(num_classes)
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    batches = order.split(128)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(batches) + 1)
    for batch in tqdm(batches, desc="classifier", unit="step", leave=False):
        loss = F.cross_entropy(net(to_float(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@dataclass(frozen=True)
class Judge:
    """A classifier of a dataset, and the images that it learned from and those it did not."""

    net: Classifier
    seen: Dataset           # nine tenths of the images, at 32 pixels
    unseen: Dataset         # one tenth


def train_judge(dataset, workers):
    """Train a classifier on nine tenths of a dataset with labels. Returns a Judge."""
    chosen = shuffled(len(dataset))[:KEPT_SAMPLES]
    images, labels = dataset.load_all(chosen, 32, workers), dataset.labels[chosen]
    torch.manual_seed(0)
    unseen = torch.rand(len(images)).numpy() < 0.1
    parts = []
    for mask in (~unseen, unseen):
        parts.append(Dataset(dataset.name, dataset.classes, labels[mask], images[mask]))
    seen_images = torch.from_numpy(parts[0].source)
    seen_labels = torch.from_numpy(parts[0].labels).long()
    net = train_classifier(seen_images, seen_labels, len(dataset.classes))
    return Judge(net, *parts)


def agreement(judge, dataset, workers):
    """How often the judge finds the class of a dataset's images to be that of their labels."""
    right = []
    for start in range(0, min(len(dataset), KEPT_SAMPLES), 500):
        part = range(start, min(start + 500, len(dataset), KEPT_SAMPLES))
        images = dataset.load_all(part, 32, workers)
        with torch.no_grad():
            predicted = judge.net(to_float(images)).argmax(1).numpy()
        right.append(predicted == dataset.labels[part])
    return float(np.concatenate(right).mean())


# ------------------------------------------------------------------ networks of features

@dataclass(frozen=True)
class Extractor:
    """A network whose features are compared: images (B, 3, S, S) uint8 -> dict of features."""

    name: str               # what identifies it, in files of statistics, too
    net: nn.Module
    width: int              # F, the number of features "pool3"
    size: int               # pixels per side that images are cropped to; 0: as samples are
    device: torch.device

    def extract(self, images):
        """(B, S, S, 3) uint8 -> dict of features on the device, with pool3 (B, F)."""
        with torch.no_grad():
            return self.net(torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2))


class ClassifierFeatures(nn.Module):
    """What a classifier's last layer gets: features of a kind that no generator was trained on."""

    def __init__(self, classifier):
        super().__init__()
        self.layers = nn.Sequential(*list(classifier)[:-1])

    def forward(self, images):
        return dict(pool3=self.layers(images / 255))


class PooledLatents(nn.Module):
    """The mean over tokens of a codec's latents: features without a download."""

    def __init__(self, codec):
        super().__init__()
        self.codec = codec

    def forward(self, images):
        return dict(pool3=self.codec.encode(images / 255).mean(1))


def inception_extractor(device):
    """TensorFlow's Inception. Raises UserError if its weights are missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    with on_failure(f"{path}: missing or damaged", "compare offline with --features codec, or "
                    f"get Inception's weights (96 MB, sha256 {WEIGHTS_SHA256}): "
                    f"curl -L --create-dirs -o {path} {WEIGHTS_URL}"):
        if file_hash(path, "sha256") != WEIGHTS_SHA256:
            raise ValueError("sha256 mismatch")
        net = InceptionV3(path).to(device)
    return Extractor("inception", net, 2048, 0, device)


def codec_extractor(codec, device):
    """A codec's pooled latents."""
    identity = f"codec {codec.name} {fingerprint(codec)[:8]}"
    return Extractor(identity, PooledLatents(codec), codec.latent_shape[1], codec.image_size,
                     device)


def classifier_extractor(judge, device):
    """A judge's features, of 128 numbers."""
    net = ClassifierFeatures(judge.net).to(device)
    return Extractor("classifier", net, judge.net[-1].in_features, 32, device)


def find_codec(typed, reference, data_dir, device):
    """The codec that --codec names, or by default that of the reference.

    typed: a name, a checkpoint, a file of a small codec, or None. Where the reference is a
    file, the default is the codec for shapes.
    """
    if typed and typed not in CODECS:
        path = find_checkpoint(typed)
        remedy = f"name a file, or one of {', '.join(CODECS)}"
        with on_failure(f"{path}: is no codec and no checkpoint", remedy):
            contents = torch.load(path, map_location="cpu", weights_only=True)
            saved = contents["codec"] if "codec" in contents else contents
            if "name" not in saved or "weights" not in saved:
                raise ValueError("holds no name and weights")
        return load_codec(saved["name"], saved["weights"], device, decoder=False)

    spec = "shapes" if Path(reference).is_file() else reference
    name = typed or default_codec(spec)
    if name in RAES:
        return load_codec(name, None, device, decoder=False)
    path = find_codec_file(name, spec, data_dir)
    if path is None:
        raise UserError(f"{reference}: no codec {name} is fitted to it; name the one to compare "
                        "by: --codec with a checkpoint, or with a file data/*/small-*.pt")
    return load_codec(name, path, device, decoder=False)


def choose_extractor(features, codec, reference, data_dir, device):
    """The network that --features and --codec name, if it need not be trained first."""
    if features == "inception":
        return inception_extractor(device)
    return codec_extractor(find_codec(codec, reference, data_dir, device), device)


# -------------------------------------------------------------------------- sets of images

@dataclass(frozen=True)
class ImageSet:
    """Images, or statistics of them, or both, as in ADM's files."""

    where: str
    images: Dataset         # perhaps none
    statistics: dict        # mu, sigma, mu_s, sigma_s, ... perhaps none


def open_set(where, data_dir="data"):
    """Open an npz, a folder of images, or a dataset, as an ImageSet. Raises UserError."""
    path = Path(where)
    if path.suffix.lower() in (".npz", ".npy") or zipfile.is_zipfile(path):
        return open_arrays(path)
    if path.is_file():
        raise UserError(f"{path}: is neither an npz nor a folder of images")
    file = path / "labels.txt"                  # in folders that sample.py has written
    if not file.exists():
        return ImageSet(where, find_dataset(where, data_dir), {})
    images = find_images(path)
    with on_failure(f"{file}: does not fit the images", "move it away, or sample again"):
        images.labels[:] = np.loadtxt(file, int).reshape(len(images))
    return ImageSet(where, images, {})


STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "pool3", "count", "network", "size")


def open_arrays(path):
    """An npz with arr_0, or with mu and sigma; or an npy of images: an ImageSet."""
    with on_failure(f"{path}: unusable", "write it with sample.py --out, or download it again"):
        if path.suffix.lower() == ".npy":
            return ImageSet(str(path), as_dataset(path, np.load(path, mmap_mode="r"), None), {})
        with np.load(path) as archive:
            keys = archive.files
            if "arr_0" not in keys and "mu" not in keys:
                raise ValueError(f"has neither arr_0 nor mu, but {', '.join(keys)}")
            statistics = {key: archive[key] for key in keys if key in STATISTICS}
            labels = archive["arr_1"] if "arr_1" in keys else None
        check_moments(statistics)
        none = np.empty((0, 1, 1, 3), np.uint8)
        images = map_images(path) if "arr_0" in keys else none
        return ImageSet(str(path), as_dataset(path, images, labels), statistics)


def check_moments(statistics):
    """Raise ValueError if moments do not fit each other, or are not finite."""
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mu not in statistics:
            continue
        square = (len(statistics[mu]),) * 2
        if sigma not in statistics or statistics[sigma].shape != square:
            raise ValueError(f"{mu} and {sigma} do not fit each other")
        if not np.isfinite(statistics[mu] @ statistics[sigma]).all():
            raise ValueError(f"{mu} or {sigma} holds NaN or infinity")


def as_dataset(path, images, labels):
    """Arrays of a file as a Dataset; labels that are not one integer per image are ignored."""
    if images.ndim != 4 or images.shape[2:] != (images.shape[1], 3):
        raise ValueError(f"the images must be square, (N, S, S, 3), not {images.shape}")
    if images.dtype != np.uint8:
        raise ValueError(f"the images must be uint8, 0 to 255, not {images.dtype}")
    usable = (labels is not None and labels.shape == (len(images),)
              and np.issubdtype(labels.dtype, np.integer))
    labels = labels if usable else np.full(len(images), -1)
    return Dataset(str(path), [], labels, images)


def map_images(path):
    """arr_0 of an npz as a memory map; a compressed one is read."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.load(path)["arr_0"]

        # Skip the member's header: its length depends on two numbers at byte 26.
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
        file.seek(int(name_length) + int(extra_length), 1)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def image_batches(dataset, size, workers, skip_bad=False):
    """This process's share of a dataset: yields (B, size, size, 3) uint8, by ADM's crop.

    skip_bad: leave out images that cannot be read.
    """
    index_lists = np.split(np.arange(len(dataset)), range(BATCH, len(dataset), BATCH))
    for images in dataset.batches(index_lists[RANK::WORLD_SIZE], size, workers, skip_bad):
        good = [image for image in images if image is not None]
        if good:
            yield np.stack(good)


def sample_size(samples):
    """Pixels a side of the samples of an ImageSet, which must be square and all of one size."""
    if isinstance(samples.images.source, np.ndarray):
        return samples.images.source.shape[1]
    first = None
    for path in samples.images.source:
        with on_failure(f"{path}: cannot be read", "delete it"), Image.open(path) as image:
            size = image.size
        if size[0] != size[1]:
            raise UserError(f"{path}: is {size[0]} x {size[1]} pixels; samples must be square")
        if first not in (None, size):
            raise UserError(f"{path}: is {size[0]} pixels per side and others are {first[0]}; "
                            "samples must be of one size")
        first = size
    return first[0]


# ------------------------------------------------------------------------- measurements

def measure(batches, count, extractor, metrics, kept=KEPT_SAMPLES, name="samples"):
    """Measure what the metrics compare, over `count` images in batches (B, S, S, 3) uint8.

    Returns a dict: count, network, mu, sigma and for Inception mu_s, sigma_s; if a metric needs
    them, logits (N, C) and pool3 (kept, F).
    """
    is_kept = torch.from_numpy(np.isin(np.arange(count), shuffled(count)[:kept]))
    keeps_pool3 = "precision" in metrics or "recall" in metrics
    pooled = spatial = None
    logits, pool3 = [], []
    start = 0
    for batch in tqdm(batches, desc=name, unit="batch", mininterval=1):
        features = extractor.extract(batch)
        pooled = add_moments(pooled, features["pool3"])
        if "spatial" in features:
            spatial = add_moments(spatial, features["spatial"])
        if "is" in metrics and "logits" in features:
            logits.append(features["logits"].cpu())
        if keeps_pool3:
            pool3.append(features["pool3"].cpu()[is_kept[start:start + len(batch)]])
        start += len(batch)

    result = dict(count=count, network=extractor.name)
    result["mu"], result["sigma"] = mean_and_covariance(pooled)
    if spatial is not None:
        result["mu_s"], result["sigma_s"] = mean_and_covariance(spatial)
    if not np.isfinite(result["sigma"]).all():
        raise UserError(f"{name}: the features are not finite; check the network's weights")
    if logits:
        result["logits"] = torch.cat(logits)
    if keeps_pool3:
        result["pool3"] = torch.cat(pool3)
    return result


def moments_of(batches, extractor):
    """mu and sigma over the batches of images (B, S, S, 3) uint8 of all processes together."""
    total = None
    for images in batches:
        total = add_moments(total, extractor.extract(images)["pool3"])
    if total is None:                           # this process had no images
        total = torch.zeros(extractor.width + 1, extractor.width + 1, dtype=torch.float64)
    return mean_and_covariance(sum_over_processes(total))


def reference_moments(reference, extractor, size, workers, skip_bad=False):
    """mu and sigma of an ImageSet, from its file or measured by all processes together."""
    if "mu" in reference.statistics:
        check_statistics(reference, extractor, size)
        return reference.statistics["mu"], reference.statistics["sigma"]
    return moments_of(image_batches(reference.images, size, workers, skip_bad), extractor)


def check_statistics(reference, extractor, size):
    """Raise UserError if a file's statistics are of another network or image size."""
    statistics = reference.statistics
    width = len(statistics["mu"])
    network = str(statistics.get("network", "inception"))
    if network != extractor.name or width != extractor.width:
        raise UserError(f"{reference.where}: holds {width} features of {network}, not "
                        f"{extractor.width} of {extractor.name}; see --features and --codec")
    measured = int(statistics.get("size", size))
    if measured != size:
        raise UserError(f"{reference.where}: was measured at {measured} pixels, and the samples "
                        f"are compared at {size}")


def measure_reference(reference, extractor, size, metrics, workers):
    """The statistics of a reference: those in its file, and those measured on its images."""
    metrics = set(metrics) - {"is", "agreement"}
    if "mu" in reference.statistics:
        check_statistics(reference, extractor, size)
        # ADM's files hold mu and sigma of the whole set, and images for these two only.
        metrics &= {"precision", "recall"}
    count = len(reference.images)
    if count == 0 or not metrics:
        return reference.statistics
    batches = image_batches(reference.images, size, workers)
    measured = measure(batches, count, extractor, metrics, KEPT_REFERENCES, "reference")
    return {**measured, "size": size, **reference.statistics}


def compare(samples, reference, metrics, device):
    """The metrics of two measured sets, name -> float, without those whose inputs are missing."""
    values = {}
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if name in metrics and mu in samples and mu in reference:
            values[name] = frechet_distance(samples[mu], samples[sigma],
                                            reference[mu], reference[sigma])
    if "is" in metrics and "logits" in samples:
        values["is"] = inception_score(samples["logits"])
    if "pool3" in samples and "pool3" in reference:
        a, b = torch.as_tensor(samples["pool3"]), torch.as_tensor(reference["pool3"])
        if min(len(a), len(b)) > 3:
            values["precision"], values["recall"] = precision_recall(a.to(device), b.to(device))
    return {name: values[name] for name in metrics if name in values}


# --------------------------------------------------------------------------- the script

def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("samples", type=user_path,
        help="an npz with arr_0 (N, S, S, 3) uint8, or a folder of square images")
    add("--ref", type=user_path,
        help="statistics (of ADM, pytorch-fid or --save_stats), images, or a dataset")
    add("--metrics", nargs="+", default=DEFAULT_METRICS, choices=METRICS,
        help=f"default: {' '.join(DEFAULT_METRICS)}")
    add("--json", action="store_true", help="print a last line of JSON, too")
    add("--save_stats", metavar="FILE", type=user_path,
        help="write the reference's statistics to this npz")
    add("--features", default="inception", choices=["inception", "codec", "classifier"],
        help="the network that compares: Inception's (the default), the codec's encoder, or a "
             "classifier trained on nine tenths of the reference, which then is the other tenth")
    add("--codec", type=user_path, metavar="CODEC",
        help="for --features codec: a name, a checkpoint, or a codec's file; default: the "
             "reference's, or if that is a file, the one for shapes")
    return parser.parse_args()


def main():
    args = parse_args()
    device = join_processes(args.device, args.weights_dir)
    samples, reference, side = on_rank0(lambda: open_both(args))
    compared = [name for name in args.metrics if name != "agreement"]
    values, measured, network = {}, {}, ""

    # The network that compares. If it is missing, that is said before the work.
    extractor = None
    if args.features != "classifier" and (compared or args.save_stats):
        extractor = choose_extractor(args.features, args.codec, args.ref or args.samples,
                                     args.data_dir, device)

    # A classifier of the reference finds the samples' classes, and may provide features.
    judge = None
    if can_judge(reference) and ("agreement" in args.metrics or args.features == "classifier"):
        judge = train_judge(reference.images, args.workers)
    if judge and "agreement" in args.metrics and has_classes_of(reference, samples):
        values["agreement"] = agreement(judge, samples.images, args.workers)
        values["agreement_real"] = agreement(judge, judge.unseen, args.workers)

    if compared or args.save_stats:
        if args.features == "classifier":
            extractor = classifier_extractor(judge, device)
            reference = ImageSet(args.ref, judge.unseen, {})
        network = extractor.name
        size = extractor.size or side
        wanted = METRICS if args.save_stats else args.metrics
        measured = measure_reference(reference, extractor, size, wanted, args.workers)
        if args.save_stats:
            save_stats(args.save_stats, measured)

        count = len(samples.images)
        if min(count, int(measured.get("count", count))) < extractor.width:
            print(f"warning: fewer than {extractor.width} images bias the distance upwards",
                  file=sys.stderr)
        batches = image_batches(samples.images, size, args.workers)
        sampled = measure(batches, count, extractor, compared)
        values.update(compare(sampled, measured, compared, device))

        # For comparison: the distance between the real images that the classifier was trained
        # on, and those that it was not.
        if args.features == "classifier" and "fid" in values:
            seen = reference_moments(ImageSet(args.ref, judge.seen, {}), extractor, size,
                                     args.workers)
            values["fid_real"] = frechet_distance(*seen, measured["mu"], measured["sigma"])
    report(args, values, network, len(samples.images), int(measured.get("count", 0)))


def open_both(args):
    """Open the samples and the reference, or the samples again, and check what is asked.

    Returns two ImageSets and the samples' pixels a side.
    """
    if WORLD_SIZE > 1:
        raise UserError("fid.py runs in one process; start it with python")
    if args.ref is None and list(args.metrics) != ["is"]:
        raise UserError("--ref: only the Inception Score (--metrics is) does without")
    if args.codec and args.features != "codec":
        raise UserError("--codec: is for --features codec")
    samples = open_set(args.samples, args.data_dir)
    reference = open_set(args.ref, args.data_dir) if args.ref else samples

    for image_set in (samples, reference):
        refuse_too_few(image_set)
    if len(samples.images) < 2:
        raise UserError(f"{samples.where}: holds statistics, not images")
    side = sample_size(samples)
    if args.save_stats:
        check_writable(Path(args.save_stats).parent, "--save_stats")
    if args.features == "classifier" and (args.save_stats or not can_judge(reference)):
        raise UserError("--features classifier: takes a dataset with classes of 50 images or "
                        "more as --ref, and no --save_stats")
    return samples, reference, side


def refuse_too_few(image_set):
    """Raise UserError if an ImageSet holds neither statistics nor two images."""
    if len(image_set.images) < 2 and "mu" not in image_set.statistics:
        raise UserError(f"{image_set.where}: holds fewer than 2 images")


def can_judge(reference):
    """Whether a classifier can be trained on an ImageSet: several classes, 50 images in each."""
    images = reference.images
    if len(images.classes) < 2:
        return False
    return np.bincount(images.labels, minlength=len(images.classes)).min() >= 50


def has_classes_of(reference, samples):
    """Whether the samples have labels, and these can mean the classes of the reference.

    An npz holds numbers without names.
    """
    labels, classes = samples.images.labels, reference.images.classes
    return (labels.min() >= 0 and labels.max() < len(classes)
            and samples.images.classes in ([], classes))


def save_stats(path, measured):
    """Write statistics to exactly this path, which np.savez would add .npz to."""
    arrays = {name: np.asarray(value) for name, value in measured.items()}
    write_file(path, lambda file: np.savez(file, **arrays))


def report(args, values, network, num_samples, num_references):
    """Print the values, what was left out and why, and perhaps a line of JSON."""
    left_out = {name: NEEDS[name] for name in args.metrics if name not in values}
    titles = {"agreement_real": "agreement of unseen real images",
              "fid_real": "Frechet distance of real images that the classifier was trained on"}
    if network != "inception":
        titles["fid"] = f"Frechet distance of {network}"
    compared = f", {args.ref}" if args.ref else ""
    for name, value in values.items():
        measured_on = f"{num_samples} samples{compared}"
        if name.endswith("_real"):
            measured_on = args.ref
        shown = round(value, 5) + 0.0           # not -0.00000
        print(f"{titles.get(name, name):15} {shown:12.5f}  ({measured_on})")
    for name, need in left_out.items():
        print(f"{name:15} left out: needs {need}")
    if args.json:
        counts = dict(num_samples=num_samples, num_references=num_references, network=network)
        print(json.dumps({**vars(args), **counts, "left_out": left_out, **values}))
    if not values:
        raise UserError(f"{args.samples}: nothing to compute without "
                        f"{'; '.join(left_out.values())}")


if __name__ == "__main__":
    run(main)
