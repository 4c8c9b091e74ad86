"""The training scripts: what they read, how they corrupt, that they run, stop, go on, and say what is wrong."""

import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")
pytest.importorskip("sklearn")
import finetune
import pretrain_bert
import train_tokenizer
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from convkernels.models import ConvSeq2SeqForConditionalGeneration
from training import architectures, files
from training.running import parsed
from training.spans import SpanDenoising, block_length, lengths, spans

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, NOVELS = ROOT / "examples", ROOT / "benchmarks" / "data" / "novels.txt.xz"
SIZES = json.dumps(dict(d_model=32, d_ff=64, num_heads=2, encoder_layers=1, decoder_layers=1, encoder_kernel_size=3))
BERT_SIZES = json.dumps(dict(hidden_size=32, embedding_size=16, num_attention_heads=2, intermediate_size=64,
                             num_hidden_layers=1))  # fmt: skip


def sentences(count):
    found = (one for text in files.documents([str(NOVELS)]) for one in files.sentences(text))
    return [one for _, one in zip(range(count), found, strict=False)]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Folders of a tokenizer of each kind."""
    found = {}
    for kind in ("seq2seq", "bert"):
        folder = tmp_path_factory.mktemp(kind)
        made = train_tokenizer.train(train_tokenizer.Arguments([str(NOVELS)], str(folder), kind, 700, 32))
        made.save_pretrained(folder)
        found[kind] = folder
    return found


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """Tables made of real sentences: questions or not, pairs that follow each other or not, words turned round."""
    folder, lines = tmp_path_factory.mktemp("tables"), sentences(200)
    rows = {"question": ["text\tlabel"], "follows": ["first\tsecond\tlabel"], "reversed": ["source\ttarget\tkind"]}
    for i, line in enumerate(lines[:-1]):
        line = line.replace("\t", " ")
        rows["question"].append(f"{line}\t{'yes' if '?' in line or i % 7 == 0 else 'no'}")
        rows["follows"].append(f"{line}\t{lines[i + 1] if i % 2 else lines[-i]}\t{i % 2}")
        rows["reversed"].append(f"{' '.join(line.split()[:4])}\t{' '.join(line.split()[3::-1])}\t{len(line) % 2}")
    for name, content in rows.items():
        (folder / f"{name}.tsv").write_text("\n".join(content) + "\n")
    return folder


# Spans


def collator(tokenizer, **options):
    ids = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(32)]
    return SpanDenoising(ids, tokenizer.eos_token_id, tokenizer.pad_token_id, **options)


class Fixed:
    """A generator that cuts at the places that it is given."""

    def __init__(self, *cuts):
        self.cuts = iter(cuts)

    def choice(self, total, count, replace):
        found = np.array(next(self.cuts))
        assert len(found) == count and not replace and (found < total).all()
        return found


def test_spans_by_hand():
    """20 tokens: 3 taken out in one span. With two spans of a rate of 0.3: 6 tokens, cut 2 + 4; 14 kept, cut 5 + 9."""
    collate = SpanDenoising([90, 91, 92], end=1, pad=0)
    text = np.arange(100, 120)
    source, target = collate.corrupt(text, Fixed([], []))
    assert source.tolist() == [*range(100, 117), 90, 1]
    assert target.tolist() == [90, 117, 118, 119, 1]
    collate.rate = 0.3
    source, target = collate.corrupt(text, Fixed([4], [1]))
    assert source.tolist() == [100, 101, 102, 103, 104, 90, *range(107, 116), 91, 1]
    assert target.tolist() == [90, 105, 106, 91, 116, 117, 118, 119, 1]


def test_batches_are_padded():
    torch.manual_seed(0)
    collate = SpanDenoising([90, 91], end=1, pad=0)
    batch = collate([{"input_ids": list(range(10, 20))}, {"input_ids": [10, 11]}])
    assert batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == (batch["input_ids"] != 0).long().tolist()
    assert batch["input_ids"][1].tolist()[:3] == [10, 90, 1] and not batch["input_ids"][1][3:].any()
    assert batch["labels"][1].tolist() == [90, 11, 1] + [-100] * (batch["labels"].shape[1] - 3)


def restored(source, target, sentinels):
    """The text from what is left of it and what was taken out."""
    taken, current = {}, None
    for token in target[:-1]:
        if token in sentinels:
            assert token not in taken, "a sentinel is used twice"
            current = taken.setdefault(token, [])
        else:
            current.append(token)
    assert [token for token in source if token in sentinels] == list(taken)
    return [one for token in source[:-1] for one in taken.get(token, [token])], taken


def test_spans_of_real_sentences(tokenizers):
    """1,000 sentences in blocks as pre-training has them: the rate, the length of spans, and nothing lost."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["seq2seq"])
    collate = collator(tokenizer)
    tokens = [t for ids in tokenizer(sentences(1000), add_special_tokens=False).input_ids for t in ids]
    size = block_length(128, 0.15, 3.0)
    blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
    rng, noise, count = np.random.default_rng(0), 0, 0
    for block in blocks:
        source, target = collate.corrupt(np.array(block), rng)
        assert source[-1] == target[-1] == tokenizer.eos_token_id and len(source) == 128
        text, taken = restored(source.tolist(), target.tolist(), collate.sentinels)
        assert text == block
        noise, count = noise + sum(map(len, taken.values())), count + len(taken)
    assert abs(noise / (size * len(blocks)) - 0.15) < 0.0015
    assert abs(noise / count - 3) < 0.1
    for line in sentences(1000):
        ids = tokenizer(line, add_special_tokens=False).input_ids
        if len(ids) > 1:
            source, target = collate.corrupt(np.array(ids), rng)
            assert restored(source.tolist(), target.tolist(), collate.sentinels)[0] == ids


@pytest.mark.parametrize("rate, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.9, 10.0), (0.01, 3.0)])
def test_lengths_of_any_text(rate, mean):
    rng = np.random.default_rng(0)
    for length in range(2, 200):
        pieces = spans(rng, length, rate, mean)
        assert pieces.sum() == length and (pieces > 0).all() and len(pieces) % 2 == 0
        assert lengths(length, rate, mean) == (
            pieces[0::2].sum() + len(pieces) // 2 + 1, pieces[1::2].sum() + len(pieces) // 2 + 1
        )  # fmt: skip
    assert lengths(block_length(128, rate, mean), rate, mean)[0] <= 128


def test_spans_are_everywhere():
    """Every division is as likely as another: but for the edges, each place is taken out equally often."""
    rng, taken = np.random.default_rng(0), np.zeros(60)
    for _ in range(4000):
        pieces = spans(rng, 60, 0.15, 3.0)
        taken += np.repeat(np.arange(len(pieces)) % 2, pieces)
    assert taken[0] == 0 and taken[-1] == 4000 and (abs(taken[6:50] / 4000 - 0.112) < 0.02).all()


def test_texts_that_cannot_be_corrupted():
    collate = SpanDenoising([90], end=1, pad=0)
    with pytest.raises(ValueError, match="2 tokens or more, got 1"):
        collate([{"input_ids": [5]}])
    with pytest.raises(ValueError, match="has 3 spans, and there are 1 sentinels"):
        collate([{"input_ids": list(range(60))}])


def test_masking(tokenizers):
    """The library's collator, as the script has it: 15 %, of these 80 % masked, 10 % others, 10 % left."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["bert"])
    torch.manual_seed(0)
    rows = [tokenizer(a, b) for a, b in zip(*[iter(sentences(1000))] * 2, strict=True)]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)(rows)
    kept = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row["input_ids"]) for row in rows], True, tokenizer.pad_token_id
    )
    special = torch.isin(kept, torch.tensor(tokenizer.all_special_ids))
    chosen = batch["labels"] != -100
    assert not (chosen & special).any() and torch.equal(batch["labels"][chosen], kept[chosen])
    assert torch.equal(batch["input_ids"][~chosen], kept[~chosen])
    found = batch["input_ids"][chosen]
    masked, same = found == tokenizer.mask_token_id, found == kept[chosen]
    assert abs(chosen.sum() / (~special).sum() - 0.15) < 0.01
    assert abs(masked.float().mean() - 0.8) < 0.02 and abs(same.float().mean() - 0.1) < 0.02
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}


# Files


def test_tokenizer(tokenizers):
    for kind, folder in tokenizers.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == 700
        assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [0, 1, 2]
        for line in sentences(300):
            line = " ".join(line.split())
            assert tokenizer.decode(tokenizer(line).input_ids, skip_special_tokens=True) == line
        text, pair = tokenizer("a b", "c")["input_ids"], tokenizer("c", add_special_tokens=False).input_ids
        single = tokenizer("a b", add_special_tokens=False).input_ids
        marks = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"] if kind == "bert" else ["</s>"])
        assert text == [*marks[:-1], *single, marks[-1], *pair, marks[-1]]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"text\tlabel\na\tyes\nb\n", "line 3: expected 2 fields separated by tabs (text, label), got 1"),
        (b"text\tlabel\na\t\n", "line 2: column 'label' is empty"),
        (b"text\tkind\na\tyes\n", "line 2: expected a column 'label', got text, kind"),
        (b"text\ttext\na\tyes\n", "line 1: expected different names of columns"),
        (b"text\tlabel\n", "expected rows, got none"),
        (b"", "line 1: expected different names of columns"),
        (b"text\tlabel\na\tyes\nb\xff\tno\n", "line 3: expected UTF-8, got byte 0xff"),
    ],
)
def test_malformed_tables(tmp_path, content, message):
    path = tmp_path / "table.tsv"
    path.write_bytes(content)
    with pytest.raises(files.DataError, match=re.escape(f"{path}") + ".*" + re.escape(message)):
        files.rows(path, ("text", "label"))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": \n', "line 2: expected an object of JSON"),
        ('{"text": "a"}\n["a"]\n', "line 2: expected an object of JSON, got list"),
        ('{"text": "a"}\n\n{"title": "a"}\n', "line 3: expected a string named 'text', got title"),
    ],
)
def test_malformed_objects(tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(files.DataError, match=re.escape(f"{path}, {message}")):
        list(files.documents([str(path)]))


def test_unreadable_files(tmp_path):
    path = tmp_path / "table.tsv.xz"
    with pytest.raises(files.DataError, match="expected a file that can be read: No such file"):
        files.rows(path, ("text",))
    path.write_bytes(lzma.compress(b"text\n" + b"a\n" * 9999)[:-40])
    with pytest.raises(files.DataError, match=re.escape("expected .xz data")):
        files.rows(path, ("text",))
    with pytest.raises(files.DataError, match="expected a table, .tsv or .jsonl"):
        files.rows(tmp_path / "table.csv", ("text",))


def test_texts_are_read_in_all_forms(tmp_path):
    (tmp_path / "a.txt").write_text("One line.\nTwo.\n\nNext part.\fOther text.\n")
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        print(json.dumps({"text": "Of JSON."}), file=file)
    texts = list(files.documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl.xz")]))
    assert texts == ["One line.\nTwo.\n\nNext part.", "Other text.", "Of JSON."]
    assert list(files.paragraphs(texts[0])) == ["One line. Two.", "Next part."]
    assert list(files.sentences('He went. "Why?" Mr. X. knew.')) == ["He went.", '"Why?"', "Mr. X. knew."]


# Runs


def command(script, *options, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(EXAMPLES / script), *map(str, options)]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*arguments, **options):
    return subprocess.run(
        command(*arguments, **options), capture_output=True, text=True, env=environment(), timeout=300
    )


def succeed(*arguments, **options):
    done = start(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def logged(folder, name="loss"):
    return {line["step"]: line[name] for line in map(json.loads, (folder / "log.jsonl").open()) if name in line}


def pretraining(tokenizers, folder, steps, *more):
    return ("pretrain_seq2seq.py", "--texts", NOVELS, "--tokenizer", tokenizers["seq2seq"], "--mixer", "dynamic",
            "--config", SIZES, "--length", 64, "--output_dir", folder, "--max_steps", steps, "--logging_steps", 1,
            "--warmup_steps", 2, "--per_device_train_batch_size", 8, "--use_cpu", *more)  # fmt: skip


STEPS = 300  # some seconds, so that it can be stopped


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tokenizers, tmp_path):
    """Interrupted by SIGINT and started again, it logs the losses of a run that was left alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*pretraining(tokenizers, whole, STEPS))
    process = subprocess.Popen(
        command(*pretraining(tokenizers, parts, STEPS)), stderr=subprocess.PIPE, text=True, env=environment()
    )
    while process.poll() is None and not (parts / "log.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors[-3000:]
    assert re.search(rf"stopped at step \d+ of {STEPS}, saved in .*; the same command goes on from there", errors)
    first = logged(parts)
    assert 0 < len(first) < STEPS
    succeed(*pretraining(tokenizers, parts, STEPS))
    assert logged(parts) == logged(whole) and len(logged(whole)) == STEPS
    assert logged(whole)[STEPS] < logged(whole)[1]


def test_two_processes(tokenizers, tmp_path):
    """They train one model, write one log, and stop together where one is interrupted."""
    folder = tmp_path / "two"
    succeed(*pretraining(tokenizers, folder, 4, "--ddp_backend", "gloo"), processes=2)
    assert list(logged(folder)) == [1, 2, 3, 4]
    assert (folder / "model.safetensors").exists()


def test_bert_and_what_follows(tokenizers, tables, tmp_path, monkeypatch):
    """Pre-training, a task, another task from that, and a task on pairs."""
    bert, first, second = (tmp_path / name for name in ("bert", "first", "second"))
    few = ("--max_steps", 3, "--per_device_train_batch_size", 8, "--logging_steps", 1, "--use_cpu")
    few += ("--tokenizer", tokenizers["bert"])

    def run(script, *options):
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, (*options, *few))])
        script.run()

    run(pretrain_bert, "--texts", NOVELS, "--config", BERT_SIZES, "--output_dir", bert)
    table = tables / "question.tsv"
    columns = ("--text", "text", "--label", "label", "--train", table, "--test", f"dev={table}")
    run(finetune, *columns, "--model", bert, "--output_dir", first)
    assert 0 <= json.loads((first / "results.json").read_text())["dev"]["accuracy"] <= 1
    table = tables / "follows.tsv"
    columns = ("--text", "first", "--pair", "second", "--label", "label", "--train", table, "--test", f"dev={table}")
    run(finetune, *columns, "--model", first, "--output_dir", second, "--metric", "matthews")
    result = json.loads((second / "results.json").read_text())["dev"]
    assert result["rows"] == 199 and -1 <= result["matthews"] <= 1


def test_a_mistake_is_one_line(tokenizers, tmp_path):
    table = tmp_path / "table.tsv"
    table.write_text("text\tlabel\na\tyes\nb\n")
    done = start(
        "finetune.py", "--train", table, "--tokenizer", tokenizers["seq2seq"], "--text", "text", "--label", "label",
        "--mixer", "dynamic", "--output_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == f"finetune.py: {table}, line 3: expected 2 fields separated by tabs (text, label), got 1"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--text text --label label", "expected one of --model, --mixer and --variant"),
        ("--text text --mixer dynamic", "expected --task, or --text and --label, or --source and --target"),
        ("--task mnli --mixer dynamic", "--task: expected one of trec, .*, got 'mnli'"),
        ("--task cogs --variant none", "--variant: expected a --mixer"),
        ("--task trec --mixer dynamic --metric bleu", "--metric: expected one of accuracy, f1, matthews, got 'bleu'"),
        ("--task trec --mixer dynamic --test dev.tsv", "--test: expected name=table, got 'dev.tsv'"),
    ],
)
def test_options_of_finetuning(options, message):
    with pytest.raises(ValueError, match=message):
        parsed((finetune.Arguments,), {}, "", ["--train", "a.tsv", "--tokenizer", "b", *options.split()])


def test_exact_match_is_that_of_greedy_decoding(tokenizers):
    """One pass with the target before it finds the targets that ``generate`` gives."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["seq2seq"])
    torch.manual_seed(0)
    config = json.loads(SIZES) | dict(dropout=0.0)
    model = ConvSeq2SeqForConditionalGeneration(architectures.seq2seq("dynamic", "tiny", "paper", tokenizer, **config))
    rows = [tokenizer(line, return_tensors="pt") for line in sentences(12)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that its outputs differ
    for i, row in enumerate(rows):
        made = model.eval().generate(**row, max_new_tokens=6, num_beams=1, do_sample=False)[:, 1:]
        label = made.clone()
        if i % 2:
            label[0, -1] = (label[0, -1] + 1) % 700
        with torch.no_grad():
            found = finetune.highest(model(**row, labels=label).logits, label)
        assert torch.equal(found, label) == torch.equal(made, label)
