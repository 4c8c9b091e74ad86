"""Running transformers' Trainer so that nothing is lost: a log in JSONL, checkpoints from which the same command goes
on, and a stop on Ctrl-C that saves first."""

import json
import math
import signal
import sys
import threading
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from .files import DataError, logged, replace

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of TrainingArguments, what decides how a model is trained: a run goes on with these alone.
DECISIVE = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16"),
)
# Without these a checkpoint is of no use; the Trainer writes the last of them last.
CHECKPOINT = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class Interrupted(Exception):
    """A run that was asked to stop, and has saved where it was."""


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def defaults(**changes) -> dict:
    """Of TrainingArguments, what all scripts set otherwise. Without an accelerator the processes of torchrun find each
    other only with use_cpu."""
    accelerated = torch.accelerator.is_available()
    always = dict(report_to="none", save_total_limit=1, logging_steps=50, logging_nan_inf_filter=False)
    return always | dict(use_cpu=not accelerated, dataloader_pin_memory=accelerated) | changes


def parsed(kinds: tuple[type, ...], changes: dict, description: str, arguments: list[str] | None = None) -> tuple:
    """Command-line arguments as objects of these kinds, the last of them TrainingArguments with other defaults. Where a
    number of epochs is given, it is not the default number of steps that counts."""
    given = {text.split("=")[0] for text in (sys.argv[1:] if arguments is None else arguments)}
    if "--num_train_epochs" in given:
        changes = {name: value for name, value in changes.items() if name != "max_steps"}
    parser = HfArgumentParser(kinds, description=description, formatter_class=Help)
    parser.set_defaults(**changes)
    return parser.parse_args_into_dataclasses(arguments)


def main(run: Callable[[], object]) -> None:
    """Run a script's main function; what a person can mend is one line, not a traceback."""
    try:
        run()
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (DataError, ValueError, OSError, SafetensorError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved, if anything is", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _leave_signals(initialise: Callable[[int], None], worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    initialise(worker)


class Trainer(transformers.Trainer):
    """That of transformers; its processes that load data leave signals to it, which may reach all of a group."""

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if loader.num_workers:
            inner = getattr(loader, "base_dataloader", loader)  # accelerate puts its own around it
            inner.worker_init_fn = partial(_leave_signals, inner.worker_init_fn)
        return loader

    def predict_in_order(self, rows, prefix: str):
        """``predict`` of all rows, in their order: as in training, they would be shuffled by length, or left out."""
        self.args.train_sampling_strategy = "random"
        self.args.dataloader_drop_last = self.args.prediction_loss_only = False
        return self.predict(rows, metric_key_prefix=prefix)


class Log(TrainerCallback):
    """Appends what the Trainer logs to a file, an object of JSON per line, in the process that counts as the first.
    ValueError once the loss is not a number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            values = {key: value if math.isfinite(value) else None for key, value in (logs or {}).items()}
            with self.path.open("a") as file:
                print(json.dumps({"step": state.global_step, **values}), file=file)
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {state.global_step}: expected a finite one; try a lower --learning_rate, "
                "or larger batches if there may be some with nothing to predict"
            )


class StopOnSignal(TrainerCallback):
    """Ends training behind the step at hand, and saves, once SIGINT or SIGTERM has come to any process. A second signal
    does what it usually does; what is ignored stays ignored."""

    def __init__(self) -> None:
        self.wanted, self.stopped, self.before = False, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self.wanted = True
        for one, handler in self.before.items():
            signal.signal(one, handler)
        print("\nstopping behind this step, saving first; once more stops at once", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._anywhere(args.device):
            self.stopped = True
            control.should_save |= state.global_step < state.max_steps
            control.should_training_stop = True
            control.should_evaluate = False

    def _anywhere(self, device: torch.device) -> bool:
        if not torch.distributed.is_initialized():
            return self.wanted
        wanted = torch.tensor(int(self.wanted), device=device)
        torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        return bool(wanted)


class Run:
    """What a folder has of a run: ``run.json`` with the options that decide how the model is trained and, once it is,
    how long; checkpoints; the model."""

    def __init__(self, trainer: Trainer, options: dict) -> None:
        training = trainer.args
        accumulated = training.gradient_accumulation_steps
        if accumulated < 1:
            raise ValueError(f"--gradient_accumulation_steps: expected 1 or more, got {accumulated}")
        self.trainer, self.folder = trainer, Path(training.output_dir)
        self.path, self.log = self.folder / "run.json", self.folder / "log.jsonl"
        self.options = json.loads(json.dumps(options | {name: getattr(training, name) for name in DECISIVE}))
        self.until = {"max_steps": training.max_steps, "num_train_epochs": training.num_train_epochs}
        self.folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(self.path.read_text()) if self.path.exists() else {"options": self.options}
        for name, value in self.options.items():
            held = before["options"].get(name)
            if value != held:
                raise ValueError(
                    f"--output_dir {self.folder}: holds a run with --{name} {held}: expected that, or another folder, "
                    f"got {value}"
                )
        self.trained = before.get("trained")

    def write(self, **more) -> None:
        if self.trainer.is_world_process_zero():
            replace(self.path, json.dumps({"options": self.options, **more}, indent=1) + "\n")

    def checkpoint(self) -> str | None:
        """The last one that is whole."""
        chosen = self.trainer.args.resume_from_checkpoint
        if chosen:
            return chosen
        for path in reversed(sort_checkpoints(str(self.folder))):
            if all((Path(path) / name).exists() for name in CHECKPOINT):
                return path
            print(f"{path} is not whole, so it is left out", file=sys.stderr)
        return None

    def reached(self, checkpoint: str | None) -> tuple[int, bool]:
        """The step of a checkpoint, and whether it is the last. ValueError where it is beyond what is wanted now."""
        step, got, wanted = 0, 0, self.until["max_steps"]
        if checkpoint is not None:
            state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
            step = got = state["global_step"]
        if wanted <= 0:
            wanted, got = self.until["num_train_epochs"], state["epoch"] if step else 0
        if got > wanted or self.trained and not wanted > got > 0:
            raise ValueError(
                f"--output_dir {self.folder}: holds a model trained with {self.trained or got}, which cannot go on to "
                f"{self.until}: expected more and a checkpoint, or another folder"
            )
        return step, got == wanted


def train(trainer: Trainer, options: dict) -> Trainer:
    """Train from the last checkpoint in the output folder, if there is one, and save the model there; load it where
    that has been done. Interrupted where a signal has stopped it. Returns the trainer.

    options: what else decides how the model is trained, by name. ValueError if the folder has a run with others.
    """
    run = Run(trainer, options)
    folder = run.folder
    if run.trained == run.until:
        print(f"{folder} holds the trained model", file=sys.stderr)
        load_model(trainer.model, folder / "model.safetensors")
        return trainer
    checkpoint = run.checkpoint()
    step, whole = run.reached(checkpoint)
    stopped = False
    if whole:  # it was stopped between its last step and saving the model
        load_model(trainer.model, Path(checkpoint) / "model.safetensors")
    else:
        run.write()
        if trainer.is_world_process_zero() and run.log.exists():
            kept = [line for line in logged(run.log) if line["step"] <= step]
            replace(run.log, "".join(json.dumps(line) + "\n" for line in kept))
        trainer.add_callback(Log(run.log))
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=checkpoint)
        stopped = stop.stopped
    state = trainer.state
    if not stopped or state.global_step >= state.max_steps:
        trainer.save_model()
        run.write(trained=run.until)
    if stopped:
        raise Interrupted(
            f"stopped at step {state.global_step} of {state.max_steps}, saved in {folder}; the same command goes on "
            "from there"
        )
    return trainer
