import copy
from types import SimpleNamespace

import pytest
import torch

from base_models.checkpoint import read_json, tensors_sha256, write_json
from base_models.errors import UserError
from rlhf import reward_features as rf
from rlhf import reward_heads as rh
from rlhf import reward_model as rm
from rlhf.reward_committee import Committee
from tests.rlhf.reward_toys import codes_of, small_base


@pytest.fixture(scope="module")
def base():
    return small_base()


@pytest.fixture(scope="module")
def model(base):
    codes = codes_of(60, seed=1)
    table = rf.features(base, codes, ["p"] * 60)
    prompt = torch.arange(60) // 12
    first = torch.arange(0, 60, 2)
    gold = codes[:, 0].float().mean(1)
    chosen = torch.where(gold[first] > gold[first + 1], first, first + 1)
    pairs = rh.Pairs(chosen, 2 * first + 1 - chosen, torch.ones(30), torch.ones(30), prompt[first])
    head = rh.Head("kernel", (rf.LATENTS, rf.SHARED), 2.0)
    lens = rh.make_lens(head, table, prompt)
    members, offsets = rh.fit_ensemble(head, rh.expand(lens, head, table), pairs, 5, seed=0)
    made = rm.RewardModel(base, Committee((head,)), [lens], members, offsets, lam=0.5, temperature=0.7)
    made.snapshot_sha256 = "s" * 64
    return made


def test_saved_model_scores_the_same(model, base, tmp_path):
    model.save(tmp_path / "reward")
    loaded = rm.load_reward(tmp_path / "reward", base)
    codes = codes_of(4, seed=9)
    torch.testing.assert_close(loaded.score(codes, ["a"] * 4), model.score(codes, ["a"] * 4), atol=1e-6, rtol=1e-6)
    assert loaded.sha256 == model.sha256
    assert loaded.snapshot_sha256 == "s" * 64


def test_another_base_is_refused(model, base, tmp_path):
    model.save(tmp_path / "reward")
    other = SimpleNamespace(codec=base.codec, contrastive=base.contrastive, sha256="b" * 64)
    with pytest.raises(UserError, match="of base aaaaaaaaaaaa"):
        rm.load_reward(tmp_path / "reward", other)
    blind = SimpleNamespace(codec=base.codec, contrastive=None, sha256=base.sha256)
    with pytest.raises(UserError, match="another audio-text space"):
        rm.load_reward(tmp_path / "reward", blind)


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.1), ("lam", 0.0)])
def test_changed_settings_are_refused_and_make_another_hash(name, value, model, base, tmp_path):
    model.save(tmp_path / "reward")
    path, other = tmp_path / "reward" / "manifest.json", copy.copy(model)
    write_json(path, read_json(path) | {name: value})
    with pytest.raises(UserError, match="which was changed"):
        rm.load_reward(tmp_path / "reward", base)
    setattr(other, name, value)
    assert other.sha256 != model.sha256


def test_a_reward_whose_hash_is_of_its_tensors_alone_is_of_an_earlier_version(model, base, tmp_path):
    model.save(tmp_path / "reward")
    path = tmp_path / "reward" / "manifest.json"
    write_json(path, read_json(path) | {"reward_sha256": tensors_sha256(model.tensors())})
    with pytest.raises(UserError, match=r"earlier version.*train it again on its snapshot"):
        rm.load_reward(tmp_path / "reward", base)


def test_changed_weights_are_refused(model, base, tmp_path):
    from base_models.checkpoint import load_tensors, save_tensors

    model.save(tmp_path / "reward")
    state = load_tensors(tmp_path / "reward" / "model.safetensors")
    save_tensors(tmp_path / "reward" / "model.safetensors", state | {"offsets": state["offsets"] + 1})
    with pytest.raises(UserError, match="which was changed"):
        rm.load_reward(tmp_path / "reward", base)


def test_a_cut_file_is_refused(model, base, tmp_path):
    model.save(tmp_path / "reward")
    file = tmp_path / "reward" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="safetensors"):
        rm.load_reward(tmp_path / "reward", base)


def test_score_asks_for_one_prompt_a_clip(model):
    with pytest.raises(ValueError, match="3 clips and 2 prompts"):
        model.score(codes_of(3), ["a", "b"])


def test_members_differ_and_have_no_offset(model, base):
    scores = model.member_scores(rf.features(base, codes_of(60, seed=1), ["p"] * 60))
    assert scores.std(0).mean() > 1e-3
    torch.testing.assert_close(scores.mean(1), torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "blocks", "within"),
    [("linear", (rf.LATENTS, rf.SHARED), 0.02), ("kernel", (rf.LATENTS,), 0.05), ("relevance", (rf.DESCRIPTORS, rf.FIT), 0.5)],
)
def test_slope_is_the_derivative_of_the_score_along_the_latents(base, kind, blocks, within):
    """Descriptors that count (onsets, the strongest bin) are steps: the slope is that of the rest, so their head is held to less."""
    codes, prompts = codes_of(24, frames=40), ["a"] * 24
    head = rh.Head(kind, blocks, 2.0)
    table = rf.features(base, codes, prompts, head.blocks)
    lens = rh.make_lens(head, table, torch.arange(24) // 4)
    width = rh.expand(lens, head, table).shape[1]
    members = torch.randn(3, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    model = rm.RewardModel(base, Committee((head,)), [lens], members, torch.zeros(3), lam=0.5, temperature=1.3)
    slope, score = model.slope(codes, prompts)
    torch.testing.assert_close(score, model.score(codes, prompts))
    latents = base.codec.latents(codes)
    step = 0.02 * slope / slope.flatten(1).norm(dim=1)[:, None, None]

    def at(moved):
        with torch.no_grad():
            return model.score_features(rf.features_heard(rf.Heard(base, prompts, latents=moved), head.blocks))

    measured, told = at(latents + step) - at(latents - step), 2 * (slope * step).sum((1, 2))
    assert float(measured.mean()) == pytest.approx(float(told.mean()), rel=within)


def test_a_model_of_an_earlier_version_is_refused_in_words(model, base, tmp_path):
    model.save(tmp_path / "reward")
    told = read_json(tmp_path / "reward" / "manifest.json")
    write_json(
        tmp_path / "reward" / "manifest.json", {name: value for name, value in told.items() if name != "heads"} | {"head": told["heads"][0]}
    )
    with pytest.raises(UserError, match="train it again on its snapshot"):
        rm.load_reward(tmp_path / "reward", base)
