"""The token language model: transformers' MusicGen decoder over delayed codes, for our bases and facebook/musicgen-* alike.

    prompt -> Conditions -> memory [B, M', d] --cross-attention--> decoder over steps [B, K, S] -> logits [B, K, S, V]

A step is an action: the K codes of a pattern step are drawn together from K heads, so their log-probs add (logps [B, S]).
Source: Copet et al. 2023, arXiv:2306.05284.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from transformers import MusicgenConfig, MusicgenForCausalLM, MusicgenForConditionalGeneration
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.patterns import delay

LORA_TARGETS = r".*decoder\.layers\.\d+\.((self_attn|encoder_attn)\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2)"
"""Which linear maps an adapter changes: attention and feed-forward of every decoder layer, never heads or embeddings."""

TEMPO_FEATURES = 16
BEAT_HARMONICS = (1 / 8, 1 / 4, 1 / 3, 1 / 2, 1.0, 2.0, 3.0, 4.0)
"""Rates of the beat clock's hands, turns a beat: two bars and one of 4/4, a bar of 3/4, half a bar, the beat and its parts."""


@dataclass(frozen=True)
class MusicLMConfig:
    """The shape of a language model and the vocabulary that it speaks."""

    n_q: int = 4
    """Codebooks K."""
    card: int = 1024
    """Entries of a codebook V; the special token is id V."""
    d_model: int = 256
    n_layers: int = 7
    n_heads: int = 4
    d_ff: int = 1024
    text_dim: int = 384
    """Width of the text encoder's states."""
    dropout: float = 0.1
    tempo: bool = True
    """Whether a tempo token stands in the memory (MusicGen checkpoints have none)."""
    beat_clock: bool = False
    """Whether every step is told its place in the beat where the tempo is known; clips then begin on a bar. Needs `tempo`."""
    frame_rate: float = 25.0
    """Codec frames a second, by which the beat clock runs."""
    pattern: str = "delay"
    codec_sha256: str = ""
    """Hash of the codec whose codes this model speaks."""
    text_encoder: str = "minilm"
    """Name or path of the text encoder whose states it reads."""


class MusicLM(nn.Module):
    """MusicGen's decoder with the projections that make its cross-attention memory.

    Shapes: codes [B, K, T] int64; steps [B, K, S], S = T + K - 1; hidden [B, S, d]: hidden[:, s] predicts step s.
    """

    def __init__(self, config: MusicLMConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = MusicgenForCausalLM(_decoder_config(config))
        self.text_projection = nn.Linear(config.text_dim, config.d_model)
        if config.tempo:
            self.tempo_projection = nn.Linear(2 * TEMPO_FEATURES, config.d_model)
            self.no_tempo = nn.Parameter(torch.zeros(config.d_model))
        if config.beat_clock:
            if not config.tempo:
                raise ValueError("a beat clock runs by the tempo: tempo=False with beat_clock=True")
            self.clock_projection = nn.Linear(2 * len(BEAT_HARMONICS), config.d_model)
        # Positions have an rms of .7; token embeddings of MusicGen's usual .02 would drown in them for thousands of steps.
        for embedding in self.decoder.model.decoder.embed_tokens:
            nn.init.normal_(embedding.weight, std=0.7 / math.sqrt(config.n_q))

    @property
    def n_q(self) -> int:
        return self.config.n_q

    @property
    def card(self) -> int:
        return self.config.card

    @property
    def special(self) -> int:
        """The id that begins a sequence and fills the delay pattern's gaps; it is never a code."""
        return self.config.card

    def fast_training(self) -> None:
        """Choose the attention that trains fastest: plain matrix products on a CPU (1.2 times the fused kernel's speed, whose
        backward pass is slow there), the fused kernel elsewhere."""
        on_cpu = next(self.parameters()).device.type == "cpu"
        self.decoder.set_attn_implementation("eager" if on_cpu else "sdpa")

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def memory(self, cond: Conditions) -> tuple[Tensor, Tensor]:
        """What cross-attention reads: [B, M', d] and mask [B, M'] with at least one valid place in each row."""
        if cond.text.shape[-1] != self.config.text_dim:
            raise UserError(
                f"text states of width {cond.text.shape[-1]}",
                f"{self.config.text_dim}, the width of {self.config.text_encoder!r}",
                "encode the prompts with the text encoder that this model was trained with",
            )
        weight = self.text_projection.weight
        text = self.text_projection(cond.text.to(weight.dtype)) * cond.mask[..., None]
        if not self.config.tempo:
            # MusicGen's own unconditional input is zeros; one visible zero keeps the softmax defined and adds nothing.
            first = cond.mask[:, :1] | ~cond.mask.any(1, keepdim=True)
            return text, torch.cat([first, cond.mask[:, 1:]], 1)
        known = torch.isfinite(cond.tempo_bpm)
        octave = torch.log2(torch.where(known, cond.tempo_bpm, torch.full_like(cond.tempo_bpm, 100.0)) / 100.0)
        frequency = math.pi * torch.arange(1, TEMPO_FEATURES + 1, device=octave.device) / 2
        angle = (octave[:, None] * frequency).to(weight.dtype)
        tempo = self.tempo_projection(torch.cat([angle.sin(), angle.cos()], -1))
        tempo = torch.where(known[:, None], tempo, self.no_tempo.expand_as(tempo))
        visible = torch.ones_like(cond.mask[:, :1])
        return torch.cat([tempo[:, None], text], 1), torch.cat([visible, cond.mask], 1)

    def positions(self, cond: Conditions, n_steps: int) -> Tensor:
        """What is added to the input of each step, [1 or B, S, d]: its number, and its place in the beat where there is a clock.

        Step s says frame s of the first codebook: s / frame_rate * bpm / 60 beats after the start. The clock's hands are sines
        and cosines of that; a row without a tempo has none. (From a tempo token alone the decoder would have to count frames,
        which it hardly learns: .21 of its clips were in the tempo asked for, and .18 in one that was asked of another clip.)
        """
        decoder: Any = self.decoder.model.decoder
        steps = torch.arange(n_steps, device=cond.text.device)
        positions: Tensor = decoder.embed_positions(steps[None, None])
        if not self.config.beat_clock:
            return positions[None]
        known = torch.isfinite(cond.tempo_bpm)
        beats = torch.where(known, cond.tempo_bpm, 0.0)[:, None] / 60 * (steps / self.config.frame_rate)
        angle = 2 * math.pi * beats[..., None] * torch.tensor(BEAT_HARMONICS, device=steps.device)
        clock = self.clock_projection(torch.cat([angle.sin(), angle.cos()], -1).to(positions.dtype))
        return positions + clock * known[:, None, None]

    def hidden(self, codes: Tensor, cond: Conditions) -> Tensor:
        """Trunk states under teacher forcing: [B, S, d]; hidden[:, s] has seen the steps before s and predicts step s."""
        self._check(codes, cond)
        steps = delay(codes, self.special)
        begin = steps.new_full((*steps.shape[:2], 1), self.special)
        inputs = torch.cat([begin, steps[..., :-1]], -1)
        memory, mask = self.memory(cond)
        decoder: Any = self.decoder.model.decoder
        embedded = sum(table(inputs[:, k]) for k, table in enumerate(decoder.embed_tokens)) + self.positions(cond, inputs.shape[-1])
        # Given embeddings, transformers' decoder takes them for one step long and adds the position of step 0 to all.
        return decoder(
            inputs_embeds=embedded - decoder.embed_positions(embedded[:, :, -1:]),
            encoder_hidden_states=memory,
            encoder_attention_mask=mask.long(),
            use_cache=False,
        ).last_hidden_state

    def heads(self, hidden: Tensor) -> Tensor:
        """Trunk states [B, S, d] -> logits [B, K, S, V], one head a codebook."""
        return torch.stack([head(hidden) for head in self.decoder.lm_heads], 1)

    def forward(self, codes: Tensor, cond: Conditions) -> Tensor:
        """logits [B, K, T, V]: logits[b, k, t] predicts codes[b, k, t]."""
        return self.aligned(self.hidden(codes, cond))

    def aligned(self, hidden: Tensor) -> Tensor:
        """Trunk states [B, S, d] -> logits [B, K, T, V] at the steps where each codebook has a code."""
        T = hidden.shape[1] - self.n_q + 1
        return torch.stack([head(hidden[:, k : k + T]) for k, head in enumerate(self.decoder.lm_heads)], 1)

    def code_logps(self, codes: Tensor, cond: Conditions, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-prob of each code [B, K, T] in nats, and the trunk states [B, S, d]."""
        hidden = self.hidden(codes, cond)
        logits = self.aligned(hidden).float() / temperature
        picked = logits.gather(-1, codes[..., None])[..., 0]
        return picked - logits.logsumexp(-1), hidden

    @overload
    def logps(self, codes: Tensor, cond: Conditions, temperature: float = 1.0, return_hidden: Literal[False] = False) -> Tensor: ...

    @overload
    def logps(
        self, codes: Tensor, cond: Conditions, temperature: float = 1.0, *, return_hidden: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def logps(
        self, codes: Tensor, cond: Conditions, temperature: float = 1.0, return_hidden: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-prob of each pattern step [B, S] in nats: the sum over the codebooks that have a code there."""
        per_code, hidden = self.code_logps(codes, cond, temperature)
        per_step = sum_by_step(per_code)
        return (per_step, hidden) if return_hidden else per_step

    def _check(self, codes: Tensor, cond: Conditions) -> None:
        if codes.dim() != 3 or codes.shape[1] != self.n_q:
            raise ValueError(f"codes must be [B, {self.n_q}, T]; got {tuple(codes.shape)}")
        if len(cond) != len(codes):
            raise ValueError(f"{len(codes)} rows of codes for {len(cond)} conditions")

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors (float16 halves the size; it is read back as float32)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", {k: v.to(dtype) for k, v in self.state_dict().items()})
        write_json(folder / "config.json", {"model_type": "encore_music_lm", **dataclasses.asdict(self.config)})

    def sha256(self) -> str:
        """Hash of the weights with the vocabulary's layout: what an adapter's manifest names."""
        layout = torch.tensor([self.n_q, self.card])
        return tensors_sha256({**self.state_dict(), f"layout.{self.config.pattern}": layout})


def _decoder_config(config: MusicLMConfig) -> MusicgenDecoderConfig:
    if config.pattern != "delay":
        raise UserError(f"pattern {config.pattern!r}", "'delay'", "use a model with the delay pattern")
    return MusicgenDecoderConfig(
        vocab_size=config.card,
        num_codebooks=config.n_q,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        ffn_dim=config.d_ff,
        dropout=config.dropout,
        pad_token_id=config.card,
        bos_token_id=config.card,
    )


def sum_by_step(per_code: Tensor) -> Tensor:
    """Values of codes [B, K, T] -> their sum at each pattern step [B, S] under the delay pattern."""
    B, K, T = per_code.shape
    total = per_code.new_zeros((B, T + K - 1))
    for k in range(K):
        total[:, k : k + T] += per_code[:, k]
    return total


def codes_of_steps(per_step: Tensor, K: int) -> Tensor:
    """Values of pattern steps [B, S] -> those of the step at which each code stands [B, K, T] under the delay pattern."""
    T = per_step.shape[1] - K + 1
    return torch.stack([per_step[:, k : k + T] for k in range(K)], dim=1)


def disable_functional_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, also those that MusicGen keeps as plain numbers and `nn.Dropout`-only helpers miss."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "dropout_rate"):
            if isinstance(getattr(module, name, None), float | int):
                setattr(module, name, 0.0)


def load_lm(folder: str | Path) -> MusicLM:
    """Load our own folder, or one in the layout of facebook/musicgen-* (safetensors), in eval mode and float32."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    kind = config.pop("model_type", None)
    if kind == "musicgen":
        return _from_musicgen(folder)
    if kind != "encore_music_lm":
        raise UserError(f"{folder} of model_type {kind!r}", "'encore_music_lm' or 'musicgen'", "point to a language model's folder")
    lm = MusicLM(MusicLMConfig(**config))
    tensors = {name: tensor.float() for name, tensor in load_tensors(folder / "model.safetensors").items()}
    expected = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise UserError(f"{folder} with unfit tensors {wrong[:4]}", "those that its config.json describes", "restore the folder")
    lm.load_state_dict(tensors)
    return lm.eval()


def _from_musicgen(folder: Path) -> MusicLM:
    settings: MusicgenConfig = MusicgenConfig.from_pretrained(folder)
    decoder: Any = settings.decoder
    text: Any = settings.text_encoder
    if decoder.audio_channels != 1:
        raise UserError(f"{folder}, a stereo checkpoint", "a mono MusicGen", "use one of the mono checkpoints")
    whole = MusicgenForConditionalGeneration.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    config = MusicLMConfig(
        n_q=decoder.num_codebooks,
        card=decoder.vocab_size,
        d_model=decoder.hidden_size,
        n_layers=decoder.num_hidden_layers,
        n_heads=decoder.num_attention_heads,
        d_ff=decoder.ffn_dim,
        text_dim=text.hidden_size,
        dropout=decoder.dropout,
        tempo=False,
        text_encoder=str(folder),
    )
    lm = MusicLM(config)
    lm.decoder = whole.decoder
    if hasattr(whole, "enc_to_dec_proj"):
        lm.text_projection = whole.enc_to_dec_proj
    else:
        nn.init.eye_(lm.text_projection.weight)
        nn.init.zeros_(lm.text_projection.bias)
    return lm.eval()
