"""Rows of a benchmark as they stand in its file."""

from sparseout_experiments.bench import cases, store

HERE = {
    "device": {"type": "cpu", "name": "Some CPU (R), 2 cores"},
    "versions": {"torch": "9.8.7"},
    "source": "abc",
    "backend": {"name": "torch", "reason": "no kernel"},
    "quick": False,
}


def fake(case, implementation="F.dropout", ratio=1.0, phases=("forward", "backward", "both"), **more):
    def around(value):
        return {phase: {"median": value, "low": 0.9 * value, "high": 1.1 * value} for phase in phases}

    return {
        "section": case.section,
        "case": case.key,
        **vars(case),
        "implementation": implementation,
        "date": "2031-02-03",
        "rounds": 9,
        "seconds": around(ratio * 0.002),
        "ratio": around(ratio),
        **more,
    }


def record(device="cpu", name="Some CPU", ratio=1.237):
    threads = 2 if device == "cpu" else None
    clock = "wall" if device == "cpu" else "events"
    small, large = (
        cases.Operation(64, "fp32", threads, clock="wall"),
        cases.Operation(2**20, "fp32", threads, clock=clock),
    )
    channels = cases.Operation(2**20, "fp32", threads, "channel mask, NCHW", clock)
    step = cases.Model("WRN-16-2, batch 16", "compiled", threads)
    sizes = {"input_bytes": 4 * 2**20, "copy_bytes_per_second": 34e9, "peak_bytes": 12 * 2**20, "kept_bytes": 2**20}
    sizes |= {"of_copy_bandwidth": {"forward": 0.123, "backward": 0.456, "both": 0.789}, "kept_input_bytes": 0}
    rows = [
        fake(small),
        fake(small, "Sparseout q=1.5", 33.33),
        fake(large, **sizes),
        fake(large, "Sparseout q=1.5", ratio, **(sizes | {"kept_input_bytes": 4})),
        {k: v for k, v in fake(large, "compiled", failed="no compiler").items() if k not in ("seconds", "ratio")},
        fake(channels, "F.dropout2d"),
        fake(channels, "Sparseout2d q=1.5", 7.654),
        fake(step, "nn.Dropout", 1.0, ("step",), peak_bytes=7_000_000),
        fake(step, "no dropout", 0.456, ("step",), peak_bytes=None),
    ]
    here = HERE | {"device": {"type": device, "name": name}}
    return store.Record(here, rows)
