"""Packed models: small, strict, and bit-identical in what they compute."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import hbfp  # noqa: E402


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 64))


@pytest.mark.parametrize("recipe", ["hbfp4", "hbfp6", "booster"])
def test_loaded_models_compute_the_same_bits(tmp_path, recipe):
    path, x = tmp_path / "m.safetensors", torch.arange(20).reshape(4, 5)
    saved, loaded = model(), model(1)
    for m in (saved, loaded):
        hbfp.convert_(m, recipe, example_inputs=x)
        m.eval()
    expected = saved(x)
    assert not torch.equal(loaded(x), expected)
    hbfp.save_model(path, saved)
    hbfp.load_model(path, loaded)
    assert torch.equal(loaded(x).view(torch.int32), expected.view(torch.int32))
    if recipe == "hbfp4":
        weights = hbfp.HBFP4.storage_bytes((256, 64), 1) + hbfp.HBFP4.storage_bytes((64, 256), 1)
        plain = 4 * (20 * 64 + 256 + 2 * 256 + 64)
        assert weights + plain < path.stat().st_size < weights + plain + 2500


def test_tied_tensors_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 16)
            self.head = nn.Linear(16, 9, bias=False)
            self.head.weight = self.embedding.weight

    tied = Tied()
    hbfp.convert_(tied, "hbfp6")
    hbfp.save_model(tmp_path / "t.safetensors", tied)
    assert len(hbfp.load(tmp_path / "t.safetensors")) == 1
    hbfp.load_model(tmp_path / "t.safetensors", tied)
    assert tied.head.weight is tied.embedding.weight


def test_another_architecture_is_refused_and_untouched(tmp_path):
    saved = model()
    hbfp.convert_(saved, "hbfp4")
    hbfp.save_model(tmp_path / "m.safetensors", saved)
    other = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 128))
    before = other[1].weight.clone()
    with pytest.raises(hbfp.FileError, match="unexpected"):
        hbfp.load_model(tmp_path / "m.safetensors", other)
    narrow = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 99), nn.LayerNorm(99), nn.Linear(99, 64))
    with pytest.raises(hbfp.FileError, match="expected shape"):
        hbfp.load_model(tmp_path / "m.safetensors", narrow)
    assert torch.equal(other[1].weight, before)


class TiedThroughNorm(nn.Module):
    """The embedding's rows are read in FP32 and pass a norm: rounding them would show."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.embedding(x).cumsum(-1)))


@pytest.mark.parametrize(
    ("make", "recipe"),
    [(TiedThroughNorm, "hbfp4"), (model, "emulator"), (model, "hbfp4b64-noclip"), (model, "hbfp4t8")],
)
def test_what_would_not_come_back_to_the_bit_is_not_packed(tmp_path, make, recipe):
    """A weight that FP32 reads too, and encodings that are not idempotent."""
    saved, loaded = make(), make()
    for m in (saved, loaded):
        hbfp.convert_(m, recipe)
        m.eval()
    x = torch.arange(9)
    hbfp.save_model(tmp_path / "m.safetensors", saved)
    hbfp.load_model(tmp_path / "m.safetensors", loaded)
    assert torch.equal(loaded(x).view(torch.int32), saved(x).view(torch.int32))


def test_formats_of_another_phase_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    saved, loaded = (nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))) for _ in range(2))
    hbfp.convert_(saved, "hbfp6")
    hbfp.convert_(loaded, "hbfp4")
    hbfp.save_model(path, saved)
    before = [p.clone() for p in loaded.parameters()]
    with pytest.raises(hbfp.FileError, match="expected hbfp4b64"):
        hbfp.load_model(path, loaded)
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.parameters(), strict=True))
    hbfp.load_model(path, loaded, any_format=True)
    expected = torch.from_numpy(hbfp.quantize(saved[0].weight.detach().tolist(), hbfp.HBFP6))
    assert torch.equal(loaded[0].weight, expected)


def test_bfloat16_buffers_and_counters_come_back(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8, dtype=torch.bfloat16))

    saved, loaded = make(), make()
    for m in (saved, loaded):
        hbfp.convert_(m, "hbfp4")
    nn.init.normal_(saved[2].weight)
    saved[1](torch.randn(4, 8))
    hbfp.save_model(tmp_path / "m.safetensors", saved)
    hbfp.load_model(tmp_path / "m.safetensors", loaded)
    for name in ("1.running_mean", "1.num_batches_tracked", "2.weight"):
        assert torch.equal(saved.state_dict()[name], loaded.state_dict()[name])
        assert saved.state_dict()[name].dtype == loaded.state_dict()[name].dtype


# --- without memory for it twice -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Every way in which a model holds tensors: tied, buffers, a recurrent layer that lists its weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 64)
        self.lstm = nn.LSTM(64, 64)
        self.norm = nn.BatchNorm1d(64, dtype=torch.float64)
        self.head = nn.Linear(64, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return self.head(self.norm(self.lstm(self.embedding(x))[0].mean(0).double()).float())


def test_a_model_without_memory_takes_the_decoded_tensors(tmp_path):
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    saved = hbfp_converted(Tied())
    saved(torch.arange(9).reshape(3, 3))
    with torch.device("meta"):
        loaded = Tied()
    hbfp_converted(loaded)
    hbfp.save_model(path, saved)
    hbfp.load_model(path, loaded)
    assert loaded.head.weight is loaded.embedding.weight
    assert isinstance(loaded.head.weight, nn.Parameter)
    assert not loaded.frozen.requires_grad
    for name, tensor in saved.state_dict().items():
        found = loaded.state_dict()[name]
        assert (found.dtype, found.device.type, found.shape) == (tensor.dtype, "cpu", tensor.shape)
    x = torch.arange(9).reshape(3, 3)
    assert torch.equal(loaded.eval()(x), saved.eval()(x))


def hbfp_converted(model):
    hbfp.convert_(model, "hbfp4")
    return model


def test_what_no_file_holds_is_named(tmp_path):
    path = tmp_path / "m.safetensors"

    def make():
        m = nn.Sequential(nn.Linear(64, 8))
        m.register_buffer("mask", torch.ones(3), persistent=False)
        return m

    hbfp.save_model(path, make())
    with torch.device("meta"):
        loaded = make()
    with pytest.raises(hbfp.FileError, match=r"mask: expected a value for every tensor on the meta"):
        hbfp.load_model(path, loaded)
    loaded.mask = torch.ones(3)
    hbfp.load_model(path, loaded)
    assert loaded[0].weight.device.type == "cpu"


def test_shards(tmp_path):
    path = tmp_path / "m.safetensors"
    saved, loaded, again = (hbfp_converted(model(seed)) for seed in range(3))
    hbfp.save_model(path, saved, max_shard_size=9000)
    assert len(list(tmp_path.iterdir())) > 3
    x = torch.arange(9)
    for place, other in ((path, loaded), (tmp_path / "m.safetensors.index.json", again)):
        hbfp.load_model(place, other)
        assert torch.equal(other.eval()(x), saved.eval()(x))


def test_forbidden_codes_leave_the_model_as_it_was(tmp_path):
    """The last tensor of the file is bad; the first must not be loaded."""
    path = tmp_path / "m.safetensors"
    saved, loaded = (hbfp_converted(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))) for _ in range(2))
    hbfp.save_model(path, saved)
    content = bytearray(path.read_bytes())
    content[-1] = 0x88
    path.write_bytes(content)
    before = [p.clone() for p in loaded.parameters()]
    with pytest.raises(hbfp.CodeError, match=r"tensor '1\.weight': expected codes"):
        hbfp.load_model(path, loaded)
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.parameters(), strict=True))


MEASURE = """
import resource, sys, torch, hbfp
from torch import nn

def make():
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))  # 256 MiB

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with torch.device("meta"):
    model = make()
hbfp.convert_(model, "hbfp4")
hbfp.encode(torch.ones(2048, 2048), "hbfp4b64").decode()  # what the first call allocates for good
before = peak()
hbfp.load_model(sys.argv[1], model)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


def test_loading_without_memory_peaks_at_one_tensor_more(tmp_path):
    """The model as it is in the end, the file's pages, and one tensor on its way: never the whole model twice."""
    path = tmp_path / "m.safetensors"
    saved = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))
    hbfp.save_model(path, hbfp_converted(saved))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    ).stdout.split()
    growth, size = map(int, done)
    assert size == 2**28
    assert growth < size + path.stat().st_size + 2 * size // 16 + 2**24
