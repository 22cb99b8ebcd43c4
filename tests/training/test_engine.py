"""The engine's steps against a plain PyTorch loop; accumulation; batches that give NaN; what a run writes."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from mealfast.errors import UsageError
from mealfast.loaders import Batch, ImageIndex, ViewPlan
from mealfast.machine import processes as runtimes
from mealfast.machine.precision import name_of, precision
from mealfast.models.spec import parse
from mealfast.recipe import make_recipe
from mealfast.record import checkpoint
from mealfast.record.run_directory import RunDirectory
from mealfast.training import validation
from mealfast.training.assemble import make_job
from mealfast.training.job import Job
from mealfast.training.loop import run_job, train
from mealfast.training.resume import capture
from mealfast.training.where import Where

from ..plain_loop import PlainLoop, PlainModel, views

STEPS_PER_EPOCH = 3  # 25 images in batches of 8


def made(options, **changes) -> Job:
    recipe = make_recipe(**{**options, **changes})
    return make_job(recipe, runtimes.start("cpu"), RunDirectory(recipe.run_dir))[0]


def run(job: Job):
    """Runs a new job to its end; what is in its summary."""
    return run_job(job, Where(), RunDirectory(job.recipe.run_dir))


def metrics(recipe_or_dir, kind):
    lines = (RunDirectory(recipe_or_dir).path / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def linear_layers(state):
    return [(state[f"layers.{n}.weight"].clone(), state[f"layers.{n}.bias"].clone()) for n in (0, 2, 4)]


def final(options):
    """The last checkpoint's content: after it was written the engine goes on in memory, to time itself."""
    return checkpoint.newest(RunDirectory(options["run_dir"]).checkpoints)[1]


def plain_model(spec: str) -> PlainModel:
    parsed = parse(spec)
    return PlainModel(parsed.architecture, parsed.checkpoint, 3)


@pytest.mark.parametrize(
    ("mode", "bn"), [("off", "train"), ("cooperative", "train"), ("adversarial", "train"), ("cooperative", "eval")]
)
def test_a_run_is_the_plain_loop(options, tree, weights, mode, bn):
    """Four steps over two epochs, the learning rate falling between them: every weight, momentum and logged loss."""
    options |= {"epochs": 2, "max_steps": 4, "lr": 0.01, "lr_decay_epochs": (1,), "log_every": 1, "eval_every": 0}
    options["student"] = f"test_resnet@{weights('test_resnet', 1)}"  # its BatchNorms see 4 x 4 pixels at the end, not 1
    changes = {"discriminator": mode, "weight_decay": 1e-3, "hard_label_weight": 0.25, "student_bn": bn}
    job = made(options, **changes)
    layers = []
    if mode != "off":
        discriminator = job.student.discriminator
        with torch.no_grad():  # heard beside the other losses: fresh from its seed it says little
            for p in discriminator.parameters():
                p.mul_(2.5)
        layers = linear_layers(discriminator.state_dict())
    student = plain_model(options["student"])
    started = {key: value.clone() for key, value in student.model.state_dict().items()}
    loop = PlainLoop(
        student, [plain_model(spec) for spec in options["teachers"]], layers, mode, 0.01, 0.9, 1e-3, hard_weight=0.25
    )
    if bn == "eval":
        for module in student.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    run(job)

    index = ImageIndex.scan(tree / "train")
    plan = ViewPlan(index.widths, index.heights, seed=0, size=32)
    paths = [tree / "train" / index.relative_path(row) for row in range(len(index))]
    losses = [loop.step(*views(plan, paths, index.labels, 8, step), 0.1 if step >= 3 else 1.0) for step in range(4)]

    # Float32 sums in another order, relative to the largest change of a tensor. Rounding that pushes an activation
    # over its ReLU's edge makes it larger than a few eps; the discriminator's sign makes 0.2.
    near = 2e-3
    state = final(options)
    ours = state["student"]
    for key, theirs in student.model.state_dict().items():
        change = float((theirs - started[key]).abs().max())
        kept = bn == "eval" and ("running" in key or "num_batches" in key)
        assert change == 0 if kept else change > 0
        torch.testing.assert_close(
            ours[key], theirs, rtol=0, atol=near * change + 1e-7, msg=lambda m, k=key: f"{k}: {m}"
        )
    for number, p in enumerate(loop.parameters):
        own = state["optimizer"]["state"][number]["momentum_buffer"]
        theirs = loop.optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(own, theirs, rtol=0, atol=near * float(theirs.abs().max()) + 1e-7)
    if mode != "off":
        own = linear_layers(state["discriminator"])
        for (weight, bias), (w, b), (w0, _) in zip(own, loop.layers, layers, strict=True):
            near_weight = near * float((w - w0).detach().abs().max()) + 1e-7
            torch.testing.assert_close(weight, w.detach(), rtol=0, atol=near_weight)
            torch.testing.assert_close(bias, b.detach(), rtol=0, atol=near_weight)
    for line, wanted in zip(metrics(options["run_dir"], "train"), losses, strict=True):
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, rel=1e-4), name
        assert line["lr"] == pytest.approx(0.001 if line["step"] >= 3 else 0.01)


def copies(state):
    return {key: value.clone() for key, value in state.items()}


def one_step(options, images, labels, **changes):
    """The student's change by the first step on a batch."""
    job = made(options, **changes)
    before = copies(job.student.model.state_dict())
    job.step()(Batch(images, labels, torch.arange(len(labels))), 0)
    after = job.student.model.state_dict()
    return {key: after[key] - before[key] for key in after}, job.meter.sums.clone()


@pytest.mark.parametrize("changes", [{}, {"cutmix": True, "hard_label_weight": 0.5}], ids=["plain", "cutmix"])
def test_accumulated_parts_make_the_step_of_the_whole(options, weights, changes):
    """LayerNorm only: without statistics over the batch 2 or 4 parts are the whole, up to rounding."""
    options["student"] = f"test_vit@{weights('test_vit', 9)}"
    options["teachers"] = (f"test_resnet@{weights('test_resnet', 2)}",)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (8,), generator=generator)
    whole, terms = one_step(options, images, labels, **changes)
    largest = max(float(change.abs().max()) for change in whole.values())
    assert largest > 1e-3
    for parts in (2, 4):
        split, split_terms = one_step(options, images, labels, accumulate=parts, **changes)
        torch.testing.assert_close(split_terms, terms, rtol=1e-5, atol=1e-6)
        for key, change in whole.items():
            torch.testing.assert_close(split[key], change, rtol=0, atol=1e-5 * largest)


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.randint(0, 3, (8,), generator=generator), torch.arange(8))


def trained_bits(job: Job):
    """Every trained number: student, discriminator, momentum."""
    state = capture(job)
    tensors = [p.detach().clone() for p in job.student.parameters()]
    momentum = [one["momentum_buffer"].clone() for one in state["optimizer"]["state"].values()]
    assert len(momentum) == len(tensors)
    return tensors + momentum


class NanTeachers:
    def __init__(self, teachers, value: float) -> None:
        self.teachers, self.value = teachers, value

    def __call__(self, images):
        logits = self.teachers(images)
        logits[0][2, 1] = self.value
        return logits


@pytest.mark.parametrize("first", [True, False], ids=["the first step", "a later step"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_with_nan_changes_no_bit(options, first, value):
    job = made(options)
    if not first:
        job.step()(batch_of(1), 0)
    before = trained_bits(job)
    if not first:
        assert any(bits.abs().max() > 0 for bits in before[len(before) // 2 :]), "there is no momentum to lose"
    replace(job, teachers=NanTeachers(job.teachers, value)).step()(batch_of(2), 1)
    assert int(job.meter.skipped) == 1
    for now, then in zip(trained_bits(job), before, strict=True):
        assert torch.equal(now, then)

    job.step()(batch_of(3), 2)
    assert int(job.meter.skipped) == 1
    after = trained_bits(job)
    assert all(torch.isfinite(one).all() for one in after)
    assert not torch.equal(after[0], before[0]), "the run must go on"


def test_a_forward_pass_that_overflows_leaves_no_trace_in_batchnorm(options):
    """Running statistics are written in the forward pass, before anyone knows that the step will be skipped."""
    job = made(options)
    step = job.step()
    step(batch_of(1), 0)
    model = job.student.model
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    assert len(before) > 4
    hook = model.conv_stem.register_forward_hook(lambda module, inputs, output: output * math.inf)
    step(batch_of(2), 1)
    hook.remove()
    assert int(job.meter.skipped) == 1
    for name, then in before.items():
        assert torch.equal(model.get_buffer(name), then), name
    step(batch_of(3), 2)
    assert any(not torch.equal(model.get_buffer(name), then) for name, then in before.items()), "a good step moves them"


def with_bad_call(job: Job, number: int) -> Job:
    """The job with teachers that say NaN when they are called for the `number`-th time."""
    calls = []

    def say(images):
        calls.append(1)
        return (NanTeachers(job.teachers, math.nan) if len(calls) == number else job.teachers)(images)

    say.captured = False
    return replace(job, teachers=say)


def test_a_skipped_step_is_counted_and_leaves_the_log_finite(options):
    options |= {"max_steps": 4, "eval_every": 0, "eval_start": False, "log_every": 2}
    assert run(with_bad_call(made(options), 2))["skipped_steps"] == 1
    text = (RunDirectory(options["run_dir"]).path / "metrics.jsonl").read_text()
    assert "NaN" not in text, "no JSON parser but Python's reads NaN"
    lines = metrics(options["run_dir"], "train")
    assert [line["step"] for line in lines] == [1, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_window_of_skipped_steps_only_is_logged(options, capfd):
    options |= {"max_steps": 2, "eval_every": 0, "eval_start": False, "log_every": 1}
    assert run(with_bad_call(made(options), 1))["skipped_steps"] == 1
    first, second = metrics(options["run_dir"], "train")
    assert first["loss"] is None
    assert math.isfinite(second["loss"])
    logged = [line for line in capfd.readouterr().err.splitlines() if line.startswith("epoch 1/")]
    assert ["  skipped  step " in line for line in logged] == [True, False]


def test_outputs_of_a_run(options):
    options |= {"epochs": 1, "eval_every": 1}
    summary = train(make_recipe(**options))
    folder = RunDirectory(options["run_dir"])
    assert json.loads(folder.summary.read_text()) == summary
    assert summary["finished"]
    assert (summary["steps"], summary["total_steps"], summary["epochs"]) == (3, 3, 1)
    assert summary["skipped_steps"] == summary["quarantined_images"] == 0
    assert summary["replaced_images"] == {}
    assert summary["images_per_second"] > 0
    evaluations = metrics(options["run_dir"], "eval")
    assert [line["step"] for line in evaluations] == [0, 3]
    for line, name in zip(evaluations, ("start", "final"), strict=True):
        assert summary[name] == {key: value for key, value in line.items() if key != "kind"}
    assert [one["model"] for one in summary["teachers"]] == list(options["teachers"])
    assert summary["ensemble"]["images"] == 11

    config = json.loads(folder.config.read_text())
    assert config["recipe"] == make_recipe(**options).to_json()
    assert config["images"] == {"train": 25, "val": 11}
    assert set(config["teacher_digests"]) == set(options["teachers"])
    assert config["versions"]["torch"] == torch.__version__
    assert (config["processes"], config["device"], config["precision"], config["compiled"]) == (
        1,
        "cpu",
        "float32",
        False,
    )

    left = {path.name for path in folder.path.iterdir()}
    assert left == {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "student.safetensors", "summary.json"}


def test_the_student_loads_with_plain_timm_and_gives_the_same_logits(options):
    train(make_recipe(**options | {"epochs": 1, "eval_start": False}))
    state = final(options)["student"]
    ours = timm.create_model("test_efficientnet", num_classes=3).eval()
    ours.load_state_dict(state)
    plain = timm.create_model(
        "test_efficientnet", num_classes=3, checkpoint_path=str(RunDirectory(options["run_dir"]).student)
    ).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(ours(x), plain(x))
    start = torch.load(parse(options["student"]).checkpoint, weights_only=True)
    assert not torch.equal(start["conv_stem.weight"], plain.conv_stem.weight), "nothing was learned"


@pytest.fixture(scope="module")
def taught(tree, tmp_path_factory):
    """A teacher that labels alone have taught: its recipe's fields and what its run returned."""
    options = {
        "data": str(tree), "student": "test_resnet?num_classes=3", "hard_label_weight": 1.0, "size": 32, "epochs": 20,
        "batch_size": 8, "lr": 0.05, "lr_decay_epochs": (15,), "amp": "off", "compile": False, "device": "cpu",
        "loader": "pillow", "loader_threads": 2, "log_every": 20, "eval_every": 0,
        "run_dir": str(tmp_path_factory.mktemp("taught")),
    }  # fmt: skip
    return options, train(make_recipe(**options))


def test_labels_alone_need_no_teachers(taught):
    options, summary = taught
    assert summary["final"]["kl"] is None
    assert (summary["teachers"], summary["ensemble"]) == ([], None)
    lines = metrics(options["run_dir"], "train")
    assert summary["start"]["top1"] < 50 < 90 < summary["final"]["top1"]
    assert lines[-1]["loss"] < 0.5 * math.log(3), "half of what guessing one of three classes costs"
    for line in lines:
        assert line["soft_ce"] is line["kl"] is line["discriminator_loss"] is None
        assert line["loss"] == pytest.approx(line["hard_ce"], rel=1e-6)


def test_distilling_brings_the_student_to_its_teacher_without_labels(taught, options, tree, tmp_path):
    flat = tmp_path / "unlabelled"
    (flat / "train").mkdir(parents=True)
    for path in (tree / "train").glob("*/*.jpg"):
        (flat / "train" / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    shutil.copytree(tree / "val", flat / "val")
    options |= {
        "data": str(flat), "teachers": (f"test_resnet@{taught[0]['run_dir']}/student.safetensors",),
        "epochs": 20, "lr_decay_epochs": (15,), "log_every": 30, "eval_every": 0,
    }  # fmt: skip
    summary = train(make_recipe(**options))
    assert summary["start"]["kl"] > 0.1
    assert summary["final"]["kl"] < 0.5 * summary["start"]["kl"]


@pytest.mark.parametrize(
    ("amx", "avx512", "student", "expected"),
    [
        (True, True, "test_efficientnet", "bfloat16"),
        (False, True, "test_efficientnet", "float32"),  # depthwise convolutions, which are slower in bf16 there
        (False, True, "test_resnet", "bfloat16"),
        (False, False, "test_resnet", "float32"),
    ],
)
def test_auto_is_bf16_on_cpus_where_it_is_faster(
    fields, weights, tmp_path, monkeypatch, amx, avx512, student, expected
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    changes = {"amp": "auto", "student": f"{student}@{weights(student, 1)}", "run_dir": str(tmp_path)}
    runtime = runtimes.start("cpu")
    assert name_of(precision("auto", runtime.device)) == ("bfloat16" if avx512 else "float32")
    job, _, _ = make_job(make_recipe(**{**fields, **changes}), runtime, RunDirectory(tmp_path))
    assert job.student.precision == expected
    logits = job.student.logits(next(iter(job.loader(0, 1))).images)
    assert str(logits.dtype) == f"torch.{expected}"


@pytest.mark.parametrize("size", [26, 1000])
def test_more_images_a_batch_than_there_are_is_refused(options, size):
    with pytest.raises(UsageError, match=f"--batch-size {size}: .* holds only 25 training images: use --batch-size 8$"):
        made(options, batch_size=size)


def test_an_accumulation_that_does_not_divide_is_refused(options):
    with pytest.raises(UsageError, match="--batch-size 8: must be a multiple of processes x --accumulate = 1 x 3"):
        made(options, accumulate=3)


def test_frozen_parameters_stay_and_do_not_break_the_step(options):
    job = made(options)
    first = next(iter(job.student.model.parameters()))
    first.requires_grad_(False)
    before = first.clone()
    job.step()(batch_of(1), 0)
    assert torch.equal(first, before)
    assert np.isfinite(job.meter.sums.numpy()).all()


@pytest.mark.parametrize("room", [2 << 30, 0], ids=["kept", "no room"])
def test_teachers_run_in_the_first_evaluation_only(options, monkeypatch, room):
    monkeypatch.setattr(validation, "_ROOM", room)
    plain, calls = made(options), []

    def counting(images):
        calls.append(len(images))
        return plain.teachers(images)

    job = replace(plain, teachers=counting)
    validate = validation.Validation(job)
    first = validate()
    batches = len(calls)
    assert sum(calls) == 11
    job.step()(batch_of(1), 0)
    calls.clear()
    second = validate()
    assert len(calls) == (0 if room else batches)
    fresh = validation.Validation(job)()
    assert second == fresh, "what was kept is what the teachers say"
    assert second.kl != first.kl, "the student has moved"
    assert second.models[1:] == first.models[1:]
