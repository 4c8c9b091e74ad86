"""Running transformers' Trainer so that nothing is lost: a log in JSONL, checkpoints from which the same command goes
on, and a stop on Ctrl-C that saves first."""

import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .files import DataError

INTERRUPTED = 130


class Interrupted(Exception):
    """A run that was asked to stop, and has saved where it was."""


def defaults(**changes) -> dict:
    """Of TrainingArguments, what all scripts set otherwise."""
    return {"report_to": "none", "save_total_limit": 1, "logging_steps": 50, **changes}


def parsed(kinds: tuple[type, ...], changes: dict, description: str, arguments: list[str] | None = None) -> tuple:
    """Command-line arguments as objects of these kinds, the last of them TrainingArguments with other defaults."""
    parser = HfArgumentParser(kinds, description=description)
    parser.set_defaults(**changes)
    return parser.parse_args_into_dataclasses(arguments)


def main(run: Callable[[], object]) -> None:
    """Run a script's main function; what a person can mend is one line, not a traceback."""
    try:
        run()
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (DataError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        sys.exit(INTERRUPTED)


class Log(TrainerCallback):
    """Appends what the Trainer logs to a file, an object of JSON per line, in the process that counts as the first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                print(json.dumps({"step": state.global_step, **(logs or {})}), file=file)


class StopOnSignal(TrainerCallback):
    """Ends training behind the step at hand, and saves, once SIGINT or SIGTERM has come to any process. A second signal
    does what it usually does; what is ignored stays ignored."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.wanted, self.stopped, self.before = False, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
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
        if self._anywhere(args.device) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def _anywhere(self, device: torch.device) -> bool:
        if not torch.distributed.is_initialized():
            return self.wanted
        wanted = torch.tensor(int(self.wanted), device=device)
        torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        return bool(wanted)


def train(trainer: Trainer) -> Trainer:
    """Train from the last checkpoint in the output folder, if there is one, and save the model there. Interrupted where
    a signal has stopped it. Returns the trainer."""
    arguments = trainer.args
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.resume_from_checkpoint or get_last_checkpoint(str(folder))
    trainer.add_callback(Log(folder / "log.jsonl"))
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in {folder}; the same "
            "command goes on from there"
        )
    trainer.save_model()
    return trainer
