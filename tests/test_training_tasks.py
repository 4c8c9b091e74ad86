"""Fine-tuning: what is measured, what is loaded, and what is refused."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")
pytest.importorskip("sklearn")
import finetune
import pretrain_bert
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from sample_texts import NOVELS, sentences
from training_scripts import (
    BERT_SIZES,
    SIZES,
    results,
    start,
    succeed,
)
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from convkernels.models import ConvSeq2SeqForConditionalGeneration, ConvSeq2SeqForSequenceClassification
from training import architectures
from training.files import DataError
from training.running import Trainer, parsed


def test_a_model_is_measured_on_all_rows_in_their_order(tokenizers, tables, tmp_path, run, monkeypatch):
    """By two processes, whose last batches are not full, as by one, which finds the model trained."""
    folder, table, seen = tmp_path / "two", tables / "question.tsv", {}
    options = ("--text", "text", "--label", "label", "--train", table, "--test", f"dev={table}", "--mixer",
               "lightweight", "--config", SIZES, "--tokenizer", tokenizers["seq2seq"], "--output_dir", folder,
               "--max_steps", 3, "--logging_steps", 1, "--per_device_eval_batch_size", 7)  # fmt: skip
    succeed("finetune.py", *options, processes=2)
    found, log = results(folder), (folder / "log.jsonl").read_text()

    def measure(task, predictions, labels, rows):
        seen.update(labels=[task.labels[label] for label in labels], rows=rows["label"][:])
        return before(task, predictions, labels, rows)

    before = finetune.Classification.measure
    monkeypatch.setattr(finetune.Classification, "measure", measure)
    run(finetune, *options)
    again = results(folder)
    assert found["rows"] == 199 and found["accuracy"] == again["accuracy"]
    assert found["loss"] == pytest.approx(again["loss"], rel=1e-2)  # the library counts batches alike, full or not
    assert (folder / "log.jsonl").read_text() == log
    assert seen["labels"] == seen["rows"]


def test_a_target_that_was_cut_is_not_matched(tokenizers):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["seq2seq"])
    arguments = finetune.Arguments("a.tsv", "b", source="s", target="t", mixer="dynamic", config=SIZES, target_length=4)
    task = finetune.TextToText(arguments, tokenizer, None)
    rows = Dataset.from_dict({"s": ["a", "a"], "t": ["a", "one two three four five"]})
    encoded = task.encode("dev", rows)
    labels = encoded["labels"]
    assert encoded["length"] == [len(a) + len(b) for a, b in zip(encoded["input_ids"], labels, strict=True)]
    assert labels[0][-1] == tokenizer.eos_token_id and len(labels[1]) == 4
    padded = np.array([label + [-100] * (4 - len(label)) for label in labels])
    assert task.measure(np.abs(padded), padded, rows) == {"exact_match": 0.5}
    padded[0, 0] = tokenizer.eos_token_id  # where greedy decoding ends
    assert task.measure(np.abs(padded), padded, rows) == {"exact_match": 0.0}
    padded[1, 1] = tokenizer.eos_token_id
    assert task.measure(np.abs(padded), padded, rows) == {"exact_match": 0.0}


def test_a_target_with_unknown_text_is_not_matched(tokenizers, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["seq2seq"])
    task = finetune.TextToText(finetune.Arguments("a.tsv", "b", source="s", target="t", mixer="dynamic", config=SIZES),
                               tokenizer, None)  # fmt: skip
    rows = Dataset.from_dict({"s": ["a", "a"], "t": ["one", "\U0001f600"]})
    labels = task.encode("dev", rows)["labels"]
    assert "dev: 1 of 2 targets have text that the tokenizer does not know" in capsys.readouterr().err
    padded = np.array([label + [-100] * (9 - len(label)) for label in labels])
    assert task.measure(np.abs(padded), padded, rows) == {"exact_match": 0.5}


def test_a_folder_knows_its_classes(tokenizers, tables, tmp_path, run):
    """A table under the same name, but with other classes, is not measured with a model of the former ones."""
    table, folder = tmp_path / "table.tsv", tmp_path / "run"
    options = ("--text", "text", "--label", "label", "--train", table, "--mixer", "lightweight", "--config", SIZES,
               "--tokenizer", tokenizers["seq2seq"], "--output_dir", folder, "--max_steps", 1)  # fmt: skip
    table.write_text("text\tlabel\none\tno\ntwo\tyes\n")
    run(finetune, *options, "--test", f"dev={table}")
    before = results(folder)
    run(finetune, *options)
    assert results(folder) == before  # nothing was measured
    run(finetune, *options, "--test", f"dev={table}", "--label_smoothing_factor", 0.5, "--learning_rate", 0,
        "--output_dir", tmp_path / "smooth")  # fmt: skip
    run(finetune, *options, "--test", f"dev={table}", "--learning_rate", 0, "--output_dir", tmp_path / "plain")
    assert results(tmp_path / "smooth") == results(tmp_path / "plain")
    table.write_text("text\tlabel\none\tyes\ntwo\tzebra\n")
    with pytest.raises(ValueError, match="holds a run with --train classes .'no', 'yes'.: .* got .'yes', 'zebra'."):
        run(finetune, *options)
    with pytest.raises(ValueError, match="--config: expected no id2label, because --train has the classes"):
        run(finetune, *options, "--config", '{"id2label": {"0": "a", "1": "b"}}')


def test_batches_have_targets_of_similar_lengths(tokenizers, tmp_path):
    """Sources are all alike. Of two batches that are sorted by length at a time one may have long and short targets."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["seq2seq"])
    arguments = finetune.Arguments("a.tsv", "b", source="s", target="t", mixer="dynamic", config=SIZES)
    task = finetune.TextToText(arguments, tokenizer, None)
    rows = Dataset.from_dict({"s": ["a"] * 64, "t": ["a", "a b c d e f g h"] * 32})
    options = finetune.DEFAULTS | dict(output_dir=str(tmp_path), per_device_train_batch_size=8)
    training = TrainingArguments(**options)
    batches = Trainer(task.model, training, task.collator, task.encode("train", rows)).get_train_dataloader()
    lengths = [(batch["labels"] >= 0).sum(1) for batch in batches]
    assert len(lengths) == 8 and sum(len(set(batch.tolist())) > 1 for batch in lengths) <= 5


def test_bert_and_what_follows(tokenizers, tables, tmp_path, run):
    """Pre-training, a task, another task from that, and a task on pairs."""
    bert, first, second = (tmp_path / name for name in ("bert", "first", "second"))
    few = ("--max_steps", 3, "--per_device_train_batch_size", 8, "--logging_steps", 1)
    tokens = ("--tokenizer", tokenizers["bert"])
    run(pretrain_bert, *few, *tokens, "--texts", NOVELS, "--config", BERT_SIZES, "--output_dir", bert)
    table = tables / "question.tsv"
    columns = ("--text", "text", "--label", "label", "--train", table, "--test", f"dev={table}")
    run(finetune, *few, *columns, "--model", bert, "--output_dir", first)
    assert 0 <= results(first)["accuracy"] <= 1
    table = tables / "follows.tsv"
    columns = ("--text", "first", "--pair", "second", "--label", "label", "--train", table, "--test", f"dev={table}")
    run(finetune, *few, *tokens, *columns, "--model", first, "--output_dir", second, "--metric", "matthews")
    assert results(second)["rows"] == 199 and -1 <= results(second)["matthews"] <= 1
    # The classifier is that of the model if the classes are, and new if they are others.
    config, weights = AutoConfig.from_pretrained(first), load_file(first / "model.safetensors")
    for names, same in (({0: "no", 1: "yes"}, True), ({0: "yes", 1: "no"}, False), ({0: "a", 1: "b", 2: "c"}, False)):
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
        arguments = finetune.Arguments("a.tsv", "b", text="text", label="label", model=str(first))
        state = finetune.made(AutoModelForSequenceClassification, arguments, config).state_dict()
        assert torch.equal(state["classifier.weight"], weights["classifier.weight"]) == same
        inner = [name for name in weights if not name.startswith("classifier")]
        assert inner and all(torch.equal(state[name], weights[name]) for name in inner)
    wrong, level = ("--config", '{"hidden_size": 48}'), transformers.logging.get_verbosity()
    with pytest.raises(ValueError, match="expected weights for all of the model but its head, got none that fit bert"):
        run(finetune, *few, *columns, "--model", first, "--output_dir", tmp_path / "third", *wrong)
    with open(second / "model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="--model .*second: "):
        run(finetune, *few, *columns, "--model", second, "--output_dir", tmp_path / "third")
    assert transformers.logging.get_verbosity() == level
    other = AutoTokenizer.from_pretrained(tokenizers["bert"])
    other.add_tokens("convolution")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="--tokenizer .*other: expected the tokens of --model .*first, got others"):
        run(finetune, *few, *columns, "--model", first, "--tokenizer", tmp_path / "other", "--output_dir", tmp_path)


def test_parts_of_a_model_are_drawn_anew(tokenizers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["seq2seq"])
    config = architectures.seq2seq("lightweight", "tiny", "paper", tokenizer, **json.loads(SIZES))
    before = ConvSeq2SeqForConditionalGeneration(config)
    before.save_pretrained(tmp_path)
    options = dict(task="cogs", model=str(tmp_path))
    for redraw, redrawn in (["model.decoder"], ("model.decoder",)), (["model.sh"], ("model.shared", "lm_head")):
        after = finetune.made(AutoModelForSeq2SeqLM, finetune.Arguments("a.tsv", **options, redraw=redraw), config)
        for name, weight in before.state_dict().items():
            constant = weight.eq(weight.flatten()[0]).all()
            drawn = name.startswith(redrawn) and not constant
            assert torch.equal(weight, after.state_dict()[name]) != drawn, name
    with pytest.raises(ValueError, match="--redraw: .* model.decoder, model.encoder, model.shared, got 'decoder'"):
        finetune.made(AutoModelForSeq2SeqLM, finetune.Arguments("a.tsv", **options, redraw=["decoder"]), config)


def test_a_model_without_a_decoder_does_not_write(tokenizers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["seq2seq"])
    config = architectures.seq2seq("dynamic", "tiny", "paper", tokenizer, **json.loads(SIZES))
    ConvSeq2SeqForSequenceClassification(config).save_pretrained(tmp_path)
    arguments = finetune.Arguments("a.tsv", "b", source="s", target="t", model=str(tmp_path))
    with pytest.raises(ValueError, match="expected weights for all of the model but its head, .* fit model.decoder"):
        finetune.TextToText(arguments, tokenizer, None)


def test_a_class_that_training_does_not_have(tokenizers, tmp_path, run):
    for name, text in {"train": "a\tyes\nb\tno\n", "dev": "a\tyes\nb\tperhaps\n"}.items():
        (tmp_path / f"{name}.tsv").write_text(f"text\tlabel\n{text}")
    train, dev = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    options = ("--train", train, "--test", f"dev={dev}", "--tokenizer", tokenizers["seq2seq"], "--text", "text",
               "--label", "label", "--size", "tiny", "--output_dir", tmp_path / "run")  # fmt: skip
    with pytest.raises(DataError, match=f"{dev}, row 2: expected a class of {train}, which are no, yes, got 'perhaps'"):
        run(finetune, *options, "--mixer", "dynamic")
    learned = ("--mixer", "dynamic", "--config", '{"positions": "learned", "max_positions": 64}')
    with pytest.raises(ValueError, match="--length: expected at most the max_positions of the model, 64, got 65"):
        run(finetune, *options, *learned, "--length", 65)
    train.write_text("text\tlabel\na\tyes\nb\tyes \n")
    with pytest.raises(DataError, match=f"{train}: expected classes without spaces around them, got 'yes '"):
        run(finetune, *options, "--mixer", "dynamic")


def test_more_tokens_than_positions(tokenizers, tmp_path, run):
    options = ("--tokenizer", tokenizers["bert"], "--output_dir", tmp_path)
    few = ("--config", '{"max_position_embeddings": 16}')
    with pytest.raises(ValueError, match="--length: expected at most the max_position_embeddings .*, 16, got 128"):
        run(pretrain_bert, "--texts", NOVELS, *options, *few)
    arguments = finetune.Arguments(
        "a.tsv", tokenizers["bert"], text="text", label="label", variant="none", config=few[1]
    )
    finetune.configuration(arguments, AutoTokenizer.from_pretrained(tokenizers["bert"]))
    assert arguments.length == 16


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
        ("--text text --mixer dynamic", "expected --task, or --text and --label, or --source and --target, got --text"),
        ("--source a --target b --text c --mixer dynamic", "expected --task, .*, got --text, --source, --target"),
        ("--text a --label b --source c --mixer dynamic", "expected --task, .*, got --text, --label, --source"),
        ("--mixer dynamic", "expected --task, .*, got none of them"),
        ("--task mnli --mixer dynamic", "--task: expected one of trec, .*, got 'mnli'"),
        ("--task cogs --variant none", "--variant: expected a --mixer"),
        ("--task trec --mixer dynamic --metric bleu", "--metric: expected one of accuracy, f1, matthews, got 'bleu'"),
        ("--task trec --mixer dynamic --test dev.tsv", "--test: expected name=table, .* got 'dev.tsv'"),
        ("--task trec --mixer dynamic --test dev=a train=b", "--test: .* none 'train', got 'train=b'"),
        ("--task trec --mixer dynamic --test dev=a dev=b", "--test: .* the names different .*, got 'dev=a'"),
        ("--task trec --mixer dynamic --text question", "--text: expected it without --task"),
        ("--task trec --mixer dynamic --length 0", "--length: expected 3 or more, got 0"),
        ("--task cogs --mixer dynamic --metric f1", "--metric: expected it only for classes, .*, got f1"),
        ("--source a --target b --mixer dynamic --pair c", "--pair: expected it only for classes, .*, got c"),
        ("--text a --label b --category c --mixer dynamic", "--category: expected it only for text to text, .*, got c"),
        ("--task trec --mixer dynamic --target_length 9", "--target_length: expected it only for text to text"),
        ("--task trec --model a --size tiny", "--size: expected it only for --mixer or --variant, .*, got tiny"),
        ("--task trec --variant none --style paper", "--style: expected it only for --mixer, got paper"),
        ("--task cogs --mixer dynamic --redraw model.decoder", r"--redraw: expected it only for --model, got \['model"),
    ],
)
def test_options_of_finetuning(options, message):
    with pytest.raises(ValueError, match="--tokenizer: expected it, because there is no --model that has one"):
        finetune.Arguments("a.tsv", task="trec", mixer="dynamic")
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
