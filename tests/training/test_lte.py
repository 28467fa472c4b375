"""What a routed model computes while it learns, and how a training reaches the sparsity that is asked for."""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from recovery import onnx_source
from scipy.special import erf, expit
from torch import Tensor, nn

from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import ModelError
from trimtab.passes.ffn_route.routers import Routers
from trimtab.training.activations import ACTIVATIONS
from trimtab.training.clock import Clock
from trimtab.training.linears import FFNModules, Projection, find_ffns, linear_modules, permute_neurons
from trimtab.training.lte.control import Controller, density_of, fit_cut, trim
from trimtab.training.lte.layerwise import LayerFit, densities
from trimtab.training.lte.losses import efficiency, over_tokens, separability
from trimtab.training.lte.record import Recorded, record_inputs, standardise
from trimtab.training.lte.routed import Routed
from trimtab.training.lte.router import LinearRouter
from trimtab.training.lte.routers import Routing, choose
from trimtab.training.lte.settings import Settings
from trimtab.training.texts import Examples

SEED = int(np.random.default_rng().integers(1 << 30))
GROUP = 4


def routed(family: str, **settings: Any) -> tuple[Routed, list[FFNModules]]:
    """A model of random routers and standardised inputs."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    model = copy.deepcopy(zoo.tiny_model(family))
    ffns = find_ffns(model, find_anatomy(onnx_source(family).graph()).ffns)
    kind: Any = "classifier" if family == "bert" else "language model"
    made = Routed(model, ffns, Settings(group=GROUP, **settings), kind)
    for router in made.routing.routers.values():
        if not isinstance(router, LinearRouter):
            continue
        router.weight.data.normal_(0, 2)
        router.bias.data.normal_(0, 1)
        width = router.weight.shape[1]
        router.standardise(torch.randn(width), torch.rand(width) + 0.5)
    return made, ffns


def batch(family: str, count: int = 4) -> dict[str, Tensor]:
    feeds = {
        name: torch.from_numpy(value)
        for name, value in zoo.feeds(family, count, 9, np.random.default_rng(SEED)).items()
    }
    labels = torch.arange(count) % 3 if family == "bert" else feeds["input_ids"]
    return feeds | {"labels": labels}


def seen(model: Routed, ffns: list[FFNModules], mode: Any, given: Mapping[str, Tensor]) -> list[tuple[np.ndarray, ...]]:
    """Of each FFN its input and its output [tokens, d_model], float64."""
    pairs: list[Any] = [[None, None] for _ in ffns]

    def keep(place: int, what: int, tensor: Tensor) -> None:
        pairs[place][what] = tensor.reshape(-1, tensor.shape[-1]).double().numpy()

    hooks = []
    for i, ffn in enumerate(ffns):
        hooks.append(ffn.up.module.register_forward_hook(lambda _, inputs, __, i=i: keep(i, 0, inputs[0])))
        hooks.append(ffn.down.register_forward_hook(lambda _, __, output, i=i: keep(i, 1, output)))
    with torch.no_grad():
        model.eval().run(given, mode)
    for hook in hooks:
        hook.remove()
    return [tuple(pair) for pair in pairs]


def chosen_by(scores: np.ndarray, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The groups that the contract with `ffn-route` chooses, one token after the other."""
    picked = np.zeros(scores.shape, bool)
    for token, of_token in enumerate(scores):
        order = np.argsort(-of_token, kind="stable")
        picked[token, order[0]] = True
        if "threshold" in tensors:
            picked[token] |= of_token >= tensors["threshold"][0]
            continue
        total = 0.0
        for group in order:
            if total >= tensors["cumulative"][0] * of_token.sum():
                break
            picked[token, group] = True
            total += of_token[group]
    return picked


def product(x: np.ndarray, projection: Projection) -> np.ndarray:
    bias = projection.bias
    return x @ projection.weight.double().numpy() + (0.0 if bias is None else bias.double().numpy())


ACTS = {
    "bert": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gpt2": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "opt": lambda x: np.maximum(x, 0),
    "llama": lambda x: x * expit(x),
}


@pytest.mark.parametrize("select", ["threshold", "cumulative"])
@pytest.mark.parametrize("family", ACTS)
def test_hard_masks_are_the_routed_model_of_the_profile(family: str, select: str) -> None:
    model, ffns = routed(family, select=select)
    model.routing.cut.fill_(0.3 if select == "threshold" else 0.6)
    tensors, shares = model.routing.tensors(), []
    for ffn, (x, y) in zip(ffns, seen(model, ffns, "hard", batch(family)), strict=True):
        weight, bias = (tensors[f"router.{ffn.layer}.{name}"].astype(np.float64) for name in ("weight", "bias"))
        assert weight.shape == (ffn.d_ff // GROUP, ffn.d_model)
        scores = expit(x @ weight.T + bias)
        picked = chosen_by(scores, tensors)
        clear = (chosen_by(scores * (1 + 1e-5), tensors) == chosen_by(scores * (1 - 1e-5), tensors)).all(1)
        if select == "cumulative":  # where the share is reached does not hang on rounding
            sums = np.sort(scores)[:, ::-1].cumsum(1) / scores.sum(1, keepdims=True)
            clear = (np.abs(sums - tensors["cumulative"][0]) > 1e-5).all(1)
        assert clear.mean() > 0.5
        up = product(x, ffn.up)
        h = ACTS[family](up) if ffn.gate is None else ACTS[family](product(x, ffn.gate)) * up
        wanted = product(h * np.repeat(picked, GROUP, 1), Projection(ffn.down, 0, ffn.d_model))
        np.testing.assert_allclose(y[clear], wanted[clear], rtol=1e-3, atol=1e-4)
        assert picked.any(1).all()
        shares.append(picked.mean())
    assert 0.1 < np.mean(shares) < 0.9
    assert ("threshold" in tensors) == (select == "threshold") and len(tensors) == 2 * len(ffns) + 1


@pytest.mark.parametrize("select", ["threshold", "cumulative"])
def test_routers_of_a_profile_are_at_work_in_another_training(select: str) -> None:
    """As they were in their own, frozen: any model of these weights computes the groups that they choose."""
    model, ffns = routed("bert", select=select)
    model.routing.cut.fill_(0.3 if select == "threshold" else 0.6)
    given = {name: value for name, value in batch("bert").items() if name != "labels"}
    seen(model, ffns, "hard", batch("bert"))
    fresh = copy.deepcopy(zoo.tiny_model("bert")).eval()
    again = Routing.of(find_ffns(fresh, find_anatomy(onnx_source("bert").graph()).ffns), model.routing.tensors())
    logits = fresh(**given).logits
    assert again.logits.keys() == model.routing.logits.keys() and len(again.logits) == len(ffns)
    for layer, found in again.logits.items():
        same = again.chosen(found) == model.routing.chosen(model.routing.logits[layer])
        assert same.float().mean() > 0.98 and 0.05 < again.chosen(found).float().mean() < 0.95
        assert not found.requires_grad
    again.mode = "dense"
    assert (fresh(**given).logits - logits).abs().max() > 1e-4
    assert copy.deepcopy(fresh)(**given).logits.shape == logits.shape


@pytest.mark.parametrize("family", [family for family in ACTS if family != "gpt2"])  # whose width no block divides
def test_copies_are_the_routers_of_the_profile(family: str) -> None:
    """What a forward pass chooses is what the compiled model will, of weights that have learned since, too."""
    model, ffns = routed(family, router="copy")
    with torch.no_grad():
        for ffn in ffns:
            ffn.up.module.get_parameter("weight").mul_(1.3)
        seen(model, ffns, "hard", batch(family))
        for layer, logits in model.routing.logits.items():
            model.routing.router(layer).bias.sub_(logits.median() - 0.4 + 0.3 * torch.randn(logits.shape[-1]))
    model.routing.cut.fill_(0.4)
    tensors = model.routing.tensors()
    assert tensors.keys() == {"threshold"} | {f"router.{ffn.layer}.sizes" for ffn in ffns}
    graph, compiled, shares = onnx_source(family).graph(), Routers.of(tensors), []
    of_graph = find_anatomy(graph).ffns
    for ffn, (x, y), exported in zip(ffns, seen(model, ffns, "hard", batch(family)), of_graph, strict=True):
        weight = exported.linears[1 if exported.gated else 0].weight
        weight.values = np.ascontiguousarray(weight.values * np.float32(1.3))
        scores = compiled.by_layer[ffn.layer].bound(exported).scores(x.astype(np.float32))
        found = model.routing.chosen(model.routing.logits[str(ffn.layer)]).reshape(len(x), -1).numpy()
        picked = chosen_by(scores, tensors)
        clear = (np.abs(scores - 0.5) > 1e-4).all(1)
        assert clear.mean() > 0.5
        np.testing.assert_array_equal(found[clear], picked[clear])
        pre = product(x, ffn.up)
        h = ACTS[family](pre) if ffn.gate is None else ACTS[family](product(x, ffn.gate)) * pre
        wanted = product(h * np.repeat(picked, GROUP, 1), Projection(ffn.down, 0, ffn.d_model))
        np.testing.assert_allclose(y[clear], wanted[clear], rtol=1e-3, atol=1e-4)
        shares.append(picked.mean())
    assert 0.05 < np.mean(shares) < 0.95
    again = Routing.of(ffns, tensors)
    for ffn in ffns:
        one, two = (each.router(ffn.layer).tensors(0.0)["sizes"] for each in (model.routing, again))
        np.testing.assert_allclose(two * np.exp(0.4), one, rtol=1e-4)
        with torch.no_grad():
            rows_of(ffn).mul_(3)  # what is read is what was learned, not what the rows are by now
        np.testing.assert_array_equal(again.router(ffn.layer).tensors(0.0)["sizes"], two)


def test_copies_learn_their_sizes_alone_in_soft() -> None:
    """And a deep copy of the model, as a teacher is one, has routers of its own."""
    model, ffns = routed("llama", router="copy")
    given = batch("llama")
    seen(model, ffns, "hard", given)
    for layer, logits in model.routing.logits.items():
        model.routing.router(layer).bias.data.sub_(logits.median())
    model.teach(copy.deepcopy(model))
    model.enter("soft")
    model.train()
    model(**given)["loss"].backward()
    for ffn in ffns:
        bias = model.routing.router(ffn.layer).bias.grad
        assert bias is not None and bias.abs().max() > 0
    learning = {group["lr"] for group in model.groups()}
    assert model.settings.router_lr * ffns[0].d_model ** 0.5 in learning


def rows_of(ffn: FFNModules) -> Tensor:
    return ffn.down.get_parameter("weight")


def test_each_activation_has_its_name() -> None:
    for family in (*ACTS, "qwen2", "gemma"):
        for ffn in find_anatomy(onnx_source(family).graph()).ffns:
            assert ffn.activation.name in ACTIVATIONS
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    for family, name in (("bert", "gelu"), ("gpt2", "gelu_tanh"), ("opt", "relu"), ("llama", "silu")):
        np.testing.assert_allclose(ACTIVATIONS[name](x).numpy(), ACTS[family](x.numpy()), atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma", "gpt_neox"])
def test_another_order_of_neurons_is_the_same_model(family: str) -> None:
    model, ffns = routed(family)
    given, rng = batch(family), np.random.default_rng(SEED)
    before = seen(model, ffns, "dense", given)
    was = [ffn.up.weight.clone() for ffn in ffns]
    for ffn in ffns:
        permute_neurons(ffn, rng.permutation(ffn.d_ff))
    after = seen(model, ffns, "dense", given)
    assert not any(torch.equal(ffn.up.weight, old) for ffn, old in zip(ffns, was, strict=True))
    for (_, y), (_, z) in zip(before, after, strict=True):
        np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4)


def test_modules_of_one_ffn_are_not_those_of_another() -> None:
    model, found = copy.deepcopy(zoo.tiny_model("llama")), find_anatomy(onnx_source("llama").graph()).ffns
    with pytest.raises(ModelError, match="are those of another FFN, too"):
        find_ffns(model, [*found, found[0]])
    model.model.layers[1].mlp.gate_proj.weight.data.mul_(2)
    with pytest.raises(ModelError, match="layer 1 FFN: no linear module of LlamaForCausalLM"):
        find_ffns(model, found)


def test_packed_projections_are_told_apart() -> None:
    """As in Phi-3 and ModernBERT: one module computes gate and up, and the graph's passes see two."""
    torch.manual_seed(SEED)
    packed, down = nn.Linear(6, 16), nn.Linear(8, 6)
    model, x = nn.Sequential(packed, down), torch.randn(5, 6)
    weight = packed.weight.detach().T.numpy().copy()

    def linear(w: np.ndarray) -> Any:
        return SimpleNamespace(w=lambda: w)

    parts = (linear(weight[:, 8:]), linear(weight[:, :8]), linear(down.weight.detach().T.numpy()))
    silu = SimpleNamespace(name="silu")
    found = SimpleNamespace(layer=0, where="layer 0 FFN", up=parts[0], gate=parts[1], down=parts[2], activation=silu)
    (ffn,) = find_ffns(model, [found])  # type: ignore[list-item]
    assert (ffn.up.start, ffn.gate and ffn.gate.start, ffn.d_ff, set(ffn.modules)) == (8, 0, 8, {"up", "down"})

    def output() -> Tensor:
        gate, up = packed(x).detach().chunk(2, -1)
        assert torch.allclose(ffn.hidden(x, nn.functional.silu), nn.functional.silu(gate) * up)
        return down(nn.functional.silu(gate) * up)

    before = output()
    permute_neurons(ffn, np.random.default_rng(SEED).permutation(8))
    assert torch.allclose(output(), before, atol=1e-6) and not np.array_equal(packed.weight.detach().T, weight)


def test_a_teacher_is_dense_while_its_pupil_is_not() -> None:
    model, ffns = routed("llama")
    given = batch("llama")
    dense = seen(model, ffns, "dense", given)[-1][1]
    teacher = copy.deepcopy(model)
    model.teach(teacher)
    model.enter("soft")
    model.train()
    loss = model(**given)["loss"]
    loss.backward()
    assert model.routing.mode == "soft" and teacher.routing.mode == "dense" and not teacher.routing.logits
    pupil_down = dict(model.named_modules())
    assert all(module not in teacher.modules() for module in pupil_down.values())
    own = find_ffns(teacher.model, find_anatomy(onnx_source("llama").graph()).ffns)
    np.testing.assert_allclose(seen(teacher, own, "dense", given)[-1][1], dense, rtol=1e-4, atol=1e-5)
    assert all(router.weight.grad is not None for router in model.routing.routers.values())


@pytest.mark.parametrize("select", ["threshold", "cumulative"])
def test_soft_masks_may_be_scores(select: str) -> None:
    model, ffns = routed("bert", select=select, masks="scores")
    with torch.no_grad():
        for router in model.routing.routers.values():
            router.weight.zero_()
            router.bias.fill_(100.0)
    given = batch("bert")
    for dense, soft in zip(seen(model, ffns, "dense", given), seen(model, ffns, "soft", given), strict=True):
        np.testing.assert_allclose(soft[1], dense[1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for router in model.routing.routers.values():
            router.bias.fill_(-100.0)
    for ffn, (_, y) in zip(ffns, seen(model, ffns, "soft", given), strict=True):
        np.testing.assert_allclose(y, np.broadcast_to(ffn.down.bias.detach().numpy(), y.shape), atol=1e-5)


@pytest.mark.parametrize("select", ["threshold", "cumulative"])
def test_straight_masks_are_hard_and_learn_as_scores_do(select: str) -> None:
    model, ffns = routed("llama", select=select)
    soft, hard = (seen(model, ffns, mode, batch("llama"))[-1][1] for mode in ("soft", "hard"))
    np.testing.assert_allclose(soft, hard, rtol=1e-4, atol=1e-5)
    logits, toward = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    (gradient,) = torch.autograd.grad((model.routing.soft_mask(logits) * toward).sum(), logits)
    score = (logits - model.routing.cut * (select == "threshold")).sigmoid()
    np.testing.assert_allclose(gradient, (toward * score * (1 - score)).detach(), rtol=1e-4, atol=1e-6)


def test_losses_are_the_papers_and_stay_finite_at_the_threshold() -> None:
    scores = torch.rand(7, 5, dtype=torch.float64)
    scores = torch.where((scores - 0.5).abs() < 0.15, scores + 0.31, scores).clamp(0, 1)
    np.testing.assert_allclose(efficiency(scores), (scores.numpy() ** 2).mean(-1))
    np.testing.assert_allclose(separability(scores), (1 / (scores.numpy() - 0.5) ** 2).mean(-1))
    near = torch.full((2, 3), 0.5, requires_grad=True)
    value = separability(near).sum()
    value.backward()
    assert float(value.detach()) == pytest.approx(2 / 0.1**2)
    assert near.grad is not None and torch.isfinite(near.grad).all()
    values, mask = torch.arange(6.0).reshape(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert float(over_tokens([values, 2 * values], mask)) == pytest.approx(1.5 * (0 + 1 + 3) / 3)
    assert float(over_tokens([values], None)) == pytest.approx(2.5)


def test_routers_begin_with_all_groups_on() -> None:
    router = LinearRouter(6, 5)
    router.standardise(torch.randn(6), torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 3.0]))
    assert choose(router(torch.randn(9, 6)), "threshold", 0.0).all()
    assert torch.isfinite(router.scale).all() and router.scale[2] == 0


def test_the_controller_reaches_what_is_asked_for() -> None:
    """Of a model whose groups fall one after the other, the more η outweighs what each is worth, and with inertia."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for wanted, start in itertools.product((0.2, 0.5, 0.9), (0.01, 0.1, 10.0)):
        worth, logits = 10 ** rng.uniform(-2, 0.5, 500), np.full(500, 2.0)
        controller, eta = Controller(wanted, start), start
        for step in range(200):
            pull = (worth - 2 * eta * expit(logits)) / (worth + 0.05)
            logits += 0.1 * pull.clip(-1, 1)
            eta = controller.step(step / 200, float((logits >= 0).mean()))
        assert abs((logits >= 0).mean() - wanted) < 0.1, (wanted, start)


def test_a_controller_goes_on() -> None:
    one, other = Controller(0.3, 0.1), Controller(0.3, 5.0)
    densities = np.linspace(1, 0.5, 8)
    for step in range(5):
        one.step(step / 8, densities[step])
    other.restore(json.loads(json.dumps(one.state())))
    for step in range(5, 8):
        assert one.step(step / 8, densities[step]) == other.step(step / 8, densities[step])


@pytest.mark.parametrize("select", ["threshold", "cumulative"])
def test_a_cut_reaches_any_density(select: Any) -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    logits = [3 * torch.randn(200, 16) + shift for shift in (-4.0, 0.0, 2.0)]
    for density in (0.1, 0.5, 0.95, 1.0):
        cut = fit_cut(logits, select, density)
        assert density_of(logits, select, cut) == pytest.approx(density, abs=0.005)
    assert density_of(logits, select, fit_cut(logits, select, 0.0)) == 1 / 16  # the best one is always computed
    same = [torch.zeros(10, 4)]
    assert density_of(same, select, fit_cut(same, select, 0.5)) in (0.25, 0.5, 1.0)


def test_trimming_goes_on_where_a_cut_moves_the_scores() -> None:
    torch.manual_seed(SEED)
    logits, cut = torch.randn(500, 20), torch.tensor(0.0)
    reached = trim(cut, "threshold", 0.3, lambda: [logits + 0.3 * cut])
    assert reached == pytest.approx(0.3, abs=0.01)
    assert density_of([logits + 0.3 * cut], "threshold", float(cut)) == reached


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_adapters_learn_for_weights_and_go_into_them(family: str) -> None:
    """With masks in between, which the adapters of down projections must not see past."""
    model, ffns = routed(family, lora_rank=2)
    given, names = batch(family), list(model.state_dict())
    model.enter("hard")
    before, weights = seen(model, ffns, "hard", given), copy.deepcopy(model.model.state_dict())
    model.adapt()
    model.enter("hard")
    for (_, y), (_, z) in zip(before, seen(model, ffns, "hard", given), strict=True):
        np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-5)  # B begins at 0
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    assert {len(group["params"]) for group in model.groups()} == {len(learning), 0}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    adapted = adapted_outputs(model, given)
    model.merge()
    assert list(model.state_dict()) == names
    np.testing.assert_allclose(adapted_outputs(model, given), adapted, rtol=1e-3, atol=1e-3)
    for name, value in model.model.state_dict().items():
        change = (value - weights[name]).double()
        if any(name == f"{key}.weight" and module in linear_modules(model.model) for key, module in
               model.model.named_modules() if module is not model.model.get_output_embeddings()):  # fmt: skip
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2, name
        else:
            assert not change.any(), name
    model.enter("hard")
    assert all(parameter.requires_grad for parameter in model.model.parameters())


def adapted_outputs(model: Routed, given: Mapping[str, Tensor]) -> np.ndarray:
    """Logits with hard masks, float64."""
    model.eval()
    with torch.no_grad():
        logits = model.run(given, "hard")
    assert len(model.routing.logits) == len(model.routing.routers)
    return logits.double().numpy()


def recorded_of(model: Routed, ffns: list[FFNModules], family: str, folder: Path | None = None) -> dict[int, Recorded]:
    given = batch(family, 40)
    tokens = torch.stack([given["input_ids"], given["attention_mask"]], 1)

    def collate(some: Sequence[Tensor]) -> dict[str, Tensor]:
        ids, mask = torch.stack(list(some)).unbind(1)
        labels = ids[:, 0] % 3 if family == "bert" else ids
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    lengths = given["attention_mask"].sum(1).numpy()
    examples = Examples(list(tokens), [], collate, lengths)
    return record_inputs(model, ffns, examples, 10**6, folder, weighed=model.has_slopes)


def test_tokens_of_a_classifier_weigh_what_hangs_on_them(tmp_path: Path) -> None:
    """Shares by these weights give the most neurons to the tokens that decide, and to no padding."""
    model, ffns = routed("bert", batch_size=64)
    tokens = batch("bert", 40)["attention_mask"]
    model.enter("layerwise")
    recorded = recorded_of(model, ffns, "bert", tmp_path)
    order = np.argsort(tokens.sum(1).numpy(), kind="stable")
    first = np.zeros(int(tokens.sum()), bool)
    first[np.concatenate([[0], tokens.sum(1).numpy()[order].cumsum()[:-1]])] = True
    last = recorded[ffns[-1].layer].weights
    assert (last[first] > 0).all() and not last[~first].any()
    assert all((each.weights > 0).all() and len(each.x) == len(first) for each in list(recorded.values())[:-1])
    assert all(parameter.grad is None for parameter in model.parameters())
    again = recorded_of(model, ffns, "bert", tmp_path)
    shares = [densities(ffns, model.routing, each, 0.4) for each in (recorded, again)]
    assert shares[0] == shares[1]
    assert np.mean(list(shares[0].values())) == pytest.approx(0.4, abs=0.01)
    assert shares[0][ffns[-1].layer] < 0.3


def test_tokens_that_need_no_neurons_do_not_take_those_of_others() -> None:
    """Their best group is computed in any case, and is not of the share that the others are given."""
    model, ffns = routed("bert", batch_size=64)
    model.enter("layerwise")
    recorded, last = recorded_of(model, ffns, "bert"), ffns[-1]
    standardise(model, recorded)
    x, weights = recorded[last.layer]
    share = float((weights > 0).mean())  # the first tokens alone need any, and may have all
    fit = LayerFit(last, model.routing, recorded[last.layer], share, model.settings)
    fit.run(Clock(1e9, 200, time.monotonic(), 0.0), torch.Generator(), lambda at: None)
    router = model.routing.routers[str(last.layer)]
    chosen = model.routing.chosen(router(torch.from_numpy(x))).double().mean(1).numpy()
    assert chosen[weights > 0].mean() > 0.9 and chosen[weights == 0].mean() < 0.2


def test_tokens_of_a_language_model_weigh_alike() -> None:
    """And its FFNs by the Fisher information of their outputs, where the run goes backward through the model anyway."""
    model, ffns = routed("llama", batch_size=16, soft=0, hard=0)
    assert all((each.weights == 1).all() for each in recorded_of(model, ffns, "llama").values())
    model, ffns = routed("llama", batch_size=16)
    weights = {layer: each.weights for layer, each in recorded_of(model, ffns, "llama").items()}
    assert all((each == each[0]).all() and each[0] > 0 for each in weights.values())
    assert len({float(each[0]) for each in weights.values()}) == len(weights)
