"""Settings: what is refused, what is kept, and that every shipped configuration builds."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from equiadapt_jax.training import build, objective
from equiadapt_jax.training import config as settings
from equiadapt_jax.training.build import build_model, build_prior, resolve, turns_inputs
from equiadapt_jax.training.check import check_training
from equiadapt_jax.training.explain import explain
from tests.tiny_runs import ROOT, SHIPPED, VARIANTS, given_flags, shipped


def all_fields(cls=settings.Config):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from all_fields(field.type)
        else:
            yield cls, field


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("name", ["energy", "energy_resnet", "features", "confidence"])
@pytest.mark.parametrize("file", ["digits_vit", "cifar10_resnet20"])
def test_a_scorer_is_chosen_by_its_flag_alone(file, name, monkeypatch):
    path = ROOT / "configs" / f"{file}.py"
    mode = ["--config.adaptation.mode=joint"] if name == "confidence" else []
    config = resolve(
        given_flags(monkeypatch, f"--config={path}:tiny", f"--config.canonicalizer={name}", *mode)
    )
    check_training(config)
    model = build_model(config, 10)
    images = jnp.zeros((1, config.data.size, config.data.size, 3))
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    (_, canonical), _ = jax.eval_shape(model.apply, *like, images)
    assert canonical.scores.shape == (1, model.group.order)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_options_given_as_flags_are_refused_where_the_network_has_none(monkeypatch):
    path = ROOT / "configs" / "cifar10_resnet20.py"
    file = f"--config={path}:tiny"
    config = given_flags(
        monkeypatch, file, "--config.canonicalizer=energy", "--config.scorer.options.grid=3"
    )
    assert config.scorer.options == {"grid": 3, "hidden": 8}
    config = given_flags(
        monkeypatch, f"--config={path}", "--config.canonicalizer=energy",
        "--config.scorer.options.dropout=0.1",
    )  # fmt: skip
    with pytest.raises(ValueError, match="scorer.options.dropout is not an option of ConvNet"):
        resolve(config)
    same = given_flags(monkeypatch, file, "--config.canonicalizer=features")
    assert same == shipped(path, "tiny")  # as the file has it
    other = given_flags(monkeypatch, file, "--config.predictor.name=vit")
    assert other.predictor.options == {}
    with pytest.raises(ValueError, match="canonicalizer is 'nobody': choose one of group_conv"):
        given_flags(monkeypatch, file, "--config.canonicalizer=nobody")


def test_data_that_are_not_turned_have_the_fingerprint_from_before_any_could_be():
    parts = (
        settings.Predictor(), settings.Augmentation(), settings.Optimizer(), settings.Pretrain(),
    )  # fmt: skip
    assert settings.fingerprint(settings.Data(), *parts) == "8ef86544"
    turned = settings.Data(poses=(0.5, 0.5, 0.0, 0.0))
    assert settings.fingerprint(turned, *parts) != "8ef86544"


def test_every_setting_has_a_meaning():
    for cls, field in all_fields():
        assert field.metadata["meaning"], f"{cls.__name__}.{field.name}"


def test_every_setting_is_explained_with_value_and_default():
    config = dataclasses.replace(settings.Config(), group="cyclic8")
    text = explain(config)
    joined = " ".join(text.split())
    for cls, field in all_fields():
        assert f".{field.name}" in text, f"{cls.__name__}.{field.name}"
        assert " ".join(field.metadata["meaning"].split()) in joined
    assert (
        "--config.group=cyclic8 cyclic<n> or dihedral<n>, or of all angles so2 or o2 (default "
        "cyclic4)"
    ) in joined
    assert "--config.seed=0 of init" in joined  # no default beside a value that is it
    assert "pool=token, class_token=True" in joined
    assert max(map(len, text.splitlines())) <= 100


def test_a_part_of_the_settings_is_explained_alone():
    text = explain(settings.Config(), "config.prior")
    flags = [line.split("=")[0].strip() for line in text.splitlines() if "--" in line]
    assert flags == [f"--config.prior.{f.name}" for f in dataclasses.fields(settings.Prior)]
    assert "--config.seed=0" in explain(settings.Config(), "config.seed")
    with pytest.raises(ValueError, match=r"did you mean --config\.adaptation\.steps=help\?"):
        explain(settings.Config(), "config.adaptation.step")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_tiny_variant_needs_little(path):
    """Neither a download nor minutes."""
    config = shipped(path, "tiny")
    assert config.name == f"{path.stem}_tiny"
    assert not config.predictor.weights.startswith("hf://")
    assert config.adaptation.steps == 2
    assert config.pretrain.steps <= 2
    assert config.data.size <= 64


def test_settings_survive_the_way_through_a_dict():
    config = dataclasses.replace(
        settings.Config(), scorer=settings.Scorer(options={"features": (4, 8)}), seed=3
    )
    assert settings.from_dict(dataclasses.asdict(config)) == config


def test_unknown_settings_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"config\.adaptation\.step is not .* mean steps\?"):
        settings.from_dict({"adaptation": {"step": 3}})


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"seed": "1"}, "config.seed"),
        ({"seed": 1.5}, "config.seed"),
        ({"group": 4}, "config.group"),
        ({"logging": {"tensorboard": 1}}, "config.logging.tensorboard"),
        ({"pretrain": {"steps": True}}, "config.pretrain.steps"),
    ],
)
def test_settings_of_another_type_are_refused(values, path):
    with pytest.raises(TypeError, match=path):
        settings.from_dict(values)


def test_whole_numbers_serve_as_floats_and_lists_as_tuples():
    config = settings.from_dict({"predictor": {"mean": [1, 0]}, "optimizer": {"clip": 2}})
    assert config.predictor.mean == (1.0, 0.0)
    assert config.optimizer.clip == 2.0
    assert isinstance(config.optimizer.clip, float)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_variant_that_does_not_exist_is_refused(path):
    sentence = rf"Unknown variant 'tny' of {path.stem}: there (is|are) .*'tiny'\."
    with pytest.raises(ValueError, match=sentence):
        shipped(path, "tny")


def test_differences_name_what_changed_but_not_the_logging():
    old = settings.Config()
    new = dataclasses.replace(old, group="cyclic8", logging=settings.Logging(every=1))
    assert settings.differences(old, new) == ["group: 'cyclic4' → 'cyclic8'"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_resolved_settings_build_the_same_and_survive_json(path):
    config = shipped(path)
    resolved = resolve(config)
    again = settings.from_dict(json.loads(json.dumps(dataclasses.asdict(resolved))))
    assert again == resolved == resolve(again)
    assert build_model(again, 10).preprocess == build_model(config, 10).preprocess
    images = jax.ShapeDtypeStruct((1, config.data.size, config.data.size, 3), jnp.float32)
    shapes = [
        jax.eval_shape(build_model(c, 10).init, jax.random.key(0), images) for c in (config, again)
    ]
    assert shapes[0] == shapes[1]
    for role in ("scorer", "predictor"):
        network = build._network(role, settings.network_name(config, role))
        fields = {field.name for field in dataclasses.fields(network)}
        given_elsewhere = {"group", "num_classes", "dtype", "remat", "pad", "fill"}
        given_elsewhere |= {"parent", "name"}
        assert set(getattr(again, role).options) == fields - given_elsewhere


def test_fingerprints_do_not_depend_on_places_or_logging():
    config = settings.Config()
    moved = dataclasses.replace(
        config,
        name="other",
        data=dataclasses.replace(config.data, root="photos", data_dir="data"),
        pretrain=dataclasses.replace(config.pretrain, directory="elsewhere"),
        logging=settings.Logging(every=7, tensorboard=True, wandb="mine"),
    )
    assert settings.fingerprint(config, {"a": 1}) == settings.fingerprint(moved, {"a": 1})
    assert settings.fingerprint(config, {"a": 1}) != settings.fingerprint(config, {"a": 2})
    for change in (
        {"seed": 1}, {"logging": settings.Logging(evaluate_every=7)},
        {"canonicalizer": "other"},
    ):  # fmt: skip
        changed = dataclasses.replace(config, **change)
        assert settings.fingerprint(config) != settings.fingerprint(changed)


def test_fingerprints_tell_settings_apart():
    prints = {settings.fingerprint(settings.Data(size=size)) for size in range(20)}
    assert len(prints) == 20
    assert settings.fingerprint(settings.Data(size=3)) in prints


def test_a_mask_reaches_the_model_and_its_scorer():
    config = dataclasses.replace(settings.Config(), mask="disk")
    model = build_model(config, 10)
    assert model.mask == "disk"
    assert build_model(settings.Config(), 10).mask is None
    images = jax.ShapeDtypeStruct((1, 16, 32, 1), jnp.float32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), images)
    (logits, canonical), _ = jax.eval_shape(model.apply, params, state, images)
    assert canonical.inputs.shape == (1, 32, 32, 1)
    assert logits.shape == (1, 10)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"group": "cyclic0"}, "Unknown group 'cyclic0'"),
        (
            {"group": "so2"},
            r"config\.group=so2 takes config\.canonicalizer=steerable, or group_conv",
        ),
        ({"group": "so3"}, "config.group: Unknown group 'so3'"),
        ({"mask": "circle"}, r"config\.mask is 'circle': choose one of none, disk"),
        ({"dtype": "float16"}, r"config\.dtype is 'float16': choose one of float32, bfloat16"),
        ({"adaptation": settings.Adaptation(mode="both")}, r"config\.adaptation\.mode is 'both'"),
        ({"predictor": settings.Predictor(name="vgg")}, r"config\.predictor\.name is 'vgg'"),
        (
            {"predictor": settings.Predictor(options={"depht": 2})},
            r"config\.predictor\.options\.depht is not an option of ViT; did you mean depth\?",
        ),
        (
            {"adaptation": settings.Adaptation(method="hard")},
            r"config\.adaptation\.method is 'hard'",
        ),
    ],
)
def test_settings_that_build_nothing_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(dataclasses.replace(settings.Config(), **change), 10)


DEMO = {"digits_vit", "image_folder"}  # whose group is often changed
FULL_SIZE = [
    (path, variant, group)
    for path in SHIPPED
    for variant in VARIANTS.get(path.stem, [""])
    for group in (["cyclic4", "cyclic8", "dihedral4"] if path.stem in DEMO else [""])
]


@pytest.mark.parametrize(
    ("path", "variant", "group"), FULL_SIZE, ids=lambda x: getattr(x, "stem", x)
)
def test_every_configuration_builds_and_differentiates_in_full_size(path, variant, group):
    config = resolve(shipped(path, variant))
    config = dataclasses.replace(config, group=group or config.group)
    model = build_model(config, 10)
    channels = max(3 if path.stem != "rotated_mnist" else 1, len(config.predictor.mean))
    size = config.data.size
    batch = {
        "image": jax.ShapeDtypeStruct((8, size, size, channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    key = jax.random.key(0)
    params, state = jax.eval_shape(model.init, key, batch["image"])
    loss = objective.adaptation(
        model,
        build_prior(config.prior, model.group),
        prior_weight=config.adaptation.prior_weight,
        augmentation=config.augmentation,
        turn_inputs=turns_inputs(config),
    )
    gradients, (new_state, metrics) = jax.eval_shape(
        jax.grad(loss, has_aux=True), params, state, batch, key
    )
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(gradients) == shapes(params)
    assert shapes(new_state) == shapes(state)
    assert metrics["pose_accuracy"].shape == ()


def test_blocks_are_computed_again_where_that_is_asked_for():
    """It changes no result: whatever is kept of runs without it is theirs, too."""
    plain = resolve(shipped(ROOT / "configs" / "cifar10.py", "vit_b16"))
    asked = dataclasses.replace(plain, predictor=dataclasses.replace(plain.predictor, remat=True))
    assert settings.differences(plain, asked) == []
    parts = [(config, config.predictor) for config in (plain, asked)]
    assert settings.fingerprint(*parts[0]) == settings.fingerprint(*parts[1])

    def kept(config):
        model = build_model(config, 10)
        images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
        params, state = jax.eval_shape(model.init, jax.random.key(0), images)

        def loss(predictor, images):
            return model.predictor.apply(predictor, state["predictor"], images)[0].sum()

        back = jax.eval_shape(lambda *given: jax.vjp(loss, *given)[1], params["predictor"], images)
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    assert kept(asked) < kept(plain) / 2
