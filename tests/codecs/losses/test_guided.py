"""Terms that teachers guide: what they compare, that only codec and map learn, that nothing of a teacher stays."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import load_file

from varitok import UserError
from varitok.codecs.bottlenecks.product import grouped
from varitok.codecs.bottlenecks.vq import VectorQuantizer
from varitok.codecs.build import build, load_run
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.losses.balancer import Balancer
from varitok.codecs.losses.feature_hooks import Tap, capture
from varitok.codecs.losses.guided import Contrast, Distillation, TeacherDistance
from varitok.codecs.losses.objective import Objective
from varitok.codecs.losses.pixel import L1
from varitok.codecs.networks.projections import BranchedProjection
from varitok.codecs.networks.vit2d import ViTDecoder, ViTEncoder
from varitok.codecs.training.run import build_run
from varitok.data.cli.features import main as write_seen
from varitok.data.teachers.audio import AudioTransformer
from varitok.data.teachers.text import TextTransformer
from varitok.data.teachers.vision import RandomTeacher
from varitok.export.exporters.bundle import export_bundle

from ...composing import composed
from ...data.saved import saved
from ..examples import QUIET, RATE, SIZE, TINY_SOUND, clip_codec, sound_codec, tiny_codec
from ..training.test_training import Killed, assert_equal_states, compose, fit

SAMPLES = 800


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("teachers"), "wavlm")[1]


@pytest.fixture
def teacher(wavlm):
    return AudioTransformer(str(wavlm), RATE)


def sounds(count=3, samples=SAMPLES):
    return 0.3 * torch.randn(count, 1, samples, generator=torch.Generator().manual_seed(1))


def objective(teacher, codec, *, balancer=None, weights=None, **terms):
    weights = weights or {}
    made = Objective(
        {name: {"weight": weights.get(name, 1.0), "module": term} for name, term in terms.items()},
        balancer=balancer,
        teachers={"t": teacher},
    )
    made.bind(codec)
    return made


def run(codec, made, real, lengths=None):
    tokens = None if lengths is None else codec.layout.valid(lengths, real.shape[2:])
    with capture(codec, made.taps, real, lengths) as inside:
        result = codec(real, tokens)
    return made(result.signal, real, lengths, guidance=made.guidance(real, lengths, inside))


def test_the_first_codebooks_sum_is_heard_and_passes_the_gradient_once():
    codec, real = sound_codec(), sounds().requires_grad_()
    with torch.no_grad():
        codec(real)  # k-means
    codec.bottleneck.eval()
    places = [Tap("bottleneck", 2), Tap("bottleneck.parts.0"), Tap("project_in"), Tap("encoder")]
    with capture(codec, places, real, None) as inside:
        result = codec(real)
    two = codec.bottleneck.decode(result.quantized.codes[:, :2]).transpose(1, 2)
    torch.testing.assert_close(inside[places[0]].values, two)
    torch.testing.assert_close(inside[places[1]].values, codec.bottleneck.decode(result.quantized.codes[:, :1]).mT)
    weights = torch.randn_like(two)
    both = [
        torch.autograd.grad((inside[place].values * weights).sum(), real, retain_graph=True) for place in places[::2]
    ]
    torch.testing.assert_close(*both)
    assert inside[places[3]].steps == (40.0,) and inside[places[3]].values.shape == (3, 16, 20)
    assert not any(module._forward_hooks for module in codec.modules()), "a hook would stay in the export"


@pytest.mark.parametrize("kind", [Contrast, Distillation])
@pytest.mark.parametrize("project", [None, partial(BranchedProjection, parts=2, depth=1, heads=2)])
def test_a_guide_of_one_codebook_leaves_the_others_alone(kind, project):
    """FQGAN's first codebook learns the teacher's features; no gradient of theirs reaches the second's latents."""
    torch.manual_seed(0)
    sizes = {"patch": 4, "width": 16, "depth": 1, "heads": 2}
    bottleneck = grouped(lambda: VectorQuantizer(3, 16, cosine=True), 2)
    length = LengthPolicy(Full(), Truncate())
    codec = Codec(ViTEncoder(**sizes), bottleneck, ViTDecoder(**sizes), length, project_in=project)
    made, latents = objective(RandomTeacher(6, 4), codec, one=kind("t", "bottleneck.parts.0")), []
    codec.project_in.register_forward_hook(lambda module, given, output: latents.append(output))
    gradient = torch.autograd.grad(run(codec, made, torch.rand(2, 3, 8, 12) * 2 - 1)[0], latents)[0]
    assert gradient[..., :3].any(-1).all() and not gradient[..., 3:].any()


# -log(sigmoid(cosine)) can't fall below 0.31.
@pytest.mark.parametrize(
    ("distance", "share"), [("cosine", 0.8), pytest.param("squared", 0.8, marks=pytest.mark.slow), ("along", 0.95)]
)
def test_distillation_lowers_its_loss_and_only_the_codec_and_the_map_learn(teacher, distance, share):
    torch.manual_seed(0)
    codec, real = sound_codec(), sounds()
    term = Distillation("t", num_codebooks=1, distance=distance)
    made = objective(teacher, codec, meaning=term)
    before = copy.deepcopy(teacher.state_dict())
    head = term.head.weight.detach().clone()
    optimizer = torch.optim.Adam([*codec.parameters(), *made.parameters()], 1e-2)
    losses = []
    for _ in range(18):
        loss, values = run(codec, made, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(values["meaning"]))
    assert losses[-1] < share * losses[0]
    assert not torch.equal(term.head.weight, head)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("distance", ["cosine", "squared", "along"])
@pytest.mark.parametrize("kind", ["distillation", "distance"])
def test_padding_changes_nothing(teacher, kind, distance):
    codec, real, lengths = sound_codec().eval(), sounds(), torch.tensor([SAMPLES, 410, 333])
    if kind == "distance":
        term = TeacherDistance("t", "absolute" if distance == "along" else distance)
    else:
        term = Distillation("t", "project_in", distance=distance)
    made = objective(teacher, codec, one=term)
    for index, length in enumerate(lengths):
        real[index, :, length:] = 0
    together = run(codec, made, real, lengths)[0]
    alone = [run(codec, made, real[i : i + 1, :, :n])[0] for i, n in enumerate(lengths)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)


def test_a_teacher_sees_the_signal_once_a_step(teacher):
    codec, calls = sound_codec(), []
    teacher.register_forward_hook(lambda module, given, output: calls.append(given[0]))
    real = sounds()
    terms = {
        "first": Distillation("t", num_codebooks=1),
        "all": Distillation("t"),
        "contrast": Contrast("t", "encoder"),
    }
    _, values = run(codec, objective(teacher, codec, **terms), real)
    assert len(calls) == 1 and calls[0] is real and set(values) == set(terms)
    run(codec, objective(teacher, codec, **terms, heard=TeacherDistance("t")), real)
    assert len(calls) == 3, "the reconstruction is seen once more"


def test_weight_0_is_logged_and_not_trained(teacher):
    codec = sound_codec()
    made = objective(teacher, codec, weights={"quiet": 0.0}, quiet=Distillation("t"), l1=L1())
    total, values = run(codec, made, sounds())
    assert torch.equal(total.detach(), values["l1"]) and values["quiet"] > 0
    assert not any(part.requires_grad for part in made.parameters())


def test_the_balancer_shares_the_gradient_of_what_is_made_from_the_reconstruction_only(teacher):
    codec, real = sound_codec(), sounds()
    made = objective(
        *(teacher, codec), balancer=Balancer(), weights={"meaning": 3.0},
        meaning=Distillation("t"), heard=TeacherDistance("t"), l1=L1(),
    )  # fmt: skip
    total, values = run(codec, made, real)
    torch.testing.assert_close(total.detach(), 3 * values["meaning"] + values["heard"] + values["l1"])
    total.backward()
    assert made.terms["meaning"].head.weight.grad.abs().sum() > 0
    assert {name for name, _ in made.balancer.named_buffers()} == {
        *("norm_heard", "norm_l1", "share_heard", "share_l1")
    }


def test_images_and_clips_are_distilled_on_their_grids():
    clips = clip_codec()
    real = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    made = objective(RandomTeacher(6, 4), clips, one=Distillation("t", "encoder"))
    with capture(clips, made.taps, real, torch.tensor([5, 1])) as inside:
        clips(real)
    found = inside[Tap("encoder")]
    assert found.values.shape[2:] == (2, 2, 2) and found.offset == 3 and found.lengths.tolist() == [2, 1]
    assert run(clips, made, real)[0].isfinite()
    images, real = tiny_codec(), torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    made = objective(RandomTeacher(6, 4), images, one=Distillation("t", "decoder.transformer.blocks.0", dim=16))
    with capture(images, made.taps, real, None) as inside:
        images(real)
    assert inside[made.taps[0]].values.shape == (2, 16, 2, 2) and inside[made.taps[0]].steps == (8, 8)
    contrast = objective(RandomTeacher(6, 4), images, one=Contrast("t", kind="sigmoid"))
    assert run(images, contrast, real)[0].isfinite()
    with pytest.raises(UserError, match="distill into a module on the signal's grid"):
        run(images, objective(RandomTeacher(6, 4), images, one=Distillation("t")), real)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_signal_without_a_caption_stands_aside(tmp_path, kind):
    codec, real = tiny_codec(), torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    made = objective(TextTransformer(str(saved(tmp_path, "clip")[1])), codec, one=Contrast("t", kind=kind))

    def loss(signals, captions):
        with capture(codec, made.taps, signals, None) as inside:
            result = codec(signals)
        return made(result.signal, signals, None, guidance=made.guidance(signals, None, inside, captions=captions))[0]

    captions = ["a red boat", "", "a dog sings", "a blue dog"]
    found = loss(real, captions)
    told = [0, 2, 3]
    torch.testing.assert_close(found, loss(real[told], [captions[at] for at in told]))
    found.backward()
    assert made.terms["one"].head.weight.grad.abs().sum() > 0
    codec.zero_grad()
    made.zero_grad()
    nothing = loss(real, [""] * 4)
    nothing.backward()
    assert nothing == 0 and all(part.grad is None or not part.grad.any() for part in codec.parameters())
    with pytest.raises(UserError, match=r"reads captions; give loader\.captions=true"):
        loss(real, ())


def test_captions_are_learnt(tmp_path):
    torch.manual_seed(0)
    codec = tiny_codec()
    made = objective(TextTransformer(str(saved(tmp_path, "clip")[1])), codec, one=Contrast("t", "encoder"))
    real = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    optimizer = torch.optim.Adam([*codec.parameters(), *made.parameters()], 3e-3)
    losses = []
    for _ in range(30):
        with capture(codec, made.taps, real, None) as inside:
            result = codec(real)
        guidance = made.guidance(real, None, inside, captions=["a red boat", "a blue dog"])
        loss = made(result.signal, real, None, guidance=guidance)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Distillation("t", "decoder.middel"), r"at=decoder\.middel: decoder has no part 'middel'; it has "),
        (Distillation("t", "encodr"), r"the codec has no part 'encodr'; it has encoder, project_in"),
        (Distillation("t", num_codebooks=5), r"at=bottleneck: num_codebooks=5 should be from 1 to 4"),
        (Distillation("t", "encoder", num_codebooks=1), r"at=encoder: num_codebooks=1 should be null"),
        (Distillation("t", "decoder.act"), r"has no known width; give the term dim"),
        (Distillation("u"), r"objective\.teachers has no 'u'; it has t"),
        (Distillation("t", "encoder", dim=3), r"at=encoder has 16 channels, not 3; give the term dim=16"),
    ],
)
def test_a_mistake_is_told_in_one_line(teacher, term, message):
    codec = sound_codec()
    with pytest.raises(UserError, match=message) as told:
        run(codec, objective(teacher, codec, one=term), sounds())
    assert "\n" not in str(told.value)


def _sound_run(folder: Path, wavlm: Path, *more: str) -> Any:
    words = [
        *TINY_SOUND,
        *QUIET,
        "guide=wavlm",
        f"objective.teachers.wavlm.folder={wavlm}",
        "checkpoint.every=1",
        *more,
    ]
    made = build_run(composed(*words), folder)
    made.trainer.fit(made.module, made.data, ckpt_path=made.resume, weights_only=True)
    return made


@pytest.mark.slow
def test_a_run_keeps_its_map_and_nothing_of_the_teacher(tmp_path, wavlm):
    made = _sound_run(tmp_path, wavlm)
    saved_state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    names = [name for name in saved_state["state_dict"] if name.startswith("objective.")]
    assert {"objective.terms.meaning.head.weight", "objective.terms.meaning.head.bias"} <= set(names)
    teacher = made.module.objective.teachers.networks["wavlm"]
    held = {value.data_ptr() for value in [*made.module.parameters(), *made.module.buffers()]}
    assert not held & {value.data_ptr() for value in teacher.state_dict().values()}
    trained = {id(part) for group in made.trainer.optimizers[0].param_groups for part in group["params"]}
    assert id(made.module.objective.terms["meaning"].head.weight) in trained
    assert not trained & {id(part) for part in teacher.parameters()}
    codec, _ = load_run(tmp_path)
    assert not [name for name in codec.state_dict() if "head" in name or "wavlm" in name]
    assert "loss/meaning" in (tmp_path / "metrics.csv").read_text()
    export_bundle(made.module.evaluated, tmp_path / "bundle", formats=("safetensors",))
    weights = load_file(tmp_path / "bundle/model.safetensors")
    assert weights and not [name for name in weights if "head" in name or "network" in name]
    assert "wavlm" not in (tmp_path / "bundle/config.json").read_text()


def _file_run(folder: Path, term: str, *more: str) -> list[float]:
    """Train on the sound files of a folder; give what the log has of a term."""
    words = [word for word in TINY_SOUND if not word.startswith(("data.length", "data.val_length"))]
    words += [
        "data=audio_folder",
        f"data.root={folder / 'sounds'}",
        "data.val_share=0.3",
        *QUIET,
        *more,
    ]
    made = build_run(composed(*words), folder / "run")
    made.trainer.fit(made.module, made.data)
    rows = (folder / "run/metrics.csv").read_text().splitlines()
    return [float(row.split(",")[-1]) for row in rows if f"loss/{term}" in row]


@pytest.fixture
def sound_files(tmp_path):
    (tmp_path / "sounds").mkdir()
    for index in range(6):
        sound = 0.3 * torch.randn(12000, generator=torch.Generator().manual_seed(index))
        soundfile.write(tmp_path / f"sounds/{index}.wav", sound.numpy(), 16000)
    return tmp_path


@pytest.mark.slow
def test_a_run_reads_what_was_seen_before(sound_files, wavlm):
    words = [str(sound_files / "sounds"), "--teacher", str(wavlm), "--rate", "16000"]
    write_seen([*words, "--out", str(sound_files / "seen")])
    words = ["guide=wavlm", "objective.teachers.wavlm.folder=nowhere"]
    values = _file_run(sound_files, "meaning", *words, f"objective.teachers.wavlm.cached={sound_files / 'seen'}")
    assert values and min(values) > 0


@pytest.mark.slow
def test_a_run_reads_the_captions_of_its_files(sound_files, tmp_path_factory):
    folder = saved(tmp_path_factory.mktemp("teacher"), "clip")[1]
    for path in (sound_files / "sounds").iterdir():
        path.with_suffix(".txt").write_text("a red boat" if path.stem in "024" else "a dog sings")
    words = ["guide=captions", f"objective.teachers.captions.folder={folder}"]
    with pytest.raises(UserError, match=r"objective\.teachers\.captions reads captions; give loader\.captions=true"):
        _file_run(sound_files, "captions", *words)
    values = _file_run(sound_files, "captions", *words, "loader.captions=true")
    assert values and min(values) > 0


def test_a_killed_run_goes_on_bit_by_bit(tmp_path):
    folder = saved(tmp_path, "dinov2")[1]
    extra = [
        *QUIET,
        *("guide=dinov2", f"objective.teachers.dinov2.folder={folder}", "objective.teachers.dinov2.size=16"),
        *("objective.terms.meaning.module.at=decoder.transformer.blocks.0", "loader.batch_size=4"),
    ]
    whole = fit(tmp_path / "whole", *extra)
    killed = build_run(compose(*extra), tmp_path / "part")
    killed.trainer.callbacks.append(Killed())
    with pytest.raises(RuntimeError, match="killed"):
        killed.trainer.fit(killed.module, killed.data)
    assert_equal_states(whole, fit(tmp_path / "rest", *extra, f"resume={tmp_path / 'part'}"))


@pytest.mark.parametrize(
    ("experiment", "guide"),
    [
        *(("audio/mimi", guide) for guide in ("wavlm", "hubert", "w2v_bert", "wavlm_distance")),
        *(("image/titok", guide) for guide in ("dinov2", "clip", "captions")),
    ],
)
def test_a_missing_teacher_of_a_preset_says_which_files_to_place_where(tmp_path, monkeypatch, experiment, guide):
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    words = [f"experiment={experiment}", f"guide={guide}", "data.root=x", "objective=pixel"]
    words += ["objective.adversarial=null"] * (experiment == "image/titok")  # which says when its discriminator begins
    config = composed(*words)
    files = [r"config\.json", *([r"preprocessor_config\.json"] if experiment == "audio/mimi" else [])]
    with pytest.raises(UserError, match=rf"place {', '.join(files)} and model\.safetensors .*nothing is downloaded"):
        build(config.objective)
