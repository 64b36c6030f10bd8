"""A training script's settings: one frozen dataclass, filled from a preset, a file and flags, in that order of strength.

    cfg = parse(Config, presets={"smoke": {"steps": 4}})

`--preset smoke` starts from a named set of values, `--config run.toml` (or .json) overrides it, and any flag overrides both.
The attribute docstrings of the dataclass are the `--help`, so nothing is written twice.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import json
import os
import sys
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import tyro
from tqdm import tqdm

from base_models.errors import UserError, disk_trouble

Config = TypeVar("Config")
Result = TypeVar("Result")


def parse(
    config_class: type[Config],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    argv: Sequence[str] | None = None,
    *,
    say: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Config:
    """Fill `config_class` from `argv` (default: the command line).

    Args: config_class: a frozen dataclass whose fields have defaults. presets: name -> field values. say: name of a preset -> what it is
    for, told instead of what it sets. groups: title -> names of the fields that `--help` shows under it, as "lr epochs"; the other fields
    stand under "run".
    Returns: an instance. Raises UserError for an unknown preset, file or field; exits 2 on an unknown flag (as tyro does).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    presets = presets or {}
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--preset", choices=None)
    pre.add_argument("--config", type=Path)
    known, rest = pre.parse_known_args(argv)
    values: dict[str, Any] = {}
    if known.preset is not None:
        if known.preset not in presets:
            raise UserError(f"--preset {known.preset}", f"one of {sorted(presets)}", "name one of these presets")
        values.update(presets[known.preset])
    if known.config is not None:
        values.update(_read(known.config))
    default = from_mapping(config_class, values)
    sources = [("config", "FILE", "A .toml or .json file of any of the values below; it overrides --preset, and flags override it.")]
    if presets:
        sources.insert(0, ("preset", "NAME", _about(presets, say or {})))
    form, filled = _form(default, sources, groups or {})
    about = config_class.__doc__ or ""
    description = (
        "" if about.startswith(f"{config_class.__name__}(") else about.partition("\n\n")[0]
    )  # a dataclass without one lists its fields
    found = tyro.cli(form, args=rest, default=filled, description=description, config=(tyro.conf.OmitArgPrefixes,))
    parts = [getattr(found, field.name) for field in dataclasses.fields(form)[len(sources) :]]
    return config_class(**{field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)})


def _about(presets: Mapping[str, Mapping[str, Any]], say: Mapping[str, str]) -> str:
    """What --help tells of `--preset`: a line for each."""
    lines = [f"  {name}: {say[name] if name in say else 'sets ' + ', '.join(presets[name])}" for name in presets]
    return "\n".join(["A named set of values to start from; `--preset X --help` shows its values.", *lines])


def _form(default: Any, sources: Sequence[tuple[str, str, str]], groups: Mapping[str, str]) -> tuple[type, Any]:
    """What tyro shows and fills, and with which defaults: the options of `sources` (name, metavar, help), which were read already, then
    for each group a dataclass of its fields. tyro makes a group of options of each inner dataclass, and the settings stay a flat one."""
    names = [field.name for field in dataclasses.fields(default)]
    grouped = [name for group in groups.values() for name in group.split()]
    assert len(set(grouped)) == len(grouped), f"a field in two groups: {grouped}"
    assert set(grouped) <= set(names), f"groups of {set(grouped) - set(names)}, which are no fields"
    kinds, told = get_type_hints(type(default), include_extras=True), attribute_docstrings(type(default))
    form: list[Any] = []
    for name, metavar, text in sources:
        how = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")
        form.append((name, Annotated[str | None, how], None))
    for title, group in {"run" if groups else "": " ".join(name for name in names if name not in grouped), **groups}.items():
        rows = [(name, Annotated[kinds[name], tyro.conf.arg(help=told.get(name))], getattr(default, name)) for name in group.split()]
        part = _dataclass("Part", rows)
        form.append((f"part_{len(form)}", Annotated[part, tyro.conf.arg(name=title, help="")], part()))
    made = _dataclass("Form", form)
    return made, made()


def _dataclass(name: str, rows: Sequence[tuple[str, Any, Any]]) -> type:
    """A frozen dataclass of fields (name, type, default)."""
    fields = [(field, kind, dataclasses.field(default_factory=functools.partial(copy.copy, value))) for field, kind, value in rows]
    return dataclasses.make_dataclass(name, fields, frozen=True)


def attribute_docstrings(config_class: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source, on one line; fields of parent classes too. Nothing without a source."""
    told: dict[str, str] = {}
    for kind in reversed(config_class.__mro__):
        try:
            (made,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        except (OSError, TypeError):
            continue
        assert isinstance(made, ast.ClassDef)
        for field, below in zip(made.body, made.body[1:]):
            said = below.value if isinstance(below, ast.Expr) else None
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(said, ast.Constant):
                told[field.target.id] = " ".join(str(said.value).split())
    return told


def run(
    main: Callable[[Config], Result],
    config_class: type[Config],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    show: Callable[[Result], str] | None = None,
    *,
    say: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
) -> NoReturn:
    """A script's last line: parse, run, print what `show` says of the result (on the first process alone). say, groups: as of `parse`.

    Bad input and a disk in trouble end it with exit code 2 and one line on stderr; ERROR_FILE has the error then, for a program.
    """
    threading.excepthook = _quiet_on_disk_trouble
    with _running:
        exit_code = _run(main, lambda: parse(config_class, presets, say=say, groups=groups), show)
    if _kept:
        for _ in range(25):  # whatever waits for Python's lock gets it
            time.sleep(0.02)
        _kept.clear()
    # Here nothing refers to the run any more, but its model and trainer hold each other, and with them gloo's process group, which has
    # threads of its own even when it has been destroyed. Left to themselves they live while Python shuts down, and the first that then
    # drops a tensor ends the process by SIGABRT ("terminate called without an active exception"), after all has gone well. So they end now.
    gc.collect()
    sys.exit(exit_code)


ERROR_FILE = "ENCORE_ERROR_FILE"
"""The variable by which whoever starts a script names a file for the error that ends it: {"error", "got", "expected", "remedy"} in JSON."""
_running, _kept = threading.Lock(), list[object]()


def keep_until_the_end(thing: object) -> None:
    """Let a process group outlive the `main` of `run`; without a run, nothing. Its destructor waits for gloo's threads and holds Python's
    lock meanwhile, while a thread that has just finished the last collective may need that lock to drop a tensor: on a busy machine the
    two wait for each other for ever."""
    if _running.locked():
        _kept.append(thing)


def _run(main: Callable[[Config], Result], parsed: Callable[[], Config], show: Callable[[Result], str] | None) -> int:
    """The exit code. A function of its own, so that neither a result nor an error, whose traceback holds the frames of `main`, outlives it.

    A process group that an error left open stays open: closing it waits for what other processes may never answer.
    """
    error_file = os.environ.pop(ERROR_FILE, None)  # it is not for the errors of programs that the script itself starts
    try:
        try:
            result = main(parsed())
        except OSError as error:
            if (trouble := disk_trouble(error)) is None:
                raise
            raise trouble from error
    except UserError as error:
        tqdm.write(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)  # on a line of its own, also under a progress bar
        if error_file is not None:
            told = {"error": type(error).__name__, "got": error.got, "expected": error.expected, "remedy": error.remedy}
            with contextlib.suppress(OSError):
                Path(error_file).write_text(json.dumps(told), encoding="utf-8")
        return error.exit_code
    if show is not None and int(os.environ.get("RANK", "0")) == 0:
        print(show(result))
    return 0


def _quiet_on_disk_trouble(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own, and hands what went wrong there to the next call from ours, which tells it in one line:
    its own report of the same trouble would only bury that line. Everything else in a thread is reported as ever."""
    if isinstance(failed.exc_value, OSError) and disk_trouble(failed.exc_value) is not None:
        return
    threading.__excepthook__(failed)


def from_mapping(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """An instance of a dataclass from plain values: strings become paths where the field is a path, lists become tuples."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"settings {unknown}", f"some of {sorted(fields)}", "correct the names in the settings file")
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        kind = str(fields[name].type)
        if isinstance(value, str) and "Path" in kind:
            value = Path(value)
        kwargs[name] = tuple(value) if isinstance(value, list) and "tuple" in kind else value
    return config_class(**kwargs)


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse: a dict that JSON can hold (paths as strings, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--config {path}, which is no file", "a .toml or .json file", "check the path")
    text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: {error}", "valid TOML or JSON", "correct the file") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holding {type(data).__name__}", "a table of settings", "write name = value lines")
    return data
