"""The house holds together: packages, layers, lock, launch configurations, containers, documents."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.models.musicgen import modeling_musicgen

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = ("adapters", "base_models", "db", "feedback_app", "rlhf")
LOCK = (ROOT / "requirements.lock").read_text()
PINS = {canonicalize_name(r.name): r for r in (Requirement(x) for x in LOCK.splitlines() if x and not x.startswith("#"))}
ALONE = set(runpy.run_path(str(ROOT / ".ci" / "lock.py"))["ALONE"])
DECLARED = [
    Requirement(text)
    for text in [
        *PROJECT["project"]["dependencies"],
        *(line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra),
    ]
]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def own_files(*suffixes: str) -> Iterator[Path]:
    """The project's own text files."""
    for top in (*TOP_LEVEL, "tests", "docs", "configs", "benchmarks", ".ci"):
        yield from (p for p in (ROOT / top).rglob("*") if p.is_file() and p.suffix in suffixes)
    yield from (p for p in ROOT.iterdir() if p.is_file() and p.suffix in suffixes)


# ---- packages and layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_a_top_level_name_means_our_package_also_from_another_folder(name: str, tmp_path: Path) -> None:
    code = f"import {name}; print({name}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / name / "__init__.py"


def test_the_unrelated_adapters_distribution_is_not_installed() -> None:
    assert "adapters" not in {canonicalize_name(d.metadata["Name"]) for d in importlib.metadata.distributions()}


def test_the_package_list_is_what_stands_on_the_disk() -> None:
    found = {".".join(p.parent.relative_to(ROOT).parts) for top in TOP_LEVEL for p in (ROOT / top).rglob("__init__.py")}
    assert sorted(found) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_with_python_code_is_a_package() -> None:
    folders = {p.parent for top in TOP_LEVEL for p in (ROOT / top).rglob("*.py")}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


@pytest.mark.parametrize("package", PROJECT["tool"]["setuptools"]["packages"])
def test_a_package_file_is_a_docstring_and_nothing_else(package: str) -> None:
    body = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text()).body
    assert len(body) <= 1
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def test_no_module_shadows_one_of_the_standard_library_or_a_dependency_when_launched_as_a_file() -> None:
    taken = set(sys.stdlib_module_names) | {"datasets", "evaluate", "torch", "transformers", "trl", "peft", "accelerate", "gradio"}
    modules = [p for top in TOP_LEVEL for p in (ROOT / top).rglob("*.py") if p.stem != "__init__"]
    assert [str(p.relative_to(ROOT)) for p in modules if p.stem in taken] == []


def test_imports_run_downwards_only() -> None:
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the lock ----------------------------------------------------------------------------------------------------------


def test_the_lock_is_nothing_but_exact_pins() -> None:
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert [x for x in lines if not re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.]+( ; python_version >= \"3\.\d+\")?", x, re.IGNORECASE)] == []
    assert lines == sorted(set(lines), key=lambda line: canonicalize_name(line.split("==")[0]))


def test_torch_and_trl_are_locked_to_the_versions_that_were_tested() -> None:
    assert str(PINS["torch"].specifier) == "==2.13.0"
    assert str(PINS["trl"].specifier) == "==1.16.0"


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda r: r.name)
def test_the_lock_satisfies_what_pyproject_declares(requirement: Requirement) -> None:
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(next(iter(pin.specifier)).version, prereleases=True)


def test_the_lock_holds_everything_that_its_packages_need_but_for_those_that_stand_alone() -> None:
    """`make setup` installs with --no-deps, so a missing line is a missing module. Walks what is installed here, extras included."""
    missing, seen = set(), set()
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in DECLARED]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in PINS:
            missing.add(name)
            continue
        if name in ALONE:
            continue
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                todo.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    cuda = {name for name in missing if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    assert missing - cuda == set()


@pytest.mark.parametrize("name", sorted(ALONE))
def test_a_package_that_is_locked_alone_is_there_without_what_it_drags_in(name: str) -> None:
    assert name in PINS
    assert {"pyaudio", "sentence-transformers", "webcolors", "mido"}.isdisjoint(PINS)


def test_the_environment_holds_versions_that_pyproject_allows() -> None:
    wrong = [str(r) for r in DECLARED if not r.specifier.contains(Version(importlib.metadata.version(r.name)).public, prereleases=True)]
    assert wrong == []


# ---- accelerate --------------------------------------------------------------------------------------------------------


LAUNCHES = {"cpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}


@pytest.mark.parametrize(("name", "distributed_type"), LAUNCHES.items())
def test_accelerate_reads_our_launch_configurations(name: str, distributed_type: str) -> None:
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert str(config.distributed_type).rpartition(".")[2] == distributed_type
    assert config.use_cpu == (name == "cpu")
    if distributed_type == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_every_launch_configuration_is_one_that_is_read() -> None:
    assert {p.stem for p in (ROOT / "configs" / "accelerate").glob("*.yaml")} == set(LAUNCHES)


def test_fsdp_wraps_a_layer_that_exists() -> None:
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / "fsdp2.yaml")).fsdp_config
    assert config["fsdp_version"] == 2
    assert hasattr(modeling_musicgen, config["fsdp_transformer_layer_cls_to_wrap"])


# ---- containers --------------------------------------------------------------------------------------------------------


def test_compose_pins_its_images_checks_health_and_holds_no_secret() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert {"app", "db"} <= set(services)
    for name, service in services.items():
        assert "build" in service or re.fullmatch(r"[a-z0-9/]+:\d[\w.-]*", service["image"]), name
        assert "healthcheck" in service or service.get("profiles") == ["tools"], name
        for key, value in service.get("environment", {}).items():
            assert "PASSWORD" not in key or value.startswith("${ENCORE_DB_PASSWORD:?"), key
    assert services["app"]["depends_on"]["db"]["condition"] == "service_healthy"
    assert all(port.startswith("127.0.0.1:") for port in services["app"]["ports"])


def test_compose_builds_stages_that_the_dockerfile_has() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    assert {service["build"]["target"] for service in services if "build" in service} <= stages


def test_the_dockerfile_pins_its_base_drops_root_and_copies_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    first, *others = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", first)
    assert set(others) == {"base"}
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[2:]:
        user = stage.index("USER 10001")
        assert not re.search(r"^(RUN|COPY)", stage[user:], re.MULTILINE)
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source


def test_the_rating_apps_image_leaves_out_packages_that_the_lock_names() -> None:
    left_out = re.search(r"grep -vE '\^\((.+?)\)=='", (ROOT / "Dockerfile").read_text())
    assert left_out is not None
    assert set(left_out.group(1).split("|")) <= set(PINS)


def test_the_rating_app_starts_without_what_its_image_leaves_out(tmp_path: Path) -> None:
    left_out = re.search(r"grep -vE '\^\((.+?)\)=='", (ROOT / "Dockerfile").read_text())
    assert left_out is not None
    names = [name.replace("-", "_").replace("grpcio", "grpc") for name in left_out.group(1).split("|")]
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
from feedback_app.app import create_app
create_app("sqlite:///{tmp_path}/votes.db", secret="a secret for this test")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- make, hooks and scripts -------------------------------------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_command_in_the_documents_exists() -> None:
    named = {
        t
        for d in DOCUMENTS
        for span in re.findall(r"```.*?```|`[^`\n]+`", d.read_text(), re.DOTALL)
        for t in re.findall(r"\bmake ([a-z]+)", span)
    }
    assert {"setup", "check", "test", "demo", "app"} <= named
    assert named <= make_targets()


@pytest.mark.parametrize("target", ["help", "setup", "check", "test", "demo", "app", "lock", "clean"])
def test_make_knows_how_to_make(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", [".ci/run", ".ci/make_venv", "tests/ensure_browser"])
def test_a_shell_script_is_executable_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_an_old_python_is_refused_with_a_remedy(tmp_path: Path) -> None:
    old = tmp_path / "bin" / "python3"
    old.parent.mkdir()
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    venv = tmp_path / "venv"
    done = subprocess.run([bash, ROOT / ".ci" / "make_venv", venv], env={"PATH": str(old.parent)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "got Python 3.9.2; expected Python 3.11 or newer; remedy: install it" in done.stderr
    assert not venv.exists()


def test_commit_hooks_are_local_and_run_tools_of_the_environment() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    tools = {hook["entry"].split()[0] for hook in repos[0]["hooks"]}
    assert tools == {".venv/bin/ruff", ".venv/bin/lint-imports", ".venv/bin/mypy"}


# ---- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_inside_the_repository_resolves(document: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if not re.match(r"[a-z]+:", link)]
    there = {link: document.parent / name if (name := link.split("#")[0]) else document for link in links}
    assert [link for link, place in there.items() if not place.exists()] == []
    to_headings = {link: place for link, place in there.items() if "#" in link and place.suffix == ".md"}
    assert [link for link, place in to_headings.items() if link.split("#")[1] not in anchors(place)] == []


def anchors(page: Path) -> set[str]:
    """Headings as links name them: in small letters, without marks, - for a space."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_scripts_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"\b((?:base_models|rlhf|adapters|feedback_app)/\w+\.py)\b", (ROOT / "README.md").read_text()))
    assert {"rlhf/train_reward.py", "rlhf/train_dpo.py", "rlhf/train_ppo.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_decisions_are_numbered_without_gaps_and_have_their_three_parts() -> None:
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(p.name[:4]) for p in records] == list(range(1, len(records) + 1))
    for record in records:
        assert re.findall(r"^## (\w+)", record.read_text(), re.MULTILINE) == ["Context", "Decision", "Consequences"]


def test_the_licence_is_apache_2_and_pyproject_says_so() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_names_one_persons_machine_or_a_package_index() -> None:
    private = re.compile(
        r"(?<![\w.])/(?:work|root|Users|home/\w+)/|" + "|".join(["pypi" + r"\.org", "python" + "hosted", r"download\.pytorch"])
    )
    suffixes = (".py", ".md", ".toml", ".yaml", ".yml", ".lock", ".js", ".css", ".json", "")
    found = [
        str(p.relative_to(ROOT))
        for p in own_files(*suffixes)
        if "pretrained" not in p.parts and private.search(p.read_text(errors="ignore"))
    ]
    assert found == []
