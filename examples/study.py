"""The papers' claims about models, on real data: pre-trains and fine-tunes all models of the study, cell by cell.

    python examples/study.py --scale cpu --data DATA --output study --workers 2
    python examples/study.py --report study/log.jsonl --page study/findings.md

What has been run is in OUTPUT/log.jsonl, a line per cell. The same command goes on where it was stopped, also within a
cell. --report makes a page of such logs, as docs/findings.md is one. docs/training.md lists what DATA has to hold.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import closing, suppress
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread

from training.cells import CORPUS, FILES, METRICS, SCALES, Cell, Scale, cells
from training.files import DataError, lock, logged, replace, rows
from training.running import Interrupted, hearing, main


def found(data: Path, name: str) -> str:
    """The file of this name, as it is or compressed."""
    for suffix in ("", ".xz", ".gz"):
        if (data / f"{name}{suffix}").exists():
            return str(data / f"{name}{suffix}")
    raise DataError(
        f"--data {data}: expected a file {name}, or that with .xz or .gz behind; docs/training.md tells of it"
    )


def run_cell(cell: Cell, scale: Scale, data: Path, output: Path) -> dict:
    """Run one cell in its folder, and return its line of the log."""
    folder = output / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    clock, start = folder / "seconds", time.time()
    spent = float(clock.read_text()) if clock.exists() else 0.0
    try:
        run = tokenizer if cell.model is None else pretraining if cell.task is None else finetuning
        result = run(cell, scale, data, output)
    finally:
        replace(clock, f"{spent + time.time() - start:.1f}")
    return {"cell": cell.name, **asdict(cell), "seconds": float(clock.read_text()), **result}


def tokenizer(cell: Cell, scale: Scale, data: Path, output: Path) -> dict:
    """Trained on the texts, and on those of the training sets of the tasks."""
    import finetune
    import train_tokenizer

    folder = output / cell.name
    with (folder / "tasks.txt").open("w") as file:
        for task, files in FILES.items():
            columns = [finetune.TASKS[task].get(name) for name in ("text", "pair", "source", "target")]
            columns = tuple(filter(None, columns))
            for row in rows(Path(found(data, files["train"])), columns):
                print(*row.values(), sep="\n", file=file)
    made = train_tokenizer.train(
        train_tokenizer.Arguments(
            texts=[str(folder / "tasks.txt"), *(found(data, name) for name in CORPUS)],
            output_dir=str(folder), kind=cell.family, vocab_size=scale.vocabulary,
        )
    )  # fmt: skip
    made.save_pretrained(folder)
    return {"tokens": len(made)}


def pretraining(cell: Cell, scale: Scale, data: Path, output: Path) -> dict:
    import pretrain_bert
    import pretrain_seq2seq
    from transformers import TrainingArguments

    folder = output / cell.name
    options = dict(output_dir=str(folder), seed=cell.seed, save_steps=500, disable_tqdm=True, **scale.common)
    options |= scale.pretrain[cell.family]
    module, kind = (pretrain_seq2seq, "mixer") if cell.family == "seq2seq" else (pretrain_bert, "variant")
    arguments = module.Arguments(
        texts=[found(data, name) for name in CORPUS], tokenizer=str(output / Cell(cell.family).name),
        length=scale.length, size=scale.size, config=json.dumps(getattr(scale, cell.family)), **{kind: cell.model},
    )  # fmt: skip
    trainer = module.pretrain(arguments, TrainingArguments(**(module.DEFAULTS | options)))
    return {"loss": last_loss(folder / "log.jsonl"), "parameters": trainer.model.num_parameters()}


def finetuning(cell: Cell, scale: Scale, data: Path, output: Path) -> dict:
    import finetune
    from transformers import TrainingArguments

    folder = output / cell.name
    files = {role: found(data, name) for role, name in FILES[cell.task].items()}
    changes = scale.changes.get(cell.task, {})
    if cell.start == "pretrained":
        model = dict(model=str(output / Cell(cell.family, cell.model).name), config=json.dumps(changes))
    else:
        model = dict(mixer=cell.model, size=scale.size, config=json.dumps(scale.seq2seq | changes))
    arguments = finetune.Arguments(
        task=cell.task, train=files.pop("train"), test=[f"{role}={file}" for role, file in files.items()],
        tokenizer=str(output / Cell(cell.family).name), **model,
    )  # fmt: skip
    options = dict(output_dir=str(folder), seed=cell.seed, save_strategy="no", disable_tqdm=True, **scale.common)
    options |= scale.tasks[cell.family][cell.task]
    results = finetune.finetune(arguments, TrainingArguments(**(finetune.DEFAULTS | options)))
    return {"loss": last_loss(folder / "log.jsonl"), "results": results}


def last_loss(log: Path) -> float:
    """The mean over the last twentieth of what is logged of training."""
    losses = [line["loss"] for line in logged(log) if "loss" in line]
    last = losses[-max(len(losses) // 20, 1) :]
    return sum(last) / len(last)


class Study:
    """A log of cells, and the folder in which they run."""

    def __init__(self, scale: str, data: Path, output: Path, workers: int) -> None:
        self.scale, self.data, self.output, self.workers = scale, data, output, workers
        for name in (*CORPUS, *(file for files in FILES.values() for file in files.values())):
            found(data, name)
        output.mkdir(parents=True, exist_ok=True)
        self.lock = lock(output)  # held until this study is gone
        self.log = output / "log.jsonl"
        self.settings = json.loads(json.dumps(asdict(SCALES[scale])))
        lines = logged(self.log) if self.log.exists() else []
        if lines and "run" not in lines[0]:
            raise ValueError(
                f"--output {output}: expected another folder, because {self.log} is not the log of a study"
            )
        replace(self.log, "".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            if "run" in line and line.get("settings") != self.settings:
                raise ValueError(f"--output {output}: holds a study with other settings; expected another folder")
        self.done = {line["cell"] for line in lines if "cell" in line and self._usable(line)}

    def _usable(self, line: dict) -> bool:
        """Whether a cell's line is all that others need of it, or its folder is there too."""
        return line["task"] is not None or (self.output / line["cell"] / "tokenizer.json").exists()

    def write(self, line: dict) -> None:
        with self.log.open("a") as file:
            print(json.dumps(line), file=file)

    def head(self, threads: int) -> dict:
        """What the log says of a call of this program."""
        import torch

        from convkernels.cli import environment

        device = torch.device("cpu" if SCALES[self.scale].common.get("use_cpu") else "cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--scale {self.scale}: expected a GPU, which this PyTorch does not see")
        return {"run": time.strftime("%Y-%m-%d"), "scale": self.scale, "settings": self.settings,
                "workers": self.workers, "threads": threads, "environment": environment.describe(device)}  # fmt: skip

    def run(self, wanted: list[Cell]) -> None:
        """Run the cells that the log does not have, some at a time, each behind those that it needs."""
        threads = max(len(os.sched_getaffinity(0)) // self.workers, 1)
        waiting = [cell for cell in wanted if cell.name not in self.done]
        if waiting:
            self.write(self.head(threads))
        failed, asked, told = [], 0, 0

        def ask(number, frame) -> None:
            nonlocal asked
            asked += 1

        with hearing(ask), closing(Workers()) as workers:
            while True:
                if not asked:
                    self._begin(waiting, workers, threads)
                busy = {worker.answers: worker for worker in workers if worker.cell is not None}
                if not busy:
                    break
                if asked > told:
                    told = asked
                    for worker in busy.values():  # they hear this process alone
                        worker.stop()
                for worker in map(busy.get, wait(busy, timeout=0.5)):
                    cell, result, error = worker.end()
                    if result is not None:
                        self.done.add(cell.name)
                        self.write(result)
                        self._tidy(cell)
                        count = sum(cell.name in self.done for cell in wanted)
                        print(f"{count} of {len(wanted)}: {summary(result)}", flush=True)
                    elif error is not None:
                        failed.append(cell.name)
                        print(f"{cell.name} failed: {error}", file=sys.stderr, flush=True)
                        workers.remove(worker)
                        worker.close()  # after some errors of a GPU its process is of no more use
                    else:
                        asked = asked or 1  # it has been asked by somebody else
        if asked:
            raise Interrupted(f"stopped with {len(self.done)} cells run; the same command goes on from there")
        if failed:
            sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")

    def _tidy(self, cell: Cell) -> None:
        """Remove what nothing reads once a cell is in the log."""
        folder = self.output / cell.name
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        if cell.task is not None:
            for name in ("run.json", "model.safetensors"):
                (folder / name).unlink(missing_ok=True)

    def _begin(self, waiting: list[Cell], workers: "Workers", threads: int) -> None:
        """Give cells that need nothing more to workers that have none, while there are both."""
        workers[:] = [worker for worker in workers if worker.cell is not None or worker.process.is_alive()]
        for cell in [cell for cell in waiting if all(need.name in self.done for need in cell.needs)]:
            idle = next((worker for worker in workers if worker.cell is None), None)
            if idle is None and len(workers) < self.workers:
                idle = Worker(threads)
                workers.append(idle)
            if idle is not None:
                waiting.remove(cell)
                idle.begin(cell, SCALES[self.scale], self.data, self.output)
                print(f"{cell.name}: begun", flush=True)


class Worker:
    """A process that runs cells, one behind the other."""

    def __init__(self, threads: int) -> None:
        context = get_context("spawn")
        self.answers, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, threads))
        self.process.start()
        theirs.close()
        self.cell, self.asked = None, False

    def begin(self, cell: Cell, *arguments) -> None:
        self.cell = cell
        with suppress(OSError):  # where its process has ended, ``end`` says so
            self.answers.send((cell, *arguments))

    def stop(self) -> None:
        """Ask it to save where it is; asked once more, it does not."""
        self.asked = True
        self.process.terminate()

    def close(self) -> None:
        """End it; a cell that it has saves first."""
        if self.cell is not None:
            self.stop()
        self.answers.close()

    def end(self) -> tuple[Cell, dict | None, str | None]:
        """The cell that was run, and its line of the log or what went wrong; neither if it was asked to stop."""
        cell, self.cell = self.cell, None
        try:
            return cell, *self.answers.recv()
        except (EOFError, OSError):
            self.process.join()
            died = f"its process ended with {self.process.exitcode} (a signal if below 0)"
            return cell, None, None if self.asked else died


class Workers(list):
    """Those that have been started."""

    def close(self) -> None:
        for worker in self:
            worker.close()


def _follow() -> None:
    """Stop this process as a signal would once the one that has started it is gone."""
    parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(jobs: Connection, threads: int) -> None:
    os.setpgrp()  # signals to the group of the process that has started it are passed on by that
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Thread(target=_follow, daemon=True).start()
    import datasets
    import torch
    import transformers

    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with suppress(EOFError, OSError, KeyboardInterrupt):  # nothing more is to be done, or nobody waits for it
        while True:
            job = jobs.recv()
            try:
                answer = run_cell(*job), None
            except (Interrupted, KeyboardInterrupt):
                answer = None, None
            except DataError as error:
                answer = None, str(error)
            except BaseException as error:
                answer = None, f"{error!r}\n{traceback.format_exc()}"
            jobs.send(answer)


def summary(line: dict) -> str:
    """A cell's result in a few words."""
    parts = [f"{role} {value:.3f}" for role, values in line.get("results", {}).items()
             for name, value in values.items() if name in METRICS]  # fmt: skip
    parts += [f"{name} {line[name]:.3f}" for name in ("loss",) if name in line]
    return f"{line['cell']}: {', '.join(parts) or 'done'}, {line['seconds']:.0f} s"


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="sizes of models and training (default: cpu)")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("study"), help="folder for cells and log (default: study)")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, which share the cores (default: 1)")
    parser.add_argument("--only", default="", help="run only cells whose names begin so, and what they need")
    parser.add_argument("--report", type=Path, nargs="+", metavar="LOG", help="only make a page of these logs")
    parser.add_argument("--page", type=Path, help="file for that page (default: findings.md beside the first log)")
    arguments = parser.parse_args()
    if arguments.page and not arguments.report:
        parser.error("--page: expected it with --report")
    if arguments.report and (arguments.data or arguments.only):
        parser.error("--report: expected it without --data and --only, because it runs nothing")
    if arguments.report:
        from training.findings import page

        path = arguments.page or arguments.report[0].with_name("findings.md")
        if path in arguments.report:
            parser.error(f"--page: expected another file than the log, got {path}")
        path.write_text(page(arguments.report))
        print(f"wrote {path}")
        return
    order = cells(SCALES[arguments.scale].seeds)
    chosen = [cell for cell in order if cell.name.startswith(arguments.only)]
    if arguments.data is None:
        parser.error("--data: expected the folder of the data sets")
    if not chosen:
        parser.error(f"--only {arguments.only}: expected the beginning of a name such as {order[-1].name}")
    if arguments.workers < 1:
        parser.error(f"--workers: expected 1 or more, got {arguments.workers}")
    names = {one.name for cell in chosen for one in (*cell.needs, cell)}
    study = Study(arguments.scale, arguments.data, arguments.output, arguments.workers)
    study.run([cell for cell in order if cell.name in names])


if __name__ == "__main__":
    main(run)
