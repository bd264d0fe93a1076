"""Adapt a pretrained network to a group: train.py [--config=configs/….py] [--workdir=…] [--resume].

Any setting can be changed on the way: --config.group=cyclic8 --config.adaptation.mode=frozen.
"""

from pathlib import Path

from absl import flags

from equiadapt_jax import command_line, runs
from equiadapt_jax.training import config as settings
from equiadapt_jax.training import run

_CONFIG = command_line.config_flag(Path(__file__).parent / "configs" / "digits_vit.py")
_WORKDIR = flags.DEFINE_string("workdir", "", "where the run goes: runs/<name>-<group>-seed<seed>")
_RESUME = flags.DEFINE_bool("resume", False, "continue the run that is in the workdir")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the run that is in the workdir")


def main() -> None:
    """Train, evaluate the best checkpoint, say where to look."""
    config = settings.from_dict(_CONFIG.value.to_dict())
    workdir = _WORKDIR.value or f"runs/{config.name}-{config.group}-seed{config.seed}"
    trained = run.train(config, workdir, resume=_RESUME.value, overwrite=_OVERWRITE.value)
    metrics, table = runs.evaluate(workdir)
    runs.write_metrics(f"{workdir}/metrics.json", {**metrics, **trained})
    print(f"\n{table}\n\nLeft in {workdir}: metrics.json, metrics.jsonl, checkpoints.")
    print(f"Next: python eval.py --workdir={workdir}")


if __name__ == "__main__":
    command_line.run(main)
