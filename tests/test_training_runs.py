"""The training scripts: that they run, stop, go on, and say what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")
pytest.importorskip("sklearn")
import finetune
import pretrain_bert
import pretrain_seq2seq
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from sample_texts import NOVELS, sentences
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainingArguments,
)

from convkernels.models import ConvSeq2SeqForConditionalGeneration, ConvSeq2SeqForSequenceClassification
from training import architectures, files
from training.running import Interrupted, Trainer, parsed

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SIZES = json.dumps(dict(d_model=32, d_ff=64, num_heads=2, encoder_layers=1, decoder_layers=1, encoder_kernel_size=3))
BERT_SIZES = json.dumps(dict(hidden_size=32, embedding_size=16, num_attention_heads=2, intermediate_size=64,
                             num_hidden_layers=1))  # fmt: skip


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
            "--warmup_steps", 2, "--per_device_train_batch_size", 8, *more)  # fmt: skip


STEPS = 200  # some seconds, so that it can be stopped


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tokenizers, tmp_path):
    """SIGTERM comes to it and to the process that makes its batches; started again, it logs the losses of a run that
    was left alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*pretraining(tokenizers, whole, STEPS))
    again = pretraining(tokenizers, parts, STEPS, "--dataloader_num_workers", 1)
    process = subprocess.Popen(
        command(*again), stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    while process.poll() is None and not (parts / "log.jsonl").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors[-3000:]
    assert re.search(rf"stopped at step \d+ of {STEPS}, saved in .*; the same command goes on from there", errors)
    first = logged(parts)
    assert 0 < len(first) < STEPS
    succeed(*again)
    assert logged(parts) == logged(whole) and len(logged(whole)) == STEPS
    assert logged(whole)[STEPS] < logged(whole)[1]


@pytest.fixture
def run(monkeypatch):
    """Runs a script in this process."""

    def call(script, *options):
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, options)])
        script.run()

    return call


def test_two_processes(tokenizers, tmp_path):
    """They train one model and write one log, also where nobody has said that there is no GPU; all stop when one is
    asked to, and go on."""
    folder = tmp_path / "two"
    again, steps = pretraining(tokenizers, folder, STEPS // 2), range(1, STEPS // 2 + 1)
    process = subprocess.Popen(command(*again, processes=2), stderr=subprocess.PIPE, text=True, env=environment())
    while process.poll() is None and not (folder / "log.jsonl").exists():
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    done = list(logged(folder))
    assert 0 < len(done) < len(steps) and not (folder / "model.safetensors").exists(), errors[-3000:]
    if Version(transformers.__version__) < Version("5.24"):
        assert "expected transformers 5.24 or later to go on in several" in start(*again, processes=2).stderr
        return
    succeed(*again, processes=2)
    lines = [json.loads(line) for line in (folder / "log.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == list(steps)
    assert (folder / "model.safetensors").exists()


def results(folder):
    return json.loads((folder / "results.json").read_text())["dev"]


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
    wrong = ("--config", '{"hidden_size": 48}')
    with pytest.raises(ValueError, match="expected weights for all of the model but its head, got none that fit bert"):
        run(finetune, *few, *columns, "--model", first, "--output_dir", tmp_path / "third", *wrong)
    other = AutoTokenizer.from_pretrained(tokenizers["bert"])
    other.add_tokens("convolution")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="--tokenizer .*other: expected the tokens of --model .*first, got others"):
        run(finetune, *few, *columns, "--model", first, "--tokenizer", tmp_path / "other", "--output_dir", tmp_path)


def test_what_a_folder_has_decides(tokenizers, tmp_path, run, capsys):
    """Other options are refused, a checkpoint that is not whole is left out, the log goes on behind the one taken."""
    folder = tmp_path / "run"

    def train(steps, *more):
        kept = ("--save_steps", 2, "--save_total_limit", 3)
        run(pretrain_seq2seq, *pretraining(tokenizers, folder, steps, *kept, *more)[1:])

    train(4)
    before = logged(folder)
    for wrong, message in {
        ("--learning_rate", "1e-4"): "holds a run with --learning_rate 0.01: .*, got 0.0001",
        ("--mixer", "lightweight"): "holds a run with --mixer dynamic: .* got lightweight",
    }.items():
        with pytest.raises(ValueError, match=message):
            train(4, *wrong)
    with pytest.raises(ValueError, match="holds a model trained for 4 steps, which cannot go on to 3"):
        train(3)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    train(6)
    assert "checkpoint-4 is not whole" in capsys.readouterr().err
    assert list(logged(folder)) == [1, 2, 3, 4, 5, 6] and before.items() <= logged(folder).items()
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="expected more and a checkpoint, or another folder"):
        train(8)


@pytest.fixture
def interrupted(monkeypatch):
    """Makes a Ctrl-C come in a step, counted from 1."""

    def call(step):
        class SendSignal(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step - 1:
                    os.kill(os.getpid(), signal.SIGINT)

        def init(self, *arguments, **options):
            made(self, *arguments, **options)
            self.add_callback(SendSignal())

        monkeypatch.setattr(Trainer, "__init__", init)

    made = Trainer.__init__
    return call


def test_a_signal_in_the_last_step(tokenizers, tmp_path, run, interrupted):
    """What has been trained is saved, and not trained again."""
    interrupted(3)
    options = pretraining(tokenizers, tmp_path, 3)[1:]
    with pytest.raises(Interrupted, match="stopped at step 3 of 3"):
        run(pretrain_seq2seq, *options)
    assert (tmp_path / "model.safetensors").exists()
    log = (tmp_path / "log.jsonl").read_text()
    run(pretrain_seq2seq, *options)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_stop_beside_the_best_model(tokenizers, tables, tmp_path, run, interrupted):
    """Where the best model is kept, what a stop has saved is kept too, and nothing is measured before it."""
    table = tables / "question.tsv"
    options = ("--text", "text", "--label", "label", "--train", table, "--test", f"dev={table}", "--mixer",
               "lightweight", "--config", SIZES, "--tokenizer", tokenizers["seq2seq"], "--output_dir", tmp_path,
               "--num_train_epochs", 3, "--learning_rate", 1e-9, "--eval_strategy", "epoch", "--load_best_model_at_end",
               "true", "--logging_steps", 1)  # fmt: skip
    interrupted(17)  # in the third epoch of 7 steps
    with pytest.raises(Interrupted, match="stopped at step 17 of 21"):
        run(finetune, *options)
    assert (tmp_path / "checkpoint-17" / "trainer_state.json").exists()
    assert sorted(logged(tmp_path, "eval_dev_loss")) == [7, 14]
    run(finetune, *options)
    assert sorted(logged(tmp_path, "eval_dev_loss")) == [7, 14, 21] and list(logged(tmp_path)) == [*range(1, 22)]


def test_a_model_without_a_decoder_does_not_write(tokenizers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["seq2seq"])
    config = architectures.seq2seq("dynamic", "tiny", "paper", tokenizer, **json.loads(SIZES))
    ConvSeq2SeqForSequenceClassification(config).save_pretrained(tmp_path)
    arguments = finetune.Arguments("a.tsv", "b", source="s", target="t", model=str(tmp_path))
    with pytest.raises(ValueError, match="expected weights for all of the model but its head, .* fit model.decoder"):
        finetune.TextToText(arguments, tokenizer, None)


def test_a_loss_that_is_not_a_number_ends_the_run(tokenizers, tmp_path, run):
    with pytest.raises(ValueError, match="the loss is nan at step"):
        run(pretrain_seq2seq, *pretraining(tokenizers, tmp_path, 9, "--learning_rate", "1e30")[1:])


def test_what_pretraining_refuses(tokenizers, tmp_path, run):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "One. Two."}\n{"title": "x"}\n')
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for options, message in {
        ("--texts", texts): f"{texts}, line 2: expected a string named 'text', got title",
        ("--texts", empty): f"{empty}: expected paragraphs, got none",
        ("--texts", tmp_path / "no.txt"): "no.txt: expected a file that can be read: No such file",
        ("--tokenizer", tokenizers["bert"]): "expected one that makes 'text </s>'",
        ("--rate", "1"): "expected a rate between 0 and 1",
        ("--length", "1024"): "--tokenizer: expected 57 sentinels for --length 1024, got 32",
        ("--config", '{"d_modell": 48}'): "--config: expected fields of ConvSeq2SeqConfig, got d_modell",
        ("--dataloader_persistent_workers", "true"): "--dataloader_persistent_workers: expected",
        ("--label_smoothing_factor", "0.1"): "--label_smoothing_factor: expected 0",
        ("--save_only_model", "true"): "--save_only_model: expected it unset",
        ("--max_steps", "0"): "expected a step or more, got none",
    }.items():
        with pytest.raises((files.DataError, ValueError), match=re.escape(message)):
            run(pretrain_seq2seq, *pretraining(tokenizers, tmp_path / "run", 2, *options)[1:])
    with pytest.raises(ValueError, match="expected one that makes '.CLS. text .SEP.'"):
        run(pretrain_bert, "--texts", NOVELS, "--tokenizer", tokenizers["seq2seq"], "--output_dir", tmp_path)


def test_steps_are_relative_to_the_size_of_parameters(tokenizers, tmp_path):
    """As T5's: the first step, of a rate of 0.01, moves a matrix by a hundredth of its size, and not each of its
    elements by 0.01."""
    training = TrainingArguments(str(tmp_path), **pretrain_seq2seq.DEFAULTS)
    kind, options = pretrain_seq2seq.adafactor(training)
    for size in (1.0, 0.01):
        parameter = torch.nn.Parameter(torch.full((8, 8), size))
        parameter.grad = torch.randn(8, 8)
        kind([parameter], **options).step()
        moved = (parameter.detach() - size).square().mean().sqrt()
        assert 0.3 < moved / (0.01 * size) < 1.1
    training.optim = "adamw_torch"
    assert pretrain_seq2seq.adafactor(training) is None


def test_epochs_count_where_they_are_given():
    def steps(*more):
        options = ["--texts", "a", "--tokenizer", "b", "--output_dir", "c", *more]
        return parsed((pretrain_bert.Arguments, TrainingArguments), pretrain_bert.DEFAULTS, "", options)[1].max_steps

    assert [steps(), steps("--num_train_epochs", "2"), steps("--num-train-epochs=2")] == [1_000_000, -1, -1]


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
