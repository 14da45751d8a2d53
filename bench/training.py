"""Training on the CPU by density mode: images/s, memory and loss against reference.py, and what the digits learn.

    python bench/training.py [--part speed|memory|quality|all] [--rounds 5] [--seeds 3] [--out bench/results]

Speed: S/2 at 256, float32; all contenders of a row run in this process and take turns. Quality: a FlexDiT of the demo's
size, from the same dense model, in ragged and in piecewise training for the same number of steps. Run it on an idle
machine; it takes about a quarter of an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import RESULTS, bars, machine, machine_line, measure, peak_memory_mb, table, write

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig, Sampler, reference
from flexdit_ext.convert import sparsify

BATCH = 8
FIXED = (8, 8)
# Times what its multiply-accumulates cost in padded training; and ragged quality over piecewise quality. From issue 6.
MOST_RAGGED_COST, MOST_DISTANCE_RATIO = 1.1, 1.0
MODES = ("dense", "fixed", "piecewise", "padded", "ragged")
CONTENDERS = ("flexdit_ext", "reference, eager", "reference, torch.compile")
DENSE_LAYOUT = {"num_pooling_blocks": 0, "num_sdtm": 0, "num_dense_blocks": 12}


# ---- speed ----------------------------------------------------------------------------------------------------------


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps spread evenly, two in each segment of the schedule, and labels."""
    x = torch.randn(BATCH, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, (torch.arange(BATCH) * 1000 + 500) // BATCH, torch.arange(BATCH)


def grids_of(mode: str, schedule: DensitySchedule) -> list:
    """The grid argument of each forward pass that makes up a step of this mode; piecewise training takes all four
    segments in turn."""
    _, t, _ = inputs()
    return {
        "dense": [None],
        "fixed": [FIXED],
        "piecewise": list(schedule.grids),
        "padded": [schedule.grids[0]],
        "ragged": [[schedule.grid(step) for step in t.tolist()]],
    }[mode]


def config_of(mode: str) -> FlexDiTConfig:
    return FlexDiTConfig.preset("S/2", **DENSE_LAYOUT if mode == "dense" else {})


def make(mode: str, contender: str) -> torch.nn.Module:
    """Random weights everywhere, the same for all contenders of a mode."""
    model = FlexDiT(config_of(mode)).eval()  # no label is dropped
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    if contender == "flexdit_ext":
        return model
    rival = reference.FlexDiT(model.config).eval()
    rival.load_state_dict(model.state_dict())
    # A graph for every grid: Inductor does not take adaptive pooling to a grid that it does not know.
    return torch.compile(rival, dynamic=False) if contender.endswith("compile") else rival


def training_step(model: torch.nn.Module, grids: list):
    """Forward and backward passes of a step; returns the last loss."""
    x, t, y = inputs()

    def run() -> float:
        for grid in grids:
            model.zero_grad()
            loss = model(x, t, y, grid=grid).square().mean()
            loss.backward()
        return loss.item()

    return run


def macs_of(mode: str) -> float:
    """Forward multiply-accumulates per image."""
    model = FlexDiT(config_of(mode), device="meta")
    grids = [grid for one in grids_of(mode, model.schedule) for grid in (one if isinstance(one, list) else [one])]
    return statistics.mean(model.macs(grid) for grid in grids)


def contenders_of(mode: str) -> list[str]:
    """The reference takes ragged batches sample by sample: compiled it would be a graph for every list of grids."""
    return [name for name in CONTENDERS if mode != "ragged" or not name.endswith("compile")]


def speed(rounds: int) -> list[dict]:
    rows = []
    for mode in MODES:
        schedule = config_of(mode).density_schedule
        grids = grids_of(mode, schedule)
        runs = {name: training_step(make(mode, name), grids) for name in contenders_of(mode)}
        losses = {name: run() for name, run in runs.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-4 * max(losses.values()), losses
        times = measure(runs, rounds)
        for result in times.values():
            result["images_per_second"] = BATCH * len(grids) / result["median_ms"] * 1e3
        rows.append({"name": mode, "passes": len(grids), "macs": macs_of(mode), "losses": losses, "contenders": times})
        del runs
        torch._dynamo.reset()
    measure_memory(rows)
    return rows


def peak_of(mode: str, contender: str) -> float:
    """Peak memory in MB of a process that takes one step of this kind."""
    command = [sys.executable, __file__, "--memory", mode, contender]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(mode: str, contender: str) -> None:
    training_step(make(mode, contender), grids_of(mode, config_of(mode).density_schedule))()
    print(peak_memory_mb())


def measure_memory(rows: list[dict]) -> None:
    for row in rows:
        for name, result in row["contenders"].items():
            result["peak_mb"] = peak_of(row["name"], name)


def ragged_cost(rows: list[dict], other: str) -> float:
    """Time of ragged training over that of another mode, both per multiply-accumulate."""
    per_mac = {row["name"]: row["contenders"]["flexdit_ext"]["median_ms"] / row["passes"] / row["macs"] for row in rows}
    return per_mac["ragged"] / per_mac[other]


# ---- quality --------------------------------------------------------------------------------------------------------

_COMMON = {
    "input_size": 8,
    "patch_size": 1,
    "in_channels": 1,
    "hidden_size": 64,
    "num_heads": 4,
    "num_classes": 10,
    "learn_sigma": False,
    "class_dropout_prob": 0.1,
}
DENSE = _COMMON | {"num_pooling_blocks": 0, "num_sdtm": 0, "num_dense_blocks": 8}
SPARSE = FlexDiTConfig(
    **_COMMON,
    num_pooling_blocks=1,
    num_sdtm=1,
    sdtm_blocks=(1, 2, 1, 1),
    num_dense_blocks=2,
    schedule=DensitySchedule(((5, 5), (4, 4), (3, 3), (3, 3))),
)


def train_run(folder: Path, model: dict, steps: int, seed: int, **density) -> FlexDiT:
    """`flexdit train` on the digits; the averaged model."""
    from flexdit_ext.training import TrainingConfig, train

    config = {
        "output": str(folder),
        "steps": steps,
        "batch_size": 64,
        "seed": seed,
        "loss": "flow",
        "timesteps": "stratified",
        "model": model,
        "data": {"kind": "digits"},
        "optimizer": {
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "betas": [0.9, 0.99],
            "max_gradient_norm": 1.0,
        },
        "average": {"decay": 0.99},
        "density": density,
        "checkpoint": {"every": steps},
        "log": {"every": steps, "tensorboard": False},
    }
    assert train(TrainingConfig.from_dict(config)) == 0
    return FlexDiT.from_pretrained(folder / "model")


def judge(model: FlexDiT, classifier, real, seed: int, sets: int, per_class: int) -> dict:
    """Fréchet distance to the real digits, the mean over sets, and the classifier's accuracy."""
    from flexdit_ext.evaluation import digits

    labels = torch.arange(digits.NUM_CLASSES).repeat(per_class)
    sampler, distances, right = Sampler(model), [], []
    for number in range(sets):
        images = sampler.sample(labels, 25, "flow", 1.5, seed, start_index=number * len(labels), batch_size=100)
        distances.append(digits.distance(digits.features(classifier, images), real))
        right.append(digits.accuracy(classifier, images, labels))
    return {"distance": statistics.mean(distances), "accuracy": statistics.mean(right)}


def quality(seeds: int, fork: int, steps: int, sets: int, per_class: int) -> list[dict]:
    """For each seed a dense model of `fork` steps, from which both modes take `steps` more."""
    from flexdit_ext.evaluation import digits

    rows = []
    for seed in range(seeds):
        split = digits.load_split(seed)
        steps_of_classifier = min(digits.CLASSIFIER_STEPS, 4 * steps)
        classifier = digits.train_classifier(
            split.train_images, split.train_labels, steps_of_classifier, seed, progress=False
        )
        real = digits.features(classifier, split.train_images)
        with tempfile.TemporaryDirectory() as root:
            dense = train_run(Path(root) / "dense", DENSE, fork, seed)
            sparsify(dense, SPARSE).save_pretrained(Path(root) / "start")
            start = {"checkpoint": str(Path(root) / "start")}
            row = {"seed": seed, "fork": fork, "steps": steps}
            for mode in ("ragged", "piecewise"):
                model = train_run(Path(root) / mode, start, steps, seed + 1000, mode=mode)
                row[mode] = judge(model, classifier, real, seed, sets, per_class)
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


# ---- the report -----------------------------------------------------------------------------------------------------


def speed_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        ours = row["contenders"]["flexdit_ext"]
        for name, times in row["contenders"].items():
            ratio = times["median_ms"] / ours["median_ms"]
            lines.append(
                [
                    row["name"],
                    name,
                    f"{times['images_per_second']:.2f}" + ("" if times is ours else f" ({ratio:.2f}x slower)"),
                    f"{times['peak_mb']:.0f}",
                    f"{row['losses'][name]:.6f}",
                    f"{row['macs'] / 1e9:.2f}",
                ]
            )
    return table(["mode", "", "images/s", "peak memory, MB", "loss", "GMACs per image, forward"], lines)


def quality_table(rows: list[dict]) -> str:
    lines = [
        [str(row["seed"])]
        + [f"{row[mode]['distance']:.3f} / {row[mode]['accuracy']:.1%}" for mode in ("ragged", "piecewise")]
        + [f"{row['ragged']['distance'] / row['piecewise']['distance']:.3f}"]
        for row in rows
    ]
    return table(["seed", "ragged: Fréchet distance / accuracy", "piecewise", "ratio of the distances"], lines)


def verdict(value: float, most: float) -> str:
    return f"{value:.2f}, asked at most {most}: {'met' if value <= most else 'MISSED'}"


def report(result: dict) -> str:
    parts = [machine_line(result["machine"]) + "\n"]
    if rows := result.get("speed"):
        parts.append(
            f"S/2 at 256, float32, batch {BATCH}, forward and backward, random weights. Every sample of a ragged batch "
            "is on the grid of its own timestep; padded: all on the largest grid; piecewise: a pass for each segment.\n"
        )
        parts.append(speed_table(rows))
        for other in ("padded", "piecewise"):
            cost = ragged_cost(rows, other)
            parts.append(
                f"Ragged over {other} training, time per multiply-accumulate: {verdict(cost, MOST_RAGGED_COST)}.\n"
            )
    if rows := result.get("quality"):
        parts.append(
            f"Digits: a dense DiT of {rows[0]['fork']} steps, from which each mode fine-tunes a FlexDiT for "
            f"{rows[0]['steps']} steps of 64 images by `flexdit train`; sampled with 25 Euler steps and guidance 1.5.\n"
        )
        parts.append(quality_table(rows))
        ratio = statistics.mean(row["ragged"]["distance"] / row["piecewise"]["distance"] for row in rows)
        parts.append(f"Mean ratio of the distances, ragged over piecewise: {verdict(ratio, MOST_DISTANCE_RATIO)}.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["speed", "memory", "quality", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fork", type=int, default=400, help="steps of the dense model")
    parser.add_argument("--steps", type=int, default=800, help="steps of fine-tuning")
    parser.add_argument("--sets", type=int, default=3, help="of samples")
    parser.add_argument("--per-class", type=int, default=50, help="samples of a set")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", nargs=2, metavar=("MODE", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        return print_peak(*arguments.memory)
    path = arguments.out / "training.json"
    result = json.loads(path.read_text()) if path.exists() and arguments.part != "all" else {}
    if arguments.part != "memory":
        result["machine"] = machine()
    if arguments.part == "memory":
        measure_memory(result["speed"])
    if arguments.part in ("speed", "all"):
        result["speed"] = speed(arguments.rounds)
        bars(result["speed"], arguments.out / "training.png")
    if arguments.part in ("quality", "all"):
        result["quality"] = quality(
            arguments.seeds, arguments.fork, arguments.steps, arguments.sets, arguments.per_class
        )
    write("training", result, report(result), arguments.out)


if __name__ == "__main__":
    main()
