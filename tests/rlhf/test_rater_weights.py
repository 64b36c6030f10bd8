import hashlib
from dataclasses import asdict, replace

import pytest
import torch

from rlhf import raters
from rlhf.preferences import load_snapshot, training_pairs
from rlhf.rater_weights import Weighing, weigh
from rlhf.reward_committee import Committee
from rlhf.reward_folds import Clips, Folds, choose_committee
from rlhf.reward_heads import Head
from rlhf.reward_report import _of_raters
from rlhf.reward_toy import write_toy_snapshot
from rlhf.train_reward import Config


def test_slopes_find_the_careless_and_the_adversary_where_nobody_shares_a_pair(tmp_path):
    """One vote a pair: agreement knows nothing of anybody."""
    write_toy_snapshot(tmp_path, "b" * 64, seed=1, n_pairs=400)
    snapshot = load_snapshot(tmp_path)
    turned = {"x": "y", "y": "x"}
    votes = [replace(vote, choice=turned.get(vote.choice, vote.choice)) if vote.rater == "r3" else vote for vote in snapshot.votes]
    alone = {vote.pair_id: vote for vote in sorted(votes, key=lambda vote: hashlib.sha256(vote.vote_id.encode()).hexdigest())}
    snapshot = replace(snapshot, votes=tuple(alone.values()))
    assert set(raters.weights(raters.reliability(snapshot.votes)).values()) == {1.0}
    clips = Clips(snapshot, 2, 32)
    head = Head("linear", ("all",), 1.0)
    heard = torch.stack([codes[0].float().flatten() / 10 for codes in clips.codes])
    folds = Folds({head: heard}, clips.fold_of_prompt(5, 0), 5)

    def preferences(weights):
        return training_pairs(snapshot, weights, known=clips.known)

    pairs = clips.pairs(preferences(None))
    cfg = Config(members=1)
    choice = choose_committee(folds, pairs, [Committee((head,))])
    found = weigh(cfg, folds, clips, snapshot, None, pairs, choice, preferences)
    assert found.name == "slopes"
    assert found.losses["slopes"] < found.losses["agreement"] - 0.05
    assert found.weights["r3"] == 0
    assert found.told("r3")["against_the_music"]
    assert found.weights["r4"] < 0.5 * min(found.weights[rater] for rater in ("r0", "r1", "r2"))
    turned_round = weigh(replace(cfg, adversaries="invert"), folds, clips, snapshot, None, pairs, choice, preferences)
    assert turned_round.weights["r3"] < 0
    assert turned_round.losses["slopes"] < found.losses["agreement"] - 0.05


@pytest.mark.parametrize(
    ("name", "weights", "line"),
    [
        ("nothing", None, "hardly count: -; adversaries, silenced: -; answer against the others or the music, and count: foe, lone"),
        ("agreement", {"ada": 1.0, "foe": 0.0, "lone": 1.0}, "hardly count: foe; adversaries, silenced: foe; answer against"),
        ("slopes", {"ada": 1.0, "foe": 0.0, "lone": 0.0}, "hardly count: foe, lone; adversaries, silenced: foe, lone"),
    ],
)
def test_the_report_calls_silenced_who_was(name, weights, line):
    """foe answers against the others, lone against the music alone, which agreement does not see."""
    people = {who: raters.RaterQuality(0.8, 1.0, 100, who == "foe") for who in ("ada", "foe", "lone")}
    found = {who: raters.Habit(-1.0 if who == "lone" else 1.0, 0.2, 0.0, 50) for who in people}
    habits = raters.Habits(found, 1.0, 1.0, 0.0, 1.0)
    weighing = Weighing(name, weights, torch.zeros(1), {}, habits)
    told = {who: asdict(quality) | weighing.told(who) for who, quality in people.items()}
    said = _of_raters({"raters": told, "weights_by": name, "weights_loss": {}, "adversaries": "silence"})
    assert line in said
    assert told["foe"]["weight"] == (1.0 if weights is None else weights["foe"])
