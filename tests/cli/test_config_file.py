"""Options from files: of `--config`, and of the run that `--resume` names."""

import json
import os

import pytest

from mealfast.errors import UsageError
from mealfast.recipe import make_recipe
from mealfast.train import make_parser, recipe_from, train_command

from ..runs import assert_same_run


def parsed(*argv):
    return recipe_from(make_parser().parse_args([*map(str, argv)]))


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "options.toml"

    def write(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_toml_file_is_options_and_the_command_line_overrides_it(toml):
    path = toml("""
        student = "resnet18.tv_in1k"  # a comment
        teachers = ["resnet50.ram_in1k", "resnet34.a1_in1k"]
        batch-size = 64
        lr_decay_epochs = [3, 5]
        crop-scale = [0.2, 1]
        flip = 0
        compile = false
    """)
    recipe = parsed("--config", path, "--batch-size", 32)
    assert recipe == make_recipe(
        student="resnet18.tv_in1k", teachers=("resnet50.ram_in1k", "resnet34.a1_in1k"), batch_size=32,
        lr_decay_epochs=(3, 5), crop_scale=(0.2, 1.0), flip=0.0, compile=False,
    )  # fmt: skip
    assert recipe.left_open == ("epochs", "log_every", "eval_every", "lr", "student_bn")
    assert parsed("--config", path).batch_size == 64


def test_a_file_may_name_a_recipe(toml):
    path = toml('recipe = "resnet50-224"\nepochs = 3')
    assert parsed("--config", path) == make_recipe("resnet50-224", epochs=3)
    assert parsed("--config", path, "--recipe", "resnet18-224") == make_recipe("resnet18-224", epochs=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batchsize = 3", "there is no option batchsize; did you mean batch_size?"),
        ("qqq = 3", "there is no option qqq; `mealfast train --help` lists them"),
        ("left_open = []", "there is no option left_open"),
        ('epochs = "3"', "epochs = '3': must be a whole number"),
        ("epochs = 3.5", "epochs = 3.5: must be a whole number"),
        ("epochs = true", "epochs = True: must be a whole number"),
        ("cutmix = 1", "cutmix = 1: must be true or false"),
        ('teachers = "resnet50.ram_in1k"', "must be a list of values, each text in quotes"),
        ("crop-scale = [0.1]", "crop-scale = [0.1]: must be a list of 2 values, each a number"),
        ("epochs = 3\nEPOCHS = 4", "there is no option EPOCHS"),
        ("batch-size = 3\nbatch_size = 4", "batch_size stands there twice"),
        ("[data]\nsize = 3", "data = {'size': 3}: must be text in quotes"),
        ("epochs = ", "is neither TOML nor JSON"),
        ("{", "is neither TOML nor JSON"),
        (b"\xff\xfe\x00", "is neither TOML nor JSON"),
        ("a = " + "[" * 100_000, "is neither TOML nor JSON"),
        ('"\\u001b[31m" = 1', "there is no option \\x1b[31m"),
        ("#" * 1_100_000, "has more than 1,048,576 bytes"),
        ('recipe = "resnet51"', "recipe = 'resnet51': unknown; did you mean resnet5"),
        ("recipe = 3", "recipe = 3: unknown"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_file_is_one_line_that_names_it(toml, text, says):
    path = toml(text)
    with pytest.raises(UsageError) as caught:
        parsed("--config", path, "--student", "resnet18.tv_in1k")
    message = str(caught.value)
    assert message.startswith(f"--config {path}: ")
    assert says in message
    assert message.isprintable()
    assert len(message) < 900


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"^--config nowhere.toml: no such file; give a TOML file"):
        parsed("--config", "nowhere.toml")
    with pytest.raises(UsageError, match="no such file"):
        parsed("--config", tmp_path)  # a folder, but of no run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, fields):
    """A run that was stopped after 4 of 6 steps, and the options that a command would give."""
    folder = tmp_path_factory.mktemp("resumed")
    argv = [
        "--data", fields["data"], "--student", fields["student"], "--teachers", fields["teachers"][0], "--size", 32,
        "--amp", "off", "--no-compile", "--device", "cpu", "--loader", "pillow", "--no-tune-teachers",
        "--batch-size", 8,
        "--epochs", 2, "--no-eval-start", "--log-every", 2,
    ]  # fmt: skip
    argv = [str(one) for one in argv]
    train_command([*argv, "--run-dir", str(folder / "run"), "--max-steps", "4"])
    return folder, argv


def test_resuming_a_run_needs_nothing_else(stopped, tmp_path, capfd):
    folder, argv = stopped
    train_command([*argv, "--run-dir", str(tmp_path / "whole")])
    moved = tmp_path / "moved"
    os.rename(folder / "run", moved)
    try:
        recipe = parsed("--resume", moved)
        assert (recipe.run_dir, recipe.resume, recipe.max_steps, recipe.batch_size) == (str(moved), "auto", 4, 8)
        capfd.readouterr()
        train_command(["--resume", str(moved), "--max-steps", "100"])
        assert "resuming after 4 of 6 steps" in capfd.readouterr().err
        assert_same_run(moved, tmp_path / "whole")
    finally:
        os.rename(moved, folder / "run")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--run-dir", "elsewhere"], "--run-dir elsewhere: --resume RUN goes on in its own folder"),
        (["--recipe", "resnet50-224"], "--recipe resnet50-224: --resume RUN has its own; leave it out"),
        (["--config", "a.toml"], "--config a.toml: --resume RUN has its own"),
        (["--batch-size", "16"], "holds a run with --batch-size 8, not 16"),
        (["--epochs", "1"], "holds a run with --epochs 2, not 1"),
    ],
)
def test_what_a_run_does_not_take(stopped, more, says):
    run = str(stopped[0] / "run")
    with pytest.raises(UsageError) as caught:
        train_command(["--resume", run, *more])
    assert says in str(caught.value).replace(run, "RUN")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"^--resume runs/nowhere: no such file or folder"):
        parsed("--resume", "runs/nowhere")
    with pytest.raises(UsageError, match=r"^--resume .*: holds no run \(no config.json\)"):
        parsed("--resume", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"recipe": [1]}))
    with pytest.raises(UsageError, match="is damaged"):
        parsed("--resume", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"recipe": {"epochs": "many"}}))
    with pytest.raises(UsageError, match=r"epochs = 'many': must be a whole number$"):
        parsed("--resume", tmp_path)


def test_a_runs_config_makes_another_run_like_it(stopped):
    run = stopped[0] / "run"
    for place in (run, run / "config.json"):
        recipe = parsed("--config", place, "--seed", 5)
        assert (recipe.seed, recipe.batch_size, recipe.resume) == (5, 8, "auto")
        assert recipe.run_dir.startswith("runs/test_efficientnet-tree")
