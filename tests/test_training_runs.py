"""The training scripts: that they run, stop, go on, and say what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from packaging.version import Version

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")
pytest.importorskip("sklearn")
import finetune
import pretrain_bert
import pretrain_seq2seq
import train_tokenizer
import transformers
from sample_texts import NOVELS
from training_scripts import (
    BERT_SIZES,
    EXAMPLES,
    SIZES,
    command,
    environment,
    logged,
    pretraining,
    start,
    succeed,
)
from transformers import (
    TrainerCallback,
    TrainingArguments,
)

from training import files
from training.running import Interrupted, Trainer, parsed

STEPS = 200  # some seconds, so that it can be stopped


def stop(arguments, folder, group=False):
    """Start a script, send it SIGTERM once it logs, and then its group if that is wanted; its status and errors."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    try:
        while process.poll() is None and not (folder / "log.jsonl").exists():
            time.sleep(0.02)
        process.terminate()
        time.sleep(0.05)
        if group and process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, errors


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tokenizers, tmp_path):
    """SIGTERM comes to it, twice as from timeout, and to the process that makes its batches; started again, it logs the
    losses of a run that was left alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*pretraining(tokenizers, whole, STEPS))
    again = pretraining(tokenizers, parts, STEPS, "--dataloader_num_workers", 1)
    status, errors = stop(command(*again), parts, group=True)
    assert status == 130, errors[-3000:]
    assert re.search(rf"stopped at step \d+ of {STEPS}, saved in .*; the same command goes on from there", errors)
    first = logged(parts)
    assert 0 < len(first) < STEPS
    succeed(*again)
    assert logged(parts) == logged(whole) and len(logged(whole)) == STEPS
    assert logged(whole)[STEPS] < logged(whole)[1]


def test_two_processes(tokenizers, tmp_path):
    """They train one model and write one log, also where nobody has said that there is no GPU; all stop when one is
    asked to, and go on."""
    folder = tmp_path / "two"
    again, steps = pretraining(tokenizers, folder, STEPS // 2), range(1, STEPS // 2 + 1)
    _, errors = stop(command(*again, processes=2), folder)
    done = list(logged(folder))
    assert 0 < len(done) < len(steps) and not (folder / "model.safetensors").exists(), errors[-3000:]
    if Version(transformers.__version__) < Version("5.24"):
        assert "expected transformers 5.24 or later to go on in several" in start(*again, processes=2).stderr
        return
    succeed(*again, processes=2)
    lines = [json.loads(line) for line in (folder / "log.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == list(steps)
    assert (folder / "model.safetensors").exists()


ENDING = """
import atexit, sys, torch
sys.path.insert(0, sys.argv[1])
from training.running import Interrupted, main

class Held:
    def __del__(self):
        print("Python ended")

def run():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    sys.stdout.write("ran ")
    if sys.argv[2] != "None":
        raise eval(sys.argv[2])

held = Held()
atexit.register(sys.stdout.write, "and left")
main(run)
"""


@pytest.mark.parametrize("raised", ["None", "Interrupted('stopped')", "ValueError('wrong')", "KeyboardInterrupt"])
def test_a_process_of_a_group_leaves_before_python_ends(raised):
    """A thread of gloo that lets go of a tensor while Python ends would abort it."""
    command = [sys.executable, "-c", ENDING, str(EXAMPLES), raised]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100)
    status = {"None": 0, "ValueError('wrong')": 1}.get(raised, 130)
    assert (done.returncode, done.stdout) == (status, "ran and left"), done.stderr
    said = {"None": "", "Interrupted('stopped')": "stopped", "ValueError('wrong')": "-c: wrong"}
    assert said.get(raised, "interrupted; the same command goes on") in done.stderr


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
    with pytest.raises(ValueError, match="holds a run of another script or version"):
        run(pretrain_bert, "--texts", NOVELS, "--tokenizer", tokenizers["bert"], "--config", BERT_SIZES, "--output_dir",
            folder)  # fmt: skip
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = [sys.executable, "-c", program, folder / "lock"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="expected a folder that no other process writes to, got one in use"):
            train(4)
        other.communicate("\n")
    train(4, "--warmup_steps", "2.0", "--learning_rate", "1e-2")  # the same numbers, written otherwise
    with pytest.raises(ValueError, match="holds a model trained for 4 steps, which cannot go on to 3"):
        train(3)
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "log_hi')  # a full disk
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


@pytest.mark.parametrize("step", [14, 17])
def test_a_stop_beside_the_best_model(tokenizers, tables, tmp_path, run, interrupted, step):
    """Where the best model is kept, what a stop has saved is kept too. Nothing is measured before it, but at the end of
    an epoch, which would not be measured later."""
    table = tables / "question.tsv"
    options = ("--text", "text", "--label", "label", "--train", table, "--test", f"dev={table}", "--mixer",
               "lightweight", "--config", SIZES, "--tokenizer", tokenizers["seq2seq"], "--output_dir", tmp_path,
               "--num_train_epochs", 3, "--learning_rate", 1e-9, "--eval_strategy", "epoch", "--load_best_model_at_end",
               "true", "--logging_steps", 1)  # fmt: skip
    interrupted(step)  # in the third epoch of 7 steps, or at the end of the second
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 21"):
        run(finetune, *options)
    assert (tmp_path / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert sorted(logged(tmp_path, "eval_dev_loss")) == [7, 14]
    run(finetune, *options)
    assert sorted(logged(tmp_path, "eval_dev_loss")) == [7, 14, 21] and list(logged(tmp_path)) == [*range(1, 22)]


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
        ("--optim_args", "decay_rate=-0.1"): "--optim_args: expected another --optim than adafactor",
        (
            "--config",
            '{"vocab_size": 10}',
        ): "--config: expected a vocabulary of at least the tokenizer's 700 tokens, got one of 10",
        ("--tokenizer", tmp_path / "no"): f"--tokenizer {tmp_path / 'no'}: ",
        ("--per_device_eval_batch_size", "0"): "--per_device_eval_batch_size: expected 1 or more, got 0",
        ("--label_names", "x"): "--label_names: expected it unset",
        ("--do_train", "false"): "--do_train: expected true",
        ("--do_predict", "true"): "--do_predict: expected false",
        ("--eval_do_concat_batches", "false"): "--eval_do_concat_batches: expected true",
        ("--dataloader_drop_last", "true", "--per_device_train_batch_size", "99999"): "--dataloader_drop_last: ",
        ("--fp16", "true", "--use_cpu", "true"): "--fp16: expected a GPU",
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


def test_steps_between_tests(tokenizers, tables, tmp_path, run, interrupted):
    """A stop behind a step that is measured loses nothing, and those of the call that goes on count."""
    table = tables / "question.tsv"
    options = ("--text", "text", "--label", "label", "--train", table, "--test", f"dev={table}", "--mixer",
               "lightweight", "--config", SIZES, "--tokenizer", tokenizers["seq2seq"], "--max_steps", 8,
               "--train_sampling_strategy", "random", "--logging_steps", 1, "--eval_strategy", "steps")  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(finetune, *options, "--output_dir", whole, "--eval_steps", 2)
    interrupted(4)
    with pytest.raises(Interrupted, match="stopped at step 4 of 8"):
        run(finetune, *options, "--output_dir", parts, "--eval_steps", 2)
    run(finetune, *options, "--output_dir", parts, "--eval_steps", 1)
    assert {step: logged(whole)[step] for step in range(1, 6)}.items() <= logged(parts).items()
    assert sorted(logged(whole, "eval_dev_loss")) == [2, 4, 6, 8]
    assert sorted(logged(parts, "eval_dev_loss")) == [2, 4, 5, 6, 7, 8]


def test_folders_of_others(tokenizers, tmp_path, run):
    """Nothing is written over: a model that no run has made, a log of another program, or a model's tokenizer."""
    for name in ("config.json", "log.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}\n")
        with pytest.raises(ValueError, match=f"expected another folder, because this one has {name} of something else"):
            run(pretrain_seq2seq, *pretraining(tokenizers, folder, 1)[1:])
        assert (folder / name).read_text() == "{}\n"
    with pytest.raises(ValueError, match="expected a folder for the tokenizer alone, got one of a model"):
        run(train_tokenizer, "--texts", NOVELS, "--output_dir", tmp_path / "config.json")
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tokenizers["seq2seq"], tokenizer)
    options = pretraining(tokenizers, tmp_path / "run", 1, "--tokenizer", tokenizer)[1:]
    run(pretrain_seq2seq, *options)
    again = ("--vocab_size", 690, "--sentinels", 32)
    run(train_tokenizer, "--texts", NOVELS, "--output_dir", tokenizer, *again)
    with pytest.raises(ValueError, match="holds a run with --checksum of the tokens"):
        run(pretrain_seq2seq, *options, "--max_steps", 2)


def test_epochs_count_where_they_are_given():
    def steps(*more):
        options = ["--texts", "a", "--tokenizer", "b", "--output_dir", "c", *more]
        return parsed((pretrain_bert.Arguments, TrainingArguments), pretrain_bert.DEFAULTS, "", options)[1].max_steps

    assert [steps(), steps("--num_train_epochs", "2"), steps("--num-train-epochs=2")] == [1_000_000, -1, -1]
    with pytest.raises(ValueError, match="--texts: expected it once, with all that it takes, got it 2 times"):
        steps("--texts=b")
