"""Files and folders that say of which model they are: mealfast's own, timm's, and those of someone who means harm."""

import json
import os
import pickle

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from mealfast.errors import UsageError
from mealfast.models import normalised as models
from mealfast.models import weights as weights_files
from mealfast.models.description import KEY, Description
from mealfast.models.spec import parse, without_folders

CLASSES = ("c2", "a0", "B\ud800\x1b")  # of a file system, whatever its bytes
NAMES = ("ant", "bee", "cat")


def made(classes=CLASSES, spec="test_efficientnet?num_classes=3&drop_rate=0.25"):
    """A model with random weights whose BatchNorms have seen something."""
    torch.manual_seed(3)
    model = models.build(spec, 32)
    model(torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8))
    model.classes = classes
    return model.eval()


def saved(path, model, **changes):
    description = model.description(32, [{"spec": "t.pth", "digest": "ab"}])
    weights_files.save(model.model, path, Description(**{**vars(description), **changes}))
    return path


def logits(model):
    torch.manual_seed(4)
    with torch.inference_mode():
        return model.eval()(torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8))


def refusal(spec) -> str:
    with pytest.raises(UsageError) as refused:
        models.build(str(spec), 32)
    message = str(refused.value)
    assert message.isprintable()
    assert len(message) < 800
    return message


# -- mealfast's own ---------------------------------------------------------------------------------------------------


def test_a_students_file_explains_itself(tmp_path):
    model = made()
    path = saved(tmp_path / "student.safetensors", model, mean=(0.5, 0.25, 0.125), std=(0.1, 0.2, 0.3))
    model.scale.copy_(1 / (255 * torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)))
    model.shift.copy_(-(torch.tensor([0.5, 0.25, 0.125]) / torch.tensor([0.1, 0.2, 0.3])).view(1, 3, 1, 1))
    (tmp_path / "config.json").write_text("{}")
    for spec in (path, tmp_path, f"test_efficientnet@{tmp_path}", f"test_efficientnet@{path}"):
        found = models.build(str(spec))
        assert (found.classes, found.num_classes, found.trained_size, found.size) == (CLASSES, 3, 32, 32)
        torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-6)
    assert models.build(str(path)).kwargs == {"drop_rate": 0.25, "num_classes": 3}
    assert models.build(f"{path}?drop_rate=0.5").kwargs["drop_rate"] == 0.5
    plain = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(path))
    assert models.digest(plain) == models.digest(models.build(str(path)).model)
    assert not models.is_random(str(path))


def test_equal_models_are_equal_files_that_safetensors_reads(tmp_path):
    model = made()
    content = {saved(tmp_path / f"{n}.safetensors", model).read_bytes() for n in range(8)}
    assert len(content) == 1
    (data,) = content
    assert {key: value.tolist() for key, value in safetensors.torch.load(data).items()} == {
        key: value.tolist() for key, value in model.model.state_dict().items()
    }
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert list(header["__metadata__"]) == ["format", KEY]
    assert Description.loads(header["__metadata__"][KEY]).classes == CLASSES


def test_a_checkpoint_explains_itself(tmp_path):
    model = made()
    content = {"format": "mealfast-checkpoint-1", "step": 1, "student": model.model.state_dict()}
    torch.save(content, tmp_path / "old.pt")
    assert refusal(tmp_path / "old.pt").endswith(f"is a file; say of which architecture: NAME@{tmp_path / 'old.pt'}")
    torch.save(content | {"model": model.description(32).to_json()}, tmp_path / "new.pt")
    found = models.build(str(tmp_path / "new.pt"))
    assert found.classes == CLASSES
    assert torch.equal(logits(found), logits(model))


def test_a_run_is_meant_only_where_timm_has_no_such_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("test_resnet", "mine"):
        (tmp_path / name).mkdir()
        saved(tmp_path / name / "student.safetensors", made())
    assert (parse("test_resnet").source, parse("mine").source, parse("./test_resnet").source) == ("", "path", "path")
    assert models.build("mine").architecture == "test_efficientnet"
    (tmp_path / "mine" / "student.safetensors").unlink()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "checkpoints").mkdir()
    (tmp_path / "mine" / "checkpoints" / "best.pt").touch()
    assert refusal("mine").endswith(
        "without student.safetensors; name one of its checkpoints: mine/checkpoints/best.pt"
    )


def test_a_transformers_file_takes_its_own_size_alone(tmp_path):
    path = saved(tmp_path / "student.safetensors", made(NAMES, "test_vit3?num_classes=3"))
    models.probe(models.build(str(path)), str(path), 32)
    with pytest.raises(UsageError, match=r"cannot take 64 x 64 pixels: .*; change --size"):
        models.probe(models.build(str(path), 64), str(path), 64)


def test_specs_without_folders():
    wanted = {
        "a/b.pth": "b.pth", "resnet18@/x/y/w.pth": "resnet18@w.pth", "runs/a/": "a", "local-dir:/x/y": "local-dir:y",
        "hf-hub:timm/x": "hf-hub:timm/x", "resnet18.tv_in1k": "resnet18.tv_in1k",
    }  # fmt: skip
    assert {text: without_folders(text) for text in wanted} == wanted


# -- timm's -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    """A folder that timm has saved a model in, and the model."""
    model = timm.create_model("test_resnet", num_classes=3, drop_rate=0.1).eval()
    save_for_hf(model, tmp_path / "exported", model_config={"label_names": list(NAMES)}, safe_serialization=True)
    return tmp_path / "exported", model


def test_a_folder_of_timms(exported):
    folder, model = exported
    for spec in (f"local-dir:{folder}", str(folder)):
        found = models.build(spec).eval()
        assert (found.classes, found.architecture) == (NAMES, "test_resnet")
        assert models.digest(found) == models.digest(models.NormalizedModel(model, (0, 0, 0), (1, 1, 1), 32))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(theirs)
    ours, wanted = (
        (found.mean, found.std, found.trained_size),
        (config["mean"], config["std"], config["input_size"][-1]),
    )
    assert ours == (tuple(wanted[0]), tuple(wanted[1]), wanted[2])


def test_a_repository_of_the_hub_from_its_clients_cache(exported, tmp_path, monkeypatch):
    """No network here: the client's cache, laid out as it lays it out."""
    folder, _ = exported
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--birds" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for name in os.listdir(folder):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    found = models.build("hf-hub:someone/birds?drop_rate=0.5")
    assert (found.classes, found.kwargs["drop_rate"]) == (NAMES, 0.5)
    assert models.digest(found) == models.digest(models.build(str(folder)))
    assert refusal("hf-hub:someone/fish").startswith(
        "model spec 'hf-hub:someone/fish': could not be downloaded (the network cannot be reached)"
    )
    (snapshot / "model.safetensors").unlink()
    assert "holds none of model.safetensors, pytorch_model.bin" in refusal("hf-hub:someone/birds")


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_weights_of_a_folder_run_no_code(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, model = exported
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Harm()}))
    refusal(folder)
    torch.save({**model.state_dict(), "fc.weight": Harm()}, folder / "pytorch_model.bin")
    assert "cannot be read" in refusal(f"local-dir:{folder}")
    assert not (tmp_path / "harm").exists()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert models.build(str(folder)).classes == NAMES


def test_what_a_folder_may_not_say(exported):
    folder, _ = exported
    config = json.loads((folder / "config.json").read_text())
    inner = config["pretrained_cfg"]
    cases = [
        ({"architecture": "no_such\x1b[2J"}, "timm has no architecture"),
        ({"architecture": ["resnet18"]}, "its architecture must be a text"),
        ({"model_args": {"pretrained_cfg": "x"}}, "pretrained_cfg cannot be set"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path cannot be set"),
        ({"model_args": {"a b": 1}}, "is no name of an argument"),
        ({"model_args": {"layers": [10**9]}}, "layers must be a number, a text or a list of them, and small"),
        ({"model_args": [1]}, "pretrained_cfg and model_args must be objects"),
        ({"num_classes": "3"}, "its num_classes must be 1 or more"),
        ({"pretrained_cfg": {**inner, "std": [0, 1, 1]}}, "its std must be three numbers"),
        ({"pretrained_cfg": {**inner, "mean": [[], 1, 1]}}, "its mean must be three numbers"),
        ({"pretrained_cfg": {**inner, "input_size": [3, "x", "x"]}}, "its size must be from 1 to 8192"),
        ({"num_classes": 5}, "fc.weight has shape [3"),
    ]
    for change, why in cases:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert why in refusal(f"local-dir:{folder}"), change
    for text in ("[" * 100_000, "[]", "\xff", "{}"):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        assert "is no config.json of a timm model" in refusal(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ({"0": "ant", "1": "bee", "2": "cat"}, NAMES), (["a", "a", "b"], None), (["a", "b"], None), ("abc", None),
        (None, None), ({"0": "ant", "2": "cat"}, None),
    ],
)  # fmt: skip
def test_label_names_count_where_they_tell_all_outputs_apart(exported, names, wanted):
    folder, _ = exported
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_names": names}))
    assert models.build(str(folder)).classes == wanted


# -- what a file may not say of itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"classes": ["a", "a", "b"]}, "class names must differ"), ({"classes": ["a", 2, "b"]}, "must be texts"),
        ({"classes": []}, "must be a list of 1 to"), ({"classes": ["x" * 2000]}, "at most 1000 characters"),
        ({"classes": ["a", "b"]}, "has 3 outputs, but its file names 2 classes"),
        ({"size": 0}, "its size must be"), ({"size": True}, "its size must be"),
        ({"mean": [1, 2]}, "its mean must be"), ({"std": [1, 1, float("nan")]}, "its std must be"),
        ({"kwargs": {"checkpoint_path": "x"}}, "checkpoint_path cannot be set"),
        ({"kwargs": {"num_classes": 1 << 40}}, "and small"), ({"kwargs": {"x": [[[[[1]]]]]}}, "must be a number"),
        ({"kwargs": []}, "kwargs must be an object"), ({"architecture": None}, "architecture must be a text"),
        ({"teachers": [{"spec": 1, "digest": ""}]}, "teachers must be specs"), ({"teachers": 3}, "teachers must be a"),
    ],
)  # fmt: skip
def test_a_damaged_description_is_one_line(tmp_path, change, why):
    model = made(NAMES)
    text = json.dumps({**model.description(32).to_json(), **change})
    state = {key: value.contiguous() for key, value in model.model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "s.safetensors", {"format": "pt", KEY: text})
    assert why in refusal(tmp_path / "s.safetensors")


def test_descriptions_that_are_no_objects():
    for text in ("[" * 100_000, "3", "null", "{", "x" * (1 << 25)):
        with pytest.raises(ValueError, match=r"."):
            Description.loads(text)
    later = {**made(NAMES).description(32).to_json(), "of a later mealfast": 1}
    assert Description.of(later).classes == NAMES
