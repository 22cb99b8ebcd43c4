"""Recipes: the paper's rows, refusals that name their option, and one command-line option a field."""

import subprocess
import sys

import pytest
import timm

from mealfast.errors import UsageError
from mealfast.recipe import RECIPES, Recipe, make_recipe, option_fields
from mealfast.train import make_parser, recipe_from

PAIR_224 = ("senet154.gluon_in1k", "resnet152s.gluon_in1k")
# Name, student, teachers, size, CutMix: the paper's tables with timm's names, written here once more.
PAPER = [
    ("resnet50-224", "resnet50.ram_in1k", PAIR_224, 224, False),
    ("resnet50-224-cutmix", "resnet50.ram_in1k", PAIR_224, 224, True),
    (
        "resnet50-380",
        "resnet50.ram_in1k",
        ("tf_efficientnet_b4.ns_jft_in1k", "tf_efficientnet_b4.aa_in1k"),
        380,
        False,
    ),
    ("resnet18-224", "resnet18.tv_in1k", PAIR_224, 224, False),
    ("mobilenetv3-small-075-224", "tf_mobilenetv3_small_075.in1k", PAIR_224, 224, False),
    ("mobilenetv3-small-100-224", "tf_mobilenetv3_small_100.in1k", PAIR_224, 224, False),
    ("mobilenetv3-large-224", "tf_mobilenetv3_large_100.in1k", PAIR_224, 224, False),
    ("efficientnet-b0-224", "tf_efficientnet_b0.aa_in1k", PAIR_224, 224, False),
]


def test_the_recipes_are_the_papers_and_the_demo():
    assert set(RECIPES) == {row[0] for row in PAPER} | {"demo"}


@pytest.mark.parametrize(("name", "student", "teachers", "size", "cutmix"), PAPER, ids=[row[0] for row in PAPER])
def test_a_paper_recipe_is_its_row(name, student, teachers, size, cutmix):
    recipe = make_recipe(name, data="imagenet")
    assert (recipe.student, recipe.teachers, recipe.size, recipe.cutmix) == (student, teachers, size, cutmix)
    method = (recipe.discriminator_mode, recipe.discriminator_lr, recipe.hard_label_weight)
    assert method == ("cooperative", None, 0.0)
    optimisation = (recipe.epochs, recipe.batch_size, recipe.lr, recipe.lr_decay_epochs, recipe.lr_decay)
    assert optimisation == (180, 512, 0.01, (100,), 0.1)
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay, recipe.accumulate) == ("sgd", 0.9, 0.0, 1)
    assert (recipe.crop_scale, recipe.crop_ratio, recipe.flip) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (recipe.interpolation, recipe.eval_interpolation, recipe.eval_crop_pct) == ("bilinear", "bilinear", None)
    assert recipe.run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", sorted({model for _, student, pair, _, _ in PAPER for model in (student, *pair)}))
def test_every_pinned_tag_is_timms(name):
    assert timm.models.get_pretrained_cfg(name, allow_unregistered=False).hf_hub_id


def test_the_demo_learns_from_labels_or_teachers():
    assert make_recipe("demo", hard_label_weight=1.0).discriminator_mode == "off"
    recipe = make_recipe("demo", teachers=("resnet10t?num_classes=10",))
    assert (recipe.discriminator_mode, recipe.size, recipe.flip) == ("cooperative", 32, 0.0)


GOOD = {"student": "resnet18", "teachers": ("resnet34",)}
BAD_VALUES = [
    ("size", 0), ("epochs", 0), ("batch_size", -1), ("accumulate", 0), ("log_every", 0), ("checkpoint_every", 0),
    ("keep", 0), ("loader_threads", 0), ("max_steps", 0), ("eval_every", -1), ("seed", -1), ("seed", 2**63),
    ("lr", -0.1), ("lr", float("nan")), ("lr", float("inf")), ("lr_decay", -1.0), ("momentum", 1.0),
    ("momentum", -0.1), ("weight_decay", -1e-4), ("discriminator_lr", float("nan")), ("flip", 1.5),
    ("val_share", 0.0), ("val_share", 1.0), ("val_share", float("nan")),
    ("hard_label_weight", -0.1), ("hard_label_weight", float("nan")), ("crop_scale", (0.5, 0.1)),
    ("crop_scale", (0.0, 1.0)), ("crop_scale", (0.5, 2.0)), ("crop_ratio", (0.0, 1.0)),
    ("crop_ratio", (1.0, float("inf"))), ("eval_crop_pct", 0.0), ("eval_crop_pct", 3.0), ("lr_decay_epochs", (-1,)),
    ("amp", "fp8"), ("loader", "torch"), ("device", "tpu"), ("discriminator", "on"), ("optimizer", "adam"),
    ("interpolation", "nearest"), ("eval_interpolation", "nearest"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=str)
def test_a_bad_value_is_refused_in_one_line_that_names_the_option(name, value):
    with pytest.raises(UsageError) as caught:
        make_recipe(**{**GOOD, name: value})
    message = str(caught.value)
    assert message.startswith(f"--{name.replace('_', '-')} ")
    assert "must be" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"hard_label_weight": 1.0}, "--hard-label-weight 1"),
        ({"teachers": ()}, "--teachers"),
        ({"teachers": (), "hard_label_weight": 0.5}, "--teachers"),
        ({"teachers": (), "hard_label_weight": 1.0, "discriminator": "cooperative"}, "--discriminator cooperative"),
        ({"discriminator": "off", "discriminator_lr": 0.1}, "--discriminator-lr"),
        ({"student": ""}, "--student"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contradiction_is_refused_in_one_line_that_names_the_option(changes, option):
    with pytest.raises(UsageError) as caught:
        make_recipe(**{**GOOD, **changes})
    assert str(caught.value).startswith(option)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(
        UsageError, match=r"^--recipe resnet51: unknown; did you mean resnet50-(224|380)\? One of resnet50-224,.* demo$"
    ):
        make_recipe("resnet51")


# One value a field that is not its default, as typed and as it must arrive.
TYPED = {
    "teachers": ("resnet34 resnet26", ("resnet34", "resnet26")), "student": ("resnet10t", "resnet10t"),
    "data": ("some/folder", "some/folder"), "val": ("other/folder", "other/folder"), "val_share": ("0.2", 0.2),
    "class_map": ("natural", "natural"),
    "size": ("96", 96), "crop_scale": ("0.2 0.9", (0.2, 0.9)),
    "crop_ratio": ("0.5 2", (0.5, 2.0)), "flip": ("0.25", 0.25), "interpolation": ("bicubic", "bicubic"),
    "eval_crop_pct": ("0.95", 0.95), "eval_interpolation": ("bicubic", "bicubic"), "loader": ("pillow", "pillow"),
    "loader_threads": ("3", 3), "discriminator": ("adversarial", "adversarial"), "discriminator_lr": ("1e-4", 1e-4),
    "collective_timeout": ("90", 90), "max_bad_steps": ("5", 5), "loader_timeout": ("60", 60),
    "student_bn": ("eval", "eval"), "cutmix": (None, True), "label_cache": ("a/cache", "a/cache"),
    "hard_label_weight": ("0.5", 0.5),
    "label_cache_views": ("7", 7), "label_cache_top_k": ("4", 4),
    "epochs": ("7", 7), "batch_size": ("64", 64),
    "accumulate": ("2", 2), "lr": ("0.1", 0.1), "lr_decay_epochs": ("3 5", (3, 5)), "lr_decay": ("0.5", 0.5),
    "momentum": ("0.8", 0.8), "weight_decay": ("1e-5", 1e-5), "optimizer": ("apex-fused-sgd", "apex-fused-sgd"),
    "max_steps": ("11", 11), "device": ("cpu", "cpu"), "amp": ("bf16", "bf16"), "compile": (None, True),
    "cuda_graphs": ("step", "step"), "tune_teachers": (None, True), "stage_report": (None, True),
    "seed": ("9", 9), "run_dir": ("runs/mine", "runs/mine"), "resume": ("never", "never"), "log_every": ("5", 5),
    "checkpoint_every": ("6", 6), "eval_every": ("0", 0), "keep": ("4", 4),
    "eval_start": (None, False),
}  # fmt: skip


def test_every_field_is_an_option_and_arrives_as_typed():
    known = [field.name for field in option_fields()]
    missing = set(known) - set(TYPED)
    assert not missing, f"give TYPED a value of the new fields {missing}"
    argv = []
    for name in known:
        text, value = TYPED[name]
        flag = "--" + name.replace("_", "-")
        argv += [flag, *text.split()] if text else [flag if value else flag.replace("--", "--no-", 1)]
    recipe = recipe_from(make_parser().parse_args(argv))
    assert {name: getattr(recipe, name) for name in known} == {name: TYPED[name][1] for name in known}
    assert recipe == Recipe(**{name: value for name, (_, value) in TYPED.items()})


def test_tuning_is_a_switch_that_takes_a_word_too(capsys):
    def tuned(*argv):
        return recipe_from(make_parser().parse_args(["--recipe", "resnet50-224", *argv])).tune_teachers

    assert [tuned(), tuned("--tune-teachers"), tuned("--no-tune-teachers")] == [True, True, False]
    assert tuned("--tune-teachers", "again", "--epochs", "3") == "again"
    with pytest.raises(SystemExit):
        tuned("--tune-teachers", "twice")
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UsageError, match=r"^--tune-teachers twice: must be on, off or again"):
        make_recipe("resnet50-224", tune_teachers="twice")


def test_options_override_the_recipe_and_only_those():
    recipe = recipe_from(make_parser().parse_args(["--recipe", "resnet50-224-cutmix", "--no-cutmix", "--epochs", "2"]))
    assert recipe == make_recipe("resnet50-224-cutmix", cutmix=False, epochs=2)


# What help says of a field whose default is worked out later: it must say so itself.
LATER = {
    "teachers": "none", "eval_crop_pct": "int(256 / 224 * size)", "loader_threads": "its share of the cores",
    "discriminator": "cooperative", "discriminator_lr": "the student's", "label_cache": "none",
    "label_cache_views": "as many as --epochs", "label_cache_top_k": "10", "max_steps": "no limit",
    "compile": "on GPUs only", "class_map": "found out",
    "val": "val, validation, valid or test beside train/", "cuda_graphs": "ensemble on GPUs", "run_dir": "runs/RECIPE",
}  # fmt: skip
REQUIRED = {"student", "data"}


def test_help_lists_every_field_with_its_default():
    text = " ".join(make_parser().format_help().split())
    for field in option_fields():
        flag = "--" + field.name.replace("_", "-")
        assert flag in text
        help_text = field.metadata["help"]
        assert help_text in text, f"{flag} is not described"
        assert help_text[0].islower(), f"{flag}: a fragment, not a sentence"
        if field.name in REQUIRED:
            assert "(required" in help_text
        elif field.default is None or field.default in ("", ()):
            assert f"(default: {'to ' if field.name == 'eval_crop_pct' else ''}{LATER[field.name]}" in help_text
        else:
            default = text.partition(f"{help_text} (default: ")[2].partition(")")[0]
            if isinstance(field.default, tuple):
                assert [float(part) for part in default.split()] == pytest.approx(list(field.default), rel=1e-2)
            elif isinstance(field.default, bool):
                assert default == ("on" if field.default else "off")
            elif isinstance(field.default, (int, float)):
                assert float(default) == field.default
            else:
                assert default == field.default


def test_json_keeps_every_field():
    recipe = make_recipe("resnet50-380", data="d")
    content = recipe.to_json()
    assert content["teachers"] == list(recipe.teachers)
    assert Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}) == recipe


def test_a_parser_refuses_in_one_line(capsys):
    for argv, says in (
        (["--no-such-option"], "--no-such-option"),
        (["--epoch=3"], "--epoch; did you mean --epochs?"),
        (["--no-cutmx"], "--no-cutmx; did you mean --no-cutmix?"),
    ):
        with pytest.raises(SystemExit) as caught:
            make_parser().parse_args(argv)
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"mealfast: there is no option {says} (see mealfast train --help)\n"


def test_recipes_and_help_need_neither_torch_nor_timm():
    code = (
        "import sys; from mealfast.train import make_parser; import mealfast.recipe, mealfast.__main__;"
        "make_parser().format_help(); print([m for m in ('torch', 'timm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
