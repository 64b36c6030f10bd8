import numpy as np
import pytest
import torch

from base_models.codec import CodecConfig, MagnitudeCodec
from base_models.errors import UserError
from rlhf import frame_reward as fr
from rlhf import reward_features as rf
from rlhf import reward_heads as rh
from rlhf import reward_model as rm
from rlhf.reward_committee import Committee

T = 60


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    made = MagnitudeCodec(CodecConfig(width=24, latent_dim=8, encoder_blocks=1, decoder_blocks=1, n_q=2, card=16)).eval()
    for layer in made.rvq.layers:
        layer._codebook.embed.copy_(torch.randn(layer._codebook.embed.shape))
    return made


def clip_with_a_bad_stretch(rng, start, length=15):
    """Codes [2, T] that hang on one entry in a stretch: what raters mark."""
    codes = rng.integers(0, 16, (2, T))
    codes[:, start : start + length] = 3
    return codes.astype(np.int64)


@pytest.fixture(scope="module")
def world(codec):
    """40 clips of 10 prompts, marked in ms where they hang."""
    rng = np.random.default_rng(0)
    codes, marks, prompt_of = {}, {}, {}
    for index in range(40):
        start = int(rng.integers(0, T - 15))
        codes[f"c{index}"] = clip_with_a_bad_stretch(rng, start)
        marks[f"c{index}"] = ((round(start * 1000 / codec.frame_rate), round((start + 15) * 1000 / codec.frame_rate)),)
        prompt_of[f"c{index}"] = f"p{index % 10}"
    return fr.marked_clips(codec, codes, marks, prompt_of)


def test_marked_stretches_of_unseen_clips_score_lower(world):
    reached = fr.held_out_auc(world, {f"p{i}": i % 5 for i in range(10)})
    assert np.mean(reached) > 0.85


def test_marks_at_random_teach_nothing(world):
    rng = np.random.default_rng(1)
    turned = fr.Marked(world.tables, [torch.from_numpy(rng.permutation(marked.numpy())) for marked in world.marked], world.prompt_ids)
    assert np.mean(fr.held_out_auc(turned, {f"p{i}": i % 5 for i in range(10)})) == pytest.approx(0.5, abs=0.06)


def test_a_clip_that_is_bad_all_over_is_not_punished_here(world):
    head = fr.fit_frames(world.tables, world.marked)
    score = head(torch.stack(world.tables[:4]))
    assert score.shape == (4, T)
    torch.testing.assert_close(score.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    shifted = head(torch.stack(world.tables[:4]) + 0.1 * torch.ones(1, 1, len(head.mean)) * head.spread)
    torch.testing.assert_close(shifted, score, atol=0.03 * float(score.abs().max()), rtol=0)  # but for what is cut off


@pytest.mark.parametrize(
    ("spans", "frames"),
    [(((0, 100),), [0, 1]), (((40, 99),), [1]), (((26, 100),), [1]), (((24, 60),), [0]), (((0, 10),), []), (((0, 50), (100, 150)), [0, 2])],
)
def test_a_mark_takes_the_frames_it_covers_for_half(spans, frames):
    assert fr.marked_frames(spans, 4, 20.0).nonzero()[:, 0].tolist() == frames  # 50 ms each


def test_clips_marked_all_over_or_nowhere_say_nothing_about_where(codec):
    codes = {name: np.zeros((2, 8), dtype=np.int64) for name in ("all", "none", "part")}
    end = round(8 * 1000 / codec.frame_rate)
    marks = {"all": ((0, end),), "none": ((0, 1),), "part": ((0, end // 2),), "not there": ((0, end),)}
    assert fr.marked_clips(codec, codes, marks, {name: name for name in marks}).prompt_ids == ["part"]


def test_features_of_a_frame_come_from_its_window_alone(codec):
    codes = torch.randint(0, 16, (1, 2, T), generator=torch.Generator().manual_seed(0))
    other = codes.clone()
    other[..., 50:] = 0
    one, two = fr.frame_features(codec, codes), fr.frame_features(codec, other)
    half = round(fr.WINDOW_S * codec.frame_rate / 2)
    torch.testing.assert_close(one[:, : 50 - half], two[:, : 50 - half], atol=1e-6, rtol=0)
    assert not torch.allclose(one[:, 52], two[:, 52], atol=1e-3)


def test_the_slope_of_frames_is_what_a_small_move_of_the_latents_brings_also_where_a_clip_hangs(codec, world):
    head = fr.fit_frames(world.tables, world.marked)
    codes = torch.from_numpy(clip_with_a_bad_stretch(np.random.default_rng(3), 20))[None].repeat(2, 1, 1)
    codes[1] = 3  # one entry throughout: its latents do not vary at all
    slope, frames = head.slope(codec, codes)
    assert slope.isfinite().all()
    torch.testing.assert_close(frames, head(fr.frame_features(codec, codes)))
    latents = codec.latents(codes[:1]).double()
    move = 1e-4 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def total(at):
        table = fr.frame_features_of(at, codec.frame_rate)
        return float((fr.standard(head.mean.double(), head.spread.double(), table) @ head.weights.double()).sum())

    brought = total(latents + move) - total(latents - move)
    assert brought == pytest.approx(2 * float((slope[0].double() * move).sum()), rel=0.02)


def test_the_model_tells_frames_before_and_after_saving_and_says_what_it_lacks(codec, world, tmp_path):
    from types import SimpleNamespace

    base = SimpleNamespace(codec=codec, contrastive=None, sha256="a" * 64)
    codes = torch.randint(0, 16, (12, 2, T), generator=torch.Generator().manual_seed(1))
    table = rf.features(base, codes, ["p"] * 12, (rf.LATENTS,))
    head = rh.Head("linear", (rf.LATENTS,), 1.0)
    lens = rh.make_lens(head, table, torch.arange(12) // 6)
    members = torch.randn(3, table[rf.LATENTS].shape[1], generator=torch.Generator().manual_seed(2))
    model = rm.RewardModel(base, Committee((head,)), [lens], members, torch.zeros(3), lam=0.5, temperature=2.0)
    for ask in (model.per_frame, model.frame_slope):
        with pytest.raises(UserError, match="stretches marked"):
            ask(codes, ["p"] * 12)
    model.frames = fr.fit_frames(world.tables, world.marked)
    model.extras = {rm.ACCEPTABLE: rm.Extra(members[:1], torch.tensor([0.5]), 2.0)}
    model.save(tmp_path)
    loaded = rm.load_reward(tmp_path, base)
    torch.testing.assert_close(loaded.per_frame(codes, ["p"] * 12), model.per_frame(codes, ["p"] * 12))
    assert loaded.per_frame(codes, ["p"] * 12).shape == (12, T)
    ((name, acceptable),) = loaded.extra_scores(codes, ["p"] * 12).items()
    expected = (rh.expand(lens, head, table) @ members[0] - 0.5) / 2
    assert name == "acceptable"
    torch.testing.assert_close(acceptable, expected, atol=1e-5, rtol=1e-5)
    spread = (members @ rh.expand(lens, head, table).T).std(0) / 2
    torch.testing.assert_close(loaded.spread(codes, ["p"] * 12), spread, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="12 clips and 1 prompts"):
        model.per_frame(codes, ["p"])
