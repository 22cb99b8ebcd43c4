"""Model specs, weights files and the module that normalises for itself, against timm's own ways."""

import argparse
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from mealfast.errors import UsageError
from mealfast.models import normalised as models
from mealfast.models import weights
from mealfast.models.random_weights import require_weights
from mealfast.models.spec import parse


def refusal(spec, size=None) -> str:
    """The one line that building a spec is refused with."""
    with pytest.raises(UsageError) as caught:
        models.build(spec, size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("resnet50", ("resnet50", "", {}, "")),
        ("senet154.gluon_in1k", ("senet154", "gluon_in1k", {}, "")),
        ("resnet18@a/b.pth", ("resnet18", "", {}, "a/b.pth")),
        ("m?pad_type=same@v2.safetensors", ("m", "", {"pad_type": "same"}, "v2.safetensors")),
        (
            "m.t?a=1&b=0.5&c=true&d=None&e=(1,2)&f=x.y@./odd?na&me=1@2.pt",
            ("m", "t", {"a": 1, "b": 0.5, "c": True, "d": None, "e": (1, 2), "f": "x.y"}, "./odd?na&me=1@2.pt"),
        ),
    ],
)
def test_the_grammar_of_specs(text, parsed):
    spec = parse(text)
    assert (spec.architecture, spec.tag, spec.kwargs, spec.checkpoint) == parsed
    assert spec.text == text


@pytest.mark.parametrize(
    "text", ["", "@a.pth", ".tag", "resnet18@", "resnet18?", "resnet18?a", "resnet18?1a=2", "?a=1"]
)
def test_what_does_not_follow_the_grammar_is_refused(text):
    assert refusal(text).startswith(f"model spec {text!r}: ")


# -- preprocessing and real weights ----------------------------------------------------------------------------------

# Data of the packages, computed once through timm's own evaluation transform (bicubic, crop 0.875).
LITE0 = {243: 10.1451, 242: 9.1268, 676: 4.3086}


def test_a_model_behind_its_normalisation_is_timms_transform_and_model(lite, photos):
    """Every other photo, lite0, whose mean and std are 0.5; resize and crop are timm's here on both sides."""
    model = models.build(f"tf_efficientnet_lite0@{lite['tf_efficientnet_lite0']}").eval()
    plain = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(lite["tf_efficientnet_lite0"])).eval()
    config = timm.data.resolve_model_data_config(plain)
    transform = timm.data.create_transform(**config, is_training=False)
    crop = transform.transforms[:2]
    paths = sorted(photos.glob("*/*.jpg"), key=lambda path: path.name)[::2]
    assert len(paths) == 10
    images = [Image.open(path).convert("RGB") for path in paths]
    pixels = np.stack([np.asarray(crop[1](crop[0](image))) for image in images])
    with torch.inference_mode():
        ours = model(torch.from_numpy(pixels))
        theirs = plain(torch.stack([transform(image) for image in images]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))
    assert paths[0].name == "imagenet_00_243.jpg"
    top = ours[0].topk(3)
    assert top.indices.tolist() == list(LITE0)
    assert top.values.tolist() == pytest.approx(list(LITE0.values()), abs=2e-4)


@pytest.mark.parametrize(("name", "mean"), [("test_resnet", 0.5), ("resnet10t", 0.485), ("tf_efficientnet_lite0", 0.5)])
def test_mean_and_std_are_each_models_own(name, mean):
    model = models.build(f"{name}?num_classes=2").eval()
    config = timm.data.resolve_model_data_config(model.model)
    assert config["mean"][0] == mean or name == "test_resnet"
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    x = images.double() / 255
    x = (x - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    with torch.inference_mode():
        torch.testing.assert_close(model(images), model.model(x.permute(0, 3, 1, 2).float()), rtol=1e-4, atol=1e-5)


def test_state_dict_keys_are_timms():
    model = models.build("test_efficientnet?num_classes=4")
    assert set(model.model.state_dict()) == set(timm.create_model("test_efficientnet", num_classes=4).state_dict())
    assert {key.removeprefix("model.") for key in model.state_dict()} == set(model.model.state_dict())
    assert model.num_classes == 4


# -- weights files ---------------------------------------------------------------------------------------------------

NAME = "test_resnet"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(5)
    return timm.create_model(NAME, num_classes=7).state_dict()


def check_loaded(spec: str, state: dict) -> None:
    model = models.build(spec)
    assert model.num_classes == 7
    for key, tensor in model.model.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".safetensors"])
def test_files_of_every_kind_load_and_tell_the_number_of_classes(state, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    check_loaded(f"{NAME}@{path}", state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
        lambda state: {key: value for key, value in state.items() if "num_batches_tracked" not in key},
    ],
    ids=["state_dict", "model, timm's arguments", "DataParallel", "average first", "before BatchNorm counted"],
)
def test_nested_and_prefixed_files_load(state, tmp_path, wrap):
    torch.save(wrap(state), tmp_path / "w.pth")
    check_loaded(f"{NAME}@{tmp_path / 'w.pth'}", state)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    assert refusal(f"{NAME}@{path}").startswith(f"checkpoint {path} is not one of {NAME}: ")


def test_weights_of_another_width_are_refused_with_the_shapes(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    message = refusal(f"{NAME}?num_classes=9@{tmp_path / 'w.pth'}")
    assert "has shape [7, " in message
    assert "not [9, " in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "letters", "empty"])
def test_damaged_files_are_refused(state, tmp_path, suffix, damage):
    path = tmp_path / f"w{suffix}"
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "text": b"<html>404 Not Found</html>" * 9,
            "letters": b"abc" * 99,
            "empty": b"",
        }[damage]
    )
    message = refusal(f"{NAME}@{path}")
    assert message.startswith(f"checkpoint {path}: cannot be read (")


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"state_dict": {}}, {"a": 1}, {1: torch.zeros(3)}, torch.zeros(3)], ids=str
)
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert refusal(f"{NAME}@{tmp_path / 'w.pth'}").startswith(f"checkpoint {tmp_path / 'w.pth'}: holds no state dict")


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", ["zip", "pickle"])
def test_code_in_a_file_does_not_run(state, tmp_path, protocol):
    path, trace = tmp_path / "w.pth", tmp_path / "it-ran"
    content = {"state_dict": state, "extra": Bomb(trace)}
    if protocol == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Bomb(trace)}, protocol=2))
    message = refusal(f"{NAME}@{path}")
    assert not trace.exists()
    assert message.startswith(f"checkpoint {path}: cannot be read (it ")
    if protocol == "zip":
        assert "loading it could run code" in message
    torch.load(path, weights_only=False) if protocol == "zip" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the bomb is a dud: the test shows nothing"


def test_code_does_not_run_through_timms_own_arguments_either(state, tmp_path):
    path, trace = tmp_path / "w.pth", tmp_path / "it-ran"
    torch.save({"state_dict": state, "extra": Bomb(trace)}, path)
    message = refusal(f"{NAME}?num_classes=7&checkpoint_path={path}")
    assert "checkpoint_path cannot be set; weights are NAME.TAG or NAME@FILE" in message
    assert not trace.exists()


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(f"{NAME}@{tmp_path / 'none.pth'}") == f"checkpoint {tmp_path / 'none.pth'}: no such file"
    folder = refusal(f"{NAME}@{tmp_path}")
    assert folder.startswith(f"checkpoint {tmp_path}: is a folder without student.safetensors; name one")


# -- names -----------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_is_refused_with_near_names():
    assert "did you mean resnet50" in refusal("resnet5o")
    assert "no architecture 'zzzz'" in refusal("zzzz")


def test_an_unknown_tag_is_refused_with_the_known_ones():
    message = refusal("resnet18.nope")
    assert "no tag 'nope'" in message
    assert "tv_in1k" in message


@pytest.mark.parametrize(
    "spec",
    [
        f"{NAME}?nonsense=1",
        f"{NAME}?num_classes=abc",
        f"{NAME}?in_chans=1",
        f"{NAME}?pretrained=true",
        f"{NAME}?features_only=true",
    ],
)
def test_bad_keyword_arguments_are_refused(spec):
    assert refusal(spec).startswith(f"model spec {spec!r}: ")


def test_no_network_is_one_line_that_says_how_to_get_the_weights(monkeypatch, tmp_path):
    def unreachable(*_args, **_kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_args, **_kwargs: None)
    message = refusal("resnet18.tv_in1k")
    assert message.startswith("the weights of resnet18.tv_in1k could not be downloaded")
    assert "resnet18.tv_in1k@FILE" in message


def test_a_tag_with_a_file_needs_no_network(lite):
    config = timm.models.get_pretrained_cfg("tf_efficientnet_lite0.in1k")
    model = models.build(f"tf_efficientnet_lite0.in1k@{lite['tf_efficientnet_lite0']}")
    assert models.evaluation_config(model) == {
        "size": config.input_size[-1],
        "crop_pct": config.crop_pct,
        "interpolation": config.interpolation,
    }


# -- ensembles and sizes ---------------------------------------------------------------------------------------------


def test_the_same_weights_twice_are_refused(weights, tmp_path):
    first = weights("test_resnet", 2)
    copy = tmp_path / "renamed.pth"
    copy.write_bytes(first.read_bytes())
    specs = [f"test_resnet@{path}" for path in (first, weights("test_resnet", 3), copy)]
    digests = [models.digest(models.build(spec)) for spec in specs]
    assert digests[0] == digests[2] != digests[1]
    models.check_distinct(specs[:2], digests[:2])
    with pytest.raises(UsageError, match="have the same weights") as caught:
        models.check_distinct(specs, digests)
    assert specs[0] in str(caught.value)
    assert specs[2] in str(caught.value)


def test_a_digest_sees_one_bit():
    model = models.build("test_resnet?num_classes=2")
    before = models.digest(model)
    with torch.no_grad():
        model.model.fc.bias[0] = torch.nextafter(model.model.fc.bias[0], torch.tensor(9.0))
    assert models.digest(model) != before


def test_another_number_of_classes_is_refused():
    teacher = models.build("test_resnet?num_classes=5")
    assert models.check_classes(["a"], [teacher], ("s", 5)) == 5
    with pytest.raises(UsageError, match="--teachers a has 5 classes, the student s has 7"):
        models.check_classes(["a"], [teacher], ("s", 7))
    other = models.build("test_resnet?num_classes=4")
    assert models.check_classes(["a", "b"], [teacher, teacher]) == 5
    with pytest.raises(UsageError, match="--model b has 4 classes, a has 5: they must agree"):
        models.check_classes(["a", "b"], [teacher, other], option="--model")


def test_a_fixed_size_transformer_is_built_for_the_size_that_is_asked_for():
    spec = "vit_tiny_patch16_224?num_classes=3&depth=1"
    models.probe(models.build(spec, 96), spec, 96)
    with pytest.raises(UsageError, match=r"cannot take 96 x 96 pixels: .*change --size"):
        models.probe(models.build(spec), spec, 96)


def test_weights_that_give_nan_are_refused():
    model = models.build("test_resnet?num_classes=2")
    with torch.no_grad():
        model.model.fc.bias[0] = float("nan")
    with pytest.raises(UsageError, match="non-finite logits"):
        models.probe(model, "test_resnet", 32)
    assert model.training


def test_random_weights_are_known_as_such():
    assert models.is_random("resnet18?num_classes=3")
    assert not models.is_random("resnet18.tv_in1k")
    assert not models.is_random("resnet18@w.pth")
    assert models.random_notes(["resnet18@w.pth", "resnet18"]) == [
        "note: resnet18 has random weights (no tag and no checkpoint)"
    ]


def test_saved_weights_load_with_plain_timm(tmp_path):
    model = models.build("test_efficientnet?num_classes=3").eval()
    model.model.to(memory_format=torch.channels_last)
    weights.save(model.model, tmp_path / "s.safetensors")
    weights.save(model.model, tmp_path / "again.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    plain = timm.create_model(
        "test_efficientnet", num_classes=3, checkpoint_path=str(tmp_path / "s.safetensors")
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.model(x), plain(x), rtol=1e-5, atol=1e-6)


# -- specs that timm or torch stumbles over ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet18?act_layer=evil", "timm cannot build it: KeyError 'evil'"),
        ("resnet18?norm_layer=x", "timm cannot build it: KeyError 'x'"),
        ("resnet18?block=1", "timm cannot build it: 'int' object has no attribute 'expansion'"),
        ("resnet18?block={}", "timm cannot build it: tuple index out of range"),
        ("resnet18?layers=(1,)", "timm cannot build it: float division by zero"),
        ("resnet18?layers=()", "the model does not run: 'ResNet' object has no attribute 'layer1'"),
        ("resnet18?drop_rate=2", "the model does not run: dropout probability has to be between 0 and 1"),
        ("test_resnet?num_classes=1000000000000", "timm cannot build it: "),
        ("resnet18?a=" + "(" * 3000, "timm cannot build it: ResNet.__init__"),
        ("resnet18@" + "a" * 5000, "cannot be read (File name too long)"),
        ("\x1b[31mred\x07?a=1", r"'\x1b[31mred\x07?a=1': timm has no architecture"),
        ("x" * 5000, "timm has no architecture"),
    ],
    ids=lambda value: value[:24].encode("unicode_escape").decode(),
)
def test_whatever_a_spec_breaks_is_one_line_that_names_it(spec, words):
    """Not "change --size", where every size fails."""
    with pytest.raises(UsageError) as caught:
        models.probe(models.build(spec, 32), spec, 32)
    message = str(caught.value)
    assert words in message
    assert message.startswith(("model spec '", "checkpoint aaa"))
    assert "change --size" not in message
    assert message.isprintable()
    assert len(message) < 800


def test_a_classifier_without_dimensions_is_refused(state, tmp_path):
    torch.save({**state, "fc.weight": torch.tensor(3.0)}, tmp_path / "w.pth")
    assert "fc.weight has shape [], not [" in refusal(f"{NAME}@{tmp_path / 'w.pth'}")


def test_a_home_is_expanded_and_a_bare_file_asks_for_its_architecture(state, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "w.pth")
    check_loaded(f"{NAME}@~/w.pth", state)
    for text in ("~/w.pth", str(tmp_path / "w.pth")):
        assert refusal(text) == f"model spec '{text}': is a file; say of which architecture: NAME@{text}"


@pytest.mark.parametrize(
    ("spec", "proposal"),
    [
        ("resnet50", "did you mean resnet50.a1_in1k, or a checkpoint, resnet50@FILE?"),
        ("resnet18?num_classes=7", "did you mean resnet18.a1_in1k?num_classes=7, or a checkpoint,"),
        ("botnet50ts_256", "give a checkpoint as botnet50ts_256@FILE."),
    ],
)
def test_weights_that_nobody_named_are_refused_with_timms_own_tag(spec, proposal):
    asked = f"{spec}{'&' if '?' in spec else '?'}weights=random"
    with pytest.raises(UsageError) as caught:
        require_weights(["resnet18.tv_in1k", "resnet18@w.pth", spec], "--teachers")
    assert str(caught.value).startswith(f"--teachers {spec}: names no weights; {proposal}")
    assert str(caught.value).endswith(f"For random weights say {asked}")
    require_weights([asked, "no-architecture"], "--teachers")  # which is refused when it is built
    assert models.is_random(asked)
    assert models.random_notes([asked]) == []


def test_random_weights_that_were_asked_for_are_timms(tmp_path):
    torch.manual_seed(3)
    ours = models.build("test_resnet?num_classes=3&weights=random").model.state_dict()
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet", num_classes=3).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for spec in ("resnet18?weights=none", "resnet18.tv_in1k?weights=random", "resnet18?weights=random@w.pth"):
        with pytest.raises(UsageError, match="weights= can only be random"):
            parse(spec)
