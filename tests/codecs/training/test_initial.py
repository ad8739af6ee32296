"""A run starts from another run's weights, and `finetune=` says what becomes of them."""

import hydra
import pytest
import torch

from varitok import UserError
from varitok.codecs.lengths.distributions import Full, Uniform
from varitok.codecs.training.config.compose import check, save_resolved
from varitok.codecs.training.run import build_run

from ...composing import CONFIGS, composed
from ..examples import QUIET, TINY_RUN, TINY_SOUND

SOUND = [*TINY_SOUND, *QUIET, "training.ema_decay=0", "length=full"]
IMAGE = [*TINY_RUN, *QUIET, "updates=2", "export=none", "length=full"]


def start(folder, *words):
    return build_run(composed(*words), folder)


def fit(folder, *words):
    run = start(folder, *words)
    run.fit()
    return run.module.codec.eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, fit(folder, *SOUND)


def sounds():
    return torch.rand(2, 1, 1600, generator=torch.Generator().manual_seed(0)) - 0.5


def changed(one, other):
    """Return the parts whose weights differ between two codecs."""
    states = one.state_dict(), other.state_dict()
    return {name.partition(".")[0] for name in states[0] if not torch.equal(states[0][name], states[1][name])}


def test_a_fine_tuned_decoder_keeps_every_code(finished, tmp_path):
    folder, before = finished
    after = fit(tmp_path, *SOUND, "finetune=decoder", f"init_from={folder}", "optim.warmup=0")
    assert changed(before, after) == {"decoder", "project_out"}
    assert torch.equal(before.encode(sounds()), after.encode(sounds()))


def test_added_codebooks_learn_and_the_codes_before_them_stay(finished, tmp_path):
    folder, before = finished
    words = [*SOUND, "finetune=extend", f"init_from={folder}", "bottleneck.num_codebooks=5", "optim.warmup=0"]
    after = fit(tmp_path, *words)
    codes = after.encode(sounds())
    assert codes.shape[1] == 5 and torch.equal(before.encode(sounds()), codes[:, :3])
    assert [int(part.codebook.age) for part in after.bottleneck.parts] == [2, 2, 2, 2, 2]
    again = start(tmp_path, *words, "updates=3")  # which loads init_from once more
    assert again.resume
    assert [part.training for part in again.module.codec.bottleneck.parts] == [False, False, False, True, True]


@pytest.mark.slow
def test_codebooks_of_another_rate_are_added_too(tmp_path):
    words = [
        *(word for word in SOUND if "num_codebooks" not in word),
        "bottleneck=rvq_multirate",
        "~bottleneck.num_codebooks",
    ]
    before = fit(tmp_path / "before", *words)
    more = ["finetune=extend", f"init_from={tmp_path / 'before'}", "bottleneck.strides=[4,2,1,1]", "optim.warmup=0"]
    codes = fit(tmp_path / "after", *words, *more).encode(sounds())
    assert codes.shape[1] == 4 and torch.equal(before.encode(sounds()), codes[:, :3])


def test_a_whole_codec_is_fine_tuned_at_a_low_rate(finished, tmp_path):
    run = start(tmp_path, *SOUND, "finetune=all", f"init_from={finished[0]}")
    assert not changed(finished[1], run.module.codec)
    assert all(weight.requires_grad for weight in run.module.codec.parameters())
    config = composed(*SOUND, "finetune=all", f"init_from={finished[0]}")
    assert config.optim.codec.lr == config.optim.discriminator.lr == 1e-5


def test_a_codec_of_a_fixed_length_becomes_variable(finished, tmp_path):
    """By dropping codebooks of tokens on a grid, and ordered tokens."""
    placed = start(tmp_path / "sound", *SOUND, "finetune=length", f"init_from={finished[0]}").module.codec.length
    assert isinstance(placed.distribution, Full)
    drawn = placed.sample(64, 8, 3)
    assert set(drawn.lengths.tolist()) == {8} and set(drawn.n_codebooks.tolist()) == {1, 2, 3}
    fit(tmp_path / "image", *IMAGE)
    words = [*IMAGE, "finetune=length", f"init_from={tmp_path / 'image'}"]
    ordered = start(tmp_path / "shorter", *words).module.codec.length
    assert isinstance(ordered.distribution, Uniform) and ordered.codebooks is None
    assert set(ordered.sample(64, 4).lengths.tolist()) == {1, 2, 3, 4}


def test_a_length_that_varies_already_stays(finished, tmp_path):
    words = [word for word in SOUND if word != "length=full"] + ["length=quantizer_dropout_late", "finetune=length"]
    policy = start(tmp_path, *words, f"init_from={finished[0]}").module.codec.length
    assert type(policy.codebooks.distribution).__name__ == "Curriculum"


def test_a_codec_without_an_axis_of_length_is_told(tmp_path):
    told = r"^length: tokens on a grid and one codebook leave nothing to vary; choose finetune=all$"
    with pytest.raises(UserError, match=told):
        start(tmp_path, *SOUND, "bottleneck.num_codebooks=1", "finetune=length", "init_from=run")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "finetune").glob("*.yaml")))
def test_fine_tuning_needs_weights(name):
    with pytest.raises(UserError, match=r"init_from is required: give init_from=RUN$"):
        check(composed(*SOUND, f"finetune={name}"))


def test_a_saved_run_is_fine_tuned_by_its_own_configuration(tmp_path):
    """An imported run has such a one, in which no group can be chosen, but one added."""
    save_resolved(composed(*SOUND), tmp_path)
    words = ["+finetune=length", f"init_from={tmp_path}", "hydra.searchpath=[pkg://varitok.configs]"]
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        saved = hydra.compose("config", words)
    found = composed(*SOUND, "finetune=length", f"init_from={tmp_path}")
    assert saved.length == found.length and saved.optim.codec.lr == 1e-5


def test_parts_of_a_run_are_taken(finished, tmp_path):
    folder, before = finished
    words = [*SOUND, f"init_from={folder}", "init_parts=[encoder,project_in,bottleneck.parts.0]", "seed=1"]
    codec = start(tmp_path, *words, "bottleneck.num_codebooks=2").module.codec
    assert not changed(before.encoder, codec.encoder) | changed(before.project_in, codec.project_in)
    assert changed(before.decoder, codec.decoder)
    assert not changed(before.bottleneck.parts[0], codec.bottleneck.parts[0])
    assert changed(before.bottleneck.parts[1], codec.bottleneck.parts[1])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["init_parts=[encodr]"], r"^init_parts: \S+ has no weights of 'encodr'; it has encoder, project_in, [^\n]+$"),
        (["init_parts=[bottleneck.parts.3]"], r"^init_parts: \S+ has no weights of 'bottleneck\.parts\.3'; [^\n]+$"),
        (["bottleneck.num_codebooks=2"], r"bottleneck\.parts\.2\.\S+ is one too many.*num_codebooks=2 \(was 3\)$"),
        (["bottleneck.num_codebooks=5", "bottleneck.level.dim=4"], r"has the shape [^\n]+num_codebooks=5 \(was 3\)"),
    ],
    ids=["no_part", "no_codebook", "fewer", "of_another_width"],
)
def test_weights_that_do_not_fit_are_named(finished, tmp_path, words, told):
    with pytest.raises(UserError, match=told):
        start(tmp_path, *SOUND, f"init_from={finished[0]}", *words)
