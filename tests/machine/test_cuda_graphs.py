"""CUDA graphs: on a GPU for real; everywhere the host's part, with a stand-in that replays by calling again."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mealfast.errors import UsageError
from mealfast.machine import cuda_graphs
from mealfast.machine import processes as runtimes
from mealfast.recipe import make_recipe
from mealfast.record.run_directory import RunDirectory
from mealfast.training.assemble import make_job
from mealfast.training.loop import train

from ..runs import last, lines

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
ALL = {
    "cutmix": True,
    "hard_label_weight": 0.5,
    "epochs": 4,
    "lr_decay_epochs": (2, 3),
    "eval_every": 0,
    "log_every": 1,
}


@pytest.fixture
def stand_in(monkeypatch):
    """Captures nothing and replays by calling: what a replay reads must then come from the tensors copied into."""
    captured = []

    def capture(function):
        captured.append(function)
        return SimpleNamespace(replay=function), None

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "on_side_stream", lambda function: function())
    monkeypatch.setattr("mealfast.training.assemble._check_cuda_graphs", lambda *of: None)
    return captured


def final(run_dir: str | Path) -> dict:
    return last(run_dir)["student"]


@pytest.mark.parametrize("changes", [ALL, {**ALL, "accumulate": 2, "hard_label_weight": 0.0}], ids=["labels", "parts"])
def test_a_replayed_step_sees_lr_batch_and_cutmix(fields, tmp_path, stand_in, changes):
    """A learning rate, a box or a batch baked in at capture would part the runs within a step or two."""
    for mode in ("off", "step"):
        train(make_recipe(**{**fields, **changes, "run_dir": str(tmp_path / mode), "cuda_graphs": mode}))
    assert len(stand_in) == 1
    off, step = lines(tmp_path / "off"), lines(tmp_path / "step")
    assert len(off) > cuda_graphs.WARM_UP + 4
    assert len({line["lr"] for line in off if line["kind"] == "train"}) == 3
    for a, b in zip(off, step, strict=True):
        for key in ("loss", "lr", "step", "hard_ce"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)  # float32 learning rates
    for name, tensor in final(tmp_path / "off").items():
        torch.testing.assert_close(final(tmp_path / "step")[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_captures_anew(fields, tmp_path, stand_in):
    settings = {**fields, **ALL, "cuda_graphs": "step"}
    train(make_recipe(**settings, run_dir=str(tmp_path / "whole")))
    train(make_recipe(**settings, run_dir=str(tmp_path / "parts"), max_steps=5))
    train(make_recipe(**settings, run_dir=str(tmp_path / "parts")))
    for name, tensor in final(tmp_path / "whole").items():
        assert torch.equal(final(tmp_path / "parts")[name], tensor), name
    group = last(tmp_path / "parts")["optimizer"]["param_groups"][0]
    assert isinstance(group["lr"], float), "a checkpoint holds numbers, for runs with and without graphs"


def test_a_run_says_what_of_it_a_graph_replayed(fields, tmp_path, stand_in):
    for mode, steps, graph in (("off", 8, None), ("step", 8, "step"), ("step", 2, None)):  # too short to capture
        run = {"run_dir": str(tmp_path / f"{mode}{steps}"), "cuda_graphs": mode, "max_steps": steps, "epochs": 4}
        summary = train(make_recipe(**{**fields, **run}))
        assert (summary["cuda_graph"], summary["compiled"]) == (graph, False)


def test_a_broken_capture_leaves_the_callers_stream(monkeypatch):
    """torch 2.11 leaves `torch.cuda.graph` by an exception of ending the capture before it puts the stream back."""
    current = ["the caller's"]

    class Stream:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *error):
            current[0] = self.before

    class Graph:
        def __init__(self, graph, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            current[0] = "the capture's"

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, fake in {
        "CUDAGraph": object, "current_stream": lambda: current[0], "stream": Stream, "graph": Graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    seen = []
    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graphs.capture(lambda: seen.append(current[0]))
    assert seen == ["the capture's"]
    assert current == ["the caller's"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cuda_graphs": "step"}, "--cuda-graphs step needs a GPU"),
        ({"cuda_graphs": "ensemble"}, "--cuda-graphs ensemble needs a GPU"),
    ],
    ids=str,
)
def test_what_cannot_be_captured_is_refused(fields, tmp_path, changes, why):
    with pytest.raises(UsageError, match=why):
        train(make_recipe(**{**fields, **changes, "run_dir": str(tmp_path)}))


class TestOnAGpu:
    pytestmark = needs_gpu

    def test_captured_teachers_say_the_same(self, fields, tmp_path, exact_cuda):
        recipe = make_recipe(**{**fields, "device": "cuda", "amp": "off", "run_dir": str(tmp_path)})
        runtime = runtimes.start("cuda")
        job, _, _ = make_job(recipe, runtime, RunDirectory(recipe.run_dir))
        ensemble = job.teachers
        assert ensemble._captured is not None
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator).cuda()
            for ours, eager in zip(ensemble(images), ensemble.run(images), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3 * float(eager.abs().max()))

    @pytest.mark.parametrize(
        ("changes", "tolerance"),
        [
            ({"compile": False, "loader": "pillow"}, 1e-3),
            ({"compile": True, "loader": "dali"}, 1e-3),
            ({"compile": False, "loader": "dali", "accumulate": 2, "discriminator": "adversarial"}, 1e-3),
            # A bit that rounds otherwise is 1% of the loss a step later, and 20% after ten.
            ({"compile": True, "loader": "dali", "amp": "bf16"}, 0.4),
        ],
        ids=["eager", "compiled", "parts", "bf16"],
    )
    def test_the_losses_are_those_without_graphs(self, fields, tmp_path, exact_cuda, changes, tolerance):
        gpu = {"device": "cuda", "lr": 1e-3, "tune_teachers": False}
        for mode in ("off", "ensemble", "step"):
            settings = {**fields, **ALL, **gpu, **changes, "cuda_graphs": mode}
            train(make_recipe(**settings, run_dir=str(tmp_path / mode)))
        for mode in ("ensemble", "step"):
            for a, b in zip(lines(tmp_path / "off"), lines(tmp_path / mode), strict=True):
                if a["kind"] == "train":
                    assert b["loss"] == pytest.approx(a["loss"], rel=tolerance), (mode, a["step"])

    def test_a_replayed_step_does_not_wait_for_the_device(self, fields, tmp_path):
        settings = {**fields, **ALL, "device": "cuda", "cuda_graphs": "step", "run_dir": str(tmp_path)}
        recipe = make_recipe(**settings)
        job, _, _ = make_job(recipe, runtimes.start("cuda"), RunDirectory(recipe.run_dir))
        loader, train_step = job.loader(0, 8), job.step()
        try:
            for step, batch in enumerate(loader):
                torch.cuda.set_sync_debug_mode("error" if step > cuda_graphs.WARM_UP else "default")
                train_step(batch, step)
                torch.cuda.set_sync_debug_mode("default")
        finally:
            torch.cuda.set_sync_debug_mode("default")
            loader.close()
