"""How far are generated images from real ones? FID, sFID, Inception Score, precision and recall.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz      # as ADM's evaluator does
    python fid.py samples/ --ref path/to/folder --metrics fid is       # folders of images, too
    python fid.py samples.npz --ref shapes --features codec --metrics fid agreement     # offline
    python fid.py samples.npz --ref flowers --save_stats flowers.npz     # measured once, kept
"""
import contextlib
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from encode import (CODECS, Dataset, UserError, codec_path, find_dataset, find_images,
                    join, load_codec, make_parser, reading, run, to_float, write_file)

NEEDS = {       # metric -> what it is left out without
    "fid": "a reference", "sfid": "--features inception, and mu_s and sigma_s of statistics",
    "is": "--features inception", "precision": "4 images in each", "recall": "4 images in each",
    "agreement": "labels of the samples, and a reference of the same classes, 50 images each"}
METRICS = tuple(NEEDS)
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
    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        start = dict(weight=1.0, bias=0.0, running_mean=0.0, running_var=1.0)
        self.bn = nn.ParameterDict({name: torch.full((c_out,), x) for name, x in start.items()})
        self.register_load_state_dict_pre_hook(     # without the counter that nn.BatchNorm2d saves
            lambda _, state, prefix, *rest: state.pop(f"{prefix}bn.num_batches_tracked", None))
        self.register_load_state_dict_post_hook(ConvNorm.fold)
        self.fold()

    @torch.no_grad()
    def fold(self, *_):
        scale = self.bn.weight / (self.bn.running_var + 0.001).sqrt()
        self.register_buffer("weight", self.conv.weight * scale.view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("bias", self.bn.bias - self.bn.running_mean * scale, persistent=False)

    def forward(self, x):
        return F.relu_(F.conv2d(x, self.weight, self.bias, self.conv.stride, self.conv.padding))

class Layers(nn.ModuleDict):
    """ConvNorms by their published names, each made when `chain` meets it for the first time."""
    def chain(self, name, x, *steps):       # steps: (width, kernel, stride, padding), one by one
        for i, (width, kernel, *how) in enumerate(steps, 1):
            layer = name if len(steps) == 1 else f"{name}_{i}"
            if layer not in self:
                self[layer] = ConvNorm(x.shape[1], width, kernel, *how)
            x = self[layer](x)
        return x

def resize_tf1(images, size=299):
    """(B, 3, H, W) -> (B, 3, size, size) float32, bilinear: pixel i is read at i * H / size."""
    x = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return x[:, :, :-1, :-1]

class InceptionV3(Layers):
    """TensorFlow's Inception of 2015-12-05, arXiv 1512.00567, frozen; weights None: random ones."""
    def __init__(self, weights=None):
        super().__init__()
        self.fc = nn.Linear(2048, 1008)
        self.features(torch.zeros(1, 3, 75, 75))                                # makes the layers
        if weights is not None:
            self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def mix(self, block, *branches):
        """Branches (name, input, steps) side by side, their outputs joined."""
        if block not in self:
            self[block] = Layers()
        return torch.cat([self[block].chain(*branch) for branch in branches], 1)

    def features(self, x):
        """(B, 3, 299, 299) -> pool3 (B, 2048), spatial (B, 2023), logits without bias (B, 1008)."""
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)    # as TensorFlow counts
        wide, tall, halve = (1, 7), (7, 1), (2, "valid")
        x = self.chain("Conv2d_1a_3x3", x, (32, 3, *halve))
        x = self.chain("Conv2d_2a_3x3", x, (32, 3, 1, "valid"))
        x = F.max_pool2d(self.chain("Conv2d_2b_3x3", x, (64, 3)), 3, 2)         # (B, 64, 73, 73)
        x = self.chain("Conv2d_3b_1x1", x, (80, 1))
        x = F.max_pool2d(self.chain("Conv2d_4a_3x3", x, (192, 3, 1, "valid")), 3, 2)
        for block, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self.mix(block, ("branch1x1", x, (64, 1)),
                         ("branch5x5", x, (48, 1), (64, 5)),
                         ("branch3x3dbl", x, (64, 1), (96, 3), (96, 3)),
                         ("branch_pool", average(x), (width, 1)))               # (B, 288, 35, 35)
        x = self.mix("Mixed_6a", ("branch3x3", x, (384, 3, *halve)),
                     ("branch3x3dbl", x, (64, 1), (96, 3), (96, 3, *halve)),
                     ("branch_pool", F.max_pool2d(x, 3, 2)))                    # (B, 768, 17, 17)
        for letter, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = self.mix(f"Mixed_6{letter}", ("branch1x1", x, (192, 1)),
                         ("branch7x7", x, (c, 1), (c, wide), (192, tall)),
                         ("branch7x7dbl", x, (c, 1), (c, tall), (c, wide), (c, tall), (192, wide)),
                         ("branch_pool", average(x), (192, 1)))                 # (B, 768, 17, 17)
            if letter == "d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.mix("Mixed_7a", ("branch3x3", x, (192, 1), (320, 3, *halve)),
                     ("branch7x7x3", x, (192, 1), (192, wide), (192, tall), (192, 3, *halve)),
                     ("branch_pool", F.max_pool2d(x, 3, 2)))                    # (B, 1280, 8, 8)
        for block, pool in (("Mixed_7b", average), ("Mixed_7c", nn.MaxPool2d(3, 1, 1))):
            y = self.mix(block, ("branch3x3_1", x, (384, 1)))
            z = self.mix(block, ("branch3x3dbl", x, (448, 1), (384, 3)))
            x = self.mix(block, ("branch1x1", x, (320, 1)),
                         ("branch3x3_2a", y, (384, (1, 3))), ("branch3x3_2b", y, (384, (3, 1))),
                         ("branch3x3dbl_3a", z, (384, (1, 3))),
                         ("branch3x3dbl_3b", z, (384, (3, 1))),
                         ("branch_pool", pool(x), (192, 1)))                    # (B, 2048, 8, 8)
        pool3 = x.mean((2, 3))
        return dict(pool3=pool3, spatial=spatial, logits=pool3 @ self.fc.weight.T)

    def forward(self, images):                  # (B, 3, H, W) uint8 RGB
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        with full_float32(images.device):
            x = (resize_tf1(images) - 128) / 128                                # (B, 3, 299, 299)
            return self.features(x.contiguous(memory_format=torch.channels_last))

# ------------------------------------------------------------------------------------ the metrics

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of mu (F,) and S (F, F); arXiv 1706.08500."""
    def root(sigma):                            # (F, rank): sigma = root @ root.T
        w, v = np.linalg.eigh(sigma)
        used = w > len(w) * np.finfo(float).eps * w[-1]
        return v[:, used] * np.sqrt(w[used])

    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    # the singular values of root1.T @ root2 are the roots of the eigenvalues of S1 S2
    trace = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)

def precision_recall(samples, reference, k=3, block=1 << 25):
    """Share of samples (N, F) inside the balls that reach from references (M, F) to their k-th
    nearest neighbours, and the other way round. Source: arXiv 1904.06991, as ADM has it.
    """
    def share_inside(a, b):                     # a point's nearest neighbour in its set is itself
        rows = max(1, block // len(b))          # of the distances (len(a), len(b)) at a time
        radii = torch.cat([torch.cdist(x, b).kthvalue(k + 1).values for x in b.split(rows)])
        inside = torch.cat([(torch.cdist(x, b) <= radii).any(1) for x in a.split(rows)])
        return inside.float().mean().item()

    with full_float32(samples.device):
        return share_inside(samples, reference), share_inside(reference, samples)

def inception_score(logits):
    """exp of the mean KL(p, q), q being the mean p of a random split; arXiv 1606.03498."""
    logits, scores = logits[shuffled(len(logits))].double(), []                 # (N, C)
    for part in logits.tensor_split(max(1, round(len(logits) / SPLIT))):
        log_p = part.log_softmax(1)
        log_q = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores))

def agreement(dataset, samples, workers, epochs=10):
    """Share of samples, and of held-out real images, in which a classifier finds their class."""
    def load(some):                             # (N, 32, 32, 3) uint8 and (N,) int64
        rows = shuffled(len(some))[:KEPT_SAMPLES]
        [images] = some.batches([rows], 32, workers)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(some.labels[rows]).long()

    images, labels = load(dataset)
    torch.manual_seed(0)
    held = torch.rand(len(images)) < 0.1
    net = nn.Sequential()
    for c_in, c_out in ((3, 32), (32, 64), (64, 96), (96, 128)):                # 32 to 2 pixels
        net.extend([nn.Conv2d(c_in, c_out, 3, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU()])
    net.extend([nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, len(dataset.classes))])
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
        right = [torch.cat([net(to_float(part)).argmax(1) for part in x.split(500)]) == y
                 for x, y in (load(samples), (images[held], labels[held]))]
    return [x.double().mean().item() for x in right]

def shuffled(count):
    """The fixed order in which images are dealt to splits, and kept for precision and recall."""
    return np.random.RandomState(2020).permutation(count)

def measure(batches, count, extract, metrics, kept=KEPT_SAMPLES, name="samples"):
    """What is compared: mu, sigma, mu_s, sigma_s; if asked for, logits (N, C), pool3 (kept, F)."""
    chosen = torch.from_numpy(np.isin(np.arange(count), shuffled(count)[:kept]))
    totals, lists = {}, dict(logits=[], pool3=[])
    for batch in tqdm(batches, desc=name, unit="batch", mininterval=1):         # (B, S, S, 3) uint8
        features = extract(batch)
        keep, chosen = chosen.tensor_split([len(batch)])
        for key in features.keys() - {"logits"}:
            x = F.pad(features[key].cpu().double(), (0, 1), value=1)            # (B, F + 1)
            totals[key] = totals.get(key, 0) + x.T @ x
        if "is" in metrics and "logits" in features:
            lists["logits"].append(features["logits"].cpu())
        if "precision" in metrics or "recall" in metrics:
            lists["pool3"].append(features["pool3"].cpu()[keep])
    result = {key: torch.cat(values) for key, values in lists.items() if values}
    for key, mu, sigma in (("pool3", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if key in totals:
            total = totals[key].numpy()         # the sum of (x, 1) (x, 1)^T
            result[mu] = total[-1, :-1] / count
            result[sigma] = (total[:-1, :-1] - np.outer(total[-1, :-1], result[mu])) / (count - 1)
    if not np.isfinite(result["sigma"]).all():
        raise UserError(f"{name}: the features are not finite; check the network's weights")
    return result | dict(count=count)

def evaluate(batches, count, extractor, reference, metrics):
    """The metrics of `count` samples, as far as the reference has what they need: name -> float."""
    samples, values = measure(batches, count, extractor["extract"], metrics), {}
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if name in metrics and mu in samples and mu in reference:
            values[name] = frechet_distance(samples[mu], samples[sigma],
                                            reference[mu], reference[sigma])
    if "logits" in samples:
        values["is"] = inception_score(samples["logits"])
    if "pool3" in samples and min(count, len(reference.get("pool3", []))) > 3:
        both = [torch.as_tensor(x["pool3"]).to(extractor["device"]) for x in (samples, reference)]
        values["precision"], values["recall"] = precision_recall(*both)
    return {name: values[name] for name in metrics if name in values}

# ------------------------------------------------------------------------ features, sets of images

def load_extractor(features, device, codec="small", codec_weights=None):
    """A dict: extract, from (B, S, S, 3) uint8 to features, their width, size of images, device."""
    if features == "codec":
        net = load_codec(codec, codec_weights, device, decoder=False)
        width, size = net.latent_shape[1], net.image_size
    else:
        path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
        with reading(f"{path}: missing or damaged", "compare offline with --features codec, or get "
                     f"Inception's weights (96 MB, sha256 {WEIGHTS_SHA256}): "
                     f"curl -L --create-dirs -o {path} {WEIGHTS_URL}"):
            if hashlib.sha256(path.read_bytes()).hexdigest() != WEIGHTS_SHA256:
                raise ValueError("another sha256")
        net, width, size = InceptionV3(path).to(device), 2048, None             # takes any size
    def extract(images):
        if features == "codec":
            return dict(pool3=net.encode(to_float(images, device)).mean(1))     # (B, F)
        return net(torch.as_tensor(images).to(device).permute(0, 3, 1, 2))
    return dict(extract=extract, width=width, size=size, device=device)

def map_images(path):
    """arr_0 of an npz as a memory map; a compressed one is read."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.load(path)["arr_0"]
        file.seek(info.header_offset + 26)      # the lengths of its name and of an extra field
        file.seek(int(np.frombuffer(file.read(4), "<u2").sum()), 1)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")

def open_set(where, data_dir="data"):
    """(Dataset of the images, statistics) of an npz, a folder of images, or a dataset."""
    path = Path(where)
    if path.suffix != ".npz":
        file = path / "labels.txt"              # in folders that sample.py has written
        if not file.exists():
            return find_dataset(where, data_dir), {}
        dataset = find_images(path)
        with reading(f"{file}: doesn't fit the images", "move it away, or sample again"):
            dataset.labels[:] = np.loadtxt(file, int).reshape(len(dataset))
        return dataset, {}
    with (reading(f"{path}: unusable", "write it with sample.py --out, or download it again"),
          np.load(path) as archive):
        keys, wanted = archive.files, ("mu", "sigma", "mu_s", "sigma_s", "pool3", "count")
        if "arr_0" not in keys and "mu" not in keys:
            raise ValueError(f"has neither arr_0 nor mu, but {', '.join(keys)}")
        statistics = {key: archive[key] for key in keys if key in wanted}
        for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if mu in keys and not (statistics[sigma].shape == statistics[mu].shape * 2
                                   and np.isfinite(statistics[mu] @ statistics[sigma]).all()):
                raise ValueError(f"{mu} and {sigma} don't fit each other, or hold NaN or infinity")
        images = map_images(path) if "arr_0" in keys else np.empty((0, 1, 1, 3), np.uint8)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2:] != (images.shape[1], 3):
            raise ValueError(f"arr_0 must be square images (N, S, S, 3) uint8, not {images.shape}")
        labels = archive["arr_1"] if "arr_1" in keys else np.full(len(images), -1)
        return Dataset(where, [], labels, images), statistics

def image_batches(dataset, size, workers):
    """All images in order: (B, size, size, 3) uint8 through ADM's crop."""
    rows = np.split(np.arange(len(dataset)), range(BATCH, len(dataset), BATCH))
    return map(np.stack, dataset.batches(rows, size, workers))

def load_reference(dataset, statistics, size, extractor, metrics, workers):
    """Statistics, and what else the metrics need, measured of images cropped to `size`."""
    metrics = set(metrics) - {"is", "agreement"}
    if "mu" in statistics:                      # an ADM file: its images are for these two alone
        metrics &= {"precision", "recall"}
        if len(statistics["mu"]) != extractor["width"]:
            raise UserError(f"{dataset.name}: has {len(statistics['mu'])} features, not "
                            f"{extractor['width']}; see --features")
    if not len(dataset) or not metrics:
        return statistics
    return measure(image_batches(dataset, size, workers), len(dataset), extractor["extract"],
                   metrics, KEPT_REFERENCES, "reference") | statistics

def sample_size(samples, where):
    """Pixels a side of samples, which must be square and all of one size."""
    if isinstance(samples.source, np.ndarray):
        return samples.source.shape[1]
    with reading(f"{where}: holds what cannot be read as an image", "delete it"):
        sizes = {Image.open(path).size for path in samples.source}
    (width, height), *others = sizes
    if others or width != height:
        raise UserError(f"{where}: samples must be square and all of one size")
    return width

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("samples", help="an npz with arr_0 (N, S, S, 3) uint8, or a folder of square images")
    add("--ref", help="statistics (of ADM, pytorch-fid or --save_stats), images, or a dataset")
    add("--metrics", nargs="+", default=METRICS[:5], choices=METRICS, help="default: the first 5")
    add("--json", action="store_true", help="print a last line of JSON, too")
    add("--save_stats", metavar="FILE", help="write the reference's statistics to this npz")
    add("--features", default="inception", choices=["inception", "codec"], help="of which network")
    add("--codec", default="small", choices=CODECS, help="the codec of --features codec")
    add("--codec_dataset", help="the dataset it was fitted on; default: --ref, or shapes")
    args = parser.parse_args()
    _, _, device = join(args)
    if args.ref is None and args.metrics != ["is"]:
        raise UserError("--ref: only the Inception Score (--metrics is) does without")
    samples, _ = open_set(args.samples, args.data_dir)
    dataset, statistics = open_set(args.ref or args.samples, args.data_dir)
    if len(samples) < 2 or len(dataset) == 1:
        raise UserError(f"{args.samples}, {args.ref}: fewer than 2 images")

    size, values, reference = sample_size(samples, args.samples), {}, {}
    if args.metrics != ["agreement"] or args.save_stats:
        fitted_to = args.codec_dataset or (args.ref if dataset.classes else "shapes")
        path = codec_path(args.codec, fitted_to, args.data_dir)
        if args.features == "codec" and args.codec.startswith("small") and not path:
            raise UserError(f"{fitted_to}: no {args.codec} codec is fitted to it; --codec_dataset?")
        extractor = load_extractor(args.features, device, args.codec, path)
        size, width = extractor["size"] or size, extractor["width"]
        wanted = METRICS if args.save_stats else args.metrics
        reference = load_reference(dataset, statistics, size, extractor, wanted, args.workers)
        if min(len(samples), reference.get("count", width)) < width:
            print(f"warning: fewer than {width} images bias the distance upwards", file=sys.stderr)
        if args.save_stats:
            write_file(args.save_stats, lambda file: np.savez(file, **reference))
        batches = image_batches(samples, size, args.workers)
        values = evaluate(batches, len(samples), extractor, reference, args.metrics)
    labelled = samples.labels.min() >= 0 and samples.classes in ([], dataset.classes)
    if "agreement" in args.metrics and labelled and 1 < len(dataset.classes) <= len(dataset) / 50:
        values["agreement"], values["agreement_real"] = agreement(dataset, samples, args.workers)

    left_out = {name: NEEDS[name] for name in args.metrics if name not in values}
    for name, value in values.items():
        if name == "fid" and args.features == "codec":
            name = f"Frechet distance of {args.codec} codec features"
        print(f"{name:15} {value:12.5f}  ({len(samples)} samples, {args.ref})")
    for name, need in left_out.items():
        print(f"{name:15} left out: needs {need}")
    if args.json:
        counts = dict(num_samples=len(samples), num_references=int(reference.get("count", 0)))
        print(json.dumps(vars(args) | counts | dict(left_out=left_out) | values))
    if not values:
        raise UserError(f"{args.ref}: nothing to compute without {'; '.join(left_out.values())}")

if __name__ == "__main__":
    run(main)
