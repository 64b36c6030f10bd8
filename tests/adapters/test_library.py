"""Adapter folders: whole, bound to their base, readable by PEFT, and refused when they are not what they say."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel

from adapters.library import Manifest, find_adapter, list_adapters, load_adapter, read_adapter, save_adapter, save_mix, unload_adapters
from adapters.lora import active_adapters, attach_lora, trainable_parameters
from base_models.errors import UserError
from rlhf.cli import main


@pytest.fixture
def saved(make_tiny, tmp_path):
    """A trained-looking adapter on disk, its policy, and what it makes the policy say."""
    source = make_tiny(0)
    attach_lora(source.lm, r=4, alpha=8, init_b=True)
    manifest = Manifest(name="warm", base_sha256=source.sha256, method="dpo", figures={"kl_nats": 1.5}, licence="CC0-1.0")
    save_adapter(tmp_path / "warm", source.lm, manifest)
    return source, tmp_path / "warm"


def test_a_saved_adapter_speaks_the_same_after_loading(saved, make_tiny):
    source, folder = saved
    other = make_tiny(0)
    before = other.logps()
    manifests = load_adapter(other, folder)
    assert torch.equal(other.logps(), source.logps())
    assert [m.name for m in manifests] == active_adapters(other.lm) == ["warm"]
    assert trainable_parameters(other.lm) == []
    unload_adapters(other.lm)
    assert torch.equal(other.logps(), before)


def test_a_saved_mean_speaks_as_a_loaded_one_and_names_its_parts(saved, make_tiny, tmp_path):
    source, folder = saved
    second = make_tiny(0)
    attach_lora(second.lm, r=2, alpha=4, init_b=True)
    save_adapter(tmp_path / "cold", second.lm, Manifest(name="cold", base_sha256=source.sha256, method="dpo", licence="CC-BY-4.0"))
    told = save_mix(tmp_path / "mean", [folder, tmp_path / "cold"])
    loaded, mixed = make_tiny(0), make_tiny(0)
    load_adapter(loaded, [folder, tmp_path / "cold"], [0.5, 0.5])
    load_adapter(mixed, tmp_path / "mean")
    torch.testing.assert_close(mixed.logps(), loaded.logps(), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(mixed.logps(), source.logps(), atol=1e-3)
    assert (told.name, told.method, told.licence) == ("mean", "mix", "unspecified")
    assert [part["weight"] for part in told.config["parts"]] == [0.5, 0.5]
    assert told.config["parts"][0]["adapter_sha256"] == read_adapter(folder).manifest.adapter_sha256


def test_the_command_mixes_as_it_is_told_and_lists_what_it_wrote(saved, make_tiny, tmp_path, capsys):
    _, folder = saved
    mixed = ["adapters", "mix", str(folder), str(folder), "--weight", "0.5", "--weight", "-0.5", "--name", "nothing", "--out"]
    assert main([*mixed, str(tmp_path / "mixes" / "mix")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], [part["weight"] for part in told["config"]["parts"]]) == ("nothing", [0.5, -0.5])
    silent = make_tiny(0)
    before = silent.logps()
    load_adapter(silent, tmp_path / "mixes" / "mix")
    torch.testing.assert_close(silent.logps(), before, atol=1e-6, rtol=1e-6)  # an adapter less itself
    assert main(["adapters", "list", str(tmp_path / "mixes")]) == 0
    assert "nothing" in capsys.readouterr().out
    assert main([*mixed[:4], "--weight", "1", "--out", str(tmp_path / "one")]) == 2  # two adapters, one weight
    assert "weight" in capsys.readouterr().err


def test_an_adapter_replaces_an_adapter_and_never_a_folder_of_other_things(saved, tmp_path):
    source, folder = saved
    assert save_mix(tmp_path / "mean", [folder]).name == "mean"
    assert save_mix(tmp_path / "mean", [folder, folder]).config["parts"][1]["weight"] == 0.5
    (tmp_path / "music").mkdir()
    save_adapter(tmp_path / "music", source.lm, Manifest(name="song", base_sha256=source.sha256, method="dpo"))
    (tmp_path / "runs" / "ppo").mkdir(parents=True)
    (tmp_path / "runs" / "ppo" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no adapter but other files"):
        save_mix(tmp_path / "runs", [folder])
    assert (tmp_path / "runs" / "ppo" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["train", "values", "half"])
def test_a_name_by_which_no_model_can_hold_an_adapter_is_refused_before_it_is_written(name, saved, tmp_path):
    _, folder = saved
    with pytest.raises(UserError, match=f"adapter name '{name}', which torch's modules use"):
        save_mix(tmp_path / name, [folder])
    assert not (tmp_path / name).exists()
    assert save_mix(tmp_path / name, [folder], name="other").name == "other"


def test_adapters_of_two_bases_make_no_mean(saved, make_tiny, tmp_path):
    _, folder = saved
    other = make_tiny(1)
    attach_lora(other.lm, r=4, alpha=8)
    save_adapter(tmp_path / "other", other.lm, Manifest(name="other", base_sha256=other.sha256, method="dpo"))
    with pytest.raises(UserError, match="of base"):
        save_mix(tmp_path / "mean", [folder, tmp_path / "other"])
    with pytest.raises(UserError, match="one finite number an adapter"):
        save_mix(tmp_path / "mean", [folder], [float("nan")])
    with pytest.raises(UserError, match="no adapter folders"):
        save_mix(tmp_path / "mean", [])
    assert not (tmp_path / "mean").exists()


def test_the_folder_is_complete_and_its_card_tells_the_figures(saved):
    _, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    card = (folder / "README.md").read_text()
    assert "| kl_nats | 1.5 |" in card
    assert "CC0-1.0" in card
    assert "--adapter PATH/OF/THIS/FOLDER" in card  # not a name, which nothing would find
    assert read_adapter(folder).manifest.adapter_sha256 in card


def test_plain_peft_reads_the_folder(saved, make_tiny):
    source, folder = saved
    other = make_tiny(0)
    wrapped = PeftModel.from_pretrained(other.lm, str(folder))
    with torch.no_grad():
        got = wrapped.get_base_model().logps(source.codes, source.cond)
    assert torch.equal(got, source.logps())


def test_another_base_is_refused_with_both_hashes_and_left_untouched(saved, make_tiny):
    source, folder = saved
    other = make_tiny(1)
    before = other.logps()
    with pytest.raises(UserError) as refused:
        load_adapter(other, folder)
    assert source.sha256 in str(refused.value)
    assert other.sha256 in str(refused.value)
    assert torch.equal(other.logps(), before)


def test_a_weighted_pair_is_loaded_as_the_exact_sum(saved, make_tiny, tmp_path):
    _, folder = saved
    second = make_tiny(0)
    torch.manual_seed(7)
    attach_lora(second.lm, r=2, alpha=4, init_b=True)
    save_adapter(tmp_path / "cool", second.lm, {"base_sha256": second.sha256, "method": "style"})
    mixed, by_hand = make_tiny(0), make_tiny(0)
    load_adapter(mixed, [folder, tmp_path / "cool"], weights=[0.5, -2.0])
    with torch.no_grad():
        for part, weight in ((folder, 0.5), (tmp_path / "cool", -2.0)):
            lora = read_adapter(part).lora
            for module in lora.modules:
                by_hand.lm.get_submodule(module).weight += weight * lora.delta(module)
    torch.testing.assert_close(mixed.logps(), by_hand.logps(), atol=1e-5, rtol=0)
    assert not torch.allclose(mixed.logps(), make_tiny(0).logps(), atol=1e-4)


def test_a_cut_file_is_refused(saved, make_tiny):
    _, folder = saved
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="whole safetensors"):
        load_adapter(make_tiny(0), folder)


def test_pickled_weights_are_refused(saved, make_tiny):
    _, folder = saved
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_adapter(make_tiny(0), folder)


def test_a_folder_without_manifest_is_refused(saved, make_tiny):
    _, folder = saved
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"without manifest\.json"):
        load_adapter(make_tiny(0), folder)


def test_swapped_weights_are_refused(saved, make_tiny, tmp_path):
    _, folder = saved
    second = make_tiny(0)
    attach_lora(second.lm, r=4, alpha=8)
    save_adapter(tmp_path / "second", second.lm, {"base_sha256": second.sha256, "method": "dpo"})
    shutil.copy(tmp_path / "second" / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="hash to"):
        load_adapter(make_tiny(0), folder)


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("use_rslora", True), ("r", 0), ("peft_type", "LOHA")])
def test_variants_of_lora_are_refused_because_they_would_load_wrongly(saved, key, value):
    _, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match="a plain LoRA"):
        read_adapter(folder)


def test_an_adapter_with_nan_is_not_written(tiny, tmp_path):
    attach_lora(tiny.lm, r=2, alpha=4)
    with torch.no_grad():
        next(iter(p for n, p in tiny.lm.named_parameters() if "lora_B" in n)).fill_(float("nan"))
    with pytest.raises(UserError, match="nothing was written"):
        save_adapter(tmp_path / "broken", tiny.lm, {"base_sha256": tiny.sha256, "method": "dpo"})
    assert list(tmp_path.iterdir()) == []


def test_the_library_lists_and_finds_adapters_by_name(saved):
    _, folder = saved
    (folder.parent / "notes").mkdir()
    assert [m.name for m in list_adapters(folder.parent)] == ["warm"]
    (folder.parent / "reward").mkdir()
    (folder.parent / "reward" / "manifest.json").write_text('{"kind": "reward"}')
    assert [m.name for m in list_adapters(folder.parent)] == ["warm"]
    assert find_adapter(folder.parent, "warm") == folder
    with pytest.raises(UserError, match="no adapter 'cold'"):
        find_adapter(folder.parent, "cold")


@pytest.mark.parametrize("name", ["..", "../warm", "a/b", "", "a\\b", "/etc", "x" * 65])
def test_a_name_cannot_leave_the_library(saved, name):
    _, folder = saved
    with pytest.raises(UserError, match="adapter name"):
        find_adapter(folder.parent, name)


def test_a_manifest_must_name_a_base_by_hash(tiny, tmp_path):
    attach_lora(tiny.lm, r=2, alpha=4)
    with pytest.raises(UserError, match="64 hex digits"):
        save_adapter(tmp_path / "a", tiny.lm, {"base_sha256": "demo", "method": "dpo"})
    with pytest.raises(UserError, match="base_sha256"):
        save_adapter(tmp_path / "a", tiny.lm, {"method": "dpo"})
    assert not (tmp_path / "a").exists()
