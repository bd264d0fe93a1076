"""What a run survives: python benchmarks/drills.py kill|terminate|disk|damage [--runs=runs/drills].

    kill       20 SIGKILLs, half of them while a checkpoint is being written
    terminate  10 SIGTERMs
    disk       files that may not grow, as on a full disk
    damage     60 damaged copies of a run's checkpoints

Each drill makes real runs of train.py on the digits, pretraining included, and compares what they
leave with an uninterrupted run: every leaf of the last checkpoint with its optimizer, the position
in the data, metrics.jsonl, and metrics.json but for the times. Exits with 1 if anything differs.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import equiadapt_jax as ea
from equiadapt_jax.training.digests import DamagedCheckpoint

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "--config.pretrain.steps=150", "--config.adaptation.steps=150",
    "--config.logging.every=5", "--config.logging.evaluate_every=25",
)  # fmt: skip
STOPPED = 75
TIMES = ("train/seconds", "train/images_per_second")


class Run:
    """One run of train.py in a directory of its own, started as often as needed."""

    def __init__(self, base: Path, name: str):
        self.workdir, self._pretrained = base / name, base / f"{name}-pretrained"
        for path in (self.workdir, self._pretrained):
            shutil.rmtree(path, ignore_errors=True)

    def start(self, *, file_size: int | None = None) -> subprocess.Popen:
        """Begin or continue it; no file may become larger than `file_size` bytes."""
        process = subprocess.Popen(
            [sys.executable, "train.py", f"--workdir={self.workdir}", "--resume",
             f"--config.pretrain.directory={self._pretrained}", *SETTINGS],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if file_size is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_size, file_size))
        return process

    def finish(self, **options) -> tuple[int, str]:
        """Exit code and last line of standard error, once it ends by itself."""
        process = self.start(**options)
        _, errors = process.communicate()
        return process.returncode, ["", *errors.strip().splitlines()][-1]

    def writing(self) -> list[str]:
        """The checkpoints that are half written just now."""
        stages = (self.workdir / "pretraining" / "checkpoints", self.workdir / "checkpoints")
        return [f"{p.parent.parent.name}/{p.name}" for s in stages for p in s.glob("*.unfinished*")]

    def reached(self) -> str:
        """How far it has come, for people."""
        for stage, name in (
            (self.workdir, "adapting"),
            (self.workdir / "pretraining", "pretraining"),
        ):
            lines = stage / "metrics.jsonl"
            if lines.exists() and (text := lines.read_text().strip()):
                return f"{name}, step {json.loads(text.splitlines()[-1])['step']}"
        return "before the first step"

    def left(self) -> dict[str, object]:
        """All that has to be the same as in another run."""
        checkpoints = self.workdir / "checkpoints"
        last = _steps(checkpoints)[-1]
        metrics = json.loads((self.workdir / "metrics.json").read_text())
        return {
            "last checkpoint": last.name,
            "leaves": json.loads((last / "checkpoint.json").read_text())["leaves"],
            "data": (last / "data" / "metadata").read_text(),
            "metrics.jsonl": (self.workdir / "metrics.jsonl").read_text(),
            "metrics.json": {n: v for n, v in metrics.items() if n not in TIMES},
        }


def compare(one: Run, other: Run) -> list[str]:
    """What differs between two finished runs."""
    a, b = one.left(), other.left()
    return [name for name in a if a[name] != b[name]]


def uninterrupted(base: Path) -> tuple[Run, float]:
    """The run to compare with, and the seconds it takes."""
    run, began = Run(base, "uninterrupted"), time.monotonic()
    code, last = run.finish()
    if code:
        sys.exit(f"The uninterrupted run failed: {last}")
    return run, time.monotonic() - began


def interrupt(run: Run, chance: random.Random, longest: float, number: int, send) -> str | None:
    """Continue the run, send it a signal at a random moment, and say where; None if it ended."""
    process = run.start()
    in_a_write = number % 2 == 1
    deadline = time.monotonic() + (1e9 if in_a_write else chance.uniform(0.2, longest))
    writes, seen = chance.randint(1, 3), 0
    while process.poll() is None and time.monotonic() < deadline:
        if in_a_write and run.writing():
            seen += 1
            if seen == writes:
                time.sleep(chance.uniform(0, 0.03))
                break
            while run.writing() and process.poll() is None:
                time.sleep(0.001)
        time.sleep(0.001)
    if process.poll() is None:
        send(process)
        process.communicate()
        half = f", leaving {', '.join(run.writing())}" if run.writing() else ""
        return f"{run.reached()}{half}"
    if process.returncode:
        sys.exit(f"The run failed by itself: {process.stderr.read()}")
    return None


def signals(base: Path, chance: random.Random, count: int, name: str, send) -> int:
    """Interrupt runs so many times, let each come to its end, and compare."""
    reference, seconds = uninterrupted(base)
    print(f"An uninterrupted run takes {seconds:.0f} s.")
    sent, failures, number = 0, 0, 0
    while sent < count:
        number += 1
        run = Run(base, f"{name}{number}")
        while sent < count:
            where = interrupt(run, chance, 0.7 * seconds, sent, send)
            if where is None:
                break
            sent += 1
            print(f"{name} {sent:2}: run {number}, {where}", flush=True)
        code, last = run.finish()
        different = compare(reference, run) if code == 0 else [f"exit code {code}: {last}"]
        failures += bool(different)
        print(f"run {number} ended: {'; '.join(different) or 'identical'}", flush=True)
    return failures


def kill(base: Path, chance: random.Random) -> int:
    """SIGKILL, 20 times."""
    return signals(base, chance, 20, "kill", lambda process: process.kill())


def terminate(base: Path, chance: random.Random) -> int:
    """SIGTERM, 10 times; each must end the run with its own exit code."""
    wrong = []

    def send(process):
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != STOPPED:
            wrong.append(process.returncode)

    failures = signals(base, chance, 10, "terminate", send)
    print(f"exit codes other than {STOPPED}: {wrong or 'none'}")
    return failures + len(wrong)


def disk(base: Path, chance: random.Random) -> int:
    """Files that may not grow beyond so many bytes, once half of the adaptation is done."""
    reference, _ = uninterrupted(base)
    failures = 0
    for size in (100, 1_000, 4_000, 20_000, 60_000, 100_000):
        run = Run(base, f"disk{size}")
        process = run.start()
        while not (run.workdir / "checkpoints" / "50").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        code, sentence = run.finish(file_size=size)
        print(f"at most {size:6} bytes: exit code {code}, {sentence}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ea.load(run.workdir)
        resumed, last = run.finish()
        different = compare(reference, run) if resumed == 0 else [last]
        print(f"  continued with room: {'; '.join(different) or 'identical'}", flush=True)
        failures += code != 1 or not sentence.startswith("Error: ") or bool(different)
    return failures


def damage(base: Path, chance: random.Random) -> int:
    """60 damaged copies, each loaded, evaluated from and continued."""
    reference, _ = uninterrupted(base)
    kinds = {"bit flip": 30, "truncated": 10, "missing": 10, "swapped": 10}
    silent = 0
    for kind in (kind for kind, count in kinds.items() for _ in range(count)):
        copy = Run(base, "damaged").workdir
        shutil.copytree(reference.workdir, copy)
        steps, what = _damage(copy / "checkpoints", kind, chance)
        told = [_loads(copy, step) for step in steps] + [_loads(copy, None)]
        missed = [str(step) for step, answer in zip(steps, told, strict=False) if answer is None]
        silent += bool(missed)
        print(f"{kind:9} {what}: {'MISSED' if missed else 'found'}; loading the run: "
              f"{told[-1] or 'the best step is another'}", flush=True)  # fmt: skip
    print(f"{60 - silent} of 60 found")
    return silent + _continues(base, reference, chance)


def _damage(checkpoints, kind, chance):
    """Damage something; the steps concerned, and what it was."""
    steps = _steps(checkpoints)
    if kind == "swapped":
        one, other = chance.sample(steps, 2)
        if chance.random() < 0.5:  # a file of one step in another
            name = chance.choice(_files(one)).relative_to(one)
            matching = [
                p for p in _files(other) if p.relative_to(other).parts[:2] == name.parts[:2]
            ]
            source = chance.choice(matching)
            if source.read_bytes() != (one / name).read_bytes():
                shutil.copyfile(source, one / name)
                return [int(one.name)], f"{one.name}/{name} from step {other.name}"
        aside = checkpoints / "aside"
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        return [int(one.name), int(other.name)], f"steps {one.name} and {other.name}"
    step = chance.choice(steps)
    path = chance.choice(_files(step))
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    return [int(step.name)], str(path.relative_to(checkpoints))


def _steps(checkpoints):
    return sorted(
        (p for p in checkpoints.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)
    )


def _files(step):
    return sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)


def _loads(workdir, step):
    """What is said when a step is loaded; None where nothing is."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            ea.load(workdir, step=step)
        except (DamagedCheckpoint, FileNotFoundError) as error:
            return f"refused ({type(error).__name__})"
    return "with a warning" if said else None


def _continues(base, reference, chance):
    """Damage the last step in six ways and resume: the run must end as if nothing had happened."""
    failures = 0
    for kind in ("bit flip", "bit flip", "truncated", "truncated", "missing", "missing"):
        run = Run(base, "continued")
        shutil.copytree(reference.workdir, run.workdir)
        last = int(_steps(run.workdir / "checkpoints")[-1].name)
        only = run.workdir / "only"
        only.mkdir()
        (run.workdir / "checkpoints" / str(last)).rename(only / str(last))
        _, what = _damage(only, kind, chance)
        (only / str(last)).rename(run.workdir / "checkpoints" / str(last))
        only.rmdir()
        process = run.start()
        _, errors = process.communicate()
        told = [line for line in errors.splitlines() if line.startswith("Warning: ")]
        different = compare(reference, run) if process.returncode == 0 else [errors]
        print(f"resumed with {kind} in {what}: {'; '.join(different) or 'identical'}; {told}")
        failures += bool(different) or not told
    return failures


def main() -> None:
    """Run the drill that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    drills = {f.__name__: f for f in (kill, terminate, disk, damage)}
    parser.add_argument("drill", choices=drills)
    parser.add_argument("--runs", type=Path, default=Path("runs/drills"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base = arguments.runs.absolute() / arguments.drill
    base.mkdir(parents=True, exist_ok=True)
    failures = drills[arguments.drill](base, random.Random(arguments.seed))
    print(f"{arguments.drill}: {'all well' if not failures else f'{failures} FAILED'}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
