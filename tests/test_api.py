"""The public names: documented, and with the signatures that the design writes."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest

import equiadapt_jax as ea

# What parse flags on import are programs, not the library.
PROGRAMS = {"equiadapt_jax.train", "equiadapt_jax.eval"}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(ea.__path__, "equiadapt_jax.")
    if module.name not in PROGRAMS
    and not any(part.startswith("_") for part in module.name.split("."))
]


def defined_here(module):
    """(name, object) of the public functions and classes that a module defines."""
    for name, value in vars(module).items():
        is_ours = getattr(value, "__module__", None) == module.__name__
        if not name.startswith("_") and is_ours and callable(value):
            yield name, value


def own_docstring(value):
    """The docstring that was written for it: neither inherited nor made by dataclass."""
    written = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    if inspect.isclass(value) and written and written.startswith(f"{value.__name__}("):
        return None
    return written


def members(value):
    """(name, function) of the public methods and properties that a class writes itself."""
    generated = {"init", "apply"} if not inspect.isclass(value) else set()
    for name, member in vars(value).items():
        if name.startswith("_") or name in generated:
            continue
        if isinstance(member, property):
            yield name, member.fget
        elif isinstance(member, classmethod | staticmethod):
            yield name, member.__func__
        elif inspect.isfunction(member) and member.__module__ == value.__module__:
            yield name, member


def inherits_documentation(value, name):
    return any(getattr(getattr(base, name, None), "__doc__", None) for base in value.__mro__[1:])


@pytest.mark.parametrize("name", ["equiadapt_jax", *MODULES])
def test_every_public_name_is_documented(name):
    module = importlib.import_module(name)
    missing = [] if module.__doc__ else [name]
    for public, value in defined_here(module):
        if not own_docstring(value):
            missing.append(f"{name}.{public}")
        if inspect.isclass(value):
            missing += [
                f"{name}.{public}.{method}"
                for method, function in members(value)
                if not function.__doc__ and not inherits_documentation(value, method)
            ]
    assert not missing


def test_the_walk_finds_what_there_is():
    assert {"equiadapt_jax.groups", "equiadapt_jax.actions.images"} <= set(MODULES)
    found = dict(defined_here(ea.groups))
    assert {"Cyclic", "Dihedral", "from_name"} <= set(found)
    assert {"compose", "inverse"} <= dict(members(ea.groups.Cyclic.__mro__[1])).keys()


@dataclasses.dataclass
class Undocumented:
    field: int

    def method(self):
        pass


def test_an_undocumented_name_would_be_found():
    assert own_docstring(Undocumented) is None
    assert [name for name, _ in members(Undocumented)] == ["method"]


@pytest.mark.parametrize("name", MODULES)
def test_what_a_package_exports_exists(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.__all__ names {public}"


PUBLIC = {
    "groups.Cyclic": "n",
    "groups.Dihedral": "n",
    "groups.SO": "d",
    "groups.O": "d",
    "groups.from_name": "name",
    "groups.finite": "group, what",
    "groups.Cyclic.identity": "self",
    "groups.Cyclic.elements": "self",
    "groups.Cyclic.random": "self, key, shape=",
    "groups.Cyclic.compose": "self, g, h",
    "groups.Cyclic.inverse": "self, g",
    "groups.Cyclic.matrix": "self, g, dtype=",
    "groups.SO.random": "self, key, shape=",
    "groups.SO.compose": "self, g, h",
    "groups.SO.inverse": "self, g",
    "groups.SO.matrix": "self, g, dtype=",
    "groups.SO.rotation": "self, angle",
    "groups.SO.angle": "self, g",
    "groups.SO.subgroup": "self, n",
    "groups.O.reflects": "self, g",
    "groups.O.mirrored": "self, g, where=",
    "actions.images.rotate": "images, angle, *, pad=, fill=, interpolation=",
    "actions.images.reflect": "images, where=",
    "actions.images.act": "group, g, images, *, pad=, fill=, interpolation=",
    "actions.images.orbit": "group, images, *, pad=, fill=, interpolation=",
    "actions.fields.act": "group, g, fields, *, representation=, pad=, fill=, interpolation=",
    "actions.vectors.act": "group, g, vectors, *, representation=, axis=",
    "actions.annotations.act_on_boxes": "group, g, boxes, size",
    "actions.annotations.act_on_keypoints": "group, g, points, size",
    "actions.annotations.act_on_masks": "group, g, masks, *, fill=",
    "actions.annotations.act_on_polygons": "group, g, points, size",
    "actions.squares.disk": "images, *, fill=",
    "actions.squares.from_images": "images, *, pad=, fill=",
    "actions.squares.to_images": "squares, height, width, *, axis=",
    "representations.dimension": "group, representation",
    "representations.matrix": "group, g, representation, dtype=",
    "outputs.act": "group, g, y, *, output, interpolation=",
    "outputs.invert": "group, pose, y, weights=, *, output, mix=, interpolation=",
    "canonicalization.select_pose": "group, scores",
    "canonicalization.weights": "scores, *, method=, temperature=, key=",
    "canonicalization.canonicalize": (
        "group, pose, images, weights=, *, pad=, fill=, interpolation="
    ),
    "canonicalization.mixture": ("group, weights, images, *, pad=, fill=, interpolation="),
    "canonicalization.invert": "group, pose, images, *, pad=, fill=, interpolation=",
    "canonicalization.from_scores": (
        "group, scores, images, *, method=, temperature=, key=, pad=, fill=, interpolation="
    ),
    "canonicalization.frame": "group, vectors",
    "canonicalization.mirror_log_odds": "group, vectors",
    "canonicalization.from_vectors": "group, vectors, images, *, pad=, fill=, interpolation=",
    "canonicalization.refine": "group, scores",
    "canonicalization.from_refined": "group, scores, images, *, pad=, fill=, interpolation=",
    "averaging.best": "group, scores, *, poses=, temperature=, weighting=, key=",
    "averaging.mean": "group, images, predict, *, chunk=, act=, pad=, fill=, interpolation=",
    "averaging.combine": "poses, weights, outputs, *, act=",
    "averaging.weighted": (
        "group, scores, images, predict, *, poses=, temperature=, weighting=, key=, "
        "chunk=, act=, pad=, fill=, interpolation="
    ),
    "priors.Identity.loss": "self, group, scores, *, applied=",
    "priors.Categorical": "probabilities, kl_weight=, per_sample=",
    "priors.Categorical.loss": "self, group, scores, *, applied=",
    "priors.Uniform.loss": "self, group, scores, *, applied=",
    "priors.VonMises": "kappa, angle=, mirror=",
    "priors.VonMises.loss": "self, group, scores, *, applied=",
    "priors.Refined": "group, prior",
    "priors.Refined.loss": "self, group, scores, *, applied=",
    "Network": "init, apply, features=",
    "from_linen": "module",
    "from_nnx": "module",
    "from_function": "function, init=, features=",
    "adapt": (
        "group, scorer, predictor, *, preprocess=, output=, freeze_predictor=, method=, "
        "temperature=, pad=, fill=, interpolation=, features=, poses=, chunk=, "
        "weighting=, mask=, refine="
    ),
    "orbit_scorer": "group, network, *, reference=, scale=, pad=, fill=, interpolation=",
    "energies.Energy": "function, margin=",
    "energies.confidence": "logits, maps=",
    "energies.gate": "scores, margin",
    "energies.search": ("energy, images, *, angles=, steps=, chunk=, pad=, fill=, interpolation="),
    "predictors.load": (
        "path, *, preprocess=, sha256=, image_size=, head=, channels=, heads=, dtype="
    ),
    "adaptation.Adapted.init": "self, key, images, predictor=",
    "adaptation.Adapted.apply": "self, params, state, images, *, train=, key=",
    "adaptation.Adapted.canonicalize": "self, params, state, images, *, train=, key=",
    "adaptation.Adapted.predict": "self, params, state, images, *, train=, key=",
    "adaptation.Adapted.orbit_features": "self, params, state, images",
    "adaptation.Adapted.score": "self, params, state, seen, *, train=, key=",
    "adaptation.Adapted.combine": "self, scores, predictions, weights=, key=",
}


def written(function):
    """Names of the parameters, with = where there is a default and * before keyword-only ones."""
    words = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(p.name + ("=" if p.default is not p.empty else ""))
    return ", ".join(words)


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_are_as_written(name):
    value = ea
    for part in name.split("."):
        value = getattr(value, part)
    assert written(value) == PUBLIC[name]


def test_defaults_are_the_conventions():
    for function in (ea.actions.images.act, ea.canonicalization.canonicalize, ea.adapt):
        parameters = inspect.signature(function).parameters
        assert parameters["pad"].default == "edge"
        assert parameters["fill"].default == 0.0
    assert inspect.signature(ea.adapt).parameters["output"].default == "trivial"
    assert inspect.signature(ea.adapt).parameters["method"].default == "straight_through"


def test_canonical_is_the_tuple_of_the_design():
    assert ea.canonicalization.Canonical._fields == ("inputs", "pose", "scores", "weights")
