"""What watching costs: training steps of WRN-16-2 with a `SparsityMonitor`, against the same steps without one.

    python benchmarks/monitor.py [--rounds 6] [--every 10] [--threads 2] [--out benchmarks/results]

The model has Sparseout in every block, the batch is 128 images of 32 x 32. A round is `every` training steps of each
peer, of which the monitor watches one; peers take turns, in an order that changes from round to round. Ratios are taken
within a round. "detached" has had a monitor, and must cost nothing. Written to `monitor-DEVICE.json`.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import sparseout
from sparseout.experiments.models import WideResNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    model = WideResNet(16, 2, lambda: sparseout.Sparseout(0.3, 1.5), generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x = torch.randn(options.batch, 3, 32, 32, generator=generator).to(device)
    y = torch.randint(10, (options.batch,), generator=generator).to(device)

    def steps(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    def watched() -> float:
        with sparseout.SparsityMonitor(model, every=options.every) as monitor:
            seconds = steps(options.every)
        assert monitor.report().steps["train"] == (1, options.every)
        return seconds

    def detached() -> float:
        sparseout.SparsityMonitor(model).attach().detach()
        return steps(options.every)

    peers = {"without": lambda: steps(options.every), "watched": watched, "detached": detached}
    steps(2)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        order = list(peers)[number % 3 :] + list(peers)[: number % 3]
        order = order if number % 2 else order[::-1]
        rounds.append({name: peers[name]() for name in order})
        print(", ".join(f"{name} {rounds[-1][name]:.3f} s" for name in peers), flush=True)
    ratios = {name: statistics.median(r[name] / r["without"] for r in rounds) for name in ("watched", "detached")}
    processor = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    found = {
        "case": f"training step of WRN-16-2, batch {options.batch} of 32x32, watched every {options.every}th step",
        "seconds_per_step": {name: [r[name] for r in rounds] for name in peers},
        "median_ratio": ratios,
        "environment": {
            "device": processor,
            "threads": options.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "sparseout": sparseout.__version__,
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "monitor" / f"{_slug(processor)}.json"  # rows of `sparseout bench` lie one folder up
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"median ratios: {ratios}; {path}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


if __name__ == "__main__":
    main()
