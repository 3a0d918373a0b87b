"""How far are samples from a dataset? The Frechet distance between Gaussians fitted to the features of two sets of images.

    python fid.py samples.npz --ref shapes                       # samples: an npz as sample.py writes it, or a folder of images
    python fid.py samples/ --ref data/flowers12/test --codec_dataset data/flowers12/train

The features are the frozen codec's own latents, averaged over their tokens: nothing to download, and good for comparing runs on the
same dataset. They are not Inception's, so the numbers are not the FIDs that papers print.
"""
import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from encode import SMALL_CODECS, SUFFIXES, codec_path, find_dataset, load_codec, pick_device, read_images, run, to_float


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet (Wasserstein-2) distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).

    mu1, mu2: (F,); sigma1, sigma2: (F, F) covariances; all taken to float64. With S1 = L L^T, (S1 S2)^1/2 has the trace of
    (L^T S2 L)^1/2, which is symmetric, so that rank-deficient sets do no harm. Returns a float, not clipped at 0.
    Raises ValueError on shapes that differ or numbers that are not finite. Source: arXiv 1706.08500, section 2.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise ValueError(f"means and covariances don't fit: {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("means or covariances hold numbers that are not finite")
    w, v = np.linalg.eigh(sigma1)
    root = v * np.sqrt(w.clip(0))                                                                  # L, (F, F)
    trace = np.sqrt(np.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def moments(batches):
    """Mean (F,) and covariance (F, F), ddof 1, of feature batches (B, F), summed in float64 as they stream by; and their number."""
    n, total, outer = 0, 0.0, 0.0
    for features in batches:
        features = features.double().cpu().numpy()
        n, total, outer = n + len(features), total + features.sum(0), outer + features.T @ features
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {n}")
    mean = total / n
    return mean, (outer - n * np.outer(mean, mean)) / (n - 1), n


def sample_images(path, size, batch_size, workers):
    """Yield a samples file's or folder's images as (B, size, size, 3) uint8."""
    path = Path(path)
    if path.suffix == ".npz":
        try:
            with np.load(path) as archive:
                keys, images = archive.files, archive["arr_0"] if "arr_0" in archive.files else None
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; make it: python sample.py --num_images 1000 --out {path}") from None
        except Exception as error:                                 # zipfile and numpy raise many kinds on a broken file
            raise ValueError(f"{path}: is not a whole npz ({error}); make it again: python sample.py --out {path}") from error
        if images is None:
            raise ValueError(f"{path}: has no arr_0 (it holds {', '.join(keys) or 'nothing'})")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"{path}: arr_0 must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
        if images.shape[1:3] != (size, size):
            raise ValueError(f"{path}: images are {images.shape[2]}x{images.shape[1]}, the codec takes {size}x{size}")
        yield from (images[start:start + batch_size] for start in range(0, len(images), batch_size))
    elif path.is_dir():
        paths = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
        if not paths:
            raise ValueError(f"{path}: holds no images ({' '.join(SUFFIXES)})")
        found = dict(paths=paths, labels=np.zeros(len(paths)))
        yield from (images for _, images, _ in read_images(found, size, batch_size, workers))
    else:
        raise FileNotFoundError(f"{path}: no such npz or folder of samples; make one: python sample.py --num_images 1000 --out samples.npz")


def codec_features(codec, images, device, name):
    """Mean-pooled latents (B, C) of batches of uint8 images."""
    with torch.no_grad():
        for batch in tqdm(images, desc=name, unit="batch"):
            yield codec.encode(to_float(batch, device)).mean(1)


def main():
    parser = argparse.ArgumentParser(description="Frechet distance between samples and a dataset in the frozen codec's features.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("samples", help="npz with arr_0 (N, H, W, 3) uint8, or a folder of images")
    parser.add_argument("--ref", default="shapes", help="the dataset to compare with: shapes, or a folder with one sub-folder per class")
    parser.add_argument("--codec", default="small", choices=SMALL_CODECS, help="whose features")
    parser.add_argument("--codec_dataset", help="the dataset the codec was fitted on; default: --ref")
    parser.add_argument("--data_dir", default="data", help="folder that holds datasets and codecs")
    parser.add_argument("--batch_size", type=int, default=256, help="images at a time")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {args.batch_size}")
    device = pick_device(args.device)
    found = find_dataset(args.ref, args.data_dir)
    home = find_dataset(args.codec_dataset, args.data_dir) if args.codec_dataset else found
    codec = load_codec(args.codec, codec_path(args.codec, home["name"], args.data_dir), device)
    features = partial(codec_features, codec, device=device)
    mu1, sigma1, n = moments(features(sample_images(args.samples, codec.image_size, args.batch_size, args.workers), name="samples"))
    reference = (images for _, images, _ in read_images(found, codec.image_size, args.batch_size, args.workers))
    mu2, sigma2, m = moments(features(reference, name=args.ref))
    print(f"Frechet distance in {args.codec} codec features ({len(mu1)} numbers): {frechet_distance(mu1, sigma1, mu2, sigma2):.5f}  "
          f"({n} samples, {m} references)")


if __name__ == "__main__":
    run(main)
