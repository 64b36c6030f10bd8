"""wav [B, 1, L] <-> codes [B, K, T]: a small magnitude codec that two CPU cores can train, and EnCodec, DAC or Mimi folders.

    wav -> |STFT|^0.3 -> 4 frames stacked -> linear + ConvNeXt -> latents [B, D, T] -> residual VQ -> codes [B, K, T]
    codes -> sum of codebook vectors -> ConvNeXt + linear -> |STFT|^0.3 -> phase by fast Griffin-Lim -> wav

Only magnitudes are coded, so no network ever has to learn phase: that is what makes minutes of training enough. The price is
that phase is invented again at decode; `decode` is nevertheless a pure function of the codes.

Every row is encoded and decoded alone. So a clip sounds the same whatever shares its batch, and memory does not grow with B.

Papers: SoundStream (Zeghidour et al. 2021, arXiv:2107.03312) for residual VQ and quantizer dropout; ConvNeXt (Liu et al. 2022,
arXiv:2201.03545) in one dimension as in Vocos (Siuzdak 2023, arXiv:2306.00814); fast Griffin-Lim (Perraudin et al. 2013).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.errors import UserError


class Codec(Protocol):
    """What the rest of the house may ask of any codec, ours or another's."""

    @property
    def sample_rate(self) -> int: ...
    @property
    def frame_rate(self) -> float: ...
    @property
    def hop_length(self) -> int: ...
    @property
    def n_q(self) -> int: ...
    @property
    def card(self) -> int: ...
    @property
    def latent_dim(self) -> int: ...
    @property
    def codebooks(self) -> Tensor: ...
    def encode(self, wav: Tensor, sample_rate: int | None = None) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...
    def latents(self, codes: Tensor) -> Tensor: ...
    def save(self, folder: str | Path) -> None: ...
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class CodecConfig:
    """The shape of a `MagnitudeCodec`."""

    sample_rate: int = 16000
    n_fft: int = 1024
    stft_hop: int = 160
    stack: int = 4
    """STFT frames that make one codec frame."""
    power: float = 0.3
    """Exponent of the magnitudes: |S|^0.3 weighs quiet partials about as the ear does."""
    width: int = 256
    latent_dim: int = 96
    encoder_blocks: int = 3
    decoder_blocks: int = 4
    expansion: int = 3
    kernel: int = 7
    n_q: int = 4
    card: int = 1024
    ema_decay: float = 0.99
    dead_share: float = 0.1
    """A code chosen less often than this share of the average is moved by `revive`."""
    quantize_dropout: bool = True
    griffin_lim_iterations: int = 32

    @property
    def hop_length(self) -> int:
        return self.stft_hop * self.stack

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.hop_length

    @property
    def n_bins(self) -> int:
        return self.n_fft // 2 + 1


class ConvNeXtBlock(nn.Module):
    """x + g * MLP(norm(depthwise convolution over time)), on [B, T, D]."""

    def __init__(self, width: int, expansion: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        self.gain = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return x + self.gain * self.down(F.gelu(self.up(self.norm(y))))


class MagnitudeCodec(nn.Module):
    """A codec of power-compressed STFT magnitudes; see the module's docstring for the route."""

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or CodecConfig()
        stacked = config.n_bins * config.stack
        self.analysis = nn.Linear(stacked, config.width)
        self.encoder = nn.Sequential(*[ConvNeXtBlock(config.width, config.expansion, config.kernel) for _ in range(config.encoder_blocks)])
        self.to_latent = nn.Linear(config.width, config.latent_dim)
        self.rvq = ResidualVQ(
            dim=config.latent_dim,
            num_quantizers=config.n_q,
            codebook_size=config.card,
            kmeans_init=True,
            kmeans_iters=10,
            decay=config.ema_decay,
            threshold_ema_dead_code=0,  # `revive` does this instead
            quantize_dropout=config.quantize_dropout,
        )
        self.from_latent = nn.Linear(config.latent_dim, config.width)
        self.decoder = nn.Sequential(*[ConvNeXtBlock(config.width, config.expansion, config.kernel) for _ in range(config.decoder_blocks)])
        self.synthesis = nn.Linear(config.width, stacked)
        self.mean: Tensor
        self.window: Tensor
        self.register_buffer("mean", torch.zeros(stacked))
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def frame_rate(self) -> float:
        return self.config.frame_rate

    @property
    def hop_length(self) -> int:
        return self.config.hop_length

    @property
    def n_q(self) -> int:
        return self.config.n_q

    @property
    def card(self) -> int:
        return self.config.card

    @property
    def latent_dim(self) -> int:
        return self.config.latent_dim

    # -- the public route ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, wav: Tensor, sample_rate: int | None = None) -> Tensor:
        """wav [B, 1, L] -> codes [B, K, T], T = ceil(L / hop_length); the end is padded with silence.

        Raises: UserError for another shape or dtype, samples that are not finite, or a stated `sample_rate` other than ours.
        """
        check_wav(wav, sample_rate, self.sample_rate, channels=1)
        if training := self.training:
            self.eval()
        rows = [self.quantize(self.to_latents(self.compress(self.magnitude(row))))[1] for row in wav.split(1)]
        if training:
            self.train()
        return torch.cat(rows).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, K, T] -> wav [B, 1, T * hop_length], each row alone; the same codes always give the same samples."""
        check_codes(codes, self.n_q, self.card)
        rows = []
        for row in codes.to(self.mean.device).split(1):
            magnitude = self.expand(self.from_latents(self.latents(row).transpose(1, 2)))[0]
            wav = griffin_lim(magnitude, self.window, self.config.stft_hop, self.config.griffin_lim_iterations)
            rows.append(wav[: codes.shape[2] * self.hop_length].clamp(-1, 1))
        return torch.stack(rows)[:, None]

    def latents(self, codes: Tensor) -> Tensor:
        """codes [B, K, T], from any device -> the sum of their codebook vectors [B, D, T], where the codec lies."""
        check_codes(codes, self.n_q, self.card)
        books, codes = self.codebooks, codes.to(self.mean.device)
        return torch.stack([books[k][codes[:, k]] for k in range(self.n_q)]).sum(0).transpose(1, 2)

    @property
    def codebooks(self) -> Tensor:
        """[K, V, D]."""
        return torch.stack([layer._codebook.embed[0] for layer in self.rvq.layers])

    # -- the pieces, which training uses too -----------------------------------------------------------------------

    def forward(self, wav: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The training route, without phase: wav [B, 1, L] -> predicted and true |S|^power, codes [B, T, K], commitment []."""
        target = self.compress(self.magnitude(wav))
        quantized, codes, commitment = self.quantize(self.to_latents(target))
        return self.from_latents(quantized), target, codes, commitment

    def magnitude(self, wav: Tensor) -> Tensor:
        """wav [B, 1, L] -> STFT magnitudes [B, T * stack, n_bins], after padding L to a whole number of codec frames."""
        wav = F.pad(wav[:, 0], (0, -wav.shape[-1] % self.hop_length))
        frames = wav.shape[-1] // self.config.stft_hop
        spectrum = torch.stft(wav, self.config.n_fft, self.config.stft_hop, window=self.window, return_complex=True)
        return spectrum.abs()[..., :frames].transpose(1, 2)

    def compress(self, magnitude: Tensor) -> Tensor:
        """Magnitudes [B, T * stack, n_bins] -> |S|^power [B, T, stack * n_bins]."""
        B, frames, bins = magnitude.shape
        compressed = magnitude.clamp_min(1e-5).pow(self.config.power)
        return compressed.reshape(B, frames // self.config.stack, self.config.stack * bins)

    def expand(self, compressed: Tensor) -> Tensor:
        """|S|^power [B, T, stack * n_bins] -> magnitudes [B, T * stack, n_bins]; the inverse of `compress`."""
        B, T, _ = compressed.shape
        return compressed.clamp(1e-4, 8).pow(1 / self.config.power).reshape(B, T * self.config.stack, -1)

    def to_latents(self, compressed: Tensor) -> Tensor:
        """|S|^power [B, T, stack * n_bins] -> latents before quantising [B, T, D]."""
        return self.to_latent(self.encoder(self.analysis(compressed - self.mean)))

    def from_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, T, D] -> |S|^power [B, T, stack * n_bins]."""
        return self.synthesis(self.decoder(self.from_latent(latents))).float() + self.mean

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, T, D] -> quantised [B, T, D], codes [B, T, K], commitment loss []. In float32 under any autocast."""
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, losses = self.rvq(latents.float())
        return quantized, codes, losses.sum() / self.n_q

    @torch.no_grad()
    def initialise(self, wav: Tensor) -> None:
        """Sets mean, PCA in all linear maps and k-means codebooks from wav [B, 1, L], before the first training step.

        With PCA the untrained codec already is the best linear one, and k-means means that no code starts dead.
        """
        frames = torch.cat([self.compress(self.magnitude(part)).flatten(0, 1) for part in wav.split(32)])
        self.mean.copy_(frames.mean(0))
        centred = frames - self.mean
        width, latent_dim = self.config.width, self.config.latent_dim
        _, _, basis = torch.pca_lowrank(centred[: 8 * max(width, 1024)], q=width, center=False, niter=3)
        scale = float((centred @ basis[:, :latent_dim]).std().clamp_min(1e-3))
        for linear in (self.analysis, self.to_latent, self.from_latent, self.synthesis):
            linear.bias.zero_()
        self.analysis.weight.copy_(basis.T / scale)
        self.synthesis.weight.copy_(basis * scale)
        self.to_latent.weight.copy_(torch.eye(latent_dim, width))
        self.from_latent.weight.copy_(torch.eye(width, latent_dim))
        latents = torch.cat([self.to_latents(part[None] + self.mean)[0] for part in centred.split(4096)])
        dropout, training = self.rvq.quantize_dropout, self.training
        self.rvq.quantize_dropout = False
        self.train()
        self.quantize(latents[None])
        self.rvq.quantize_dropout = dropout
        self.train(training)

    @torch.no_grad()
    def revive(self) -> int:
        """Moves each rarely chosen code beside a popular one, whose vectors the two then share; returns how many moved.

        Replacing dead codes by random residuals, the usual cure, fails in the later codebooks: in 96 dimensions a random residual
        is far from all others, nothing chooses it, and it is dead again.
        """
        moved = 0
        for layer in self.rvq.layers:
            book = layer._codebook
            size, embed, total = book.cluster_size[0], book.embed[0], book.embed_avg[0]
            order = size.argsort()
            n_dead = min(int((size < self.config.dead_share * size.mean()).sum()), len(size) // 2)
            dead, popular = order[:n_dead], order.flip(0)[:n_dead]
            spread = 0.02 * embed.norm(dim=-1).mean() / embed.shape[-1] ** 0.5
            embed[dead] = embed[popular] + spread * torch.randn_like(embed[popular])
            size[popular] /= 2
            size[dead] = size[popular]
            total[popular] = embed[popular] * size[popular, None]
            total[dead] = embed[dead] * size[dead, None]
            moved += len(dead)
        return moved

    # -- a folder --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What decides encode and decode: weights, mean and codebooks; without the quantizer's training statistics."""
        training_only = ("embed_avg", "cluster_size", "initted")
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.endswith(training_only)}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def sha256(self) -> str:
        """A hash over the whole state; equal for all codecs loaded from the same tensors, in whatever precision stored."""
        return tensors_sha256(self.state_dict())

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and model.safetensors. `dtype` float16 halves the file; load_codec returns float32."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", {name: tensor.to(dtype) for name, tensor in self.tensors().items()})
        write_json(folder / "config.json", {"model_type": "encore_magnitude_codec", **dataclasses.asdict(self.config)})


class TransformersCodec(nn.Module):
    """An EnCodec, DAC or Mimi model of transformers behind the interface of `MagnitudeCodec`."""

    model: Any

    def __init__(self, model: Any, n_q: int | None = None) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        config: Any = model.config
        self.kind: str = config.model_type
        self.sample_rate = int(config.sampling_rate)
        self.channels = int(getattr(config, "audio_channels", 1))
        self.card = int(config.codebook_size)
        if self.kind == "encodec":
            self.hop_length, available = int(config.hop_length), int(model.quantizer.num_quantizers)
        elif self.kind == "dac":
            self.hop_length, available = int(config.hop_length), int(config.n_codebooks)
        else:
            self.hop_length = round(config.sampling_rate / config.frame_rate)
            available = int(config.num_quantizers)
        if n_q is not None and not 1 <= n_q <= available:
            raise UserError(f"n_q={n_q}", f"1 to {available} codebooks", "choose fewer codebooks or another checkpoint")
        self.n_q = n_q or available
        self.frame_rate = self.sample_rate / self.hop_length
        self.latent_dim = int(self.latents(torch.zeros(1, self.n_q, 1, dtype=torch.long)).shape[1])

    @torch.no_grad()
    def encode(self, wav: Tensor, sample_rate: int | None = None) -> Tensor:
        """wav [B, C, L] -> codes [B, K, T], T = ceil(L / hop_length)."""
        check_wav(wav, sample_rate, self.sample_rate, channels=self.channels)
        T = -(-wav.shape[-1] // self.hop_length)
        wav = F.pad(wav, (0, -wav.shape[-1] % self.hop_length))
        return torch.cat([self._encode_row(row)[..., :T] for row in wav.split(1)])

    def _encode_row(self, wav: Tensor) -> Tensor:
        if self.kind == "encodec":
            embedded = self.model.encoder(wav)
            return self.model.quantizer.encode(embedded, self.model.config.target_bandwidths[-1]).transpose(0, 1)[:, : self.n_q]
        if self.kind == "dac":
            return self.model.encode(wav, n_quantizers=self.n_q).audio_codes
        return self.model.encode(wav, num_quantizers=self.n_q).audio_codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, K, T] -> wav [B, C, T * hop_length]."""
        check_codes(codes, self.n_q, self.card)
        length = codes.shape[2] * self.hop_length
        return torch.cat([self._decode_row(row, length) for row in codes.to(self.model.device).split(1)])

    def _decode_row(self, codes: Tensor, length: int) -> Tensor:
        if self.kind == "encodec":
            wav = self.model.decoder(self.model.quantizer.decode(codes.transpose(0, 1)))
        elif self.kind == "dac":
            wav = self.model.decoder(self.model.quantizer.from_codes(codes)[0])
        else:
            wav = self.model.decode(codes).audio_values
        # DAC's strided convolutions return a few samples less than T * hop_length.
        return F.pad(wav, (0, max(0, length - wav.shape[-1])))[..., :length]

    @torch.no_grad()
    def latents(self, codes: Tensor) -> Tensor:
        """codes [B, K, T] -> what the model's own quantizer makes of them [B, D, T]."""
        check_codes(codes, self.n_q, self.card)
        codes = codes.to(self.model.device)
        if self.kind == "encodec":
            return self.model.quantizer.decode(codes.transpose(0, 1))
        if self.kind == "dac":
            return self.model.quantizer.from_codes(codes)[0]
        return self.model.quantizer.decode(codes)

    @property
    def codebooks(self) -> Tensor:
        """[K, V, D]: what each code adds to `latents`, whatever projections the model puts behind its codebooks."""
        rest = self.latents(torch.zeros(1, self.n_q, 1, dtype=torch.long))[..., 0]
        books = []
        for k in range(self.n_q):
            codes = torch.zeros(self.card, self.n_q, 1, dtype=torch.long, device=rest.device)
            codes[:, k, 0] = torch.arange(self.card, device=rest.device)
            # latents(codes) = sum over k of f_k(code), and all but one code here are 0.
            books.append(self.latents(codes)[..., 0] - rest * (self.n_q - 1) / self.n_q)
        return torch.stack(books)

    def sha256(self) -> str:
        """A hash over the whole state."""
        return tensors_sha256(self.state_dict())

    def save(self, folder: str | Path) -> None:
        """Writes the transformers folder as it came."""
        self.model.save_pretrained(str(folder))


def load_codec(folder: str | Path, n_q: int | None = None) -> MagnitudeCodec | TransformersCodec:
    """Loads a codec folder: one that `MagnitudeCodec.save` wrote, or an EnCodec, DAC or Mimi checkpoint of transformers.

    Args: n_q: use only the first codebooks of a transformers codec. Raises: UserError for anything else.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} without config.json", "a codec folder", "train one with base_models/train_codec.py")
    config = read_json(folder / "config.json")
    kind = config.pop("model_type", None)
    if kind == "encore_magnitude_codec":
        if n_q not in (None, config["n_q"]):
            raise UserError(f"n_q={n_q}", f"all {config['n_q']} codebooks", "leave n_q out, or train with fewer codebooks")
        codec = MagnitudeCodec(CodecConfig(**config))
        tensors = {name: tensor.float() for name, tensor in load_tensors(folder / "model.safetensors").items()}
        _load_checked(codec, tensors, folder)
        return codec.eval()
    if kind in ("encodec", "dac", "mimi"):
        from transformers import DacModel, EncodecModel, MimiModel

        classes: dict[str, Any] = {"encodec": EncodecModel, "dac": DacModel, "mimi": MimiModel}
        return TransformersCodec(classes[kind].from_pretrained(str(folder)), n_q).eval()
    raise UserError(
        f"model_type {json.dumps(kind)} in {folder / 'config.json'}",
        "encore_magnitude_codec, encodec, dac or mimi",
        "point to a codec folder",
    )


def _load_checked(codec: MagnitudeCodec, tensors: dict[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in codec.tensors().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise UserError(
            f"{folder / 'model.safetensors'} with other tensors than config.json says: {', '.join(wrong[:3])}",
            f"{len(wanted)} tensors of the shapes that the config implies",
            "take config.json and model.safetensors from the same run",
        )
    codec.load_state_dict(tensors, strict=False)
    for layer in codec.rvq.layers:  # so that training can go on from a loaded folder
        layer._codebook.initted.fill_(True)
        layer._codebook.embed_avg.copy_(layer._codebook.embed)


def check_wav(wav: Tensor, sample_rate: int | None, expected_rate: int, channels: int) -> None:
    """Raises UserError unless wav is finite float32 [B, channels, L > 0] at the codec's rate."""
    if sample_rate is not None and sample_rate != expected_rate:
        raise UserError(f"audio at {sample_rate} Hz", f"{expected_rate} Hz", "resample it with base_models.audio.resample")
    if wav.ndim != 3 or wav.shape[1] != channels or 0 in wav.shape:
        raise UserError(f"wav of shape {list(wav.shape)}", f"[B, {channels}, L] with L > 0", "mix down or add the missing dimensions")
    if wav.dtype != torch.float32:
        raise UserError(f"wav of {wav.dtype}", "float32 in [-1, 1]", "convert it; int16 is divided by 32768")
    if not bool(torch.isfinite(wav).all()):
        raise UserError("wav with NaN or infinite samples", "finite float32", "look at where the audio was made")


def check_codes(codes: Tensor, n_q: int, card: int) -> None:
    """Raises UserError unless codes is int64 [B, n_q, T > 0] with values below card."""
    if codes.ndim != 3 or codes.shape[1] != n_q or 0 in codes.shape:
        raise UserError(f"codes of shape {list(codes.shape)}", f"[B, {n_q}, T] with T > 0", "pass codes of this codec")
    if codes.dtype != torch.int64:
        raise UserError(f"codes of {codes.dtype}", "int64", "convert with .long()")
    if int(codes.min()) < 0 or int(codes.max()) >= card:
        raise UserError(
            f"codes from {int(codes.min())} to {int(codes.max())}",
            f"0 to {card - 1}",
            "strip pattern specials first, with base_models.patterns.undelay",
        )


def griffin_lim(magnitude: Tensor, window: Tensor, hop: int, iterations: int, momentum: float = 0.99) -> Tensor:
    """Finds a signal with these STFT magnitudes: fast Griffin-Lim from a fixed phase (Perraudin, Balazs, Sondergaard 2013).

    c_n = P(t_{n-1});  t_n = c_n + momentum / (1 + momentum) * (c_n - c_{n-1}), with the magnitudes put back into t_n.

    Args: magnitude [N, n_bins] of frames centred every `hop` samples; window [n_fft].
    Returns: wav [about N * hop], starting at the centre of the first frame.
    """
    n_fft, N = len(window), len(magnitude)
    overlap = -(-n_fft // hop)
    length = (N - 1) * hop + n_fft

    def overlap_add(frames: Tensor) -> Tensor:
        frames = F.pad(frames, (0, overlap * hop - n_fft)).view(N, overlap, hop)
        signal = frames.new_zeros(N + overlap - 1, hop)
        for j in range(overlap):
            signal[j : j + N] += frames[:, j]
        return signal.flatten()[:length]

    norm = overlap_add(window.square().expand(N, -1)).clamp_min(1e-3)

    def to_signal(spectrum: Tensor) -> Tensor:
        return overlap_add(torch.fft.irfft(spectrum, n_fft) * window) / norm

    bins = torch.arange(magnitude.shape[1], device=magnitude.device)
    turns = torch.arange(N, device=magnitude.device)[:, None] * bins * hop % n_fft
    spectrum = torch.polar(magnitude, turns * (2 * torch.pi / n_fft))
    previous = torch.zeros_like(spectrum)
    for _ in range(iterations):
        consistent = torch.fft.rfft(to_signal(spectrum).unfold(0, n_fft, hop) * window)
        target = consistent - previous * (momentum / (1 + momentum))
        previous = consistent
        spectrum = target * (magnitude * torch.view_as_real(target).square().sum(-1).clamp_min(1e-20).rsqrt())
    return to_signal(spectrum)[n_fft // 2 :]
