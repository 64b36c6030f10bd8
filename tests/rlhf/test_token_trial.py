"""A trunk on trial through train_reward: a taste that only codes can tell, and no taste at all."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from base_models.checkpoint import read_json
from base_models.errors import UserError
from rlhf import token_trial, train_reward
from rlhf.preferences import content_sha256
from rlhf.reward_model import load_reward
from rlhf.reward_toy import toy_base, write_toy_snapshot
from tests.rlhf.reward_toys import speaking

CHEAP = {"folds": 3, "members": 1, "weights_by": "nothing", "trunk_layers": 2, "trunk_epochs": 6}


@pytest.fixture(scope="module")
def base():
    """A codec that plays code c and code c + 16 alike, under a language model that reads them apart."""
    plain = toy_base(0)
    for layer in plain.codec.rvq.layers:
        layer._codebook.embed[..., 16:, :] = layer._codebook.embed[..., :16, :]
    return speaking(plain, n_q=2, card=32)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory, base):
    """The toy's clips with other codes, and 20 votes a prompt for the clip with more codes above 15: nothing that can be heard."""
    folder = tmp_path_factory.mktemp("votes")
    write_toy_snapshot(folder, base.sha256, seed=0)
    rng = np.random.default_rng(0)
    liked, of_prompt = {}, {}
    for clip in map(json.loads, (folder / "clips.jsonl").read_text().splitlines()):
        high = rng.random((2, 12)) < rng.uniform(0.1, 0.9)
        np.save(folder / clip["codes_uri"], (rng.integers(0, 16, (2, 12)) + 16 * high).astype(np.int16))
        liked[clip["sha256"]] = high.mean()
        of_prompt.setdefault((clip["prompt_id"], clip["prompt"]), []).append(clip["sha256"])
    votes = []
    for (prompt_id, prompt), there in of_prompt.items():
        for number in range(20):
            x, y = rng.choice(there, 2, replace=False)
            row = {"vote_id": len(votes), "pair_id": len(votes), "prompt_id": prompt_id, "prompt": prompt, "rater": f"r{number % 5}"}
            votes.append({**row, "clip_x": str(x), "clip_y": str(y), "choice": "x" if liked[x] > liked[y] else "y"})
    (folder / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    (folder / "snapshot.json").write_text(json.dumps({"name": "toy", "sha256": content_sha256(folder)}))
    return folder


def trained(base, snapshot, out, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_reward, "load_policy", lambda path: base)
        return train_reward.main(train_reward.Config(snapshot=snapshot, out=out, **CHEAP | {"trunk": "auto"} | changes))


@pytest.fixture(scope="module")
def told(base, snapshot, tmp_path_factory):
    out = tmp_path_factory.mktemp("auto")
    return out, trained(base, snapshot, out)


def test_a_taste_that_only_codes_can_tell_is_left_to_the_trunk(told):
    _, figures = told
    assert figures["trunk"]["gain"]["ci"][0] > 0
    assert figures["trunk"]["kept"]
    assert figures["trunk"]["frozen"]["value"] < 0.6
    assert figures["accuracy"] == figures["trunk"]["tokens"]["value"] > 0.7
    assert "codec tokens" in train_reward.report(figures)
    assert ": kept" in train_reward.report(figures)


def test_the_saved_trunk_scores_codes_by_itself(told, base):
    out, figures = told
    model = load_reward(out, base)
    assert model.sha256 == figures["reward_sha256"]
    low = torch.randint(0, 16, (20, 2, 12), generator=torch.Generator().manual_seed(0))
    assert (model.score(low + 16, ["toy"] * 20) > model.score(low, ["toy"] * 20)).float().mean() > 0.8
    torch.testing.assert_close(model.score(low[3:4], ["toy"])[0], model.score(low, ["toy"] * 20)[3], atol=1e-4, rtol=1e-3)


def test_it_has_no_slope_and_no_spread_that_it_could_not_honestly_tell(told, base):
    model = load_reward(told[0], base)
    assert not model.has_slope
    with pytest.raises(UserError, match="--trunk frozen"):
        model.slope(torch.zeros(1, 2, 12, dtype=torch.long), ["toy"])
    assert not model.has_spread
    assert torch.equal(model.spread(torch.zeros(2, 2, 12, dtype=torch.long), ["toy"] * 2), torch.zeros(2))


def test_a_trunk_of_another_base_is_refused(told, base):
    with pytest.raises(UserError, match="of base"):
        load_reward(told[0], SimpleNamespace(**{**vars(base), "sha256": "e" * 64}))


def test_a_run_that_was_interrupted_goes_on_to_the_same_model(told, base, snapshot, monkeypatch):
    """Nothing is fitted twice; a file that is missing is made again, the same."""
    out, figures = told
    done = sorted((out / "trunk").iterdir(), key=lambda path: path.stat().st_size)
    assert len(done) == 4  # three folds, and the one that is kept
    before = done[0].read_bytes()
    done[0].unlink()
    fits = []
    honest = token_trial.fit_member
    monkeypatch.setattr(token_trial, "fit_member", lambda *given: fits.append(given[1]) or honest(*given))
    again = trained(base, snapshot, out)
    assert len(fits) == 2  # the missing fold, and the 20 pairs by heart
    assert done[0].read_bytes() == before
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}


def test_without_a_taste_the_frozen_features_stay(base, snapshot, tmp_path):
    figures = trained(base, snapshot, tmp_path, shuffle_labels=True, trunk_epochs=2)
    assert not figures["trunk"]["kept"]
    assert "not used" in train_reward.report(figures)
    assert read_json(tmp_path / "manifest.json")["trunk"] is None
    assert load_reward(tmp_path, base).has_slope


def test_a_trunk_can_be_forced_and_disagree_with_itself(base, snapshot, tmp_path):
    figures = trained(base, snapshot, tmp_path, trunk="tokens", trunk_members=2, trunk_epochs=1)
    assert figures["trunk"]["forced"]
    assert "as --trunk tokens asks" in train_reward.report(figures)
    model = load_reward(tmp_path, base)
    assert model.has_spread
    codes = torch.randint(0, 32, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    assert bool((model.spread(codes, ["toy"] * 3) > 0).all())


def test_a_base_without_a_language_model_is_refused(snapshot, tmp_path):
    with pytest.raises(UserError, match="no language model"):
        trained(toy_base(0), snapshot, tmp_path)
