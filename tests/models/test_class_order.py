"""Which output is which class: the rules, against timm's and torchvision's own numbering of the same folders."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets.folder import find_classes

from mealfast.errors import UsageError
from mealfast.models import normalised as models
from mealfast.models.class_names import imagenet, natural_order, readable
from mealfast.models.class_order import Named, agree, as_before, byte_order

MIXED = ("B1", "a0", "c2")  # in byte order
ROOT = Path("DIR")
WNIDS = tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())


def folders_of(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").touch()
    return tmp_path


def refusal(*arguments) -> str:
    with pytest.raises(UsageError) as refused:
        agree(*arguments)
    message = str(refused.value)
    assert message.isprintable()
    return message


def student(classes=None, new=False):
    return Named("--student s", classes, new)


def teacher(classes=None):
    return Named("--teachers t", classes)


@pytest.mark.parametrize(
    "names", [("a0", "B1", "c2"), tuple(map(str, range(12))), ("img12", "img10", "IMG2", "x"), ("é", "Z", "a")]
)
def test_both_orders_are_those_of_timm_and_torchvision(tmp_path, names):
    tree = folders_of(tmp_path, names)
    _, timms = find_images_and_targets(str(tree))
    assert natural_order(names) == tuple(sorted(timms, key=timms.get))
    torchvisions, _ = find_classes(str(tree))
    assert byte_order(names, len(names)) == tuple(torchvisions)


@pytest.mark.parametrize("names", [("a", "A"), ("1", "01"), ("²", "a")])
def test_where_timms_order_is_left_open_there_is_none(names):
    assert natural_order(names) is None
    said = refusal([student(new=True), teacher()], len(names), (*names, "b")[: len(names)], ROOT)
    assert said.startswith("--teachers t: does not say which output is which class, and the classes (")


def test_a_teacher_that_names_nothing_is_refused_where_the_orders_differ():
    both = [student(new=True), teacher()]
    assert refusal(both, 3, MIXED, ROOT) == (
        "--teachers t: does not say which output is which class, and output 0 is a0 in natural order but B1 in byte "
        "order; give --class-map natural (trained by timm), --class-map byte (by torchvision or mealfast), or "
        "--class-map FILE with a class name a line"
    )
    natural, in_bytes = (agree(both, 3, MIXED, ROOT, word) for word in ("natural", "byte"))
    assert natural.names == in_bytes.names == MIXED, "the new student's"
    assert natural.orders == (None, (1, 0, 2))
    assert in_bytes.orders == (None, None)
    assert natural.labels == {"B1": 0, "a0": 1, "c2": 2}
    plain = agree(both, 3, ("ant", "bee", "cat"), ROOT)
    assert (plain.names, plain.orders) == (("ant", "bee", "cat"), (None, None))


def test_a_file_names_what_does_not_name_itself(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffc2\r\nB1\r\na0\r\n".encode())
    path = str(tmp_path / "names.txt")
    found = agree([student(new=True), teacher()], 3, MIXED, ROOT, path)
    assert (found.names, found.orders) == (MIXED, (None, (1, 2, 0)))
    found = agree([Named("--model m", None)], 3, ("a0",), ROOT, path)
    assert (found.names, found.labels) == (("c2", "B1", "a0"), {"a0": 2})
    known = agree([student(MIXED), teacher(MIXED[::-1])], 3, MIXED, ROOT, path)
    assert known.orders == (None, (2, 1, 0)), "a file says nothing of models that say it themselves"
    assert known.notes == (f"note: --class-map {path}: not used; every model names its classes, or is new",)
    for text, why in {
        b"a\nb\n": "holds 2 names, the model has 3 classes", b"a\nb\na\n": "class names must differ from one another",
        b"a\nb\n\xff\n": "cannot be read (it is not UTF-8 text); give a text file with one class name a line",
    }.items():  # fmt: skip
        (tmp_path / "names.txt").write_bytes(text)
        assert refusal([teacher()], 3, MIXED, ROOT, path).startswith(f"--class-map {path}: {why}")
    (tmp_path / "names.txt").write_text("a0\nB1\nzebra\n")
    said = refusal([student(MIXED), teacher()], 3, MIXED, ROOT, path)
    assert said == (
        f"--teachers t (--class-map {path}): its classes are not those of --student s: only it has zebra; it lacks c2"
    )


def test_every_order_of_known_names_is_brought_into_the_students():
    rng = np.random.default_rng(0)
    for classes in (1, 2, 7, 100):
        names = [f"class {n}" for n in range(classes)]
        ours, theirs, caches = (tuple(names[n] for n in rng.permutation(classes)) for _ in range(3))
        found = agree([student(ours), teacher(theirs), Named("cache", caches)], classes, names[::2], ROOT)
        assert found.names == ours
        for own, order in zip((theirs, caches), found.orders[1:], strict=True):
            assert tuple(own[n] for n in order or range(classes)) == ours
        assert {name: ours[output] for name, output in found.labels.items()} == {name: name for name in names[::2]}


def test_folders_that_a_model_does_not_know_are_refused():
    said = refusal([teacher(("ant", "bee", "cat"))], 3, ("ant", "b\x1b[2Jee"), ROOT)
    assert said == (
        "DIR: class folder b\\x1b[2Jee is none of the 3 classes of --teachers t: ant, bee, cat "
        "(?num_classes=2 gives a student new ones)"
    )
    assert "has 2 class folders, --teachers t has 3 outputs: they must agree" in refusal(
        [teacher()], 3, ("ant", "bee"), ROOT
    )


def test_numbers_below_c_are_outputs():
    """ImageNet-V2's folders: "0" to "999", for models that name wnids or nothing; a part of them too."""
    folders = sorted(map(str, range(1000)))
    for classes in (None, WNIDS):
        found = agree([teacher(classes)], 1000, folders, ROOT)
        assert found.labels == {str(number): number for number in range(1000)}
        assert found.names == (classes or tuple(map(str, range(1000))))
        assert found.notes == (
            "note: DIR: the class folders are numbers, and taken as the numbers of the model's outputs",
        )
    assert agree([teacher()], 1000, ["7", "12"], ROOT).labels == {"7": 7, "12": 12}
    new = agree([student(new=True), teacher(WNIDS)], 1000, folders, ROOT)
    assert (new.names, new.orders) == (WNIDS, (None, None))
    mixed = agree([student(WNIDS[::-1]), teacher(WNIDS), Named("file", None)], 1000, folders, ROOT)
    assert mixed.orders == (None, tuple(range(999, -1, -1)), None)


def test_1_to_n_are_n_classes_in_numerical_order():
    folders = sorted(map(str, range(1, 13)))
    found = agree([student(new=True), teacher()], 12, folders, ROOT)
    assert found.labels == {str(number + 1): number for number in range(12)}
    assert found.names == tuple(map(str, range(1, 13)))
    assert found.notes == ("note: DIR: the class folders 1 to 12 are taken as the 12 classes in this order",)
    assert agree([teacher()], 13, folders, ROOT).labels == {str(number): number for number in range(1, 13)}
    in_bytes = agree([student(new=True), teacher()], 12, folders, ROOT, "byte")
    assert [sorted(folders)[n] for n in range(12)] == [in_bytes.names[in_bytes.orders[1].index(n)] for n in range(12)]


def test_wnids_are_imagenets_labels_for_a_thousand_outputs():
    some = WNIDS[5::100]
    for classes in (None, WNIDS):
        found = agree([student(new=True), teacher(classes)], 1000, some[::-1], ROOT)
        assert found.names == imagenet() == WNIDS
        assert found.labels == {wnid: WNIDS.index(wnid) for wnid in some}
    assert readable(WNIDS, 1000)[:2] == ["tench", "goldfish"]
    assert readable(None, 3) == ["0", "1", "2"]


def test_a_run_goes_on_with_the_names_it_had():
    found = as_before(("c2", "a0", "B1"), 3, MIXED, ROOT)
    assert (found.names, found.orders) == (("c2", "a0", "B1"), (None, None, None))
    assert found.labels == {"c2": 0, "a0": 1, "B1": 2}


# -- what it does to models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_reordered_outputs_are_the_same_numbers_elsewhere(architecture):
    """Against the float64 classifier of the same weights with its rows in the other order."""
    size = {"img_size": 32} if "vit" in architecture else {}
    torch.manual_seed(0)
    plain = timm.create_model(architecture, num_classes=7, **size).eval()
    model = models.build(f"{architecture}?num_classes=7", 32).eval()
    model.model.load_state_dict(plain.state_dict())
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    before, digest = model(images), models.digest(model)
    order = tuple(np.random.default_rng(1).permutation(7).tolist())
    model.take_order(order, tuple("abcdefg"))
    assert torch.equal(model(images), before[:, list(order)])
    assert models.digest(model) == digest, "the weights stay the file's"
    head = plain.get_classifier()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter[list(order)].clone())
    pixels = images.permute(0, 3, 1, 2).double() / 255
    config = timm.data.resolve_model_data_config(plain)
    mean, std = (torch.tensor(config[name], dtype=torch.float64).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        torch.testing.assert_close(model(images).double(), plain.double()((pixels - mean) / std), rtol=1e-4, atol=1e-5)


def test_timms_tags_name_imagenets_classes(weights, monkeypatch):
    """Of the tag's own head: with another number of outputs it is new."""
    state = weights("test_resnet", 2, 1000)
    assert models.build(f"test_resnet.r160_in1k@{state}").classes == WNIDS
    assert models.build(f"test_resnet@{state}").classes is None
    new = models.build("test_resnet?num_classes=7")
    assert (new.classes, new.new_outputs) == (None, True)
    assert not models.build(f"test_resnet@{state}").new_outputs
