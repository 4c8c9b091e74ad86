"""What the training scripts read, and how they corrupt it."""

import json
import lzma
import re

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")
import train_tokenizer
from sample_texts import NOVELS, sentences
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from training import files
from training.spans import SpanDenoising, block_length, lengths, spans

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


def test_texts_for_a_tokenizer(tmp_path):
    """Long paragraphs count, and what cannot be used is said in the scripts' own words."""
    path = tmp_path / "texts.txt"
    path.write_text("word other thing " * 6000 + "\n\na b c d.\n")
    options = dict(texts=[str(path)], output_dir=str(tmp_path), sentinels=0)
    tokenizer = train_tokenizer.train(train_tokenizer.Arguments(vocab_size=22, **options))
    assert tokenizer.unk_token_id not in tokenizer("a word other thing").input_ids
    long = "äb " * 20_000 + "x" * 40_000
    parts = list(train_tokenizer.cut(long))
    assert max(map(len, parts)) <= train_tokenizer.LONGEST and "".join(" ".join(parts).split()) == long.replace(" ", "")
    path.write_text(" \n")
    draws = ["".join(train_tokenizer.drawn(iter("abcde"), 2, seed)) for seed in range(2000)]
    assert draws == ["".join(train_tokenizer.drawn(iter("abcde"), 2, seed)) for seed in range(2000)]
    assert all(abs(sum(letter in draw for draw in draws) - 800) < 100 for letter in "abcde")  # 4.5 standard deviations
    assert train_tokenizer.drawn(iter("abc"), 3, 0) == ["a", "b", "c"]
    for wrong, error, message in (
        ({}, files.DataError, "texts.txt: expected text, got none"),
        (
            {"texts": [str(NOVELS)], "vocab_size": 99999},
            files.DataError,
            "--vocab_size 99999: Vocabulary size too high",
        ),
        ({"sample": 0}, ValueError, "--sample: expected 1 to 2147483647, got 0"),
        ({"sentinels": -4}, ValueError, "--sentinels: expected 0 to 2147483647, got -4"),
        ({"seed": -1}, ValueError, "--seed: expected 0 to 4294967295, got -1"),
    ):
        with pytest.raises(error, match=message):
            train_tokenizer.train(train_tokenizer.Arguments(**(options | wrong)))


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
        (b"\xef\xbb\xbftext\tkind\na\tyes\n", "line 2: expected a column 'label', got text, kind"),
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
        ("[" * 100_000, "line 1: expected an object of JSON"),
        ('{"text": "a"}\n\n{"title": "a"}\n', "line 3: expected a string named 'text', got title"),
    ],
)
def test_malformed_objects(tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(files.DataError, match=re.escape(f"{path}, {message}")):
        list(files.documents([str(path)]))


def test_values_of_objects(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": null, "label": 1}\n')
    with pytest.raises(files.DataError, match="line 2: expected a string or an integer in column 'text', got null"):
        files.rows(path, ("text", "label"))
    assert files.rows(path, ("label",)) == [{"label": "1"}] * 2
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d end"}\n')
    with pytest.raises(files.DataError, match=r"line 2: expected characters, got '\\ud83d'"):
        files.rows(path, ("text",))


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
