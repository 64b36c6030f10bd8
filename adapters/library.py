"""Adapters as folders that say what they are, where they came from, and which base they belong to.

    adapter_model.safetensors   PEFT's names, so `peft.PeftModel.from_pretrained(lm, folder)` reads it too
    adapter_config.json         PEFT's configuration
    manifest.json               name, kind, method, base_sha256, snapshot_sha256, reward_sha256, adapter_sha256, figures, ...
    README.md                   the card

A LoRA fits any base of the same shape and then sounds like noise; so loading compares hashes and refuses another base.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from adapters.compose import LoraTensors, mix
from adapters.lora import (
    activate,
    adapter_names,
    adapter_shape,
    adapter_tensors,
    attach_lora,
    lora_config,
    remove_adapter,
    set_adapter_tensors,
)
from base_models.atomic import atomic_folder
from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.errors import UserError
from base_models.lm import MusicLM

WEIGHTS, PEFT_CONFIG, MANIFEST, CARD = "adapter_model.safetensors", "adapter_config.json", "manifest.json", "README.md"
PEFT_PREFIX = "base_model.model."
MAX_RANK = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class HasAdapters(Protocol):
    """What of a `base_models.policy.Policy` is needed here."""

    lm: MusicLM
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an adapter is and where it came from; hashes are sha256 in hex, or None where there is no such parent."""

    name: str
    base_sha256: str
    """`Policy.sha256` of the base it was trained on."""
    method: str
    """How it was made: dpo, ppo, style, mix, ..."""
    kind: str = "lora"
    snapshot_sha256: str | None = None
    reward_sha256: str | None = None
    created_at: str = ""
    licence: str = "unspecified"
    config: dict[str, Any] = field(default_factory=dict)
    """The settings of the run that made it."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured."""
    objective: dict[str, Any] = field(default_factory=dict)
    """What it was trained for: the reward's parts with their weights, as told and as the run ended, and their scales (rlhf.objective asks
    it again); empty where no reward was trained on, and for a mix."""
    adapter_sha256: str = ""
    """Over tensors, rank and alpha; filled in by save_adapter and checked by load_adapter."""


@dataclass(frozen=True)
class Adapter:
    """A folder's content, read and checked."""

    manifest: Manifest
    lora: LoraTensors
    folder: Path


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_adapter(folder: str | Path, lm: MusicLM, manifest: Manifest | Mapping[str, Any], adapter: str = "default") -> Manifest:
    """Write the adapter called `adapter` of `lm` as a folder: whole or not at all. Returns the completed manifest.

    `manifest` needs base_sha256 and method; name defaults to the folder's, created_at to now, adapter_sha256 is computed.
    """
    r, alpha = adapter_shape(lm, adapter)
    return save_lora(folder, LoraTensors(adapter_tensors(lm, adapter), r, alpha), manifest)


def save_lora(folder: str | Path, lora: LoraTensors, manifest: Manifest | Mapping[str, Any]) -> Manifest:
    """The same for tensors at hand (a mix, say)."""
    folder = Path(folder)
    values = dataclasses.asdict(manifest) if isinstance(manifest, Manifest) else dict(manifest)
    values["name"] = values.get("name") or folder.name
    values["created_at"] = values.get("created_at") or datetime.now(UTC).isoformat(timespec="seconds")
    values["adapter_sha256"] = lora_sha256(lora)
    complete = _manifest(values, str(folder))
    broken = sorted(name for name, tensor in lora.tensors.items() if not bool(torch.isfinite(tensor).all()))
    if broken:
        raise UserError(f"NaN or infinity in {broken[:3]}", "finite adapter weights", "lower the learning rate; nothing was written")
    peft_config: dict[str, Any] = lora_config(lora.r, lora.alpha, _targets(lora)).to_dict()
    peft_config = {k: sorted(v) if isinstance(v, set) else v for k, v in peft_config.items()} | {"inference_mode": True}
    _check_place(folder)
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / WEIGHTS, {PEFT_PREFIX + name: tensor for name, tensor in lora.tensors.items()})
        write_json(temporary / PEFT_CONFIG, peft_config)
        write_json(temporary / MANIFEST, dataclasses.asdict(complete))
        (temporary / CARD).write_text(card(complete, lora), encoding="utf-8")
    return complete


def _check_place(folder: Path) -> None:
    """Raises UserError where something stands that is no adapter: writing replaces the whole folder."""
    if folder.is_dir() and not (folder / PEFT_CONFIG).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder}, which holds no adapter but other files", "a new folder, or an adapter to replace", "choose another")


def save_mix(folder: str | Path, folders: Sequence[str | Path], weights: Sequence[float] | None = None, name: str = "") -> Manifest:
    """The exact weighted sum of adapters as one of its own, its rank the sum of theirs; by default their mean.

    A mean of runs that differ in their seed keeps what they share at less drift (Rame et al. 2024, "WARP: On the Benefits of Weight
    Averaged Rewarded Policies", arXiv:2406.16768).
    Raises UserError for adapters of different bases, before anything is written.
    """
    adapters, chosen = _read_weighted(folders, [1 / max(len(folders), 1)] * len(folders) if weights is None else weights)
    first = adapters[0].manifest
    for adapter in adapters:
        check_base(adapter, first.base_sha256)
    lora = mix([adapter.lora for adapter in adapters], chosen)

    def shared(key: str) -> Any:
        return getattr(first, key) if len({getattr(adapter.manifest, key) for adapter in adapters}) == 1 else None

    parts = [{"adapter_sha256": adapter.manifest.adapter_sha256, "weight": weight} for adapter, weight in zip(adapters, chosen)]
    manifest = Manifest(
        name=name or Path(folder).name,
        base_sha256=first.base_sha256,
        method="mix",
        snapshot_sha256=shared("snapshot_sha256"),
        reward_sha256=shared("reward_sha256"),
        licence=shared("licence") or "unspecified",
        config={"parts": parts},
    )
    return save_lora(folder, lora, manifest)


def lora_sha256(lora: LoraTensors) -> str:
    """Hash of what the adapter does: its tensors, rank and alpha."""
    shape = torch.tensor([float(lora.r), lora.alpha], dtype=torch.float64)
    return tensors_sha256({**lora.tensors, "r_alpha": shape})


def card(manifest: Manifest, lora: LoraTensors) -> str:
    """The README of an adapter's folder."""
    rows = [f"| {name} | {value} |" for name, value in sorted(manifest.figures.items())]
    figures = "\n".join(["| figure | value |", "|---|---|", *rows]) if rows else "None were recorded."
    return f"""# {manifest.name}

A {manifest.kind} adapter for music, rank {lora.r}, alpha {lora.alpha:g}, {len(lora.modules)} linear maps, \
{sum(t.numel() for t in lora.tensors.values()):,} parameters.

- made by: {manifest.method}, {manifest.created_at}
- base: `{manifest.base_sha256}` (any other base is refused)
- votes: {f"snapshot `{manifest.snapshot_sha256}`" if manifest.snapshot_sha256 else "none"}
- reward model: {f"`{manifest.reward_sha256}`" if manifest.reward_sha256 else "none"}
- licence: {manifest.licence}
- adapter: `{manifest.adapter_sha256}`

## Use

    encore generate "calm piano, 90 BPM" --adapter PATH/OF/THIS/FOLDER --out track.wav

With a base other than the one that ships with Encore, add `--policy` and its folder.

## Measured

{figures}
"""


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check a folder without a model. UserError: no manifest, pickled, cut or altered weights, not a plain LoRA."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} without {MANIFEST}",
            "an adapter's folder; its manifest names the base it belongs to",
            "check the path, or save the adapter again with adapters.library.save_adapter",
        )
    manifest = _manifest(read_json(folder / MANIFEST), str(folder / MANIFEST))
    tensors = load_tensors(folder / WEIGHTS)
    r, alpha = _read_peft_config(folder / PEFT_CONFIG)
    plain = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    lora = LoraTensors(plain, r, alpha)
    _check_pairs(lora, folder)
    if lora_sha256(lora) != manifest.adapter_sha256:
        raise UserError(
            f"{folder} whose weights hash to {lora_sha256(lora)}",
            f"{manifest.adapter_sha256}, as its manifest says",
            "copy the folder again; a file in it was changed or swapped",
        )
    return Adapter(manifest, lora, folder)


def load_adapter(
    policy: HasAdapters,
    folders: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None = None,
    trainable: bool = False,
) -> list[Manifest]:
    """Put one adapter, or the exact weighted sum of several, into `policy.lm`, and make it the only active one.

    Args: weights: one a folder, 1 by default; any real number. trainable: give the adapter gradients (to train it on).
    Returns: the manifests, in the order of `folders`. The adapter stands in the LM under its name, a sum under "mix"; one of
    the same name is replaced, others stay, inactive. Raises UserError for another base, before anything is changed.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    adapters, chosen = _read_weighted(paths, [1.0] * len(paths) if weights is None else weights)
    for adapter in adapters:
        check_base(adapter, policy.sha256)
    single = len(adapters) == 1 and chosen[0] == 1.0
    lora = adapters[0].lora if single else mix([adapter.lora for adapter in adapters], chosen)
    name = adapters[0].manifest.name if single else "mix"
    put_lora(policy.lm, lora, name, trainable)
    return [adapter.manifest for adapter in adapters]


def _read_weighted(folders: Sequence[str | Path], weights: Sequence[float]) -> tuple[list[Adapter], list[float]]:
    """Adapters and their weights. Raises UserError for none, and for weights that do not fit."""
    if not folders:
        raise UserError("no adapter folders", "at least one", "name a folder")
    chosen = [float(weight) for weight in weights]
    if len(chosen) != len(folders) or not all(math.isfinite(weight) for weight in chosen):
        raise UserError(f"weights {chosen} for {len(folders)} adapters", "one finite number an adapter", "correct the weights")
    return [read_adapter(path) for path in folders], chosen


def put_lora(lm: MusicLM, lora: LoraTensors, name: str, trainable: bool = False) -> None:
    """Put tensors into `lm` as the adapter `name` and make it the only active one. Nothing is changed when they do not fit."""
    linears = dict(lm.named_modules())
    for module in lora.modules:
        linear = linears.get(module)
        linear = linear.get_base_layer() if isinstance(linear, LoraLayer) else linear
        expected = tuple(linear.weight.shape) if isinstance(linear, torch.nn.Linear) else None
        found = (lora.tensors[f"{module}.lora_B.weight"].shape[0], lora.tensors[f"{module}.lora_A.weight"].shape[1])
        if found != expected:
            raise UserError(f"an adapter for a {found} map at {module}", f"{expected}", "use the base it was trained on")
    before = adapter_names(lm)
    if name in before:
        remove_adapter(lm, name)
    attach_lora(lm, lora.r, lora.alpha, _targets(lora), name)
    set_adapter_tensors(lm, lora.tensors, name)
    activate(lm, name, trainable=trainable)


def unload_adapters(lm: MusicLM) -> None:
    """Take every adapter out of `lm`: the base again."""
    for name in adapter_names(lm):
        remove_adapter(lm, name)


def check_base(adapter: Adapter, base_sha256: str) -> None:
    """Raises UserError, with both hashes, when the adapter belongs to another base."""
    if adapter.manifest.base_sha256 != base_sha256:
        raise UserError(
            f"adapter {adapter.manifest.name!r} of base {adapter.manifest.base_sha256}",
            f"an adapter of this base, {base_sha256}",
            "load the policy it was trained on, or train the adapter anew on this one",
        )


def list_adapters(root: str | Path) -> list[Manifest]:
    """The manifests of all adapters at any depth under `root`, newest last.

    A folder is an adapter when it holds an adapter_config.json: reward models and corpora have manifests of their own.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}", "a folder of adapters", "check the path")
    paths = [path for path in root.rglob(MANIFEST) if (path.parent / PEFT_CONFIG).is_file()]
    found = [_manifest(read_json(path), str(path)) for path in paths]
    return sorted(found, key=lambda manifest: (manifest.created_at, manifest.name))


def find_adapter(root: str | Path, name: str) -> Path:
    """The folder of the adapter called `name` under `root`. A name is one word: no separators, no `..`."""
    if not _NAME.fullmatch(name):
        raise UserError(f"adapter name {name!r}", "letters, digits, - and _, at most 64", "give the adapter's plain name")
    folder = Path(root) / name
    if not (folder / MANIFEST).is_file():
        names = sorted(path.parent.name for path in Path(root).glob(f"*/{MANIFEST}"))
        raise UserError(f"no adapter {name!r} in {root}", f"one of {names}", "check the name")
    return folder


# ---- checks ----------------------------------------------------------------------------------------------------------


def _manifest(values: Any, where: str) -> Manifest:
    known = {f.name for f in dataclasses.fields(Manifest)}
    needed = {"name", "base_sha256", "method"}
    if not isinstance(values, Mapping) or set(values) - known or needed - set(values):
        found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
        raise UserError(f"{where} with {found}", f"{sorted(needed)} and some of {sorted(known - needed)}", "correct the manifest")
    manifest = Manifest(**values)
    if not _NAME.fullmatch(manifest.name):
        raise UserError(f"adapter name {manifest.name!r}", "letters, digits, - and _, at most 64", "give it a plain name")
    if hasattr(torch.nn.ModuleDict(), manifest.name):  # PEFT keeps adapters in one, by their names
        raise UserError(f"adapter name {manifest.name!r}, which torch's modules use themselves", "another name", "call it something else")
    if not re.fullmatch(r"[0-9a-f]{64}", manifest.base_sha256):
        raise UserError(f"base_sha256 {manifest.base_sha256!r}", "64 hex digits", "give Policy.sha256")
    return manifest


def _read_peft_config(path: Path) -> tuple[int, float]:
    """(r, alpha) of a plain LoRA; every variant that scales or adds differently is refused, as it would load wrongly."""
    config = read_json(path)
    variants = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication")
    active = [name for name in variants if config.get(name)]
    r, alpha = config.get("r"), config.get("lora_alpha")
    plain = config.get("peft_type") == "LORA" and not active and config.get("bias", "none") == "none"
    if not plain or not isinstance(r, int) or not 1 <= r <= MAX_RANK or not isinstance(alpha, int | float):
        raise UserError(f"{path} with {active or config.get('peft_type')}, r {r}", "a plain LoRA", "convert it to a plain LoRA")
    return r, float(alpha)


def _check_pairs(lora: LoraTensors, folder: Path) -> None:
    keys = {f"{module}.lora_{side}.weight" for module in lora.modules for side in "AB"}
    if not keys or keys != set(lora.tensors) or any(t.dim() != 2 for t in lora.tensors.values()):
        raise UserError(f"{folder} with tensors {sorted(keys ^ set(lora.tensors))[:3]}", "a lora_A and a lora_B a map", "restore it")
    for module in lora.modules:
        a: Tensor = lora.tensors[f"{module}.lora_A.weight"]
        b: Tensor = lora.tensors[f"{module}.lora_B.weight"]
        if not a.shape[0] == b.shape[1] == lora.r:
            raise UserError(f"{module} of rank {a.shape[0]}, {b.shape[1]}", f"rank {lora.r} as configured", "restore the folder")


def _targets(lora: LoraTensors) -> str:
    """Exactly the modules that have tensors, as a regular expression for PEFT."""
    return "|".join(re.escape(module) for module in lora.modules)
