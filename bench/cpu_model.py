"""FlexDiT on the CPU against reference.py: forward of XL/2 at 256, training step of B/2, peak memory.

    python bench/cpu_model.py [--threads 2] [--rounds 7]

All contenders of a row run in this process and take turns; medians are compared. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch
from harness import machine, machine_line, measure, peak_memory_mb, table, write

from flexdit_ext import FlexDiT, FlexDiTConfig, reference

GRID = (8, 8)
# (row, contender to beat) -> times as fast, from the issue that asked for this backend.
TARGETS = {
    ("XL/2 256 forward, float32, batch 1", "reference, eager"): 2.2,
    ("XL/2 256 forward, float32, batch 1", "reference, torch.compile"): 2.0,
    ("XL/2 256 forward, bfloat16, batch 1", "reference, autocast, torch.compile"): 1.3,
    ("B/2 256 training step, float32, batch 4", "reference, eager"): 1.8,
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: modulations that start at zero would make blocks the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return model


def models(size: str) -> tuple[FlexDiT, torch.nn.Module]:
    config = FlexDiTConfig.preset(size, image_size=256)
    ours = randomized(FlexDiT(config)).eval()
    rival = reference.FlexDiT(config).eval()
    rival.load_state_dict(ours.state_dict())
    return ours, rival


def inputs(batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 32, 32, generator=generator).to(dtype)
    return x, torch.full((batch,), 500), torch.arange(batch)


def under(context, run):
    """run() inside a context that is made anew for every call."""

    def call():
        with context():
            return run()

    return call


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def forward_rows(rounds: int) -> dict[str, dict]:
    ours, rival = models("XL/2")
    compiled = torch.compile(rival)
    x, t, y = inputs(1, torch.float32)

    def call(model, x=x):
        return lambda: model(x, t, y, grid=GRID)

    rows = {}
    with torch.no_grad():
        torch.testing.assert_close(call(ours)(), call(rival)(), atol=1e-4, rtol=1e-4)
        rows["XL/2 256 forward, float32, batch 1"] = measure(
            {
                "flexdit_ext": call(ours),
                "reference, eager": call(rival),
                "reference, torch.compile": call(compiled),
            },
            rounds,
        )
        half = x.bfloat16()
        autocast_rivals = {
            "reference, autocast, eager": under(autocast, call(rival)),
            "reference, autocast, torch.compile": under(autocast, call(compiled)),
        }
        for run in autocast_rivals.values():  # before the float32 weights of ours make room
            run()
        ours = ours.to(torch.bfloat16)
        pure = reference.FlexDiT(ours.config).eval().to(torch.bfloat16)
        pure.load_state_dict(ours.state_dict())
        rows["XL/2 256 forward, bfloat16, batch 1"] = measure(
            {
                "flexdit_ext": call(ours, half),
                **autocast_rivals,
                "reference in bfloat16, torch.compile": call(torch.compile(pure), half),
            },
            rounds,
        )
    return rows


def training_row(rounds: int) -> dict[str, dict]:
    ours, rival = models("B/2")
    x, t, y = inputs(4, torch.float32)

    def step(model):
        def run():
            model.zero_grad()
            model(x, t, y, grid=GRID).square().mean().backward()

        return run

    return {
        "B/2 256 training step, float32, batch 4": measure(
            {
                "flexdit_ext": step(ours),
                "reference, eager": step(rival),
                "reference, torch.compile": step(torch.compile(rival)),
            },
            rounds,
        )
    }


def peak_memory_child() -> None:
    """Prints MB: weights, and how far building the model and one forward raised the peak of a fresh process."""
    before = peak_memory_mb()
    model = FlexDiT(FlexDiTConfig.preset("XL/2", image_size=256)).eval()
    x, t, y = inputs(1, torch.float32)
    with torch.no_grad():
        for _ in range(2):
            model(x, t, y, grid=GRID)
    after = peak_memory_mb()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    print(weights / 1e6, (after - before) * 1024**2 / 1e6)


def peak_memory() -> dict:
    output = subprocess.run(
        [sys.executable, __file__, "--peak-memory"], capture_output=True, text=True, check=True
    ).stdout
    weights, peak = map(float, output.split())
    return {"weights_mb": weights, "peak_mb": peak, "allowed_mb": 1.1 * weights + 200}


def markdown(result: dict) -> str:
    rows = []
    for row, contenders in result["rows"].items():
        ours = contenders["flexdit_ext"]["median_ms"]
        for name, times in contenders.items():
            ratio, target = times["median_ms"] / ours, TARGETS.get((row, name))
            asked = "" if target is None else f"{target}x, {'met' if ratio >= target else 'MISSED'}"
            rows.append([row, name, f"{times['median_ms']:.0f}", f"{ratio:.2f}x", asked])
    memory, where = result["memory"], result["machine"]
    met = "met" if memory["peak_mb"] <= memory["allowed_mb"] else "MISSED"
    return (
        f"{machine_line(where)} Sparse grid {GRID[0]}x{GRID[1]}. "
        f"Medians of {result['rounds']} rounds; ratio: how many times as fast flexdit_ext is.\n\n"
        + table(["what", "contender", "ms", "ratio", "asked"], rows)
        + f"\nPeak memory of XL/2's forward, float32: {memory['peak_mb']:.0f} MB over the imports, weights included "
        f"(weights {memory['weights_mb']:.0f} MB, allowed {memory['allowed_mb']:.0f} MB: {met}).\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_memory:
        peak_memory_child()
        return
    result = {"machine": machine(), "rounds": arguments.rounds, "memory": peak_memory()}
    result["rows"] = training_row(arguments.rounds) | forward_rows(arguments.rounds)
    write("cpu_model", result, markdown(result))


if __name__ == "__main__":
    main()
