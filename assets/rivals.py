"""The sphere and its rivals: the same latents, transformer, optimizer and training time.

    python assets/rivals.py --dataset shapes --minutes 6 --seed 0

- distilled: this project's denoiser, trained for a given number of minutes and distilled; one pass
- sphere: the denoiser, trained for as long as both took together; 1 and 4 steps
- flow: rectified flow (arXiv 2209.03003), told the time; 1, 4 and 50 Euler steps
- meanflow: MeanFlow (arXiv 2505.13447), given two time inputs, guidance built into training; 1 step

Minutes are of CPU time. Prints a row per method: forward passes per image (NFE), class
agreement, and Frechet distances in the codec's and in a classifier's features.
"""
import copy
import sys
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fid
from encode import (
    SMALL_CODECS, Dataset, Machine, bounded, check_writable, find_dataset, open_cache,
    prepare_codec, run, to_uint8, write_file)
from model import (
    PRESETS, Denoiser, Distillation, ModelConfig, generate, guidance_scales, largest_angle,
    losses, noise_angle, sampling_angles, squared_error)
from sample import draw_noise
from train import (
    BLOCKS, DISTILL, FOLDER, distill_step, learning_rate, make_distill_optimizers,
    make_optimizers, take_step, update_average)

CPU = torch.device("cpu")


# ------------------------------------------------------------------------ a network told the time

class TimedDenoiser(Denoiser):
    """The same transformer, told one or two times in [0, 1] besides the class.

    speed: radians per unit of time of the fastest sine. MeanFlow, which differentiates by the
    time, takes a low one.
    """

    def __init__(self, config, count, speed):
        super().__init__(config)
        self.speed, width = speed, config.width
        layers = [nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
                  for _ in range(count)]
        self.time_embeddings = nn.ModuleList(layers)

    def forward(self, z, labels, *times):
        """z: (B, T, C); labels: (B,); times: (B,) each. Returns (B, T, C)."""
        condition = self.class_table(labels)
        frequency = 10_000.0 ** (-torch.arange(128) / 128)
        for embedding, t in zip(self.time_embeddings, times):
            phase = self.speed * t[:, None] * frequency
            condition = condition + embedding(torch.cat([phase.cos(), phase.sin()], dim=1))
        return self.transform(z, condition)


def logit_normal(count, mean):
    return torch.sigmoid(mean + torch.randn(count))


# ------------------------------------------------------------------------------ rectified flow

def flow_loss(net, z, labels):
    """|u(z_t, t) - (e - z)|^2 on the line z_t = (1 - t) z + t e."""
    t, e = logit_normal(len(z), 0.5), torch.randn_like(z)
    noisy = torch.lerp(z, e, t[:, None, None])
    return squared_error(net(noisy, labels, t), e - z)


@torch.no_grad()
def flow_sample(net, labels, noise, steps, cfg_scale):
    """Euler steps from t = 1 to 0, guided unless cfg_scale is 1."""
    x, none = noise, torch.full_like(labels, net.config.num_classes)
    for k in range(steps):
        t = torch.full((len(x),), 1 - k / steps)
        u = net(x, labels, t)
        if cfg_scale != 1:
            u_none = net(x, none, t)
            u = u_none + cfg_scale * (u - u_none)
        x = x - u / steps
    return x


# ------------------------------------------------------------------------------------ MeanFlow

def meanflow_loss(net, z, labels, cfg_scale):
    """The average velocity u from r to t satisfies u = v - (t - r) du/dt, v the guided velocity.

    A quarter of the batch has r < t. The error is divided by its own size, as in the paper.
    """
    times = torch.stack([logit_normal(len(z), -0.4), logit_normal(len(z), -0.4)]).sort(0).values
    r, t = times
    r = torch.where(torch.rand(len(z)) < 0.25, r, t)
    e = torch.randn_like(z)
    noisy = torch.lerp(z, e, t[:, None, None])
    none = torch.full_like(labels, net.config.num_classes)
    with torch.no_grad():
        v = cfg_scale * (e - z) + (1 - cfg_scale) * net(noisy, none, t, 0 * t)

    def velocity(x, r, t):
        return net(x, labels, t, t - r)

    # Forward-mode differentiation knows attention only as plain matrix products.
    with sdpa_kernel(SDPBackend.MATH):
        tangents = v, torch.zeros_like(r), torch.ones_like(t)
        u, du_dt = torch.func.jvp(velocity, (noisy, r, t), tangents)
    target = (v - (t - r)[:, None, None] * du_dt).detach()
    error = squared_error(u, target)
    return error / (error.detach() + 1e-3)


@torch.no_grad()
def meanflow_sample(net, labels, noise):
    """One step, from t = 1 to r = 0."""
    one = torch.ones(len(noise))
    return noise - net(noise, labels, one, one)


# ---------------------------------------------------------------------------------- the sphere

def sphere_loss(net, z, labels):
    """Reconstruction from a rotated point, its angle stratified over the batch as in train.py."""
    quantile = (torch.arange(len(z)) + torch.rand(len(z))) / len(z)
    angle = noise_angle(quantile, net.config.max_angle)
    return losses(net, z, labels, torch.randn_like(z), angle)["loss"]


def sphere_sample(net, labels, noise, cfg_scale):
    """noise: (steps, B, T, C)."""
    steps = len(noise)
    angles = sampling_angles(steps, net.config.max_angle)
    scales = guidance_scales(steps, cfg_scale, cfg_skip=1)
    return list(generate(net, labels, noise, angles, scales))[-1]


# ------------------------------------------------------------------------------------ training

def fit(net, loss, latents, labels, settings, minutes, seed):
    """Train a network for a number of minutes of CPU time. Returns its average, and the steps."""
    torch.manual_seed(seed)
    optimizers = make_optimizers(net, settings, torch.device("cpu"))
    ema = copy.deepcopy(net).requires_grad_(False)
    started, step, progress = time.process_time(), 0, 0.0
    while progress < 1:
        indexes = torch.randint(len(latents), (settings.batch_size,))
        dropped = torch.rand(settings.batch_size) < settings.label_dropout
        y = labels[indexes].masked_fill(dropped, net.config.num_classes)
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = loss(net, latents[indexes].float(), y).mean()
        value.backward()
        take_step(optimizers, learning_rate(int(1000 * progress), 1000, settings.lr, 60),
                  settings.grad_clip)
        update_average(ema, net, settings.ema_decay, step)
        step += 1
        progress = (time.process_time() - started) / (60 * minutes)
    return ema.eval(), step


def distill(denoiser, settings):
    """Distill a denoiser as train.py does. Returns the averaged generator."""
    nets = Distillation(copy.deepcopy(denoiser).requires_grad_(True))
    optimizers = make_distill_optimizers(nets, settings, CPU)
    ema = copy.deepcopy(denoiser)
    for step in range(settings.max_steps):
        distill_step(nets, ema, optimizers, step, slice(0, settings.batch_size), settings)
    return ema


# ------------------------------------------------------------------------------------ measuring

class Instruments:
    """What samples are measured with; made once."""

    def __init__(self, dataset, codec, workers):
        self.codec = codec
        self.classes = len(dataset.classes)
        self.judge = fid.train_judge(dataset, workers)
        self.extractors = (fid.codec_extractor(codec, CPU),
                           fid.classifier_extractor(self.judge, CPU))
        references = dataset, self.judge.unseen
        self.moments = []
        for extractor, reference in zip(self.extractors, references):
            batches = fid.image_batches(reference, extractor.size, workers)
            self.moments.append(fid.moments_of(batches, extractor))

    def measure(self, name, nfe, sample, out):
        """Print a row of the table; sample: a function from labels and noise to latents."""
        labels = torch.arange(1000) % self.classes
        images = []
        for part in torch.arange(1000).split(100):
            noise = draw_noise(0, part.tolist(), self.codec.latent_shape, steps=4)
            with torch.no_grad():
                images.append(to_uint8(self.codec.decode(sample(labels[part], noise))))
        images = np.concatenate(images)
        samples = Dataset(name, [], labels.numpy(), images)
        found = fid.agreement(self.judge, samples, workers=1)
        distances = []
        for extractor, moments in zip(self.extractors, self.moments):
            batches = fid.image_batches(samples, extractor.size, workers=1)
            distances.append(fid.frechet_distance(*fid.moments_of(batches, extractor), *moments))
        print(f"| {name} | {nfe} | {found:.3f} | {distances[0]:.3f} | {distances[1]:.1f} |",
              flush=True)
        if out:
            path = Path(out) / f"{name.replace(' ', '_').replace(',', '')}.npz"
            write_file(path, lambda file: np.savez(file, arr_0=images, arr_1=labels.numpy()))


# ----------------------------------------------------------------------------------- the script

def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset", default="shapes")
    add("--codec", default="small", choices=SMALL_CODECS)
    add("--minutes", type=bounded(float, 0.01), default=6.0,
        help="CPU minutes of training before distillation")
    add("--seed", type=bounded(int, 0), default=0)
    add("--out", help="folder for the samples of each method, as npz")
    args = parser.parse_args()
    if args.out:
        check_writable(args.out, "--out")

    settings = replace(BLOCKS.get(args.dataset, FOLDER), dataset=args.dataset, seed=args.seed)
    machine = Machine()
    codec = prepare_codec(args.codec, args.dataset, machine)
    cache = open_cache(args.dataset, codec, machine)
    latents = torch.from_numpy(np.concatenate([cache.chunk(k) for k in cache.chunks()]))
    labels = torch.from_numpy(cache.labels)
    tokens, channels = codec.latent_shape
    config = ModelConfig(tokens, channels, len(cache.classes),
                         max_angle=largest_angle(tokens, channels), **PRESETS[settings.preset])
    instruments = Instruments(find_dataset(args.dataset), codec, machine.workers)
    print("| method | NFE | agreement | codec distance | classifier distance |")
    print("|---|---|---|---|---|")

    def same(noise):
        """The noise of all steps, by the run's own choice."""
        return noise[:1].expand_as(noise) if settings.same_noise else noise

    def trained(net, loss, minutes):
        return fit(net, loss, latents, labels, settings, minutes, args.seed)

    # The denoiser, distilled; the others train for as long as both took.
    started = time.process_time()
    torch.manual_seed(args.seed)
    denoiser, _ = trained(Denoiser(config), sphere_loss, args.minutes)
    one_pass = distill(denoiser, replace(DISTILL, seed=args.seed))
    minutes = (time.process_time() - started) / 60
    instruments.measure("distilled, 1 step", 1, lambda y, e: sphere_sample(one_pass, y, e[:1], 1),
                        args.out)

    torch.manual_seed(args.seed)
    net, steps = trained(Denoiser(config), sphere_loss, minutes)
    print(f"| ({minutes:.1f} CPU minutes each; sphere {steps} steps) | | | | |")
    for cfg in (1, 1.5, 2):
        nfe = 1 if cfg == 1 else 2
        instruments.measure(f"sphere, 1 step, guidance {cfg}", nfe,
                            lambda y, e: sphere_sample(net, y, e[:1], cfg), args.out)
    for cfg in (1, 1.5, 2, 3):
        nfe = 4 if cfg == 1 else 7
        instruments.measure(f"sphere, 4 steps, guidance {cfg}", nfe,
                            lambda y, e: sphere_sample(net, y, same(e), cfg), args.out)

    torch.manual_seed(args.seed)
    net, steps = trained(TimedDenoiser(config, 1, speed=1000), flow_loss, minutes)
    print(f"| (flow {steps} steps) | | | | |")
    for count, cfgs in ((1, (1.5, 3)), (4, (1.5, 2, 3)), (50, (1, 1.5, 2))):
        for cfg in cfgs:
            nfe = count if cfg == 1 else 2 * count
            instruments.measure(f"flow, {count} steps, guidance {cfg}", nfe,
                                lambda y, e: flow_sample(net, y, e[0], count, cfg), args.out)

    torch.manual_seed(args.seed)
    net, steps = trained(TimedDenoiser(config, 2, speed=10),
                         lambda net, z, y: meanflow_loss(net, z, y, cfg_scale=2), minutes)
    print(f"| (meanflow {steps} steps) | | | | |")
    instruments.measure("meanflow, 1 step, guidance 2", 1,
                        lambda y, e: meanflow_sample(net, y, e[0]), args.out)


if __name__ == "__main__":
    run(main)
