"""The study: which cells there are, that they run and are not run again, and what the page says of their results."""

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from multiprocessing import active_children

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")
pytest.importorskip("sklearn")
import study
from modelling import MIXERS
from sample_texts import NOVELS, sentences

from convkernels.models import CompositeBertForMaskedLM, ConvSeq2SeqForConditionalGeneration
from training import architectures, cells, findings
from training.files import DataError, documents, logged
from training.running import Interrupted

ONCE = dict(max_steps=2, per_device_train_batch_size=4)
MINI = cells.Scale(
    vocabulary=800,
    size="tiny",
    seeds=(1,),
    seq2seq=dict(encoder_layers=1, decoder_layers=1, encoder_kernel_size=3),
    bert=dict(num_hidden_layers=1),
    length=32,
    pretrain={"seq2seq": ONCE, "bert": ONCE},
    tasks={
        "seq2seq": {task: ONCE for task in cells.SEQ2SEQ_TASKS},
        "bert": {task: ONCE for task in cells.BERT_TASKS},
    },
    common=dict(use_cpu=True, dataloader_pin_memory=False, logging_steps=1),
)


@pytest.fixture
def data(tmp_path):
    """Files of the names that the study reads, made of a sample of novels."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in zip(cells.CORPUS, documents([str(NOVELS)]), strict=False):
        (folder / name).write_text(json.dumps({"text": text[:20_000]}) + "\n")
    lines = [line for line in sentences(300) if "\t" not in line][:24]
    columns = {"trec": "text coarse", "sst2": "sentence label", "cola": "sentence label",
               "rte": "sentence1 sentence2 label", "cogs": "source target type"}  # fmt: skip
    for task, files in cells.FILES.items():
        names = columns[task].split()
        for name in files.values():
            rows = [[line] * (len(names) - 1) + [str(i % 2)] for i, line in enumerate(lines)]
            (folder / name).write_text("\n".join("\t".join(row) for row in [names, *rows]) + "\n")
    return folder


def test_cells():
    for scale in cells.SCALES.values():
        found = cells.cells(scale.seeds)
        names = [cell.name for cell in found]
        assert len(set(names)) == len(names) == 2 + 4 + 8 + 4 * 2 * 3 * 3 + 8 * 3 * 3
        for i, cell in enumerate(found):
            assert {need.name for need in cell.needs} <= set(names[:i])
        assert set(cells.MIXERS) == set(MIXERS)


@pytest.mark.parametrize("name", study.SCALES)
def test_models_of_all_scales(name, tokenizers):
    """They can be made, and take sequences of the scale's length."""
    scale = study.SCALES[name]
    for family, models in (("bert", cells.VARIANTS), ("seq2seq", cells.MIXERS)):
        tokenizer = architectures.tokenizer(tokenizers[family], family)
        for model in models:
            if family == "bert":
                kind, changes = CompositeBertForMaskedLM, {"max_position_embeddings": scale.length, **scale.bert}
                config = architectures.bert(model, scale.size, tokenizer, **changes)
            else:
                kind = ConvSeq2SeqForConditionalGeneration
                config = architectures.seq2seq(model, scale.size, "paper", tokenizer, **scale.seq2seq)
            with torch.device("meta"):
                ids = torch.zeros(2, scale.length, dtype=torch.long)
                logits = kind(config)(input_ids=ids, labels=ids).logits
            assert logits.shape == (2, scale.length, len(tokenizer))


def test_cells_run_once(data, tmp_path, monkeypatch):
    monkeypatch.setitem(study.SCALES, "mini", MINI)
    wanted = [
        cell
        for cell in cells.cells(MINI.seeds)
        if cell.model in (None, "lightweight", "composite") and cell.task in (None, "cogs", "rte")
    ]
    output = tmp_path / "study"
    for _ in range(2):
        study.Study("mini", data, output, 1).run(wanted)
    log = [json.loads(line) for line in (output / "log.jsonl").open()]
    assert [line["cell"] for line in log if "cell" in line] == [cell.name for cell in wanted]
    assert len(wanted) == 2 + 2 + 2 + 1
    shown = []
    for line in log:
        if line.get("task"):
            shown.append(line["results"]["test"][{"rte": "accuracy", "cogs": "exact_match"}[line["task"]]])
            assert not list((output / line["cell"]).glob("*.safetensors"))
    page = findings.page([output / "log.jsonl"])
    assert len(shown) == 3 and all(0 <= value <= 1 and f" {100 * value:.1f} |" in page for value in shown)
    assert "7 of 62 cells so far" in page
    (output / "seq2seq-lightweight-pretraining" / "tokenizer.json").unlink()
    assert "seq2seq-lightweight-pretraining" not in study.Study("mini", data, output, 1).done


def steps(folder):
    log = folder / "log.jsonl"
    return [line["step"] for line in logged(log) if "loss" in line] if log.exists() else []


def test_a_worker_killed_and_a_stop_lose_nothing(data, tmp_path, monkeypatch, capsys):
    """The third call ends what the first, whose workers are killed, and the second, stopped, have begun. Of the two
    workers one is idle then."""
    once = dict(max_steps=100, save_steps=10, per_device_train_batch_size=4, dataloader_num_workers=1)
    monkeypatch.setitem(study.SCALES, "mini", replace(MINI, pretrain={"seq2seq": once, "bert": once}))
    wanted = [cells.Cell("bert"), cells.Cell("seq2seq"), cells.Cell("seq2seq", "lightweight")]
    output, handler = tmp_path / "study", signal.getsignal(signal.SIGTERM)
    cell = output / wanted[-1].name

    def kill():
        for process in active_children():
            process.kill()

    def stop():
        for _ in range(2):  # as timeout does
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    def call(action, enough):
        """Run the study, and act once its last cell has taken enough steps more."""
        before = max(steps(cell), default=0)

        def watch():
            while len([step for step in steps(cell) if step > before]) < enough and not ended.is_set():
                time.sleep(0.01)
            if not ended.is_set():
                action()

        ended, thread = threading.Event(), threading.Thread(target=watch)
        thread.start()
        try:
            study.Study("mini", data, output, 2).run(wanted)
        finally:
            ended.set()
            thread.join()
            assert signal.getsignal(signal.SIGTERM) == handler

    with pytest.raises(SystemExit, match=f"failed: {cell.name}; the same command tries them again"):
        call(kill, 12)
    assert "its process ended with -9" in capsys.readouterr().err
    with pytest.raises(Interrupted, match="stopped with 2 cells run"):
        call(stop, 5)
    assert max(steps(cell)) < 100
    study.Study("mini", data, output, 2).run(wanted)
    assert steps(cell) == list(range(1, 101))


def test_a_cell_that_fails_lets_others_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.SCALES, "mini", MINI)
    with (data / "rte_dev.tsv").open("a") as file:
        print("two\tfields", file=file)
    tokenizer = cells.Cell("bert")
    wanted = [tokenizer, cells.Cell("bert", "none"), *(cells.Cell("bert", "none", task) for task in ("rte", "cola"))]
    with pytest.raises(SystemExit, match=f"failed: {wanted[2].name};"):
        study.Study("mini", data, tmp_path / "study", 1).run(wanted)
    assert "rte_dev.tsv, line 26: expected 3 fields" in capsys.readouterr().err
    assert study.Study("mini", data, tmp_path / "study", 1).done == {cell.name for cell in wanted} - {wanted[2].name}


def test_data_that_is_not_there(data, tmp_path):
    (data / "rte_dev.tsv").unlink()
    with pytest.raises(DataError, match=r"--data .*: expected a file rte_dev.tsv, or that with .xz or .gz behind"):
        study.Study("cpu", data, tmp_path / "study", 1)


def test_what_the_page_says(data, tmp_path):
    """Means and spreads by hand: 0.5 ± 0.1 and 0.8 ± 0.1 of three seeds differ by 0.3 ± 0.14; 0.55 by less; and losses
    0.2, 0.3 and 0.4 have a mean of 0.3."""
    settings = asdict(cells.SCALES["cpu"]) | {"seeds": [1, 2, 3], "vocabulary": 99}
    lines = [{"run": "2026-01-01", "scale": "cpu", "settings": settings, "workers": 2, "threads": 1, "environment": {
        "device": "CPU", "device_type": "cpu", "isa": "avx2", "threads": 2, "torch": "2"}}]  # fmt: skip
    for model, results in {
        "none": (0.4, 0.5, 0.6),
        "composite": (0.7, 0.8, 0.9),
        "fixed": (0.45, 0.55, 0.65),
        "absolute": (0.1,),
    }.items():
        for seed, value in enumerate(results, 1):
            cell = cells.Cell("bert", model, "cola", seed=seed)
            result = {"test": {"rows": 10, "loss": 1.0, "matthews": value}}
            result = {"loss": 0.1 + seed / 10, "results": result}
            lines.append({"cell": cell.name, **asdict(cell), "seconds": 60.0, **result})
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = findings.page([path])
    assert "| none | - | - | 50.0 ± 10.0 | - | - |" in page
    assert "| composite | none | **+30.0 ± 14.1** | - | - |" in page
    assert "| fixed | none | +5.0 ± 14.1 | - | - |" in page
    assert "| composite | absolute | +70.0 | - | - |" in page  # of one seed there is no spread
    assert "| absolute | - | - | 10.0 (1 of 3 seeds) | - | - |" in page
    assert "| pre-trained | composite | - | - | 0.300 / 1.000 | - | - |" in page
    assert "| CoLA | 10 | Matthews correlation | 31.6 |" in page
    assert "10 of 158 cells" in page and "Vocabulary: 99 unigrams" in page
    path.write_text(path.read_text() + '{"cell": "half a li')
    assert findings.page([path]) == page
    path.write_text("\n".join(map(json.dumps, lines)))
    assert findings.page([path]) == page  # an editor has taken the end of the last line
    one = lines[1]
    for line, message in (
        (one | {"seed": 2}, "the line of bert-none-pretrained-cola-1 is that of bert-none-pretrained-cola-2"),
        (
            one | {"results": {"test": {"rows": 10, "loss": 1.0, "matthews": 40.0}}},
            "bert-none-pretrained-cola-1 has a matthews of 40.0 on test",
        ),
        (one | {"results": {"test": {"rows": 10, "loss": 1.0, "matthews": None}}}, ""),
        ({key: value for key, value in one.items() if key != "seed"}, ", got a line without 'seed'"),
        (lines[0] | {"settings": {}}, "its calls have different settings"),
    ):
        path.write_text("\n".join(map(json.dumps, [*lines, line])))
        with pytest.raises(DataError, match=f"expected a log of study.py.*{message}"):
            findings.page([path])
    path.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="expected a log of study.py"):
        findings.page([path])
    with pytest.raises(ValueError, match="is not the log of a study"):
        study.Study("cpu", data, tmp_path, 1)
