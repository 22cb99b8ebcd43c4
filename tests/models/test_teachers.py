"""The ensemble as it runs: folded, laid out by measurement, remembered, checked against eager float32."""

import json

import pytest
import timm
import torch
from torch import nn

from mealfast.__main__ import dispatch
from mealfast.cli.endings import run_command
from mealfast.errors import UsageError
from mealfast.machine import processes as runtimes
from mealfast.models import layout as teacher_layout
from mealfast.models import normalised as models
from mealfast.models import parity
from mealfast.models import tuning as teacher_setup
from mealfast.models.ensemble import FrozenEnsemble
from mealfast.models.layout import Layout, LayoutStore, choose
from mealfast.recipe import make_recipe
from mealfast.record.checkpoint import newest
from mealfast.record.run_directory import RunDirectory
from mealfast.training.loop import Run, train

CPU = runtimes.start("cpu")
LAYOUTS = [Layout(memory, dtype, False) for memory in teacher_layout.FORMATS for dtype in ("float32", "bfloat16")]


def loaded(weights, *architectures):
    return [models.build(f"{name}@{weights(name, seed)}", 32) for seed, name in enumerate(architectures)]


@pytest.fixture
def images():
    return torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_says_what_timms_model_says(weights, images, layout):
    path = weights("test_resnet", 4)
    reference = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(path)).eval()
    config = timm.data.resolve_model_data_config(reference)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = reference((images.permute(0, 3, 1, 2) / 255 - mean) / std)
    ensemble = FrozenEnsemble(
        [models.build(f"test_resnet@{path}", 32)], CPU, compile=False, layouts=[layout]
    )  # fmt: skip
    (logits,) = ensemble(images)
    atol = (1e-5 if layout.dtype == "float32" else 0.03) * float(expected.abs().max())
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=atol)
    convolution = next(module for module in ensemble.module.modules() if isinstance(module, nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=teacher_layout.FORMATS[layout.memory_format])
    assert convolution.weight.dtype == teacher_layout.DTYPES[layout.dtype]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ensemble.module.modules())
    assert not any(p.requires_grad for p in ensemble.module.parameters())


def test_the_fastest_layout_is_chosen_and_a_tie_goes_to_the_default():
    times = {("channels_last", "bfloat16"): 1.0, ("contiguous", "bfloat16"): 0.8, ("contiguous", "float32"): 0.79}
    cpu = torch.device("cpu")
    default = teacher_layout.default_layout("bfloat16", compile=False)
    choice = choose(lambda one: times[one.memory_format, one.dtype], default, cpu, batch=8)
    assert choice.layout == Layout("contiguous", "bfloat16", False), "float32 is 1% faster: noise"
    assert choice.images_per_second[str(choice.layout)] == 10.0
    assert len(choice.images_per_second) == 3
    tried = []
    choose(lambda one: tried.append(one) or 1.0, teacher_layout.default_layout("float32", compile=True), cpu, batch=8)
    assert tried == [
        Layout("channels_last", "float32", True), Layout("contiguous", "float32", True),
        Layout("channels_last", "float32", False),
    ]  # fmt: skip


def test_a_gpu_does_not_try_float32_and_slow_measurements_end(monkeypatch):
    what = teacher_layout.default_layout("bfloat16", compile=True), torch.device("cuda", 0)
    found = choose(lambda one: 1.0, *what, batch=8)
    assert list(found.images_per_second) == [
        "channels_last, bfloat16, compiled", "contiguous, bfloat16, compiled", "channels_last, bfloat16, eager"
    ]  # fmt: skip
    monkeypatch.setattr(teacher_layout, "ENOUGH", -1.0)
    assert len(choose(lambda one: 1.0, *what, batch=8).images_per_second) == 1


def test_a_choice_is_remembered_and_a_damaged_memory_made_anew(tmp_path):
    store = LayoutStore(tmp_path / "deep" / "layouts.json")
    choice = teacher_layout.Choice(Layout("contiguous", "float32", False), {"a": 1.5})
    assert store.get("key", False) is None
    store.put("key", choice)
    store.put("other", choice)
    found = store.get("key", False)
    assert (found.layout, found.images_per_second, found.remembered) == (choice.layout, {"a": 1.5}, True)
    unknown = {"layout": {"memory_format": "rows", "dtype": "float32", "compiled": False}, "images_per_second": {}}
    entries = (1, {"layout": {"memory_format": "contiguous"}}, unknown)
    for damage in (b"{", b"[]", b"\xff\xfe", *(json.dumps({"key": entry}).encode() for entry in entries)):
        store.path.write_bytes(damage)
        assert store.get("key", False) is None, damage
    store.put("key", choice)
    assert store.get("key", False).layout == choice.layout


def test_a_key_names_all_that_a_choice_depends_on(images):
    def key(spec="a.b@x.pth", images=images, dtype="float32", compile=False):
        default = teacher_layout.default_layout(dtype, compile)
        return teacher_layout.key_of(spec, images, torch.device("cpu"), default)

    keys = {key(), key("a.c@x.pth"), key(images=images[:4]), key(dtype="bfloat16"), key(compile=True)}
    assert len(keys) == 5
    assert key("a.b@y.pth") in keys, "the weights decide no speed"
    assert all(torch.__version__ in key and timm.__version__ in key for key in keys)


def test_a_run_prints_keeps_and_reuses_its_layouts(options, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options |= {"max_steps": 1, "eval_start": False}
    train(make_recipe(**options))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("teacher ")]
    config = json.loads((RunDirectory(options["run_dir"]).path / "config.json").read_text())
    assert len(said) == len(config["teachers"]) == 2
    for line, teacher in zip(said, config["teachers"], strict=True):
        assert teacher["model"] in line
        assert "agree with eager float32" in line
        assert len(teacher["images_per_second"]) == 2
        assert min(teacher["images_per_second"].values()) > 0
        assert teacher["parity"]["agreement"] == 1.0
        assert teacher["parity"]["mean_difference"] < 1e-5, "folding rounds, and no more than that"
        assert teacher["parity"]["images"] == 8
    # Another run finds what was measured; the same run keeps it even where the memory now says otherwise.
    store = LayoutStore()
    for teacher in config["teachers"]:
        assert store.get(teacher["key"], False).to_json()["layout"] == teacher["layout"]
        other = "contiguous" if teacher["layout"]["memory_format"] == "channels_last" else "channels_last"
        store.put(teacher["key"], teacher_layout.Choice(Layout(other, "float32", False), {}))
    run = Run(make_recipe(**options), CPU, RunDirectory(options["run_dir"]))
    assert run.layouts == newest(run.directory.checkpoints)[1]["layouts"]
    for report, teacher in zip(run.teacher_reports, config["teachers"], strict=True):
        assert report.to_json()["layout"] == teacher["layout"]
    fresh = Run(make_recipe(**{**options, "run_dir": str(tmp_path / "new")}), CPU, RunDirectory(tmp_path / "new"))
    for report, teacher in zip(fresh.teacher_reports, config["teachers"], strict=True):
        assert report.to_json()["layout"] != teacher["layout"]
        assert report.choice.remembered


def test_without_tuning_nothing_is_measured(options, monkeypatch):
    monkeypatch.setattr(teacher_setup, "measure_layouts", None)
    run = Run(make_recipe(**options, tune_teachers=False), CPU, RunDirectory(options["run_dir"]))
    assert {str(report.choice.layout) for report in run.teacher_reports} == {"channels_last, float32, eager"}


def parities(logits, reference):
    return parity.compare(["t"], [torch.tensor(logits)], [torch.tensor(reference)], CPU)


def test_parity_is_the_mean_difference_and_the_share_that_agrees():
    reference = [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]
    (found,) = parities([[0.0, 2.0, 0.0], [0.0, 1.0, 0.0]], reference)
    p, q = torch.tensor([1.0, 0, 0]).softmax(0), torch.tensor([0, 1.0, 0]).softmax(0)
    assert found.mean_difference == pytest.approx(float((p - q).abs().sum()) / 6, rel=1e-6)
    assert (found.agreement, found.agreement_or_tie, found.images) == (0.5, 0.5, 2)
    (tie,) = parities([[0.0, 0.01, 0.0]], [[0.01, 0.0, 0.0]])
    assert (tie.agreement, tie.agreement_or_tie) == (0.0, 1.0)
    parity.check([tie], torch.float32)
    with pytest.raises(UsageError, match=r"--teachers t: .*50\.0% of 2 images agree"):
        parity.check([found], torch.float32)
    (shifted,) = parities([[0.0, 2.2, 0.0]], [[0.0, 2.0, 0.0]])  # the same class first, with other probabilities
    with pytest.raises(UsageError, match=r"100\.0% of 1 images agree.* probabilities 2\.\de-02"):
        parity.check([shifted], torch.float32)


def test_a_teacher_that_needs_float32_gets_it(options, weights, needs_float32, capfd):
    specs = (f"test_resnet@{needs_float32}", f"test_resnet@{weights('test_resnet', 3)}")
    run = Run(make_recipe(**{**options, "teachers": specs, "amp": "bf16"}), CPU, RunDirectory(options["run_dir"]))
    fine, other = run.teacher_reports
    assert (fine.choice.layout.dtype, fine.parity.agreement) == ("float32", 1.0)
    assert "bfloat16" in str(other.choice.images_per_second)
    (note,) = (line for line in capfd.readouterr().err.splitlines() if "is taken in float32" in line)
    assert str(needs_float32) in note
    dtypes = [next(teacher.model.parameters()).dtype for teacher in run.parts.teachers.module.teachers]
    assert dtypes == [torch.float32, teacher_layout.DTYPES[other.choice.layout.dtype]]


def test_non_finite_teachers_are_refused_with_what_helps():
    (nan,) = parities([[float("nan"), 0.0]], [[float("nan"), 0.0]])
    with pytest.raises(UsageError, match="non-finite logits on training images: its weights are damaged"):
        parity.check([nan], torch.float32)
    (overflow,) = parities([[float("inf"), 0.0]], [[1.0, 0.0]])
    with pytest.raises(UsageError, match="non-finite logits in bfloat16: use --amp off"):
        parity.check([overflow], torch.bfloat16)


def test_a_teacher_that_breaks_on_real_images_is_refused_by_the_command(options, weights, tmp_path, capfd):
    """Finite on the grey image that every model is tried on, NaN on photographs: 1e38 times what differs from grey."""
    state = torch.load(weights("test_resnet", 2), weights_only=True)
    name = next(key for key, tensor in state.items() if tensor.ndim == 4)
    kernel = torch.zeros_like(state[name])
    kernel[:, :, 1, 1], kernel[:, :, 1, 0] = 3e38, -3e38  # 0 on any flat image but for its padded border
    state[name] = kernel
    torch.save(state, tmp_path / "edges.pth")
    options["teachers"] = (f"test_resnet@{tmp_path / 'edges.pth'}",)
    argv = ["train"]
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            argv += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    assert run_command(dispatch, argv) == 2
    err = capfd.readouterr().err.strip().splitlines()
    assert "non-finite logits" in err[-1]
    assert "edges.pth" in err[-1]
