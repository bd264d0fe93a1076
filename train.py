"""Adapt a pretrained network to a group: train.py [--config=configs/….py] [--workdir=…] [--resume].

Any setting can be changed on the way: --config.group=cyclic8 --config.adaptation.mode=frozen.
--explain prints them all with their meaning; --config.adaptation=help those of one section.
"""

import os
import signal

# While imports take their seconds; an exception could be lost in them. See main for later.
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: os._exit(75))

import shlex
from pathlib import Path

from absl import flags

from equiadapt_jax import command_line, runs
from equiadapt_jax.training import config as settings
from equiadapt_jax.training import run
from equiadapt_jax.training.explain import explain
from equiadapt_jax.training.loop import Stop

_ASKED = command_line.take_help()
command_line.config_flag(Path(__file__).parent / "configs" / "digits_vit.py")
_WORKDIR = flags.DEFINE_string("workdir", "", "where the run goes: runs/<name>-<group>-seed<seed>")
_RESUME = flags.DEFINE_bool("resume", False, "continue the run that is in the workdir")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the run that is in the workdir")
_EXPLAIN = flags.DEFINE_bool("explain", False, "print all settings with their meaning, and stop")


def main() -> None:
    """Train, evaluate the best checkpoint, say where to look."""
    config = settings.from_dict(command_line.settings_of(flags.FLAGS["config"]))
    asked = [*_ASKED, *["config"] * _EXPLAIN.value]
    if asked:
        print(*(explain(config, path) for path in asked), sep="\n\n")
        return
    stop = Stop()
    command_line.heed_signals(stop.request)
    workdir = os.path.expanduser(
        _WORKDIR.value or f"runs/{config.name}-{config.group}-seed{config.seed}"
    )
    trained = run.train(
        config, workdir, resume=_RESUME.value, overwrite=_OVERWRITE.value, stop=stop
    )
    metrics, table = runs.evaluate(workdir)
    runs.write_metrics(f"{workdir}/metrics.json", {**metrics, **trained})
    left = sorted(path.name for path in Path(workdir).iterdir() if path.name[0] != ".")
    print(f"\n{table}\n\nLeft in {workdir}: {', '.join(left)}.")
    print(f"Next: {shlex.join(['python', 'eval.py', f'--workdir={workdir}'])}")


if __name__ == "__main__":
    command_line.run(main)
