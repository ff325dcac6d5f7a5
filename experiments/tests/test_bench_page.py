"""The page and the picture of a benchmark are those of its rows."""

import pytest
from bench_rows import record
from sparseout_experiments.bench import page, plot, store


def test_the_page_says_what_the_rows_say():
    text = page.page([record()], "there")
    lines = text.splitlines()
    assert "## Some CPU" in lines
    assert "Measured 2031-02-03 with torch 9.8.7. Sparseout's code abc, backend torch (no kernel)." in text
    assert "|  | 64, 2 threads | 1M, 2 threads |" in lines
    assert "| Sparseout q=1.5 | **33.3** (66.7 ms) | **1.24** (2.47 ms) |" in lines
    assert "| compiled |  | failed |" in lines
    assert "- compiled failed in 1M fp32, vector, 2 threads: no compiler" in lines
    detail = next(line for line in lines if line.startswith("| Sparseout q=1.5 | **1.24** [1.11-1.36]"))
    assert detail.endswith("| 12% 46% 79% | 12 | 1 + input |")
    assert "The input has 4 bytes an element; copying it ran at 34 GB/s." in lines
    assert any(line.startswith("| Sparseout2d q=1.5, channel mask, NCHW | **7.65** [6.89-8.42]") for line in lines)
    assert "| nn.Dropout | **1.00** [0.90-1.10] (2.00 ms) 7 MB |" in lines
    assert "| no dropout | **0.46** [0.41-0.50] (912 µs) |".replace("912 µs", "0.912 ms") in lines


def test_missing_gpu_rows_are_said_with_the_command_that_makes_them():
    without, with_one = page.page([record()], "there"), page.page([record(), record("cuda", "A GPU", 1.01)], "there")
    assert "**Rows from a GPU are missing**" in without
    assert "`sparseout bench --device cuda --out there`" in without
    assert "missing" not in with_one
    gpu = with_one[with_one.index("## A GPU") :]
    assert "|  | 64, host | 1M |" in gpu
    assert "**1.01**" in gpu
    assert "by CUDA events" in gpu
    assert "by CUDA events" not in with_one[: with_one.index("## A GPU")]


def test_devices_live_side_by_side(tmp_path):
    for one in (record(), record("cuda", "A GPU")):
        store.save(one, tmp_path)
    assert [path.name for path in page.write(tmp_path)] == ["bench.md", "a-gpu.png", "some-cpu.png"]
    text = (tmp_path / "bench.md").read_text()
    assert text.count("\n## ") == 2
    assert all(f"]({name}.png)" in text for name in ("a-gpu", "some-cpu"))
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("a-gpu", "some-cpu"))


def test_the_picture_shows_every_ratio_but_the_baselines(monkeypatch):
    drawn = []
    whole = plot.Axes.errorbar

    def errorbar(self, x, y, xerr, **options):
        drawn.extend(zip(x, *xerr, strict=True))
        return whole(self, x, y, xerr=xerr, **options)

    monkeypatch.setattr(plot.Axes, "errorbar", errorbar)
    plot.picture(record())
    assert sorted(drawn) == [pytest.approx((r, 0.1 * r, 0.1 * r)) for r in (0.456, 1.237, 33.33)]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1.5e-6, "1.50 µs"),
        (9.996e-5, "100 µs"),
        (1e-4, "0.100 ms"),
        (0.01234, "12.3 ms"),
        (0.09996, "100 ms"),
        (2, "2000 ms"),
    ],
)
def test_durations(seconds, shown):
    assert page.duration(seconds) == shown


@pytest.mark.parametrize(("ratio", "shown"), [(0.256, "0.26"), (9.994, "9.99"), (9.996, "10.0"), (123.4, "123")])
def test_ratios(ratio, shown):
    assert page.number(ratio) == shown
