"""The benchmark of whole models: their tasks, that the forms compared compute the same, files, plots and the page."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import cli, networks, report, text, timing
from benchmarks.networks import Network
from benchmarks.suites import models, models_tables
from benchmarks.suites.models_tables import (
    BERT,
    COMPOSITE_BERT,
    DILATED,
    DYNAMIC,
    LIGHTWEIGHT,
    LINES,
    PUBLISHED,
    SEQ2SEQ,
    STOCK_BERT,
    STOCK_T5,
    T5_BIAS,
    TRANSFORMER,
)
from convkernels.models import ConvSeq2SeqForConditionalGeneration, summary

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [3, 4, 64, 513])
def test_spans_can_be_put_back(length):
    sources, targets = text.span_denoising(3, length)
    assert length - 1 <= sources.shape[1] <= length
    assert targets.shape[1] == pytest.approx(0.2 * length + 1, abs=0.05 * length + 2)
    words = []
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        assert source[-1] == target[-1] == text.END
        spans, mark = {}, None
        for token in target[:-1]:
            if token >= text.vocabulary_size():
                mark = token
            spans.setdefault(mark, []).append(token)
        assert all(len(span) > 1 for span in spans.values())
        for token in source[:-1]:
            words += spans[token][1:] if token in spans else [token]
    assert words == text.rows(1, len(words))[0].tolist()


def test_hidden_words_are_the_labels():
    tokens, labels = text.masked(4, 100)
    hidden = labels != -100
    assert torch.equal(torch.where(hidden, labels, tokens), text.rows(4, 100))
    assert hidden.any(1).all() and 0.05 < hidden.double().mean() < 0.3


def losses_and_gradients(case, *lines, prepare):
    inputs, found = networks.batch(case, 2, 24, CPU), []
    for line in lines:
        model = Network(case, line, "tiny", 2, 24).build().double()
        torch.manual_seed(1)
        with torch.no_grad():
            prepare(model)
        found.append((model(**inputs).loss, networks.training_step(model, inputs), model))
    return found


def test_the_published_bert_is_the_same_function():
    def stir(model):
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    ours, published = losses_and_gradients(BERT, COMPOSITE_BERT, PUBLISHED, prepare=stir)
    torch.testing.assert_close(ours[0], published[0])
    torch.testing.assert_close(ours[1], published[1])


def test_the_transformer_on_sdpa_is_that_without_bias():
    def forget(model):
        for stack in (model.model.encoder, model.model.decoder):
            if stack.relative_bias is not None:
                stack.relative_bias.weight.zero_()

    with_bias, without = losses_and_gradients(SEQ2SEQ, T5_BIAS, TRANSFORMER, prepare=forget)
    torch.testing.assert_close(with_bias[0], without[0])
    biases = [name for name, _ in with_bias[2].named_parameters() if "relative_bias" in name]
    assert len(with_bias[1]) == len(without[1]) + len(biases) == len(without[1]) + 2


def test_stock_models_have_the_same_shape():
    def count(case, line):
        return sum(p.numel() for p in Network(case, line, "tiny", 2, 24).build().parameters())

    assert count(SEQ2SEQ, STOCK_T5) == count(SEQ2SEQ, T5_BIAS)
    tables = 2 * (2 * 17 + 16 * 17)  # of two layers: a bias of two heads, a filter of 16 channels, 17 columns each
    assert count(BERT, COMPOSITE_BERT) - tables == count(BERT, STOCK_BERT) - 24 * 32


def test_flops_of_a_step_are_those_of_the_summary():
    suite = models.Suite(models.Settings(), CPU)
    network, inputs = Network(SEQ2SEQ, DYNAMIC, "tiny", 2, 24), networks.batch(SEQ2SEQ, 2, 24, CPU)
    assert network.config.num_hidden_layers == models.layers(SEQ2SEQ, "tiny") == 2
    sizes = {name: tensor.shape[1] for name, tensor in inputs.items()}
    expected = summary(
        ConvSeq2SeqForConditionalGeneration, network.config, batch=2, length=sizes["input_ids"],
        target_length=sizes["labels"], training=True,
    )  # fmt: skip
    assert suite._flops(network, inputs, "here") == expected.total_flops


RUN = "bench --suite models --size tiny --tokens 32 --seconds 1e-3"


def test_models_suite(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert cli.main([*RUN.split(), "--lengths", "16", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    section = json.loads(path.read_text())["models"]
    assert not section["notes"] and not section["errors"]
    expected = {(case, line) for case, lines in LINES.items() for line in lines}
    for part in ("records", "work"):
        assert {(r["case"], r["line"]) for r in section[part]} == expected
        assert all(r["flops"] > 0 and r["batch"] == 2 for r in section[part])
    assert {path.name for path in tmp_path.glob("*.png")} == {"models-speed.png", "models-flops.png"}
    printed = capsys.readouterr()
    assert "from which length on" in printed.out and "[2/2]" in printed.err
    # Another length of one model is added; a failure of ours is told, and does not end the suite.
    step = networks.training_step

    def failing(model, inputs):
        if model.config.mixer == "dynamic":
            raise RuntimeError("no such kernel")
        return step(model, inputs)

    monkeypatch.setattr(networks, "training_step", failing)
    more = [*RUN.split(), "--models", "seq2seq", "--lengths", "8", "--no-plots", "--output", str(tmp_path)]
    assert cli.main(more) == 1
    section = json.loads(path.read_text())["models"]
    assert section["settings"]["lengths"] == [8, 16] and list(section["settings"]["shapes"]) == [SEQ2SEQ, BERT]
    assert all(error.startswith(DYNAMIC) and "no such kernel" in error for error in section["errors"])
    added = {line for line in LINES[SEQ2SEQ] if line != DYNAMIC}
    assert {(r["line"], r["length"]) for r in section["records"]} == {
        *((line, 8) for line in added), *((line, 16) for _, line in expected)
    }  # fmt: skip
    assert cli.main([*more, "--layers", "1"]) == 2
    assert "seq2seq: {'size': 'tiny', 'tokens': 32, 'layers': 2}, not" in capsys.readouterr().err


def test_what_takes_too_much_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(timing, "available_bytes", lambda device: 1 << 10)
    suite = models.Suite(models.Settings(models=(BERT,), size="tiny", lengths=(16,), tokens=16, seconds=1e-3), CPU)
    suite.run()
    assert [r["line"] for r in suite.records] == [COMPOSITE_BERT, STOCK_BERT]
    assert len(suite.notes) == 1 and "would need" in suite.notes[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--layers 50", "--layers 50: seq2seq, small, has 6"),
        ("--lengths 2", "--lengths 2: expected 3 or more"),
        ("--max-length 32", "nothing would be measured, the shortest length is 64"),
    ],
)
def test_mistakes(capsys, options, said):
    assert cli.main(["bench", "--suite", "models", "--no-plots", *options.split()]) == 2
    assert said in capsys.readouterr().err


def test_settings_of_a_size():
    given = models.Settings(models=(BERT,), size="tiny", tokens=64)
    assert given.shape(BERT) == models_tables.Shape("tiny", 64, 2)
    for case, shape in models_tables.SHAPES.items():
        assert models.layers(case, shape.size) == shape.layers
    assert replace(given, lengths=(8,)).lengths_of(BERT) == (8,)


def section(dtype="float32", **seconds):
    """Of records T<length> = seconds of the lines of both models, by line."""
    records = [
        {"case": case, "line": line, "direction": "forward+backward", "dtype": dtype, "length": length, "batch": 2,
         "seconds": times[line], "host_seconds": None, "host_bound": False, "flops": 10, "peak_extra_bytes": 5}
        for length, times in ((int(name[1:]), times) for name, times in seconds.items())
        for case in LINES for line in LINES[case] if line in times
    ]  # fmt: skip
    environment = models.Suite(models.Settings(), CPU).section()["environment"]
    shapes = models.Suite(models.Settings(), CPU).section()["settings"]["shapes"]
    settings = {"dtypes": [dtype], "shapes": shapes, "device": "cpu", "backend": "auto"}
    return {"environment": environment, "settings": settings, "records": records, "work": [], "notes": ["x"]}


def test_targets_and_crossover():
    early = {LIGHTWEIGHT: 2.0, DYNAMIC: 3.0, DILATED: 1.0, TRANSFORMER: 2.0}
    late = {LIGHTWEIGHT: 1.0, DYNAMIC: 4.0, DILATED: 1.0, TRANSFORMER: 3.0}
    found = section(T64=early, T2048=late)
    rows = {row[:2]: row[2:] for row in models_tables.target_rows(found)[1]}
    assert rows[f"{TRANSFORMER} / {LIGHTWEIGHT}", "64"] == (">= 1.00", "1.00", "PASS")
    assert rows[f"{TRANSFORMER} / {DYNAMIC}", "2048"] == (">= 2.00", "0.75", "miss")
    assert not any(STOCK_BERT in name for name, _ in rows)
    assert dict(models_tables.crossover_rows(found)[1]) == {
        f"{LIGHTWEIGHT} faster than {TRANSFORMER}": "T = 2048",
        f"{DYNAMIC} faster than {TRANSFORMER}": "at none up to 2048",
        f"{DILATED} faster than {TRANSFORMER}": "T = 64, the shortest",
    }
    for shape in found["settings"]["shapes"].values():
        shape["tokens"] //= 2
    assert models_tables.target_rows(found)[1] == []  # of another shape there are no targets
    berts = section(T128={COMPOSITE_BERT: 1.04, STOCK_BERT: 1.0, PUBLISHED: 2.0})
    rows = {row[:2]: row[2:] for row in models_tables.target_rows(berts)[1]}
    assert rows[f"{COMPOSITE_BERT} / {STOCK_BERT}", "128"] == ("<= 1.05", "1.04", "PASS")
    assert rows[f"{PUBLISHED} / {COMPOSITE_BERT}", "128"] == (">= 2.00", "1.92", "miss")
    assert rows[f"{PUBLISHED} / {COMPOSITE_BERT}", "512"] == (">= 2.00", "-", "not measured")


def test_the_page_of_results_has_models():
    found = section(T64={LIGHTWEIGHT: 0.5, TRANSFORMER: 2.0})
    times, aims = ("\n\n".join(part({"models": found})) for part in (report.times, report.aims))
    assert "ConvSeq2Seq, small, 6 + 6 layers, 4096 tokens per batch" in times and "| 64 | 4 | 1 |" in times
    assert "| 64 | >= 1.00 | 4.00 | PASS |" in aims and "T = 64, the shortest" in aims and "Note: x." in aims
    assert f"forward pass, loss and backward pass. Measured {found['environment']['date']}." in times
    del found["environment"]["date"]
    assert "Measured before 2026-11-28." in "\n\n".join(report.times({"models": found}))
