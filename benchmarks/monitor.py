"""What watching costs: training steps of WRN-16-2 with a `SparsityMonitor`, against the same steps without one.

    python benchmarks/monitor.py [--rounds 12] [--every 10] [--threads 2] [--out benchmarks/results]

The model has Sparseout in every block, the batch is 128 images of 32 x 32. Each of these takes one step in a round, in
an order that changes: "without" a monitor; "watched", the step that is sampled; "passed over", a monitor attached
that samples another; "detached", after one was there. Ratios are taken within a round, and of the fastest steps of
all rounds, which other load on the machine moves less. A monitor that samples one step in `every` costs what one
watched and `every` - 1 passed-over steps cost. Processor time on a CPU, as others may use the machine, else wall-
clock. Written to the folder `--out`, as `monitor/DEVICE.json`.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sparseout_experiments.models import WideResNet
from sparseout_experiments.training.environment import processor

import sparseout


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    model = WideResNet(16, 2, lambda _: sparseout.Sparseout(0.3, 1.5), generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x = torch.randn(options.batch, 3, 32, 32, generator=generator).to(device)
    y = torch.randint(10, (options.batch,), generator=generator).to(device)

    def step() -> dict[str, float]:
        torch.compiler.reset()  # as attaching does, once: all of them start alike
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    def attached(before: int) -> dict[str, float]:
        """A step with a monitor that has passed `before` steps: at 0 it is watched, else not."""
        with sparseout.SparsityMonitor(model, every=2):
            for _ in range(before):
                model.relu(
                    torch.zeros(1, 128, 1, 1, device=device)
                )  # a step without a call of the model, to be the watched one
            return step()

    def detached() -> dict[str, float]:
        sparseout.SparsityMonitor(model).attach().detach()
        return step()

    variants = {
        "without": step,
        "watched": lambda: attached(0),
        "passed over": lambda: attached(1),
        "detached": detached,
    }
    names = list(variants)
    step()
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        shift = number % len(names)
        order = names[shift:] + names[:shift]
        rounds.append({name: variants[name]() for name in order})
        print(", ".join(f"{name} {rounds[-1][name]['cpu']:.3f} s" for name in names), flush=True)
    clock = "wall" if device.type == "cuda" else "cpu"
    median = {name: statistics.median(r[name][clock] / r["without"][clock] for r in rounds) for name in names}
    fastest = {name: min(r[name][clock] for r in rounds) for name in names}
    least = {name: seconds / fastest["without"] for name, seconds in fastest.items()}
    share = 1 / options.every
    for cost in (median, least):
        cost[f"attached, every {options.every}"] = share * cost["watched"] + (1 - share) * cost["passed over"]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    found = {
        "case": f"training step of WRN-16-2, batch {options.batch} of 32x32, watched every {options.every}th step",
        "clock": clock,
        "seconds": {name: [r[name] for r in rounds] for name in names},
        "median_ratio": median,
        "fastest_ratio": least,
        "environment": {
            "device": machine,
            "threads": options.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "sparseout": sparseout.__version__,
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "monitor" / f"{_slug(machine)}.json"  # rows of `sparseout bench` lie one folder up
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"median of ratios: {median}\nratio of the fastest: {least}\n{path}")


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


if __name__ == "__main__":
    main()
