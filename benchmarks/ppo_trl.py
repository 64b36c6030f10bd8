"""TRL's sides of benchmarks/ppo_step.py: its PPOTrainer over the delay pattern, and over a flat Llama of as many parameters."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl.trainer import utils as trl_utils

if not hasattr(trl_utils, "FusedCausalLMOutput"):  # TRL 1.12 has no fused head yet; flat_policy names the class, PPO never asks for it
    trl_utils.FusedCausalLMOutput = CausalLMOutput

from adapters.lora import LORA_TARGETS
from base_models.lm import MusicLM
from base_models.policy import Policy
from benchmarks.ppo_turn import Turn, held, without_tempo
from rlhf.flat_policy import IMPOSSIBLE, N_SPECIAL, FlatCausalLM, flat_order, flatten_codes, make_tokenizer, prompt_id
from rlhf.train_ppo import Config

LLAMA_LORA = r".*layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"


# ---- over the delay pattern ------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """FlatTrunk under the name and with the output that TRL's PPO asks a value model's backbone for."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        states = self.trunk(input_ids, attention_mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))


class FlatPolicy(FlatCausalLM):
    """FlatCausalLM that can also sample: transformers' own decoder and cache, T + K - 1 steps, scores as TRL stacks them."""

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **_: Any) -> GenerateDecoderOnlyOutput:
        lm: MusicLM = self.trunk.lm
        K, V, B = lm.n_q, lm.card, len(input_ids)
        T = generation_config.max_new_tokens // K
        memory, mask = lm.memory(self.trunk.table.index(input_ids[:, 0] - prompt_id(0, K, V)))
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = torch.full((B, K), lm.special)
        codes = torch.zeros((B, K, T), dtype=torch.long)
        book, frame = flat_order(K, T)
        place = torch.empty((K, T), dtype=torch.long)
        place[book, frame] = torch.arange(K * T)
        scores = torch.full((K * T, B, N_SPECIAL + K * V), IMPOSSIBLE)
        for s in range(T + K - 1):
            states = lm.decoder.model.decoder(
                input_ids=tokens.reshape(B * K, 1),
                encoder_hidden_states=memory,
                encoder_attention_mask=mask.long(),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1:]
            logits = lm.heads(states)[:, :, 0] / generation_config.temperature  # [B, K, V]
            drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(B, K)
            for k in range(K):
                if 0 <= s - k < T:
                    codes[:, k, s - k] = tokens[:, k] = drawn[:, k]
                    scores[place[k, s - k], :, N_SPECIAL + k * V : N_SPECIAL + (k + 1) * V] = logits[:, k]
                else:
                    tokens[:, k] = lm.special
        return GenerateDecoderOnlyOutput(sequences=torch.cat([input_ids, flatten_codes(codes, V)], 1), scores=scores.unbind())


class FlatValue(nn.Module):
    """A value model in TRL's sense: a backbone and a linear `score` on its states."""

    base_model_prefix = "backbone"

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = Backbone(trunk)
        self.score = nn.Linear(width, 1, bias=False)


class OddShare(nn.Module):
    """The toy reward as TRL wants it: a backbone whose states count the odd ids so far, and a `score` that passes them on."""

    base_model_prefix = "backbone"

    class Counter(nn.Module):
        def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
            odd = ((input_ids % 2).float().cumsum(1) / input_ids.shape[1])[..., None]
            return BaseModelOutput(last_hidden_state=odd, hidden_states=(odd,))

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.score = self.Counter(), nn.Identity()


def trl_delay(args: argparse.Namespace, policy: Policy, prompts: list[str], turn: Turn) -> None:
    conditions = without_tempo(policy, prompts)
    value_lm = copy.deepcopy(policy.lm)
    model = FlatPolicy(policy.lm, conditions)
    width = policy.lm.config.d_model + policy.lm.n_q + 1
    value = FlatValue(FlatCausalLM(value_lm, conditions).trunk, width)
    if args.critic == "frozen":
        value.backbone.requires_grad_(False)
    trl_steps(args, policy, prompts, model, value, LORA_TARGETS, turn)


# ---- over a flat Llama -------------------------------------------------------------------------------------------------


def trl_llama(args: argparse.Namespace, policy: Policy, prompts: list[str], turn: Turn) -> None:
    """Layers of our width with as many heads; the feed-forward width makes a layer as large as ours with its cross-attention."""
    shape, lm = policy.lm.config, policy.lm
    wanted = sum(p.numel() for p in lm.parameters())
    config = LlamaConfig(
        vocab_size=N_SPECIAL + lm.n_q * lm.card + len(prompts),
        hidden_size=shape.d_model,
        intermediate_size=(4 * shape.d_model**2 + 2 * shape.d_model * shape.d_ff) // (3 * shape.d_model),
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=lm.n_q * args.frames + 8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        num_labels=1,
    )
    torch.manual_seed(0)
    model, value = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    found = sum(p.numel() for p in model.parameters())
    assert abs(found / wanted - 1) < 0.02, f"a Llama of {found} parameters beside our {wanted}"
    model.generation_config.eos_token_id = None  # a clip has a fixed length
    if args.critic == "frozen":
        value.model.requires_grad_(False)
    trl_steps(args, policy, prompts, model, value, LLAMA_LORA, turn)


def trl_steps(args: argparse.Namespace, policy: Policy, prompts: list[str], model: Any, value: Any, targets: str, turn: Turn) -> None:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    lm = policy.lm
    K, V = lm.n_q, lm.card
    play = {"seconds": 0.0}
    sample = model.generate

    def timed_sample(**kwargs: Any) -> Any:
        began = time.perf_counter()
        made = sample(**kwargs)
        play["seconds"] = time.perf_counter() - began
        return made

    model.generate = timed_sample

    class Hands(TrainerCallback):
        """Hands over to the benchmark at the beginning and after every step."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn(play=play["seconds"], **held(trainer.model, optimizer=trainer.optimizer))

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=args.precision == "bf16",
            gradient_checkpointing=False,  # it would save memory by computing twice
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=args.minibatches,
            num_ppo_epochs=args.epochs,
            total_episodes=args.batch * 10_000,
            response_length=K * args.frames,
            local_rollout_forward_batch_size=args.batch,
            num_sample_generations=0,
            temperature=1.0,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"input_ids": [[prompt_id(row, K, V)] for row in range(len(prompts))]})
        trainer = PPOTrainer(
            args=config,
            processing_class=make_tokenizer(K, V, len(prompts)),
            model=model,
            ref_model=None,
            reward_model=OddShare(),
            value_model=value,
            train_dataset=data,
            peft_config=LoraConfig(r=Config.r, lora_alpha=int(Config.alpha), lora_dropout=0.0, target_modules=targets, bias="none"),
            callbacks=[Hands()],
        )
        trainer.train()
