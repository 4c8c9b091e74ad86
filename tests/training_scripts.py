"""Starts the training scripts as a person does, and reads what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from sample_texts import NOVELS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SIZES = json.dumps(dict(d_model=32, d_ff=64, num_heads=2, encoder_layers=1, decoder_layers=1, encoder_kernel_size=3))
BERT_SIZES = json.dumps(dict(hidden_size=32, embedding_size=16, num_attention_heads=2, intermediate_size=64,
                             num_hidden_layers=1))  # fmt: skip


def once(options):
    """Options as strings; of one that is given again with what follows it the last."""
    found = {}
    for text in map(str, options):
        if text.startswith("--"):
            name, found[text] = text, []
        else:
            found[name].append(text)
    return [text for name, values in found.items() for text in (name, *values)]


def command(script, *options, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(EXAMPLES / script), *once(options)]


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


def results(folder):
    return json.loads((folder / "results.json").read_text())["dev"]
