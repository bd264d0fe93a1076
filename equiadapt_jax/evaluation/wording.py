"""Findings in plain words: numbers as people read them, and the verdict."""

from collections.abc import Mapping

import numpy as np

from equiadapt_jax.evaluation.assess import Findings
from equiadapt_jax.evaluation.orbits import GroupTurns, displayed_turn
from equiadapt_jax.evaluation.upright import Evidence
from equiadapt_jax.groups import Group, MatrixGroup

LOST, CHANGED = 0.05, 0.10  # of accuracy and of predictions: beyond it adaptation is worth it
LITTLE_LOST, LITTLE_CHANGED = 0.01, 0.02  # below it is not
MOSTLY = 0.75  # of the stored poses told: beyond it data count as upright
GUESSING = 0.05  # above chance; nobody would deploy less


def percent(share: float | None) -> str:
    """A share of one as "96.9 %"; "0 %" and "100 %" are exact, more than one is possible."""
    if share is None or not np.isfinite(share):
        return "–"
    if share in (0, 1):
        return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
    almost = 0.9995 < share < 1
    text = "99.9" if almost else f"{100 * max(share, 0.0005):.1f}"
    sign = "<" if share < 0.0005 else ">" if almost else ""
    return f"{sign}{text}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign: "+57.8"."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def degrees(angle: float) -> str:
    """An angle in degrees as "1.3°"."""
    return f"{angle:.1f}°"


def turns_in_words(group: Group) -> str:
    """What the elements of a group do: "quarter turns", "turns by multiples of 45° and mirrors"."""
    known = {1: "", 2: "half turns", 4: "quarter turns"}
    turns = known.get(group.n, f"turns by multiples of {360 / group.n:.4g}°")
    mirrors = "mirrors" if group.order > group.n else ""
    return " and ".join(filter(None, (turns, mirrors))) or "no turns"


def verdict(findings: Findings, group: Group | MatrixGroup | None) -> str:
    """A few sentences with the numbers; `group` is what the adapted model knows.

    It is None where there is no such model, or where it is a predictor that was fine-tuned.
    """
    if len(findings.turns) == 1:
        return (
            f"Upright, {_models(findings, 'accuracy')}. No image was turned: choose a larger group."
        )
    if "adapted" in findings.outcomes:
        return _adapted_verdict(findings, group)
    return _vanilla_verdict(findings)


def about_the_checkpoint(step: int, latest: int, steps: int) -> tuple[str, str]:
    """(which checkpoint of a run was evaluated, what must be known before it is believed or "").

    Args:
      step: the best one, which was evaluated.
      latest: the last one there is.
      steps: how many the run was to have.
    """
    fact, caveat = f"step {step} of {steps}", []
    if latest < steps:
        fact += ", unfinished"
        caveat.append(f"This run is unfinished: its latest checkpoint is step {latest} of {steps}.")
    if step == 0:
        caveat.append(
            "Its best checkpoint is step 0, before any training of its own: what is called adapted "
            "here is the vanilla predictor behind the scorer that the run started with."
        )
    return f"{fact}; vanilla is step 0", " ".join(caveat)


def about_the_prior(shares: Mapping[str, float]) -> str:
    """Where training images were found to lie, by the names of the turns."""
    found = ", ".join(f"{displayed_turn(turn)} {percent(share)}" for turn, share in shares.items())
    return f"Training images were found in these poses, the most frequent one called 0°: {found}."


def about_evidence(evidence: Evidence, which: str, prior: str = "identity") -> str:
    """Whether the data have a preferred pose, and what that means for the prior of this name.

    `which` images they are: "training".
    """
    picks = list(zip(evidence.turns, evidence.picked, strict=True))
    others = ", ".join(
        f"{displayed_turn(turn)} {percent(share)}"
        for i, (turn, share) in enumerate(picks)
        if i not in evidence.alike
    )
    alike = "".join(f" or that at {displayed_turn(picks[i][0])}" for i in evidence.alike[1:])
    if not others:
        return (
            f"The {prior} prior takes all {len(picks)} exact poses for as likely, which no data "
            "could speak against."
        )
    fact = (
        f"A check of the data, not of the scorer: a small classifier of its own picks, of the "
        f"{len(evidence.turns)} exact poses of {evidence.images} {which} images that it was not "
        f"trained on, the stored one{alike} for {percent(evidence.rate)} (95 % interval "
        f"{percent(evidence.low)} to {percent(evidence.high)}; by chance "
        f"{percent(evidence.chance)}; else {others})."
    )
    if evidence.low <= evidence.chance:
        meaning = (
            "That is no better than chance: no preferred pose was found, and these data do not "
            f"justify the {prior} prior, unless the classifier is too weak to see what does."
        )
    elif evidence.rate >= MOSTLY:
        one = "preferred poses" if alike else "one preferred pose"
        meaning = f"So most images are stored in {one}, as the {prior} prior says."
    else:
        one = "these poses are" if alike else "the stored pose is"
        finder = "" if prior == "estimated" else ", as --config.prior.name=estimated would find"
        meaning = (
            f"So {one} preferred, but how clearly such a classifier cannot say: the other images "
            f"may be too hard for it, look alike in several poses, or be stored in another{finder}."
        )
    return f"{fact} {meaning}"


def about_probabilities(name: str) -> str:
    """That `name`, a predictor, returned probabilities for logits, and what to do."""
    return (
        f"{name} returned probabilities where logits are needed, which makes its confidence, its "
        "calibration and the change of its logits wrong: let it return the logits, or the "
        "logarithms of the probabilities."
    )


def _models(findings, figure):
    return " and ".join(
        f"the {model} {'predictor' if model == 'vanilla' else 'model'} is right on "
        f"{percent(findings.metrics[f'{model}/{figure}'])}"
        for model in findings.outcomes
    )


def _adapted_verdict(findings, group):
    metrics = findings.metrics
    upright, over = metrics["vanilla/accuracy"], metrics["vanilla/group_accuracy"]
    words = turns_in_words(findings.turns.group)
    moved = "falls" if over < upright - 0.0005 else "goes"
    return (
        f"Under {words}, the vanilla predictor {moved} from {percent(upright)} upright to "
        f"{percent(over)} on average ({_worst(findings)}). "
        f"The {'adapted model' if group is not None else 'fine-tuned predictor'} "
        f"{_kept(findings)}; {_unchanged(findings, group)}. "
        f"Upright, that is {_cost(metrics['adapted/accuracy'] - upright, group)}."
        f"{_at_random(metrics)}{_guessing(findings)}"
    )


def _guessing(findings):
    """That the adapted model has learned nothing that counts, where that is so."""
    if not _guesses(findings, "adapted"):
        return ""
    return " But upright it is hardly better than guessing."


def _guesses(findings, model):
    """Whether upright images are hardly told better than by chance."""
    classes = len(findings.classes)
    margin = min(GUESSING, 1 / classes)
    return classes > 1 and findings.metrics[f"{model}/accuracy"] - 1 / classes < margin


def _at_random(metrics):
    """What happens at the angles between the elements, where it was measured."""
    figures = [metrics.get(f"{model}/random_accuracy") for model in ("adapted", "vanilla")]
    if None in figures:
        return ""
    adapted, vanilla = map(percent, figures)
    return f" At random angles it is right on {adapted}, the vanilla predictor on {vanilla}."


def _kept(findings):
    accuracy = findings.outcomes["adapted"].right.mean(0)
    mean = percent(accuracy.mean())
    if accuracy.max() - accuracy.min() < 1e-12:
        return f"is right on {mean} in every pose of {findings.turns.group}"
    return (
        f"is right on {mean} on average, between {percent(accuracy.min())} and "
        f"{percent(accuracy.max())} by the pose"
    )


def _worst(findings):
    accuracy = findings.outcomes["vanilla"].right.mean(0)
    worst = int(accuracy.argmin())
    where = f"turned {displayed_turn(findings.turns.labels[worst])}" if worst else "upright"
    return f"{percent(accuracy[worst])} at its worst, {where}"


def _unchanged(findings, group):
    """How many predictions the exact elements of the model's group change, and all elements."""
    moves = group.subgroup(4) if isinstance(group, MatrixGroup) else group
    known = {GroupTurns(moves).labels[g] for g in moves.lattice} if group is not None else ()
    exact = [i for i, name in enumerate(findings.turns.labels) if name in known and i]
    prediction = findings.outcomes["adapted"].prediction
    over_all = percent(findings.metrics["adapted/changed_rate"])
    if not exact:
        return f"{over_all} of its predictions change with the pose"
    changed = (prediction[:, exact] != prediction[:, :1]).mean()
    share = (
        "no prediction changes" if changed == 0 else f"{percent(changed)} of its predictions change"
    )
    said = f"under an exact element of its group {share}"
    return said if len(exact) == len(findings.turns) - 1 else f"{said}, over all turns {over_all}"


def _cost(difference, group):
    size = f"{abs(100 * difference):.1f} points"
    before = f"before {'adaptation' if group is not None else 'fine-tuning'}"
    if abs(difference) < 0.0005:
        return f"as good as {before}"
    return f"{size} {'more' if difference > 0 else 'less'} than {before}"


def _vanilla_verdict(findings):
    metrics, outcome = findings.metrics, findings.outcomes["vanilla"]
    upright, over = metrics["vanilla/accuracy"], metrics["vanilla/group_accuracy"]
    accuracy = outcome.right.mean(0)
    worst = int(accuracy.argmin())
    turn = f"at {displayed_turn(findings.turns.labels[worst])}" if worst else "upright"
    return (
        f"{_need(findings)}: the predictor is right on {percent(upright)} upright and on "
        f"{percent(over)} on average under {turns_in_words(findings.turns.group)}, least of all "
        f"{turn} ({percent(accuracy[worst])}), and {percent(metrics['vanilla/changed_rate'])} of "
        "its predictions change."
    )


def _need(findings):
    metrics = findings.metrics
    upright, over = metrics["vanilla/accuracy"], metrics["vanilla/group_accuracy"]
    changed, lost = metrics["vanilla/changed_rate"], upright - over
    if _guesses(findings, "vanilla"):
        return (
            "Upright it hardly does better than guessing, so look first at the range of values, "
            "the channels and the order of the classes"
        )
    if lost >= LOST or changed >= CHANGED:
        return "If images come turned like this, you need adaptation"
    if lost <= LITTLE_LOST and changed <= LITTLE_CHANGED:
        return "You do not need adaptation to such turns"
    return "Adaptation may be worth it if images come turned like this"
