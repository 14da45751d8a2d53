"""Serving: Poisson arrivals of mixed requests to continuous batching, to fixed batches, and to one at a time.

    python bench/serving.py                      # a small model on the CPU, bfloat16, 2 threads
    python bench/serving.py --device cuda        # XL/2 at 256
    python bench/serving.py --smoke              # a tiny model for seconds, results to a temporary folder

Every server is a Session of the same Sampler and gets the same requests at the same times. Loads are shares of what
continuous batching manages when all requests are there at once. Exit code 1: an image was wrong.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_timing import Budget, Device, NotRun, clocks, conditions, folder, reason, relative_error, result_file
from harness import save, write
from latency_loops import DTYPE, model_of, random_weights
from serving_tables import CONTINUOUS, FIXED, SINGLE, markdown, plot

from flexdit_ext import FlexDiT, FlexDiTConfig, Sampler, Session

LOADS = (0.4, 0.7, 0.9)
GUIDANCE = (1.0, 2.0, 4.0)
STEPS = {"cpu": (10, 20, 30), "cuda": (20, 30, 50)}
TOLERANCE = 0.1  # relative, of an image in company against the same alone; bfloat16 products round by their rows


@dataclass(frozen=True)
class Request:
    at: float  # seconds after the start
    label: int
    steps: int
    cfg_scale: float
    seed: int


def trace(count: int, rate: float, steps: tuple[int, ...], num_classes: int, seed: int = 0) -> list[Request]:
    """Poisson arrivals; the same requests, only faster or slower, whatever the rate. All at once at rate infinity."""
    draw, at, requests = random.Random(seed), 0.0, []
    for i in range(count):
        at += draw.expovariate(1.0)
        label = draw.randrange(num_classes)
        requests.append(Request(at / rate, label, draw.choice(steps), draw.choice(GUIDANCE), seed=i))
    return requests


# Servers: which of the waiting requests, oldest first, enter now; how many are in progress; whose time-out to wait for.


class Continuous:
    """All may enter at any step; the session keeps those beyond max_batch waiting."""

    def entering(self, waiting: deque[Request], now: float, busy: int) -> int:
        return len(waiting)

    def wakes(self, waiting: deque[Request]) -> float:
        return math.inf


class FixedBatches:
    """Once idle, as many as are there, when they are `size` or the oldest has waited timeout_s."""

    def __init__(self, size: int, timeout_s: float):
        self.size, self.timeout_s = size, timeout_s

    def entering(self, waiting: deque[Request], now: float, busy: int) -> int:
        ready = len(waiting) >= self.size or (waiting and now >= self.wakes(waiting))
        return min(len(waiting), self.size) if ready and not busy else 0

    def wakes(self, waiting: deque[Request]) -> float:
        return waiting[0].at + self.timeout_s if waiting else math.inf


def serve(
    policy: Continuous | FixedBatches,
    session: Session,
    requests: list[Request],
    limit_s: float,
    keep: Callable[[Request, torch.Tensor], None] = lambda request, image: None,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict:
    """Latencies, the run's length and the mean number of requests that advanced together."""
    coming, waiting, inside = deque(requests), deque(), {}
    latencies, passes, advanced, begin = [], 0, 0, now()
    while (at := now() - begin) < limit_s:
        while coming and coming[0].at <= at:
            waiting.append(coming.popleft())
        for _ in range(policy.entering(waiting, at, len(inside))):
            request = waiting.popleft()
            inside[session.add(request.label, request.steps, "ddim", request.cfg_scale, request.seed)] = request
        if inside:
            session.step()
            passes, advanced = passes + 1, advanced + session.active  # after the step: the finished have left
            finished = session.take()
            done = now() - begin
            for key, image in finished.items():
                if isinstance(image, RuntimeError):
                    raise image
                request = inside.pop(key)
                latencies.append(done - request.at)
                keep(request, image)
            advanced += len(finished)
        elif coming or waiting:
            sleep(max(min(coming[0].at if coming else math.inf, policy.wakes(waiting)) - (now() - begin), 0))
        else:
            break
    for key in inside:  # leave nothing behind for the next run
        session.cancel(key)
    session.take()
    seconds, mean_batch = now() - begin, advanced / passes if passes else 0.0
    return {"latencies_s": latencies, "seconds": seconds, "mean_batch": mean_batch}


def summary(run: dict, requests: int) -> dict:
    """Percentiles are over all requests; those left unfinished count as slower than all others."""
    ordered = sorted(run["latencies_s"])

    def percentile(share: float) -> float | None:
        rank = math.ceil(share * requests) - 1
        return ordered[rank] if rank < len(ordered) else None

    return {
        "images_per_s": len(ordered) / run["seconds"],
        "p50_s": percentile(0.5),
        "p95_s": percentile(0.95),
        "unfinished": requests - len(ordered),
        "mean_batch": run["mean_batch"],
        "seconds": run["seconds"],
    }


# The run


def config_of(kind: str, smoke: bool) -> tuple[str, FlexDiTConfig]:
    if smoke:
        size = {"input_size": 8, "hidden_size": 32, "num_heads": 2, "num_classes": 10}
        return "smoke", FlexDiTConfig(**size, num_pooling_blocks=1, num_sdtm=1, num_dense_blocks=1)
    if kind == "cuda":
        return "XL/2 256", FlexDiTConfig.preset("XL/2", image_size=256)
    return "S/2 128", FlexDiTConfig.preset("S/2", input_size=16)


class Servers:
    """The sampler and one session a server, kept for all loads."""

    def __init__(self, arguments: argparse.Namespace, device: Device, config: FlexDiTConfig):
        self.arguments, self.device, self.config = arguments, device, config
        self.steps = (2, 3) if arguments.smoke else STEPS[arguments.device]
        model = model_of(FlexDiT, config, random_weights(config, device.kind))
        self.sampler = Sampler(model)
        batch = arguments.max_batch
        fixed = FixedBatches(batch, arguments.timeout_s)
        self.policies = {CONTINUOUS: (Continuous(), batch), FIXED: (fixed, batch), SINGLE: (FixedBatches(1, 0.0), 1)}
        self.sessions = {
            name: self.sampler.session(size, queue_capacity=1 << 20) for name, (_, size) in self.policies.items()
        }

    def requests(self, count: int, rate: float) -> list[Request]:
        return trace(count, rate, self.steps, self.config.num_classes)

    def run(self, name: str, requests: list[Request], limit_s: float, keep=lambda request, image: None) -> dict:
        return serve(self.policies[name][0], self.sessions[name], requests, limit_s, keep)

    def warm_up(self) -> None:
        for name, (_, size) in self.policies.items():
            self.run(name, self.requests(min(2 * size, 8), math.inf), math.inf)
        self.device.synchronize()

    def capacity(self) -> tuple[float, float]:
        """Images/s of continuous batching when all is there at once, and how far an image is from the same alone."""
        images: dict[Request, torch.Tensor] = {}
        requests = self.requests(3 * self.arguments.max_batch, math.inf)
        run = self.run(CONTINUOUS, requests, math.inf, images.__setitem__)
        chosen = requests[:: max(1, len(requests) // 4)]
        alone = [self.sampler.sample([r.label], r.steps, "ddim", r.cfg_scale, seed=[r.seed])[0] for r in chosen]
        error = max(relative_error(images[request], image) for request, image in zip(chosen, alone))
        return len(requests) / run["seconds"], error


def run_loads(servers: Servers, budget: Budget, result: dict, keep: Callable[[], None]) -> None:
    seconds = servers.arguments.seconds
    for load in LOADS:
        rate = load * result["capacity"]
        requests = servers.requests(max(math.ceil(rate * seconds), 4), rate)
        row = {"load": load, "rate": rate, "requests": len(requests), "servers": {}}
        result["rows"].append(row)
        for name in servers.policies:
            try:
                budget.require(seconds)
                limit_s = min(3 * requests[-1].at + 1, budget.remaining())
                row["servers"][name] = summary(servers.run(name, requests, limit_s), len(requests))
            except NotRun as error:
                row["servers"][name] = {"not_run": reason(error)}
            keep()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--budget-s", type=float, help="default: 480 on the CPU, 180 on a GPU")
    parser.add_argument("--seconds", type=float, help="of arrivals for every load; default: 25 on the CPU, 8 on a GPU")
    parser.add_argument("--max-batch", type=int, help="default: 8 on the CPU, 32 on a GPU")
    parser.add_argument("--timeout-s", type=float, help="of fixed batches; default: 0.5 on the CPU, 0.1 on a GPU")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--smoke", action="store_true")
    parsed = parser.parse_args(arguments)
    defaults = {"cpu": (480, 25, 8, 0.5), "cuda": (180, 8, 32, 0.1)}[parsed.device]
    if parsed.smoke:
        defaults = (60, 0.3, 4, 0.02)
    for name, value in zip(("budget_s", "seconds", "max_batch", "timeout_s"), defaults):
        setattr(parsed, name, value if getattr(parsed, name) is None else getattr(parsed, name))
    if parsed.seconds <= 0 or parsed.max_batch < 1 or parsed.threads < 1 or parsed.timeout_s < 0:
        parser.error("--seconds, --max-batch and --threads must be positive, --timeout-s at least 0")
    return parsed


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    budget, device = Budget(arguments.budget_s), Device(arguments.device)
    out = folder(arguments.out, arguments.smoke)
    model, config = config_of(arguments.device, arguments.smoke)
    result = conditions(device, arguments.smoke)
    servers = Servers(arguments, device, config)
    servers.warm_up()
    capacity, error = servers.capacity()
    result |= {"model": model, "dtype": str(DTYPE).removeprefix("torch."), "steps": servers.steps, "guidance": GUIDANCE}
    result |= {"max_batch": arguments.max_batch, "timeout_s": arguments.timeout_s, "capacity": capacity}
    result |= {"relative_error": error, "rows": []}
    if not error <= TOLERANCE:  # NaN is wrong, too
        print(f"FAILED: an image in company differs by {error:.2g} from the same alone", file=sys.stderr)
        return 1
    name = result_file("serving", result)
    run_loads(servers, budget, result, lambda: save(name, result, markdown(result), out))
    if device.cuda:
        result["clocks"]["end"] = clocks()
    plot(result, out / f"{name}.png")
    write(name, result, markdown(result), out)
    return int(not any("images_per_s" in row["servers"][CONTINUOUS] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
