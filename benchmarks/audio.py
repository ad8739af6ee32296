"""Speed of audio codecs against the authors' packages ("peers"): training step, encoding and decoding.

    python benchmarks/audio.py --peers FOLDER [--only step code] [--cells NAME ...] [--threads 1 2] [--rounds 5]
        [--cpu] [--out benchmarks/results/audio.csv]

The peers are not among our dependencies, and some pin incompatible versions. They are imported from a separate folder:

    pip install --no-deps --target FOLDER descript-audio-codec descript-audiotools encodec 'transformers==4.57.3'
    pip install --no-deps --target FOLDER 'huggingface_hub<1' tokenizers==0.22.1 argbind einops safetensors regex julius
    pip install --no-deps --target FOLDER scipy librosa pyloudnorm flatten-dict randomname rich ffmpy markdown2 pystoi
    pip install --no-deps --target FOLDER torch_stoi importlib_resources docstring_parser fire termcolor future requests
    pip install --no-deps --target FOLDER lazy_loader decorator audioread numba llvmlite joblib scikit-learn narwhals
    pip install --no-deps --target FOLDER threadpoolctl pooch msgpack ipython markdown-it-py mdurl cloudpickle pygments
    pip install --no-deps --target FOLDER tensorboard tensorboard-data-server grpcio absl-py protobuf markdown werkzeug

Weights are random, and the audio is synthetic voices. Ours and theirs alternate, after an untimed warm-up round.
Speedups are ratios of medians: absolute times mean little on shared machines.

A step is that of `CodecTraining` under Lightning's trainer, without EMA, which the peers don't have. On a CPU our
training makes glibc keep freed memory; the peers run with its defaults. DAC's step is the published loop (arXiv
2306.06546) with its package's networks, losses and discriminator. EnCodec's package has no losses: its networks and
discriminator are trained as its paper describes (arXiv 2210.13438, section 3.4), with our losses and its balancer.
`exact` alternates discriminator and codec steps like the peers, `shared` reuses one discriminator pass for both,
`every 2` updates the discriminator in every other step.

Encoding maps a waveform to codes, decoding maps codes to a waveform, in one call and without gradients. The peers run
eager. Ours runs eager, eager with weight norm folded as in export ("folded"), with `torch.compile`, AOTInductor,
TorchScript and ONNX Runtime. Compilation and export are not timed.
"""

import argparse
import csv
import gc
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import hydra
import onnxruntime
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from varitok.codecs.build import build, build_codec
from varitok.codecs.codec import Codec
from varitok.codecs.losses.spectral import MultiScaleMel
from varitok.codecs.modalities.audio import Audio
from varitok.codecs.training.malloc import keep_freed_memory
from varitok.codecs.training.module import CodecTraining
from varitok.codecs.training.run import build_run
from varitok.data.batch import Batch
from varitok.data.synthetic.audio import Voices
from varitok.export.exporters.frozen import FrozenCodec, freeze
from varitok.export.exporters.onnx import export_onnx
from varitok.export.exporters.torchscript import export_torchscript, load_torchscript

Clock = Callable[[], float]
SMALL = ("codec.encoder.base=32", "codec.encoder.width=512", "codec.decoder.base=32", "bottleneck.dim=512")
PLAIN = ("~data.loudness", "~data.gain")  # options that synthetic voices don't have


class Cell(NamedTuple):
    """A codec to compare.

    Attributes:
        name: Name of the comparison.
        experiment: Name of our experiment.
        changed: Overrides of the experiment.
        trained: Further overrides for the training step: a size at which it takes seconds.
        batch: Batch size of a step.
        peers: Builders of the peers' codecs at the published size, by name; speedups are relative to the first.
        step: Builder of the peer's training step; None if its package can't train.
    """

    name: str
    experiment: str
    changed: tuple[str, ...]
    trained: tuple[str, ...]
    batch: int
    peers: dict[str, Callable[[], "Coder"]]
    step: "Callable[[DictConfig], PeerStep] | None"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        cell: Name of the comparison.
        what: "step", "encode" or "decode".
        form: One of our forms, or a peer.
        threads: Number of CPU threads.
        parameters: Trainable parameters; for a step, including the discriminator's.
        figure: For a step, seconds of audio trained per second; else seconds per second of audio (real-time factor).
        speedup: Speed relative to the first peer's.
    """

    cell: str
    what: str
    form: str
    threads: int
    parameters: int
    figure: float
    speedup: float

    def told(self) -> list[str]:
        """Return the columns as text."""
        return [*map(str, self[:5]), f"{self.figure:.4g}", f"{self.speedup:.3g}"]


class Coder(NamedTuple):
    """An encode and a decode function of one codec.

    Attributes:
        encode: Maps waveforms `(1, 1, t)` to codes.
        decode: Maps codes, in the codec's own format, to waveforms.
        parameters: Number of trainable parameters.
    """

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Any]
    parameters: int


class PeerStep(NamedTuple):
    """A peer's training step on waveforms `(b, 1, t)`, and the trainable parameters of its codec and discriminator."""

    run: Callable[[Tensor], None]
    codec: int
    discriminator: int


def numbers(module: nn.Module) -> int:
    """Count a module's trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def dac_step(config: DictConfig) -> PeerStep:
    """Build DAC's published training step, for networks as wide as ours."""
    signal_of = import_module("audiotools").AudioSignal
    losses = import_module("dac.nn.loss")
    codec, rate = config.codec, config.data.sample_rate
    strides = list(codec.encoder.strides)
    generator = (
        import_module("dac")
        .DAC(
            codec.encoder.base,
            strides,
            codec.encoder.width,
            codec.decoder.base * 2 ** len(strides),
            strides[::-1],
            config.bottleneck.num_codebooks,
            quantizer_dropout=0.5,
            sample_rate=rate,
        )
        .train()
    )
    judge = import_module("dac.model.discriminator").Discriminator(sample_rate=rate).train()
    windows = list(config.objective.terms.mel.module.windows)
    mel = losses.MelSpectrogramLoss(
        list(config.objective.terms.mel.module.bands),
        windows,
        mag_weight=0.0,
        pow=1.0,
        mel_fmin=[0.0] * len(windows),
        mel_fmax=[None] * len(windows),
    )
    spectra, wave, adversarial = losses.MultiScaleSTFTLoss(), losses.L1Loss(), losses.GANLoss(judge)
    rates = {"lr": config.optim.codec.lr, "betas": tuple(config.optim.codec.betas)}
    first = torch.optim.AdamW(generator.parameters(), **rates)
    second = torch.optim.AdamW(judge.parameters(), **rates)

    def run(real: Tensor) -> None:
        signal = signal_of(real, rate)
        out = generator(signal.audio_data, rate)
        fake = signal_of(out["audio"], rate)
        told = adversarial.discriminator_loss(fake, signal)
        second.zero_grad()
        told.backward()
        clip_grad_norm_(judge.parameters(), 10.0)
        second.step()
        with torch.no_grad():  # weight 0; logged only
            spectra(fake, signal), wave(fake, signal)
        heard, features = adversarial.generator_loss(fake, signal)
        loss = 15 * mel(fake, signal) + heard + 2 * features
        loss = loss + 0.25 * out["vq/commitment_loss"] + out["vq/codebook_loss"]
        first.zero_grad()
        loss.backward()
        clip_grad_norm_(generator.parameters(), 1e3)
        first.step()

    return PeerStep(run, numbers(generator), numbers(judge))


def encodec_step(config: DictConfig) -> PeerStep:
    """Build EnCodec's training step as described in its paper."""
    rate = config.data.sample_rate
    model = import_module("encodec").EncodecModel._get_model([6.0], rate).train()
    windows = list(config.objective.adversarial.discriminator.windows)
    hops = [window // 4 for window in windows]
    judge = (
        import_module("encodec.msstftd")
        .MultiScaleSTFTDiscriminator(32, n_ffts=windows, hop_lengths=hops, win_lengths=windows)
        .train()
    )
    mel: MultiScaleMel = build(config.objective.terms.mel.module)
    weights = {"wave": 0.1, "mel": 2.0, "adversarial": 4.0, "features": 4.0}
    norms: dict[str, float] = {}  # moving averages of the balancer
    rates = {"lr": config.optim.codec.lr, "betas": tuple(config.optim.codec.betas)}
    first = torch.optim.AdamW(model.parameters(), **rates)
    second = torch.optim.AdamW(judge.parameters(), **rates)

    def balanced(losses: dict[str, Tensor], fake: Tensor) -> Tensor:
        total = torch.zeros_like(fake)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
            norm = gradient.norm(dim=(1, 2)).mean().item()
            norms[name] = 0.999 * norms.get(name, norm) + 0.001 * norm
            total += weights[name] / sum(weights.values()) / (norms[name] + 1e-12) * gradient
        return total

    def run(real: Tensor) -> None:
        embedded = model.encoder(real)
        quantized = model.quantizer(embedded, model.frame_rate, 6.0)
        fake = model.decoder(quantized.quantized)[..., : real.shape[-1]]
        said, _ = judge(fake.detach())
        meant, _ = judge(real)
        told = sum(
            functional.relu(1 + x).mean() + functional.relu(1 - y).mean() for x, y in zip(said, meant, strict=True)
        )
        second.zero_grad()
        (told / len(said)).backward()
        second.step()
        judge.requires_grad_(False)
        said, seen = judge(fake)
        _, wanted = judge(real)
        judge.requires_grad_(True)
        pairs = [(f, r) for one, other in zip(seen, wanted, strict=True) for f, r in zip(one, other, strict=True)]
        losses = {
            "wave": functional.l1_loss(fake, real),
            "mel": mel(fake, real, torch.full((len(real),), real.shape[-1])),
            "adversarial": -sum(one.mean() for one in said) / len(said),
            "features": sum((f - r).abs().mean() / r.abs().mean() for f, r in pairs) / len(pairs),
        }
        first.zero_grad()
        quantized.penalty.backward(retain_graph=True)
        fake.backward(balanced(losses, fake))
        clip_grad_norm_(model.parameters(), config.optim.clip)
        first.step()

    return PeerStep(run, numbers(model), numbers(judge))


def dac_coder() -> Coder:
    """Build descript-audio-codec's DAC at 44.1 kHz."""
    model = import_module("dac").DAC().eval()
    return Coder(
        lambda sound: model.encode(model.preprocess(sound, model.sample_rate))[1],
        lambda codes: model.decode(model.quantizer.from_codes(codes)[0]),
        numbers(model),
    )


def encodec_coder() -> Coder:
    """Build encodec's EnCodec at 24 kHz and 6 kbit/s."""
    model = import_module("encodec").EncodecModel._get_model([6.0]).eval()
    model.set_target_bandwidth(6.0)
    return Coder(model.encode, model.decode, numbers(model))


def transformers_coder(kind: Literal["Dac", "Encodec", "Mimi"], **options: Any) -> Coder:
    """Build one of transformers' codecs, with its default configuration except for `options`."""
    transformers = import_module("transformers")
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options)).eval()
    decode = {
        "Dac": lambda found: model.decode(audio_codes=found.audio_codes),
        "Encodec": lambda found: model.decode(found.audio_codes, found.audio_scales),
        "Mimi": lambda found: model.decode(found.audio_codes),
    }
    return Coder(model.encode, decode[kind], numbers(model))


CELLS = (
    Cell(
        "dac",
        "dac_44k",
        PLAIN,
        SMALL,
        2,
        {"descript-audio-codec": dac_coder, "transformers": lambda: transformers_coder("Dac")},
        dac_step,
    ),
    Cell(
        "encodec",
        "encodec",
        ("bottleneck.num_codebooks=8",),  # of 6 kbit/s
        (),
        2,
        {
            "encodec": encodec_coder,
            "transformers": lambda: transformers_coder("Encodec", target_bandwidths=[6.0]),
        },
        encodec_step,
    ),
    Cell(
        "mimi",
        "mimi",
        (),
        (),
        0,
        {"transformers": lambda: transformers_coder("Mimi", num_quantizers=8, use_cache=False)},
        None,
    ),
)
FORMS = ("eager", "folded", "compile", "AOTInductor", "TorchScript", "ONNX Runtime")
VARIANTS = {"exact": (False, 1), "shared": (True, 1), "every 2": (False, 2)}  # shared, every


def composed(cell: Cell, *overrides: str) -> DictConfig:
    """Compose a cell's configuration, with synthetic voices as data."""
    changed = ("data=voices", "trainer=default", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        return hydra.compose("train", [f"experiment=audio/{cell.experiment}", *changed, *cell.changed, *overrides])


def sounds(rate: int, samples: int, count: int) -> Tensor:
    """Generate synthetic voices `(count, 1, samples)`."""
    made = Voices(rate, samples, length=count, train=False)
    return torch.stack([made[0, index] for index in range(count)])


class Turns(pl.Callback):
    """A callback that alternates our step in each variant with the peer's, and records their times by name.

    Ours runs with freed memory kept, the peer's with glibc's defaults. The first call after a switch is not timed.

    Args:
        peer: Training step of the peer.
        clock: Returns the time in seconds.
        rounds: Number of timed rounds, after an untimed one.
    """

    def __init__(self, peer: Callable[[Tensor], None], clock: Clock, rounds: int) -> None:
        # A variant with discriminator updates in every other step is timed over two steps.
        order = [name for name, (_, every) in VARIANTS.items() for _ in range(every)]
        self.order = [order[0], *order]
        self.batches = len(self.order) * (rounds + 1)
        self.peer, self.clock = peer, clock
        self.times: dict[str, list[float]] = {name: [] for name in (*VARIANTS, "peer")}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: CodecTraining, batch: Batch, batch_idx: int) -> None:
        adversarial = pl_module.objective.adversarial
        adversarial.shared, adversarial.every = VARIANTS[self.order[batch_idx % len(self.order)]]
        gc.collect()
        self.began = self.clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: CodecTraining, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        turn, index = divmod(batch_idx, len(self.order))
        if turn and index:
            self.note(self.order[index])
        if index + 1 == len(self.order):
            keep_freed_memory(keep=False)
            self.peer(batch.signal)
            gc.collect()
            self.began = self.clock()
            self.peer(batch.signal)
            if turn:
                self.note("peer")
            keep_freed_memory()

    def note(self, name: str) -> None:
        """Record the time since `began`."""
        self.times[name].append(self.clock() - self.began)


def steps(cell: Cell, rounds: int, clock: Clock, threads: int) -> list[Row]:
    """Time our training step in each variant, and the peer's."""
    assert cell.step is not None
    config = composed(cell, *cell.trained, "training.ema_decay=0", "training.log_every=1000", "logger.csv=null")
    theirs = cell.step(config)
    turns = Turns(theirs.run, clock, rounds)
    config.updates = turns.batches
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(config, Path(folder))
        rate, codec = config.data.sample_rate, run.module.codec
        signal = sounds(rate, config.data.crop_tokens * codec.downsample[0], cell.batch)
        batch = Batch(signal, torch.full((cell.batch,), signal.shape[2]), (), whole=True)
        run.trainer.callbacks = [turns]
        run.trainer.fit(run.module, DataLoader([batch] * turns.batches, batch_size=None, collate_fn=lambda one: one))
    ours = numbers(codec) + numbers(run.module.objective)
    every = {"peer": 1} | {name: every for name, (_, every) in VARIANTS.items()}
    took = {name: _median(values, every[name]) for name, values in turns.times.items()}
    heard = cell.batch * signal.shape[2] / rate
    rows = []
    for name, seconds in took.items():
        count = theirs.codec + theirs.discriminator if name == "peer" else ours
        rows.append(Row(cell.name, "step", name, threads, count, heard / seconds, took["peer"] / seconds))
    return rows


def _median(values: list[float], every: int) -> float:
    """Return the median of the means over groups of `every` consecutive steps."""
    return statistics.median(statistics.fmean(values[first : first + every]) for first in range(0, len(values), every))


class Direction(nn.Module):
    """A module with one direction of a frozen codec as its forward, as compilers require."""

    def __init__(self, codec: FrozenCodec, name: Literal["encode", "decode"]) -> None:
        super().__init__()
        self.codec = codec
        self.name = name

    def forward(self, given: Tensor) -> Tensor:
        result: Tensor = getattr(self.codec, self.name)(given)
        return result


def forms(codec: Codec, sound: Tensor, folder: Path, threads: int, wanted: Collection[str]) -> dict[str, Coder]:
    """Build the wanted forms of a codec, for waveforms of any length except with `compile`.

    A form that fails is left out, and the reason is printed.
    """
    frozen, count = freeze(codec), numbers(codec)
    with torch.inference_mode():
        codes = frozen.encode(sound)
    sides = {"encode": (Direction(frozen, "encode"), sound), "decode": (Direction(frozen, "decode"), codes)}

    def onnx() -> Coder:
        export_onnx(frozen, folder, sound.repeat(2, 1, 1), {}, Audio.graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        files = [str(folder / f"{part}_model.onnx") for part in ("encoder", "decoder")]
        into, back = (onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"]) for file in files)
        return Coder(
            lambda sound: into.run(None, {into.get_inputs()[0].name: sound.numpy()})[0],
            lambda codes: back.run(None, {back.get_inputs()[0].name: codes})[0],
            count,
        )

    def torchscript() -> Coder:
        export_torchscript(frozen, folder / "codec.pt", {})
        made, _ = load_torchscript(folder / "codec.pt")
        return Coder(made.encode, made.decode, count)

    def compiled() -> Coder:
        torch.compiler.reset()
        into, back = (torch.compile(side, options={"freezing": True}) for side, _ in sides.values())
        return Coder(into, back, count)

    def ahead() -> Coder:
        made = []
        for name, (side, example) in sides.items():
            free = {0: torch.export.Dim.STATIC, 2: torch.export.Dim.AUTO}
            with torch.no_grad():
                program = torch.export.export(side, (example,), dynamic_shapes=(free,))
            package = folder / f"{name}.pt2"
            options = {"freezing": True}
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
            made.append(torch._inductor.aoti_load_package(str(package)))
        return Coder(*made, count)

    makers: dict[str, Callable[[], Coder]] = {
        "eager": lambda: Coder(codec.encode, codec.decode, count),
        "folded": lambda: Coder(frozen.encode, frozen.decode, count),
        "compile": compiled,
        "AOTInductor": ahead,
        "TorchScript": torchscript,
        "ONNX Runtime": onnx,
    }
    made = {}
    for name, make in ((name, makers[name]) for name in FORMS if name in wanted):
        try:
            made[name] = make()
            made[name].decode(made[name].encode(sound))
        except Exception as error:  # compilers and exporters raise classes of their own
            made.pop(name, None)
            print(f"{name}: left out: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", file=sys.stderr)
    return made


def coding(cell: Cell, rounds: int, clock: Clock, threads: int, seconds: float, wanted: Collection[str]) -> list[Row]:
    """Time encoding and decoding of our forms and the peers: a row for each form and direction."""
    config = composed(cell)
    torch.manual_seed(0)
    codec = build_codec(config)
    rate, hop = config.data.sample_rate, codec.downsample[0]
    sound = sounds(rate, round(seconds * rate / hop) * hop, 1)
    codec.train()(sound)  # initializes codebooks from their first batch
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        coders = forms(codec.eval(), sound, Path(folder), threads, wanted)
        coders |= {name: make() for name, make in cell.peers.items()}
        took: dict[tuple[str, str], list[float]] = {
            (name, what): [] for name in coders for what in ("encode", "decode")
        }
        for turn in range(rounds + 1):
            for name, coder in coders.items():
                gc.collect()
                began = clock()
                codes = coder.encode(sound)
                between = clock()
                coder.decode(codes)
                if turn:
                    took[name, "decode"].append(clock() - between)
                    took[name, "encode"].append(between - began)
    rows = []
    for (name, what), values in took.items():
        seconds, base = statistics.median(values), statistics.median(took[next(iter(cell.peers)), what])
        factor = seconds * rate / sound.shape[2]
        rows.append(Row(cell.name, what, name, threads, coders[name].parameters, factor, base / seconds))
    return rows


def processor() -> str:
    """Return the CPU's model name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    """Run the comparison, print its table and write its CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [cell.name for cell in CELLS]
    parser.add_argument("--peers", type=Path, required=True, help="folder of the installed peers")
    parser.add_argument("--only", nargs="+", choices=["step", "code"], default=["step", "code"])
    parser.add_argument("--cells", nargs="+", choices=names, default=names)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of the encoded waveform")
    parser.add_argument("--cpu", action="store_true", help="measure CPU time instead of wall time; for busy machines")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not (options.peers / "dac").is_dir():
        parser.error(f"--peers: {options.peers} has no peers; see --help")
    sys.path.append(str(options.peers))  # last, so that its libraries don't shadow ours
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    clock = time.process_time if options.cpu else time.perf_counter
    versions = ", ".join(f"{name} {version(name)}" for name in ("descript-audio-codec", "encodec", "transformers"))
    told = [
        f"python benchmarks/audio.py {' '.join(sys.argv[1:])}".rstrip(),
        f"{processor()}, {os.cpu_count()} CPUs; torch {torch.__version__}; {versions}; "
        f"{'processor' if options.cpu else 'wall'} time, medians of {options.rounds} turns",
        "step: seconds of sound trained on a second; encode, decode: seconds a second of sound (real-time factor)",
    ]
    print("\n".join(told), "", f"| {' | '.join(Row._fields)} |", "|---" * len(Row._fields) + "|", sep="\n")
    rows: list[Row] = []
    for cell in (cell for cell in CELLS if cell.name in options.cells):
        for threads in options.threads:
            torch.set_num_threads(threads)
            found = steps(cell, options.rounds, clock, threads) if "step" in options.only and cell.step else []
            if "code" in options.only:
                found += coding(cell, options.rounds, clock, threads, options.seconds, options.forms)
            for row in found:
                print(f"| {' | '.join(row.told())} |", flush=True)
            rows += found
            if options.out:  # after each cell, so that an interrupted run keeps its rows
                write(options.out, told, rows)


def write(path: Path, told: list[str], rows: list[Row]) -> None:
    """Write the table as CSV, with comment lines first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in told)
        csv.writer(file).writerows([Row._fields, *(row.told() for row in rows)])


if __name__ == "__main__":
    main()
