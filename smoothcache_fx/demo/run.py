"""The demo: calibrate, schedule, compile and sample the trained model, and measure all of it."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibration import Calibration
from ..capture import _torch
from ..compiled.compiler import compile
from ..graphs.tables import format_table
from ..measure.calibrate import calibrate
from ..plots import new_figure, plot_errors, plot_schedules, plot_site_errors
from ..reports.compare import WIDE, psnr, spread_of
from ..reports.report import report
from ..schedules.schedule import Schedule
from .extras import require
from .judge import load_judge
from .model import DiT
from .sampler import sample
from .weights import load_model

#: Images sampled at a time, as many of each class, with twice as many in the model for guidance.
BATCH = 40
EAGER, COMPILED = "eager", "torch.compile"
#: Batches of each configuration at least, which take turns: one alone would not show how far times spread.
ROUNDS = 3


@dataclass
class Configuration:
    """One way to sample, with what was measured of it."""

    name: str
    steps: int
    run: Callable[[Tensor, int], Tensor]
    computed: str
    mac_ratio: float
    images: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    psnr: float | None = None
    accuracy: float | None = None
    distance: float | None = None


@dataclass
class Row:
    """A line of the demo's table; eager mode is there for its time, so its samples are not judged.

    ``psnr`` is the median over the images, in dB, to those of ``torch.compile`` from the same noise.
    """

    name: str
    steps: int
    computed: str
    mac_ratio: float
    speedup_over_compile: float
    speedup_over_eager: float
    spread: float
    psnr: float | None
    accuracy: float | None
    frechet_distance: float | None


def calibration_trajectories(model: DiT, count: int, steps: int) -> Tensor:
    """The paper's calibration: ``count`` trajectories, here of one class each; returns the samples."""
    labels = (torch.tensor([seed % model.num_classes]) for seed in range(count))
    return torch.cat([sample(model, label, steps=steps, seed=1000 + seed) for seed, label in enumerate(labels)])


def run_demo(
    output: Path,
    *,
    samples: int = 120,
    alphas: tuple[float, ...],
    budgets: tuple[float, ...] = (),
    steps: int = 50,
    backend: str = "inductor",
    say: Callable[[str], None],
) -> list[Row]:
    """Run everything, write files into ``output``, and return the table's rows.

    Args:
        output: folder for the calibration, the schedules, the table and the pictures; made if missing.
        samples: images per configuration, rounded up to whole batches of 40, three at least.
        alphas: thresholds of the paper's rule to make schedules for.
        budgets: shares of the branches' FLOPs to make schedules for.
        steps: denoising steps.
        backend: inner compiler, for the plain and the cached model alike.
        say: gets each line for the user.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    tqdm = require("tqdm.auto").tqdm
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge, model = load_judge(), load_model(device)
    say(f"A {len(model.blocks)}-block DiT trained on Fashion-MNIST, on {device}.")

    calibration = calibrate(model, lambda model: calibration_trajectories(model, 10, steps))
    calibration.save(output / "calibration.json")
    say(str(calibration))
    schedules = {f"alpha {alpha:g}": calibration.schedule(alpha=alpha) for alpha in alphas}
    schedules |= {f"compute {budget:g}": calibration.schedule(compute=budget) for budget in budgets}
    for name, schedule in schedules.items():
        schedule.save(output / f"schedule-{name.replace(' ', '-')}.json")
        say(f"\n{name}\n{schedule}")

    configurations = _configurations(model, schedules, steps, backend, tqdm)
    batches = max(ROUNDS, -(-samples // BATCH))
    _sample_all(configurations, batches, tqdm)
    uncached = next(torch.cat(c.images) for c in configurations if c.name == COMPILED)
    for configuration in configurations:
        if configuration.name == EAGER:
            continue
        images = torch.cat(configuration.images)
        if configuration.name != COMPILED:
            configuration.psnr = statistics.median(map(psnr, uncached, images))
        configuration.accuracy = judge.accuracy(images, _labels(batches))
        configuration.distance = judge.frechet_distance(images)
    rows = _rows(configurations)
    floor = judge.real_frechet_distance(batches * BATCH)
    say("\n" + table(rows))
    if wide := [row.name for row in rows if row.spread > WIDE]:
        say(f"Unreliable times, rounds more than {WIDE:.0%} apart: {', '.join(wide)}. Is the machine busy?")
    say(
        f"{batches * BATCH} images each; Frechet distance of as many real images to held-out ones {floor:.2f}; "
        f"the classifier recognises {judge.held_out_accuracy:.1%} of held-out real images. PSNR: median over the "
        "images, in dB, to torch.compile's of the same noise."
    )
    _write(output, rows, floor, judge.held_out_accuracy, batches * BATCH, table(rows))
    _pictures(output, configurations, calibration, schedules, alphas)
    say(f"Pictures, schedules and figures are in {output}/")
    return rows


def _configurations(
    model: DiT, schedules: dict[str, Schedule], steps: int, backend: str, tqdm: Any
) -> list[Configuration]:
    """Uncached in eager mode and compiled, cached by each schedule, and fewer steps at equal compute."""
    plain = copy.deepcopy(model)
    plain.forward = _torch.dynamo_compile(plain.forward, _torch.named_backend(backend))
    everything = f"{steps} {steps}"
    made = [
        Configuration(EAGER, steps, _sampler(model, steps), everything, 1.0),
        Configuration(COMPILED, steps, _sampler(plain, steps), everything, 1.0),
    ]
    fewer = []
    warm = _labels(1)
    with tqdm(total=2 + len(schedules), desc="compiling", unit=" models") as bar:
        for configuration in made:
            sample(model if configuration.name == EAGER else plain, warm, steps=1)
            bar.update()
        for name, schedule in schedules.items():
            cached = compile(copy.deepcopy(model), schedule, backend=backend)
            sample(cached, warm, steps=steps)
            ratio = report(cached).mac_ratio
            computed = " ".join(str(sum(row)) for row in schedule.compute.values())
            made.append(Configuration(name, steps, _sampler(cached, steps), computed, ratio))
            count = max(1, round(steps / ratio))
            fewer.append(
                Configuration(f"{count} steps", count, _sampler(plain, count), f"{count} {count}", steps / count)
            )
            bar.update()
    return made + list({configuration.name: configuration for configuration in fewer}.values())


def _sampler(model: DiT, steps: int) -> Callable[[Tensor, int], Tensor]:
    return lambda labels, seed: sample(model, labels, steps=steps, seed=seed)


def _labels(batches: int) -> Tensor:
    return torch.arange(batches * BATCH) % 10


def _sample_all(configurations: list[Configuration], batches: int, tqdm: Any) -> None:
    """Sample batch by batch, the configurations taking turns, so that a slow spell hits all of them.

    Eager mode takes the longest, and is there for its time alone: it has the first batch only.
    """
    with tqdm(total=batches * (len(configurations) - 1) + 1, desc="sampling", unit=" batches") as bar:
        for batch in range(batches):
            for configuration in configurations:
                if configuration.name == EAGER and batch:
                    continue
                start = time.perf_counter()
                images = configuration.run(_labels(1), batch).cpu()  # the copy waits for the device
                configuration.seconds.append(time.perf_counter() - start)
                configuration.images.append(images)
                bar.update()


def _rows(configurations: list[Configuration]) -> list[Row]:
    by_name = {configuration.name: configuration for configuration in configurations}

    def speedups(base: str, configuration: Configuration) -> list[float]:
        pairs = zip(by_name[base].seconds, configuration.seconds, strict=False)  # eager has one batch only
        return [slow / fast for slow, fast in pairs]

    return [
        Row(
            c.name,
            c.steps,
            c.computed,
            c.mac_ratio,
            statistics.median(speedups(COMPILED, c)),
            statistics.median(speedups(EAGER, c)),
            spread_of(speedups(COMPILED, c)),
            c.psnr,
            c.accuracy,
            c.distance,
        )
        for c in configurations
    ]


def table(rows: list[Row]) -> str:
    """The rows as text."""
    heading = (
        "",
        "steps",
        "computed attn ffn",
        "MAC ratio",
        "x torch.compile",
        "spread",
        "x eager",
        "PSNR",
        "recognised",
        "Frechet",
    )
    body = [
        (
            row.name,
            str(row.steps),
            row.computed,
            f"{row.mac_ratio:.2f}",
            f"{row.speedup_over_compile:.2f}",
            "-" if row.name in (EAGER, COMPILED) else f"{row.spread:.0%}",
            f"{row.speedup_over_eager:.2f}",
            "-" if row.psnr is None else f"{row.psnr:.1f}",
            "-" if row.accuracy is None else f"{row.accuracy:.1%}",
            "-" if row.frechet_distance is None else f"{row.frechet_distance:.2f}",
        )
        for row in rows
    ]
    return format_table([heading, *body])


def _write(output: Path, rows: list[Row], floor: float, held_out: float, samples: int, text: str) -> None:
    result = {
        "rows": [asdict(row) for row in rows],
        "samples": samples,
        "real_versus_real_frechet_distance": floor,
        "classifier_held_out_accuracy": held_out,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (output / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (output / "table.txt").write_text(text + "\n")


def _pictures(
    output: Path,
    configurations: list[Configuration],
    calibration: Calibration,
    schedules: dict[str, Schedule],
    alphas: tuple[float, ...],
) -> None:
    plot_errors(calibration, output / "errors.png", alphas=alphas)
    plot_site_errors(calibration, output / "sites.png")
    fora = Schedule.uniform(calibration.steps, 3, kinds=("attn", "ffn"))
    plot_schedules(schedules | {"FORA, every 3rd": fora}, output / "schedules.png")
    shown = [c for c in configurations if c.name != EAGER]
    plot_samples({c.name: c.images[0][:20] for c in shown}, output / "samples.png")


def plot_samples(images: dict[str, Tensor], path: Path) -> None:
    """One row of pictures per entry, ``[n, 1, size, size]`` in [-1, 1]; the same column has the same seed."""
    columns = max(len(row) for row in images.values())
    figure = new_figure(0.42 * columns + 1.1, 0.42 * len(images))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(images), columns, squeeze=False)
    for line, (name, row) in zip(axes, images.items(), strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        for axis in line:
            axis.axis("off")
        line[0].text(-0.35, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=150)
