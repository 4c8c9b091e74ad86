"""Every model trains: with transformers' Trainer on real text, and in two processes as in one."""

import socket

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers
from modelling import MIXERS, VARIANTS, bert, masked, quick, seq2seq, text
from torch.distributed.fsdp import fully_shard

from convkernels.models import CompositeBertForSequenceClassification, ConvSeq2SeqForSequenceClassification
from training.running import leave

STEPS = 30


class Rows(torch.utils.data.Dataset):
    """Tensors of equal length as rows of keyword arguments."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


def train(model, rows, folder):
    """The losses of 30 steps of 8 rows."""
    arguments = transformers.TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=6e-3,
        lr_scheduler_type="constant", logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_that_it_learns(model, rows, folder):
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    losses = train(model, rows, folder)
    assert len(losses) == STEPS
    start, end = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert end < 0.85 * start, losses
    for name, value in model.named_parameters():
        assert name not in before or not torch.equal(value, before[name]), f"{name} did not change"


def sources_and_targets(count=64):
    """32 bytes of a paragraph, and the 16 that follow."""
    ids = text(count, 48)
    labels = ids[:, 32:].masked_fill(ids[:, 32:] == 0, -100)
    return Rows(input_ids=ids[:, :32], attention_mask=(ids[:, :32] != 0).long(), labels=labels)


def hidden_bytes(count=64):
    ids = text(count, 32)
    inputs, labels = masked(ids)
    return Rows(input_ids=inputs, attention_mask=(ids != 0).long(), labels=labels)


@pytest.mark.parametrize("mixer", quick(MIXERS, ("dynamic",)))
def test_encoder_decoders_learn(mixer, tmp_path):
    changes = dict(dropout=0.1, weight_dropout=0.1, attention_dropout=0.1)
    check_that_it_learns(seq2seq(mixer, **changes), sources_and_targets(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["fairseq", "released"])
def test_other_styles_learn(style, tmp_path):
    check_that_it_learns(seq2seq("dynamic", style, pair_attention=2), sources_and_targets(), tmp_path)


@pytest.mark.parametrize("variant", quick(VARIANTS, ("composite-conv-qkv",)))
def test_berts_learn(variant, tmp_path):
    changes = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    check_that_it_learns(bert(variant, **changes), hidden_bytes(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "dual", "bert"])
def test_classifiers_learn(kind, tmp_path):
    """Whether the bytes stand in their own order; of a pair, whether both are of one paragraph."""
    ids = text(64, 32)
    labels = torch.arange(64) % 2
    if kind == "dual":
        others = torch.where(labels[:, None] == 1, ids, ids.roll(1, 0))
        columns = dict(input_ids=ids, pair_input_ids=others)
    else:
        columns = dict(input_ids=torch.where(labels[:, None] == 1, ids, ids.sort(1, descending=True).values))
    columns |= {name.replace("input_ids", "attention_mask"): (value != 0).long() for name, value in columns.items()}
    columns["labels"] = labels
    if kind == "bert":
        model = bert("composite", made=CompositeBertForSequenceClassification)
    else:
        model = seq2seq("lightweight", made=ConvSeq2SeqForSequenceClassification, dual_encoder=kind == "dual")
    check_that_it_learns(model, Rows(**columns), tmp_path)


def distributed_models():
    return {
        "seq2seq": (seq2seq("dynamic", noise=0.05), sources_and_targets(8)),
        "bert": (bert("composite-conv-qkv", noise=0.05), hidden_bytes(8)),
    }


def half(rows, rank):
    return {key: column[rank::2] for key, column in rows.columns.items()}


def one_of_two(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    for name, (model, rows) in distributed_models().items():
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(**half(rows, rank)).loss.backward()
        torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, f"{folder}/{name}{rank}")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for name, (model, rows) in distributed_models().items():
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**half(rows, rank)).loss.backward()
        whole = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
        torch.save(whole, f"{folder}/{name}-sharded{rank}")
    leave(0)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Gradients that DistributedDataParallel or FSDP average over two processes are those of the two halves in one
    process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(one_of_two, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    for name, (model, rows) in distributed_models().items():
        found = [torch.load(tmp_path / f"{name}{kind}{rank}") for kind in ("", "-sharded") for rank in range(2)]
        (sum(model(**half(rows, rank)).loss for rank in range(2)) / 2).backward()
        for parameter, value in model.named_parameters():
            if value.requires_grad:
                for gradients in found:
                    torch.testing.assert_close(gradients[parameter], value.grad, rtol=1e-5, atol=1e-7, msg=parameter)
