"""Draw samples below real images: a column per class, a row per method, the first image of each.

    python assets/panel.py --dataset data/cifar10/test --ckpt out/cifar10-train panel.png \
        "four steps=four.npz" "one pass=one.npz"

The first two rows are real images and the codec's reconstructions of them. The others are from
files that sample.py --out wrote for the same classes.
"""
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from encode import UserError, find_dataset, on_failure, run, to_float, to_uint8
from sample import PICTURES, draw_grid, load_checkpoint, load_checkpoint_codec, write_picture


def first_of_each(labels, num_classes, path):
    """The index of the first image of each class. path: where they are from."""
    missing = set(range(num_classes)) - set(labels.tolist())
    if missing:
        raise UserError(f"{path}: has no image of class {min(missing)}; take more images")
    return [int(np.flatnonzero(labels == k)[0]) for k in range(num_classes)]


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("out", help="picture to write")
    add("--dataset", required=True, help="folder of real images")
    add("--ckpt", required=True, help="checkpoint whose codec reconstructs them")
    add("rows", nargs="*", metavar="TITLE=FILE", help="npz of samples with labels")
    args = parser.parse_args()
    if Path(args.out).suffix.lower() not in PICTURES:
        raise UserError(f"{args.out}: must end in {', '.join(PICTURES)}")

    dataset = find_dataset(args.dataset)
    classes = dataset.classes
    codec = load_checkpoint_codec(load_checkpoint(args.ckpt))
    chosen = first_of_each(dataset.labels, len(classes), args.dataset)
    real = dataset.load_all(chosen, codec.image_size, workers=2)
    with torch.no_grad():
        reconstructed = to_uint8(codec.decode(codec.encode(to_float(real))))

    rows = [("real", real), ("codec", reconstructed)]
    for row in args.rows:
        title, equals, path = row.partition("=")
        if not equals:
            raise UserError(f"{row}: must be TITLE=FILE")
        remedy = "sample.py --out writes such an npz"
        with on_failure(f"{path}: missing or damaged", remedy), np.load(path) as samples:
            images, labels = samples["arr_0"], samples["arr_1"]
        rows.append((title, images[first_of_each(labels, len(classes), path)]))

    grid = [[(image, f"{name}\n{title}") for image, name in zip(images, classes)]
            for title, images in rows]
    write_picture(args.out, draw_grid(grid))


if __name__ == "__main__":
    run(main)
