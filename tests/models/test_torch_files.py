"""Small files that claim much, or hold what no weights are: refused in a line, at once, in next to no memory."""

import argparse
import collections
import pickle
import resource
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mealfast.errors import UsageError
from mealfast.models import normalised, weights
from mealfast.models.torch_files import is_whole, torch_load
from mealfast.record import checkpoint

MEMORY = 600 << 20  # bytes beyond what this process has


@contextmanager
def little_memory():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def nested(depth: int) -> list:
    """Two of two of two: 2 ** depth elements for whoever goes through them."""
    found = []
    for _ in range(depth):
        found = [found, found]
    return found


def claims(size: int, stride: int):
    storage = torch.zeros(4).storage()
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, (size,), (stride,), False, collections.OrderedDict())


def with_pickle(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """A file of torch.save with another pickle in it."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


CONTENTS = {
    "more values than the storage": lambda: {"w": claims(1 << 34, 1)},
    "one value as a trillion": lambda: {"w": torch.zeros(1).expand(1 << 40)},
    "a bytearray by its length": lambda: {"w": Call(bytearray, 1 << 36)},
    "a tensor by its size": lambda: {"w": Call(torch.Tensor, 1 << 36)},
    "lists in lists": lambda: {"w": nested(40)},
    "an object": lambda: {"w": Call(Path, "x")},
}
PICKLES = {
    # A list of 30 million ones takes torch's reader half a minute: 60 MB, or 60 kB compressed.
    "compressed": (b"\x80\x02](" + b"K\x01" * 30_000_000 + b"e.", zipfile.ZIP_DEFLATED),
    "too large": (b"\x80\x02](" + b"K\x01" * 5_000_000 + b"e.", zipfile.ZIP_STORED),
    "too many steps": (b"\x80\x02](" + b"K\x01" * 1_000_001 + b"e.", zipfile.ZIP_STORED),
    "a long string copied by each call": (
        b"\x80\x02](X\x00\x00\x10\x00" + b"x" * (1 << 20) + b"q\x00c_codecs\nencode\nq\x01"
        + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 90_000 + b"e.",
        zipfile.ZIP_STORED,
    ),
    "too many calls": (b"\x80\x02]c__builtin__\nset\nq\x01(" + b"h\x01)R" * 150_000 + b"e.", zipfile.ZIP_STORED),
    # Tuples of the same tuple twice, 40 deep: a hash goes through 2 ** 40 of them.
    "a key that takes for ever to hash": (b"\x80\x02})" + b"q\x00h\x00\x86" * 40 + b"K\x01s.", zipfile.ZIP_STORED),
    "the same in a set": (
        b"\x80\x02c__builtin__\nset\n](" + b")" + b"q\x00h\x00\x86" * 40 + b"e\x85R.",
        zipfile.ZIP_STORED,
    ),
    "the same as a storage's name": (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + b")" + b"q\x00h\x00\x86" * 40
        + b"X\x03\x00\x00\x00cpuK\x01tQ.",
        zipfile.ZIP_STORED,
    ),
    "nothing on the stack": (b"\x80\x02R.", zipfile.ZIP_STORED),
    "no end": (b"\x80\x02]", zipfile.ZIP_STORED),
}  # fmt: skip


def refused(path: Path) -> None:
    """By both readers, in a line, within ten seconds."""
    for read in (weights.read, checkpoint.read):
        began = time.monotonic()
        with little_memory(), pytest.raises(UsageError) as caught:
            read(path)
        assert time.monotonic() - began < 10
        message = str(caught.value)
        assert str(path) in message
        assert "cannot be read (it" in message
        assert "weights_only" not in message
        assert message.isprintable()


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("format", ["zip", "pickles"])
def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path, what, format):
    path = tmp_path / "w.pth"
    torch.save(CONTENTS[what](), path, _use_new_zipfile_serialization=format == "zip")
    assert path.stat().st_size < 3000
    refused(path)


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_takes_for_ever_is_refused(tmp_path, what):
    data, compression = PICKLES[what]
    with_pickle(tmp_path / "w.pth", data, compression)
    refused(tmp_path / "w.pth")


def test_an_old_file_whose_storages_claim_more_than_it_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(300)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    number = (300).to_bytes(2, "little")
    assert content.count(b"M" + number) == 2, "the storage's elements, and the tensor's"
    path.write_bytes(content.replace(b"M" + number, b"J" + (1 << 30).to_bytes(4, "little")))
    refused(path)


def test_another_member_twice_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(3)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name, archive.read(name))
    refused(path)


PLAIN = {
    "shared": lambda: (lambda t: {"a": t, "b": t[1:], "c": t.T})(torch.arange(12.0).view(3, 4)),
    "expanded": lambda: {"a": torch.ones(3).expand(5, 3)},
    "empty": lambda: {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": torch.tensor(3)},
    "dtypes": lambda: {str(d): torch.ones(3).to(d) for d in (
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.uint16,
        torch.float8_e4m3fn)},
    "values": lambda: {"a": {1, "b"}, "b": b"bytes", "c": bytearray(b"x"), "d": torch.Size([2]), "e": torch.float16,
                       "f": torch.device("cpu"), "g": collections.Counter("aab"), "h": {(1, "x"): 3}, "i": 1 + 2j,
                       "j": [None, True, 0.5, 1 << 70, "é"]},
    "parameters": lambda: torch.nn.Linear(3, 2).state_dict(keep_vars=True),
    "timm's": lambda: {"args": argparse.Namespace(lr=0.1, betas=(0.9, 0.999))},
}  # fmt: skip


@pytest.mark.parametrize("what", PLAIN)
@pytest.mark.parametrize("format", ["zip", "pickles"])
def test_what_torch_reads_is_read(tmp_path, what, format):
    content, path = PLAIN[what](), tmp_path / "w.pth"
    if format == "pickles" and what == "dtypes":
        content = {key: value for key, value in content.items() if "uint16" not in key and "float8" not in key}
    torch.save(content, path, _use_new_zipfile_serialization=format == "zip")
    found = torch_load(path)
    assert list(found) == list(content)
    for key, value in content.items():
        assert type(found[key]) is type(value)
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key].float() if "float8" in str(value.dtype) else found[key],
                               value.float() if "float8" in str(value.dtype) else value)  # fmt: skip
        else:
            assert found[key] == value


def test_arrays_are_read_where_the_caller_allows_them_and_claim_no_more_than_is_there(tmp_path):
    arrays = [np.ndarray, np.dtype, type(np.dtype("f4")), np.arange(2).__reduce__()[0]]
    path = tmp_path / "w.pth"
    torch.save([np.arange(6, dtype="f4").reshape(2, 3)], path)
    refused(path)
    with torch.serialization.safe_globals(arrays):
        assert torch_load(path)[0].tolist() == [[0, 1, 2], [3, 4, 5]]
        for size in ((1 << 36,), (1 << 18, 1 << 18)):
            torch.save([Call(arrays[-1], np.ndarray, size, b"b"), Call(np.ndarray, size)], path)
            refused(path)


def test_a_flipped_bit_is_seen_where_torch_sees_none(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    assert is_whole(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert float(torch_load(path)["w"].sum()) > 0
    assert not is_whole(path)
    path.write_bytes(content[: len(content) // 2])
    assert not is_whole(path)


# -- tensors that are no weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state():
    return normalised.build("test_resnet?num_classes=7").model.state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.to(torch.int8), "holds int8, not float32"),
        (lambda t: t.to(torch.complex64), "holds complex64, not float32"),
        (lambda t: t.to(torch.float8_e4m3fn), "holds float8_e4m3fn, not float32"),
        (lambda t: t > 0, "holds bool, not float32"),
        (lambda t: t.to_sparse(), "sparse tensors"),
        (lambda t: t.to_sparse_csr(), "sparse tensors"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantised tensors"),
        (lambda t: t.to("meta"), "meta tensors"),
        (lambda t: t[0, 0], r"fc.weight has shape \[\], not"),
        (lambda t: t[:, None], r"fc.weight has shape \[7, 1, 96\]"),
    ],
    ids=["int8", "complex", "float8", "bool", "sparse", "csr", "quantised", "meta", "scalar", "3d"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_weights_are_refused_not_cast(state, tmp_path, change, words):
    path = tmp_path / "w.pth"
    torch.save({**state, "fc.weight": change(state["fc.weight"])}, path)
    with pytest.raises(UsageError, match=words) as caught:
        normalised.build(f"test_resnet@{path}")
    assert str(caught.value).startswith(f"checkpoint {path}")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_weights(state, tmp_path, dtype):
    torch.save({key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()},
               tmp_path / "w.pth")  # fmt: skip
    model = normalised.build(f"test_resnet@{tmp_path / 'w.pth'}").model
    assert torch.equal(model.fc.weight, state["fc.weight"].to(dtype).float())


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "module.model.", "student._orig_mod."])
def test_a_prefix_that_all_keys_share_is_none_of_the_models(state, tmp_path, prefix):
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "w.pth")
    model = normalised.build(f"test_resnet@{tmp_path / 'w.pth'}")
    assert model.num_classes == 7
    assert torch.equal(model.model.fc.weight, state["fc.weight"])
    torch.save({prefix + key: value for key, value in state.items()} | {"head.weight": torch.zeros(3)}, tmp_path / "x")
    with pytest.raises(UsageError, match="is not one of test_resnet: it lacks"):
        normalised.build(f"test_resnet@{tmp_path / 'x'}")


@pytest.mark.parametrize("key", ["\x1b[31mred\x07", "a\nb", "x" * 5000])
def test_a_key_of_a_file_is_escaped_and_cut(state, tmp_path, key):
    torch.save({**state, key: torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UsageError) as caught:
        normalised.build(f"test_resnet@{tmp_path / 'w.pth'}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_a_plain_pickle_is_no_file_of_torch(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"w": 1}))
    refused(tmp_path / "w.pth")
