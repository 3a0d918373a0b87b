"""The idea: noise and images are points of one hypersphere; a transformer learns to walk back from
one to the other.

A frozen autoencoder (encode.py) turns an image into a latent z: T tokens of C channels, d = T * C
numbers. Scaled to rms 1, z lies on the sphere of radius sqrt(d), and so does Gaussian noise e. Both
are equally long and, d being large, nearly orthogonal: adding noise is a rotation of z towards e.
The denoiser D sees the rotated point and the class y, never the angle a, and predicts z:

    v = cos(a) z + sin(a) e                 `rotate`, its angle drawn by `noise_angle`
    L = |D(v, y) - z|^2                     `losses`: reconstruction of the latent,
      + w |D(v, y) - sg D(v', y)|^2         and consistency with a point v' nearer to z

Sampling starts from pure noise and takes a few steps, each from a point less noisy than the one
before (`generate`); the image is decoded once, at the end:

    v = e;  x = D(v, y);  v = rotate(x, e', a_1);  x = D(v, y);  v = rotate(x, e'', a_2);  ...

Source: "Efficient Image Synthesis with Sphere Latent Encoder", arXiv 2605.15592; the geometry is
that of Sphere Encoder, arXiv 2602.15030. Shapes: B batch, T tokens, C latent channels, D width,
H heads.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------ the sphere

def to_sphere(z):
    """Project latents onto the hypersphere: f(z) = z / rms(z).

    z: (B, T, C), any float dtype. Returns (B, T, C) float32 of length sqrt(T * C).
    Source: arXiv 2602.15030, the RMS-norm projection f.
    """
    z = z.float()
    return z * z.pow(2).mean((1, 2), keepdim=True).clamp_min(1e-12).rsqrt()

def rotate(z, noise, angle, sphere=True):
    """Walk from z towards noise along their great circle: cos(a) z + sin(a) e.

    z, noise: (B, T, C), projected first; e is the part of noise orthogonal to z. angle: (B,) or a
    number, radians. Returns (B, T, C) float32 on the sphere, exactly `angle` away from z. With e
    orthogonal to z this equals Sphere Encoder's f(z + tan(a) e); sphere=False, the paper's
    ablation, is that sum without f. Source: arXiv 2602.15030; paper, "projected noisy latents".
    """
    angle = torch.as_tensor(angle, dtype=torch.float32, device=z.device).view(-1, 1, 1)
    if not sphere:
        return z.float() + angle.tan() * noise.float()
    z, e = to_sphere(z), to_sphere(noise)
    e = to_sphere(e - z * (z * e).mean((1, 2), keepdim=True))
    return angle.cos() * z + angle.sin() * e

def noise_angle(u, max_angle, mean=0.0, std=1.0):
    """Turn uniform numbers into noise angles: tan(a) = r tan(max_angle), r logit-normal.

    u: (B,) in [0, 1); spread evenly over the batch, the loss varies less. max_angle: degrees.
    mean, std: of the normal whose sigmoid is r. Returns (B,) float32 radians.
    Source: paper, the noise distribution (its mean and spread are unpublished).
    """
    normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
    return torch.atan(torch.sigmoid(mean + std * normal) * math.tan(math.radians(max_angle)))

def largest_angle(tokens, channels):
    """The largest noise angle of training, in degrees: it leaves a signal-to-noise ratio of 4.8.

    At angle a the ratio is sqrt(T * C) / tan(a). One ratio was best for latents of every size
    (assets/results.md); no single angle was.
    """
    return math.degrees(math.atan(math.sqrt(tokens * channels) / 4.8))

# ---------------------------------------------------------------------------------- the denoiser

@dataclass(frozen=True)
class ModelConfig:
    """What the weights depend on: the latent's shape, the network's size, its training noise."""
    tokens: int = 256               # T, a square grid
    channels: int = 768             # C
    num_classes: int = 1000         # one more row of the class table means "no class"
    width: int = 768                # D
    depth: int = 12
    heads: int = 12
    sphere: bool = True             # False: the ablation
    max_angle: float = 89.4         # degrees, `largest_angle` of the latent

PRESETS = {    # patch size 1 throughout: a token of the latent is a token of the transformer
    "tiny": dict(width=128, depth=6, heads=4),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16),
}

class Attention(nn.Module):
    """Self-attention over all tokens; queries and keys are RMS-normalised to keep bf16 stable."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)       # 3 x (B, T, H, D/H)
        q, k = self.q_norm(q.float()).to(v), self.k_norm(k.float()).to(v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                        # 3 x (B, H, T, D/H)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))                          # (B, T, D)

class SwiGLU(nn.Module):
    """The MLP: (silu(x W1) * (x W2)) W3, 8/3 D wide, so as costly as the usual two of 4 D."""

    def __init__(self, width):
        super().__init__()
        hidden = 8 * round(width / 3)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))

def modulate(x, shift, scale):
    """x * (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)

class Block(nn.Module):
    """A transformer block whose shifts, scales and gates come from the class alone (adaLN-zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.adaln = nn.Linear(width, 6 * width)

    def forward(self, x, y):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(y).chunk(6, dim=2)    # (B, 1, D)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x

class Denoiser(nn.Module):
    """A SiT-style transformer from a noisy latent and its class to the clean latent.

    It is not told the noise angle: the released XL/1 weights (401 tensors) have no room for it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Linear(config.channels, width)
        self.register_buffer("position", sincos_2d(config.tokens, width))
        self.classes = nn.Embedding(config.num_classes + 1, width)              # last row: no class
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
        nn.init.normal_(self.classes.weight)    # std 1, not DiT's 0.02: the class matters at once
        for block in self.blocks:
            nn.init.zeros_(block.adaln.weight)  # adaLN-zero: every block begins as the identity
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, z, labels):
        """Predict the clean latent.

        z: (B, T, C) on the sphere. labels: (B,) int64, num_classes for none. Returns (B, T, C).
        """
        y = F.silu(self.classes(labels)).unsqueeze(1)                           # (B, 1, D)
        x = self.embed(z) + self.position                                       # (B, T, D)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.adaln(y).chunk(2, dim=2)                            # 2 x (B, 1, D)
        return self.out(modulate(self.norm(x), shift, scale))                   # (B, T, C)

def sincos_2d(tokens, width):
    """Fixed positions of a square grid, row by row: (1, T, D), sin and cos of column and row."""
    side = math.isqrt(tokens)
    frequency = 10000.0 ** (-torch.arange(width // 4) / (width // 4))           # (D/4,)
    phase = torch.arange(side)[:, None] * frequency                             # (side, D/4)
    wave = torch.cat([phase.sin(), phase.cos()], dim=1)                         # (side, D/2)
    column, row = wave.repeat(side, 1), wave.repeat_interleave(side, dim=0)     # 2 x (T, D/2)
    return torch.cat([column, row], dim=1)[None]

def flops(config):
    """FLOPs (two a multiply-add) of the matrix products of one image's forward pass."""
    T, D, hidden = config.tokens, config.width, 8 * round(config.width / 3)
    block = 2 * T * (4 * D * D + 3 * D * hidden) + 4 * T * T * D + 2 * 6 * D * D
    return config.depth * block + 2 * T * 2 * config.channels * D + 2 * 2 * D * D

# ------------------------------------------------------------------------------------ the losses

def squared_error(a, b):
    """(B, T, C) twice -> (B,), in float32."""
    return (a.float() - b.float()).pow(2).mean((1, 2))

def losses(model, z, labels, noise, angle, share, consistency_weight=0.0):
    """Reconstruction of the latent, and consistency with a less noisy point of the same arc.

    model: a Denoiser, or DDP around one. z, noise: (B, T, C) clean latents and Gaussian noise;
    labels: (B,). angle: (B,) radians, of the noisy ("strong") points. share: (B,) in [0, 1); the
    "weak" point lies at tan(a') = share / 2 * tan(a). A weight of 0 saves the weak point's pass.
    Returns total, reconstruction and consistency, each (B,) float32.
    Source: paper, the two losses; arXiv 2602.15030 for the weak point.
    """
    bare = getattr(model, "module", model)      # without DDP, for the pass without gradients
    sphere = bare.config.sphere
    out = model(rotate(z, noise, angle, sphere), labels)
    reconstruction = squared_error(out, z)
    if consistency_weight == 0:
        return reconstruction, reconstruction, torch.zeros_like(reconstruction)
    with torch.no_grad():
        weak = torch.atan(0.5 * share * angle.tan())
        target = bare(rotate(z, noise, weak, sphere), labels)
    consistency = squared_error(out, target)
    return reconstruction + consistency_weight * consistency, reconstruction, consistency

# ---------------------------------------------------------------------------------- distillation

class Distillation(nn.Module):
    """A generator of one pass, and two denoisers that judge its images.

    All three begin as the trained denoiser. `real`, frozen, knows the data; `fake` learns what the
    generator draws. Where they disagree about a noisy image, `real` says what is missing in it.
    """

    def __init__(self, denoiser):
        super().__init__()
        self.generator = denoiser
        self.fake = copy.deepcopy(denoiser)
        self.real = copy.deepcopy(denoiser).requires_grad_(False)

    def forward(self, noise, labels, new_noise, angle, cfg_scale):
        """x = G(noise, y), and what fake and real see in x turned towards new_noise by angle."""
        x = self.generator(to_sphere(noise), labels).float()                    # (B, T, C)
        v = rotate(x.detach(), new_noise, angle)
        with torch.no_grad():
            real = guided(self.real, v, labels, cfg_scale)
        return x, self.fake(v, labels).float(), real

def distribution_matching(model, noise, labels, new_noise, angle, share, cfg_scale=1.0):
    """Move the generator's images x from where fake takes them to be to where real does.

    g = (F(v, y) - R(v, y)) / mean|x - R(v, y)|;   L = |x - sg(x - g)|^2 / 2 + |F(v, y) - sg(x)|^2

    model: a Distillation, or DDP around one. cfg_scale: the guidance of real. share is not used.
    Returns total, denoising (fake's loss) and matching, each (B,) float32. Source: arXiv
    2311.18828 and 2405.14867, there without the sphere.
    """
    x, fake, real = model(noise, labels, new_noise, angle, cfg_scale)
    gradient = (fake - real) / (x - real).abs().mean((1, 2), keepdim=True)
    matching = squared_error(x, (x - gradient).detach()) / 2
    denoising = squared_error(fake, x.detach())
    return matching + denoising, denoising, matching

# -------------------------------------------------------------------------------------- sampling

def guided(model, v, labels, cfg_scale):
    """Classifier-free guidance, x_null + s (x - x_null): (B, T, C) float32. arXiv 2207.12598."""
    if cfg_scale == 1:
        return model(v, labels).float()
    null = torch.full_like(labels, model.config.num_classes)
    x, x_null = model(torch.cat([v, v]), torch.cat([labels, null])).float().chunk(2)
    return x_null + cfg_scale * (x - x_null)

@torch.no_grad()
def generate(model, labels, steps=4, cfg_scale=1.0, cfg_skip=0, same_noise=False, noise=None,
             generator=None, between=None, return_all=False, init=None, init_angle=90.0):
    """Draw latents in a few steps: predict, turn back part of the way towards noise, predict again.

    Step k of n starts at the angle tan(a) = (1 - k/n)^1.5 tan(max_angle), the first at pure noise.

    labels: (B,) int64. steps: at least 1. cfg_scale: guidance; any but 1 doubles a step's cost.
    cfg_skip: how many first steps go without, for it overshoots there; never the last two.
    noise: (steps, B, T, C), or None to draw it with `generator`. same_noise: use the first one at
    every step. between: a function applied to the prediction between steps. init: (B, T, C) latents
    to edit: turned by init_angle (0 to 90 degrees) towards noise, steps from more noise than that
    are skipped. Returns (B, T, C) float32; with return_all that of each step taken, stacked.
    Source: paper, few-step sampling; init as in SDEdit, arXiv 2108.01073.
    """
    config, device = model.config, labels.device
    if noise is None:
        shape = (steps, len(labels), config.tokens, config.channels)
        noise = torch.randn(shape, generator=generator, device=getattr(generator, "device", device))
        noise = noise.to(device)
    limit, first = math.tan(math.radians(config.max_angle)), 0
    tangents = [(1 - step / steps) ** 1.5 * limit for step in range(steps)]
    if init is not None:
        start = math.tan(math.radians(init_angle))
        first = sum(tangent >= start for tangent in tangents[1:])
        tangents[first] = start if config.sphere else min(start, limit)
    x, outputs = init, []
    for step in range(first, steps):
        e, tangent = noise[0 if same_noise else step], tangents[step]
        if x is None:
            v = to_sphere(e) if config.sphere else limit * e
        elif same_noise and config.sphere and outputs:      # x resembles its noise; keep that
            v = to_sphere(to_sphere(x) + tangent * to_sphere(e))
        else:
            v = rotate(x, e, math.atan(tangent), config.sphere)
        x = guided(model, v, labels, 1 if step < min(cfg_skip, steps - 2) else cfg_scale)
        outputs.append(x)
        if between is not None and step < steps - 1:
            x = between(x)
    return torch.stack(outputs) if return_all else x
