"""The idea: image latents and noise lie on the same hypersphere; a transformer learns to
jump from a noisy point back to the image.

A frozen autoencoder (encode.py) turns an image into a latent z: T tokens of C channels,
d = T * C numbers. Scaled to rms 1, z lies on the sphere of radius sqrt(d), and so does
Gaussian noise e. Both are equally long and, d being large, nearly orthogonal, so adding
noise is a rotation of z towards e. With f(z) = z / rms(z), the denoiser D sees the rotated
point v and the class y, but not the angle a, and predicts z:

    v = f(cos(a) f(z) + sin(a) f(e))        `rotate`, by an angle from `noise_angle`
    L = |D(v, y) - z|^2                     `losses`: reconstruction of the latent,
      + w |D(v, y) - sg D(v', y)|^2         and consistency with a point v' closer to z

Here |x|^2 is the mean over all d numbers and sg is stop-gradient. Sampling starts from pure
noise and takes a few steps, each from a point less noisy than the one before (`generate`);
the image is decoded once, at the end:

    x = D(f(e), y);   v = rotate(x, e', a_1);   x = D(v, y);   v = rotate(x, e'', a_2);   ...

Source: "Efficient Image Synthesis with Sphere Latent Encoder", arXiv 2605.15592; the
geometry is that of Sphere Encoder, arXiv 2602.15030. In comments on shapes: B batch,
T tokens, C latent channels, D width, H heads.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------- the sphere

def to_sphere(z):
    """Project latents onto the hypersphere: f(z) = z / rms(z).

    z: (B, T, C), any float dtype. Returns (B, T, C) float32 of length sqrt(T * C).
    Source: arXiv 2602.15030, the RMS-norm projection f.
    """
    z = z.float()
    return z * z.pow(2).mean((1, 2), keepdim=True).clamp_min(1e-12).rsqrt()


def rotate(z, noise, angle, sphere=True):
    """Add noise to latents: v = f(cos(a) f(z) + sin(a) f(e)).

    If e is independent of z, the angle between z and v is a, to within some 1 / sqrt(T C).
    If z was predicted from e (one noise for all sampling steps), it is smaller. Making e
    orthogonal to z first would correct that, and spoil photographs (assets/results.md).

    z, noise: (B, T, C). angle: (B,) on the same device, or a number, in radians.
    sphere=False, the paper's ablation, returns z + tan(a) e instead. Returns (B, T, C)
    float32.
    Source: arXiv 2602.15030; paper, "projected noisy latents".
    """
    if not torch.is_tensor(angle):
        # Filled on the device, so that the program need not wait for a copy.
        angle = torch.full((1,), angle, dtype=torch.float32, device=z.device)
    angle = angle.float().view(-1, 1, 1)
    if not sphere:
        return z.float() + angle.tan() * noise.float()
    return to_sphere(angle.cos() * to_sphere(z) + angle.sin() * to_sphere(noise))


def noise_angle(u, max_angle, mean=0.0, std=1.0):
    """Turn uniform numbers into noise angles: tan(a) = r tan(max_angle), r logit-normal.

    u: (B,) in [0, 1). max_angle: degrees. mean, std: of the normal distribution whose
    sigmoid is r. Returns (B,) float32, radians.
    Source: paper, the noise distribution (its mean and spread are unpublished).
    """
    uniform = (2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6)
    normal = math.sqrt(2) * torch.erfinv(uniform)
    ratio = torch.sigmoid(mean + std * normal)
    return torch.atan(ratio * math.tan(math.radians(max_angle)))


def largest_angle(tokens, channels):
    """The default for the largest noise angle of training, in degrees.

    v holds a signal of length cos(a) sqrt(T C), and noise of size sin(a) in each direction:
    a signal-to-noise ratio of sqrt(T C) / tan(a). The angle where it is 4.8 suits latents of
    all sizes that were tried; no single angle does (assets/results.md).
    """
    return math.degrees(math.atan(math.sqrt(tokens * channels) / 4.8))


# ----------------------------------------------------------------------- the denoiser

@dataclass(frozen=True)
class ModelConfig:
    """What the weights depend on: the latent's shape, the network, its training noise."""

    tokens: int = 256           # T, a square grid
    channels: int = 768         # C
    num_classes: int = 1000     # one more row of the class table means "no class"
    width: int = 768            # D
    depth: int = 12
    heads: int = 12             # H
    sphere: bool = True         # False: the ablation of `rotate`
    max_angle: float = 89.4     # degrees, as `largest_angle` has it for this latent


# The patch size is 1: a token of the latent is a token of the transformer.
PRESETS = {
    "tiny": dict(width=128, depth=6, heads=4),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16),
}


class Attention(nn.Module):
    """Self-attention over all tokens; RMS-normalised queries and keys keep bf16 stable."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        q = self.q_norm(q.float()).to(v)                        # (B, T, H, D / H)
        k = self.k_norm(k.float()).to(v)

        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v)             # (B, H, T, D / H)
        return self.proj(x.transpose(1, 2).flatten(2))          # (B, T, D)


class SwiGLU(nn.Module):
    """The MLP: (silu(x W1) * (x W2)) W3.

    Its hidden width is 8/3 D, so that three matrices cost as much as the usual two of 4 D.
    """

    def __init__(self, width):
        super().__init__()
        hidden = 8 * round(width / 3)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """A transformer block whose shifts, scales and gates are set by the class (adaLN-zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.adaln = nn.Linear(width, 6 * width)

    def forward(self, x, y):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(y).chunk(6, dim=2)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x


class Denoiser(nn.Module):
    """A SiT-style transformer from a noisy latent and its class to the clean latent.

    It is not told the noise angle: the released XL/1 weights (401 tensors) hold no
    embedding of it. Source: paper; SiT, arXiv 2401.08740, for the block.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Linear(config.channels, width)
        self.register_buffer("position", sincos_2d(config.tokens, width))
        self.class_table = nn.Embedding(config.num_classes + 1, width)  # last row: no class
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.adaln = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.channels)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # Std 1, not DiT's 0.02: the gradients of the adaLN layers grow with these vectors.
        nn.init.normal_(self.class_table.weight)

        # adaLN-zero: every block begins as the identity, and the output as 0.
        for block in self.blocks:
            nn.init.zeros_(block.adaln.weight)
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, z, labels):
        """Predict the clean latent.

        z: (B, T, C) noisy latents from `rotate`. labels: (B,) int64, num_classes for "no
        class". Returns (B, T, C).
        """
        return self.transform(z, self.class_table(labels))

    def transform(self, z, condition):
        """Predict from z (B, T, C) and what is known of it, (B, D): here only the class."""
        y = F.silu(condition).unsqueeze(1)                      # (B, 1, D)
        x = self.embed(z) + self.position                       # (B, T, D)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.adaln(y).chunk(2, dim=2)
        return self.out(self.norm(x) * (1 + scale) + shift)     # (B, T, C)


def sincos_2d(tokens, width):
    """Fixed positions on a square grid, row by row: sines and cosines, (1, T, D)."""
    side = math.isqrt(tokens)
    frequency = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    phase = torch.arange(side)[:, None] * frequency             # (side, D / 4)
    wave = torch.cat([phase.sin(), phase.cos()], dim=1)         # (side, D / 2)
    column = wave.repeat(side, 1)                               # (T, D / 2)
    row = wave.repeat_interleave(side, dim=0)                   # (T, D / 2)
    return torch.cat([column, row], dim=1)[None]


def flops(config):
    """FLOPs (two per multiply-add) of the matrix products of one image's forward pass."""
    T, D, hidden = config.tokens, config.width, 8 * round(config.width / 3)
    attention = 2 * T * 4 * D * D + 4 * T * T * D
    mlp = 2 * T * 3 * D * hidden
    adaln = 2 * 6 * D * D
    ends = 2 * T * 2 * config.channels * D + 2 * 2 * D * D
    return config.depth * (attention + mlp + adaln) + ends


# ------------------------------------------------------------------------- the losses

def squared_error(a, b):
    """The mean squared difference of (B, T, C) and (B, T, C): (B,) float32."""
    return (a.float() - b.float()).pow(2).mean((1, 2))


def losses(model, z, labels, noise, angle, ratio=None, consistency_weight=0.0):
    """Reconstruction of the latent, and consistency with a less noisy point.

    model: a Denoiser, or DDP around one. z: (B, T, C) clean latents; the RAE's are not
    quite on the sphere, and keep their length as targets. labels: (B,) int64. noise:
    (B, T, C) Gaussian. angle: (B,) radians, of the noisy point v.

    The point v' has the same noise, but less of it: tan(a') = ratio * tan(a), with ratio
    (B,) in [0, 0.5). It is needed only if consistency_weight is not 0.

    Returns a dict of (B,) float32: "loss", the weighted sum, and its terms
    "reconstruction" and, if it has a weight, "consistency". train.py logs every entry.
    Source: paper, the two losses; arXiv 2602.15030 for v'.
    """
    bare = getattr(model, "module", model)      # DDP expects one forward pass per backward
    sphere = bare.config.sphere

    x = model(rotate(z, noise, angle, sphere), labels)
    reconstruction = squared_error(x, z)
    if consistency_weight == 0:
        return dict(loss=reconstruction, reconstruction=reconstruction)

    with torch.no_grad():
        smaller = torch.atan(ratio * angle.tan())
        target = bare(rotate(z, noise, smaller, sphere), labels)
    consistency = squared_error(x, target)
    loss = reconstruction + consistency_weight * consistency
    return dict(loss=loss, reconstruction=reconstruction, consistency=consistency)


# --------------------------------------------------------------------------- sampling

def sampling_angles(steps, max_angle):
    """The noise angle before each step: tan(a_k) = (1 - k / n)^1.5 tan(max_angle).

    max_angle: degrees. Returns n falling angles in radians. (The first step starts from
    pure noise, which is 90 degrees from any image, so on the sphere a_0 makes no difference.)
    """
    limit = math.tan(math.radians(max_angle))
    return [math.atan((1 - k / steps) ** 1.5 * limit) for k in range(steps)]


def guidance_scales(steps, cfg_scale, cfg_skip=0):
    """The guidance of each step: 1 (none) in the first cfg_skip steps, then cfg_scale.

    The last two steps are always guided, however large cfg_skip. Guidance hurts most at
    the first step, whose prediction is only a rough guess.
    """
    skipped = max(0, min(cfg_skip, steps - 2))
    return [1.0] * skipped + [cfg_scale] * (steps - skipped)


def guided(model, v, labels, scale):
    """Classifier-free guidance: x_none + s (x_y - x_none), (B, T, C) float32.

    A scale of 1 saves the pass without a class. Source: arXiv 2207.12598.
    """
    if scale == 1:
        return model(v, labels).float()
    none = torch.full_like(labels, model.config.num_classes)
    both = model(torch.cat([v, v]), torch.cat([labels, none])).float()
    x, x_none = both.chunk(2)
    return x_none + scale * (x - x_none)


@torch.no_grad()
def generate(model, labels, noise, angles, scales, start=None):
    """Generate latents: predict, rotate part of the way back to noise, predict again.

    labels: (B,) int64. noise: (steps, B, T, C) Gaussian, either new for each step or the
    same for all. angles: one per step, radians (`sampling_angles`). scales: guidance, one
    per step (`guidance_scales`). start: (B, T, C) latents to edit, instead of starting
    from pure noise (SDEdit, arXiv 2108.01073). Yields each step's prediction, (B, T, C)
    float32. Source: paper, few-step sampling.
    """
    # Nothing is known at first: rotated from 0, v is pure noise.
    x = torch.zeros_like(noise[0]) if start is None else start
    for e, angle, scale in zip(noise, angles, scales):
        v = rotate(x, e, angle, model.config.sphere)
        x = guided(model, v, labels, scale)
        yield x


# ----------------------------------------------------------------------- distillation

class Distillation(nn.Module):
    """A one-step generator, and the two denoisers that train it.

    All three start as the trained denoiser. `real`, frozen, knows the data; `fake` learns
    to denoise what the generator draws. Where the two disagree about a noisy image, `real`
    points towards the data.
    """

    def __init__(self, denoiser):
        super().__init__()
        self.generator = denoiser
        self.fake = copy.deepcopy(denoiser)
        self.real = copy.deepcopy(denoiser).requires_grad_(False)


def imitation(generator, noise, labels, target):
    """Learn to draw in one pass what the sampler draws in several: |G(f(e), y) - x|^2.

    The sampler must use one noise for all its steps, so that its image x is a function of
    that noise. Imitation precedes distribution matching because it is a far better start
    than the denoiser, which makes only a rough guess from pure noise.

    noise: (B, T, C) that the sampler started from. target: (B, T, C) what it drew. Returns
    a dict of (B,) float32, "loss".
    """
    return dict(loss=squared_error(generator(to_sphere(noise), labels), target))


def distribution_matching(nets, noise, labels, new_noise, angle, cfg_scale=1.0):
    """Move each generated image x along the difference between what `real` and `fake` see.

    x = G(f(e), y),   v = rotate(x, e', a),   g = (F(v, y) - R(v, y)) / mean|x - R(v, y)|
    L = |x - sg(x - g)|^2 / 2 + |F(v, y) - sg(x)|^2

    nets: a Distillation: G, F and R are its generator, fake and real. noise, new_noise:
    (B, T, C), e and e'. angle: (B,) radians. cfg_scale: guidance of R. Returns a dict of
    (B,) float32: "loss", the sum, and its terms "matching" (the generator's) and
    "denoising" (fake's). Source: arXiv 2311.18828 and 2405.14867, there without the sphere.
    """
    x = nets.generator(to_sphere(noise), labels).float()
    v = rotate(x.detach(), new_noise, angle)
    fake = nets.fake(v, labels).float()
    with torch.no_grad():
        real = guided(nets.real, v, labels, cfg_scale)

    gradient = (fake - real) / (x - real).abs().mean((1, 2), keepdim=True)
    matching = squared_error(x, (x - gradient).detach()) / 2
    denoising = squared_error(fake, x.detach())
    return dict(loss=matching + denoising, matching=matching, denoising=denoising)
