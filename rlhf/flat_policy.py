"""The music LM as a flat causal LM, so that TRL's trainers run over it.

A flat sequence is one prompt id and then the codes in the order in which the LM says them (delay step by delay step, within a
step book by book; frame by frame would not be causal, since book 1 of frame t is heard only after book 0 of frame t + 1):

    [prompt_7][c0 of step 0][c0 of step 1][c1 of step 1] ...          K * T + 1 ids for codes [B, K, T]

    ids:  0 pad | 1 eos | 2 + k * V + v, code v of book k | 2 + K * V + i, row i of the prompt table

No text is tokenised in here. The wrapper holds a table of `Conditions` (text states and tempo, encoded once by the policy's own
frozen encoder) and the prompt id is a row of it. MusicGen has no end token and a clip has a fixed length, so no eos is scored.

One forward pass of the decoder over S = T + K - 1 steps serves all K * T ids. Two ways lead from there to log-probs, both exact:
  * `forward(..., fused_lm_head=True)` of this class: K softmaxes over V codes (`use_native_heads`; what our DPO trainer uses).
  * TRL's own fused head over `get_output_embeddings()`: one softmax over all ids. A block matrix makes it the same number: the
    trunk state is extended by a one-hot of the book that speaks, whose columns are 0 for that book's ids and -1e4 for all others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl.trainer.utils import FusedCausalLMOutput

from adapters.lora import adapter_disabled
from base_models.conditions import Conditions
from base_models.lm import MusicLM, disable_functional_dropout
from rlhf.edits import expected_difference
from rlhf.losses import kl_full

PAD, EOS, N_SPECIAL = 0, 1, 2
IMPOSSIBLE = -1.0e4
"""A logit whose probability is exactly 0 in float32, and that bfloat16 can hold."""


# ---- codes <-> ids ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def flat_order(n_q: int, n_frames: int) -> tuple[Tensor, Tensor]:
    """(book [K * T], frame [K * T]) of each flat place: ordered by delay step, then by book."""
    steps = range(n_frames + n_q - 1)
    places = [(k, s - k) for s in steps for k in range(n_q) if 0 <= s - k < n_frames]
    book, frame = torch.tensor(places).unbind(1)
    return book.contiguous(), frame.contiguous()


def flatten_codes(codes: Tensor, card: int) -> Tensor:
    """codes [B, K, T] -> ids [B, K * T]."""
    book, frame = (index.to(codes.device) for index in flat_order(codes.shape[1], codes.shape[2]))
    return N_SPECIAL + book * card + codes[:, book, frame]


def unflatten_ids(ids: Tensor, n_q: int, card: int) -> Tensor:
    """ids [B, K * T] -> codes [B, K, T]. Raises ValueError for a cut sequence or an id of another book."""
    B, n_ids = ids.shape
    if n_ids == 0 or n_ids % n_q:
        raise ValueError(f"{n_ids} code ids are no whole number of frames of {n_q} books: the sequence was cut")
    book, frame = (index.to(ids.device) for index in flat_order(n_q, n_ids // n_q))
    values = ids - N_SPECIAL - book * card
    if bool(((values < 0) | (values >= card)).any()):
        raise ValueError("an id stands in the place of another codebook: the sequence was cut or reordered")
    codes = ids.new_empty((B, n_q, n_ids // n_q))
    codes[:, book, frame] = values
    return codes


def prompt_id(row: int, n_q: int, card: int) -> int:
    """The id that stands for row `row` of the prompt table."""
    return N_SPECIAL + n_q * card + row


def make_tokenizer(n_q: int, card: int, n_prompts: int) -> PreTrainedTokenizerFast:
    """The word-level tokenizer that TRL demands; its words name the ids: `<pad> <eos> c0_0 ... c3_1023 prompt_0 ...`."""
    words = ["<pad>", "<eos>", *(f"c{k}_{v}" for k in range(n_q) for v in range(card))]
    words += [f"prompt_{row}" for row in range(n_prompts)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


# ---- the model -------------------------------------------------------------------------------------------------------


class FlatConfig(PreTrainedConfig):
    """What TRL and transformers ask a causal LM's configuration for."""

    model_type = "encore_flat_music"
    has_no_defaults_at_init = True

    def __init__(self, n_q: int = 1, card: int = 1, hidden_size: int = 1, n_prompts: int = 1, **kwargs: Any) -> None:
        self.n_q, self.card, self.hidden_size, self.n_prompts = n_q, card, hidden_size, n_prompts
        kwargs.setdefault("vocab_size", N_SPECIAL + n_q * card + n_prompts)
        kwargs.setdefault("pad_token_id", PAD)
        kwargs.setdefault("eos_token_id", EOS)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class FlatTrunk(nn.Module):
    """Flat ids [B, L] -> states [B, L, d + K + 1]; the state at place j predicts id j + 1."""

    def __init__(self, lm: MusicLM, conditions: Conditions, temperature: float) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.table = conditions  # no buffer: DDP would send it around at every step

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Conditions, list[int]]:
        """-> codes [B, K, T_max] (frames that a shorter row lacks hold the special token), conditions, frames of each row."""
        K, V = self.lm.n_q, self.lm.card
        valid = (input_ids != PAD) if attention_mask is None else attention_mask.bool()
        lengths = valid.sum(1)
        if bool((valid != (torch.arange(valid.shape[1], device=valid.device) < lengths[:, None])).any()):
            raise ValueError("padding must stand at the right end of a flat sequence")
        rows = input_ids[:, 0] - prompt_id(0, K, V)
        if bool(((rows < 0) | (rows >= len(self.table))).any()):
            raise ValueError("a flat sequence must begin with the id of a prompt in the table")
        n_ids = (lengths - 1).tolist()
        codes = input_ids.new_full((len(input_ids), K, max(n_ids) // K), self.lm.special)
        for n in set(n_ids):
            same = torch.tensor([i for i, other in enumerate(n_ids) if other == n], device=input_ids.device)
            codes[same, :, : n // K] = unflatten_ids(input_ids[same, 1 : 1 + n], K, V)
        if self.table.text.device != input_ids.device:
            self.table = self.table.to(input_ids.device)
        return codes, self.table.index(rows), [n // K for n in n_ids]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        codes, cond, frames = self.read(input_ids, attention_mask)
        hidden = self.lm.hidden(codes, cond) / self.temperature
        B, K, d = len(codes), self.lm.n_q, hidden.shape[-1]
        out = hidden.new_zeros((B, input_ids.shape[1], d + K + 1))
        out[:, :, -1] = 1.0  # "no book speaks here": the last place of a row and the padding
        for T in set(frames):
            rows = torch.tensor([i for i, other in enumerate(frames) if other == T], device=hidden.device)
            book, frame = (index.to(hidden.device) for index in flat_order(K, T))
            states = hidden[rows][:, book + frame]
            speaker = nn.functional.one_hot(book, K + 1).to(states.dtype).expand(len(rows), -1, -1)
            out[rows, : K * T] = torch.cat([states, speaker], -1)
        return BaseModelOutput(last_hidden_state=out)


class BlockHead(nn.Module):
    """All K heads as one matrix: see the module's docstring. It owns nothing and is put together when it is asked for."""

    bias = None
    heads: list[Any]

    def __init__(self, lm: MusicLM) -> None:
        super().__init__()
        self.n_q, self.card = lm.n_q, lm.card
        self.heads = [lm.decoder.lm_heads]  # in a list: they stay the LM's modules

    @property
    def weight(self) -> Tensor:
        """[2 + K * V, d + K + 1]."""
        K, V = self.n_q, self.card
        stacked = torch.cat([head.weight.detach() for head in self.heads[0]])  # [K * V, d]
        d = stacked.shape[1]
        weight = stacked.new_zeros((N_SPECIAL + K * V, d + K + 1))
        weight[N_SPECIAL:, :d] = stacked
        weight[:, d:] = IMPOSSIBLE
        for k in range(K):
            weight[N_SPECIAL + k * V : N_SPECIAL + (k + 1) * V, d + k] = 0.0
        weight[EOS, d + K] = 0.0
        return weight

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight)


@dataclass
class ExpectedEdits:
    """How clips are to be edited for the better and for the worse: slope [B, D, T] of a score at them, in its own standard deviations;
    codebooks [K, V, D]; price of a nat (rlhf.edits)."""

    slope: Tensor
    codebooks: Tensor
    price: float


@dataclass
class AnchoredOutput(FusedCausalLMOutput):
    """What was asked for over the whole vocabulary, at every code of a sequence, whatever its labels; nats a clip [B].

    kl: KL(policy || policy without its adapter). margin: what edits differ by in log-ratio (rlhf.edits.expected_difference).
    """

    kl: Tensor | None = None
    margin: Tensor | None = None


class FlatCausalLM(PreTrainedModel):
    """A `MusicLM` under the interface of a causal LM. It shares the LM's tensors; adapters injected here stand in the LM."""

    config_class = FlatConfig
    base_model_prefix = "trunk"
    main_input_name = "input_ids"
    is_gradient_checkpointing = False  # transformers warns when PEFT asks its own, deprecated property

    def __init__(self, lm: MusicLM, conditions: Conditions, temperature: float = 1.0) -> None:
        """conditions: the prompt table, one row a prompt id. temperature: that of the sampling whose clips are scored.

        Every dropout of `lm` is set to 0: the policy must score alike as policy and as its own reference.
        """
        config = FlatConfig(lm.n_q, lm.card, lm.config.d_model, len(conditions))
        super().__init__(config)
        disable_functional_dropout(lm)
        self.trunk = FlatTrunk(lm, conditions, temperature)
        self.head = BlockHead(lm)
        self.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: the LM comes with its weights."""

    def get_input_embeddings(self) -> nn.Module:
        embeddings: list[nn.Module] = list(self.trunk.lm.decoder.model.decoder.embed_tokens)
        return embeddings[0]

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def sequence(self, row: int, codes: Tensor) -> tuple[list[int], list[int]]:
        """(prompt ids, completion ids) of one clip: codes [K, T] under row `row` of the prompt table."""
        K, V = self.config.n_q, self.config.card
        return [prompt_id(row, K, V)], flatten_codes(codes[None].long(), V)[0].tolist()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
        anchored: bool = False,
        edits: ExpectedEdits | None = None,
        **_: Any,
    ) -> CausalLMOutput | FusedCausalLMOutput:
        """Flat ids [B, L] -> logits [B, L, 2 + K * V], or with `fused_lm_head` log-probs of the labels, both in nats; `anchored` adds the
        divergence from the policy without its adapter, `edits` what edits of the clips would differ by."""
        if fused_lm_head:
            assert labels is not None
            return self._native(input_ids, attention_mask, labels, anchored, edits)
        logits = self.head(self.trunk(input_ids, attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def _native(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, anchored: bool, edits: ExpectedEdits | None
    ) -> AnchoredOutput:
        """TRL's fused output through the K heads themselves. The figures beside log_probs and kl carry no gradient."""
        trunk, lm = self.trunk, self.trunk.lm
        codes, cond, frames = trunk.read(input_ids, attention_mask)
        reference = None
        if anchored or edits is not None:
            with torch.no_grad(), adapter_disabled(lm):
                reference = lm.hidden(codes, cond)
        hidden = lm.hidden(codes, cond)
        T_max = codes.shape[2]
        per_code: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        kl, margin = hidden.new_zeros((2, len(codes)), dtype=torch.float32)
        sounds = torch.arange(T_max, device=hidden.device) < torch.tensor(frames, device=hidden.device)[:, None]
        for k, head in enumerate(lm.decoder.lm_heads):
            logits = head(hidden[:, k : k + T_max]).float() / trunk.temperature
            target = codes[:, k].clamp(max=lm.card - 1)
            normaliser = logits.logsumexp(-1)
            picked = logits.gather(-1, target[..., None])[..., 0]
            logps = picked - normaliser
            if reference is not None:
                with torch.no_grad():
                    base = head(reference[:, k : k + T_max]).float() / trunk.temperature
                if anchored:
                    kl = kl + (kl_full(logits, base) * sounds).sum(1)
                if edits is not None:
                    gain = edits.slope.transpose(1, 2) @ edits.codebooks[k].T
                    margin = margin + (expected_difference(logits, base, gain, edits.price) * sounds).sum(1)
            with torch.no_grad():
                plain = logits.detach()
                entropy = normaliser - ((plain - normaliser[..., None]).exp_().mul_(plain)).sum(-1)
                per_code.append((logps, entropy, plain.mean(-1), (picked >= plain.amax(-1)).float()))
        mask = labels[:, 1:] != -100
        fields = [self._flat(torch.stack(field, 1), frames, mask) for field in zip(*per_code)]
        log_probs, entropy, mean_logits, is_top1 = fields
        return AnchoredOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=entropy,
            mean_logits=mean_logits,
            is_top1=is_top1.bool(),
            label_mask=mask,
            kl=kl if anchored else None,
            margin=None if edits is None else margin,
        )

    def _flat(self, values: Tensor, frames: Sequence[int], mask: Tensor) -> Tensor:
        """Values of codes [B, K, T_max] -> [B, L - 1] in flat order, 0 where the label is masked or padding stands."""
        K = self.config.n_q
        out = values.new_zeros(mask.shape)
        for T in set(frames):
            rows = torch.tensor([i for i, other in enumerate(frames) if other == T], device=values.device)
            book, frame = (index.to(values.device) for index in flat_order(K, T))
            out[rows, : K * T] = values[rows][:, book, frame]
        return out * mask


def use_native_heads(model: FlatCausalLM) -> None:
    """Undo TRL's patch of `model.forward`: `fused_lm_head=True` then reaches this class, K softmaxes over V, not one over K * V.

    They score at the wrapper's temperature; the patch that is undone carries the one of GRPO's settings, so the two must agree.
    """
    model.__dict__.pop("forward", None)
