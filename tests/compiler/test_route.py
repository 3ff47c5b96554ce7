"""One batch, a choice for every row: each row is what the model with just its adapters gives, None is the base."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import GraphError
from tests import zoo
from tests.reference_decoder import Shape, reference_decoder

PROGRAM = """
lora rank 2 on all linear + embed as french
lora rank 3 dropout 10% on attn.q,v + embed as german
lora rank 2 alpha 3 dora on ffn as dora
prefix 3 gated on all layers as gate
"""
ROWS = ("french", "german", None, ("german", "gate"), "gate", "dora")
Choices = Sequence[Any]


def transformed(program: str, model: Any, example: Any = None) -> Any:
    """Every tensor that the program adds is random, so that every adapter has an effect."""
    surgery.apply(surgery.parse(program), model, example_inputs=example)
    generator = torch.Generator().manual_seed(5)
    for parameter in surgery.parameters(model).values():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_((0.1 * draw).to(parameter.dtype))
    return model


def alone(model: Any, fed: Any, rows: Choices) -> list[torch.Tensor]:
    """Row i of a batch that runs with rows[i] as a whole."""
    found = []
    for index, row in enumerate(rows):
        if row is None:
            with surgery.disabled(model):
                found.append(zoo.logits(model, fed)[index])
            continue
        surgery.activate(model, *([row] if isinstance(row, str) else row))
        found.append(zoo.logits(model, fed)[index])
    surgery.activate(model)
    return found


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "t5", *(pytest.param(f, marks=pytest.mark.slow) for f in zoo.FAMILIES)]
)
def test_every_row_is_the_model_with_its_adapters(family: str) -> None:
    """To 1e-6 of the largest logit; the base's rows to the bit; and after the block all is as before."""
    model = transformed(PROGRAM, zoo.tiny(family))
    fed = zoo.inputs(model, batch=len(ROWS))
    wanted, before = alone(model, fed, ROWS), zoo.logits(model, fed)
    with surgery.route(model, ROWS):
        found = zoo.logits(model, fed)
        with surgery.disabled(model):
            base = zoo.logits(model, fed)
        assert torch.equal(zoo.logits(model, fed), found), "the route is taken up again after the base"
    for index, row in enumerate(ROWS):
        assert (found[index] - wanted[index]).abs().max() <= 2e-6 * wanted[index].abs().max(), row
        assert (row is None) == torch.equal(found[index], base[index]), row
    assert torch.equal(zoo.logits(model, fed), before)
    assert not any(torch.equal(found[index], before[index]) for index in range(len(ROWS)))


@pytest.mark.parametrize("shape", [Shape(bias=True), Shape(fused=True, positions="learned", attention="hand")])
def test_rows_are_exact_in_float64(shape: Shape) -> None:
    """On fused projections, tables of positions that all rows share, in eval and with gradients: 1e-12."""
    model = reference_decoder(shape)
    tokens = (zoo.tokens(shape.vocabulary, 6),)
    program = PROGRAM + ("lora rank 2 on position as german" if shape.positions == "learned" else "")
    transformed(program.replace("dropout 10%", ""), model, tokens)
    wanted = alone(model, tokens, ROWS)
    with surgery.route(model, ROWS):
        found, with_gradient = zoo.logits(model, tokens), model(*tokens)
    for index in range(len(ROWS)):
        for each in (found, with_gradient):
            assert (each[index] - wanted[index]).abs().max() <= 1e-12 * wanted[index].abs().max()
    assert torch.equal(found[2], wanted[2])
    assert torch.equal(with_gradient[2], wanted[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_of_the_base_keep_their_bits(dtype: torch.dtype) -> None:
    model = transformed(PROGRAM, zoo.tiny("llama", dtype=dtype))
    fed = zoo.inputs(model, batch=6)
    wanted = alone(model, fed, ROWS)
    with surgery.route(model, ROWS):
        found = zoo.logits(model, fed)
    assert torch.equal(found[2], wanted[2])
    assert (found[0] - wanted[0]).abs().max() <= 0.05 * wanted[0].abs().max()
    assert (found[0] - wanted[2]).abs().max() > 0.2 * wanted[0].abs().max()


@pytest.mark.parametrize(
    "base", ["quantize base nf4", "quantize base fp4 double", "quantize base int8", "prune magnitude 50% on ffn"]
)
def test_rows_over_quantized_and_pruned_bases(base: str) -> None:
    model = transformed(f"{base}\nlora rank 2 on all linear as french\nlora rank 2 on ffn as german", zoo.tiny("gpt2"))
    fed, rows = zoo.inputs(model, batch=3), ("german", None, "french")
    wanted = alone(model, fed, rows)
    with surgery.route(model, rows):
        found = zoo.logits(model, fed)
    for index in range(3):
        assert (found[index] - wanted[index]).abs().max() <= 2e-6 * wanted[index].abs().max()
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_gives_every_row_its_own_tokens(family: str, settings: dict[str, Any]) -> None:
    """Greedy and beams, with padding and a cache: what the adapter's own model generates for that row alone."""
    model = transformed(PROGRAM, zoo.tiny(family, **({"num_decoder_layers": 2} if family == "t5" else {})))
    fed = zoo.padded(model) if family != "t5" else {k: v for k, v in zoo.inputs(model).items() if "decoder" not in k}
    rows = ("french", None)
    options = {**settings, "max_new_tokens": 6, "do_sample": False}
    wanted = []
    for index, row in enumerate(rows):
        one = {name: value[index : index + 1] for name, value in fed.items()}
        if row is None:
            with surgery.disabled(model):
                wanted.append(model.generate(**one, **options))
        else:
            surgery.activate(model, row)
            wanted.append(model.generate(**one, **options))
    surgery.activate(model)
    with surgery.route(model, rows):
        found = model.generate(**fed, **options)
    each = settings.get("num_return_sequences", 1)
    for index, tokens in enumerate(wanted):
        mine = found[index * each : (index + 1) * each, : tokens.shape[1]]
        assert torch.equal(mine, tokens)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_rows_own_adapters_also_through_checkpoints(reentrant: bool) -> None:
    """The gradients are those of three batches of one row; checkpointed layers are run again after the block."""
    program = PROGRAM.replace("dropout 10%", "")
    model = transformed(program, zoo.tiny("llama"))
    fed, rows = zoo.inputs(model, batch=3), ("french", None, "german")
    wanted: dict[str, torch.Tensor] = {}
    for index in (0, 2):
        surgery.activate(model, str(rows[index]))
        model(**{name: value[index : index + 1] for name, value in fed.items()}).logits.square().sum().backward()
    surgery.activate(model)
    for name, parameter in surgery.parameters(model).items():
        if parameter.grad is not None:
            wanted[name] = parameter.grad.clone()
        parameter.grad = None
    assert {name.split(".")[-1].split("_")[0] for name in wanted} == {"french", "german"}
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with surgery.route(model, rows):
            loss = model(**fed, use_cache=False).logits[torch.tensor([0, 2])].square().sum()
        loss.backward()
    found = {n: p.grad for n, p in surgery.parameters(model).items() if p.grad is not None and p.grad.any()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


@pytest.mark.slow
def test_compiled_models_take_another_route_without_another_graph() -> None:
    """Fullgraph; the choice is data: three choices of as many rows are compiled once."""
    model = transformed(PROGRAM.replace("dropout 10%", ""), zoo.tiny("llama", num_hidden_layers=1))
    fed = zoo.inputs(model, batch=3)
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    seen = []
    for rows in (("french", None, "german"), ("german", "french", None), (None, "german", "french")):
        with surgery.route(model, rows), torch.no_grad():
            found, wanted = compiled(**fed, use_cache=False).logits, zoo.logits(model, fed)
        assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()
        seen.append(len(graphs))
    assert seen[0] == seen[-1]


def test_a_broken_adapter_harms_its_own_rows_only() -> None:
    """rows of a batch are independent: infinities in one adapter do not reach the others."""
    model = transformed("lora rank 2 on all linear as good\nlora rank 2 on attn.q + ffn as bad", zoo.tiny("gpt2"))
    fed, rows = zoo.inputs(model, batch=3), ("good", "bad", None)
    with surgery.route(model, rows):
        wanted = zoo.logits(model, fed)
    for name, parameter in surgery.parameters(model).items():
        if "bad" in name:
            parameter.data.fill_(float("inf"))
    with surgery.route(model, rows):
        found = zoo.logits(model, fed)
    assert torch.equal(found[::2], wanted[::2])
    assert not found[1].isfinite().all()


def test_names_of_every_row_are_just_on() -> None:
    """Also what a batch must share, such as a plain prefix: in every row or in none."""
    model = transformed("prefix 3 on all layers as far\nlora rank 2 on attn as near", zoo.tiny("llama"))
    fed = zoo.inputs(model)
    surgery.activate(model, "far")
    wanted = zoo.logits(model, fed)
    surgery.activate(model)
    with surgery.route(model, ["far", "far"]):
        assert torch.equal(zoo.logits(model, fed), wanted)
    with pytest.raises(GraphError, match=r"chosen by row.*positions") as caught, surgery.route(model, ["far", None]):
        pass
    assert caught.value.diagnostics[0].code == "S377"


def test_what_does_not_fit_is_said() -> None:
    model = transformed("lora rank 2 on attn as french\nlora rank 2 on attn as german", zoo.tiny("llama"))
    fed = zoo.inputs(model)
    before = zoo.logits(model, fed)

    def code(action: Any) -> str:
        with pytest.raises(GraphError) as caught:
            action()
        return caught.value.diagnostics[0].code

    def entered(rows: Any) -> Any:
        def enter() -> None:
            with surgery.route(model, rows):
                pass

        return enter

    assert code(entered(["french", "spanish"])) == "S310"
    assert code(entered([])) == "S375"
    assert code(entered("french")) == "S375"
    with surgery.route(model, ["french"]):
        with pytest.raises(GraphError, match="the route is for 1 row, and the batch has 2"):
            model(**fed)
        assert code(lambda: surgery.activate(model, "french")) == "S375"
        assert code(lambda: surgery.merge(model)) == "S375"
        assert code(entered(["german"])) == "S375"
    with surgery.route(model, ["french", None, None]), pytest.raises(GraphError, match="batch has 2"):
        model(**fed)
    with pytest.raises(ZeroDivisionError), surgery.route(model, ["french", None]):
        _ = 1 / 0
    assert torch.equal(zoo.logits(model, fed), before)


@pytest.mark.parametrize(
    "line", ["prompt 3 as front", "ptuning v1 3 via mlp 4 as front", "prefix 3 on all layers as front"]
)
def test_what_comes_in_front_is_in_every_row_or_in_none(line: str) -> None:
    model = transformed(f"{line}\nlora rank 2 on attn as french", zoo.tiny("llama"))
    fed = zoo.inputs(model)
    surgery.activate(model, "french")
    wanted = zoo.logits(model, fed)
    surgery.activate(model)
    with pytest.raises(GraphError) as caught, surgery.route(model, ["front", None]):
        pass
    assert caught.value.diagnostics[0].code == "S377"
    with surgery.route(model, ["french", None]):
        assert (zoo.logits(model, fed)[0] - wanted[0]).abs().max() <= 2e-6 * wanted.abs().max()


def test_adapters_and_rescaled_rows() -> None:
    """Adapters on edges, in a stack too, and ia3 on outputs and inputs are chosen like the others."""
    model = transformed(
        "adapter bottleneck 4 after ffn then second as first\nadapter bottleneck 3 after ffn as second\n"
        "ia3 on attn.k,v + ffn.down as scaled\nadapter bottleneck 4 beside attn as parallel",
        zoo.tiny("llama"),
    )
    rows = ("first", None, "second", ("first", "second"), "scaled", "parallel")
    fed = zoo.inputs(model, batch=len(rows))
    wanted = alone(model, fed, rows)
    with surgery.route(model, rows):
        found = zoo.logits(model, fed)
    for index, row in enumerate(rows):
        assert (found[index] - wanted[index]).abs().max() <= 2e-6 * wanted[index].abs().max(), row
    assert torch.equal(found[1], wanted[1])


def test_distances_cannot_be_chosen_by_row() -> None:
    model = zoo.tiny("t5")
    (path, *_) = (name for name, _ in model.named_modules() if name.endswith("relative_attention_bias"))
    transformed(f'lora rank 2 on "{path}" as far\nlora rank 2 on attn.q as near', model)
    with pytest.raises(GraphError, match="distances between positions"), surgery.route(model, ["far", None]):
        pass
    with surgery.route(model, ["near", None]):
        zoo.logits(model, zoo.inputs(model))


def test_a_copy_made_inside_is_not_routed() -> None:
    """The choice belongs to the batches of the model at hand; what no row names stays off in the copy too."""
    model = transformed("lora rank 2 on attn as french\nlora rank 2 on ffn as german", zoo.tiny("llama"))
    fed = zoo.inputs(model)
    names = set(model.state_dict())
    with surgery.route(model, ["french", None, "german"]):
        assert set(model.state_dict()) == names
        copied = copy.deepcopy(model)
    assert torch.equal(zoo.logits(copied, fed), zoo.logits(model, fed))
    surgery.activate(copied, "german")
    surgery.activate(model, "german")
    assert torch.equal(zoo.logits(copied, fed), zoo.logits(model, fed))
