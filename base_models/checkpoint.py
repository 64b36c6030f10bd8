"""Files that last: atomic, hashed, without pickle; and training states that a `kill -9` cannot spoil.

Weights and optimiser moments are safetensors, everything else is JSON. A folder is written under a temporary name, flushed to
the disk and renamed, so that at every moment either the old or the new one is whole.

    run/config.json   run/metrics.jsonl   run/checkpoints/step_00000200/{state.json, lm.safetensors, optimizer.safetensors}
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from base_models.atomic import atomic_file, atomic_folder
from base_models.errors import UserError

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


# ---- single files ----------------------------------------------------------------------------------------------------


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, since other readers of JSON cannot read them."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}", "a JSON file there", "check the folder's path")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {error}", "valid JSON", "restore the file; it was cut or edited") from error


def append_jsonl(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Add one line to a metrics file."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(dict(row), ensure_ascii=False) + "\n")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line; empty lines are passed over.

    Only a newline ends a row: text inside one may hold U+2028 and its like, at which `str.splitlines` would cut.
    """
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def file_sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ---- tensors ---------------------------------------------------------------------------------------------------------


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. A full disk is the OSError that it is."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            safetensors.torch.save_file(plain, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            if (code := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read safetensors. Pickled weights are refused by name, a cut or foreign file by its content."""
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise UserError(f"pickled weights {path.name}", "a .safetensors file", "convert them: pickle can run any code")
    if not path.is_file():
        pickled = sorted(p.name for p in path.parent.glob("*") if p.suffix in PICKLE_SUFFIXES)
        found = f"no {path.name} in {path.parent}" + (f", only pickled weights {pickled}" if pickled else "")
        raise UserError(found, "a .safetensors file there", "check the path, or convert the weights to safetensors")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: {error}", "whole safetensors", "copy the file again; it is cut or damaged") from error


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash over names, types, shapes and bytes, in the order of names: equal exactly when the tensors are."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- training states -------------------------------------------------------------------------------------------------


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every random stream of this process: torch (CPU and CUDA) as tensors, numpy and Python as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    plain = {
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }
    return tensors, plain


def set_rng_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"].cpu())
    if torch.cuda.is_available() and "cuda0" in tensors:
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:  # more may be visible now than were when it was saved
                torch.cuda.set_rng_state(tensors[f"cuda{i}"].cpu(), i)
    kind, keys, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = plain["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Split a nested state dict into tensors (by key path) and JSON that refers to them."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"__tensor__": key}
    if isinstance(value, Mapping):
        return {"__dict__": [[k, _pack(v, f"{key}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(v, f"{key}.{i}", tensors) for i, v in enumerate(value)]
        return {"__tuple__": packed} if isinstance(value, tuple) else packed
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        if "__tuple__" in value:
            return tuple(_unpack(v, tensors) for v in value["__tuple__"])
        return {k: _unpack(v, tensors) for k, v in value["__dict__"]}
    return value


def save_training_state(
    run_dir: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    states: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    also: Callable[[Path], object] | None = None,
) -> Path:
    """Write `run_dir/checkpoints/step_XXXXXXXX`, whole or not at all, and keep the newest `keep` of them.

    Args: tensors: name -> state dict of tensors (a model's weights). states: name -> any nested state dict (an optimiser's,
    a scheduler's, a controller's). extra: plain JSON. The random streams of this process are always included. also: writes further files
    into the folder before it counts.
    """
    folder = Path(run_dir) / "checkpoints" / f"step_{step:08d}"
    rng_tensors, rng_plain = rng_state()
    with atomic_folder(folder) as temporary:
        for name, group in tensors.items():
            save_tensors(temporary / f"{name}.safetensors", group)
        packed: dict[str, Tensor] = {}
        description = {name: _pack(state, name, packed) for name, state in (states or {}).items()}
        save_tensors(temporary / "states.safetensors", packed)
        save_tensors(temporary / "rng.safetensors", rng_tensors)
        content = {
            "step": step,
            "states": description,
            "rng": rng_plain,
            "extra": dict(extra or {}),
            "groups": list(tensors),
        }
        write_json(temporary / "state.json", content)
        if also is not None:
            also(temporary)
    for old in _checkpoints(run_dir)[:-keep]:
        old.rename(old.with_name(f".old-{old.name}"))  # at once no checkpoint any more: a kill must leave no half of one
    for pattern in (".old-*", ".tmp-*"):  # of this run, or of a killed one: nobody else writes here
        for old in folder.parent.glob(pattern):
            shutil.rmtree(old)
    return folder


def _checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    folder = Path(run_dir) / "checkpoints"
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and (p / "state.json").is_file()]
    return sorted(found)


def latest_training_state(run_dir: str | os.PathLike[str], parents: Mapping[str, Any] | None = None) -> Path | None:
    """The newest whole checkpoint of a run, or None. `parents`: what its `extra` must say; raises UserError where it says otherwise."""
    found = _checkpoints(run_dir)
    if not found:
        return None
    known = read_json(found[-1] / "state.json")["extra"] if parents else {}
    for name, value in (parents or {}).items():
        if value is not None and name not in known:
            got = f"{found[-1]} without {name}: an earlier version began it, or another script"
            raise UserError(got, "a checkpoint of this one", "go on with what began it, or start a new --out")
        if known.get(name) != value:
            got = f"{found[-1]} of {name} {known.get(name)}, now {value}"
            raise UserError(got, "the same one", "resume with it, or start a new --out")
    return found[-1]


def refuse_another_run(run_dir: str | os.PathLike[str], resume: bool) -> None:
    """UserError where a run would begin in a folder with another one's checkpoints."""
    if not resume and _checkpoints(run_dir):
        raise UserError(f"{run_dir} with checkpoints of another run", "a new folder", "add --resume, or choose another --out")


def load_training_state(
    folder: str | os.PathLike[str], restore_rng: bool = True
) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """The inverse of save_training_state: (step, tensors, states, extra); sets the random streams unless told not to."""
    folder = Path(folder)
    content = read_json(folder / "state.json")
    tensors = {name: load_tensors(folder / f"{name}.safetensors") for name in content["groups"]}
    packed = load_tensors(folder / "states.safetensors")
    states = {name: _unpack(value, packed) for name, value in content["states"].items()}
    if restore_rng:
        set_rng_state(load_tensors(folder / "rng.safetensors"), content["rng"])
    return int(content["step"]), tensors, states, content["extra"]
