"""The benchmark's own claims: real lengths, equal results of all forms, byte and FLOP counts, files it writes."""

import contextlib
import itertools
import json
import re

import pytest
import torch

import convkernels
from benchmarks import cli, peers, report, store, text, timing
from benchmarks.suites import acceptance_tables, attention, attention_tables, streaming, sweep
from convkernels.cli import environment
from convkernels.cli import main as convkernels_main

CPU = torch.device("cpu")


def problem(op, **changes):
    heads = 24 if op == peers.DEPTHWISE else 4
    return peers.Problem(**{"op": op, "batch": 2, "length": 40, "channels": 24, "heads": heads, "taps": 7} | changes)


@pytest.mark.parametrize("length", [1, 64, 1000])
def test_text_rows_are_full_of_whole_paragraphs(length):
    batch = text.batch(5, length)
    assert batch.tokens.shape == batch.mask.shape == (5, length)
    assert torch.equal(batch.mask.sum(1), batch.lengths)
    assert (batch.lengths > 0).all() and batch.tokens.max() < text.vocabulary_size()
    assert torch.equal(batch.mask, torch.arange(length) < batch.lengths[:, None])


@pytest.mark.parametrize("taps", [1, 4, 7])
@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("op", [peers.LIGHTWEIGHT, peers.DYNAMIC, peers.DEPTHWISE])
def test_stock_forms_equal_ours(op, name, taps):
    peer = peers.PEERS[name]
    if op not in peer.ops:
        pytest.skip(f"{name} cannot compute {op}")
    p = problem(op, taps=taps, dtype=torch.float64)
    x, weight = torch.randn(2, 40, 24).double(), torch.randn(p.weight_shape).double()
    mask = torch.arange(40) < torch.tensor([[40], [13]])
    x = peers.channels_first(x) if peer.channels_first else x
    torch.testing.assert_close(peer.form(x, weight, p), peers.ours(x, weight, p))
    if not peer.compiled:
        torch.testing.assert_close(peer.build(masked=True)(x, weight, p, mask), peers.ours(x, weight, p, mask))


def test_minimum_bytes():
    p = problem(peers.DYNAMIC, dtype=torch.bfloat16)
    x, weight = 2 * 40 * 24 * 2, 2 * 40 * 4 * 7 * 2
    assert p.minimum_bytes(False) == 2 * x + weight
    assert p.minimum_bytes(True) == 5 * x + 3 * weight


def both(form, *tensors):
    """Gradients of all tensors; the cotangent has the shape of the first."""
    return torch.autograd.grad(form(*tensors), tensors, torch.ones_like(tensors[0]))


@pytest.mark.parametrize("op", [peers.LIGHTWEIGHT, peers.DYNAMIC, peers.DEPTHWISE])
def test_flops_of_ours_and_of_conv1d(op):
    p = problem(op, dtype=torch.float32)
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((2, 40, 24), p.weight_shape)]
    analytic = 2 * 2 * 40 * 24 * 7
    for form in (peers.ours, *([peers.conv1d] if op != peers.DYNAMIC else [])):
        assert timing.flops(lambda x, weight, form=form: form(x, weight, p), *tensors) == analytic
        gradients = timing.flops(lambda *ts, form=form: both(lambda x, weight: form(x, weight, p), *ts), *tensors)
        assert gradients == 3 * analytic


def test_flops_of_attention():
    qkv = [torch.randn(2, 40, 24, requires_grad=True) for _ in range(3)]
    product = 2 * 2 * 40 * 40 * 24
    assert timing.flops(lambda *ts: peers.attention(*ts, 4, None), *qkv) == 2 * product
    assert timing.flops(lambda *ts: both(lambda *t: peers.attention(*t, 4, None), *ts), *qkv) == 7 * product


class FakeClock:
    """Every callable takes as many seconds as it returns."""

    def sample(self, fn, calls=1):
        return timing.Sample(fn())


def test_interleaved_shares_the_time_and_stops_slow_calls():
    order = []

    def call(name, seconds):
        order.append(name)
        return seconds

    fns = {"fast": lambda: call("fast", 0.01), "slow": lambda: call("slow", 0.2), "stuck": lambda: call("stuck", 3.0)}
    times = timing.interleaved(fns, FakeClock(), budget_s=1.8, slow_s=1.0)
    assert list(times) == ["fast", "slow", "stuck"]
    assert times["fast"].repeats == timing.MAX_REPEATS and times["slow"].repeats == 3
    assert times["stuck"] == timing.Timing(3.0, 3.0, 3.0, 2, slow=True)
    assert order.count("stuck") == 3
    timed = "".join(name[0] for name in order[-63:])
    assert timed.count("s") == 3 and max(map(len, timed.split("s"))) <= 40


def test_interleaved_reports_what_fails():
    failures = {}
    times = timing.interleaved({"bad": lambda: 1 / 0, "good": lambda: 0.1}, FakeClock(), on_error=failures.__setitem__)
    assert list(times) == ["good"] and isinstance(failures["bad"], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        timing.interleaved({"bad": lambda: 1 / 0}, FakeClock())


class HostClock:
    """Every callable returns the samples of its repeats in turn."""

    def sample(self, fn, calls=1):
        return timing.Sample(*fn())


def test_interleaved_tells_what_the_host_did():
    behind = itertools.cycle([(0.01, 0.4, True), (0.01, 0.4, True), (0.02, 0.1, False)])
    fns = {"ahead": lambda: (0.1, 0.3, False), "behind": lambda: next(behind)}
    times = timing.interleaved(fns, HostClock(), budget_s=0.6)
    assert times["ahead"] == timing.Timing(0.1, 0.1, 0.1, 3, host=0.3)
    assert times["behind"].host_bound and times["behind"].host == 0.4


def test_a_repeat_that_the_host_was_late_for_is_made_again(monkeypatch):
    monkeypatch.setattr(timing.torch, "zeros", lambda *args, **options: None)
    clock, heads, enough = timing.CudaClock(CPU), [], 0.0

    def once(fn, calls, cycles):
        heads.append(cycles)
        return timing.Sample(fn(), 0.1, host_bound=cycles < enough)

    monkeypatch.setattr(clock, "_once", once)
    assert clock.sample(lambda: 1.0) == timing.Sample(1.0, 0.1) and heads == [timing.SLEEP_CYCLES]
    enough = 3 * timing.SLEEP_CYCLES
    assert not clock.sample(lambda: 1.0).host_bound and len(heads) == 3
    enough = timing.MAX_SLEEP_CYCLES + 1
    assert clock.sample(lambda: 1.0).host_bound and max(heads) == timing.MAX_SLEEP_CYCLES


@pytest.mark.parametrize("ahead", [True, False])
def test_the_device_is_busy_while_the_host_enqueues(monkeypatch, ahead):
    steps = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            steps.append("event")

        def query(self):
            steps.append("query")
            return not ahead

        def synchronize(self):
            steps.append("wait")

        def elapsed_time(self, end):
            return 4.0

    class Buffer:
        zero_, sum = (lambda self, step=step: steps.append(step) for step in ("write", "read"))

    monkeypatch.setattr(timing.torch, "zeros", lambda *args, **options: Buffer())
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(timing.torch.cuda, "_sleep", lambda cycles: steps.append("sleep"))
    sample = timing.CudaClock(CPU)._once(lambda: steps.append("call"), 2, 1000)
    assert steps == "sleep write read event call call event query wait".split()
    assert sample.seconds == 2e-3 and 0 < sample.host < 1e-3 and sample.host_bound != ahead


@pytest.mark.parametrize("suite", ["streaming", "attention"])
def test_a_failure_of_ours_does_not_end_a_suite(suite, tmp_path, capsys, monkeypatch):
    """The backward pass fails, when it is prepared: exit status 1 with the forward pass measured and saved."""

    def failing(function):
        def call(*args, **options):
            if torch.is_grad_enabled():
                raise RuntimeError("no such kernel")
            return function(*args, **options)

        return call

    for name in ("lightweight_conv1d", "dynamic_conv1d", "composite_attention"):
        monkeypatch.setattr(convkernels, name, failing(getattr(convkernels, name)))
    options = ["--no-plots", "--dtypes", "float32"] if suite == "attention" else []
    command = ["bench", "--suite", suite, "--batch", "1", "--lengths", "32", "--compile-seconds", "0", "--seconds",
               "1e-3", "--output", str(tmp_path), *options]  # fmt: skip
    assert cli.main(command) == 1
    (path,) = tmp_path.glob("*.json")
    section = json.loads(path.read_text())[suite]
    ours = (streaming.OURS, *attention.OWN_LINES)
    assert any(r["direction"] == "forward" for r in section["records"])
    assert section["errors"] and all(error.startswith(ours) for error in section["errors"])
    assert "no such kernel" in capsys.readouterr().out


def test_peak_extra_bytes_counts_results_and_scratch():
    def work():
        return torch.zeros(1 << 20) + torch.ones(1 << 20)

    peak = timing.peak_extra_bytes(work, CPU)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    # The kernel counts resident pages per thread and adds them up in batches.
    assert peak == pytest.approx(12 << 20, rel=0.1)


def test_spread_takes_ends_then_middles():
    assert sweep.spread([1, 2, 3, 4, 5, 6, 7]) == [7, 1, 4, 2, 5, 3, 6]
    assert sweep.spread([1]) == [1]


def test_sweep_writes_results_and_plots_them_again(tmp_path):
    pytest.importorskip("matplotlib")
    options = "--lengths 8,16 --dtypes float32 --channels 24 --heads 4 --tokens 32 --seconds 0.01 --compile-seconds 0"
    assert cli.main(["bench", "--output", str(tmp_path), *options.split()]) == 0
    (results,) = tmp_path.glob("*.json")
    section = json.loads(results.read_text())["sweep"]
    lines = {record["line"] for record in section["records"]}
    assert lines == {line.label for line in sweep.LINES if line.form != sweep.COMPILE}
    assert len(section["records"]) == 2 * 2 * len(lines)
    assert all(record["copy_fraction"] > 0 and record["flops"] > 0 for record in section["records"])
    again = tmp_path / "again"
    assert cli.main(["plot", str(results), "--output", str(again)]) == 0
    assert {path.name for path in again.iterdir()} == {"speed.png", "flops.png"}


def test_plots_say_what_their_curves_do_not():
    figures = pytest.importorskip("benchmarks.figures")

    def work(line, flops):
        return {"line": line, "direction": "forward", "dtype": "float32", "length": 8, "batch": 2, "flops": flops}

    section = {"work": [work("a", 6), work("b", 7), work("c", 6), work("d", None)], "notes": ["x: stops"]}
    assert figures.WORK.remarks(section) == [
        "not drawn, as nothing but element-wise work is left to count: d",
        "on one line, as they do the same multiplications: a; c",
    ]
    assert figures.SPEED.remarks(section) == ["x: stops"]


def test_panels_share_the_lengths_of_all(tmp_path, monkeypatch):
    """Also those that only one of them has, as a bench that was interrupted leaves."""
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = pytest.importorskip("benchmarks.figures")
    ticks = []
    monkeypatch.setattr(plt, "close", lambda figure: ticks.append([list(axes.get_xticks()) for axes in figure.axes]))
    records = [
        {"line": "a", "direction": figures.FORWARD, "dtype": dtype, "length": length, "batch": 1, "seconds": 1.0}
        for dtype, lengths in (("float32", (64, 128, 512)), ("bfloat16", (64, 128)))
        for length in lengths
    ]
    settings = {"channels": 8, "heads": 2, "taps": 3, "tokens": 64}
    section = {"records": records, "settings": settings, "environment": environment.describe(CPU)}
    figures._save(figures.SPEED, section, ["float32", "bfloat16"], tmp_path / "speed.png")
    assert ticks == [[[64, 128, 512]] * 4]
    figures._save(figures.SPEED, section, ["bfloat16"], tmp_path / "speed.png")
    assert ticks[1:] == [[[64, 128]] * 2]


def test_target_table_says_pass_miss_and_not_measured():
    def record(ours, heads, dtype):
        shape = {"op": peers.LIGHTWEIGHT, "direction": "forward", "length": 512, "heads": heads, "taps": 7}
        seconds = {"copy": 0.9, "convkernels": ours, "conv1d": 13.0, "conv2d-CL": 1.2}
        return shape | {"dtype": dtype, "memory": "fresh", "seconds": seconds}

    records = [record(ours, heads, dtype) for dtype, ours in (("float32", 1.0), ("bfloat16", 2.0)) for heads in (2, 12)]
    section = {"shape": {"heads": [2, 12]}, "records": records}
    rows = {row[:2]: row[2:] for row in acceptance_tables.target_rows(section)}
    fraction = rows["lightweight forward, fraction of a copy", "7"]
    assert fraction == (">= 0.87", "0.90 / 0.90", "PASS", ">= 0.83", "0.45 / 0.45", "miss")
    faster = rows["lightweight forward, times faster than the best stock form", "7"]
    assert faster == (">= 1.15", "1.20 / 1.20", "PASS", ">= 1.7", "0.60 / 0.60", "miss")
    assert rows["lightweight forward, fraction of a copy", "31"][2] == "not measured"


def test_the_page_of_results_is_what_the_committed_ones_make():
    assert report.PAGE.read_text() == report.page(), "python -m benchmarks.report writes it"


def test_files_of_results_are_small():
    """A record a line, and nothing that no table needs."""
    paths = sorted(report.RESULTS.glob("*.json"))
    assert len(paths) >= 3
    for path in paths:
        content = json.loads(path.read_text())
        assert store.dumps(content) == path.read_text()
        assert not re.search("quartiles|repeats|examples_per_second", path.read_text())
    assert sum(len(path.read_text().splitlines()) for path in paths) < 1500


def test_info_names_backends_and_variables(capsys):
    assert convkernels_main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "reference" in printed and "CONVKERNELS_STRICT" in printed
    assert re.search(r"attention_grad +cpu +the first usable one", printed)


def test_streaming_suite(tmp_path, capsys):
    assert cli.main(
        ["bench", "--suite", "streaming", "--batch", "1", "--lengths", "32", "--compile-seconds", "0",
         "--seconds", "0.01", "--output", str(tmp_path)]
    ) == 0  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    section = json.loads(path.read_text())["streaming"]
    assert not section["failures"]
    for record in section["records"]:
        seconds = record["seconds"]
        moved = record["passes"] / 2 * seconds["copy"]
        assert streaming.fraction(record) == pytest.approx(moved / seconds["convkernels"])
    passes = {(r["case"], r["direction"]): r["passes"] for r in section["records"]}
    assert passes["lightweight K=7", "forward"] == 2 and passes["lightweight gate mask K=7", "backward"] == 5
    rho = 31 * 16 / 1024
    assert passes["dynamic K=31", "backward"] == pytest.approx(3 + 2 * rho)
    assert "fraction of a copy" in capsys.readouterr().out


def test_attention_suite(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = "--lengths 8,16 --batch 2 --channels 32 --heads 2 --seconds 0.01 --compile-seconds 0"
    assert cli.main(["bench", "--suite", "attention", "--output", str(tmp_path), *options.split()]) == 0
    (results,) = tmp_path.glob("*.json")
    section = json.loads(results.read_text())["attention"]
    assert not section["notes"]
    lines = {(r["line"], r["direction"]) for r in section["records"]}
    assert lines == set(itertools.product(attention.FORMS, (attention.FORWARD, attention.BACKWARD, attention.BOTH)))
    products = 2 * 2 * 2 * 16 * 16 * 16
    work = {(r["line"], r["direction"]): r["flops"] for r in section["records"] if r["length"] == 16}
    assert work[attention.PLAIN, attention.FORWARD] == work[attention.SDPA, attention.FORWARD] == 2 * products
    assert work[attention.COMPOSITE, attention.FORWARD] == 2 * products + 2 * 2 * 2 * 16 * 16 * 17
    plots = {"attention-speed.png", "attention-flops.png", "attention-memory.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == plots
    assert "FlexAttention with the same terms" in capsys.readouterr().out


def test_attention_forms_agree():
    settings = attention.Settings(batch=2, heads=2, head_size=8, window=3)
    inputs = attention.make_inputs(settings, 20, torch.float64, CPU)
    composite, plain, sdpa, eager = (
        attention.FORMS[name](inputs, *inputs.leaves)
        for name in (attention.COMPOSITE, attention.PLAIN, attention.SDPA, attention.EAGER)
    )
    torch.testing.assert_close(composite, eager)
    torch.testing.assert_close(plain, sdpa)
    torch.testing.assert_close(plain, attention.flash(inputs, *inputs.leaves))
    no_query = torch.zeros_like(inputs.query_rel)
    with_bias = attention.FORMS[attention.SDPA_BIAS](inputs, *inputs.leaves)
    torch.testing.assert_close(with_bias, attention.eager(inputs, *inputs.leaves[:4], no_query))


def test_attention_targets_say_pass_miss_and_not_measured():
    def section(backend, device, *records):
        lines = [
            {"direction": attention.FORWARD, "length": 512, "dtype": dtype, "line": line, "seconds": seconds}
            for line, seconds, dtype in records
        ]
        workloads = [{"workload": attention.BANDED, "line": line, "seconds": seconds}
                     for line, seconds in ((attention.FORWARD, 2e-3), (attention.BACKWARD, 7e-3))]  # fmt: skip
        settings = {"backend": backend, "device": device}
        return {"settings": settings, "records": lines, "workloads": workloads if device == "cuda" else []}

    def rows(*arguments):
        columns, found = attention_tables.target_rows(section(*arguments))
        assert all(len(row) == len(columns) for row in found)
        return {row[:2]: row[2:] for row in found}

    both = [(line, seconds, dtype) for line, seconds in ((attention.COMPOSITE, 0.8), (attention.SDPA, 1.0))
            for dtype in ("float32", "bfloat16")]  # fmt: skip
    found = rows("auto", "cpu", *both, (attention.FLEX, 4.0, "float32"))
    expected = ("<= 0.85", "0.80", "PASS", "<= 0.72", "0.80", "miss")
    assert found["forward with relative terms / SDPA without positions", "512"] == expected
    expected = (">= 4.00", "5.00", "PASS", ">= 5.50", "-", "not measured")
    assert found["FlexAttention with the same terms / ours, forward", "512"] == expected
    records = [(attention.COMPOSITE, 1.1, "bfloat16"), (attention.PLAIN, 1.0, "bfloat16")]
    own = "forward with relative terms / own forward without", "512"
    assert rows("triton", "cuda", *records)[own] == ("<= 1.15", "1.10", "PASS")
    assert rows("cuda", "cuda", *records)[own] == ("<= 1.08", "1.10", "miss")
    records.append((attention.FLASH, 1.0, "bfloat16"))
    flash = "forward with relative terms / FlashAttention-2 without positions", "512"
    assert rows("triton", "cuda", *records)[flash] == ("<= 1.10", "1.10", "PASS")
    assert rows("cuda", "cuda")[f"{attention.BANDED}: forward [ms]", ""] == ("<= 2.40", "2.00", "PASS")
    assert rows("cuda", "cuda")[f"{attention.BANDED}: backward / forward", ""] == ("<= 2.80", "3.50", "miss")


def test_attention_workloads_of_the_paper():
    settings = attention.Settings(backend="cpu")
    forms, inputs = attention.papers(1, settings, CPU)
    calls = attention.Suite(settings, CPU).calls(forms, inputs, attention.BOTH, "here")
    for name, call in calls.items():
        found = [g for g in call() if g is not None]
        assert all(g.isfinite().all() for g in found), name
