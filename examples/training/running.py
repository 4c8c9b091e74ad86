"""Running transformers' Trainer so that nothing is lost: a log in JSONL, checkpoints from which the same command goes
on, and a stop on Ctrl-C that saves first."""

import atexit
import json
import math
import os
import signal
import sys
import threading
import time
import zlib
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial, wraps
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from .files import DataError, lock, logged, replace, stored

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of TrainingArguments, what decides how a model is trained: a run goes on with these alone.
DECISIVE = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "lr_scheduler_kwargs", "optim_args"),
    *("neftune_noise_alpha", "dataloader_drop_last", "load_best_model_at_end", "metric_for_best_model", "world_size"),
    *("greater_is_better", "optim_target_modules", "ignore_data_skip"),
)
# These decide only which model is the best.
CHOOSING = ("eval_strategy", "eval_steps", "eval_delay")
# Without these a checkpoint is of no use; the Trainer writes the last of them last.
CHECKPOINT = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class Interrupted(Exception):
    """A run that was asked to stop, and has saved where it was."""


@contextmanager
def hearing(handle: Callable) -> Iterator[dict]:
    """Have SIGINT and SIGTERM handled, those of one second as one: timeout sends its signal to a process and to its
    group, and other processes pass theirs on. What is ignored stays ignored. Yields the handlers there were, to which
    it goes back."""
    last = -math.inf

    def handler(number, frame) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 1.0:
            last = now
            handle(number, frame)

    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield before
    finally:
        for number, one in before.items():
            signal.signal(number, one)


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def defaults(**changes) -> dict:
    """Of TrainingArguments, what all scripts set otherwise. Without an accelerator the processes of torchrun find each
    other only with use_cpu."""
    accelerated = torch.accelerator.is_available()
    return {"do_train": True, "report_to": "none", "save_total_limit": 1, "logging_steps": 50,
            "logging_nan_inf_filter": False, "use_cpu": not accelerated, "dataloader_pin_memory": accelerated,
            **changes}  # fmt: skip


def parsed(kinds: tuple[type, ...], changes: dict, description: str, arguments: list[str] | None = None) -> tuple:
    """Command-line arguments as objects of these kinds, the last of them TrainingArguments with other defaults. Where a
    number of epochs is given, it is not the default number of steps that counts. ValueError for an option that is given
    twice, because only the last of them would count."""
    words = [text.split("=")[0] for text in (sys.argv[1:] if arguments is None else arguments)]
    given = [text.replace("-", "_") for text in words if text.startswith("--")]
    for name in given:
        if given.count(name) > 1:
            raise ValueError(
                f"--{name[2:]}: expected it once, with all that it takes, got it {given.count(name)} times"
            )
    if "__num_train_epochs" in given:
        changes = {name: value for name, value in changes.items() if name != "max_steps"}
    parser = HfArgumentParser(kinds, description=description, formatter_class=Help, allow_abbrev=False)
    parser.set_defaults(**changes)
    return parser.parse_args_into_dataclasses(arguments)


def main(run: Callable[[], object]) -> None:
    """Run a script's main function; what a person can mend is one line, not a traceback."""
    status: int | str = 0
    try:
        run()
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        status = INTERRUPTED
    except (DataError, ValueError, OSError, ImportError, SafetensorError) as error:
        status = f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}"
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved, if anything is", file=sys.stderr)
        status = INTERRUPTED
    if torch.distributed.is_initialized():
        leave(status)
    sys.exit(status)


def leave(status: int | str) -> NoReturn:
    """``sys.exit`` of a process of a group. A thread of the group may still hold a tensor of its last reduction:
    letting it go while Python ends would abort the process, so nothing but what is asked for at exit ends here."""
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave_signals(initialise: Callable[[int], None] | None, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialise is not None:
        initialise(worker)


def _deaf(loader):
    if loader.num_workers:
        inner = getattr(loader, "base_dataloader", loader)  # accelerate puts its own around it
        inner.worker_init_fn = partial(_leave_signals, inner.worker_init_fn)
    return loader


class Trainer(transformers.Trainer):
    """That of transformers; its processes that load data leave signals to it, which may reach all of a group."""

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler()  # of the whole data set: that given has lost the column of lengths

    def get_train_dataloader(self):
        return _deaf(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return _deaf(super().get_eval_dataloader(eval_dataset))

    def predict_in_order(self, rows, prefix: str):
        """``predict`` of all rows, in their order: as in training, they would be shuffled by length, or left out."""
        self.args.train_sampling_strategy = "random"
        self.args.dataloader_drop_last = self.args.prediction_loss_only = False
        self.label_smoother = None  # that is of training
        return self.predict(rows, metric_key_prefix=prefix)


class Log(TrainerCallback):
    """Appends what the Trainer logs to a file, an object of JSON per line, in the process that counts as the first.
    ValueError once the loss is not a number, which is looked at before anything is saved."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)  # between logs, saves and tests, which a checkpoint has of its own

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            values = {key: value if math.isfinite(value) else None for key, value in (logs or {}).items()}
            with self.path.open("a") as file:
                print(json.dumps({"step": state.global_step, **values}), file=file)
        loss = (logs or {}).get("loss", (logs or {}).get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {state.global_step}: expected a finite one; try a lower --learning_rate, "
                "or larger batches if there may be some with nothing to predict"
            )


class StopOnSignal(TrainerCallback):
    """Ends training behind the step at hand, and saves, once ``ask`` has been called in any process; behind an epoch's
    last step, or one behind which tests are due, once these are done, as a run that is left alone does.
    Called again, it does what the handlers in ``before`` do."""

    def __init__(self) -> None:
        self.wanted, self.stopped, self.before = False, False, {}

    def ask(self, number, frame) -> None:
        if not self.wanted:
            self.wanted = True
            print("\nstopping behind this step, saving first; once more stops at once", file=sys.stderr)
        elif callable(self.before[number]):
            self.before[number](number, frame)
        else:
            signal.signal(number, self.before[number])
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.anywhere(args.device):
            self.stopped = control.should_training_stop = True
            control.should_save |= state.global_step < state.max_steps and not state.epoch.is_integer()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if not self.stopped or state.global_step >= state.max_steps:
            return
        if state.epoch.is_integer():
            control.should_save = True
        else:  # it has been saved, and the epoch has not ended
            control.should_save = control.should_evaluate = control.should_log = False

    def anywhere(self, device: torch.device) -> bool:
        if not torch.distributed.is_initialized():
            return self.wanted
        wanted = torch.tensor(int(self.wanted), device=device)
        torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        return bool(wanted)


def refuse(training: TrainingArguments, wrong: dict[str, tuple[object, str]]) -> None:
    """ValueError for the first option that is wrong. Of each by name: whether it is, and what is expected."""
    for name, (found, wanted) in wrong.items():
        if found:
            raise ValueError(f"--{name}: expected {wanted}, got {getattr(training, name)}")


class Run:
    """What a folder has of a run: ``run.json`` with the options that decide how the model is trained and, once it is,
    how long; checkpoints; the model."""

    def __init__(self, trainer: Trainer, options: dict) -> None:
        training = trainer.args
        resuming = ("resume_from_checkpoint", "save_only_model", "fsdp", "deepspeed")
        fp16_on_cpu = training.fp16 and training.device.type == "cpu"
        columns, whole = training.remove_unused_columns, training.eval_do_concat_batches
        refuse(training, {
            "gradient_accumulation_steps": (training.gradient_accumulation_steps < 1, "1 or more"),
            "eval_accumulation_steps": (training.eval_accumulation_steps == 0, "1 or more"),
            "label_smoothing_factor": (not 0 <= training.label_smoothing_factor < 1, "0 or more, and less than 1"),
            "per_device_eval_batch_size": (training.per_device_eval_batch_size < 1, "1 or more"),
            **{name: (getattr(training, name), "it unset, because a run goes on from its folder") for name in resuming},
            "remove_unused_columns": (not columns, "true, because data have columns for the sampler alone"),
            "do_train": (not training.do_train, "true, because the scripts train"),
            "do_predict": (training.do_predict, "false, because tables to measure on are named"),
            "label_names": (training.label_names, "it unset, because the scripts name them"),
            "eval_do_concat_batches": (not whole, "true, because what is measured needs all rows"),
            "fp16": (fp16_on_cpu, "a GPU, because it has no effect on a CPU; --bf16 has"),
        })  # fmt: skip
        self.trainer, self.folder = trainer, Path(training.output_dir)
        self.path, self.log = self.folder / "run.json", self.folder / "log.jsonl"
        decisive = {name: getattr(training, name) for name in DECISIVE}
        decisive |= {name: getattr(training, name) if training.load_best_model_at_end else None for name in CHOOSING}
        tokens = json.dumps(sorted(trainer.processing_class.get_vocab().items())).encode()
        decisive["checksum of the tokens"] = zlib.crc32(tokens)
        self.options = json.loads(json.dumps(options | decisive))
        batches = trainer.get_train_dataloader()
        if not len(batches):
            least = training.train_batch_size * training.world_size
            raise ValueError(
                f"--dataloader_drop_last: expected {least} rows or more, which fill a batch, got "
                f"{len(trainer.train_dataset)}"
            )
        self.steps = trainer.set_initial_training_values(training, batches)[-1]
        if self.steps < 1:
            raise ValueError("--max_steps and --num_train_epochs: expected a step or more, got none")
        others = [name for name in ("config.json", self.log.name) if (self.folder / name).exists()]
        if others and not self.path.exists():
            raise ValueError(
                f"--output_dir {self.folder}: expected another folder, because this one has {others[0]} of something "
                f"else than such a run, got no {self.path.name}"
            )
        before = stored(self.path) if self.path.exists() else {"options": self.options}
        differing = before.get("options", {}).keys() ^ self.options.keys()
        if differing:
            raise ValueError(
                f"--output_dir {self.folder}: expected another folder, because this one holds a run of another script "
                f"or version, got options that one alone has: {', '.join(sorted(differing))}"
            )
        self.trained = before.get("trained")
        for name, value in self.options.items():
            held = before["options"][name]
            same = value == held or value != value and held != held  # not a number is not equal to itself
            if not same and not (self.trained and name == "world_size"):
                raise ValueError(
                    f"--output_dir {self.folder}: holds a run with --{name} {held}: expected that, or another folder, "
                    f"got {value}"
                )

    def write(self, **more) -> None:
        if self.trainer.is_world_process_zero():
            replace(self.path, json.dumps({"options": self.options, **more}, indent=1) + "\n")

    def checkpoint(self) -> str | None:
        """The last one that is whole."""
        for path in reversed(sort_checkpoints(str(self.folder))):
            with suppress(OSError, DataError):
                if all((Path(path) / name).exists() for name in CHECKPOINT) and stored(Path(path) / CHECKPOINT[-1]):
                    return self._loadable(path)
            print(f"{path} is not whole, so it is left out", file=sys.stderr)
        return None

    def _loadable(self, checkpoint: str) -> str:
        """ValueError where the Trainer would fail to read the state of the optimizer for one of several CPUs."""
        arguments, needed = self.trainer.args, "5.24"
        several = arguments.world_size > 1 and arguments.device.type == "cpu"
        if several and Version(transformers.__version__) < Version(needed):
            raise ValueError(
                f"{checkpoint}: expected transformers {needed} or later to go on in several processes on CPUs, got "
                f"{transformers.__version__}"
            )
        return checkpoint

    def reached(self, state: dict) -> int:
        """The step of a checkpoint's state. ValueError if one cannot go on from there to the steps that are wanted."""
        step = state.get("global_step", 0)
        if step > self.steps or self.trained and not self.steps > step > 0:
            raise ValueError(
                f"--output_dir {self.folder}: holds a model trained for {self.trained or step} steps, which cannot go "
                f"on to {self.steps}: expected more and a checkpoint, or another folder"
            )
        return step


def alone(run: Callable) -> Callable:
    """A function of arguments and TrainingArguments that has the output folder for itself while it runs."""

    @wraps(run)
    def call(arguments, training):
        folder = Path(training.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder) if training.process_index == 0 else nullcontext():
            return run(arguments, training)

    return call


def train(trainer: Trainer, options: dict) -> Trainer:
    """Train from the last checkpoint in the output folder, if there is one, and save the model there; load it where
    that has been done. Interrupted where a signal has stopped it. Returns the trainer.

    options: what else decides how the model is trained, by name. ValueError if the folder has a run with others.
    """
    run = Run(trainer, options)
    folder = run.folder
    if run.trained == run.steps:
        print(f"{folder} holds the trained model", file=sys.stderr)
        load_model(trainer.model, folder / "model.safetensors")
        return trainer
    checkpoint = run.checkpoint()
    state = stored(Path(checkpoint) / CHECKPOINT[-1]) if checkpoint else {}
    step, stopped = run.reached(state), False
    if step == run.steps:  # it was stopped between its last step and saving the model
        best = state["best_model_checkpoint"] if trainer.args.load_best_model_at_end else None
        load_model(trainer.model, folder / Path(best or checkpoint).name / "model.safetensors")
    else:
        run.write()
        if trainer.is_world_process_zero() and run.log.exists():
            kept = [line for line in logged(run.log) if line["step"] <= step]
            replace(run.log, "".join(json.dumps(line) + "\n" for line in kept))
        if trainer.args.metric_for_best_model and trainer.args.save_total_limit == 1:
            trainer.args.save_total_limit = 2  # with the best one alone there would be none to go on from
        if trainer.is_world_process_zero() and trainer.args.get_warmup_steps(run.steps) >= run.steps:
            print(f"--warmup_steps: the learning rate still warms up in the last of {run.steps} steps", file=sys.stderr)
        stop = StopOnSignal()
        with hearing(stop.ask) as stop.before:
            trainer.add_callback(stop)
            trainer.add_callback(Log(run.log))
            trainer.train(resume_from_checkpoint=checkpoint)
            stopped = stop.stopped or stop.anywhere(trainer.args.device)
            step = trainer.state.global_step
    if not stopped or step >= run.steps:
        trainer.save_model()
        run.write(trained=run.steps)
    if stopped:
        raise Interrupted(
            f"stopped at step {step} of {run.steps}, saved in {folder}; the same command goes on from there"
        )
    return trainer
